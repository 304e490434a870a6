"""An exported model and images -> scores, decisions, overlays. Needs onnxruntime and what reads images; never torch."""

import csv
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from pipelines.errors import DatasetError, ImageError
from pipelines.files import atomic_file, write_json
from pipelines.inference.detector import Detector
from pipelines.paths import PREDICTIONS_FILE
from pipelines.pictures import images
from pipelines.pictures.overlays import Map, Pixels, heat_overlay


@dataclass(frozen=True, slots=True)
class Result:
    """One image's outcome; either `error` is None or all else about the score is."""

    path: str
    score: float | None
    decision: str | None  # "good" or "defect"
    overlay: str | None
    error: str | None


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
    model: Path, sources: Iterable[Path], destination: Path, on_progress: Callable[[int, int], None]
) -> list[Result]:
    """Score images, and write `predictions.csv`, `predictions.json` and an overlay per image into `destination`.

    An image that cannot be found, read, scored or drawn is reported in its row and does not stop the others.

    Raises:
        ExportError: the model is not one of ours.
        DatasetError: no images.
    """
    detector = Detector(model)
    found = find_images(sources, destination / "overlays")
    names = _overlay_names([Path(_printable(str(image.name))) for image in found])
    results = []
    for done, (image, name) in enumerate(zip(found, names, strict=True), start=1):
        results.append(_predict_one(detector, image, destination / "overlays" / name, destination))
        on_progress(done, len(found))
    _write_csv(destination / PREDICTIONS_FILE, results)
    write_json(
        destination / "predictions.json",
        {"model": str(model), **detector.card.to_json(), "images": [asdict(result) for result in results]},
    )
    return results


def _overlay_names(names: list[Path]) -> Iterator[Path]:
    """PNG names that do not collide: a.jpg and a.png in one folder, or one name in two sources, stay apart."""
    taken: set[str] = set()
    for name in names:
        base, number = f"{name.with_suffix('')}", 1
        candidate = base
        while candidate.casefold() in taken:
            number += 1
            candidate = f"{base}-{number}"
        taken.add(candidate.casefold())
        yield Path(f"{candidate}.png")


def _predict_one(detector: Detector, image: Found, overlay: Path, destination: Path) -> Result:
    path = image.path
    if image.error is not None:
        return _failed(path, image.error)
    try:
        rgb = detector.read(path)
        inputs = detector.fitted(rgb, str(path))
    except ImageError as error:
        return _failed(path, str(error))
    maps, scores = detector(inputs)
    score = float(scores[0])
    if not math.isfinite(score):
        # No comparison with NaN is true: it would pass as good.
        return _failed(path, f"{path}: the model's score is {score}; inspect this part by hand")
    try:
        save_overlay(overlay, rgb, detector.restored(maps[0, 0], rgb), detector.card.pixel_threshold)
    except OSError as error:  # a name that is too long for a suffix more, say
        return _failed(path, f"{path}: its overlay cannot be written ({error.strerror}); give the file a shorter name")
    return Result(
        path=_printable(str(path)),
        score=score,
        decision="defect" if score > detector.card.threshold else "good",
        overlay=overlay.relative_to(destination).as_posix(),
        error=None,
    )


def _failed(path: Path, error: str) -> Result:
    return Result(_printable(str(path)), None, None, None, _printable(error))


def _printable(name: str) -> str:
    r"""A name that is not UTF-8 with `\xfc` for the byte that is none: CSV and JSON cannot hold it as it is."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def save_overlay(path: Path, rgb: Pixels, anomaly_map: Map, threshold: float) -> None:
    """Write the heat map over the picture; both are (H, W)."""
    overlay = heat_overlay(rgb, anomaly_map, threshold)
    with atomic_file(path) as temporary:
        Image.fromarray(overlay).save(temporary, format="PNG")


def _write_csv(path: Path, results: list[Result]) -> None:
    with atomic_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(Result.__dataclass_fields__))
        writer.writeheader()
        writer.writerows(asdict(result) for result in results)
