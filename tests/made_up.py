"""Evaluations of models that never were: scores and maps of a chosen quality, in the folders that `evaluate` writes."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import norm

from pipelines.data.index import Split
from pipelines.evaluation.certainty import intervals_of
from pipelines.evaluation.metrics import ExactPixelMetrics, confusion_at, image_metrics, known
from pipelines.evaluation.outcomes import (
    Evaluation,
    ScoredImage,
    bin_edges,
    count_pixels,
    read_outcome,
    write_predictions,
)
from pipelines.evaluation.regions import Pixels, Regions
from pipelines.evaluation.review import review
from pipelines.evaluation.thresholds import threshold_at
from pipelines.paths import EVALUATION_FILE, PIXELS_FILE, Project
from pipelines.settings.params import Params, load_params

PRESETS = Path(__file__).parents[1] / "presets"
SIDE = 12  # of the maps, pixels
TYPES = ("cut", "hole")
PIXEL_THRESHOLD = 1.0


def draw_scores(
    auroc: float, labels: NDArray[np.bool_], category: str, model: str, seed: int, alike: float = 0.7
) -> NDArray[np.float64]:
    """Scores of normal distribution with this expected AUROC.

    `alike` is the share of the variance that is the image's own: the same for every model and seed.
    """
    image = rng("image", category).normal(size=len(labels))
    training = rng("training", category, model, seed).normal(size=len(labels))
    noise = np.sqrt(alike) * image + np.sqrt(1 - alike) * training
    return noise + norm.ppf(auroc) * np.sqrt(2) * labels + 5


def draw_maps(scores: NDArray[np.float64], labels: NDArray[np.bool_], category: str) -> tuple[Any, Any]:
    """Maps (N, SIDE, SIDE) and masks: a square in each anomalous image, brighter than the rest by its score."""
    noise = rng("pixels", category).random((len(labels), SIDE, SIDE)).astype(np.float32)
    masks = np.zeros((len(labels), SIDE, SIDE), dtype=bool)
    masks[labels, 3:7, 4:9] = True
    return noise + masks * scores[:, None, None].astype(np.float32) / 8, masks


def pixels_of(maps: NDArray[np.float32], masks: NDArray[np.bool_]) -> list[Pixels]:
    """The pixels of each image by its mask."""
    return [Regions.of(mask).split(anomaly_map, "image") for anomaly_map, mask in zip(maps, masks, strict=True)]


def rng(*key: object) -> np.random.Generator:
    return np.random.default_rng(list(hashlib.sha256(repr(key).encode()).digest()))


def scored_image(
    path: str,
    defect: str,
    label: bool,
    score: float,
    split: Split = "test",
    *,
    threshold: float,
    group: str | None = None,
) -> ScoredImage:
    """A row of predictions.csv."""
    decision = "defect" if score > threshold else "good"
    return ScoredImage(
        path=path,
        split=split,
        defect=defect,
        label=label,
        score=score,
        decision=decision,
        group=group,
    )


def put_evaluation(
    folder: Path,
    model: str,
    category: str,
    *,
    auroc: float = 0.9,
    seed: int = 0,
    good: int = 20,
    defect: int = 20,
    masks: bool = True,
    alike: float = 0.7,
    **changes: Any,
) -> Evaluation:
    """Write evaluation.json, predictions.csv and pixels.npz into `folder`; `changes` replace entries of the first."""
    labels = np.arange(good + defect) >= good
    types = ["good"] * good + [TYPES[number % len(TYPES)] for number in range(defect)]
    paths = [f"test/{name}/{number:03}.png" for number, name in enumerate(types)]
    scores = draw_scores(auroc, labels, category, model, seed, alike)
    held_out = draw_scores(0.5, np.zeros(20, dtype=bool), f"{category} held out", model, seed)
    threshold = threshold_at(torch.from_numpy(held_out), 0.05)
    image = image_metrics(torch.from_numpy(scores), torch.from_numpy(labels))
    counts = confusion_at(torch.from_numpy(scores), torch.from_numpy(labels), threshold.value)
    metrics: dict[str, float | None] = {
        **image.figures,
        "recall": counts.true_positives / defect if defect else None,
        "false_alarms": counts.false_positives / good if good else None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    if masks and defect:
        maps, inside = draw_maps(scores, labels, category)
        exact = ExactPixelMetrics()
        exact.update(torch.from_numpy(maps), torch.from_numpy(inside))
        edges = bin_edges(exact.operating_points().curves().threshold)
        counted = count_pixels(pixels_of(maps, inside), edges, PIXEL_THRESHOLD)
        counted.save(folder / PIXELS_FILE)
        metrics |= exact.compute().figures | {"pixel_f1": counted.f1}
    tested = zip(paths, types, labels.tolist(), scores.tolist(), strict=True)
    rows = [scored_image(*row, threshold=threshold.value) for row in tested]
    for number, score in enumerate(held_out.tolist()):
        path = f"train/good/{number:03}.png"
        rows.append(scored_image(path, "good", False, score, "holdout", threshold=threshold.value))
    write_predictions(folder, rows)
    found_of = {name: [s > threshold.value for s, t in zip(scores, types, strict=True) if t == name] for name in TYPES}
    content: dict[str, Any] = {
        "model": model,
        "method": model,
        "category": category,
        "run_id": f"run-{model}-{category}-{seed}",
        "data_set": "made_up",
        "data_sha256": "d" * 64,
        "test_sha256": "e" * 64,
        "index_sha256": "i" * 64,
        "pixels_sha256": "p" * 64,
        "settings": {"image_size": 256},
        "protocol": {
            "image_size": 256,
            "resize": "bilinear",
            "fit": "stretch",
            "resolution": "prepared",
            "mask_resize": "nearest",
            "compared": 256,
            "of_interest": False,
            "pixel_metrics": "exact",
            "threshold_from": "held-out good parts",
            "seed": seed,
        },
        "counts": {"train": 40, "holdout": 20, "test_normal": good, "test_anomalous": defect, "apart": 0},
        "metrics": {
            **{name: known(value) for name, value in metrics.items()},
            "threshold": threshold.value,
            "train_seconds": 12.4,
            "train_steps": 300,
        },
        "threshold": {**dict(threshold), "pixel_value": PIXEL_THRESHOLD, "oracle": known(image.oracle_threshold)},
        "review": review(held_out.tolist(), threshold, [], reject_rate=0.01, review_rate=0.1),
        "confusion": counts,
        "defects": {
            name: {
                "count": len(hits),
                "recall": sum(hits) / len(hits),
                "recall_interval": (0.25, 0.75),
                "recall_at_rate": 0.5,
                "auroc": image.auroc,
            }
            for name, hits in found_of.items()
            if hits
        },
        "groups": None,
        **changes,
    }
    evaluation = Evaluation.model_validate({**content, "intervals": {}})
    intervals = intervals_of(read_outcome(folder, evaluation, model))
    evaluation = evaluation.model_copy(update={"intervals": intervals})
    evaluation.save(folder / EVALUATION_FILE)
    return evaluation


def params_of(models: list[str], categories: list[str]) -> Params:
    """The demo's, for models that need not exist."""
    params = load_params(PRESETS / "demo.yaml")
    data = params.data.model_copy(update={"categories": categories})
    evaluate = params.evaluate.model_copy(update={"bootstrap": 60})
    return params.model_copy(update={"data": data, "evaluate": evaluate, "models": {name: {} for name in models}})


def put(project: Project, model: str, category: str, **options: Any) -> Evaluation:
    return put_evaluation(project.cell(model, category, 0).evaluated, model, category, **options)


BOTH = params_of(["a", "b"], ["nut", "my bolt"])


def put_both(project: Project) -> Project:
    """Models a and b on two categories, of which one has no masks."""
    for model, auroc in (("a", 0.98), ("b", 0.75)):
        put(project, model, "nut", auroc=auroc, good=30, defect=40)
        put(project, model, "my bolt", auroc=auroc, masks=False)
    return project


def distill_settings(steps: int, batch_size: int) -> dict[str, Any]:
    """Of a tiny teacher, as params.yaml has them."""
    backbone = {"name": "tf_efficientnet_lite0", "weights": "package", "layers": [2, 3], "combine": "separate"}
    taught = {"source": "distilled", "width": "tiny", "backbone": backbone, "image_size": 64, "precision": "float32"}
    learnt = {"steps": steps, "batch_size": batch_size, "learning_rate": 1e-3, "weight_decay": 1e-5}
    return {**taught, **learnt, "seed": 0}
