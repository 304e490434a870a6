"""The loop: any model, from prepared arrays to trained weights; resumable at any moment, ended by a bad loss."""

import inspect
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TaskID, TextColumn
from safetensors.torch import save as serialize
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import anomaly_models
from anomaly_models import MODELS
from anomaly_models import base as contract
from anomaly_models.base import AnomalyModel
from pipelines.data.arrays import BatchSource
from pipelines.data.batches import PreparedData
from pipelines.errors import StageError, TrainingDiverged
from pipelines.files import atomic_folder, write_json
from pipelines.paths import Project
from pipelines.preparation.prepare import INDEX_FILE
from pipelines.progress import progress_bar
from pipelines.settings.params import Params
from pipelines.tracking import runs as tracking
from pipelines.training.checkpoint import Checkpoint, state_bytes
from pipelines.training.inputs import Inputs, find_inputs
from pipelines.training.work import Work

CHECKPOINT_SECONDS = 30.0  # how much work a kill may cost; has no effect on the result
LOG_POINTS = 200  # points in a loss curve, however long training is

Training = tuple[Optimizer, LRScheduler] | None
B = TypeVar("B")  # what a batch is to this learner


@dataclass(frozen=True, slots=True)
class Learner(Generic[B]):
    """What the loop trains: a module, the terms of its loss, and what moves its parameters."""

    module: nn.Module
    losses: Callable[[B, contract.Progress], Iterator[dict[str, Tensor]]]
    training: tuple[Optimizer, LRScheduler]


@dataclass(frozen=True, slots=True)
class Schedule:
    """Which batches to take: those numbered from `first` up to `total`, as `seed` orders them."""

    seed: int
    batch_size: int
    first: int
    total: int


@dataclass(slots=True)
class _LossLog:
    """Loss terms averaged between the points of the curve, held back until the checkpoint that covers them.

    `progress_percent` goes with them: an axis on which runs of different length lie over one another.
    """

    every: int
    total: int
    points: list[tuple[str, float, int]] = field(default_factory=list)
    _sums: dict[str, float] = field(default_factory=dict)
    _count: int = 0

    def add(self, terms: dict[str, float], step: int) -> None:
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._count += 1
        if (step + 1) % self.every == 0:
            self.points.append(("progress_percent", 100 * (step + 1) / self.total, step + 1))
            self.points += [(f"loss.{name}", value / self._count, step + 1) for name, value in self._sums.items()]
            self._sums, self._count = {}, 0


def train(
    model_name: str, category: str, params: Params, project: Project, device: torch.device, console: Console
) -> None:
    """Train one cell and write `models/<model>/<category>`: weights, settings and the MLflow run's id.

    A run that was killed goes on from its last checkpoint and, on the CPU, ends with the same bits.

    Raises:
        ParamsError: no such model or category in the params file.
        StageError: the category is not prepared, another process is training this cell, or the model cannot work with
            this data or these settings.
        WeightsError: pretrained weights are missing or do not fit.
        TrainingDiverged: a loss is not finite.
    """
    params.check_category(category)
    config = params.model_config_of(model_name)
    data = PreparedData(project.prepared(category), config.image_size, device)
    _require_holdout(model_name, category, data)
    inputs = find_inputs(model_name, config, project, device)
    settings = {
        "models": {model_name: config.model_dump()},
        "inputs": inputs.version,
        "prepare": params.prepare.model_dump(),
        "train": params.train.model_dump(),
        "data": data.version,
    }
    work = Work(
        title=f"{model_name} on {category}",
        run_name=tracking.cell_name(model_name, category, params.train.seed),
        folder=project.work(model_name, category),
        tags=tracking.cell_tags(model_name, category),
    )
    experiment = params.tracking.experiment
    with (
        work.locked(),
        work.tracked(settings, _sources(model_name), device, project.root, experiment) as (checkpoint, run),
    ):
        source = project.root / params.data.root / category
        run.dataset(f"{params.data.name}/{category}", data.index.data_sha256, source)
        run.tags({"data_set": params.data.name, "data_sha256": data.index.data_sha256, "seed": params.train.seed})
        run.file(project.prepared(category) / INDEX_FILE, "data")  # which image is in which split
        if warning := inputs.warning(data):
            console.print(f"warning: {warning}", markup=False, highlight=False)
            run.tags({"warning": warning})
        try:
            model, summary = _fit(inputs, config, params.train.seed, data, device, checkpoint, run, console)
        except contract.ModelError as error:
            raise StageError(f"{model_name} on {category}: {error}") from error
        result = {"run_id": run.run_id, "model": model_name, "category": category, "settings": settings, **summary}
        _save(model, result, project.model(model_name, category))
        run.metrics({name: value for name, value in summary.items() if value is not None})
        run.file(project.model(model_name, category) / "model.safetensors", "checkpoint")


def _require_holdout(model_name: str, category: str, data: PreparedData) -> None:
    """Before the first step, since calibration comes after the last. Raises StageError."""
    found, needed = len(data.rows("holdout")), MODELS[model_name].min_holdout
    if found < needed:
        raise StageError(
            f"{model_name} on {category}: calibration needs {needed} or more held-out good images, found {found}; "
            "give more good images, or raise prepare.holdout"
        )


