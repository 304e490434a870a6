"""What Pillow has no mode for or cannot decode: 16-bit colour in PNG and TIFF, and rarer kinds of TIFF.

These are read by imagecodecs and tifffile, the extra `images`, imported when the first such picture comes.
"""

import io
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipelines.errors import ImageError
from pipelines.pictures.damage import find_damage_in_parts
from pipelines.pictures.reading import Raster, check_size, float_error, select_page, turned

if TYPE_CHECKING:
    import tifffile

_REMEDY = "pip install 'blemish[images]'"
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _YCBCR = 0, 1, 2, 6  # values of TIFF's tag Photometric
_JPEG = 7  # value of TIFF's tag Compression
_UNSPECIFIED, _STRAIGHT = 0, 2  # values of TIFF's tag ExtraSamples
_ORIENTATION = 274  # TIFF's tag


def read_png(content: bytes, path: Path, orientation: int) -> Raster:
    """A sound PNG of 16 bits per channel, in colour or with transparency; raises ImageError without the extra."""
    try:
        import imagecodecs
    except ImportError:
        raise ImageError(
            f"{path}: 16 bits with colour or transparency need imagecodecs; {_REMEDY}, or save it with 8 bits"
        ) from None
    values = turned(imagecodecs.png_decode(content), orientation)  # (H, W, 2 to 4), uint16
    if values.shape[2] == 3:
        return Raster(values)
    colour = values[..., :3] if values.shape[2] == 4 else values[..., 0]
    return Raster(colour, opacity=values[..., -1])


def read_tiff(content: bytes, path: Path, page: int | None, max_megapixels: int | None) -> Raster:
    """A TIFF that Pillow cannot read, or not in full depth.

    Raises:
        ImageError: it is damaged, too large, of a kind that is not understood, or without that page; or the extra is
            missing.
    """
    try:
        import imagecodecs  # noqa: F401  # tifffile would read some kinds without it
        import tifffile
    except ImportError:
        raise ImageError(
            f"{path}: damaged, or a kind of TIFF that needs tifffile and imagecodecs; {_REMEDY}, or save it anew"
        ) from None
    logging.getLogger("tifffile").disabled = True  # it writes of each fault in a file, and reads on
    try:
        with tifffile.TiffFile(io.BytesIO(content)) as file:
            found = _full_pages(file)
            return _raster(found[select_page(len(found), path, page)], content, path, max_megapixels)
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # nearly any class, by the kind of damage
        why = " ".join(str(error).split())
        raise ImageError(f"{path}: damaged image ({why}); save it again or remove it") from error


def tiff_orientation(content: bytes, page: int | None) -> int:
    """As the tag says, of a page that `read_tiff` reads."""
    import tifffile

    with tifffile.TiffFile(io.BytesIO(content)) as file:
        return _orientation(_full_pages(file)[page or 0])


def _full_pages(file: "tifffile.TiffFile") -> list["tifffile.TiffPage"]:
    """All but those that are another's at a lower resolution."""
    pages = list(file.pages)
    return [page for page in pages if not page.is_reduced] or pages


def _orientation(page: "tifffile.TiffPage") -> int:
    found = page.tags.valueof(_ORIENTATION, 1)
    return found if found in range(2, 9) else 1


def _raster(page: "tifffile.TiffPage", content: bytes, path: Path, max_megapixels: int | None) -> Raster:
    check_size(page.imagewidth, page.imagelength, path, max_megapixels)
    _check_kind(page, path)
    places = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    if damage := find_damage_in_parts(content, places, page.compression, page.jpegtables or b""):
        raise ImageError(f"{path}: damaged image ({damage}); save it again or remove it")
    values = page.asarray(maxworkers=1)  # pictures are decoded beside one another already
    if values.dtype.kind == "f":
        raise float_error(values, path)
    if values.dtype == np.bool_:
        values = values * np.uint8(255)
    if page.axes == "SYX":
        values = values.transpose(1, 2, 0)
    values = turned(values, _orientation(page))
    opacity = values[..., -1] if _STRAIGHT in page.extrasamples else None
    if values.ndim == 3:
        values = values[..., :3] if values.shape[2] > 2 else values[..., 0]
    return Raster(values, white_is_zero=page.photometric == _WHITE_IS_ZERO, opacity=opacity)


def _check_kind(page: "tifffile.TiffPage", path: Path) -> None:
    """Raise ImageError for a page of which it is not certain how it is shown."""
    channels = page.samplesperpixel - len(page.extrasamples)
    is_grey = page.photometric in {_WHITE_IS_ZERO, _BLACK_IS_ZERO}
    is_colour = page.photometric == _RGB or (page.photometric == _YCBCR and page.compression == _JPEG)
    if not (is_grey and channels == 1) and not (is_colour and channels == 3):
        name = getattr(page.photometric, "name", page.photometric)
        raise ImageError(
            f"{path}: a TIFF of {channels} channels and photometric interpretation {name} is not supported; save it as "
            "grey or RGB"
        )
    if len(page.extrasamples) > 1 or {*page.extrasamples} - {_UNSPECIFIED, _STRAIGHT}:
        raise ImageError(f"{path}: colour multiplied by its transparency, or further channels; save it without them")
    if page.axes not in {"YX", "YXS", "SYX"}:
        raise ImageError(f"{path}: a TIFF with the axes {page.axes} is not supported; save it as a plane")
    if page.bitspersample not in {1, *range(8, 65)}:
        raise ImageError(f"{path}: {page.bitspersample} bits per channel are not supported; save it with 8 or 16")
