"""What a camera does to all of a picture, in three numbers: brightness, contrast and sharpness."""

import math

import numpy as np
from numpy.typing import NDArray

from pipelines.inference.engine import Inputs
from pipelines.pictures.overlays import Map

MEASURES = ("brightness", "contrast", "sharpness")
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32) / 255  # ITU-R BT.601
_FLAT = 1e-5  # a deviation that may be rounding
_ROWS = 64  # at once: all would fill the memory with a large picture, and the caches with a small one


def measured(inputs: Inputs) -> dict[str, float]:
    """Of a picture as the network sees it, where it counts: mean and standard deviation of its luma, in [0, 1].

    Sharpness is the standard deviation of the luma's Laplacian, by the contrast: light alone does not change it.
    """
    pixels, region = inputs.pixels[0], None if inputs.region is None else inputs.region[0]
    luma, edges = _Moments(), _Moments()
    for top in range(0, len(pixels), _ROWS):
        # With a row of the neighbours on either side, of which the Laplacian has none of its own.
        first, last = max(top - 1, 0), min(top + _ROWS + 1, len(pixels))
        # No product of matrices: its threads would wait for more, and take the cores from the network's.
        band = np.einsum("hwc,c->hw", pixels[first:last], _LUMA)
        own, found = slice(top - first, top - first + _ROWS), _laplacian(band)
        if region is None:
            luma.add(band[own])
            edges.add(found)
        else:
            luma.add(band[own][region[first:last][own]])
            edges.add(found[region[first:last][1:-1, 1:-1]])
    sharpness = edges.deviation / luma.deviation if luma.deviation > _FLAT else 0.0
    return dict(zip(MEASURES, (luma.mean, luma.deviation, sharpness), strict=True))


class _Moments:
    """Mean and standard deviation of what comes in parts."""

    def __init__(self) -> None:
        self._number, self._sum, self._squares = 0, 0.0, 0.0

    def add(self, values: NDArray[np.float32]) -> None:
        self._number += values.size
        self._sum += float(values.sum(dtype=np.float64))
        self._squares += float(np.square(values, dtype=np.float64).sum())

    @property
    def mean(self) -> float:
        return self._sum / self._number if self._number else 0.0

    @property
    def deviation(self) -> float:
        return math.sqrt(max(self._squares / self._number - self.mean**2, 0.0)) if self._number else 0.0


def _laplacian(luma: Map) -> Map:
    """(H - 2, W - 2): each pixel's four neighbours, less four times itself."""
    around = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:]
    difference: Map = around - 4 * luma[1:-1, 1:-1]
    return difference
