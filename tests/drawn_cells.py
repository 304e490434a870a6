"""Evaluations with drawn pictures, and a summary to go with them, for the report and the animation."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from made_up import scored_image

from anomaly_models.common.sizes import Size
from pipelines.data.index import FORMAT, IndexedImage, PreparedIndex, SeenBy, images_file, masks_file
from pipelines.evaluation.measures import METRIC_BY_KEY
from pipelines.evaluation.outcomes import Confusion, Counts, Evaluation, write_predictions
from pipelines.files import write_json
from pipelines.paths import INDEX_FILE, Project
from pipelines.pictures.frames import Frame
from pipelines.pictures.panels import KeptMaps, Picture, Thresholds
from pipelines.pictures.reading import Reading
from pipelines.report.large import Originals
from pipelines.report.summary import CellSummary, Summary

READING = Reading(0, 255, "refuse", page=None, dicom_window="file", max_megapixels=None)
NO_ORIGINALS = Originals(Path("nowhere"), READING)
THRESHOLDS = Thresholds(score=2.0, pixel=1.0)
METRICS = ("image_auroc", "image_f1_max", "false_alarms")  # that a drawn cell has


def picture(
    path: str, defect: str, score: float, seed: int = 0, side: int = 64, size: tuple[int, int] = (64, 64)
) -> Picture:
    """A speckled part of `size` before it was squared; a defective one has a bright square, where the map peaks."""
    rng = np.random.default_rng(seed)
    rgb = rng.normal(120, 10, (side, side, 1)).repeat(3, axis=2)
    anomaly_map = rng.uniform(0.1, 0.6, (side, side)).astype(np.float32)
    truth = np.zeros((side, side), dtype=bool)
    if defect != "good":
        top, left = rng.integers(side // 8, side // 2, 2)
        truth[top : top + side // 4, left : left + side // 4] = True
        rgb[truth] = 230
        anomaly_map[truth] = score / THRESHOLDS.score
    return Picture(
        path=path,
        defect=defect,
        label=defect != "good",
        score=score,
        rgb=rgb.clip(0, 255).astype(np.uint8),
        anomaly_map=anomaly_map,
        truth=truth,
        width=size[0],
        height=size[1],
    )


def write_prepared(
    project: Project, category: str, pictures: Sequence[Picture], hashes: Mapping[str, str] | None = None
) -> Path:
    """The test images as `prepare` would leave them; `hashes` (SHA-256) of their files by path, where there are any."""
    folder = project.prepared(category)
    folder.mkdir(parents=True)
    masked = [p for p in pictures if p.label and p.truth is not None]
    rows = {p.path: row for row, p in enumerate(masked)}
    hashes = hashes or {}
    images = [
        IndexedImage(p.path, "test", p.label, p.defect, p.width, p.height, (), rows.get(p.path), sha256, None, None)
        for p, sha256 in ((p, hashes.get(p.path, "")) for p in pictures)
    ]
    (side,) = {len(p.rgb) for p in pictures}
    frame = Frame(Size.square(side), "bilinear", "stretch")
    SeenBy(frame, "", None, None).save(folder, "fapm")
    np.save(images_file(folder, frame), np.stack([p.rgb for p in pictures]))
    if masked:
        np.save(masks_file(folder, frame.shape), np.stack([p.truth for p in masked]))
    index = PreparedIndex(
        category,
        "folder",
        0,
        255,
        "refuse",
        None,
        "file",
        bool(masked),
        False,
        None,
        {},
        "",
        None,
        None,
        (),
        tuple(images),
    )
    write_json(folder / INDEX_FILE, {"format": FORMAT, **asdict(index)})
    return folder


def write_evaluation(project: Project, model: str, category: str, pictures: Sequence[Picture]) -> Path:
    """What `evaluate` would leave, in so far as the report's page is made of it."""
    cell = project.cell(model, category, 0)
    folder = cell.evaluated
    folder.mkdir(parents=True)
    rows = [scored_image(p.path, p.defect, p.label, p.score, threshold=THRESHOLDS.score) for p in pictures]
    rows.append(scored_image("train/good/000.png", "good", False, 1.5, "holdout", threshold=THRESHOLDS.score))
    write_predictions(folder, rows)
    evaluation(model, category).save(cell.evaluation)
    KeptMaps.of(((p.anomaly_map, (p.width, p.height)) for p in pictures), THRESHOLDS.pixel).save(folder)
    curve = [[0.0, 0.5, 1.0], [0.0, 0.8, 1.0]]
    write_json(cell.curves, {"roc": curve, "precision_recall": curve, "pro": [[0.0, 0.3], [0.5, 0.9]]})
    return folder


def evaluation(model: str, category: str) -> Evaluation:
    """Of figures and images there are none."""
    return Evaluation.model_validate(
        {
            **dict.fromkeys(
                ("run_id", "data_set", "data_sha256", "test_sha256", "index_sha256", "pixels_sha256"), "0123"
            ),
            "model": model,
            "method": model,
            "category": category,
            "settings": {},
            "protocol": {
                "image_size": 64,
                "resize": "bilinear",
                "fit": "stretch",
                "resolution": "prepared",
                "mask_resize": "nearest",
            }
            | {
                "compared": 64,
                "of_interest": False,
                "pixel_metrics": "exact",
                "threshold_from": "held-out good parts",
                "seed": 0,
            },
            "counts": dict.fromkeys(Counts.model_fields, 20),
            "metrics": {},
            "threshold": threshold(),
            "review": to_person(),
            "confusion": dict.fromkeys(Confusion.model_fields, 0),
            "defects": {},
            "intervals": {},
            "groups": None,
        }
    )


