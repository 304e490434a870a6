"""Models trained by several processes on this machine, which gloo connects."""

import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from tiny_models import build, normals, pretrain, training_batch
from torch import Tensor

from anomaly_models import bgad
from anomaly_models.base import Batch
from anomaly_models.common.copy_paste import Pasted, paste_defects
from anomaly_models.common.shards import Shard
from pipelines.training.checkpoint import Checkpoint
from pipelines.training.loop import Learner, Schedule, follow_steps, run_steps

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "timm", "kornia.color", "kornia.filters", "mlflow", "processes"])


@dataclass(frozen=True)
class Case:
    """A model at its smallest settings but for `changes`, and how many batches it takes."""

    model: str
    steps: int
    changes: dict[str, Any] = field(default_factory=dict)


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
    """The batches of a suite's model, or their corners."""

    model: str
    side: int
    device = torch.device("cpu")

    def training_batch(self, seed: int, step: int, batch_size: int) -> Batch:
        return _cut(training_batch(self.model, step), self.side)


class _Points(list):
    def are_taken(self, points) -> bool:
        self.timed_points(points)
        return True

    def timed_points(self, points) -> None:
        self.extend(points)


def train(case: Case, shard: Shard, folder: Path) -> Curves:
    """What this process makes of a case; all of `shard` are to call it."""
    model = build(case.model, **case.changes)
    pretrain(model)
    batches = _Drawn(case.model, side=model.config.image_size.width)
    model.prepare([_cut(batch, batches.side) for batch in normals(case.model, seed=0)])
    training: Any = model.optimizer(case.steps)
    learner = Learner(model, model.losses, training)
    schedule = Schedule(seed=0, batch_size=4, first=0, total=case.steps)
    points = _Points()
    if shard.rank:
        follow_steps(learner, batches, schedule, shard)
    else:
        checkpoint = Checkpoint(folder, "0")
        run_steps(learner, batches, schedule, checkpoint, points, Console(quiet=True), shard)
        checkpoint.forget_all()
    losses: dict[str, list[float]] = {}
    for name, value, *_ in points:
        if name.startswith("loss."):
            losses.setdefault(name, []).append(value)
    return Curves(losses, {name: value.clone() for name, value in model.state_dict().items()})


def trained(cases: list[Case], world: int, folder: Path, precise: bool = False) -> list[Curves]:
    """What the first of so many processes has of each case; the others have its weights to the bit."""
    first, *others = together(world, folder, partial(_train_all, cases, precise))
    for other in others:
        for one, two in zip(first, other, strict=True):
            assert all(torch.equal(value, two.state[name]) for name, value in one.state.items())
    return first


def together(world: int, folder: Path, work: Callable[[Shard, Path], Any]) -> list[Any]:
    """What `work`, picklable, gives in each of so many processes."""
    folder.mkdir(parents=True)
    begun = [_CONTEXT.Process(target=_play, args=(Shard(rank, world), folder, work)) for rank in range(world)]
    for process in begun:
        process.start()
    for process in begun:
        process.join()
    assert [process.exitcode for process in begun] == [0] * world
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _play(shard: Shard, folder: Path, work: Callable[[Shard, Path], Any]) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=shard.rank, world_size=shard.world)
    torch.save(work(shard, folder), folder / f"{shard.rank}.pt")
    dist.destroy_process_group()


def _train_all(cases: list[Case], precise: bool, shard: Shard, folder: Path) -> list[Curves]:
    if precise:
        _compute_in_float64()
    return [train(case, shard, folder / f"work{shard.rank}") for case in cases]


# float64, in which rounding leaves no doubt whether two computations are the same. For a process of its own.


def _compute_in_float64() -> None:
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    bgad.paste_defects = _pasted_in_float32


def _cut(batch: Batch, side: int) -> Batch:
    known = {each.name: getattr(batch, each.name) for each in fields(batch)}
    floating = {name: value for name, value in known.items() if value is not None and value.is_floating_point()}
    wanted = torch.get_default_dtype()
    return replace(batch, **{name: value[..., :side, :side].to(wanted) for name, value in floating.items()})


def _pasted_in_float32(*given: Any) -> Pasted:
    """What varies defects names that type itself."""
    torch.set_default_dtype(torch.float32)
    torch.Tensor.float = _single  # type: ignore[method-assign]
    singles = [_single(each) if isinstance(each, Tensor) and each.is_floating_point() else each for each in given]
    pasted = paste_defects(*singles)
    _compute_in_float64()
    return Pasted(pasted.image.double(), pasted.mask.double())


def _single(values: Tensor) -> Tensor:
    return values.to(torch.float32)
