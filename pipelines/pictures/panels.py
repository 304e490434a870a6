"""The five panels that the field knows, one strip per test image: what every picture of a result is made of.

Input with its true label, anomaly map, heat map over the input with the thresholded contour, predicted mask, ground
truth. Numpy and Pillow only, so that the animation, which shows the strips that `evaluate` left, and the report, which
colours its small maps, need neither torch nor a model.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Self

import numpy as np
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipelines.files import written_whole
from pipelines.pictures.overlays import (
    CONTOUR,
    FULL,
    Map,
    Mask,
    Pixels,
    coloured_map,
    heat_overlay,
    relative_to_threshold,
    resize_map,
)
from pipelines.records import read_arrays

TITLES = ("anomaly map", "overlay", "predicted mask", "ground truth")  # after the input, whose title is its label
MAPS_FILE = "maps.npz"
INK, FAINT, PAPER = (26, 26, 26), (96, 96, 96), (255, 255, 255)
_MAP_SIDE = 128  # px, of the maps kept for the report: as fine as its pictures
_LEVELS = 255  # of a kept map, for 0 to FULL times the threshold
_GAP = 6  # px between panels
_GUTTER = 12  # px between strips
_TITLE, _LABELS, _SCALE = 24, 18, 20  # px, the lines above and below the panels
_NO_MASK = (225, 225, 225)


class Verdict(StrEnum):
    """A decision against the truth."""

    HIT = "defect found"
    MISS = "defect missed"
    FALSE_ALARM = "false alarm"
    PASS = "good part passed"  # noqa: S105

    @classmethod
    def of(cls, label: bool, score: float, threshold: float) -> Self:
        called = score > threshold
        return cls((cls.HIT if called else cls.MISS) if label else (cls.FALSE_ALARM if called else cls.PASS))


# Okabe and Ito's colours stay apart for colour-blind readers; the words beside them say the same.
MARKS = {
    Verdict.HIT: (0, 114, 178),
    Verdict.MISS: (213, 94, 0),
    Verdict.FALSE_ALARM: (230, 159, 0),
    Verdict.PASS: (150, 150, 150),
}


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Of one model on one category: a score, or a pixel of the map, above it is called anomalous."""

    score: float
    pixel: float


@dataclass(frozen=True, slots=True)
class Picture:
    """A test image with what is known and what was found."""

    path: str  # relative to the category's folder, posix
    defect: str
    label: bool
    score: float
    rgb: Pixels  # (H, W, 3), resized by `prepare`
    anomaly_map: Map  # (H, W)
    truth: Mask | None  # (H, W); None where the category has no masks
    width: int  # of the original
    height: int

    def verdict(self, thresholds: Thresholds) -> Verdict:
        return Verdict.of(self.label, self.score, thresholds.score)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things lie in a strip: five square cells, each panel in its own proportions in the middle of its cell."""

    tile: int  # side of a cell, px

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the strip."""
        return 5 * self.tile + 4 * _GAP, _TITLE + _LABELS + self.tile + _SCALE

    def cell(self, panel: int) -> tuple[int, int]:
        """(left, top) of a panel's cell."""
        return panel * (self.tile + _GAP), _TITLE + _LABELS

    def box(self, panel: int, width: int, height: int) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of a panel, for an original of `width` x `height`."""
        wide, high = self.fitted(width, height)
        left, top = self.cell(panel)
        left, top = left + (self.tile - wide) // 2, top + (self.tile - high) // 2
        return left, top, left + wide, top + high

    def fitted(self, width: int, height: int) -> tuple[int, int]:
        """An original's proportions, as large as the cell takes."""
        longer = max(width, height)
        return max(1, round(self.tile * width / longer)), max(1, round(self.tile * height / longer))


STRIP = Layout(256)  # of the files


def panels(picture: Picture, thresholds: Thresholds, size: tuple[int, int]) -> list[Image.Image]:
    """The five panels without any text, each of `size` (width, height)."""
    rgb = Image.fromarray(picture.rgb).resize(size, Image.Resampling.LANCZOS)
    anomaly_map = resize_map(picture.anomaly_map, *size)
    drawn = [
        np.asarray(rgb),
        coloured_map(anomaly_map, thresholds.pixel),
        heat_overlay(np.asarray(rgb), anomaly_map, thresholds.pixel),
        _white(anomaly_map > thresholds.pixel),
    ]
    truth = Image.new("RGB", size, _NO_MASK)
    if picture.truth is not None:
        mask = Image.fromarray(picture.truth).resize(size, Image.Resampling.NEAREST)
        truth = Image.fromarray(_white(np.asarray(mask)))
    return [*map(Image.fromarray, drawn), truth]


