"""Test split -> metrics, decisions, figures. The only stage that opens the test split.

Thresholds come from held-out good parts, before a test image is looked at; the thresholds that the test images would
have chosen are reported beside them under the name oracle.
"""

import csv
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anomaly_models.base import AnomalyModel
from pipelines import figures, tracking
from pipelines.data import PreparedData
from pipelines.files import atomic_file, atomic_folder, write_json
from pipelines.metrics import (
    ExactPixelMetrics,
    HoldoutThreshold,
    ImageResult,
    PixelMetrics,
    StreamingPixelMetrics,
    as_json,
    confusion_at,
    image_metrics,
    recall_by_defect_type,
    threshold_at,
)
from pipelines.overlays import Map, resize_map
from pipelines.params import Params
from pipelines.paths import Project
from pipelines.prepare import Split
from pipelines.trained import Trained, load_trained


@dataclass(frozen=True, slots=True)
class TestImage:
    """One test image's outcome."""

    row: int  # in the prepared index
    path: str
    defect: str
    label: bool
    score: float
    anomaly_map: Map  # (size, size)


def evaluate(
    model_name: str, category: str, params: Params, project: Project, device: torch.device
) -> dict[str, float | None]:
    """Write `evaluations/<model>/<category>` and `metrics/<model>/<category>.json`; gives the latter's numbers.

    Raises:
        ParamsError: no such model or category in the params file.
        StageError: the cell is not trained, or its data has changed since.
    """
    params.check_category(category)
    trained = load_trained(project.model(model_name, category), device)
    data = PreparedData(project.prepared(category), trained.image_size, device)
    trained.check_data(data)
    threshold, pixel_threshold = thresholds(trained.model, data, params.evaluate.false_alarm_rate)
    results = list(score_test_images(trained.model, data))
    source = project.root / params.data.root / category
    pixels = _pixel_metrics(results, data, params, source) if data.index.has_masks else None
    folder = project.evaluation(model_name, category)
    evaluation = _summarise(trained, data, params, results, threshold, pixel_threshold, pixels)
    with atomic_folder(folder) as temporary:
        write_json(temporary / "evaluation.json", evaluation)
        _write_predictions(temporary / "predictions.csv", results, threshold.value)
        drawn = figures.draw(temporary, results, data, threshold.value, pixel_threshold, pixels)
        if pixels:
            _write_curve(temporary / "pro.csv", pixels)
    # The flat file is written last: it stands for a finished evaluation, and DVC compares it.
    flat = {**evaluation["metrics"], **{f"recall.{name}": d["recall"] for name, d in evaluation["defects"].items()}}
    write_json(project.metrics(model_name, category), {k: v for k, v in flat.items() if v is not None})
    _track(project, params, trained, evaluation, [folder / name for name in drawn])
    return dict(evaluation["metrics"])


def thresholds(model: AnomalyModel, data: PreparedData, rate: float) -> tuple[HoldoutThreshold, float]:
    """The thresholds on the score and on the map, from held-out good parts alone.

    The map's is set on each image's largest value: at the same rate a good part shows any marked pixel at all.
    """
    scores, peaks = [], []
    for _, (anomaly_map, score) in _predictions(model, data, "holdout"):
        scores.append(score)
        peaks.append(anomaly_map.amax())
    return threshold_at(torch.stack(scores), rate), threshold_at(torch.stack(peaks), rate).value


def score_test_images(model: AnomalyModel, data: PreparedData) -> Iterator[TestImage]:
    """Every test image by itself, as `predict` will see it."""
    for row, (anomaly_map, score) in _predictions(model, data, "test"):
        entry = data.index.images[row]
        yield TestImage(row, entry.path, entry.defect, entry.label, float(score), anomaly_map.numpy())


def _predictions(model: AnomalyModel, data: PreparedData, split: Split) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    """(row, (map (H, W), score ())) on the CPU, one image at a time: a batch may round differently."""
    for row in data.rows(split):
        with torch.no_grad():
            prediction = model(data.batch([row]).image)
        yield row, (prediction.anomaly_map[0, 0].cpu(), prediction.score[0].cpu())


def _pixel_metrics(results: list[TestImage], data: PreparedData, params: Params, source: Path) -> PixelMetrics:
    """Compare pixels at the prepared size (mask down, nearest) or at each image's own (map up, bilinear)."""
    exact = params.evaluate.pixel_metrics == "exact"
    metrics: PixelMetrics = ExactPixelMetrics() if exact else StreamingPixelMetrics()
    for result in results:
        if params.evaluate.resolution == "native":
            mask = data.native_mask(result.row, source)
            anomaly_map = resize_map(result.anomaly_map, width=mask.shape[1], height=mask.shape[0])
            metrics.update(torch.from_numpy(anomaly_map.copy())[None], torch.from_numpy(mask)[None])
        else:
            mask_tensor = data.batch([result.row]).mask[0].cpu()
            metrics.update(torch.from_numpy(result.anomaly_map)[None], mask_tensor > 0)
    return metrics