def threshold() -> dict[str, Any]:
    return {
        "value": THRESHOLDS.score,
        "pixel_value": THRESHOLDS.pixel,
        "rate_requested": 0.05,
        "num_images": 20,
        "rank": 20,
        "expected_rate": 0.0476,
        "interval_low": 0.0013,
        "interval_high": 0.1684,
        "attainable": True,
        "num_images_needed": 19,
        "oracle": 2.1,
    }


def to_person() -> dict[str, Any]:
    """Scores above the threshold of 2 and up to 3: of the good parts that were held out, none."""
    return {
        "reject_above": 3.0,
        "comes_from": "known defects",
        "num_images": 9,
        "num_known_defects": 9,
        "rate_requested": 0.1,
        "expected_rate": 0.1,
        "attainable": True,
        "num_images_needed": 9,
        "expected_load": 0.0476,
        "load_low": 0.0,
        "load_high": 0.1684,
    }


def groups() -> dict[str, Any]:
    """Of Monday, which was learnt from, Tuesday and Wednesday, which were held out and differ, and of the test."""

    def scores(count: int, false_alarms: int, mean_score: float) -> dict[str, Any]:
        return {"count": count, "false_alarms": false_alarms, "mean_score": mean_score}

    rows = [
        {"name": "mon", "fitted": 60, "held_out": None, "left_out": None, "tested": scores(3, 0, 1.1)},
        {"name": "tue", "fitted": 0, "held_out": scores(12, 0, 1.0), "left_out": 0.0, "tested": None},
        {"name": "<i>wed", "fitted": 0, "held_out": scores(8, 1, 1.5), "left_out": 0.25, "tested": scores(1, 1, 2.2)},
    ]
    return {"p_value": 0.012, "groups": tuple(rows)}


def summary_of(
    models: Sequence[str], categories: Sequence[str], num_good: int = 4, num_defects: int = 8
) -> dict[str, Any]:
    """The content of summary.json: the first model wins on average by a point a model; in each category it is a tie."""
    cells = [
        _cell(model, category, 0.98 - 0.01 * rank - 0.002 * place, num_good, num_defects)
        for rank, model in enumerate(models)
        for place, category in enumerate(categories)
    ]
    champion = {"best": models[0], "tied_with": [], "reason": None}
    tie = {"best": models[0], "tied_with": list(models[1:]), "reason": None}
    return {
        "data_set": "drawn",
        "categories": list(categories),
        "models": {model: {} for model in models},
        "confidence": 0.95,
        "resamples": 1000,
        "tracking": {"experiment": "tests", "experiment_id": "1", "page": "http://127.0.0.1:5000"},
        "cells": cells,
        "absent": [],
        "averages": [_average(model, [cell for cell in cells if cell["model"] == model]) for model in models],
        "comparisons": [
            _comparison(models[0], other, category) for category in ["average", *categories] for other in models[1:]
        ],
        "champions": {metric: {"average": champion, **dict.fromkeys(categories, tie)} for metric in METRICS},
    }


def read_summary(content: dict[str, Any]) -> Summary:
    return Summary.model_validate_json(json.dumps(content))


def _cell(model: str, category: str, value: float, num_good: int, num_defects: int) -> dict[str, Any]:
    stages = {name: {"p50": 2.0, "p95": 2.5, "p99": 3.0} for name in ("decode", "resize", "network", "postprocess")}
    counts = {"train": 60, "holdout": 20, "test_normal": num_good, "test_anomalous": num_defects, "apart": 0}
    return {
        **evaluation(model, category).model_dump(include=set(CellSummary.model_fields)),
        "metrics": {**dict.fromkeys(METRIC_BY_KEY), "image_auroc": value, "image_f1_max": value - 0.1}
        | {"false_alarms": 1 - value},
        "intervals": {"image_auroc": [value - 0.02, min(1.0, value + 0.02)]},
        "counts": counts,
        "run_url": "http://127.0.0.1:5000/#/experiments/1/runs/0123",
        "runs_of_seeds": {},
        "onnx_megabytes": 20.9,
        "latency": {
            "hardware": "A CPU (2 cores)",
            "threads": 1,
            "provider": "CPUExecutionProvider",
            "onnxruntime": "1.0",
            "num_images": 40,
            "images": "test images",
            "num_runs": 100,
            "milliseconds": {**stages, "total": {"p50": 8.0, "p95": 10.0, "p99": 12.0}},
            "throughput": {"batch_size": 8, "images_per_second": 130.0},
            "int8": None,
        },
        "seeds": None,
    }


def _average(model: str, cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    means = {key: sum(cell["metrics"][key] for cell in cells) / len(cells) for key in METRICS}
    return {
        "model": model,
        "category": "average",
        "metrics": {**dict.fromkeys(METRIC_BY_KEY), **means},
        "intervals": {},
        "seeds": None,
        "counts": {name: sum(cell["counts"][name] for cell in cells) for name in Counts.model_fields},
        "train_seconds_total": 11.2,
        "onnx_megabytes_mean": 20.9,
        "latency_p50": 8.0,
    }


def _comparison(a: str, b: str, category: str) -> dict[str, Any]:
    named = {"metric": "image_auroc", "category": category, "a": a, "b": b, "num_images": 12, "shared": False}
    return named | {"difference": 0.01, "p": 0.11, "verdict": "tie", "reason": None}


LATENCY: dict[str, Any] = _cell("fapm", "nut", 0.9, 4, 8)["latency"]