def strip(picture: Picture, thresholds: Thresholds, layout: Layout = STRIP) -> Image.Image:
    """The five panels in a row, with the truth, the score, the decision and the colour scale in words and ticks."""
    image = Image.new("RGB", layout.size, PAPER)
    draw = ImageDraw.Draw(image)
    size = layout.fitted(picture.width, picture.height)
    for number, panel in enumerate(panels(picture, thresholds, size)):
        image.paste(panel, layout.box(number, picture.width, picture.height)[:2])
    _write_title(draw, picture, thresholds, layout)
    for number, title in enumerate((f"input: {picture.defect}", *TITLES)):
        write_line(draw, layout.cell(number)[0], _TITLE, title, layout.tile, 13)
    if picture.truth is None:
        left, top = layout.cell(4)
        write_line(draw, left + 8, top + layout.tile // 2 - 8, "no mask", layout.tile - 16, 13, FAINT)
    _draw_scale(image, draw, layout)
    return image


def _write_title(draw: ImageDraw.ImageDraw, picture: Picture, thresholds: Thresholds, layout: Layout) -> None:
    verdict = picture.verdict(thresholds)
    line = f"{verdict}: score {picture.score:.4g}, threshold {thresholds.score:.4g}"
    draw.rectangle((0, 5, 11, 16), fill=MARKS[verdict])
    start = 18 + write_line(draw, 18, 2, line, layout.size[0] - 18, 15) + 16
    write_line(draw, start, 4, picture.path, layout.size[0] - start, 13, FAINT)


def _draw_scale(image: Image.Image, draw: ImageDraw.ImageDraw, layout: Layout) -> None:
    """The map's colours from 0 to twice the threshold, and what the contour is."""
    (left, top), (overlay, _) = layout.cell(1), layout.cell(2)
    top += layout.tile + 5
    bar = coloured_map(np.linspace(0, FULL, layout.tile, dtype=np.float32)[None].repeat(6, axis=0), 1.0)
    image.paste(Image.fromarray(bar), (left, top))
    middle = left + layout.tile // 2
    draw.line((middle, top - 3, middle, top + 8), fill=INK, width=1)
    draw.line((overlay, top + 3, overlay + 12, top + 3), fill=INK, width=4)
    draw.line((overlay + 1, top + 3, overlay + 11, top + 3), fill=CONTOUR, width=2)
    write_line(
        draw, overlay + 18, top - 5, "map above its threshold, the mark on the scale", 2 * layout.tile, 11, FAINT
    )


def write_line(
    draw: ImageDraw.ImageDraw,
    left: int,
    top: int,
    text: str,
    room: int,
    size: int,
    colour: tuple[int, int, int] = INK,
) -> int:
    """Write one line, shortened to `room` pixels; gives its width."""
    font, text = _font(size), " ".join(text.split())  # a file's name may hold a line's end
    if draw.textlength(text, font) > room:
        while text and draw.textlength(f"{text}…", font) > room:
            text = text[:-1]
        text = f"{text}…"
    draw.text((left, top), text, colour, font)
    return round(draw.textlength(text, font))


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu, which knows most of the world's alphabets and comes with matplotlib; Pillow's own font is Latin only."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def sheet(groups: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """Strips of one layout, two beside each other, each group under its heading."""
    width, height = groups[0][1][0].size
    pitch, line = (width + 2 * _GUTTER, height + _GUTTER), 34
    rows = [(len(images) + 1) // 2 for _, images in groups]
    page = Image.new("RGB", (2 * pitch[0], len(groups) * line + sum(rows) * pitch[1]), PAPER)
    draw = ImageDraw.Draw(page)
    top = 0
    for (title, images), num_rows in zip(groups, rows, strict=True):
        write_line(draw, _GUTTER, top + 8, title, 2 * width, 18)
        top += line
        for number, image in enumerate(images):
            page.paste(image, (_GUTTER + number % 2 * pitch[0], top + number // 2 * pitch[1]))
        top += num_rows * pitch[1]
    return page


def strip_file(folder: Path, path: str) -> Path:
    """Where an evaluation keeps the strip of the test image `path`."""
    return folder / "panels" / f"{path}.jpg"


def save_strip(folder: Path, picture: Picture, thresholds: Thresholds) -> None:
    path = strip_file(folder, picture.path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as file:
        # Full colour resolution: the contour is one pixel wide.
        strip(picture, thresholds).save(file, format="JPEG", quality=85, subsampling=0)


@dataclass(frozen=True, slots=True)
class KeptMaps:
    """The maps of all test images of a cell, small and square, in levels of the colour scale; row i is test image i."""

    levels: NDArray[np.uint8]  # (N, s, s): 0 to _LEVELS for 0 to FULL times the threshold
    sizes: NDArray[np.int32]  # (N, 2): width and height of the original

    @classmethod
    def of(cls, pictures: Iterable[tuple[Map, tuple[int, int]]], threshold: float) -> Self:
        """Of (map, (width, height) of the original) each; `threshold` is the map's."""
        levels, sizes, pictures = [], [], list(pictures)
        side = min(_MAP_SIDE, max(max(anomaly_map.shape) for anomaly_map, _ in pictures))
        for anomaly_map, size in pictures:
            # BOX averages, so that a small map is no sharper and no brighter than the large one
            small = Image.fromarray(relative_to_threshold(anomaly_map, threshold))
            ratio = np.asarray(small.resize((side, side), Image.Resampling.BOX))
            levels.append((np.clip(ratio / FULL, 0, 1) * _LEVELS).round().astype(np.uint8))
            sizes.append(size)
        return cls(np.stack(levels), np.array(sizes, dtype=np.int32))

    def save(self, folder: Path) -> None:
        np.savez_compressed(folder / MAPS_FILE, levels=self.levels, sizes=self.sizes)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """What `save` wrote; raises StageError where it is damaged."""
        return cls(*read_arrays(folder / MAPS_FILE, ("levels", "sizes"), "evaluate again"))


def over_threshold(levels: NDArray[np.uint8]) -> Map:
    """A kept map over its threshold again, (s, s): at most FULL, where it was cut."""
    return levels.astype(np.float32) * np.float32(FULL / _LEVELS)


def read_panel(folder: Path, path: str, panel: int, size: tuple[int, int]) -> Image.Image:
    """One panel of a kept strip, for an original of `size` (width, height)."""
    with Image.open(strip_file(folder, path)) as image:
        return image.crop(STRIP.box(panel, *size))


def _white(mask: Mask) -> Pixels:
    return rearrange([mask * np.uint8(255)] * 3, "c h w -> h w c")
