"""An exported model and images -> scores, decisions, overlays. Needs onnxruntime, numpy and Pillow; never torch."""

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

from pipelines.errors import DatasetError, ExportError, ImageError
from pipelines.files import atomic_file, write_json
from pipelines.pictures import images
from pipelines.pictures.overlays import Map, Pixels, heat_overlay, resize_map

FORMAT = "1"  # of the metadata below


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What an exported file says of itself, in the ONNX metadata under `blemish.<field>`, each value as JSON."""

    model: str
    category: str
    image_size: int  # side of the square input, pixels
    white_level: int  # 16-bit value shown as white
    threshold: float  # a score above it is a defect
    pixel_threshold: float  # likewise for the map
    false_alarm_rate: float  # of good parts, that the thresholds were set for
    run_id: str
    data_sha256: str
    params: dict[str, object]

    def to_metadata(self) -> dict[str, str]:
        values = {f"blemish.{name}": json.dumps(value) for name, value in asdict(self).items()}
        return {"blemish.format": FORMAT, **values}


@dataclass(frozen=True, slots=True)
class Result:
    """One image's outcome; either `error` is None or all else about the score is."""

    path: str
    score: float | None
    decision: str | None  # "good" or "defect"
    overlay: str | None
    error: str | None


class Detector:
    """An exported model, ready to run.

    Raises:
        ExportError: the file is missing, no ONNX model, not exported by Blemish, or by a newer format.
    """

    def __init__(self, path: Path, providers: list[str] | None = None, threads: int | None = None) -> None:
        self._session = open_session(path, providers, threads)
        self.card = _read_card(path, self._session)

    @property
    def provider(self) -> str:
        """What runs the graph, in ONNX Runtime's words."""
        return str(self._session.get_providers()[0])

    def load(self, path: Path) -> np.ndarray:
        """A file -> (1, 3, H, W) float32 in [0, 1], by the path that `prepare` took."""
        pixels, _ = images.load(path, self.card.image_size, self.card.white_level)
        return images.to_input(pixels[None])

    def __call__(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(B, 3, H, W) in [0, 1] -> anomaly maps (B, 1, H, W) and scores (B,)."""
        anomaly_map, score = self._session.run(["anomaly_map", "score"], {"image": image})
        return anomaly_map, score


def open_session(
    path: Path, providers: list[str] | None = None, threads: int | None = None
) -> onnxruntime.InferenceSession:
    """Open any ONNX file, by default on the CPU with a thread per core.

    Raises:
        ExportError: the file is missing or onnxruntime cannot read it.
    """
    if not path.is_file():
        raise ExportError(f"{path}: no such file; give the model.onnx that `blemish export` wrote")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: the warnings are about graph clean-up
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers or ["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exceptions share no base class but Exception
        reason = " ".join(str(error).split())[:200]
        raise ExportError(f"{path}: not an ONNX model that onnxruntime can run ({reason})") from None


def _read_card(path: Path, session: onnxruntime.InferenceSession) -> ModelCard:
    metadata = session.get_modelmeta().custom_metadata_map
    if "blemish.format" not in metadata:
        raise ExportError(f"{path}: an ONNX model, but not one that `blemish export` wrote; it has no threshold")
    if metadata["blemish.format"] != FORMAT:
        raise ExportError(
            f"{path}: written in format {metadata['blemish.format']}, this version reads {FORMAT}; export it again"
        )
    fields = ModelCard.__dataclass_fields__
    return ModelCard(**{name: json.loads(metadata[f"blemish.{name}"]) for name in fields})


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
