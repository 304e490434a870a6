"""DVC's stages, done in its own process."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from clone import REPOSITORY, environment
from waiting import until

from pipelines.paths import Project
from pipelines.settings.new_project import dvc_yaml
from pipelines.sweeps import forks
from pipelines.sweeps.processes import Processes
from pipelines.sweeps.repro import arguments

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there DVC calls a shell")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is forked")
ITEM = "--model fapm --category 'two words' --seed 0"
STAGES = """
stages:
  here:
    cmd: blemish --version
    outs: [{nothing: {persist: true, cache: false}}]
  in_a_shell:
    cmd: echo "$DVC_STAGE" > told.txt
    outs: [told.txt]
  refused:
    cmd: blemish prepare 'two words'
    deps: [told.txt]
"""


def test_every_stage_is_a_call_of_this_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    for text in ((REPOSITORY / "dvc.yaml").read_text(encoding="utf-8"), dvc_yaml()):
        for name, stage in yaml.safe_load(text)["stages"].items():
            words = arguments(stage["cmd"].replace("${item}", ITEM))
            assert words is not None
            assert words[0] == name
            assert words[1:] in ([], ["--params-only"], ["--model", "fapm", "--category", "two words", "--seed", "0"])


@pytest.mark.parametrize(
    "command",
    [
        "python other.py train",
        "python -m cli train",
        "python cli.py train > log",
        "python cli.py train && echo done",
        "python cli.py train $MODEL",
        "python cli.py train *",
        "python cli.py train 'fapm",
        "OMP_NUM_THREADS=2 python cli.py train",
        "",
    ],
)
def test_all_else_is_a_shell_s(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert arguments(command) is None


def test_other_code_is_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert arguments("blemish train fapm") == ["train", "fapm"]
    (tmp_path / "cli.py").touch()
    assert arguments("python cli.py train fapm") is None


def test_stages_end_as_their_commands_do(tmp_path: Path) -> None:
    """None of which could be called: there is no `blemish` in PATH."""
    (tmp_path / "dvc.yaml").write_text(STAGES)
    (tmp_path / "nothing").touch()
    known = {**environment(tmp_path), "PATH": os.defpath, "PYTHONPATH": str(REPOSITORY), "DVC_NO_ANALYTICS": "true"}

    def dvc(*words: str) -> tuple[int, str]:
        command = [sys.executable, "-P", "-m", *words]
        done = subprocess.run(command, cwd=tmp_path, env=known, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    assert dvc("dvc", "init", "--no-scm")[0] == 0
    code, said = dvc("pipelines.sweeps.repro", "repro")
    assert code == 255
    assert "> blemish --version\nblemish " in said
    assert (tmp_path / "told.txt").read_text() == "in_a_shell\n"
    assert "error: params.yaml: " in said
    assert "failed to run: blemish prepare 'two words', exited with 1" in said
    assert "Traceback" not in said
    assert set(yaml.safe_load((tmp_path / "dvc.lock").read_text())["stages"]) == {"here", "in_a_shell"}


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    with Processes(Project(tmp_path)) as processes:
        assert processes.dvc(["init", "--no-scm"], "init") == 0
        yield processes


WHO = r"""
stages:
  told:
    cmd: tr '\0' '\n' < /proc/$PPID/cmdline > told.txt && pwd >> told.txt && env >> told.txt
    outs: [told.txt]
"""


@LINUX
def test_a_cell_s_process_is_forked_from_one_that_has_imported_all(
    processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OF_THE_TEST", "here")
    (tmp_path / "dvc.yaml").write_text(WHO)
    assert processes.dvc(["repro", "told"], "told") == 0
    told = (tmp_path / "told.txt").read_text().splitlines()
    assert any("multiprocessing.forkserver" in line for line in told)
    assert {str(tmp_path), "OF_THE_TEST=here", f"BLEMISH_RUN={os.getpid()}", "OMP_NUM_THREADS=1"} <= set(told)
    assert not [line for line in told if line.startswith("PYTHONSAFEPATH=")]
    assert "Running stage 'told'" in processes.said("told")


@LINUX
def test_where_nothing_can_be_forked_a_process_is_begun(
    processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("AF_UNIX path too long")

    monkeypatch.setattr(forks, "repro", refuse)
    (tmp_path / "dvc.yaml").write_text(WHO)
    assert processes.dvc(["repro", "told"], "told") == 0
    assert "pipelines.sweeps.repro" in (tmp_path / "told.txt").read_text().splitlines()


SLEEPS = "stages: {sleeps: {cmd: 'echo $$ > pid.txt && exec sleep 100'}}"


@LINUX
def test_none_is_left_behind(processes: Processes, tmp_path: Path) -> None:
    (tmp_path / "dvc.yaml").write_text(SLEEPS)
    with ThreadPoolExecutor() as pool:
        running = pool.submit(processes.dvc, ["repro"], "sleeps")
        until(lambda: (tmp_path / "pid.txt").exists() and (tmp_path / "pid.txt").read_text().strip())
        processes.stop()
        assert running.result(timeout=30) != 0
    until(lambda: not psutil.pid_exists(int((tmp_path / "pid.txt").read_text())))
    assert processes.dvc(["repro"], "sleeps") == 1  # none is begun any more


@LINUX
def test_nor_one_that_is_just_begun(processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, original = [], forks.repro

    def late(*arguments: Any) -> forks.Forked:
        processes.stop()
        begun.append(original(*arguments))
        return begun[0]

    monkeypatch.setattr(forks, "repro", late)
    (tmp_path / "dvc.yaml").write_text(SLEEPS)
    assert processes.dvc(["repro"], "sleeps") == -signal.SIGKILL
    assert begun[0].wait() == -signal.SIGKILL  # as often as it is asked
    assert not psutil.pid_exists(begun[0].pid)


@LINUX
def test_nor_what_all_are_to_be_forked_from(
    processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forks.end()
    begun = tmp_path / "begun.txt"
    (tmp_path / "slow.py").write_text(f"import time\nopen({str(begun)!r}, 'w').close()\ntime.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(forks, "_IMPORTED", ("slow",))
    (tmp_path / "dvc.yaml").write_text(SLEEPS)
    with ThreadPoolExecutor() as pool:
        running = pool.submit(processes.dvc, ["repro"], "sleeps")
        until(begun.exists)
        processes.stop()
        assert running.result(timeout=30) != 0
    alive = [one for one in psutil.Process().children() if one.status() != psutil.STATUS_ZOMBIE]
    assert not [one for one in alive if "forkserver" in " ".join(one.cmdline())]


@LINUX
def test_what_is_imported_runs_no_threads_of_python() -> None:
    """A copy would have their locks, and not them."""
    code = "import threading; from pipelines.sweeps.forks import _IMPORTED; [__import__(name) for name in _IMPORTED]"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print(threading.enumerate())"],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count("Thread(") == 1, done.stdout
    assert not done.stderr  # which a user would read


def test_who_ended_a_process_is_told(tmp_path: Path) -> None:
    (tmp_path / "dvc.yaml").write_text("stages: {killed: {cmd: kill -9 $PPID}}")
    with Processes(Project(tmp_path)) as processes:
        assert processes.dvc(["init", "--no-scm"], "init") == 0
        assert processes.dvc(["repro"], "killed") == -signal.SIGKILL
        told = processes.reason("killed", tmp_path / "nothing.json")
    assert (
        told == "the process was ended by SIGKILL, as a system does that has no memory left; call again, and it goes on"
    )
