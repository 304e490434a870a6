"""Models trained by several processes on this machine, which gloo connects."""

import multiprocessing
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from tiny_models import build, normals, pretrain, training_batch
from torch import Tensor

from anomaly_models.base import Batch
from anomaly_models.common.shards import Shard
from pipelines.training.checkpoint import Checkpoint
from pipelines.training.loop import Learner, Schedule, follow_steps, run_steps

STEPS = 20
_CONTEXT = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Case:
    """A model at its smallest settings, but for `changes`."""

    model: str
    changes: dict[str, Any]


@dataclass(frozen=True)
class Curves:
    """What the first process noted of each step, and the state it ended with."""

    losses: dict[str, list[float]]
    state: dict[str, Tensor]

    def furthest(self, other: "Curves") -> float:
        """The largest difference of a loss, absolute up to 1 and relative above."""
        assert self.losses.keys() == other.losses.keys()
        pairs = [pair for name in self.losses for pair in zip(self.losses[name], other.losses[name], strict=True)]
        return max(abs(one - two) / max(1, abs(two)) for one, two in pairs)

    def furthest_weight(self, other: "Curves") -> float:
        numbers = [name for name, value in self.state.items() if value.is_floating_point()]
        return max(float((self.state[name] - other.state[name]).abs().max()) for name in numbers)


@dataclass(frozen=True)
class _Drawn:
    """The batches of a suite's model."""

    model: str
    device = torch.device("cpu")

    def training_batch(self, seed: int, step: int, batch_size: int) -> Batch:
        return training_batch(self.model, step)


class _Points(list):
    def are_taken(self, points) -> bool:
        self.timed_points(points)
        return True

    def timed_points(self, points) -> None:
        self.extend(points)


def trained(case: Case, shard: Shard, folder: Path, steps: int = STEPS) -> Curves:
    """What this process makes of a case; all of `shard` are to call it."""
    model = build(case.model, **case.changes)
    pretrain(model)
    model.prepare(normals(case.model, seed=0))
    training: Any = model.optimizer(steps)
    learner = Learner(model, model.losses, training)
    schedule = Schedule(seed=0, batch_size=4, first=0, total=steps)
    points = _Points()
    if shard.rank:
        follow_steps(learner, _Drawn(case.model), schedule, shard)
    else:
        checkpoint = Checkpoint(folder, "0")
        run_steps(learner, _Drawn(case.model), schedule, checkpoint, points, Console(quiet=True), shard)
        checkpoint.forget_all()
    losses: dict[str, list[float]] = {}
    for name, value, *_ in points:
        if name.startswith(("loss.", "gradient_norm")):
            losses.setdefault(name, []).append(value)
    return Curves(losses, {name: value.clone() for name, value in model.state_dict().items()})


def together(world: int, folder: Path, work: Any) -> list[Any]:
    """What `work(shard, folder)`, picklable, gives in each of so many processes."""
    folder.mkdir(parents=True, exist_ok=True)
    begun = [_CONTEXT.Process(target=_play, args=(Shard(rank, world), folder, work)) for rank in range(world)]
    for process in begun:
        process.start()
    for process in begun:
        process.join()
    assert [process.exitcode for process in begun] == [0] * world
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _play(shard: Shard, folder: Path, work: Any) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=shard.rank, world_size=shard.world)
    torch.save(work(shard, folder), folder / f"{shard.rank}.pt")
    dist.destroy_process_group()


def train_all(cases: list[Case], shard: Shard, folder: Path) -> list[Curves]:
    return [trained(case, shard, folder / f"work{shard.rank}") for case in cases]


def trained_together(cases: list[Case], world: int, folder: Path) -> list[Curves]:
    """Of the first process, whose weights all others have to the bit."""
    first, *others = together(world, folder, partial(train_all, cases))
    for other in others:
        for one, two in zip(first, other, strict=True):
            assert all(torch.equal(value, two.state[name]) for name, value in one.state.items())
    return first
