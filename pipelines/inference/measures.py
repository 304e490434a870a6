"""What a camera does to all of a picture, in three numbers: brightness, contrast and sharpness."""

import numpy as np

from pipelines.inference.engine import Inputs
from pipelines.pictures.overlays import Map

MEASURES = ("brightness", "contrast", "sharpness")
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601


def measured(inputs: Inputs) -> dict[str, float]:
    """Of a picture as the network sees it, where it counts: mean and standard deviation of its luma, in [0, 1].

    Sharpness is the standard deviation of the luma's Laplacian, by the contrast: light alone does not change it.
    """
    luma = inputs.pixels[0] @ (_LUMA / 255)
    counts = np.ones(luma.shape, bool) if inputs.region is None else inputs.region[0]
    seen = luma[counts]
    contrast = float(seen.std(dtype=np.float64)) if seen.size else 0.0
    edges = _laplacian(luma)[counts[1:-1, 1:-1]]
    sharpness = float(edges.std(dtype=np.float64)) / contrast if contrast and edges.size else 0.0
    brightness = float(seen.mean(dtype=np.float64)) if seen.size else 0.0
    return dict(zip(MEASURES, (brightness, contrast, sharpness), strict=True))


def _laplacian(luma: Map) -> Map:
    """(H - 2, W - 2): each pixel's four neighbours, less four times itself."""
    around = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:]
    difference: Map = around - 4 * luma[1:-1, 1:-1]
    return difference
