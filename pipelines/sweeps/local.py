"""Verb run: all stages of dvc.yaml on this machine, cell beside cell, each with a core of its own.

A second thread gains little in networks this small, so that there are as many cells at once as cores. A cell is
trained, evaluated and exported by one `dvc repro`; its latency is measured alone, when all others are done. What fails
is told and left behind: the report is made of all else.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import MofNCompleteColumn

from pipelines import callers, refusals
from pipelines.errors import StageError
from pipelines.evaluation.outcomes import Evaluation
from pipelines.paths import Cell, Project
from pipelines.progress import progress_bar
from pipelines.report.terminal import one_line
from pipelines.settings.params import Params

_GRACE = 20  # seconds that what runs has to end in, when it is asked to


@dataclass(frozen=True)
class Unit:
    """What one `dvc repro` makes."""

    name: str  # for the user
    stages: tuple[str, ...]  # of dvc.yaml, in their order
    refusal: Path  # where the verb writes why it refused
    after: tuple["Unit", ...] = ()  # whose failure is its own
    cell: Cell | None = None


@dataclass
class _Done:
    """How a unit ended."""

    reason: str | None  # why it failed
    seconds: float


def run(params: Params, project: Project, console: Console, jobs: int) -> list[str]:
    """Make all that params.yaml puts out of date, but for what fails; gives a line for each that did.

    Raises:
        StageError: DVC cannot look at the project, or the report cannot be made.
    """
    with _Processes(project) as processes:
        _require(processes, "check", ["repro", "check"])
        # `check` has just run; where the code lies elsewhere, it is never up to date for DVC.
        if processes.dvc(["status", "--json"], "status") == 0 and outdated(processes.said("status")) <= {"check"}:
            return []
        failures = _make(units(params, project), processes, console, jobs)
        if not failures:
            console.print("measuring latencies, writing the report", highlight=False)
            _require(processes, "report", ["repro"])
            return []
        failed = {unit.name for unit, _ in failures}
        for model, category in params.cells():
            cell = project.cell(model, category, params.seed)
            if cell.evaluation.exists() and cell.title not in failed:
                processes.dvc(["repro", "--single-item", f"latency@{model}-{category}"], f"latency-{model}-{category}")
    return [f"{unit.name}: {done.reason}" for unit, done in failures]


def outdated(status: str) -> set[str]:
    """The stages that `dvc status --json` names, in the last line of what it says."""
    return set(json.loads(status.splitlines()[-1]))


def units(params: Params, project: Project) -> list[Unit]:
    """What is made beside one another, in an order in which nothing waits for long."""
    sources = {
        name: Unit(f"download {name}", (f"download@{name}",), project.refusal("download", name))
        for name in params.download
    }

    def fetched(folder: str) -> tuple[Unit, ...]:
        """What makes the data set that a folder lies in, if any does."""
        path = (project.root / folder).resolve()
        return tuple(unit for name, unit in sources.items() if path.is_relative_to((project.data / name).resolve()))

    prepared = {
        name: Unit(f"prepare {name}", (f"prepare@{name}",), project.refusal("prepare", name), fetched(params.data.root))
        for name in params.data.categories
    }
    photos = {"penalty": params.photos, "textures": params.texture_photos, "distill": params.photos}
    inputs: dict[str, list[Unit]] = {model: [] for model in params.models}
    teachers: list[tuple[Any, Unit]] = []
    for verb, folder in photos.items():
        for model, settings in getattr(params, verb).items():
            if model not in inputs:
                continue
            # A teacher of the same settings is taken over, and has to be there by then.
            alike = [unit for known, unit in teachers if known == settings] if verb == "distill" else []
            after = (*fetched(folder), *alike[:1])
            unit = Unit(f"{verb} {model}", (f"{verb}@{model}",), project.refusal(verb, model), after)
            inputs[model].append(unit)
            if verb == "distill":
                teachers.append((settings, unit))
    cells = [
        Unit(
            cell.title,
            _stages(cell, exported=cell.seed == params.seed),
            cell.refusal,
            (prepared[cell.category], *inputs[cell.model]),
            cell,
        )
        for cell in (project.cell(*training) for training in params.trainings())
    ]
    # Those that a teacher is made for come last, so that no core waits for it.
    cells.sort(key=lambda unit: unit.cell is not None and unit.cell.model in params.distill)
    return [*sources.values(), *prepared.values(), *(unit for found in inputs.values() for unit in found), *cells]


def _stages(cell: Cell, *, exported: bool) -> tuple[str, ...]:
    name = f"{cell.model}-{cell.category}"
    made = (f"train@{name}-{cell.seed}", f"evaluate@{name}-{cell.seed}")
    return (*made, f"export@{name}") if exported else made


def _make(found: Sequence[Unit], processes: "_Processes", console: Console, jobs: int) -> list[tuple[Unit, _Done]]:
    """Run the units, `jobs` at once; gives those that failed."""
    running: dict[str, Future[_Done]] = {}

    def make(unit: Unit) -> _Done:
        for needed in unit.after:  # which was begun before
            if running[needed.name].result().reason is not None:
                return _Done(f"not made, for want of {needed.name}", 0.0)
        unit.refusal.unlink(missing_ok=True)  # of an earlier call: what is refused now is written anew
        started = time.monotonic()
        code = processes.dvc(["repro", "--single-item", *unit.stages], unit.name)
        return _Done(None if code == 0 else processes.reason(unit), time.monotonic() - started)

    with progress_bar(console, MofNCompleteColumn()) as bar, ThreadPoolExecutor(jobs) as pool:
        task = bar.add_task("cells and what they need", total=len(found))
        try:
            for unit in found:
                running[unit.name] = pool.submit(make, unit)
            of = {running[unit.name]: unit for unit in found}
            for number, future in enumerate(as_completed(of), 1):
                told = f"{number} of {len(found)}: {_told(of[future], future.result())}"
                console.print(told, highlight=False, markup=False, soft_wrap=True)
                bar.update(task, completed=number)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            processes.stop()
            raise
    return [(unit, running[unit.name].result()) for unit in found if running[unit.name].result().reason is not None]


def _told(unit: Unit, done: _Done) -> str:
    if done.reason is not None:
        return f"{unit.name} failed: {done.reason}"
    figures = ""
    if unit.cell is not None:
        evaluation = Evaluation.load(unit.cell.evaluation, f"run {unit.cell.verb('evaluate')} again")
        figures = f": {one_line(evaluation.metrics)}"
    return f"{unit.name}{figures} ({done.seconds:.0f} s)"


def _require(processes: "_Processes", name: str, arguments: list[str]) -> None:
    if processes.dvc(arguments, name) != 0:
        raise StageError(processes.told(name))


@dataclass
class _Processes:
    """Those of DVC that run, each in a group of its own, so that none of its children is left behind."""

    project: Project
    _alive: set[subprocess.Popen[bytes]] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stopped: bool = False

    def __enter__(self) -> "_Processes":
        self._before = signal.signal(signal.SIGTERM, _end)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        signal.signal(signal.SIGTERM, self._before)

    def dvc(self, arguments: list[str], name: str) -> int:
        """Run `dvc` and keep what it says in the log of that name; gives its exit code."""
        log = self._log(name)
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "dvc", *arguments]
        if arguments[0] == "repro":
            command.insert(3, "--wait-for-lock")
        with log.open("wb") as file:
            with self._lock:
                if self._stopped:
                    return 1
                process = subprocess.Popen(
                    command,
                    cwd=self.project.root,
                    env=_environment(),
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
                self._alive.add(process)
            code = process.wait()
        with self._lock:
            self._alive.discard(process)
        return code

    def reason(self, unit: Unit) -> str:
        """Why a unit failed: what its verb wrote down, or else what DVC said."""
        found = refusals.read(unit.refusal)
        return self.told(unit.name) if found is None else f"refused by {found.verb}: {found.reason}"

    def said(self, name: str) -> str:
        return self._log(name).read_text(encoding="utf-8", errors="replace")

    def told(self, name: str) -> str:
        """The error that a log ends with, or its last line."""
        lines = [line for line in self.said(name).splitlines() if line.strip()]
        errors = [place for place, line in enumerate(lines) if line.startswith("error: ")]
        if not errors:
            return f"{lines[-1] if lines else 'DVC ended without a word'} ({self._log(name)})"
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

    def _log(self, name: str) -> Path:
        return self.project.root / "work" / "logs" / f"{name}.log"


def _end(_signal: int, _frame: object) -> None:
    raise SystemExit(128 + signal.SIGTERM)


def _interrupt(process: subprocess.Popen[bytes]) -> None:
    """With all that it has begun; upon which runs are closed and locks are given back, but for Windows: see `_kill`."""
    if sys.platform == "win32":
        _kill(process)
    else:
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.killpg(process.pid, signal.SIGINT)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """With all that it has begun, which Windows knows by who began it."""
    if sys.platform == "win32":
        with contextlib.suppress(psutil.NoSuchProcess):
            top = psutil.Process(process.pid)
            for one in [*top.children(recursive=True), top]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
    else:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


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
