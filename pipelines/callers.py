"""A verb that DVC calls ends when DVC is gone, and so does all that `blemish run` has begun.

A scheduler that stops a job may reach nothing but the process that it started. What that one had begun would go on
training, with its locks held and nobody who waits for it.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Sequence

import psutil

RUN = "BLEMISH_RUN"  # in the environment: the process of `blemish run`, which DVC stands between
_SHELLS = {"sh", "bash", "dash", "zsh", "ksh", "fish", "cmd.exe", "powershell.exe"}
_EVERY = 1.0  # s
_CLOCK_SLACK = 5.0  # seconds by which a process's start seems to move when the clock is set


def end_with_callers() -> None:
    """As SIGTERM does, within seconds after DVC or `blemish run` has ended. For what DVC calls, and no person."""
    with contextlib.suppress(psutil.Error):  # a system that hides processes from one another
        threading.Thread(target=_watch, args=(_callers(),), daemon=True).start()


def _callers() -> list[psutil.Process]:
    """The nearest, up to DVC, which may call a shell; and `blemish run`, if that called DVC."""
    found = []
    for process in psutil.Process().parents():
        found.append(process)
        if process.name() not in _SHELLS:
            break
    with contextlib.suppress(KeyError, ValueError, psutil.NoSuchProcess):
        found.append(psutil.Process(int(os.environ[RUN])))
    return found


def _watch(callers: Sequence[psutil.Process]) -> None:
    while all(map(_runs, callers)):
        time.sleep(_EVERY)
    os.kill(os.getpid(), signal.SIGTERM)


def _runs(process: psutil.Process) -> bool:
    """Not one that was killed and that nobody has asked how it ended."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def is_gone(pid: int, started: float) -> bool:
    """Whether the process of this machine that had this id and began then has ended, however it did."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return True  # killed, and nobody has asked how it ended; a container may have none who would
        # The operating system hands out process ids again; the start time tells two processes apart.
        return abs(process.create_time() - started) > _CLOCK_SLACK
    except psutil.NoSuchProcess:
        return True