def _summarise(
    trained: Trained,
    data: PreparedData,
    params: Params,
    results: list[TestImage],
    threshold: HoldoutThreshold,
    pixel_threshold: float,
    pixels: PixelMetrics | None,
) -> dict[str, Any]:
    scores = torch.tensor([result.score for result in results], dtype=torch.float32)
    labels = torch.tensor([result.label for result in results])
    image = image_metrics(scores, labels)
    counts = confusion_at(scores, labels, threshold.value)
    model = trained.run["model"]
    metrics = {
        **_image_numbers(image),
        "recall": counts.true_positives / image.num_anomalous if image.num_anomalous else None,
        "false_alarms": counts.false_positives / image.num_normal if image.num_normal else None,
        **_pixel_numbers(pixels),
        "threshold": threshold.value,
        "train_seconds": trained.run["train_seconds"],
    }
    return {
        "model": model,
        "category": data.index.category,
        "run_id": trained.run["run_id"],
        "data_sha256": trained.data_sha256,
        "settings": trained.run["settings"]["models"][model],
        "protocol": {
            "image_size": trained.image_size,
            "resolution": params.evaluate.resolution,
            "mask_resize": "none" if params.evaluate.resolution == "native" else "nearest",
            "pixel_metrics": params.evaluate.pixel_metrics,
            "threshold_from": "held-out good parts",
            "seed": trained.run["settings"]["train"]["seed"],
        },
        "counts": data.index.counts,
        "metrics": as_json(metrics),
        "pixel_bounds": as_json(pixels.error_bounds()._asdict()) if isinstance(pixels, StreamingPixelMetrics) else None,
        "threshold": as_json({**asdict(threshold), "pixel_value": pixel_threshold, "oracle": image.oracle_threshold}),
        "confusion": asdict(counts),
        "defects": as_json(_defects(results, threshold.value)),
    }


def _image_numbers(image: ImageResult) -> dict[str, float]:
    return {"image_auroc": image.auroc, "image_ap": image.ap, "image_f1_max": image.f1_max}


def _pixel_numbers(pixels: PixelMetrics | None) -> dict[str, float]:
    if pixels is None:
        return {}
    result = pixels.compute()
    return {
        "pixel_auroc": result.auroc,
        "pixel_ap": result.ap,
        "pixel_f1_max": result.f1_max,
        "aupro_30": result.aupro_30,
        "aupro_05": result.aupro_05,
    }


def _defects(results: list[TestImage], threshold: float) -> dict[str, dict[str, float | int]]:
    """Per defect type: how many are found at the threshold, and the AUROC of this type alone against all good parts."""
    scores = torch.tensor([result.score for result in results], dtype=torch.float32)
    labels = torch.tensor([result.label for result in results])
    types = [result.defect for result in results]
    found = recall_by_defect_type(scores, labels, types, threshold)
    numbers: dict[str, dict[str, float | int]] = {}
    for name, recall in found.items():
        chosen = torch.tensor([not result.label or result.defect == name for result in results])
        auroc = image_metrics(scores[chosen], labels[chosen]).auroc
        numbers[name] = {"count": recall.num_images, "recall": recall.recall, "auroc": auroc}
    return numbers


def _write_predictions(path: Path, results: list[TestImage], threshold: float) -> None:
    with atomic_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "defect", "label", "score", "decision"])
        for result in results:
            decision = "defect" if result.score > threshold else "good"
            writer.writerow([result.path, result.defect, int(result.label), repr(result.score), decision])


def _write_curve(path: Path, pixels: PixelMetrics) -> None:
    """The PRO curve up to the integration limit, for `dvc plots`."""
    curves = pixels.curves()
    rates = np.linspace(0, 0.3, 101)
    overlaps = np.interp(rates, curves.false_positive_rate, curves.region_overlap)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["false_positive_rate", "region_overlap"])
        writer.writerows(zip(rates.tolist(), overlaps.tolist(), strict=True))


def _track(project: Project, params: Params, trained: Trained, evaluation: dict[str, Any], drawn: list[Path]) -> None:
    metrics = {name: value for name, value in evaluation["metrics"].items() if value is not None}
    recalls = {f"recall.{name}": d["recall"] for name, d in evaluation["defects"].items()}
    with tracking.cell_run(
        project.root, params.tracking.experiment, evaluation["model"], evaluation["category"], trained.run["run_id"]
    ) as run:
        run.metrics({**metrics, **recalls})
        run.tags({"protocol": evaluation["protocol"], "threshold": evaluation["threshold"]})
        for path in drawn:
            run.file(path, "figures")
        folder = project.evaluation(evaluation["model"], evaluation["category"])
        run.file(folder / "evaluation.json", "evaluation")
        run.file(folder / "predictions.csv", "evaluation")
