"""The regions of a mask, found once, and an image's pixels inside and outside them.

Of MVTec LOCO AD (Bergmann et al., IJCV 130, 2022) a region is a defect with a mask of its own, connected or not, and
its overlap saturates: sPRO = min(found pixels / saturation, 1). Of a defect that lies in many places, such as all where
a missing part might have been, a part counts as all. With the saturation at its full size, sPRO is PRO.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from anomaly_models.common.sizes import Size
from pipelines.pictures.frames import WHOLE, Shape, Window, size_of
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
    # (pixels inside,): what each adds to the overlap of its region, once found with all that score higher; a whole
    # region adds 1
    weights: NDArray[np.float64]
    num_regions: int
    saturated: bool  # whether a part of a region may count as all


class Defect(NamedTuple):
    """A region whose overlap saturates."""

    inside: NDArray[np.int64]  # (pixels,), their places among all pixels inside
    saturation: float  # pixels, at most all


@dataclass(frozen=True, slots=True)
class Regions:
    """The anomalous regions of one image among the pixels that count. Small: most of an image is background."""

    shape: tuple[int, int]  # (H, W) of the mask
    counted: Window | Mask  # outside it no pixel counts
    places: NDArray[np.int64]  # (pixels inside,), among those counted, row by row
    sizes: NDArray[np.int32]  # (pixels inside,): how many pixels the region of each has; of defects, all inside
    count: int
    defects: tuple[Defect, ...] | None  # None where no region saturates

    @classmethod
    def of(cls, mask: Mask, counted: Window | Mask = WHOLE) -> "Regions":
        """The regions of a mask, 8-connected."""
        inside = np.zeros(mask.shape, dtype=bool)
        inside[counted] = mask[counted]
        labels, count = ndimage.label(inside, structure=_EIGHT_CONNECTED)
        labelled = labels[counted].ravel()
        places = np.flatnonzero(labelled)
        of_place = labelled[places]
        return cls(mask.shape, counted, places, np.bincount(of_place).astype(np.int32)[of_place], count, None)

    @classmethod
    def of_defects(
        cls, masks: Sequence[Mask], saturations: Sequence[float], counted: Window | Mask = WHOLE
    ) -> "Regions":
        """A region for each mask of an image; they may overlap. `saturations`: pixels of each that count as all."""
        parts = [mask[counted] for mask in masks]
        places = np.flatnonzero(np.any(parts, axis=0))
        defects = []
        for part, saturation in zip(parts, saturations, strict=True):
            inside = np.searchsorted(places, np.flatnonzero(part))
            if len(inside):
                defects.append(Defect(inside, min(saturation, len(inside))))
        sizes = np.full(len(places), len(places), dtype=np.int32)
        return cls(masks[0].shape, counted, places, sizes, len(defects), tuple(defects))

    def split(self, anomaly_map: Map, name: str) -> Pixels:
        """The pixels that count, of a map (H, W) of the image called `name`.

        Raises:
            ValueError: a score is NaN or infinite.
        """
        # Adding 0 turns -0.0, equal to 0.0 but of another pattern, into 0.0.
        scores = anomaly_map[self.counted].ravel() + np.float32(0)
        if not np.isfinite(scores).all():
            raise ValueError(f"the anomaly map of {name} holds NaN or infinite scores: they cannot be ranked")
        inside = scores[self.places]
        weights = 1.0 / self.sizes if self.defects is None else _saturated(inside, self.defects)
        return Pixels(np.delete(scores, self.places), inside, weights, self.count, self.defects is not None)


def shrunk(mask: Mask, shape: Shape) -> Mask:
    """A defect's mask at the scale of a frame; one that would vanish keeps the pixel under its centroid."""
    small = shape.restored(shape.fitted_mask(mask), size_of(mask), 0)
    if not small.any():
        row, column = ((np.argwhere(mask).mean(axis=0) + 0.5) * small.shape / mask.shape).astype(int)
        small = np.zeros(small.shape, dtype=bool)
        small[row, column] = True
    return small


def _saturated(scores: NDArray[np.float32], defects: Sequence[Defect]) -> NDArray[np.float64]:
    """What each pixel inside (P,) adds to the overlaps of the defects that it is in, the highest scores first.

    Of a defect only as many as its saturation add anything; which of equal scores do is all the same, since they are
    found together.
    """
    weights = np.zeros(len(scores))
    for inside, saturation in defects:
        ranked = inside[np.argsort(-scores[inside], kind="stable")]
        weights[ranked] += np.clip(saturation - np.arange(len(ranked)), 0, 1) / saturation
    return weights