def _fit(
    inputs: Inputs,
    config: contract.Config,
    seed: int,
    data: PreparedData,
    device: torch.device,
    checkpoint: Checkpoint,
    run: tracking.OpenRun,
    console: Console,
) -> tuple[AnomalyModel, dict[str, Any]]:
    model = build(inputs.model_name, config, seed).to(device)
    normals = data.batches("train", config.batch_size)
    total_steps = model.total_steps(len(data.rows("train")))
    training = model.optimizer(total_steps)
    first_step = checkpoint.load(model, training, device)
    if first_step is None:
        inputs.load_into(model)
        with console.status(f"learning from {len(data.rows('train'))} normal images"):
            model.prepare(normals)
        checkpoint.save(0, model, training)
        first_step = 0
    if training is not None:
        schedule = Schedule(seed, config.batch_size, first_step, total_steps)
        learner = Learner(model, model.losses, training)
        run_steps(learner, inputs.added_to(data), schedule, checkpoint, run, console)
    model.eval()
    model.calibrate(data.batches("holdout", config.batch_size))
    summary = {
        "train_seconds": round(checkpoint.seconds, 3),
        "train_steps": total_steps,
        "train_images": len(data.rows("train")),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "state_megabytes": round(state_bytes(model.state_dict()) / 1e6, 3),
    }
    return model, summary


def build(model_name: str, config: contract.Config, seed: int) -> AnomalyModel:
    """The model with its random parts drawn from `seed`; pretrained parts are still to be loaded."""
    torch.manual_seed(seed)
    return MODELS[model_name](config)


def run_steps(
    learner: Learner[B],
    data: BatchSource[B],
    schedule: Schedule,
    checkpoint: Checkpoint,
    run: tracking.OpenRun,
    console: Console,
) -> None:
    """Take the schedule's batches, with checkpoints, loss curves and a progress bar.

    Raises:
        TrainingDiverged: a term is not finite; the parameters are those before the step.
    """
    seed, first, total = schedule.seed, schedule.first, schedule.total
    log = _LossLog(every=max(1, total // LOG_POINTS), total=total)
    generator = torch.Generator(device=data.device)
    saved = time.monotonic()
    learner.module.train()
    columns = MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TextColumn("{task.fields[loss]}")
    with progress_bar(console, *columns) as bar:
        task = bar.add_task("train", total=total, completed=first, rate="", loss="")
        rate = _Rate(first)
        for step in range(first, total):
            generator.manual_seed(step_seed(seed, step))
            batch = data.training_batch(seed, step, schedule.batch_size)
            for terms in learner.losses(batch, contract.Progress(step, total, generator)):
                log.add(_optimise(terms, learner.training, step), step)
            _show(bar, task, step + 1, rate, log)
            if time.monotonic() - saved > CHECKPOINT_SECONDS or step + 1 == total:
                run.metric_points(log.points)
                log.points.clear()
                checkpoint.save(step + 1, learner.module, learner.training)
                saved = time.monotonic()


def _optimise(terms: dict[str, Tensor], training: tuple[Optimizer, LRScheduler], step: int) -> dict[str, float]:
    """One optimiser step on the sum of the terms; a term that is not finite stops the run before the update."""
    optimizer, scheduler = training
    values = {name: float(term.detach()) for name, term in terms.items()}
    if not all(map(math.isfinite, values.values())):
        listed = ", ".join(f"{name} = {value:g}" for name, value in values.items())
        raise TrainingDiverged(
            f"step {step}: a loss is not finite ({listed}); lower the learning rate or check the data"
        )
    loss = torch.stack([term for term in terms.values() if term.requires_grad]).sum()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    optimizer.step()
    scheduler.step()
    return values


def step_seed(seed: int, step: int) -> int:
    """A seed for one step's generator; consecutive integers would give related streams in some generators."""
    return (seed * 1_000_003 + step * 7_919 + 0x9E3779B97F4A7C15) % 2**63


class _Rate:
    """Steps per second since this process began."""

    def __init__(self, first: int) -> None:
        self._first, self._started = first, time.monotonic()

    def at(self, step: int) -> float:
        return (step - self._first) / max(time.monotonic() - self._started, 1e-9)


def _show(bar: Progress, task: TaskID, step: int, rate: _Rate, log: _LossLog) -> None:
    loss = f"{log.points[-1][0].removeprefix('loss.')} {log.points[-1][1]:.4g}" if log.points else ""
    bar.update(task, completed=step, rate=f"{rate.at(step):.1f} steps/s", loss=loss)


def _sources(model_name: str) -> list[Path]:
    """The code whose change makes a half-finished run another run."""
    package = Path(anomaly_models.__file__).parent
    own = Path(inspect.getfile(MODELS[model_name]))
    return [package / "base.py", own, *(package / "common").glob("*.py"), Path(__file__)]


def _save(model: AnomalyModel, result: dict[str, Any], folder: Path) -> None:
    with atomic_folder(folder) as temporary:
        state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
        # Through Python's own file: safetensors' file writer hides a full disk behind an error of its own.
        (temporary / "model.safetensors").write_bytes(serialize(state))
        write_json(temporary / "run.json", result)
