"""The regions of a mask, found once, and an image's pixels inside and outside them."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from anomaly_models.common.settings import Size
from pipelines.pictures.frames import WHOLE, Window
from pipelines.pictures.overlays import Map, Mask

_EIGHT_CONNECTED = np.ones((3, 3), dtype=np.int8)


def centre(shape: tuple[int, ...], size: Size, of: Size) -> Window:
    """The centre of a picture (H, W) that was of size `of` when its centre was of `size`."""
    befores = ((whole - side) // 2 for whole, side in zip(of, size, strict=True))
    rows, columns = (
        slice(round(before * pixels / whole), round((before + side) * pixels / whole))
        for before, side, whole, pixels in zip(befores, size, of, shape, strict=True)
    )
    return rows, columns


class Pixels(NamedTuple):
    """The scores of an image's pixels by its mask."""

    normal: NDArray[np.float32]  # (pixels outside all regions,)
    anomalous: NDArray[np.float32]  # (pixels inside,)
    region_sizes: NDArray[np.int32]  # (pixels inside,): how many pixels the region of each has
    num_regions: int


@dataclass(frozen=True, slots=True)
class Regions:
    """The anomalous regions of one mask among the pixels that count, 8-connected. Small: most of it is background."""

    shape: tuple[int, int]  # (H, W) of the mask
    counted: Window | Mask  # outside it no pixel counts
    places: NDArray[np.int64]  # (pixels inside,), among those counted, row by row
    sizes: NDArray[np.int32]  # (pixels inside,): how many pixels the region of each has
    count: int

    @classmethod
    def of(cls, mask: Mask, counted: Window | Mask = WHOLE) -> "Regions":
        inside = np.zeros(mask.shape, dtype=bool)
        inside[counted] = mask[counted]
        labels, count = ndimage.label(inside, structure=_EIGHT_CONNECTED)
        labelled = labels[counted].ravel()
        places = np.flatnonzero(labelled)
        of_place = labelled[places]
        return cls(mask.shape, counted, places, np.bincount(of_place).astype(np.int32)[of_place], count)

    def split(self, anomaly_map: Map, name: str) -> Pixels:
        """The pixels that count, of a map (H, W) of the image called `name`.

        Raises:
            ValueError: a score is NaN or infinite.
        """
        # Adding 0 turns -0.0, equal to 0.0 but of another pattern, into 0.0.
        scores = anomaly_map[self.counted].ravel() + np.float32(0)
        if not np.isfinite(scores).all():
            raise ValueError(f"the anomaly map of {name} holds NaN or infinite scores: they cannot be ranked")
        return Pixels(np.delete(scores, self.places), scores[self.places], self.sizes, self.count)
