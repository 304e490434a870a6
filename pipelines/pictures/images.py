"""The one way from a file to pixels: `prepare`, `evaluate`, `export` and `predict` all read images here.

Pillow and numpy (and simplejpeg, to find damage), so that a machine on the line needs no torch to see what training
saw; what these cannot read, `deep` and `dicom` do, with packages that are imported when such a picture comes. Colour
profiles are ignored and CMYK is converted by the plain formula; transparent pixels show a white ground.
"""

import io
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, TiffImagePlugin, UnidentifiedImageError

from anomaly_models.common.sizes import Size
from pipelines.errors import ImageError
from pipelines.pictures import deep, dicom
from pipelines.pictures.damage import find_damage
from pipelines.pictures.reading import Raster, Reading, check_size, float_error, select_page

Filter = Literal["bilinear", "lanczos"]  # both antialiased
_RESAMPLING: dict[Filter, Image.Resampling] = {
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}


_DICOM_SUFFIXES = frozenset({".dcm", ".dicom"})
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}) | _DICOM_SUFFIXES

# Every picture's size is looked at here, before it is decoded; Pillow would warn of what the setting allows.
Image.MAX_IMAGE_PIXELS = None

# Named one by one: what is called .png but holds, say, PostScript is refused instead of run.
_IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
# The noise that lossy compression leaves around an edge would count as anomalous, since a mask is read as "not 0".
_MASK_FORMATS = ("PNG", "BMP", "TIFF")

_DEEP_GREY_MODES = frozenset({"I", "I;16", "I;16L", "I;16B", "I;16N"})
_DEEP_COLOUR_ENDING = ";16B"  # of PNG
_ORIENTATION = 274  # EXIF's tag
_SUBFILE_TYPE = 254  # TIFF's tag: its first bit says that a page is another's at a lower resolution
_BITS = 258  # TIFF's tag, of each channel
_COMPRESSION = 259  # TIFF's tag
_NOT_IN_PILLOW = {50001}  # values of it: WebP
_PHOTOMETRIC = 262  # TIFF's tag: 0 says that white is 0, as X-ray machines write it
# Pillow knows 16 bits with white as 0 in the other byte order only.
TiffImagePlugin.OPEN_INFO[b"MM", 0, (1,), 1, (16,), ()] = ("I;16B", "I;16B")
_BYTE_MODES = frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"})

_BAND = 512  # rows

# What systems leave beside pictures: thumbnails, bins, and a Mac's notes on each file, as ._<name> or below __MACOSX.
_LITTER = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "#recycle"})


def is_litter(name: str) -> bool:
    """Whether a file or folder of that name is none of the user's pictures, whatever its suffix."""
    return name.startswith("._") or name.lower() in _LITTER


@dataclass(frozen=True, slots=True)
class Picture:
    """A file, read."""

    rgb: NDArray[np.uint8]  # (H, W, 3), upright
    highest: int | None  # value in the file, of more than 8 bits only


def read(path: Path, reading: Reading) -> Picture:
    """Read an image, upright, by the rules of `reading`.

    Raises:
        ImageError: the file cannot be read, or the rules refuse it.
    """
    return read_bytes(_read(path), path, reading)


def read_bytes(content: bytes, path: Path, reading: Reading) -> Picture:
    """Read a file's content as `read` does; `path` is its name, whose suffix tells DICOM."""
    if _is_dicom(path):
        return Picture(dicom.read(content, path, reading), None)
    decoded = _decode(content, path, _IMAGE_FORMATS, reading.page, reading.max_megapixels)
    if isinstance(decoded, Raster):
        return Picture(decoded.shown(path, reading), decoded.highest)
    return Picture(_rgb(decoded), None)


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    """The pixels (H, W, 3), before white where they are transparent."""
    result = np.empty((image.height, image.width, 3), dtype=np.uint8)
    for rows, band in _bands(image):
        opaque = _before_white(band) if band.has_transparency_data else band
        result[rows] = np.asarray(opaque if opaque.mode == "RGB" else opaque.convert("RGB"))
    return result


def _before_white(image: Image.Image) -> Image.Image:
    colour = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", colour.size, "white"), colour)


def _bands(image: Image.Image) -> Iterator[tuple[slice, Image.Image]]:
    """Rows, and the image of them: what Pillow converts it copies, twice."""
    for top in range(0, image.height, _BAND):
        bottom = min(image.height, top + _BAND)
        yield slice(top, bottom), image.crop((0, top, image.width, bottom))


def load_rgb(path: Path, reading: Reading) -> NDArray[np.uint8]:
    """The pixels alone: (H, W, 3). Raises as `read`."""
    return read(path, reading).rgb


def resize_rgb(rgb: NDArray[np.uint8], size: Size, resize: Filter) -> NDArray[np.uint8]:
    """Resize (H, W, 3) to (height, width, 3) of that size; the aspect ratio is not kept."""
    if rgb.shape[:2] == size:
        return rgb
    return np.array(Image.fromarray(rgb).resize((size.width, size.height), _RESAMPLING[resize]))


