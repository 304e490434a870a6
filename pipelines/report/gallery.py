"""The pictures of the HTML report, as data URIs small enough to embed.

The input and the true mask of a test image are there once, shared by all models; of each model there is a small grey
map, which the page colours, outlines and lays over the input itself.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.evaluation.outcomes import ScoredImage, read_tested
from pipelines.pictures.panels import MAPS_FILE, KeptMaps, read_panel

_INPUT, _TRUTH = 0, 4  # places in a strip
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


class Pictures(TypedDict):
    """By test image; None where there is nothing to show."""

    inputs: list[str | None]  # data URIs, as are truths and maps
    truths: list[str | None]  # none where nothing is marked
    sizes: list[tuple[int, int] | None]  # width and height of input and truth, px
    maps: dict[str, list[str | None]]  # by model; square


@dataclass(frozen=True, slots=True)
class _Cell:
    """One model's pictures of a category, by path; nothing where `evaluate` left none."""

    folder: Path
    levels: Mapping[str, NDArray[np.uint8]]
    sizes: Mapping[str, tuple[int, int]]  # width and height of the originals
    has_masks: bool


class CategoryGallery:
    """One category's test images, as all of its models saw them."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        """`folders`: the evaluation of each model."""
        self.tested = {model: {image.path: image for image in read_tested(folder)} for model, folder in folders.items()}
        self.images: dict[str, ScoredImage] = {}
        for tested in self.tested.values():
            self.images |= tested
        self._cells = {model: _read_cell(folder, list(self.tested[model])) for model, folder in folders.items()}

    @property
    def has_masks(self) -> bool:
        return any(cell.has_masks for cell in self._cells.values())

    def pictures(self, quality: Quality) -> Pictures:
        return self._pictures(list(self.images), quality)

    def sample_bytes(self, num_images: int, quality: Quality) -> float:
        """What all pictures take in the page, judged by some of them."""
        paths = list(self.images)
        places = np.linspace(0, len(paths) - 1, min(num_images, len(paths))).round().astype(int)
        pictures = self._pictures([paths[place] for place in places], quality)
        texts = chain(pictures["inputs"], pictures["truths"], *pictures["maps"].values())
        return sum(len(text) for text in texts if text) * len(paths) / max(1, len(places))

    def _pictures(self, paths: Sequence[str], quality: Quality) -> Pictures:
        shared = [self._shared(path, quality) for path in paths]
        return {
            "inputs": [image for image, _, _ in shared],
            "truths": [truth for _, truth, _ in shared],
            "sizes": [size for _, _, size in shared],
            "maps": {
                model: [_map(cell.levels[path], quality) if path in cell.levels else None for path in paths]
                for model, cell in self._cells.items()
            },
        }

    def _shared(self, path: str, quality: Quality) -> tuple[str | None, str | None, tuple[int, int] | None]:
        """(input, true mask, size), from any model that has them."""
        cell = next((cell for cell in self._cells.values() if path in cell.sizes), None)
        if cell is None:
            return None, None, None
        image = read_panel(cell.folder, path, _INPUT, cell.sizes[path])
        scale = min(1.0, quality.side / max(image.size))
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        resized = image.resize(size, Image.Resampling.LANCZOS)
        truth = _truth(read_panel(cell.folder, path, _TRUTH, cell.sizes[path]), size) if cell.has_masks else None
        return _data_uri(resized, "WEBP", quality=quality.webp, method=4), truth, size


def _read_cell(folder: Path, paths: Sequence[str]) -> _Cell:
    if not (folder / MAPS_FILE).exists():
        return _Cell(folder, {}, {}, has_masks=False)
    kept = KeptMaps.load(folder)
    sizes = [(width, height) for width, height in kept.sizes.tolist()]
    levels = dict(zip(paths, kept.levels, strict=True))
    return _Cell(folder, levels, dict(zip(paths, sizes, strict=True)), kept.has_masks)


def choose_quality(galleries: Sequence[CategoryGallery], num_cells: int) -> Quality:
    """The best quality at which all pictures together stay within what the page may take, judged by a sample."""
    budget = min(max(num_cells * _PER_CELL, _LEAST), _MOST)
    return next((quality for quality in LADDER if _estimate(galleries, quality) <= budget), LADDER[-1])


def _estimate(galleries: Sequence[CategoryGallery], quality: Quality) -> float:
    return sum(gallery.sample_bytes(max(1, _SAMPLE // len(galleries)), quality) for gallery in galleries)


def _truth(panel: Image.Image, size: tuple[int, int]) -> str | None:
    """Two colours, without loss."""
    mask = np.asarray(panel.resize(size, Image.Resampling.NEAREST).convert("L")) > 127
    return _data_uri(Image.fromarray(mask), "PNG", optimize=True) if mask.any() else None


def _map(levels: NDArray[np.uint8], quality: Quality) -> str:
    side = min(quality.map_side, len(levels))
    small = Image.fromarray(levels).resize((side, side), Image.Resampling.BOX)
    return _data_uri(small, "WEBP", quality=_MAP_QUALITY, method=4)


def _data_uri(image: Image.Image, kind: str, **options: int | bool) -> str:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content.getvalue()).decode()}"
