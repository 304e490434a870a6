"""The embedded data set `demo` and its textures: drawn from a seed, so the pipeline runs where there is no network.

The parts are in MVTec AD's layout, the textures in DTD's. An image is a pure function of the seed and of what it is
(category, split, defect, index), so drawing more or fewer of them never changes the others. `demo_scenes` and
`demo_textures` say what they show.
"""

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import numpy as np
from PIL import Image
from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt

from anomaly_models.common.settings import Settings
from pipelines.errors import hint
from pipelines.files import written_whole
from pipelines.sources.demo_scenes import DEFECTS, photograph
from pipelines.sources.demo_surfaces import GOOD
from pipelines.sources.demo_textures import TEXTURES, draw_texture
from pipelines.threads import in_order, threads

T = TypeVar("T")

CATEGORIES: tuple[str, ...] = tuple(DEFECTS)
TEXTURE_CLASSES: tuple[str, ...] = tuple(TEXTURES)

ImageSide = Annotated[int, Field(ge=64)]  # pixels; below, threads and lettering are smaller than a pixel

_JPEG_QUALITY = 92
_PIXELS_AT_ONCE = 4_000_000  # of the pictures that are being drawn: each takes 600 bytes
_PNG_LEVEL = 3  # half the time of the default for files that grain makes incompressible anyway


def _known(category: str) -> str:
    if category not in CATEGORIES:
        raise ValueError(f"unknown category{hint(category, CATEGORIES)}; known: {', '.join(CATEGORIES)}")
    return category


class DemoConfig(Settings):
    """Which categories of the embedded data set to draw, and how much of each."""

    categories: Annotated[list[Annotated[str, AfterValidator(_known)]], Field(min_length=1)]
    image_size: ImageSide  # the longer side, where a category's pictures are not square
    train: PositiveInt  # normal images to learn from
    test_good: PositiveInt  # normal images in the test split
    test_defect: PositiveInt  # test images of each defect type
    seed: NonNegativeInt


class DemoTexturesConfig(Settings):
    """How many textures to draw."""

    image_size: ImageSide
    per_class: PositiveInt
    seed: NonNegativeInt


def draw_demo(root: Path, config: DemoConfig, on_progress: Callable[[int, int], None]) -> None:
    """Draw the categories asked for under `root`, an empty folder, in MVTec AD's layout.

    `on_progress` is told (images drawn, images in all) after each image.
    """
    shots = [
        (category, split, kind, index)
        for category in config.categories
        for split, kind, count in _contents(category, config)
        for index in range(count)
    ]

    def draw(shot: tuple[str, str, str, int]) -> None:
        category, split, kind, index = shot
        _draw_part(root / category, split, kind, index, config)

    _each(draw, shots, config.image_size, on_progress)


def draw_textures(root: Path, config: DemoTexturesConfig, on_progress: Callable[[int, int], None]) -> None:
    """Draw every texture class under `root`, an empty folder, in DTD's layout; `on_progress` as for `draw_demo`."""
    pictures = [(name, index) for name in TEXTURE_CLASSES for index in range(config.per_class)]

    def draw(which: tuple[str, int]) -> None:
        name, index = which
        picture = draw_texture(name, _key(config.seed, "textures", name, index=index), config.image_size)
        _save(picture, root / "images" / name / f"{name}_{index:04d}.jpg")

    _each(draw, pictures, config.image_size, on_progress)


def _each(draw: Callable[[T], None], items: Sequence[T], side: int, on_progress: Callable[[int, int], None]) -> None:
    """On all cores: numpy and Pillow do their work without Python's lock."""
    with threads(max(1, _PIXELS_AT_ONCE // side**2)) as pool:
        for done, _ in enumerate(in_order(draw, items, pool), start=1):
            on_progress(done, len(items))


def _contents(category: str, config: DemoConfig) -> list[tuple[str, str, int]]:
    """Split, kind and number of a category's images."""
    defects = [("test", kind, config.test_defect) for kind in DEFECTS[category]]
    return [("train", GOOD, config.train), ("test", GOOD, config.test_good), *defects]


def _draw_part(folder: Path, split: str, kind: str, index: int, config: DemoConfig) -> None:
    key = _key(config.seed, folder.name, split, kind, index=index)
    photo = photograph(folder.name, kind, key, config.image_size)
    _save(photo.image, folder / split / kind / f"{index:03d}.png")
    if kind != GOOD:
        _save(photo.mask.astype(np.uint8) * 255, folder / "ground_truth" / kind / f"{index:03d}_mask.png")


def _key(seed: int, *names: str, index: int) -> tuple[int, ...]:
    """What an image is, as the integers that all its chance is drawn from."""
    return (seed, *(zlib.crc32(name.encode()) for name in names), index)


def _save(pixels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if path.suffix == ".jpg":
        with written_whole(path) as file:
            image.save(file, "JPEG", quality=_JPEG_QUALITY)
    else:
        image.save(path, compress_level=_PNG_LEVEL)
