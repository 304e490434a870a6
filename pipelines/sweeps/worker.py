"""What a worker does with a cell: the stages that are out of date, one after the other, in its own process.

On a disk that the worker shares with whoever sent the cell, in the project's folder; elsewhere in a folder of the
worker's machine, with what the cell needs brought along and its results sent back.
"""

import contextlib
import getpass
import hashlib
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from pipelines import callers, refusals
from pipelines.errors import StageError
from pipelines.files import atomic_file, file_sha256, reporting_full_disk
from pipelines.lineage import ROOT
from pipelines.paths import INDEX_FILE, Cell, Project
from pipelines.records import Record
from pipelines.refusals import Refusal, reason
from pipelines.settings.params import Params
from pipelines.settings.sections import with_value
from pipelines.sweeps.parcels import Parcel, Piece, packed, receive, remove, unpack
from pipelines.variables import python_path, set_for_now

FOLDER = "BLEMISH_SWEEP_FOLDER"  # in a machine's environment: where cells are worked on that it shares no disk with
_STAGE = "DVC_STAGE"  # in the environment of what DVC runs


class Done(Record):
    """Which of a cell's stages are done, until DVC is told: beside its checkpoints."""

    fingerprint: str  # of what the cell depends on
    stages: list[str]


@dataclass(frozen=True, slots=True)
class Task:
    """A cell, and all that a machine must know to work on it."""

    model: str
    category: str
    seed: int
    attempt: int  # from 1
    stages: tuple[str, ...]  # of dvc.yaml, in their order
    fingerprint: str
    params: bytes  # pickled: the server of `ray://` looks into what it passes on, and would import torch for them
    file: str  # that they are of
    processes: int  # that train it together
    project: Path
    sign: str  # a file in the project, by whose content a worker knows the project's disk
    parcels: tuple[Parcel, ...]  # for a machine of its own disk
    earlier: tuple[Any, ...]  # likewise, what the stages before these have made: references to its pieces
    environment: Mapping[str, str] = field(repr=False)  # addresses and passwords
    device: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a cell."""

    host: str
    seconds: float
    done: tuple[str, ...]  # stages
    refusal: Refusal | None
    results: tuple[Piece, ...]  # from a machine of its own disk


def fingerprint(project: Project, cell: Cell, sums: dict[Path, str]) -> str:
    """Of all that a cell's stages depend on, but for the stages before them; `sums` keeps what is known of files."""
    files = [
        project.checked / "models" / f"{cell.model}.txt",
        project.checked / "tests" / f"{cell.model}.txt",
        *(project.checked / "stages" / f"{stage}.txt" for stage in ("train", "evaluate", "export")),
        project.prepared(cell.category) / INDEX_FILE,
        project.prepared(cell.category) / "seen_by" / f"{cell.model}.json",
        *sorted(path for path in project.inputs(cell.model).rglob("*") if path.is_file()),
    ]
    for path in files:
        if path not in sums:
            sums[path] = file_sha256(path)
    lines = [f"{path.relative_to(project.root).as_posix()} {sums[path]}\n" for path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def stages_done(cell: Cell, of: str) -> list[str]:
    """The stages that are done for a fingerprint, and whose results are there."""
    if not cell.done.exists():
        return []
    known = Done.load(cell.done, f"delete {cell.done}")
    made = {"train": cell.weights, "evaluate": cell.evaluation, "export": cell.onnx}
    return [name for name in known.stages if known.fingerprint == of and made[_verb(name)].exists()]


def on_ray(task: Task) -> Outcome:
    """A task of Ray's."""
    import ray

    return work(task, ray.get)


def work(task: Task, fetch: Callable[[Any], Piece]) -> Outcome:
    """Do what is asked for and not done yet; what fails is in the outcome. `fetch` reads a piece from the store.

    Raises:
        StageError: runs would be kept on this machine alone, of which whoever sent the cell sees nothing.
    """
    started = time.monotonic()
    params = pickle.loads(task.params)  # noqa: S301 - of whoever sent this code, too
    with set_for_now(**task.environment):
        place = _shared_place(task)
        if place is None:
            _require_server()
            with reporting_full_disk(_own_place(task)):
                outcome = _work_apart(task, params, _own_place(task), fetch)
        else:
            outcome = _work_in(place, task, params)
    return replace(outcome, seconds=time.monotonic() - started)


def _work_in(place: Path, task: Task, params: Params) -> Outcome:
    os.chdir(place)
    project = Project(Path())
    done, refusal = _make(task, project.cell(task.model, task.category, task.seed), params, project)
    return Outcome(socket.gethostname(), 0.0, tuple(done), refusal, ())


def _work_apart(task: Task, params: Params, place: Path, fetch: Callable[[Any], Piece]) -> Outcome:
    """With what the cell needs brought along, and its results sent back; only the former stays."""
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    for parcel in task.parcels:
        receive(parcel, map(fetch, parcel.pieces), place)
    unpack(map(fetch, task.earlier), place)
    data = params.data.model_copy(update={"root": _root_of(params)})
    with atomic_file(Project(place).params) as temporary:
        temporary.write_text(with_value(task.file, "data", "root", data.root), encoding="utf-8")
    outcome = _work_in(place, task, params.model_copy(update={"data": data}))
    project = Project(Path())
    cell = project.cell(task.model, task.category, task.seed)
    sent = [*results_of(cell, outcome.done), project.log(cell.title).as_posix()]
    outcome = replace(outcome, results=tuple(packed(project.root, {path: path for path in sent})))
    for path in (*map(Path, sent), cell.trained, cell.evaluated, cell.done):
        remove(path)
    return outcome


def _make(task: Task, cell: Cell, params: Params, project: Project) -> tuple[list[str], Refusal | None]:
    """The stages done, and why the next was not."""
    done = stages_done(cell, task.fingerprint)
    log = project.log(cell.title)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a" if task.attempt > 1 else "w", encoding="utf-8") as file:
        console = Console(file=file, width=120)
        for name in task.stages:
            if name in done:
                continue
            with set_for_now(**{_STAGE: name}):
                console.print(f"{name} on {socket.gethostname()}", highlight=False, markup=False)
                try:
                    if _verb(name) == "train" and task.processes > 1:
                        _train_together(task, cell, params, project)
                    else:
                        _run(_verb(name), cell, params, project, task.device, console)
                except Exception as error:  # whatever it was, the cell alone fails
                    console.print(traceback.format_exc(), highlight=False, markup=False)
                    return done, Refusal(verb=_verb(name), reason=reason(error))
            done.append(name)
            Done(fingerprint=task.fingerprint, stages=done).save(cell.done)
    return done, None


def _run(verb: str, cell: Cell, params: Params, project: Project, device: str, console: Console) -> None:
    from pipelines.device import choose_device
    from pipelines.sweeps import stages

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    def warn(text: str) -> None:
        say(f"warning: {text}")

    match verb:
        case "train":
            stages.train(cell, params, project, choose_device(device), console)
        case "evaluate":
            stages.evaluate(cell, params, project, choose_device(device), say, warn)
        case "export":
            stages.export(cell, params, project, console, say, warn)


def _train_together(task: Task, cell: Cell, params: Params, project: Project) -> None:
    """By `torchrun`, whose processes end with this one.

    Raises:
        StageError: one of them has failed, with what the first said.
    """
    cpus = params.sweep.of(cell.model).num_cpus
    environment = {
        **os.environ,
        callers.RUN: str(os.getpid()),
        "OMP_NUM_THREADS": str(max(1, int(cpus) // task.processes)),
        "PYTHONPATH": python_path(ROOT),
    }
    options = ["--standalone", "--nproc-per-node", str(task.processes)]
    names = ["--model", cell.model, "--category", cell.category, "--seed", str(cell.seed), "--device", task.device]
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(ROOT / "cli.py"), "train", *names]
    with project.log(cell.title).open("ab") as log:
        done = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
    if done.returncode != 0:
        said = refusals.read(cell.refusal)
        lost = f"its {task.processes} processes have ended ({done.returncode}); see {project.log(cell.title)}"
        raise StageError(lost if said is None else said.reason)


def _verb(stage: str) -> str:
    return stage.partition("@")[0]


def _shared_place(task: Task) -> Path | None:
    """The project's folder, if this machine shares its disk and has not been told otherwise."""
    if FOLDER not in os.environ:
        with contextlib.suppress(OSError):
            if (task.project / task.sign).read_text(encoding="utf-8") == task.sign:
                return task.project
    return None


def _own_place(task: Task) -> Path:
    base = os.environ.get(FOLDER) or Path(tempfile.gettempdir()) / f"blemish-{getpass.getuser()}"
    return Path(base) / hashlib.sha256(str(task.project).encode()).hexdigest()[:16]


def _require_server() -> None:
    if not os.environ.get("MLFLOW_TRACKING_URI", "").startswith("http"):
        raise StageError(
            f"{socket.gethostname()} shares no disk with the project, and MLFLOW_TRACKING_URI names no server: start "
            "one (deploy/team has it), and set it where `blemish sweep` is called"
        )


def _root_of(params: Params) -> str:
    return f"brought/{params.data.name}"


def needs_of_category(params: Params, category: str) -> dict[str, str]:
    """Where on a machine of its own disk it lies, and where in the project."""
    return {
        f"data/prepared/{category}": f"data/prepared/{category}",
        f"{_root_of(params)}/{category}": f"{params.data.root}/{category}",
    }


def results_of(cell: Cell, stages: Sequence[str]) -> Iterator[str]:
    """What stages write, from the project's folder."""
    places = {"train": (cell.trained,), "evaluate": (cell.evaluated, cell.metrics), "export": (cell.exported,)}
    for name in stages:
        yield from (place.relative_to(cell.root).as_posix() for place in places[_verb(name)])
