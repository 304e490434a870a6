"""Test split -> metrics, decisions, figures. The only stage that opens the test split.

Thresholds come from held-out good parts, before a test image is looked at; the thresholds that the test images would
have chosen are reported beside them under the name oracle.
"""

import csv
import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from anomaly_models.base import AnomalyModel
from pipelines.data.batches import PreparedData
from pipelines.data.index import Split
from pipelines.evaluation import figures
from pipelines.evaluation.certainty import measure, share_interval
from pipelines.evaluation.description import description
from pipelines.evaluation.metrics import (
    ExactPixelMetrics,
    ImageResult,
    PixelCurves,
    PixelMetrics,
    StreamingPixelMetrics,
    as_json,
    confusion_at,
    image_metrics,
    recall_by_defect_type,
)
from pipelines.evaluation.outcomes import (
    EVALUATION_FOLDER,
    Confusion,
    Counts,
    DefectOutcome,
    Evaluation,
    HeldOutImage,
    PixelCounts,
    Protocol,
    TestImage,
    Threshold,
    bin_edges,
    count_pixels,
    read_outcome,
    read_tested,
    scored,
    write_predictions,
)
from pipelines.evaluation.thresholds import HoldoutThreshold, threshold_at
from pipelines.files import atomic_folder, write_json
from pipelines.paths import Cell, Project
from pipelines.pictures.overlays import Map, resize_map
from pipelines.settings.params import Params
from pipelines.tracking.runs import cell_run
from pipelines.training.trained import Trained, load_trained


def evaluate(
    model_name: str, category: str, params: Params, project: Project, device: torch.device
) -> dict[str, float | int | None]:
    """Write `evaluations/<model>/<category>` and `metrics/<model>/<category>.json`; gives the latter's numbers.

    Raises:
        ParamsError: no such model or category in the params file.
        StageError: the cell is not trained, or its data has changed since.
    """
    params.check_category(category)
    cell = project.cell(model_name, category, params.train.seed)
    trained = load_trained(cell, device)
    data = PreparedData(project.prepared(category), trained.image_size, device)
    trained.check_data(data)
    held_out = score_held_out_images(trained.model, data)
    threshold, pixel_threshold = thresholds(held_out, params.evaluate.false_alarm_rate)
    results = score_test_images(trained.model, data)
    source = project.root / params.data.root / category
    pixels = _pixel_metrics(results, data, params, source) if data.index.has_masks else None
    curves = _curves(pixels)
    counts = _count_pixels(results, data, params, source, curves) if curves else None
    evaluation = _summarise(trained, data, params, results, threshold, pixel_threshold, pixels)
    with atomic_folder(cell.evaluated) as temporary:
        write_predictions(temporary, scored(results, held_out, threshold.value))
        if counts:
            counts.save(temporary / cell.pixels.name)
        measured = measure(read_outcome(temporary, evaluation, model_name), params.evaluate.bootstrap)
        evaluation = evaluation.model_copy(update={"intervals": measured.intervals})
        evaluation.save(temporary / cell.evaluation.name)
        drawn = figures.draw(temporary, results, data, threshold.value, pixel_threshold, pixels)
        if curves:
            _write_curve(temporary / "pro.csv", curves)
    # The flat file is written last: it stands for a finished evaluation, and DVC compares it.
    write_json(cell.metrics, evaluation.known | evaluation.recalls)
    _track(cell, params, evaluation, drawn)
    return evaluation.metrics


def score_held_out_images(model: AnomalyModel, data: PreparedData) -> list[HeldOutImage]:
    """The good parts that training has not seen, each by itself."""
    return [
        HeldOutImage(data.index.images[row].path, score, float(anomaly_map.max()), milliseconds)
        for row, anomaly_map, score, milliseconds in _predictions(model, data, "holdout")
    ]


def thresholds(held_out: Sequence[HeldOutImage], rate: float) -> tuple[HoldoutThreshold, float]:
    """The thresholds on the score and on the map, from held-out good parts alone.

    The map's is set on each image's largest value: at the same rate a good part shows any marked pixel at all.
    """
    scores, peaks = torch.tensor([image.score for image in held_out]), torch.tensor([image.peak for image in held_out])
    return threshold_at(scores, rate), threshold_at(peaks, rate).value


def score_test_images(model: AnomalyModel, data: PreparedData) -> list[TestImage]:
    """Every test image by itself, as `predict` will see it."""
    images = data.index.images
    return [
        TestImage(row, images[row].path, images[row].defect, images[row].label, score, anomaly_map, milliseconds)
        for row, anomaly_map, score, milliseconds in _predictions(model, data, "test")
    ]


def _predictions(model: AnomalyModel, data: PreparedData, split: Split) -> Iterator[tuple[int, Map, float, float]]:
    """(row, map (H, W), score, milliseconds), one image at a time: a batch may round differently."""
    for row in data.rows(split):
        image = data.batch([row]).image
        started = time.perf_counter()
        with torch.no_grad():
            prediction = model(image)
        # Copying to the CPU waits for the device, so that the time is that of the whole answer.
        anomaly_map, score = prediction.anomaly_map[0, 0].cpu().numpy(), float(prediction.score[0])
        yield row, anomaly_map, score, 1000 * (time.perf_counter() - started)


def _maps_and_masks(
    results: Sequence[TestImage], data: PreparedData, params: Params, source: Path
) -> Iterator[tuple[Map, NDArray[np.bool_]]]:
    """At the prepared size (mask down, nearest) or at each image's own (map up, bilinear)."""
    for result in results:
        if params.evaluate.resolution == "native":
            mask = data.native_mask(result.row, source)
            yield resize_map(result.anomaly_map, width=mask.shape[1], height=mask.shape[0]), mask
        else:
            yield result.anomaly_map, data.batch([result.row]).mask[0, 0].cpu().numpy() > 0


