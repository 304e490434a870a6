"""The small pictures of the HTML report, as data URIs that it embeds; `large` writes what lies beside it.

The input and the true mask of a test image are there once, shared by all models, from the arrays that `prepare` wrote;
of each model there is a small grey map, which the page colours, outlines and lays over the input itself.
"""

import base64
import io
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.data.index import IndexedImage, PreparedIndex, frames_in, images_file, masks_file
from pipelines.errors import StageError
from pipelines.evaluation.outcomes import ScoredImage, read_tested
from pipelines.pictures.frames import OUTSIDE, Frame
from pipelines.pictures.overlays import heat_overlay, resize_map
from pipelines.pictures.panels import KeptMaps, Layout, over_threshold
from pipelines.records import read_array

_MAP_QUALITY = 90  # of WebP; less moves the contour visibly
_PER_CELL, _LEAST, _MOST = 600_000, 6_000_000, 48_000_000  # bytes that all pictures may take
_SAMPLE = 24  # images by which a size is judged


@dataclass(frozen=True, slots=True)
class Quality:
    """How large the longer side of inputs and of maps is, px, and how well the inputs are kept."""

    side: int
    webp: int

    @property
    def map_side(self) -> int:
        return self.side // 2


LADDER = (Quality(256, 80), Quality(224, 75), Quality(192, 70), Quality(160, 65), Quality(128, 60), Quality(96, 50))


@dataclass(frozen=True, slots=True)
class Pictures:
    """By test image."""

    inputs: list[str]  # data URIs, as are truths and maps
    truths: list[str | None]  # None where nothing is marked
    sizes: list[tuple[int, int]]  # width and height of input and truth, px
    maps: dict[str, list[str | None]]  # by model, None where it was not tested on the image; square

    @property
    def num_bytes(self) -> int:
        return sum(len(uri) for uri in chain(self.inputs, self.truths, *self.maps.values()) if uri)


