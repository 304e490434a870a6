"""The loop: any learner, step by step; resumable at any moment, ended by a bad loss."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TaskID, TextColumn
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from anomaly_models import base as contract
from anomaly_models.common.shards import WHOLE, Shard
from pipelines.data.arrays import BatchSource
from pipelines.errors import StageError, TrainingDiverged
from pipelines.progress import progress_bar
from pipelines.tracking.runs import OpenRun
from pipelines.training.checkpoint import Checkpoint, Point

CHECKPOINT_SECONDS = 30.0  # how much work a kill may cost; has no effect on the result
LOG_POINTS = 200  # points in a curve, however long training is
_SOON, _RAREST = 30.0, 600.0  # seconds after which a server that is away is asked again: at first, and at the most
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
class _Curves:
    """The points of a run's curves, held back until the checkpoint that covers them and keeps them.

    Loss terms are averaged between the points; their sums stay on the device until then. Learning rate and gradient
    norm are those of the step at the point. `progress_percent` goes with them: an axis on which runs of different
    length lie over one another.
    """

    every: int
    total: int
    points: list[Point]
    _sums: dict[str, Tensor] = field(default_factory=dict)
    _count: int = 0

    def add(self, terms: dict[str, Tensor], optimizer: Optimizer, step: int) -> None:
        """Take in a step's terms, in float64, when the optimiser has its gradients and has not used them."""
        for name, value in terms.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1
        if (step + 1) % self.every == 0:
            means = (torch.stack(list(self._sums.values())) / self._count).tolist()
            found = {
                "progress_percent": 100 * (step + 1) / self.total,
                **_learning_rates(optimizer),
                "gradient_norm": _gradient_norm(optimizer),
                **{f"loss.{name}": mean for name, mean in zip(self._sums, means, strict=True)},
            }
            self.points += [(name, value, step + 1, time.time()) for name, value in found.items()]
            self._sums, self._count = {}, 0


def _learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """The rate; that of each parameter group if they differ."""
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    if len(set(rates)) == 1:
        return {"learning_rate": rates[0]}
    return {f"learning_rate.{number}": rate for number, rate in enumerate(rates)}


