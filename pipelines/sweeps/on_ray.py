"""Verb sweep: the cells of params.yaml on Ray, on this machine or on many; DVC takes them for its own.

What cells need is made here, by DVC, as `run` does. Each cell that is out of date is then one task of Ray's, which does
the cell's stages in a worker's process; what is done is committed, which writes it down in dvc.lock. A cell whose
worker or machine is lost is begun again, from its checkpoint where that is still there. What fails is told and left
behind.
"""

import contextlib
import hashlib
import os
import pickle
import secrets
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout
from rich.console import Console

from pipelines.errors import StageError
from pipelines.numbers import counted
from pipelines.paths import Cell, Project
from pipelines.refusals import Refusal
from pipelines.settings.params import Params
from pipelines.sweeps.board import Board, demands
from pipelines.sweeps.cluster import Cluster, connected
from pipelines.sweeps.local import Unit, begin, figures_of, finish, for_want_of, make, outdated, units
from pipelines.sweeps.parcels import Parcel, packed, unpack
from pipelines.sweeps.processes import Processes
from pipelines.sweeps.worker import Done, Outcome, Task, fingerprint, needs_of_category, on_ray, results_of, stages_done
from pipelines.tracking.runs import PARENT, sweep_run
from pipelines.tracking.store import tracking_uri

_AT_LEAST = 64  # tasks that Ray knows of at once: a cluster that grows by itself must see them waiting
_LOOK = 1.0  # seconds between two looks at what is done
_REST = 5.0  # seconds before a lost cell is begun again: Ray sends work to a machine until it knows that it is gone
_GRACE = 10.0  # seconds that cells have to close their runs in, when all is to end
_BETWEEN_COMMITS = 30.0  # seconds, or ten times as long as the last one took
_TAKEN_ALONG = ("MLFLOW_", "AWS_", "AZURE_", "GOOGLE_", "HF_")  # variables that workers need, too


def sweep(params: Params, project: Project, console: Console, address: str | None, jobs: int, device: str) -> list[str]:
    """Make all that params.yaml puts out of date, but for what fails; gives a line for each that did.

    Without an `address`, `jobs` CPUs of this machine are worked with.

    Raises:
        ArgumentError: Ray is missing or does not answer, or no machine has what a cell reserves.
        StageError: another sweep is at it, DVC cannot look at the project, or the report cannot be made.
    """
    with _alone(project), Processes(project) as processes:
        if not begin(processes):
            return []
        with connected(address, jobs, project.log("ray")) as cluster:
            cluster.require_room(params)
            cluster.require_server(tracking_uri(project.root))
            every = units(params, project)
            failures = make([unit for unit in every if unit.cell is None], processes, console, os.cpu_count() or 1)
            tasks = {}
            for unit, stages in _out_of_date(every, processes):
                lacking = next((needed.name for needed in unit.after if needed.name in failures), None)
                if lacking is None:
                    tasks[unit.name] = (unit, stages)
                else:
                    failures[unit.name] = for_want_of(lacking)
            if tasks:
                failures |= _run(list(tasks.values()), params, processes, console, cluster, device)
        return finish(params, failures, processes, console)


@contextlib.contextmanager
def _alone(project: Project) -> Iterator[None]:
    lock = FileLock(project.root / "work" / ".sweep.lock")
    Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise StageError("another sweep of this project is running; wait for it, or stop it and run again") from None
    with lock:
        yield


def _out_of_date(every: Sequence[Unit], processes: Processes) -> Iterator[tuple[Unit, tuple[str, ...]]]:
    """The cells of which DVC calls a stage out of date, and their stages from that one on."""
    processes.require("status", ["status", "--json"])
    known = outdated(processes.said("status"))
    for unit in every:
        first = next((place for place, stage in enumerate(unit.stages) if stage in known), None)
        if unit.cell is not None and first is not None:
            yield unit, unit.stages[first:]


def _run(
    wanted: Sequence[tuple[Unit, tuple[str, ...]]],
    params: Params,
    processes: Processes,
    console: Console,
    cluster: Cluster,
    device: str,
) -> dict[str, str]:
    """Work on the cells; gives why those that failed did, by name."""
    settings = {"sweep": params.sweep.model_dump(mode="json"), "cells": len(wanted)}
    project = processes.project
    with (
        sweep_run(project.root, params.tracking.experiment, settings) as run,
        _signed(project) as sign,
        _Recorder(processes) as recorder,
        Board(console, cluster.total, cluster.in_use) as board,
    ):
        started = time.monotonic()
        environment = {PARENT: run.run_id}
        if not cluster.is_local:
            environment |= {name: value for name, value in os.environ.items() if name.startswith(_TAKEN_ALONG)}
        sweep = _Sweep(params, project, recorder, cluster, board, sign, environment, device)
        sweep.run(wanted)
        seconds = time.monotonic() - started
        recorder.rest()
        run.metrics(
            {
                "cells_done": sum(row.done for row in board.rows.values()),
                "cells_failed": len(sweep.failures),
                "workers_lost": sum(row.lost for row in board.rows.values()),
                "cell_seconds": sum(row.seconds for row in board.rows.values()),
                "seconds": seconds,
                "commits": len(recorder.times),
                "commit_seconds": sum(recorder.times),
            }
        )
    return sweep.failures