def _pixel_metrics(results: Sequence[TestImage], data: PreparedData, params: Params, source: Path) -> PixelMetrics:
    exact = params.evaluate.pixel_metrics == "exact"
    metrics: PixelMetrics = ExactPixelMetrics() if exact else StreamingPixelMetrics()
    for anomaly_map, mask in _maps_and_masks(results, data, params, source):
        metrics.update(torch.from_numpy(anomaly_map.copy())[None], torch.from_numpy(mask)[None])
    return metrics


def _curves(pixels: PixelMetrics | None) -> PixelCurves | None:
    """None without masks, and where one class of pixel is absent."""
    curves = pixels.curves() if pixels else None
    return curves if curves and len(curves.threshold) else None


def _count_pixels(
    results: Sequence[TestImage], data: PreparedData, params: Params, source: Path, curves: PixelCurves
) -> PixelCounts:
    """Each image's pixels in bins along the curves, from which test sets are drawn."""
    return count_pixels(_maps_and_masks(results, data, params, source), bin_edges(curves.threshold))


def _summarise(
    trained: Trained,
    data: PreparedData,
    params: Params,
    results: list[TestImage],
    threshold: HoldoutThreshold,
    pixel_threshold: float,
    pixels: PixelMetrics | None,
) -> Evaluation:
    """All but the intervals, which are drawn from what is written."""
    scores = torch.tensor([result.score for result in results], dtype=torch.float32)
    labels = torch.tensor([result.label for result in results])
    image = image_metrics(scores, labels)
    counts = confusion_at(scores, labels, threshold.value)
    run = trained.run
    metrics = {
        **_image_numbers(image),
        "recall": counts.true_positives / image.num_anomalous if image.num_anomalous else None,
        "false_alarms": counts.false_positives / image.num_normal if image.num_normal else None,
        **_pixel_numbers(pixels),
        "threshold": threshold.value,
        "train_seconds": run.train_seconds,
        "train_steps": run.train_steps,
    }
    return Evaluation(
        model=run.model,
        category=data.index.category,
        run_id=run.run_id,
        data_set=params.data.name,
        data_sha256=run.settings.data.sha256,
        index_sha256=run.settings.data.index_sha256,
        pixels_sha256=_pixels_sha256(data),
        settings=run.model_settings,
        protocol=Protocol(
            image_size=trained.image_size,
            resolution=params.evaluate.resolution,
            mask_resize="none" if params.evaluate.resolution == "native" else "nearest",
            pixel_metrics=params.evaluate.pixel_metrics,
            threshold_from="held-out good parts",
            seed=run.settings.train.seed,
        ),
        counts=Counts.model_validate(data.index.counts),
        metrics=as_json(metrics),
        threshold=Threshold(**asdict(threshold), pixel_value=pixel_threshold, oracle=as_json(image.oracle_threshold)),
        confusion=Confusion(**asdict(counts)),
        defects=_defects(results, threshold),
        intervals={},
    )


def _pixels_sha256(data: PreparedData) -> str:
    """Of the test images and masks as the model sees them."""
    digest = hashlib.sha256()
    for row in data.rows("test"):
        batch = data.batch([row])
        digest.update((batch.image * 255).round().byte().cpu().numpy().tobytes())
        digest.update((batch.mask > 0).cpu().numpy().tobytes())
    return digest.hexdigest()


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


def _defects(results: list[TestImage], threshold: HoldoutThreshold) -> dict[str, DefectOutcome]:
    """Each type of defect by itself."""
    scores = torch.tensor([result.score for result in results], dtype=torch.float32)
    labels = torch.tensor([result.label for result in results])
    types = [result.defect for result in results]
    found = recall_by_defect_type(scores, labels, types, threshold.value)
    good = scores[~labels].sort(descending=True).values
    allowed = math.floor(threshold.rate_requested * len(good) + 1e-9)
    level = good[allowed] if len(good) else None
    at_rate = recall_by_defect_type(scores, labels, types, float(level)) if level is not None else {}
    outcomes: dict[str, DefectOutcome] = {}
    for name, recall in found.items():
        chosen = torch.tensor([not result.label or result.defect == name for result in results])
        outcomes[name] = DefectOutcome(
            count=recall.num_images,
            recall=recall.recall,
            recall_interval=share_interval(recall.recall, recall.num_images),
            recall_at_rate=at_rate[name].recall if at_rate else None,
            auroc=as_json(image_metrics(scores[chosen], labels[chosen]).auroc),
        )
    return outcomes


def _write_curve(path: Path, curves: PixelCurves) -> None:
    """The PRO curve up to the integration limit, for `dvc plots`."""
    rates = np.linspace(0, 0.3, 101)
    overlaps = np.interp(rates, curves.false_positive_rate, curves.region_overlap)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["false_positive_rate", "region_overlap"])
        writer.writerows(zip(rates.tolist(), overlaps.tolist(), strict=True))


def _track(cell: Cell, params: Params, evaluation: Evaluation, drawn: list[str]) -> None:
    with cell_run(cell, params.tracking.experiment, evaluation.run_id) as run:
        run.metrics(evaluation.known | evaluation.recalls)
        run.tags({"protocol": evaluation.protocol.model_dump(), "threshold": evaluation.threshold.model_dump()})
        run.describe(description(evaluation, read_tested(cell.evaluated), run.known_tags()))
        for name in drawn:
            run.file(cell.evaluated / name, "figures")
        for path in (cell.evaluation, cell.predictions, cell.pixels):
            if path.exists():
                run.file(path, EVALUATION_FOLDER)
