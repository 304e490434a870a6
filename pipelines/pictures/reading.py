"""How the values of a file become the bytes that all else works on: what a user sets of it, and the window.

Every reader keeps to these rules, whatever decodes the file.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import ImageError

AboveWhite = Literal["refuse", "clip"]

PHOTO_MEGAPIXELS = 90  # the most of a photo, for which there is no setting
_DEEPEST = 65535
_WHITE = 255


@dataclass(frozen=True, slots=True)
class Reading:
    """All that decides, beside the file itself, on the pixels that come of it."""

    black_level: int  # value of more than 8 bits that is shown as black, as are those below
    white_level: int  # likewise as white, above black
    above_white: AboveWhite  # what becomes of a value above white
    max_megapixels: int | None  # larger pictures are refused; None: as a photo


@dataclass(frozen=True, slots=True)
class Raster:
    """Grey as a file holds it, of more than 8 bits, upright."""

    values: NDArray[np.integer]  # (H, W)
    white_is_zero: bool  # 0 is shown as white

    def is_marked(self) -> NDArray[np.bool_]:
        """(H, W), what a mask marks: all that is not black."""
        return self.values != (_DEEPEST if self.white_is_zero else 0)

    def highest(self) -> int:
        return int(self.values.max())

    def shown(self, path: Path, reading: Reading) -> NDArray[np.uint8]:
        """(H, W, 3), each value in the window of `reading`; raises ImageError for one that is refused."""
        values = _to_uint16(self.values, path)
        if self.highest() > reading.white_level and reading.above_white == "refuse":
            raise ImageError(
                f"{path}: holds the value {self.highest()}, above `prepare.white_level` {reading.white_level}; "
                "raise it, or show such values as white (`prepare.above_white: clip`)"
            )
        grey = _window(reading, white_is_zero=self.white_is_zero)[values]
        return np.repeat(grey[..., None], 3, axis=2)


def _to_uint16(values: NDArray[np.integer], path: Path) -> NDArray[np.uint16]:
    """The same values, none of which may need more or be negative; raises ImageError."""
    lowest, highest = int(values.min()), int(values.max())
    if highest > _DEEPEST:
        raise ImageError(f"{path}: holds the value {highest}, above {_DEEPEST}; save it as unsigned 16-bit grey")
    if lowest < 0:
        raise ImageError(f"{path}: holds the negative value {lowest}; save it as unsigned 16-bit grey")
    return values.astype(np.uint16)


def _window(reading: Reading, *, white_is_zero: bool) -> NDArray[np.uint8]:
    """What each of the 65,536 values is shown as: black to white level is 0 to 255, rounded half up, or 255 to 0."""
    black, white = reading.black_level, reading.white_level
    values = np.clip(np.arange(_DEEPEST + 1), black, white) - black
    if white_is_zero:
        values = white - black - values
    return ((2 * _WHITE * values + white - black) // (2 * (white - black))).astype(np.uint8)


def check_size(width: int, height: int, path: Path, max_megapixels: int | None) -> None:
    """Raise ImageError, before it is decoded: some kilobytes may unpack to gigabytes (a decompression bomb)."""
    limit = PHOTO_MEGAPIXELS if max_megapixels is None else max_megapixels
    megapixels = width * height / 1e6
    if megapixels <= limit:
        return
    found = f"{width:,} x {height:,} pixels are {megapixels:,.1f} megapixels"
    if max_megapixels is None:
        raise ImageError(f"{path}: {found}, above {limit} for photos; make it smaller or remove it")
    raise ImageError(
        f"{path}: {found}, above `prepare.max_megapixels` {limit}; set it to {math.ceil(megapixels)}, if the memory "
        "allows, or make the picture smaller"
    )
