"""The loop: any learner, step by step; resumable at any moment, ended by a bad loss."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
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
from pipelines.training.recorded import Outcome, Recorded, recorder_on, settle

CHECKPOINT_SECONDS = 30.0  # how much work a kill may cost; has no effect on the result
LOG_POINTS = 200  # points in a curve, however long training is
GPU_STEPS = 100  # that a GPU may be behind the loop, which waits for it to look at their terms
_SOON, _RAREST = 30.0, 600.0  # seconds after which a server that is away is asked again: at first, and at the most
Training = tuple[Optimizer, LRScheduler] | None
B = TypeVar("B")  # what a batch is to this learner


@dataclass(frozen=True, slots=True)
class Learner(Generic[B]):
    """What the loop trains: a module, the terms of its loss, and what moves its parameters."""

    module: nn.Module
    losses: Callable[[B, contract.Progress], Iterator[dict[str, Tensor]]]
    training: tuple[Optimizer, LRScheduler]
    same_every_step: bool = False  # as of `AnomalyModel`


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

    Loss terms are averaged between the points. Learning rate and gradient norm are those of the step at the point.
    `progress_percent` goes with them: an axis on which runs of different length lie over one another.
    """

    every: int
    total: int
    points: list[Point]
    _sums: dict[str, float] = field(default_factory=dict)
    _count: int = 0

    def add(self, terms: dict[str, float]) -> None:
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._count += 1

    def is_at(self, step: int) -> bool:
        return (step + 1) % self.every == 0

    def point(self, optimizer: Optimizer, gradient_norm: float, step: int) -> None:
        """Of the terms since the last one."""
        found = {
            "progress_percent": 100 * (step + 1) / self.total,
            **_learning_rates(optimizer),
            "gradient_norm": gradient_norm,
            **{f"loss.{name}": total / self._count for name, total in self._sums.items()},
        }
        self.points += [(name, value, step + 1, time.time()) for name, value in found.items()]
        self._sums, self._count = {}, 0


@dataclass(slots=True)
class _Terms:
    """Those of the steps since the last look. They are on the device, and to look is to wait for all it has to do.

    So on one GPU `GPU_STEPS` of them are looked at after their updates; elsewhere each is, before its own.
    """

    curves: _Curves | None  # of the first of several processes
    together: int
    _waiting: list[tuple[int, tuple[str, ...], Tensor]] = field(default_factory=list)

    def add(self, step: int, names: tuple[str, ...], values: Tensor) -> None:
        self._waiting.append((step, names, values))
        if len(self._waiting) >= self.together:
            self.look()

    def look(self) -> None:
        """Raise TrainingDiverged at the first step with a term that is not finite."""
        if not self._waiting:
            return
        numbers = iter(torch.cat([values for _, _, values in self._waiting]).tolist())
        for step, names, _ in self._waiting:
            terms = dict(zip(names, islice(numbers, len(names)), strict=True))
            if not all(map(math.isfinite, terms.values())):
                listed = ", ".join(f"{name} = {value:g}" for name, value in terms.items())
                raise TrainingDiverged(
                    f"step {step}: a loss is not finite ({listed}); lower the learning rate or check the data"
                )
            if self.curves is not None:
                self.curves.add(terms)
        self._waiting = []


def _learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """The rate; that of each parameter group if they differ."""
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    if len(set(rates)) == 1:
        return {"learning_rate": rates[0]}
    return {f"learning_rate.{number}": rate for number, rate in enumerate(rates)}


