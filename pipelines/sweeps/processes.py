"""DVC's own processes, of which none is left behind."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from pipelines import callers, refusals
from pipelines.errors import StageError
from pipelines.lineage import ROOT
from pipelines.paths import Project
from pipelines.sweeps import forks
from pipelines.variables import python_path

_COMMIT = Path(__file__).with_name("commit.py")  # imports DVC, which takes its time
_REPRO = "pipelines.sweeps.repro"  # likewise
_LIGHT = {"check", "download", "prepare"}  # verbs that import no network
_GRACE = 20  # seconds that what runs has to end in, when it is asked to

_Process = subprocess.Popen[bytes] | forks.Forked


@dataclass
class Processes:
    """Those of DVC that run, each in a group of its own, so that none of its children is left behind."""

    project: Project
    _alive: set[_Process] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stopped: bool = False

    def __enter__(self) -> "Processes":
        self._before = signal.signal(signal.SIGTERM, _end)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        signal.signal(signal.SIGTERM, self._before)

    def dvc(self, arguments: list[str], name: str) -> int:
        """Run `dvc` and keep what it says in the log of that name; gives its exit code."""
        if arguments[0] != "repro":
            return self._run(["-m", "dvc", *arguments], name)
        options = ["--wait-for-lock", *arguments]

        def begin(log: Path) -> _Process:
            if _imports_much(arguments):
                with contextlib.suppress(OSError):
                    return forks.repro(options, log, self.project.root, _environment())
            return self._begun(["-P", "-m", _REPRO, *options], log, PYTHONPATH=python_path(ROOT))

        return self._ended(begin, name)

    def _run(self, arguments: Sequence[str], name: str, asked: str = "") -> int:
        return self._ended(lambda log: self._begun(arguments, log), name, asked)

    def _begun(self, arguments: Sequence[str], log: Path, **more: str) -> subprocess.Popen[bytes]:
        with log.open("ab") as file:
            return subprocess.Popen(
                [sys.executable, *arguments],
                cwd=self.project.root,
                env=_environment() | more,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.PIPE,
                start_new_session=True,
            )

    def _ended(self, begin: Callable[[Path], _Process], name: str, asked: str = "") -> int:
        """The exit code of what is begun with an empty log, once it has ended."""
        log = self.project.log(name)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_bytes(b"")
        with self._lock:
            stopped = self._stopped
        if stopped:
            return 1
        process = begin(log)
        with self._lock:
            self._alive.add(process)
            stopped = self._stopped
        if stopped:  # meanwhile, by who did not know of this one
            _kill(process)
        if isinstance(process, subprocess.Popen):
            process.communicate(asked.encode())
        code = process.wait()
        if code < 0:  # and DVC has said nothing of it
            with log.open("ab") as file:
                file.write(f"\nerror: {_killed(-code)}\n".encode())
        with self._lock:
            self._alive.discard(process)
        return code

    def reason(self, name: str, refusal: Path) -> str:
        """Why what has that log failed: what its verb wrote down, or else what DVC said."""
        found = refusals.read(refusal)
        return self.told(name) if found is None else found.told

    def require(self, name: str, arguments: list[str]) -> None:
        """Run `dvc`; raises StageError with what it says if it fails."""
        if self.dvc(arguments, name) != 0:
            raise StageError(self.told(name))

    def commit(self, stages: Sequence[str]) -> None:
        """Have DVC take stages as done; raises StageError with what it says if that fails."""
        if self._run(["-P", "-X", "utf8", str(_COMMIT)], "commit", asked="\n".join(stages)) != 0:
            raise StageError(self.told("commit"))

    def said(self, name: str) -> str:
        return self.project.log(name).read_text(encoding="utf-8", errors="replace")

    def told(self, name: str) -> str:
        """The error that a log ends with, or its last line."""
        lines = [line for line in self.said(name).splitlines() if line.strip()]
        errors = [place for place, line in enumerate(lines) if line.startswith("error: ")]
        if not errors:
            return f"{lines[-1] if lines else 'DVC ended without a word'} ({self.project.log(name)})"
        first = lines[errors[0]].removeprefix("error: ")
        more = [line for line in lines[errors[0] + 1 :] if line.startswith("  ")]
        return "\n".join([first, *more])

    def stop(self) -> None:
        """End what runs, with all its children."""
        with self._lock:
            self._stopped, alive = True, list(self._alive)
        for process in alive:
            _interrupt(process)
        for process in alive:
            try:
                process.wait(_GRACE)
            except subprocess.TimeoutExpired:
                _kill(process)
                process.wait()
        forks.end()


def _imports_much(arguments: Sequence[str]) -> bool:
    """Of `repro`, with options and names of stages; without a name, it is all of them."""
    stages = [word for word in arguments[1:] if not word.startswith("--")]
    return not stages or any(stage.partition("@")[0] not in _LIGHT for stage in stages)


def _killed(number: int) -> str:
    name = signal.Signals(number).name
    why = ", as a system does that has no memory left" if name == "SIGKILL" else ""
    return f"the process was ended by {name}{why}; call again, and it goes on"


def _end(_signal: int, _frame: object) -> None:
    raise SystemExit(128 + signal.SIGTERM)


def _interrupt(process: _Process) -> None:
    """With all that it has begun; upon which runs are closed and locks are given back, but for Windows: see `_kill`."""
    if sys.platform == "win32":
        _kill(process)
    else:
        _signal(process, signal.SIGINT)


def _kill(process: _Process) -> None:
    """With all that it has begun, which Windows knows by who began it."""
    if sys.platform == "win32":
        with contextlib.suppress(psutil.NoSuchProcess):
            top = psutil.Process(process.pid)
            for one in [*top.children(recursive=True), top]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
    else:
        _signal(process, signal.SIGKILL)


def _signal(process: _Process, number: signal.Signals) -> None:
    """To its group, or to a process that has just begun and has none yet."""
    if sys.platform == "win32":
        raise AssertionError("which has neither")
    for send in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError):  # it may have ended meanwhile
            send(process.pid, number)
            return


def _environment() -> dict[str, str]:
    """That of this process; `python` of dvc.yaml is this one, and each cell has a core."""
    folder = Path(sys.executable).parent
    path = os.pathsep.join([str(folder), os.environ.get("PATH", "")])
    return os.environ | {
        "PATH": path,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "DVC_NO_ANALYTICS": "true",
        callers.RUN: str(os.getpid()),
    }
