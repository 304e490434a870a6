"""Large pictures beside `report.html`, one for each test image, which the page loads when its viewer shows them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.errors import ImageError, StageError
from pipelines.pictures.images import load_rgb
from pipelines.pictures.panels import Layout
from pipelines.pictures.reading import Reading
from pipelines.report.gallery import CategoryGallery
from pipelines.threads import threads

FOLDER = "pictures"
SIDE = 1024  # px, of the longer side
_QUALITY, _METHOD = 75, 1  # of WebP: a quick method, since there may be thousands


@dataclass(frozen=True, slots=True)
class Originals:
    """The files that test images were prepared from, and the rules by which they were read."""

    root: Path  # holds a folder per category
    reading: Reading


@dataclass(frozen=True, slots=True)
class LargePictures:
    """By test image: addresses relative to report.html."""

    pictures: list[str | None]  # None where the small picture has as many pixels
    originals: list[str | None]  # None where the file is not there any more, or is another


def write_large(
    gallery: CategoryGallery, originals: Originals, folder: Path, place: Path, smaller: int
) -> LargePictures:
    """Write `folder`/pictures/<category>/ for a page that will lie in `place`; `smaller` is its small pictures' side.

    Where an original is gone, what `prepare` kept of it stands in.
    """

    def write(path: str) -> tuple[str | None, str | None]:
        file = _original(gallery, path, originals)
        address = _address(file, place) if file else None
        pixels = _larger(gallery, path, file, originals.reading, smaller)
        if pixels is None:
            return None, address
        name = f"{FOLDER}/{gallery.category}/{path}.webp"  # with its own ending, or a.png and a.jpg would be one
        _save(pixels, gallery.size(path), folder / name)
        return quote(name), address

    with threads() as pool:
        written = list(pool.map(write, gallery.images))
    return LargePictures([picture for picture, _ in written], [address for _, address in written])


def _original(gallery: CategoryGallery, path: str, originals: Originals) -> Path | None:
    try:
        return gallery.original(path, originals.root / gallery.category)
    except StageError:  # gone, or changed since
        return None


def _larger(
    gallery: CategoryGallery, path: str, file: Path | None, reading: Reading, smaller: int
) -> NDArray[np.uint8] | None:
    """The pixels (H, W, 3) where there are more than in a small picture."""
    if max(gallery.size(path)) <= smaller:
        return None
    if file:
        try:
            return load_rgb(file, reading)
        except ImageError:  # by rules that have changed since
            pass
    prepared = gallery.pixels(path)
    return prepared if max(prepared.shape[:2]) > smaller else None


def _save(pixels: NDArray[np.uint8], size: Sequence[int], file: Path) -> None:
    """In the proportions of the original, whose `size` is (width, height); not enlarged."""
    width, height = size
    fitted = Layout(min(SIDE, max(pixels.shape[:2]))).fitted(width, height)
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels).resize(fitted, Image.Resampling.LANCZOS)
    image.save(file, "WEBP", quality=_QUALITY, method=_METHOD)


def _address(file: Path, place: Path) -> str:
    try:
        return quote(Path(os.path.relpath(file, place)).as_posix())
    except ValueError:  # on another drive
        return file.resolve().as_uri()
