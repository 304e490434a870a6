"""Verb run: all stages of dvc.yaml on this machine, cell beside cell, each with a core of its own.

A second thread gains little in networks this small, so that there are as many cells at once as cores. A cell is
trained, evaluated and exported by one process (`repro.py`), which begins with its imports done (`forks.py`); its
latency is measured alone, when all others are done. What fails is told and left behind: the report is made of all else.
"""

import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn

from pipelines.evaluation.outcomes import Evaluation
from pipelines.paths import Cell, Project
from pipelines.progress import progress_bar
from pipelines.report.terminal import one_line
from pipelines.settings.params import Params
from pipelines.sweeps.processes import Processes


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
    with Processes(project) as processes:
        if not begin(processes):
            return []
        return finish(params, make(units(params, project), processes, console, jobs), processes, console)


def begin(processes: Processes) -> bool:
    """Check params.yaml as DVC's stage does; gives whether anything is out of date."""
    processes.require("check", ["repro", "check"])
    # `check` has just run; where the code lies elsewhere, it is never up to date for DVC.
    return processes.dvc(["status", "--json"], "status") != 0 or not outdated(processes.said("status")) <= {"check"}


def finish(params: Params, failures: Mapping[str, str], processes: Processes, console: Console) -> list[str]:
    """Measure latencies, when nothing else runs; without `failures`, whose reasons are by name, DVC ends with a report.

    Gives a line for each failure.
    """
    console.print("measuring latencies, writing the report", highlight=False)
    if not failures:
        processes.require("report", ["repro"])
        return []
    for model, category in params.cells():
        cell = processes.project.cell(model, category, params.seed)
        if cell.evaluation.exists() and cell.title not in failures:
            processes.dvc(["repro", "--single-item", f"latency@{model}-{category}"], f"latency-{model}-{category}")
    return [f"{name}: {reason}" for name, reason in failures.items()]


def outdated(status: str) -> set[str]:
    """The stages that `dvc status --json` names, in the last line of what it says."""
    return set(json.loads(status.splitlines()[-1]))


def units(params: Params, project: Project) -> list[Unit]:
    """What is made beside one another: what others wait for first, last the cells that take seconds to learn."""
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
    # The short ones last: they leave no core without work for long while another ends.
    cells.sort(key=lambda unit: unit.cell is not None and params.model_config_of(unit.cell.model).learns_at_once)
    return [*sources.values(), *prepared.values(), *(unit for found in inputs.values() for unit in found), *cells]


def _stages(cell: Cell, *, exported: bool) -> tuple[str, ...]:
    name = f"{cell.model}-{cell.category}"
    made = (f"train@{name}-{cell.seed}", f"evaluate@{name}-{cell.seed}")
    return (*made, f"export@{name}") if exported else made


def make(found: Sequence[Unit], processes: Processes, console: Console, jobs: int) -> dict[str, str]:
    """Run the units, `jobs` at once: always the first of those that wait for no other.

    Gives why those that failed did, by name.
    """

    def one(unit: Unit, wanted: str | None) -> _Done:
        if wanted is not None:
            return _Done(for_want_of(wanted), 0.0)
        unit.refusal.unlink(missing_ok=True)  # of an earlier call: what is refused now is written anew
        started = time.monotonic()
        code = processes.dvc(["repro", "--single-item", *unit.stages], unit.name)
        return _Done(None if code == 0 else processes.reason(unit.name, unit.refusal), time.monotonic() - started)

    waiting, running, done = list(found), dict[Future[_Done], Unit](), dict[str, _Done]()
    with progress_bar(console, MofNCompleteColumn()) as bar, ThreadPoolExecutor(jobs) as pool:
        task = bar.add_task("cells and what they need", total=len(found))
        try:
            while waiting or running:
                ready = [unit for unit in waiting if all(needed.name in done for needed in unit.after)]
                for unit in ready[: jobs - len(running)]:
                    waiting.remove(unit)
                    failed = [needed.name for needed in unit.after if done[needed.name].reason is not None]
                    running[pool.submit(one, unit, failed[0] if failed else None)] = unit
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    unit = running.pop(future)
                    done[unit.name] = future.result()
                    told = f"{len(done)} of {len(found)}: {_told(unit, done[unit.name])}"
                    console.print(told, highlight=False, markup=False, soft_wrap=True)
                    bar.update(task, completed=len(done))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            processes.stop()
            raise
    return {unit.name: reason for unit in found if (reason := done[unit.name].reason) is not None}


def for_want_of(name: str) -> str:
    return f"not made, for want of {name}"


def _told(unit: Unit, done: _Done) -> str:
    if done.reason is not None:
        return f"{unit.name} failed: {done.reason}"
    return f"{unit.name}{figures_of(unit.cell) if unit.cell else ''} ({done.seconds:.0f} s)"


def figures_of(cell: Cell) -> str:
    """The main ones of a cell that is evaluated, to stand behind its name."""
    evaluation = Evaluation.load(cell.evaluation, f"run {cell.verb('evaluate')} again")
    return f": {one_line(evaluation.metrics)}"
