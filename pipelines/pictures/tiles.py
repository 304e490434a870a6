"""How a picture that is larger than a network's input is cut into tiles, and how their maps become its own.

Tiles overlap, and where they do their maps are blended: the share of each falls to nothing towards its edge, where a
network sees least of what surrounds a place. At every pixel the shares add up to one, so that no seam can be seen.
"""

from collections.abc import Callable, Iterator
from functools import cache, cached_property
from itertools import product

import numpy as np
from numpy.typing import NDArray

from anomaly_models.common.sizes import Size, Tiled
from pipelines.pictures.frames import Window

Map = NDArray[np.float32]
Mask = NDArray[np.bool_]
Look = Callable[[int, Window], Map]  # of a tile, its number row by row and its place
_BAND = 256  # rows of a map that are ranked at once


class Tiling:
    """The tiles of pictures of one size: of one size themselves, evenly apart, the outer ones flush with the edges."""

    def __init__(self, picture: Size, tiles: Tiled) -> None:
        self.picture, self.tile = picture, tiles.of(picture)
        self._rows, self._columns = (
            _starts(whole, side, number)
            for whole, side, number in zip(picture, self.tile, tiles.number(picture), strict=True)
        )

    def __len__(self) -> int:
        return len(self._rows) * len(self._columns)

    def __iter__(self) -> Iterator[Window]:
        """Row by row."""
        return (self._window(top, left) for top, left in product(self._rows, self._columns))

    def _window(self, top: int, left: int) -> Window:
        return slice(top, top + self.tile.height), slice(left, left + self.tile.width)

    @cached_property
    def _shares(self) -> tuple[list[NDArray[np.float32]], list[NDArray[np.float32]]]:
        return _shares(self._rows, self.tile.height), _shares(self._columns, self.tile.width)

    def stitched(self, look: Look, region: Mask | None = None) -> Map:
        """The map (H, W) of a picture, of which `look` gives that of a tile; 0 outside the `region` (H, W).

        Tiles with nothing of the region are not looked at.
        """
        result = np.zeros(self.picture, dtype=np.float32)
        by_row, by_column = self._shares
        for number, (window, (high, wide)) in enumerate(zip(self, product(by_row, by_column), strict=True)):
            if region is None or region[window].any():
                result[window] += high[:, None] * wide * look(number, window)
        if region is not None:
            result *= region
        return result


@cache
def tiling(picture: Size, tiles: Tiled | None) -> Tiling | None:
    """How pictures of a size are cut up; None if they are not. Made once, with the shares of its tiles."""
    return None if tiles is None else Tiling(picture, tiles)


def score_of(anomaly_map: Map, pixels: int, region: Mask | None = None) -> float:
    """The mean of so many largest pixels of a map (H, W) within the region, or of all if it has fewer."""
    found = np.empty(0, dtype=np.float32)
    for top in range(0, len(anomaly_map), _BAND):
        band = anomaly_map[top : top + _BAND]
        found = np.concatenate([found, band.ravel() if region is None else band[region[top : top + _BAND]]])
        if len(found) > pixels:
            found = np.partition(found, len(found) - pixels)[-pixels:]
    return float(found.mean(dtype=np.float64))


def _starts(whole: int, side: int, number: int) -> list[int]:
    return [round(place * (whole - side) / max(1, number - 1)) for place in range(number)]


def _shares(starts: list[int], side: int) -> list[NDArray[np.float32]]:
    """Of each tile along one axis, its share at each of its pixels: a ramp over what it has in common with the next."""
    end = starts[-1] + side
    weights = []
    for start in starts:
        place = np.arange(start, start + side)
        before = max((other + side for other in starts if other < start), default=start)  # where neighbours end, begin
        after = min((other for other in starts if other > start), default=start + side)
        rising = (place - start + 1) / (before - start + 1)
        falling = (start + side - place) / (start + side - after + 1)
        weights.append(np.minimum(1, np.minimum(rising, falling)))
    total = np.zeros(end)
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + side] += weight
    return [
        (weight / total[start : start + side]).astype(np.float32) for start, weight in zip(starts, weights, strict=True)
    ]
