"""An animated demo of one evaluated cell: part by part, what the model sees, what it decides, and what was true.

Made from the strips that `evaluate` left, so it needs neither the model nor the data.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from pipelines.errors import StageError
from pipelines.evaluation.outcomes import NOTHING_TO_TEST_ON, Evaluation, ScoredImage, read_tested
from pipelines.files import atomic_file, written_whole
from pipelines.paths import Cell
from pipelines.pictures.overlays import CONTOUR, FULL, coloured_map
from pipelines.pictures.panels import (
    FAINT,
    INK,
    MAPS_FILE,
    MARKS,
    PAPER,
    TITLES,
    KeptMaps,
    Layout,
    Verdict,
    read_panel,
    write_line,
)

_LAYOUT = Layout(192)
_MARGIN = 8  # px; the five cells and the margins make 1,000
_TOP, _AXIS_ROOM = 58, 62  # px above and below the cells
_EMPTY = (238, 238, 238)
_FRAME, _HOLD = 500, 1000  # milliseconds; the last frame of a part stays, to be read
_MOST = 12  # parts shown


@dataclass(frozen=True, slots=True)
class _Part:
    image: ScoredImage
    size: tuple[int, int]  # of the original
    verdict: Verdict


def write_gif(cell: Cell, path: Path) -> Path:
    """Write the animation of a cell to `path`.

    Raises:
        StageError: the cell is not evaluated, or by an earlier version.
    """
    folder = cell.evaluated
    tested = read_tested(folder) if cell.evaluation.exists() else None
    if tested == []:
        raise StageError(f"{cell.title}: {NOTHING_TO_TEST_ON}; nothing to animate")
    if tested is None or not (folder / MAPS_FILE).exists():
        raise StageError(f"{folder}: no pictures of test images; run {cell.verb('evaluate')} first")
    threshold = Evaluation.load(cell.evaluation, f"run {cell.verb('evaluate')} again").threshold.value
    images, sizes = tested, KeptMaps.load(folder).sizes.tolist()
    parts = [
        _Part(image, (width, height), Verdict.of(image.label, image.score, threshold))
        for image, (width, height) in zip(images, sizes, strict=True)
    ]
    frames = list(_frames(choose(parts), folder, threshold, cell.title))
    palette = _palette([frame for frame, milliseconds in frames if milliseconds == _HOLD])
    # One palette and no dithering: what does not change between frames then costs nothing.
    indexed = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame, _ in frames]
    with atomic_file(path) as temporary, written_whole(temporary) as file:
        indexed[0].save(
            file,
            format="GIF",
            save_all=True,
            append_images=indexed[1:],
            duration=[milliseconds for _, milliseconds in frames],
            loop=0,
        )
    return path


def choose(parts: Sequence[_Part]) -> list[_Part]:
    """A fair sample: of each defect type the typical hit, every kind of error, and good parts in between.

    The typical hit is the one with the median score of its type; of errors, the worst.
    """
    hits: dict[str, list[_Part]] = {}
    for part in parts:
        if part.verdict is Verdict.HIT:
            hits.setdefault(part.image.defect, []).append(part)
    typical = [sorted(of_type, key=lambda p: p.image.score)[len(of_type) // 2] for of_type in hits.values()]
    misses = sorted((p for p in parts if p.verdict is Verdict.MISS), key=lambda p: p.image.score)
    alarms = sorted((p for p in parts if p.verdict is Verdict.FALSE_ALARM), key=lambda p: -p.image.score)
    passed = sorted((p for p in parts if p.verdict is Verdict.PASS), key=lambda p: -p.image.score)
    defects = [*typical[: _MOST - 6], *misses[:2]]
    good = [*alarms[:2], *passed[len(passed) // 2 :][: 4 - len(alarms[:2])]]
    return _interleaved(defects, good)


def _interleaved(many: Sequence[_Part], few: Sequence[_Part]) -> list[_Part]:
    """Both in their order, the second spread evenly through the first."""
    places = [((i + 0.5) / len(of), part) for of in (many, few) for i, part in enumerate(of)]
    return [part for _, part in sorted(places, key=lambda place: place[0])]


def _frames(parts: Sequence[_Part], folder: Path, threshold: float, title: str) -> Iterator[tuple[Image.Image, int]]:
    """(frame, milliseconds): each part alone, with the model's answer, and with the truth."""
    for number, part in enumerate(parts):
        panels = [
            read_panel(folder, part.image.path, panel, part.size).resize(_LAYOUT.fitted(*part.size))
            for panel in range(5)
        ]
        for num_panels, milliseconds in ((1, _FRAME), (4, _FRAME), (5, _HOLD)):
            known = parts[:number] if num_panels < 5 else parts[: number + 1]
            frame = _canvas(title, part, num_panels, threshold)
            for panel in range(num_panels):
                left, top, _, _ = _LAYOUT.box(panel, *part.size)
                frame.paste(panels[panel], (_MARGIN + left, _TOP + top - _LAYOUT.cell(0)[1]))
            _draw_axis(ImageDraw.Draw(frame), parts, known, part if num_panels > 1 else None, threshold)
            yield frame, milliseconds


