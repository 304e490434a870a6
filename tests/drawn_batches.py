"""Images and batches drawn from a seed, and what the tests of several models do with them."""

import io
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from anomaly_models.base import AnomalyModel, Batch, Prediction, Progress

Training = tuple[Optimizer, LRScheduler]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def patterns(number: int, seed: int, size: int = 64) -> Tensor:
    """Smooth ones of random colours in [0, 1], which take 8 pixels to change."""
    noise = torch.rand(number, 3, size // 8, size // 8, generator=seeded(seed))
    return F.interpolate(noise, size=size, mode="bicubic").clamp(0, 1)


def parts(number: int, seed: int, size: int = 64) -> Tensor:
    """One smooth pattern of low contrast, with fresh grain on every image."""
    pattern = 0.3 + 0.4 * patterns(1, seed=0, size=size)
    return (pattern + 0.05 * torch.randn(number, 3, size, size, generator=seeded(seed))).clamp(0, 1)


def batch_of(image: Tensor, **known: Tensor) -> Batch:
    """Normal images."""
    return Batch(image, torch.zeros_like(image[:, :1]), torch.zeros(len(image), dtype=torch.bool), **known)


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@torch.no_grad()
def perturbed(module: nn.Module, seed: int = 0, size: float = 0.05) -> Any:
    """The module itself, with every parameter moved off its initial value, zeros included."""
    generator = seeded(seed)
    for parameter in module.parameters():
        parameter.add_(size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return module


def take_steps(
    model: AnomalyModel, training: Training, batch_at: Callable[[int], Batch], steps: range, total: int
) -> Iterator[dict[str, Tensor]]:
    """The loop of `pipelines.training.loop`, without what surrounds it; gives the terms of each optimiser step."""
    optimizer, schedule = training
    model.train()
    for step in steps:
        for terms in model.losses(batch_at(step), Progress(step, total, seeded(step))):
            optimizer.zero_grad()
            torch.stack([term for term in terms.values() if term.requires_grad]).sum().backward()
            optimizer.step()
            schedule.step()
            yield terms


def resume(
    model: AnomalyModel, fresh: AnomalyModel, batch_at: Callable[[int], Batch], *, stop: int, total: int
) -> None:
    """Train `model` up to a stop, and `fresh` on from there with what a checkpoint holds."""
    first: Any = model.optimizer(total)
    list(take_steps(model, first, batch_at, range(stop), total))
    checkpoint = io.BytesIO()
    torch.save([part.state_dict() for part in (model, *first)], checkpoint)
    checkpoint.seek(0)
    second: Any = fresh.optimizer(total)
    for part, state in zip((fresh, *second), torch.load(checkpoint), strict=True):
        part.load_state_dict(state)
    list(take_steps(fresh, second, batch_at, range(stop, total), total))


def rates_of(training: Training, steps: int) -> list[list[float]]:
    """The learning rates of all groups in each step."""
    optimizer, schedule = training
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return rates


def same_state(left: nn.Module, right: nn.Module) -> bool:
    state = right.state_dict()
    return all(torch.equal(value, state[name]) for name, value in left.state_dict().items())


def assert_agree(found: Iterable[Any], expected: Prediction, atol: float, rtol: float = 0) -> None:
    """A map and a score, of a model or of an exported file."""
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.as_tensor(value), wanted, rtol=rtol, atol=atol)
