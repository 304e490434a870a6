"""All metrics of one category: 80 maps of 256 pixels."""

from pathlib import Path

import numpy as np

from benchmarks.rows import Contender, Loaded, Row

IMAGES, SIDE = 80, 256


def make(folder: Path) -> None:
    """Log-normal maps in [0, 1], higher inside a disc in half of the images."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[:SIDE, :SIDE]
    masks = np.zeros((IMAGES, SIDE, SIDE), dtype=bool)
    for number in range(0, IMAGES, 2):
        for _ in range(2):
            centre, radius = generator.integers(SIDE, size=2), generator.integers(4, 25)
            masks[number] |= (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2
    maps = np.exp(generator.standard_normal(masks.shape, dtype=np.float32) + 1.5 * masks)
    np.savez(folder / "maps.npz", maps=(maps / maps.max()).astype(np.float32), masks=masks)


def ours(folder: Path) -> Loaded:
    import torch

    from pipelines.evaluation.metrics import ExactPixelMetrics, image_metrics

    maps, masks = (torch.from_numpy(array)[:, None] for array in np.load(folder / "maps.npz").values())
    scores, labels = maps.amax((1, 2, 3)), masks.amax((1, 2, 3)).long()

    def act() -> dict[str, float]:
        pixels = ExactPixelMetrics()
        pixels.update(maps, masks)
        of_pixels, of_images = pixels.compute(), image_metrics(scores, labels)
        return {
            "image AUROC": of_images.auroc,
            "image F1-max": of_images.f1_max,
            "pixel AUROC": of_pixels.auroc,
            "pixel F1-max": of_pixels.f1_max,
            "AUPRO": of_pixels.aupro_30,
        }

    return Loaded(act(), act)


def anomalib(folder: Path) -> Loaded:
    import torch
    from anomalib.metrics.aupro import _AUPRO
    from anomalib.metrics.auroc import _AUROC
    from anomalib.metrics.f1_score import _F1Max

    maps, masks = (torch.from_numpy(array)[:, None] for array in np.load(folder / "maps.npz").values())
    scores, labels = maps.amax((1, 2, 3)), masks.amax((1, 2, 3)).int()

    def act() -> dict[str, float]:
        found = {}
        for name, metric, predicted, truth in (
            ("image AUROC", _AUROC(), scores, labels),
            ("image F1-max", _F1Max(), scores, labels),
            ("pixel AUROC", _AUROC(), maps, masks.int()),
            ("pixel F1-max", _F1Max(), maps.flatten(), masks.flatten().int()),
            ("AUPRO", _AUPRO(fpr_limit=0.3), maps[:, 0], masks[:, 0].int()),
        ):
            metric.update(predicted, truth)
            found[name] = float(metric.compute())
        return found

    return Loaded(act(), act)


ROW = Row(
    title="all metrics of one category: 80 maps of 256 pixels",
    contenders={"exact": Contender(ours), "anomalib": Contender(anomalib, is_peer=True)},
    equal="maps, masks, one thread; AUROC and F1-max of images and pixels and AUPRO to 1e-4",
    target={"anomalib": 20},
    brief="all metrics of a category",
    make=make,
    tolerance=dict.fromkeys(("image AUROC", "image F1-max", "pixel AUROC", "pixel F1-max", "AUPRO"), 1e-4),
)
