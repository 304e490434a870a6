"""The loop: any learner, step by step; resumable at any moment, ended by a bad loss."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TaskID, TextColumn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from anomaly_models import base as contract
from pipelines.data.arrays import BatchSource
from pipelines.errors import TrainingDiverged
from pipelines.progress import progress_bar
from pipelines.tracking.runs import OpenRun
from pipelines.training.checkpoint import Checkpoint

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


def run_steps(
    learner: Learner[B],
    data: BatchSource[B],
    schedule: Schedule,
    checkpoint: Checkpoint,
    run: OpenRun,
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