@contextlib.contextmanager
def _signed(project: Project) -> Iterator[str]:
    """A file whose content is its own name, which a worker that shares the disk reads."""
    sign = f"work/.sweep-{secrets.token_hex(16)}"
    (project.root / sign).write_text(sign, encoding="utf-8")
    try:
        yield sign
    finally:
        (project.root / sign).unlink(missing_ok=True)


@dataclass(slots=True)
class _Recorder:
    """Tells DVC of stages that are done, now and then: it looks through all of dvc.yaml each time."""

    processes: Processes
    times: list[float] = field(default_factory=list)  # seconds that each took
    _waiting: list[tuple[Cell, Sequence[str]]] = field(default_factory=list)
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    _at_it: Future[None] | None = None
    _next: float = field(default_factory=lambda: time.monotonic() + _BETWEEN_COMMITS)

    def add(self, cell: Cell, stages: Sequence[str]) -> None:
        self._waiting.append((cell, stages))

    def some(self) -> None:
        """Begin to, if it is time; raises StageError if the last attempt failed."""
        if self._at_it is not None and self._at_it.done():
            self._at_it.result()
            self._at_it = None
            self._next = time.monotonic() + max(_BETWEEN_COMMITS, 10 * self.times[-1])
        if self._at_it is None and self._waiting and time.monotonic() > self._next:
            waiting, self._waiting = self._waiting, []
            self._at_it = self._pool.submit(self._commit, waiting)

    def _commit(self, waiting: Sequence[tuple[Cell, Sequence[str]]]) -> None:
        started = time.monotonic()
        self.processes.commit([name for _, stages in waiting for name in stages])
        for cell, _ in waiting:
            cell.done.unlink(missing_ok=True)
        self.times.append(time.monotonic() - started)

    def rest(self) -> None:
        """All that waits; raises StageError if an attempt fails."""
        if self._at_it is not None:
            self._at_it.result()
            self._at_it = None
        if self._waiting:
            self._commit(self._waiting)
            self._waiting = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()


