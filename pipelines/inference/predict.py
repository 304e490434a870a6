"""An exported model and images -> scores, decisions, overlays. Needs onnxruntime and what reads images; never torch."""

import csv
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

from PIL import Image

from pipelines.errors import ArgumentError, DatasetError, ExportError, ImageError
from pipelines.files import atomic_file, write_json
from pipelines.inference.card import Card, Decision, Disposition
from pipelines.inference.engine import Engine
from pipelines.inference.marked import marked
from pipelines.numbers import counted, score, scores_apart
from pipelines.paths import PREDICTIONS_FILE
from pipelines.pictures import images
from pipelines.pictures.overlays import Map, Pixels, heat_overlay


@dataclass(frozen=True, slots=True)
class Result:
    """One image's outcome; either `error` is None or all else about the score is."""

    path: str
    score: float | None
    threshold: float | None
    decision: Decision | None
    disposition: Disposition | None  # what is done with the part
    overlay: str | None
    error: str | None

    @property
    def line(self) -> str:
        """For a terminal, of an image that was scored."""
        assert self.score is not None
        assert self.threshold is not None
        assert self.disposition is not None
        return decided(self.disposition, self.score, self.threshold, self.path)

    def to_json(self) -> str:
        """On one line."""
        return json.dumps(asdict(self), allow_nan=False, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class Found:
    """A file among the sources; either an image to score, or one that is left out, and why."""

    path: Path
    name: Path  # relative to its source
    error: str | None = None


# What lies beside pictures and is none; whatever else is no image by its suffix is told.
_COMPANIONS = frozenset(
    {".txt", ".csv", ".tsv", ".json", ".xml", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".log", ".md", ".html", ".pdf"}
    | {".doc", ".docx", ".xls", ".xlsx", ".zip", ".gz", ".tar", ".db", ".py", ".onnx", ".mp4", ".avi", ".mov", ".mkv"}
)


def find_images(sources: Iterable[Path], results: Path) -> list[Found]:
    """Every image among files and folders, folders and links to folders searched to the bottom.

    What may be a picture and cannot be read as one is in the list too, with its error: nothing is left out silently but
    what an earlier prediction wrote to the folder `results`.

    Raises:
        DatasetError: a source does not exist, or there is no image in any.
    """
    found: list[Found] = []
    sources = list(sources)
    for source in sources:
        if source.is_dir():
            found += _inside(source, source, results.resolve(), ())
        elif source.exists() or source.is_symlink():
            found.append(Found(source, Path(source.name)))
        else:
            raise DatasetError(f"{source}: no such file or folder")
    if not found:
        suffixes = " ".join(sorted(images.SUFFIXES))
        raise DatasetError(f"{', '.join(map(str, sources))}: no images in it (looked for {suffixes})")
    return found


def _inside(folder: Path, source: Path, results: Path, above: tuple[Path, ...]) -> Iterator[Found]:
    """What a folder holds, sorted, and the folders in it; a link back to a folder `above` would have no end."""
    name, real = folder.relative_to(source), folder.resolve()
    if real == results or real in above:
        return
    try:
        entries = [(path, path.is_dir()) for path in sorted(folder.iterdir())]
    except OSError as error:
        yield Found(folder, name, f"{folder}: cannot be searched ({error.strerror}); check its permissions")
        return
    for path, is_folder in entries:
        if images.is_litter(path.name):
            continue
        if is_folder:
            yield from _inside(path, source, results, (*above, real))
        elif path.suffix.lower() in images.SUFFIXES:
            yield Found(path, path.relative_to(source))
        elif path.suffix.lower() not in _COMPANIONS and not path.name.startswith("."):
            yield Found(path, path.relative_to(source), f"{path}: {_no_image(path)}")


def _no_image(path: Path) -> str:
    if not path.exists():
        return "a link to nothing; mend or remove it"
    kind = f"no image by its suffix {path.suffix!r}" if path.suffix else "no image by its name, which has no suffix"
    return f"{kind} (read are {' '.join(sorted(images.SUFFIXES))}); rename it, save it as one of them, or remove it"


def predict(
    detector: Engine,
    sources: Iterable[Path],
    destination: Path,
    on_result: Callable[[Result, int], None],
    *,
    threshold: float | None = None,
    sort_into: Path | None = None,
) -> list[Result]:
    """Score images, and write `predictions.csv`, `predictions.json` and an overlay per image into `destination`.

    An image that cannot be found, read, scored or drawn is reported in its row and does not stop the others.
    `on_result` is called with each image's outcome, as soon as it is there, and the number of all. `threshold` takes
    the place of the file's; `sort_into` gets copies of the images that were scored, below `good` and `defect`.

    Raises:
        DatasetError: no images.
        ArgumentError: something lies in `sort_into` already.
    """
    card = detector.card if threshold is None else detector.card.at(threshold)
    copies = None if sort_into is None else _Sorted(sort_into)
    found = find_images(sources, destination / "overlays")
    overlays = _Names(destination / "overlays")
    results = []
    for image in found:
        result = _predict_one(detector, card, image, overlays, copies)
        on_result(result, len(found))
        results.append(result)
    _write_csv(destination / PREDICTIONS_FILE, results)
    told = {"model": str(detector.path), **card.to_json(), "threshold_of_file": detector.card.threshold}
    write_json(destination / "predictions.json", {**told, "images": [asdict(result) for result in results]})
    return results


def decided(disposition: Disposition, score: float, threshold: float, path: str) -> str:
    """For a terminal: what was said of a picture, and by which figures."""
    shown, at = scores_apart(score, threshold)
    decision, then = (
        ("good", "") if disposition == "accept" else ("defect", "  (review)" if disposition == "review" else "")
    )
    return f"{decision:6}  score {shown}  threshold {at}  {path}{then}"


def summed_up(results: list[Result], card: Card, threshold: float | None) -> str:
    """How many of what, and at which threshold: the one that was given, or the card's."""
    scored = sum(result.error is None for result in results)
    defects = sum(result.decision == "defect" for result in results)
    used = score(card.threshold)
    if threshold is not None:
        used = "{} as given (the file's is {})".format(*scores_apart(threshold, card.threshold))
    elif card.choices:
        used = f"{used} (chosen by {card.choices[-1].by}, {card.choices[-1].at[:10]})"
    to_person = sum(result.disposition == "review" for result in results)
    left = f" ({to_person} for a person to review)" if to_person else ""
    return f"{counted(scored, 'image')} scored, {defects} with a defect{left} at threshold {used}"


class _Names:
    """Paths in a folder that do not collide: a.jpg and a.png as overlays, or one name in two sources, stay apart."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._taken: set[str] = set()

    def path(self, name: Path, suffix: str) -> Path:
        """For an image of that name; with a number where another has it, also where case is ignored."""
        base, number = f"{name.with_suffix('')}", 1
        candidate = f"{base}{suffix}"
        while candidate.casefold() in self._taken:
            number += 1
            candidate = f"{base}-{number}{suffix}"
        self._taken.add(candidate.casefold())
        return self.folder / candidate


class _Sorted:
    """Copies of images by what was decided of them.

    Raises:
        ArgumentError: something was sorted into the folder before: a threshold later, an image would be in both.
    """

    def __init__(self, folder: Path) -> None:
        self._names = {}
        for decision in get_args(Decision):
            place = folder / decision
            if place.exists() and not (place.is_dir() and next(place.iterdir(), None) is None):
                raise ArgumentError(f"{place}: not an empty folder; sort into one that is new, or empty this one")
            self._names[decision] = _Names(place)

    def copy(self, image: Found, decision: Decision) -> None:
        """Raises OSError."""
        with atomic_file(self._names[decision].path(image.name, image.path.suffix)) as temporary:
            shutil.copyfile(image.path, temporary)


def _predict_one(detector: Engine, card: Card, image: Found, overlays: _Names, copies: _Sorted | None) -> Result:
    path = image.path
    if image.error is not None:
        return _failed(path, image.error)
    try:
        rgb = detector.read(path)
        inputs = detector.fitted(rgb, str(path))
    except ImageError as error:
        return _failed(path, str(error))
    maps, scores = detector(inputs)
    value = float(scores[0])
    try:
        decision = card.decision(value)
    except ExportError as error:
        return _failed(path, f"{path}: {error}")
    overlay = overlays.path(Path(printable(str(image.name))), ".png")
    try:
        save_overlay(overlay, rgb, detector.restored(maps[0, 0], rgb), card, value)
    except OSError as error:  # a name that is too long for a suffix more, say
        return _failed(path, f"{path}: its overlay cannot be written ({error.strerror}); give the file a shorter name")
    if copies is not None:
        try:
            copies.copy(image, decision)
        except OSError as error:
            return _failed(path, f"{path}: cannot be copied ({error.strerror}); it is {decision}, and not sorted")
    return Result(
        path=printable(str(path)),
        score=value,
        threshold=card.threshold,
        decision=decision,
        disposition=card.disposition(value),
        overlay=overlay.relative_to(overlays.folder.parent).as_posix(),
        error=None,
    )


def _failed(path: Path, error: str) -> Result:
    return Result(printable(str(path)), None, None, None, None, None, printable(error))


def printable(name: str) -> str:
    r"""A name that is not UTF-8 with `\xfc` for the byte that is none: CSV and JSON cannot hold it as it is."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def save_overlay(path: Path, rgb: Pixels, anomaly_map: Map, card: Card, value: float) -> None:
    """Write what `overlaid` draws."""
    picture = overlaid(rgb, anomaly_map, card, value)
    with atomic_file(path) as temporary:
        picture.save(temporary, format="PNG")


def overlaid(rgb: Pixels, anomaly_map: Map, card: Card, value: float) -> Image.Image:
    """The heat map over the picture, both (H, W), and what was decided of it below."""
    overlay = heat_overlay(rgb, anomaly_map, card.pixel_threshold)
    shown, threshold = scores_apart(value, card.threshold)
    return marked(overlay, card.disposition(value), f"score {shown}, threshold {threshold}")


def _write_csv(path: Path, results: list[Result]) -> None:
    with atomic_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(Result.__dataclass_fields__))
        writer.writeheader()
        writer.writerows(asdict(result) for result in results)
