"""`blemish sweep` on this machine: as `run` does, whatever is killed."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from clone import commit, copy_project, environment
from conftest import CATEGORY, draw_category, tiny_params, write_params
from mlflow import MlflowClient
from tiny_projects import MODELS

from pipelines.sweeps.local import outdated

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="kills as POSIX does")

CODE = ("anomaly_models", "pipelines", "pretrained", ".dvc", "cli.py", "dvc.yaml", ".dvcignore", ".gitignore")
PATIENCE = 600.0  # seconds
# Also where the tests run in the background of a shell, which keeps Ctrl-C from all that it begins there
INTERRUPTIBLE = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


def lay_out(root: Path, *models: str) -> Path:
    copy_project(root, *CODE)
    values = tiny_params()
    values["models"] = {name: MODELS[name] for name in models or ("fapm", "bgad")}
    write_params(root, values)
    draw_category(root / "images" / CATEGORY, train=8, good=3, defect=3)
    commit(root)
    return root


@pytest.fixture
def temporary() -> Iterator[Path]:
    """With a name as short as the paths of sockets must be."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


def sweep(root: Path, temporary: Path, *options: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", INTERRUPTIBLE, "cli.py", "sweep", *options],
        cwd=root,
        env=environment(Path(sys.executable).parent, TMPDIR=str(temporary)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def workers(root: Path, cell: str = "") -> list[psutil.Process]:
    """Those that work on a cell; of any, if none is named, with the processes that Ray has beside them."""
    found = []
    for process in psutil.process_iter():
        try:
            if "".join(process.cmdline()[:1]).startswith(f"ray::{cell}") and process.cwd() == str(root):
                found.append(process)
        except psutil.Error:
            continue
    return found


def begun(root: Path, cell: str) -> psutil.Process:
    """The worker of a cell, once its log is there."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if (root / "work" / "logs" / f"{cell}.log").exists() and (found := workers(root, cell)):
            return found[0]
        time.sleep(0.02)
    raise TimeoutError("no cell is worked on")


def runs(root: Path) -> dict[str, list[Any]]:
    """By name."""
    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    found: dict[str, list[Any]] = {}
    for run in client.search_runs([experiment.experiment_id]):
        found.setdefault(str(run.info.run_name), []).append(run)
    return found


def figures(root: Path) -> dict[str, Any]:
    """All but the time that they took."""
    found: dict[str, Any] = {}
    for file in root.glob("metrics/*/*/*.json"):
        found[file.parts[-3]] = json.loads(file.read_text()) | {"train_seconds": None}
    return found | {f"{file.parts[-4]} weights": file.read_bytes() for file in root.glob("models/**/model.safetensors")}


def status(root: Path) -> set[str]:
    command = [sys.executable, "-m", "dvc", "status", "--json"]
    shown = environment(Path(sys.executable).parent)
    return outdated(subprocess.run(command, cwd=root, env=shown, capture_output=True, text=True, check=True).stdout)


def test_what_is_killed_or_stopped_changes_no_figure(
    tmp_path: Path, temporary: Path, blemish: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    serial, root = lay_out(tmp_path / "serial"), lay_out(tmp_path / "swept")
    monkeypatch.chdir(serial)
    one_by_one = [(verb, model, CATEGORY) for model in ("fapm", "bgad") for verb in ("train", "evaluate")]
    for verb in (("prepare", CATEGORY), *one_by_one):
        outcome = blemish(*verb)
        assert outcome.code == 0, outcome.err

    # Ctrl-C, of all that the terminal runs: nothing is left behind
    first = sweep(root, temporary, "--jobs", "2")
    begun(root, f"fapm on {CATEGORY}")
    os.killpg(first.pid, signal.SIGINT)
    first.communicate(timeout=PATIENCE)
    assert first.returncode != 0
    assert workers(root) == []
    assert list(temporary.glob("blemish-ray-*")) == []
    assert all(run.info.status != "RUNNING" for named in runs(root).values() for run in named)

    # A worker dies in the middle of a cell, which is begun again
    second = sweep(root, temporary, "--jobs", "2")
    begun(root, f"bgad on {CATEGORY}").kill()
    said, _ = second.communicate(timeout=PATIENCE)
    assert second.returncode == 0, said
    assert "its worker was lost (WorkerCrashedError); it is begun again" in said
    assert "(raylet)" not in said  # Ray's words are in a log
    assert figures(root) == figures(serial) != {}
    assert status(root) <= {"check"}
    assert not list((root / "work").glob("*/*/*.done"))

    # All cells are nested in the run of a sweep
    found = runs(root)
    parents = {run.info.run_id for run in found["sweep"]}
    assert {run.info.status for run in found["sweep"]} == {"KILLED", "FINISHED"}
    for name in (f"fapm-{CATEGORY}", f"bgad-{CATEGORY}"):
        assert found[name][0].info.status == "FINISHED"
        assert found[name][0].data.tags["mlflow.parentRunId"] in parents

    # Nothing is to do
    third = sweep(root, temporary, "--jobs", "2")
    said, _ = third.communicate(timeout=PATIENCE)
    assert third.returncode == 0, said
    assert " of 2: " not in said


def test_what_fails_is_told_and_what_is_done_is_not_done_again(tmp_path: Path, temporary: Path) -> None:
    """Also where DVC was not told of it, before all was killed; each cell is trained by two processes."""
    root = lay_out(tmp_path / "swept", "adfa", "bgad")
    values = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
    values["models"]["bgad"]["learning_rate"] = 1e30
    values["sweep"] = {"num_cpus": 2, "processes": 2}
    write_params(root, values)
    one = sweep(root, temporary, "--jobs", "2")
    begun(root, f"bgad on {CATEGORY}")
    one.kill()
    one.communicate()
    while workers(root):
        time.sleep(0.1)
    assert json.loads((root / "work" / "adfa" / CATEGORY / "seed0.done").read_text())["stages"] == [
        f"train@adfa-{CATEGORY}-0",
        f"evaluate@adfa-{CATEGORY}-0",
        f"export@adfa-{CATEGORY}",
    ]
    weights = root / "models" / "adfa" / CATEGORY / "seed0.trained" / "model.safetensors"
    made = weights.stat().st_mtime_ns
    two = sweep(root, temporary, "--jobs", "2")
    said, _ = two.communicate(timeout=PATIENCE)
    assert two.returncode == 1
    assert f"bgad on {CATEGORY} failed: refused by train: " in said
    assert weights.stat().st_mtime_ns == made
    assert {stage for stage in status(root) if "adfa" in stage} == set()
    (run,) = runs(root)[f"adfa-{CATEGORY}"]
    assert run.data.tags["processes"] == "2"
    assert run.data.tags["mlflow.parentRunId"]


def test_a_cell_larger_than_the_machine(tmp_path: Path, temporary: Path) -> None:
    root = lay_out(tmp_path / "swept")
    with (root / "params.yaml").open("a") as file:
        file.write("sweep: {models: {bgad: {num_cpus: 1000, num_gpus: 0, memory: 0, processes: 1}}}\n")
    one = sweep(root, temporary, "--jobs", "1")
    said, _ = one.communicate(timeout=PATIENCE)
    assert one.returncode == 1
    assert said.splitlines()[-1] == (
        "error: a cell of bgad wants 1e+03 CPUs, and no machine has it: the most that one has is 1 CPUs; lower sweep "
        "in params.yaml, or add a machine"
    )
    assert not (root / "models").exists()
