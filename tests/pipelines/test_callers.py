"""What DVC has begun ends with it, and with `blemish run`, whatever stands between them."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from waiting import until

VERB = """
import sys, time
from pathlib import Path
from pipelines.callers import end_with_callers
end_with_callers()
Path(sys.argv[1]).write_text(str(__import__("os").getpid()))
time.sleep(60)
"""
# A caller that runs a line of shell, as DVC does; `; true` keeps the shell from becoming the verb.
CALLER = "import subprocess, sys; subprocess.run(sys.argv[1], shell=True, env=None)"


@pytest.fixture
def begun() -> Iterator[list[psutil.Process]]:
    processes: list[psutil.Process] = []
    yield processes
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
        process.wait(timeout=20)


def verb(pid_file: Path, begun: list[psutil.Process], keeps_shell: bool, **variables: str) -> psutil.Popen:
    line = f'"{sys.executable}" -c \'{VERB}\' "{pid_file}"' + ("; true" if keeps_shell else "")
    environment = {**os.environ, **variables}
    caller = psutil.Popen([sys.executable, "-c", CALLER, line], env=environment, start_new_session=True)
    begun.append(caller)
    until(lambda: pid_file.exists() and pid_file.read_text(), 60)
    begun.append(psutil.Process(int(pid_file.read_text())))
    return caller


def ends(process: psutil.Process, within: float) -> bool:
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(sys.platform == "win32", reason="written for the shells of Linux and macOS")
@pytest.mark.parametrize("keeps_shell", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_verb_ends_with_its_caller(
    tmp_path: Path, begun: list[psutil.Process], keeps_shell: bool, number: signal.Signals
) -> None:
    caller = verb(tmp_path / "pid", begun, keeps_shell)
    assert not ends(begun[-1], within=1.5)
    caller.send_signal(number)
    assert ends(begun[-1], within=20)


@pytest.mark.skipif(sys.platform == "win32", reason="written for the shells of Linux and macOS")
def test_a_verb_ends_with_what_called_its_caller(tmp_path: Path, begun: list[psutil.Process]) -> None:
    run = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    verb(tmp_path / "pid", begun, True, BLEMISH_RUN=str(run.pid))
    assert not ends(begun[-1], within=1.5)
    run.kill()
    run.wait()
    assert ends(begun[-1], within=20)