def _gradient_norm(optimizer: Optimizer) -> float:
    """Over all parameters; before any clipping, which is part of the optimiser's step."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return float(get_total_norm(parameter.grad for parameter in parameters if parameter.grad is not None))


def run_steps(
    learner: Learner[B],
    data: BatchSource[B],
    schedule: Schedule,
    checkpoint: Checkpoint,
    run: OpenRun,
    console: Console,
    shard: Shard = WHOLE,
) -> None:
    """Take the schedule's batches, with checkpoints, curves and a progress bar; the others of a `shard` follow.

    Raises:
        StageError: the schedule begins at a step that it does not have.
        TrainingDiverged: a term is not finite, and the parameters are those before the step; or a parameter is not
            after the last step, which no term has seen.
        MlflowException: after the last step, the tracking store does not take the curves, which the checkpoint keeps.
    """
    first, total = schedule.first, schedule.total
    if not 0 <= first <= total:
        raise StageError(f"{checkpoint.path}: damaged (step {first} of {total}); delete it to start afresh")
    curves = _Curves(max(1, total // LOG_POINTS), total, checkpoint.points)
    sending = _Sending(run, curves.points, console)
    stepper = _Stepper(learner, data, schedule, shard)
    saved = time.monotonic()
    learner.module.train()
    columns = MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TextColumn("{task.fields[loss]}")
    with progress_bar(console, *columns) as bar:
        task = bar.add_task("train", total=total, completed=first, rate="", loss="")
        rate = _Rate(first)
        for step in range(first, total):
            stepper.take(step, curves)
            _show(bar, task, step + 1, rate, curves)
            if time.monotonic() - saved > CHECKPOINT_SECONDS or step + 1 == total:
                checkpoint.save(step + 1, learner.module, learner.training)
                sending.some()
                saved = time.monotonic()
    _require_finite(learner.module, total)
    sending.rest()


def follow_steps(learner: Learner[B], data: BatchSource[B], schedule: Schedule, shard: Shard) -> None:
    """Take part in the steps of the first process, which alone keeps checkpoints and curves.

    Raises:
        TrainingDiverged: as of the first process, and of all others.
    """
    stepper = _Stepper(learner, data, schedule, shard)
    learner.module.train()
    for step in range(schedule.first, schedule.total):
        stepper.take(step, None)
    _require_finite(learner.module, schedule.total)


class _Stepper(Generic[B]):
    """Takes one batch, as often as the learner makes a step of it."""

    def __init__(self, learner: Learner[B], data: BatchSource[B], schedule: Schedule, shard: Shard) -> None:
        self._learner, self._data, self._schedule, self._shard = learner, data, schedule, shard
        self._generator = torch.Generator(device=data.device)

    def take(self, step: int, curves: _Curves | None) -> None:
        seed = self._schedule.seed
        self._generator.manual_seed(step_seed(seed, step))
        batch = self._data.training_batch(seed, step, self._schedule.batch_size)
        progress = contract.Progress(step, self._schedule.total, self._generator, self._shard)
        for terms in self._learner.losses(batch, progress):
            _optimise(terms, self._learner.training, step, curves, self._shard)


def _require_finite(module: nn.Module, steps: int) -> None:
    numbers = [parameter.detach() for parameter in module.parameters()]
    bad = sum(int((~number.isfinite()).sum()) for number in numbers)
    if bad:
        weights = sum(number.numel() for number in numbers)
        raise TrainingDiverged(
            f"after step {steps}: {bad:,} of {weights:,} weights are not finite; lower the learning rate or check the "
            "data"
        )


@dataclass(slots=True)
class _Sending:
    """Points go to the tracking store with every checkpoint, which has them until they are taken.

    While a server is away, training goes on, and it is asked ever more rarely.
    """

    run: OpenRun
    points: list[Point]
    console: Console
    _wait: float = _SOON
    _next: float = 0.0

    def some(self) -> None:
        if time.monotonic() < self._next:
            return
        if self.run.are_taken(self.points):
            self.points.clear()
            self._wait = _SOON
            return
        if self._wait == _SOON:
            self._say("the tracking server is away; training goes on, and its curves are kept until it is back")
        self._next = time.monotonic() + self._wait
        self._wait = min(2 * self._wait, _RAREST)

    def rest(self) -> None:
        """Of a training that is done. For a server that is away it waits as long as MLflow does, some minutes."""
        if self._wait > _SOON:
            self._say("training is done, and kept; waiting for the tracking server")
        self.run.timed_points(self.points)
        self.points.clear()

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False)


def _optimise(
    terms: dict[str, Tensor], training: tuple[Optimizer, LRScheduler], step: int, curves: _Curves | None, shard: Shard
) -> None:
    """One optimiser step on the sum of the terms; a term that is not finite stops the run before the update.

    Of several processes each has its share of a term. All know the whole, and so stop at the same step.
    """
    optimizer, scheduler = training
    values = shard.total(torch.stack([term.detach() for term in terms.values()]).double())
    if not bool(values.isfinite().all()):  # the one wait for the device in a step
        listed = ", ".join(f"{name} = {value:g}" for name, value in zip(terms, values.tolist(), strict=True))
        raise TrainingDiverged(
            f"step {step}: a loss is not finite ({listed}); lower the learning rate or check the data"
        )
    loss = torch.stack([term for term in terms.values() if term.requires_grad]).sum()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    shard.add_gradients(parameter for group in optimizer.param_groups for parameter in group["params"])
    if curves is not None:
        curves.add(dict(zip(terms, values.unbind(), strict=True)), optimizer, step)
    optimizer.step()
    scheduler.step()


def step_seed(seed: int, step: int) -> int:
    """A seed for one step's generator; consecutive integers would give related streams in some generators."""
    return (seed * 1_000_003 + step * 7_919 + 0x9E3779B97F4A7C15) % 2**63


class _Rate:
    """Steps per second since this process began."""

    def __init__(self, first: int) -> None:
        self._first, self._started = first, time.monotonic()

    def at(self, step: int) -> float:
        return (step - self._first) / max(time.monotonic() - self._started, 1e-9)


def _show(bar: Progress, task: TaskID, step: int, rate: _Rate, curves: _Curves) -> None:
    loss = f"{curves.points[-1][0].removeprefix('loss.')} {curves.points[-1][1]:.4g}" if curves.points else ""
    bar.update(task, completed=step, rate=f"{rate.at(step):.1f} steps/s", loss=loss)
