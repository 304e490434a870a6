"""What a worker does with a cell: the stages that are out of date, one after the other, in its own process.

On a disk that the worker shares with whoever sent the cell, in the project's folder; elsewhere in a folder of the
worker's machine, with what the cell needs brought along and its results sent back.
"""

import contextlib
import getpass
import hashlib
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from pipelines.errors import BlemishError, StageError
from pipelines.files import file_sha256
from pipelines.paths import INDEX_FILE, Cell, Project
from pipelines.records import Record
from pipelines.refusals import Refusal, reason
from pipelines.settings.params import Params
from pipelines.sweeps.parcels import Parcel, Piece, packed, receive

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
    params: Params
    project: Path
    sign: str  # a file in the project, by whose content a worker knows the project's disk
    parcels: tuple[Parcel, ...]
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


def fingerprint(project: Project, cell: Cell) -> str:
    """Of all that a cell's stages depend on, but for the stages before them."""
    files = [
        project.checked / "models" / f"{cell.model}.txt",
        project.checked / "tests" / f"{cell.model}.txt",
        *(project.checked / "stages" / f"{stage}.txt" for stage in ("train", "evaluate", "export")),
        project.prepared(cell.category) / INDEX_FILE,
        project.prepared(cell.category) / "seen_by" / f"{cell.model}.json",
        *sorted(path for path in project.inputs(cell.model).rglob("*") if path.is_file()),
    ]
    lines = [f"{path.relative_to(project.root)} {file_sha256(path)}\n" for path in files]
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
    """Do what is asked for and not done yet; what fails is in the outcome. `fetch` reads a piece from the store."""
    started = time.monotonic()
    with _environment(task.environment):
        try:
            place, is_shared = _place(task)
            os.chdir(place)
            project, params = Project(Path()), task.params
            cell = project.cell(task.model, task.category, task.seed)
            if not is_shared:
                _require_server()
                params = _moved(params)
                for parcel in task.parcels:
                    receive(parcel, map(fetch, parcel.pieces), project.root)
        except (BlemishError, OSError) as error:
            refusal = Refusal(verb="sweep", reason=f"{socket.gethostname()}: {reason(error)}")
            return Outcome(socket.gethostname(), time.monotonic() - started, (), refusal, ())
        done, refused = _make(task, cell, params, project)
        sent = () if is_shared else (*_results(cell, done), project.log(cell.title).as_posix())
        results = tuple(packed(project.root, {path: path for path in sent}))
        return Outcome(socket.gethostname(), time.monotonic() - started, tuple(done), refused, results)


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
            with _environment({_STAGE: name}):
                console.print(f"{name} on {socket.gethostname()}", highlight=False, markup=False)
                try:
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


def _verb(stage: str) -> str:
    return stage.partition("@")[0]


def _place(task: Task) -> tuple[Path, bool]:
    """The folder to work in, and whether it is the project's own."""
    own = os.environ.get(FOLDER)
    if own is None:
        with contextlib.suppress(OSError):
            if (task.project / task.sign).read_text(encoding="utf-8") == task.sign:
                return task.project, True
    base = Path(own) if own else Path(tempfile.gettempdir()) / f"blemish-{getpass.getuser()}"
    place = base / hashlib.sha256(str(task.project).encode()).hexdigest()[:16]
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    return place, False


def _require_server() -> None:
    if not os.environ.get("MLFLOW_TRACKING_URI", "").startswith("http"):
        raise StageError(
            "shares no disk with the project, and MLFLOW_TRACKING_URI names no server: start one (deploy/team has it), "
            "and set it where `blemish sweep` is called"
        )


def _moved(params: Params) -> Params:
    """With the folder of the data set where `needs` says that it travels to."""
    return params.model_copy(update={"data": params.data.model_copy(update={"root": _root_of(params)})})


def _root_of(params: Params) -> str:
    return f"brought/{params.data.name}"


def needs_of_category(params: Params, category: str) -> dict[str, str]:
    """Where on a machine of its own disk it lies, and where in the project."""
    return {
        f"data/prepared/{category}": f"data/prepared/{category}",
        f"{_root_of(params)}/{category}": f"{params.data.root}/{category}",
    }


def _results(cell: Cell, stages: Sequence[str]) -> Iterator[str]:
    places = {"train": (cell.trained,), "evaluate": (cell.evaluated, cell.metrics), "export": (cell.exported,)}
    for name in stages:
        yield from (place.as_posix() for place in places[_verb(name)])


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """With these variables, for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