def _gradient_norm(optimizer: Optimizer) -> Tensor:
    """Over all parameters; before any clipping, which is part of the optimiser's step."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return get_total_norm(parameter.grad for parameter in parameters if parameter.grad is not None)


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
        TrainingDiverged: a term is not finite, and the parameters are those before the step (on one GPU, of some steps
            later; no checkpoint has them); or a parameter is not after the last step, which no term has seen.
        MlflowException: after the last step, the tracking store does not take the curves, which the checkpoint keeps.
    """
    first, total = schedule.first, schedule.total
    if not 0 <= first <= total:
        raise StageError(f"{checkpoint.path}: damaged (step {first} of {total}); delete it to start afresh")
    curves = _Curves(max(1, total // LOG_POINTS), total, checkpoint.points)
    sending = _Sending(run, curves.points, console)
    stepper = _Stepper(learner, data, schedule, curves, shard)
    saved = time.monotonic()
    learner.module.train()
    columns = MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TextColumn("{task.fields[loss]}")
    with progress_bar(console, *columns) as bar:
        task = bar.add_task("train", total=total, completed=first, rate="", loss="")
        rate = _Rate(first)
        for step in range(first, total):
            stepper.take(step)
            _show(bar, task, step + 1, rate, curves)
            if time.monotonic() - saved > CHECKPOINT_SECONDS or step + 1 == total:
                stepper.look()
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
    stepper = _Stepper(learner, data, schedule, None, shard)
    learner.module.train()
    for step in range(schedule.first, schedule.total):
        stepper.take(step)
    stepper.look()
    _require_finite(learner.module, schedule.total)


class _Stepper(Generic[B]):
    """Takes one batch, as often as the learner makes a step of it."""

    def __init__(
        self, learner: Learner[B], data: BatchSource[B], schedule: Schedule, curves: _Curves | None, shard: Shard
    ) -> None:
        self._learner, self._data, self._schedule, self._shard = learner, data, schedule, shard
        self._generator = torch.Generator(device=data.device)
        together = GPU_STEPS if data.device.type == "cuda" and shard.alone else 1
        self._curves, self._terms = curves, _Terms(curves, together)
        recorder = recorder_on(data.device, self._generator) if learner.same_every_step and shard.alone else None
        optimizer, _ = learner.training
        settle(optimizer, data.device, recorded=recorder is not None)
        self._recorded = Recorded(recorder, optimizer, self._at_once, self._generator.manual_seed) if recorder else None

    def take(self, step: int) -> None:
        seed = step_seed(self._schedule.seed, step)
        batch = self._data.training_batch(self._schedule.seed, step, self._schedule.batch_size)
        if self._recorded is not None:
            outcome = self._recorded(batch, seed)
            self._terms.add(step, outcome.names, outcome.values.clone())
            if self._is_noted(step):
                self._note(step, outcome.gradient_norm)
            self._learner.training[1].step()
            return
        self._generator.manual_seed(seed)
        for terms in self._learner.losses(batch, self._progress(step)):
            self._optimise(terms, step)

    def look(self) -> None:
        """Raise TrainingDiverged if a term of any step so far is not finite."""
        self._terms.look()

    def _progress(self, step: int) -> contract.Progress:
        return contract.Progress(step, self._schedule.total, self._generator, self._shard)

    def _optimise(self, terms: dict[str, Tensor], step: int) -> None:
        """One optimiser step on the sum of the terms.

        Of several processes each has its share of a term. All know the whole, and so stop at the same step.
        """
        optimizer, scheduler = self._learner.training
        self._terms.add(step, tuple(terms), self._shard.total(_values(terms)))
        _backward(terms, optimizer)
        self._shard.add_gradients(parameter for group in optimizer.param_groups for parameter in group["params"])
        if self._is_noted(step):
            self._note(step, _gradient_norm(optimizer))
        optimizer.step()
        scheduler.step()

    def _at_once(self, batch: B) -> Outcome:
        """A step whose number is nothing to the learner, without a look at anything; of one process."""
        optimizer, _ = self._learner.training
        outcomes = []
        for terms in self._learner.losses(batch, self._progress(self._schedule.first)):
            _backward(terms, optimizer)
            outcomes.append(Outcome(tuple(terms), _values(terms), _gradient_norm(optimizer)))
            optimizer.step()
        (outcome,) = outcomes
        return outcome

    def _is_noted(self, step: int) -> bool:
        return self._curves is not None and self._curves.is_at(step)

    def _note(self, step: int, gradient_norm: Tensor) -> None:
        """A point of the curves, while the rate is that of the step."""
        assert self._curves is not None
        self._terms.look()
        self._curves.point(self._learner.training[0], float(gradient_norm), step)


def _values(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack([term.detach() for term in terms.values()]).double()


def _backward(terms: dict[str, Tensor], optimizer: Optimizer) -> None:
    loss = torch.stack([term for term in terms.values() if term.requires_grad]).sum()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated


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
