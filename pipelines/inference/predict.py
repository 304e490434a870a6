"""An exported model and images -> scores, decisions, overlays. Needs onnxruntime and what reads images; never torch."""

import csv
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from pipelines.errors import DatasetError, ImageError
from pipelines.files import atomic_file, write_json
from pipelines.inference.detector import Detector
from pipelines.pictures import images
from pipelines.pictures.overlays import Map, Pixels, heat_overlay, resize_map


@dataclass(frozen=True, slots=True)
class Result:
    """One image's outcome; either `error` is None or all else about the score is."""

    path: str
    score: float | None
    decision: str | None  # "good" or "defect"
    overlay: str | None
    error: str | None


def find_images(sources: Iterable[Path], results: Path) -> list[tuple[Path, Path]]:
    """(file, name relative to its source) of every image among files and folders, folders searched to the bottom.

    What an earlier prediction wrote to the folder `results` is left out.

    Raises:
        DatasetError: a source does not exist, or there is no image in any.
    """
    found: list[tuple[Path, Path]] = []
    sources = list(sources)
    for source in sources:
        if source.is_dir():
            inside = (path for path in source.rglob("*") if path.suffix.lower() in images.SUFFIXES and path.is_file())
            mine = (path for path in inside if results.resolve() not in path.resolve().parents)
            found += [(path, path.relative_to(source)) for path in sorted(mine)]
        elif source.exists():
            found.append((source, Path(source.name)))
        else:
            raise DatasetError(f"{source}: no such file or folder")
    if not found:
        suffixes = " ".join(sorted(images.SUFFIXES))
        raise DatasetError(f"{', '.join(map(str, sources))}: no images in it (looked for {suffixes})")
    return found


def predict(
    model: Path, sources: Iterable[Path], destination: Path, on_progress: Callable[[int, int], None]
) -> list[Result]:
    """Score images, and write `predictions.csv`, `predictions.json` and an overlay per image into `destination`.

    An image that cannot be read or scored is reported in its row and does not stop the others.

    Raises:
        ExportError: the model is not one of ours.
        DatasetError: no images.
    """
    detector = Detector(model)
    found = find_images(sources, destination / "overlays")
    names = _overlay_names([name for _, name in found])
    results = []
    for done, ((path, _), name) in enumerate(zip(found, names, strict=True), start=1):
        results.append(_predict_one(detector, path, destination / "overlays" / name, destination))
        on_progress(done, len(found))
    _write_csv(destination / "predictions.csv", results)
    write_json(
        destination / "predictions.json",
        {"model": str(model), **asdict(detector.card), "images": [asdict(result) for result in results]},
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


def _predict_one(detector: Detector, path: Path, overlay: Path, destination: Path) -> Result:
    try:
        rgb = images.load_rgb(path, detector.card.white_level)
    except ImageError as error:
        return Result(str(path), None, None, None, str(error))
    pixels = images.resize_rgb(rgb, detector.card.image_size)
    maps, scores = detector(images.to_input(pixels[None]))
    score = float(scores[0])
    if not math.isfinite(score):
        # No comparison with NaN is true: it would pass as good.
        return Result(str(path), None, None, None, f"{path}: the model's score is {score}; inspect this part by hand")
    save_overlay(overlay, rgb, maps[0, 0], detector.card.pixel_threshold)
    return Result(
        path=str(path),
        score=score,
        decision="defect" if score > detector.card.threshold else "good",
        overlay=overlay.relative_to(destination).as_posix(),
        error=None,
    )


def save_overlay(path: Path, rgb: Pixels, anomaly_map: Map, threshold: float) -> None:
    """Write the heat map over the picture, at the picture's own size."""
    height, width = rgb.shape[:2]
    overlay = heat_overlay(rgb, resize_map(anomaly_map, width, height), threshold)
    with atomic_file(path) as temporary:
        Image.fromarray(overlay).save(temporary, format="PNG")


def _write_csv(path: Path, results: list[Result]) -> None:
    with atomic_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(Result.__dataclass_fields__))
        writer.writeheader()
        writer.writerows(asdict(result) for result in results)