def _canvas(title: str, part: _Part, num_panels: int, threshold: float) -> Image.Image:
    """Everything but the panels and the axis; what is not known yet is grey."""
    width = _LAYOUT.size[0] + 2 * _MARGIN
    frame = Image.new("RGB", (width, _TOP + _LAYOUT.tile + _AXIS_ROOM), PAPER)
    draw = ImageDraw.Draw(frame)
    write_line(draw, _MARGIN, 8, title, width // 3, 17)
    if num_panels > 1:
        called = "defect" if part.image.score > threshold else "good"
        write_line(draw, _MARGIN + _LAYOUT.cell(2)[0], 8, f"decision: {called}", _LAYOUT.tile, 17)
    if num_panels == 5:
        left = _MARGIN + _LAYOUT.cell(3)[0]
        draw.rectangle((left, 12, left + 13, 25), fill=MARKS[part.verdict])
        write_line(draw, left + 20, 8, part.verdict, 2 * _LAYOUT.tile - 20, 17)
    truth = f"ground truth: {part.image.defect}" if num_panels == 5 else "ground truth"
    for panel, name in enumerate(("input", *TITLES[:-1], truth)):
        left = _MARGIN + _LAYOUT.cell(panel)[0]
        write_line(draw, left, _TOP - 20, name, _LAYOUT.tile, 13, INK if panel < num_panels else FAINT)
        if panel >= num_panels:
            draw.rectangle((left, _TOP, left + _LAYOUT.tile - 1, _TOP + _LAYOUT.tile - 1), fill=_EMPTY)
    return frame


def _draw_axis(
    draw: ImageDraw.ImageDraw, parts: Sequence[_Part], known: Sequence[_Part], now: _Part | None, threshold: float
) -> None:
    """The score's axis with the threshold, the parts whose truth is known, and the one that is being judged."""
    scores = [part.image.score for part in parts]
    low, high = min(*scores, threshold), max(*scores, threshold)
    left, right, y = _MARGIN + 60, _MARGIN + _LAYOUT.size[0] - 12, _TOP + _LAYOUT.tile + 24

    def place(score: float) -> int:
        return round(left + 12 + (right - left - 24) * (score - low) / (high - low or 1.0))

    write_line(draw, _MARGIN, y - 8, "score", 52, 13)
    draw.line((left, y, right, y), fill=FAINT)
    tick = place(threshold)
    draw.line((tick, y - 14, tick, y + 14), fill=INK, width=2)
    write_line(draw, min(tick + 5, right - 100), y + 10, f"threshold {threshold:.3g}", 200, 12)
    for part in known:
        x, colour = place(part.image.score), MARKS[part.verdict]
        # full for a defect, hollow for a good part
        draw.ellipse((x - 6, y - 6, x + 6, y + 6), fill=colour if part.image.label else PAPER, outline=colour, width=3)
    if now:
        x = place(now.image.score)
        draw.polygon(((x, y - 5), (x - 6, y - 15), (x + 6, y - 15)), fill=INK)


def _palette(frames: Sequence[Image.Image]) -> Image.Image:
    """256 colours: those that carry meaning exactly, the rest as the pictures need them."""
    ramp = coloured_map(np.linspace(0, FULL, 48, dtype=np.float32)[None], 1.0)[0]
    fixed = [*map(tuple, ramp.tolist()), CONTOUR, INK, FAINT, PAPER, _EMPTY, (0, 0, 0), *MARKS.values()]
    inputs = [frame.crop((0, _TOP, _MARGIN + _LAYOUT.tile, _TOP + _LAYOUT.tile)) for frame in frames]
    montage = Image.new("RGB", (inputs[0].width, inputs[0].height * len(inputs)))
    for number, image in enumerate(inputs):
        montage.paste(image, (0, number * image.height))
    free = montage.quantize(256 - len(fixed)).getpalette() or []
    palette = Image.new("P", (1, 1))
    palette.putpalette([*(channel for colour in fixed for channel in colour), *free][: 3 * 256])
    return palette