class CategoryGallery:
    """One category's test images, as prepared, and as all of its models saw them.

    Raises:
        StageError: the category is not prepared, or without an image that a model was tested on.
    """

    def __init__(self, prepared: Path, folders: Mapping[str, Path]) -> None:
        """`prepared`: the category's arrays; `folders`: the evaluation of each model."""
        index = PreparedIndex.load(prepared)
        self.category = prepared.name
        self._index = index
        frame = _most_telling(frames_in(prepared))
        self._row = {image.path: row for row, image in enumerate(index.images)}
        self._entries = index.images
        self._shape = frame.shape
        shape, remedy = (len(index.images), *frame.size, 3), f"run `blemish prepare {prepared.name}`"
        self._pixels = read_array(images_file(prepared, frame), shape, np.uint8, remedy, mapped=True)
        self._masks = None
        if index.has_masks:
            shape_of_masks = (index.num_masks, *frame.size)
            self._masks = read_array(masks_file(prepared, frame.shape), shape_of_masks, np.bool_, remedy, mapped=True)
        self.has_masks = index.has_masks
        self.tested = {model: {image.path: image for image in read_tested(folder)} for model, folder in folders.items()}
        self.images: dict[str, ScoredImage] = {}
        for tested in self.tested.values():
            self.images |= tested
        if unknown := [path for path in self.images if path not in self._row]:
            raise StageError(f"{prepared}: no {unknown[0]}, on which a model was tested; run `dvc repro`")
        self._levels = {
            model: dict(zip(self.tested[model], KeptMaps.load(folder).levels, strict=True))
            for model, folder in folders.items()
            if self.tested[model]
        }

    def size(self, path: str) -> tuple[int, int]:
        """Width and height of the upright original, px."""
        entry = self._entries[self._row[path]]
        return entry.width, entry.height

    def pixels(self, path: str) -> NDArray[np.uint8]:
        """What `prepare` kept of a picture, (H, W, 3), in the frame's proportions."""
        row = self._row[path]
        return self._shape.restored(self._pixels[row], self._entries[row].original, OUTSIDE)

    def overlay(self, model: str, path: str, side: int) -> str:
        """A picture under the model's map, `side` px long, as a data URI."""
        size = Layout(side).fitted(*self.size(path))
        rgb = np.asarray(_resized(self.pixels(path), size, Image.Resampling.LANCZOS))
        shown = heat_overlay(rgb, resize_map(over_threshold(self._levels[model][path]), *size), 1.0)
        return _data_uri(Image.fromarray(shown), "WEBP", quality=_MAP_QUALITY, method=4)

    def original(self, path: str, source: Path) -> Path:
        """The file in the category's folder `source`; raises StageError where it is gone or another."""
        return self._index.original(self._row[path], source)

    def sample_bytes(self, num_images: int, quality: Quality) -> float:
        """What all pictures take in the page, judged by some of them."""
        paths = list(self.images)
        places = np.linspace(0, len(paths) - 1, min(num_images, len(paths))).round().astype(int)
        chosen = [paths[place] for place in places]
        return self.pictures(quality, chosen).num_bytes * len(paths) / max(1, len(chosen))

    def pictures(self, quality: Quality, of: Sequence[str] | None = None) -> Pictures:
        """Of all images, or of these paths."""
        paths = list(self.images) if of is None else of
        entries = [self._entries[self._row[path]] for path in paths]
        sizes = [Layout(quality.side).fitted(entry.width, entry.height) for entry in entries]
        # Pillow compresses without Python's lock.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return Pictures(
                inputs=[*pool.map(lambda path, size: _input(self.pixels(path), size, quality), paths, sizes)],
                truths=[self._truth(entry, size) for entry, size in zip(entries, sizes, strict=True)],
                sizes=sizes,
                maps={
                    model: [*pool.map(partial(_map, quality=quality), map(levels.get, paths))]
                    for model, levels in self._levels.items()
                },
            )

    def _truth(self, entry: IndexedImage, size: tuple[int, int]) -> str | None:
        """Two colours, without loss."""
        if self._masks is None or entry.mask_row is None:
            return None
        mask = self._shape.restored(self._masks[entry.mask_row], entry.original, 0)
        return _data_uri(_resized(mask, size, Image.Resampling.NEAREST), "PNG", optimize=True)


def _most_telling(frames: Sequence[Frame]) -> Frame:
    """The largest, of those that show all of a picture if there are any."""
    return max(frames, key=lambda frame: (frame.fit != "crop", frame.size.area, frame))


def choose_quality(galleries: Sequence[CategoryGallery], num_cells: int) -> Quality:
    """The best quality at which all pictures together stay within what the page may take, judged by a sample."""
    budget = min(max(num_cells * _PER_CELL, _LEAST), _MOST)
    return next((quality for quality in LADDER if _estimate(galleries, quality) <= budget), LADDER[-1])


def _estimate(galleries: Sequence[CategoryGallery], quality: Quality) -> float:
    return sum(gallery.sample_bytes(max(1, _SAMPLE // len(galleries)), quality) for gallery in galleries)


def _input(pixels: NDArray[np.uint8], size: tuple[int, int], quality: Quality) -> str:
    return _data_uri(_resized(pixels, size, Image.Resampling.LANCZOS), "WEBP", quality=quality.webp, method=4)


def _map(levels: NDArray[np.uint8] | None, quality: Quality) -> str | None:
    if levels is None:
        return None
    side = min(quality.map_side, len(levels))
    small = _resized(levels, (side, side), Image.Resampling.BOX)
    return _data_uri(small, "WEBP", quality=_MAP_QUALITY, method=4)


def _resized(array: NDArray[Any], size: tuple[int, int], how: Image.Resampling) -> Image.Image:
    return Image.fromarray(array).resize(size, how)


def _data_uri(image: Image.Image, kind: str, **options: int | bool) -> str:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content.getvalue()).decode()}"