@dataclass(slots=True)
class _Sweep:
    """The tasks that wait, and those that Ray has."""

    params: Params
    project: Project
    recorder: _Recorder
    cluster: Cluster
    board: Board
    sign: str
    environment: Mapping[str, str]
    device: str
    failures: dict[str, str] = field(default_factory=dict)
    _parcels: dict[str, Parcel] = field(default_factory=dict)
    _left: Counter[str] = field(default_factory=Counter)  # cells by category

    def run(self, wanted: Sequence[tuple[Unit, tuple[str, ...]]]) -> None:
        """Work on them all, those of a category one after the other: machines get it once."""
        waiting = deque(self._tasks(wanted))
        for task in waiting:
            self._left[task.category] += 1
            self.board.expect(task.model, self.params.sweep.of(task.model))
        remote, running = self.cluster.ray.remote(on_ray), dict[Any, Task]()
        resting: list[tuple[float, Task]] = []  # until when
        most = max(_AT_LEAST, 4 * round(self.cluster.total.get("CPU", 0.0)))
        try:
            while waiting or running or resting:
                rested = [one for one in resting if one[0] <= time.monotonic()]
                resting = [one for one in resting if one not in rested]
                waiting.extendleft(task for _, task in rested)
                while waiting and len(running) < most:
                    task = waiting.popleft()
                    running[self._submit(remote, task)] = task
                ready: list[Any] = []
                if running:
                    ready, _ = self.cluster.ray.wait(list(running), timeout=_LOOK)
                else:
                    time.sleep(_LOOK)
                for reference in ready:
                    task = running.pop(reference)
                    again = self._ended(reference, task)
                    if again is None:
                        self._forget(task.category)
                    else:
                        resting.append((time.monotonic() + _REST * task.attempt, again))
                self.recorder.some()
        except BaseException:
            self._cancel(list(running))
            raise

    def _tasks(self, wanted: Sequence[tuple[Unit, tuple[str, ...]]]) -> Iterator[Task]:
        """What is to be worked on; of what an earlier sweep has done before it was stopped, DVC is told."""
        categories = self.params.data.categories
        pickled = pickle.dumps(self.params)
        file, sums = self.project.params.read_text(encoding="utf-8"), dict[Path, str]()
        for unit, stages in sorted(wanted, key=lambda one: categories.index(_cell(one[0]).category)):
            cell = _cell(unit)
            of = fingerprint(self.project, cell, sums)
            if set(stages) <= set(stages_done(cell, of)):
                self.recorder.add(cell, stages)
                continue
            wants = self.params.sweep.of(cell.model)
            yield Task(
                model=cell.model,
                category=cell.category,
                seed=cell.seed,
                attempt=1,
                stages=stages,
                fingerprint=of,
                params=pickled,
                file=file,
                processes=wants.processes,
                project=self.project.root.resolve(),
                sign=self.sign,
                parcels=(),
                earlier=(),
                environment=self.environment,
                device="cpu" if self.device == "auto" and not wants.num_gpus else self.device,
            )

    def _cell_of(self, task: Task) -> Cell:
        return self.project.cell(task.model, task.category, task.seed)

    def _submit(self, remote: Any, task: Task) -> Any:
        if task.attempt == 1:
            self._cell_of(task).refusal.unlink(missing_ok=True)  # what is refused now is written anew
        if not self.cluster.is_local:
            task = replace(task, parcels=self._parcels_of(task), earlier=self._earlier(task))
        wants = self.params.sweep.of(task.model)
        return remote.options(
            name=self._cell_of(task).title,
            num_cpus=wants.num_cpus,
            num_gpus=wants.num_gpus,
            memory=demands(wants).get("memory"),
            max_retries=0,  # lost ones are begun again here, where it is told
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(max(1, int(wants.num_cpus)))}},
        ).remote(task)

    def _parcels_of(self, task: Task) -> tuple[Parcel, ...]:
        """In the store as long as a cell may ask for them."""
        inputs = f"pretrained/{task.model}"
        places = {
            _of_category(task.category): needs_of_category(self.params, task.category),
            f"model {task.model}": {inputs: inputs},
        }
        for name, paths in places.items():
            if name not in self._parcels:
                self._parcels[name] = self._put(name, paths)
        return tuple(self._parcels[name] for name in places)

    def _forget(self, category: str) -> None:
        """Of a category without cells to come, nothing need stay in the store."""
        self._left[category] -= 1
        if not self._left[category]:
            self._parcels.pop(_of_category(category), None)

    def _earlier(self, task: Task) -> tuple[Any, ...]:
        """What the stages have made that are up to date."""
        cell = self._cell_of(task)
        every = ("train", "evaluate", "export")
        before = every[: every.index(task.stages[0].partition("@")[0])]
        places = {path: path for path in results_of(cell, before)}
        return tuple(self.cluster.ray.put(piece) for piece in packed(self.project.root, places))

    def _put(self, name: str, paths: Mapping[str, str]) -> Parcel:
        digest, references = hashlib.sha256(), []
        for path, piece in packed(self.project.root, paths):
            digest.update(path.encode() + piece)
            references.append(self.cluster.ray.put((path, piece)))
        return Parcel(name, digest.hexdigest(), tuple(references))

    def _ended(self, reference: Any, task: Task) -> Task | None:
        """Take what a cell has come to; gives the task again if its worker was lost and it has another attempt."""
        errors = self.cluster.ray.exceptions
        cell = self._cell_of(task)
        try:
            outcome = self.cluster.ray.get(reference)
        except (
            errors.WorkerCrashedError,
            errors.NodeDiedError,
            errors.OutOfMemoryError,
            errors.ObjectLostError,
            errors.RuntimeEnvSetupError,  # on a machine that is about to go
        ) as error:
            kind = type(error).__name__
            if task.attempt <= self.params.sweep.retries:
                self.board.lost(task.model, f"{cell.title}: its worker was lost ({kind}); it is begun again")
                return replace(task, attempt=task.attempt + 1)
            lost = f"its worker was lost {counted(task.attempt, 'time')} ({kind}); see {self.project.log('ray')}"
            self._fail(cell, Refusal(verb="sweep", reason=lost))
        except (errors.LocalRayletDiedError, errors.RaySystemError) as error:
            raise StageError(
                f"Ray is gone ({type(error).__name__}; see {self.project.log('ray')}); call again: what is done is kept"
            ) from None
        except errors.RayError as error:  # our code cannot be run there
            cause = getattr(error, "cause", None) or error
            if isinstance(cause, StageError):
                raise StageError(str(cause)) from None
            said = str(cause).strip().splitlines()
            self._fail(cell, Refusal(verb="sweep", reason=said[0] if said else type(error).__name__))
        else:
            self._take(task, outcome)
        return None

    def _take(self, task: Task, outcome: Outcome) -> None:
        cell = self._cell_of(task)
        unpack(outcome.results, self.project.root)
        if outcome.done:
            Done(fingerprint=task.fingerprint, stages=list(outcome.done)).save(cell.done)
            self.recorder.add(cell, outcome.done)
        if outcome.refusal is not None:
            self._fail(cell, outcome.refusal)
            return
        where = "" if self.cluster.is_local else f" on {outcome.host}"
        self.board.done(task.model, outcome.seconds, f"{cell.title}{figures_of(cell)} ({outcome.seconds:.0f} s{where})")

    def _fail(self, cell: Cell, refusal: Refusal) -> None:
        refusal.save(cell.refusal)
        self.failures[cell.title] = refusal.told
        self.board.failed(cell.model, f"{cell.title} failed: {refusal.told}")

    def _cancel(self, running: Sequence[Any]) -> None:
        """Let cells close their runs; what has not ended by then is killed with its worker."""
        for reference in running:
            self.cluster.ray.cancel(reference)
        if running:
            self.cluster.ray.wait(list(running), num_returns=len(running), timeout=_GRACE)


def _of_category(category: str) -> str:
    return f"category {category}"


def _cell(unit: Unit) -> Cell:
    assert unit.cell is not None, "what cells need is made before"
    return unit.cell