def to_input(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Turn (B, H, W, 3) bytes into what every model and exported graph takes: (B, 3, H, W), exactly x / 255."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).astype(np.float32) / np.float32(255)


def load_mask(path: Path, max_megapixels: int | None = None) -> NDArray[np.bool_]:
    """Read a mask as (H, W), upright: True where the pixel is not black (and not transparent).

    Raises:
        ImageError: the file cannot be read, is too large, or is compressed with loss.
    """
    decoded = _decode(_read(path), path, _MASK_FORMATS, None, max_megapixels)
    if isinstance(decoded, Raster):
        return decoded.is_marked()
    marked = np.empty((decoded.height, decoded.width), dtype=bool)
    for rows, band in _bands(decoded):
        rgba = np.asarray(band.convert("RGBA"))
        marked[rows] = (rgba[..., :3] != 0).any(axis=2) & (rgba[..., 3] != 0)
    return marked


def resize_mask(mask: NDArray[np.bool_], size: Size) -> NDArray[np.bool_]:
    """Resize (H, W) to that size by the nearest pixel: areas are right on average, a small region may vanish."""
    grey = Image.fromarray(mask.astype(np.uint8))
    return np.asarray(grey.resize((size.width, size.height), Image.Resampling.NEAREST)) != 0


def orientation(path: Path, page: int | None) -> int:
    """How the pixels of a picture, which can be read, are stored, by EXIF: 1 upright, 2 to 4 of the same shape."""
    if _is_dicom(path):
        return 1
    content = path.read_bytes()
    if _is_tiff(content) and _is_beyond_pillow(content, page):
        return deep.tiff_orientation(content, page)
    with Image.open(io.BytesIO(content), formats=_IMAGE_FORMATS) as image:
        if page and isinstance(image, TiffImagePlugin.TiffImageFile):
            image.seek(_full_pages(image)[page])
        return _orientation(image)


def _orientation(image: Image.Image) -> int:
    found = image.getexif().get(_ORIENTATION, 1)
    return found if found in range(2, 9) else 1


def _decode(
    content: bytes, path: Path, formats: tuple[str, ...], page: int | None, max_megapixels: int | None
) -> Image.Image | Raster:
    """Turn a whole file into an upright image of 8 bits, or what is beyond, or raise ImageError."""
    if _is_tiff(content) and _is_beyond_pillow(content, page):
        return deep.read_tiff(content, path, page, max_megapixels)
    try:
        with Image.open(io.BytesIO(content), formats=formats) as image:
            _find_page(image, path, page)
            check_size(image.width, image.height, path, max_megapixels)
            if damage := find_damage(content, image):
                raise ImageError(f"{path}: damaged image ({damage}); save it again or remove it")
            if _is_deep_colour(image):
                return deep.read_png(content, path, _orientation(image))
            white_is_zero = isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(_PHOTOMETRIC) == 0
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        why = ": a mask that is compressed with loss marks more than was drawn" if formats == _MASK_FORMATS else ""
        raise ImageError(f"{path}: not a {_either(formats)} image{why}; save it as one or remove it") from error
    except Exception as error:  # Pillow's decoders raise nearly any class on damaged bytes
        raise ImageError(f"{path}: damaged image ({error}); save it again or remove it") from error
    if image.mode == "F":
        raise float_error(np.asarray(image), path)
    if image.mode in _DEEP_GREY_MODES:  # of which Pillow does not turn round what has 0 as white
        return Raster(np.asarray(image), white_is_zero)
    if image.mode not in _BYTE_MODES:
        raise ImageError(f"{path}: pixel format {image.mode!r} is not supported; save it with 8 or 16 bits per channel")
    return image


def _is_dicom(path: Path) -> bool:
    return path.suffix.lower() in _DICOM_SUFFIXES


def _is_tiff(content: bytes) -> bool:
    return content.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"))


def _is_beyond_pillow(content: bytes, page: int | None) -> bool:
    """Whether a TIFF, or that page of it, is damaged in its head, unknown to Pillow or of more bits than it keeps."""
    try:
        with Image.open(io.BytesIO(content), formats=("TIFF",)) as image:
            assert isinstance(image, TiffImagePlugin.TiffImageFile)
            image.seek(_full_pages(image)[page or 0])
            return _is_deep_colour(image) or image.tag_v2.get(_COMPRESSION) in _NOT_IN_PILLOW
    except IndexError:
        return False  # what is said of a page that is not there, is said elsewhere
    except Exception:  # Pillow's parser raises nearly any class
        return True


def _either(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _read(path: Path) -> bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for, without end
            raise ImageError(f"{path}: a folder, pipe or device, not a file; remove it")
        content = path.read_bytes()
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    if not content:
        raise ImageError(f"{path}: the file is empty; copy it again or remove it")
    return content


def _find_page(image: Image.Image, path: Path, page: int | None) -> None:
    """Go to the page of a TIFF that is to be read; other formats have one. Raises ImageError."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        found = _full_pages(image)
        image.seek(found[select_page(len(found), path, page)])
        return
    # The further frames of an MPO, a camera's JPEG, are previews and depth maps of the first.
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        raise ImageError(f"{path}: holds several frames; save each as an image of its own")
    select_page(1, path, page)


def _full_pages(image: TiffImagePlugin.TiffImageFile) -> list[int]:
    """The pages of a TIFF but for smaller versions of another, as scanners and microscopes add them."""
    full = []
    for page in range(image.n_frames):
        image.seek(page)
        if not image.tag_v2.get(_SUBFILE_TYPE, 0) & 1:
            full.append(page)
    return full or list(range(image.n_frames))


def _is_deep_colour(image: Image.Image) -> bool:
    """Pillow has no mode for it: it would drop the low bytes in silence, or take them for pixels."""
    if image.mode in {*_DEEP_GREY_MODES, "F"}:
        return False
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return max(image.tag_v2.get(_BITS, (8,))) > 8
    return _stored_format(image).endswith(_DEEP_COLOUR_ENDING)


def _stored_format(image: Image.Image) -> str:
    """How the file, not yet decoded, lays out a pixel: Pillow's raw mode, e.g. "RGB;16B"."""
    if not isinstance(image, ImageFile.ImageFile) or not image.tile:
        return image.mode
    args = image.tile[0].args
    return str(args[0]) if isinstance(args, tuple) else str(args)
