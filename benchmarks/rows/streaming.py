"""Pixel metrics that see one image after another: 1,024 pixels, and how much memory they take for 10 and 40 of them."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rows import Contender, Figures, Loaded, Row

IMAGES, FEW, SIDE = 40, 10, 1024


def make(_folder: Path) -> None:
    """Nothing: maps are drawn one by one, in as much time on both sides, for they are not to lie in memory."""


def maps(count: int) -> Iterator[tuple[Any, Any]]:
    """Log-normal maps (1, H, W), higher inside a disc, and the disc."""
    import torch

    generator = np.random.default_rng(0)
    y, x = np.mgrid[:SIDE, :SIDE]
    for _ in range(count):
        centre, radius = generator.integers(SIDE, size=2), generator.integers(16, 100)
        mask = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2
        found = np.exp(generator.standard_normal(mask.shape, dtype=np.float32) + np.float32(1.5) * mask)
        yield torch.from_numpy(found)[None], torch.from_numpy(mask)[None]


def metrics(kind: str) -> Callable[[Path], Loaded]:
    def load(_folder: Path) -> Loaded:
        import torch

        from pipelines.evaluation import metrics

        def measured(count: int) -> Any:
            found = getattr(metrics, kind)()
            for anomaly_map, mask in maps(count):
                found.update(anomaly_map, mask)
            return found.compute()

        torch.set_num_threads(1)
        result = measured(FEW)

        def act() -> Figures:
            grown = {}
            for count in (FEW, IMAGES):
                before = reset()
                measured(count)
                grown[f"megabytes for {count} images"] = highest() - before
            return Figures(grown)

        return Loaded({"AUROC": result.auroc, "AUPRO": result.aupro_30, "F1-max": result.f1_max}, act)

    return load


def reset() -> float:
    """Forget how much memory the process has had; gives how much it has, in megabytes."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return told("VmRSS")


def highest() -> float:
    """`ru_maxrss` would count what this process was, before it took on a program of its own: the one that began it."""
    return told("VmHWM")


def told(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{name}:"))


ROW = Row(
    title=f"pixel metrics of {IMAGES} maps of {SIDE:,} pixels, and of {FEW}, drawn one by one",
    contenders={
        "streaming": Contender(metrics("StreamingPixelMetrics")),
        "exact": Contender(metrics("ExactPixelMetrics")),
    },
    equal="maps, masks, one thread; AUROC, F1-max and AUPRO to 1e-4",
    target={},
    make=make,
    warmed=False,
    tolerance=dict.fromkeys(("AUROC", "AUPRO", "F1-max"), 1e-4),
    at_most={f"megabytes for {count} images": 300 for count in (FEW, IMAGES)},
)
