"""Verbs in processes of their own, to be killed or starved.

They are forked from one that has imported all: each begins at once, and a random moment seldom falls into an import.
"""

import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from pipelines import files

_CONTEXT = multiprocessing.get_context("forkserver")
# Those that take long to import, and what imports them; nothing here computes, or a fork would inherit its threads.
_PRELOADED = """
    torch timm kornia.color kornia.filters scipy.ndimage sympy safetensors.torch matplotlib.figure rich.progress
    requests mlflow mlflow.pyfunc mlflow.store.tracking.sqlalchemy_store
    onnx onnxscript onnxruntime torch.onnx._internal.exporter._core
    cli pipelines.sources.download pipelines.preparation.prepare pipelines.preparation.penalty
    pipelines.preparation.textures pipelines.teachers.distill pipelines.training.train pipelines.evaluation.evaluate
    pipelines.deployment.export pipelines.deployment.latency pipelines.report.report
"""
_CONTEXT.set_forkserver_preload(_PRELOADED.split())

LOG = ".out"  # of the verb; no result

Fault = Callable[[], None]  # what is done to the process before its verb begins


@dataclass(frozen=True, slots=True)
class Ended:
    """How a verb ended; `code` is minus the signal where one killed it."""

    code: int
    output: str
    seconds: float

    @property
    def lines(self) -> list[str]:
        return self.output.splitlines()


def nothing() -> None:
    """No fault."""


@dataclass(frozen=True, slots=True)
class KillAtRename:
    """SIGKILL before or after the n-th rename, from 0, of files or folders; where there is none, all ends as it would.

    To exchange two folders is a rename too; with `exchanges` nothing else is.
    """

    number: int
    after: bool
    exchanges: bool = False

    def __call__(self) -> None:
        seen = 0

        def watched(rename: Callable[..., Any]) -> Callable[..., Any]:
            def renamed(*names: Any, **more: Any) -> Any:
                nonlocal seen
                here, seen = seen == self.number, seen + 1
                if here and not self.after:
                    os.kill(os.getpid(), signal.SIGKILL)
                done = rename(*names, **more)
                if here:
                    os.kill(os.getpid(), signal.SIGKILL)
                return done

            return renamed

        files._exchanged = watched(files._exchanged)
        if not self.exchanges:
            os.replace, os.rename = watched(os.replace), watched(os.rename)


@dataclass(frozen=True, slots=True)
class SmallFiles:
    """No file may grow beyond this: what a full disk is to the verb, on any file system and without being root."""

    num_bytes: int

    def __call__(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.num_bytes, self.num_bytes))


@dataclass(frozen=True, slots=True)
class LittleMemory:
    """So many bytes more than the process has after its imports."""

    num_bytes: int

    def __call__(self) -> None:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        most = pages * resource.getpagesize() + self.num_bytes
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


@dataclass(frozen=True, slots=True)
class Begun:
    """A verb that runs."""

    process: BaseProcess
    log: Path
    at: float  # seconds of the monotonic clock

    def ended(self, kill_after: float | None = None) -> Ended:
        """Wait for its end; SIGKILL it after so many seconds, if it still runs then."""
        if kill_after is not None:
            self.process.join(kill_after)
            self.process.kill()
        self.process.join()
        assert self.process.exitcode is not None
        output = self.log.read_text(encoding="utf-8", errors="replace")
        return Ended(self.process.exitcode, output, time.monotonic() - self.at)


def begin(root: Path, *arguments: str, fault: Fault = nothing, log: str = LOG) -> Begun:
    begun = Begun(_CONTEXT.Process(target=_play, args=(root, arguments, fault, log)), root / log, time.monotonic())
    begun.process.start()
    return begun


def run(root: Path, *arguments: str, fault: Fault = nothing, kill_after: float | None = None) -> Ended:
    """Call a verb in the project, and wait for its end."""
    return begin(root, *arguments, fault=fault).ended(kill_after)


def _play(root: Path, arguments: tuple[str, ...], fault: Fault, name: str) -> None:
    import cli
    from pipelines.training import loop

    log = os.open(root / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    os.chdir(root)
    sys.argv = ["blemish", *arguments]
    loop.CHECKPOINT_SECONDS = 0.0
    fault()
    cli.main()
