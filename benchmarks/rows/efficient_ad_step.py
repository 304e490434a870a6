"""A training step of EfficientAD-S at 256 pixels and batch 1: three terms of the loss, backward, Adam."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.rows import Contender, Loaded, Row

SIZE = 256


def make(_folder: Path) -> None:
    """Nothing: weights and pictures are random, which takes as long."""


def pictures() -> Any:
    """An image and a penalty image, (1, 3, H, W) each."""
    import torch

    torch.manual_seed(0)
    return torch.rand(2, 1, 3, SIZE, SIZE)


def ours(precision: str) -> Callable[[Path], Loaded]:
    def load(_folder: Path) -> Loaded:
        import torch

        from anomaly_models.base import Progress
        from benchmarks.bf16_curves import published_settings, training, without_defects

        batch = without_defects(*pictures())
        config = published_settings("small", precision)
        model, take = training(config, [batch])
        progress = Progress(0, config.steps, torch.Generator().manual_seed(0))
        learning = sum(value.numel() for value in model.parameters() if value.requires_grad)
        return Loaded({"parameters": learning}, lambda: take(batch, progress))

    return load


def anomalib(_folder: Path) -> Loaded:
    """What its Lightning module does in a step, without Lightning and its logging."""
    import torch
    from anomalib.models.image.efficient_ad.torch_model import EfficientAdModel, EfficientAdModelSize

    image, penalty = pictures()
    model = EfficientAdModel(teacher_out_channels=384, model_size=EfficientAdModelSize.S, padding=False)
    model.mean_std.update({"mean": torch.zeros(1, 384, 1, 1), "std": torch.ones(1, 384, 1, 1)})
    model.train()
    learning = [*model.student.parameters(), *model.ae.parameters()]
    optimizer = torch.optim.Adam(learning, lr=1e-4, weight_decay=1e-5)

    def act() -> None:
        terms = model(batch=image, batch_imagenet=penalty)
        optimizer.zero_grad()
        sum(terms).backward()
        optimizer.step()

    return Loaded({"parameters": sum(value.numel() for value in learning)}, act)


ROW = Row(
    title=f"training step of EfficientAD-S, {SIZE} pixels, batch 1",
    brief="a step of EfficientAD-S",
    contenders={
        "float32": Contender(ours("float32")),
        "ours in bf16": Contender(ours("bf16"), needs="avx512_bf16"),  # without it a step takes minutes
        "anomalib": Contender(anomalib, is_peer=True),
    },
    equal="published widths, so many parameters, images, one thread",
    target={"anomalib": 1.3},
    make=make,
    tolerance={"parameters": 0},
    missed="Both sides do the same convolutions and their gradients, at the core's peak, and what ours saves lies "
    "beside them. With AVX-512, which does them 2.5 times as fast, it was 1.34 times, and ours in bf16, for which this "
    "processor has no instructions, 2.6 times as fast as anomalib.",
)
