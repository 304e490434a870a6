"""How the values of a file become the bytes that all else works on: what a user sets of it, and the window.

Every reader keeps to these rules, whatever decodes the file.
"""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.errors import ImageError
from pipelines.numbers import counted

AboveWhite = Literal["refuse", "clip"]

PHOTO_MEGAPIXELS = 90  # the most of a photo, for which there is no setting
_DEEPEST = 65535
_WHITE = 255


class DicomWindow(Protocol):
    """In the units of the modality, after slope and intercept; 0 to 255 as PS3.3 C.11.2.1.2.1 says."""

    @property
    def centre(self) -> float: ...
    @property
    def width(self) -> float: ...


# The first that a file names, or one for all files.
WantedWindow = Literal["file"] | DicomWindow


class PlainWindow(NamedTuple):
    """One that was read, and has not to be checked."""

    centre: float
    width: float


@dataclass(frozen=True, slots=True)
class Reading:
    """All that decides, beside the file itself, on the pixels that come of it."""

    black_level: int  # value of more than 8 bits that is shown as black, as are those below
    white_level: int  # likewise as white, above black
    above_white: AboveWhite  # what becomes of a value above white
    page: int | None  # of a file that holds several; None: such a file is refused
    dicom_window: WantedWindow  # what of a DICOM's values is shown
    max_megapixels: int | None  # larger pictures are refused; None: as a photo

    @classmethod
    def of(cls, holder: object) -> Self:
        """Of something that has all of these among its fields, under their names: settings, an exported file's card."""
        return cls(**{field.name: getattr(holder, field.name) for field in fields(cls)})


@dataclass(frozen=True, slots=True)
class Raster:
    """What a file holds where Pillow has no mode that keeps it, or knows no window: upright."""

    values: NDArray[np.integer]  # (H, W), or (H, W, 3) of colour; 8 bits, or as many as there are
    white_is_zero: bool = False  # 0 is shown as white
    opacity: NDArray[np.uint8 | np.uint16] | None = None  # (H, W), 0 is transparent

    def is_marked(self) -> NDArray[np.bool_]:
        """(H, W), what a mask marks: all that is neither black nor transparent."""
        marked = self.values != (self._deepest if self.white_is_zero else 0)
        if marked.ndim == 3:
            marked = marked.any(axis=2)
        return marked if self.opacity is None else marked & (self.opacity != 0)

    @property
    def highest(self) -> int | None:
        """The highest value, of more than 8 bits only."""
        return None if self.values.dtype == np.uint8 else int(self.values.max())

    def shown(self, path: Path, reading: Reading) -> NDArray[np.uint8]:
        """(H, W, 3), what is of more than 8 bits in the window of `reading`; raises ImageError for what is refused."""
        shown = self._bytes(path, reading)
        if shown.ndim == 2:
            shown = np.repeat(shown[..., None], 3, axis=2)
        if self.opacity is None:
            return shown
        deep = self.opacity.dtype != np.uint8
        opacity = ((self.opacity.astype(np.uint32) + 128) // 257).astype(np.uint8) if deep else self.opacity
        colour = Image.fromarray(np.dstack([shown, opacity]))
        return np.array(Image.alpha_composite(Image.new("RGBA", colour.size, "white"), colour).convert("RGB"))

    def _bytes(self, path: Path, reading: Reading) -> NDArray[np.uint8]:
        if self.values.dtype == np.uint8:
            return (_WHITE - self.values if self.white_is_zero else self.values).astype(np.uint8)
        values = _to_uint16(self.values, path)
        highest = int(values.max())
        if highest > reading.white_level and reading.above_white == "refuse":
            raise ImageError(
                f"{path}: holds the value {highest}, above `prepare.white_level` {reading.white_level}; "
                "raise it, or show such values as white (`prepare.above_white: clip`)"
            )
        return _window(reading.black_level, reading.white_level, white_is_zero=self.white_is_zero)[values]

    @property
    def _deepest(self) -> int:
        return _WHITE if self.values.dtype == np.uint8 else _DEEPEST


def float_error(values: NDArray[np.floating], path: Path) -> ImageError:
    """What is said of floating-point numbers: which of them is white, no file tells."""
    holes = int(np.isnan(values).sum())
    if holes:
        return ImageError(
            f"{path}: floating point, with NaN (no number) at {counted(holes, 'place')}; fill them, and save it with 8 "
            "or 16 bits per channel"
        )
    return ImageError(f"{path}: floating point is not supported; save it with 8 or 16 bits per channel")


def _to_uint16(values: NDArray[np.integer], path: Path) -> NDArray[np.uint16]:
    """The same values, none of which may need more or be negative; raises ImageError."""
    lowest, highest = int(values.min()), int(values.max())
    if highest > _DEEPEST:
        raise ImageError(f"{path}: holds the value {highest}, above {_DEEPEST}; save it as unsigned 16-bit grey")
    if lowest < 0:
        raise ImageError(f"{path}: holds the negative value {lowest}; save it as unsigned 16-bit grey")
    return values.astype(np.uint16)


def _window(black: int, white: int, *, white_is_zero: bool) -> NDArray[np.uint8]:
    """What each of the 65,536 values is shown as: black to white level is 0 to 255, rounded half up, or 255 to 0."""
    values = np.clip(np.arange(_DEEPEST + 1), black, white) - black
    if white_is_zero:
        values = white - black - values
    return ((2 * _WHITE * values + white - black) // (2 * (white - black))).astype(np.uint8)


def turned(values: NDArray[Any], orientation: int) -> NDArray[Any]:
    """(H, W, ...) as EXIF's `orientation` says, so that it is upright."""
    if orientation >= 5:
        values = values.swapaxes(0, 1)
    if orientation in {3, 4, 7, 8}:
        values = values[::-1]
    if orientation in {2, 3, 6, 7}:
        values = values[:, ::-1]
    return values


def select_page(count: int, path: Path, page: int | None, what: str = "page") -> int:
    """Which of the `count` pages of a file to read, from 0; raises ImageError where `prepare.page` does not say."""
    if page is None and count > 1:
        raise ImageError(
            f"{path}: holds {count} {what}s; save the one to read by itself or, for pictures, set `prepare.page` to it "
            "(0 is the first)"
        )
    if page is not None and page >= count:
        raise ImageError(
            f"{path}: holds {counted(count, what)}, none at `prepare.page` {page}, which counts from 0; lower it"
        )
    return page or 0


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
