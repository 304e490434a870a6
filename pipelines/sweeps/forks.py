"""`dvc repro` in processes that begin with torch, timm and MLflow imported: copies of one that has imported them.

Their imports take seconds of a core, which each cell would spend again, and memory, of which copies share what they do
not write to. The copies are made by Python's own fork server, a process that does nothing else. On Linux alone: macOS
says of its own libraries that they must not be copied so, and Windows cannot.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

from pipelines.lineage import ROOT
from pipelines.variables import python_path, set_for_now

# What a cell imports by and by; the server passes over a name that is not there.
_IMPORTED = (
    "pipelines.sweeps.repro",
    "pipelines.sweeps.stages",
    "pipelines.training.train",
    "pipelines.evaluation.evaluate",
    "pipelines.deployment.export",
    "timm",
    "mlflow.store.tracking.sqlalchemy_store",
    "kornia.filters",
    "torch.export",
    "onnxscript.function_libs.torch_lib.ops",
)
# How a process has ended is told once: of two threads that ask, one would hear that nobody knows.
_LOCK = threading.Lock()


class Forked:
    """A process that has been begun so, by the names of `subprocess.Popen`."""

    def __init__(self, process: BaseProcess) -> None:
        assert process.pid is not None, "it has been begun"
        self._process, self.pid = process, process.pid

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, or the negative number of the signal that ended it.

        Raises:
            subprocess.TimeoutExpired: it has not ended after so many seconds.
        """
        if not wait([self._process.sentinel], timeout):
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0.0)
        with _LOCK:
            self._process.join()
        assert self._process.exitcode is not None, "it has ended"
        return self._process.exitcode


def repro(arguments: Sequence[str], log: Path, folder: Path, environment: Mapping[str, str]) -> Forked:
    """`repro.main` in a project's folder, in a process and group of its own, which says all in the log.

    Raises:
        OSError: there can be no such process here.
    """
    if sys.platform != "linux":
        raise OSError("on Linux alone")
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_repro, args=(list(arguments), str(log), str(folder), dict(environment)))
    # The server reads these when it begins: where this code is, that nothing is imported from a project's folder, and
    # on how many threads torch is to compute.
    read = {"PYTHONPATH": python_path(ROOT), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": environment["OMP_NUM_THREADS"]}
    with _LOCK:
        context.set_forkserver_preload(list(_IMPORTED))
        resource_tracker.ensure_running()  # which undoes what `_deaf` does
        with set_for_now(**read), _deaf():
            try:
                process.start()
            except EOFError as error:
                raise OSError("the fork server has ended") from error
    return Forked(process)


def end() -> None:
    """End the server, at its imports or after them; who needs one later begins another.

    Before, what it has forked must have been waited for: how that ended is known to the server alone.
    """
    if sys.platform != "linux":
        return
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if "multiprocessing.forkserver" in " ".join(child.cmdline()):
                child.kill()
                os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # multiprocessing wants to hear of it, too


@contextmanager
def _deaf() -> Iterator[None]:
    """What begins within this does not hear Ctrl-C; who began it does, and ends it."""
    if sys.platform == "win32":
        raise AssertionError("which has no fork server")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _repro(arguments: list[str], log: str, folder: str, environment: dict[str, str]) -> None:
    if sys.platform == "win32":
        raise AssertionError("which has no fork server")
    os.setsid()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    said = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(said, stream)
    os.close(said)
    from pipelines.sweeps.repro import main  # imports DVC, which the server has done

    main(arguments)
