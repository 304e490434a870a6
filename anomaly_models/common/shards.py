"""Several processes that train one model together, by torch.distributed: who has what, and what they tell one another.

All have the same batch and draw the same random numbers for all of it; each computes the losses of its share of the
images. A term that a process yields is its share of the term: together they add up to what one process would find. So
whatever is a mean over the batch is divided by the number in the batch, and whatever needs all of its values (a
quantile, a batch normalisation) asks the others for theirs.

With one process nothing here does anything.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class ProcessLost(SystemExit):
    """Another process has ended, so that this one cannot go on. It ends as by a signal: nothing is wrong with it."""


@contextlib.contextmanager
def asking_others() -> Iterator[None]:
    """Turn what gloo and NCCL say of a process that is gone into `ProcessLost`."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessLost(" ".join(str(error).split())[:200]) from error


@dataclass(frozen=True, slots=True)
class Shard:
    """Which of so many processes this is; the collective methods are to be called by all of them alike."""

    rank: int = 0
    world: int = 1

    @property
    def alone(self) -> bool:
        return self.world == 1

    def share_of(self, number: int) -> "Share":
        return Share(self, number)

    def total(self, value: Tensor) -> Tensor:
        """The sum over all processes, of no gradient."""
        return self._reduced(value, dist.ReduceOp.SUM)

    def lowest(self, value: Tensor) -> Tensor:
        return self._reduced(value, dist.ReduceOp.MIN)

    def highest(self, value: Tensor) -> Tensor:
        return self._reduced(value, dist.ReduceOp.MAX)

    def _reduced(self, value: Tensor, operation: Any) -> Tensor:
        return value if self.alone else _all_reduced(value, operation)

    def sum(self, value: Tensor) -> Tensor:
        """As `total`, with its gradient: that of what all processes make of the sum."""
        if self.alone:
            return value
        found: Tensor = _Sum.apply(value)
        return found

    def gathered(self, values: Tensor) -> Tensor:
        """The values (N,) of all processes, of no gradient and in no order to rely on; each may have another number."""
        if self.alone:
            return values.detach()
        own = torch.tensor([len(values)], device=values.device)
        counts = [torch.zeros_like(own) for _ in range(self.world)]
        with asking_others():
            dist.all_gather(counts, own)
        numbers = [int(count) for count in counts]
        padded = values.new_zeros(max(numbers))
        padded[: len(values)] = values.detach()
        found = [torch.zeros_like(padded) for _ in numbers]
        with asking_others():
            dist.all_gather(found, padded)
        return torch.cat([part[:number] for part, number in zip(found, numbers, strict=True)])

    def collected(self, rows: Tensor, numbers: Sequence[int], owner: int) -> Tensor | None:
        """The rows (n, D) of all processes one after the other, for the `owner`; `numbers` says how many each has."""
        if self.alone:
            return rows
        padded = rows.new_zeros(max(numbers), rows.shape[1])
        padded[: len(rows)] = rows
        found = [torch.zeros_like(padded) for _ in numbers] if self.rank == owner else None
        with asking_others():
            dist.gather(padded, found, dst=owner)
        if found is None:
            return None
        return torch.cat([part[:number] for part, number in zip(found, numbers, strict=True)])

    def spread(self, value: Tensor, owner: int) -> Tensor:
        """What the `owner` holds in `value`, written into that of all others."""
        if not self.alone:
            with asking_others():
                dist.broadcast(value, src=owner)
        return value

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Let each gradient be the sum of those of all processes: that of the sum of their losses.

        Not `DistributedDataParallel`: it hooks into one `forward` and one backward pass, where `losses` yields several
        steps of a batch, some of them of a part of the parameters; and it averages, where shares add up.
        """
        if self.alone:
            return
        held = [parameter for parameter in parameters if parameter.grad is not None]
        gradients = [parameter.grad for parameter in held if parameter.grad is not None]
        together = torch.cat([gradient.flatten() for gradient in gradients])
        with asking_others():
            dist.all_reduce(together)
        parts = torch.split(together, [gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


WHOLE = Shard()


@dataclass(frozen=True, slots=True)
class Share:
    """Of `number` things that all processes hold, every `world`-th: sizes differ by one at most."""

    shard: Shard
    number: int

    def of(self, values: Tensor) -> Tensor:
        """Of (N, ...), this process's."""
        return values if self.shard.alone else values[self.shard.rank :: self.shard.world].contiguous()

    def __len__(self) -> int:
        return len(range(self.shard.rank, self.number, self.shard.world))

    def mean(self, values: Tensor) -> Tensor:
        """Its part of the mean over all, of the values (n, ...) of its share."""
        return self.weighed(values.mean())

    def weighed(self, mean: Tensor) -> Tensor:
        """Its part of the mean over all, given the `mean` over its share."""
        return mean if self.shard.alone else mean * (len(self) / self.number)


def _all_reduced(value: Tensor, operation: Any) -> Tensor:
    found = value.detach().clone(memory_format=torch.contiguous_format)
    with asking_others():
        dist.all_reduce(found, op=operation)
    return found


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:  # noqa: ARG004
        return _all_reduced(value, dist.ReduceOp.SUM)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ARG004
        return _all_reduced(gradient, dist.ReduceOp.SUM)


class BatchNorm2d(nn.BatchNorm2d):
    """Normalises by mean and variance over the images of all processes. `nn.SyncBatchNorm` does on a GPU only."""

    shard: Shard = WHOLE

    def forward(self, x: Tensor) -> Tensor:
        if self.shard.alone or not self.training:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        values = x.to(self.weight.dtype)
        number = self.shard.total(torch.tensor(float(values[:, 0].numel()), device=x.device))
        mean = self._mean(values, number)
        centred = values - mean.view(-1, 1, 1)
        variance = self._mean(centred.square(), number)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * number / (number - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale.view(-1, 1, 1) + self.bias.view(-1, 1, 1)).type_as(x)

    def _mean(self, values: Tensor, number: Tensor) -> Tensor:
        """Per channel, over so many of all processes; summed in float64, as torch does on a CPU."""
        return (self.shard.sum(values.sum(dim=(0, 2, 3), dtype=torch.float64)) / number).type_as(values)


def share_batch_norms(module: nn.Module, shard: Shard) -> None:
    """Let the batch normalisations in it count the images of all processes."""
    for layer in module.modules():
        if isinstance(layer, BatchNorm2d):
            layer.shard = shard
