"""A run in words, for the top of its MLflow page: who has nothing else can name data, split, code and threshold."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.evaluation.measures import METRICS

_SHOWN = 5  # images of each kind of error


def description(
    evaluation: Mapping[str, Any], predictions: Sequence[Mapping[str, str]], tags: Mapping[str, str]
) -> str:
    """Markdown from what `evaluate` wrote, and the run's tags of the code."""
    rows = {
        "Data": _data(evaluation),
        "Split": _split(evaluation),
        "Code": _code(tags),
        "Seed": str(evaluation["protocol"]["seed"]),
        "Threshold": _threshold(evaluation["threshold"]),
        "Missed defects": _images(predictions, label="1", decision="good", lowest_first=True),
        "False alarms": _images(predictions, label="0", decision="defect", lowest_first=False),
    }
    parts = [
        f"**{evaluation['model']}** on **{evaluation['category']}**",
        "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {text} |" for name, text in rows.items())]),
        _figures(evaluation),
        _defects(evaluation["defects"]),
        "Pictures and curves are under `figures/`, the score of each image in `evaluation/predictions.csv`, the split "
        "in `data/index.json`, all packages in `environment/packages.txt`. 95 % intervals are over the test images.",
    ]
    return "\n\n".join(part for part in parts if part)


def _data(evaluation: Mapping[str, Any]) -> str:
    return (
        f"{evaluation['data_set']}/{evaluation['category']}, SHA-256 of its files {evaluation['data_sha256'][:16]}…, "
        f"resized to {evaluation['protocol']['image_size']} pixels"
    )


def _split(evaluation: Mapping[str, Any]) -> str:
    counts = evaluation["counts"]
    taught = counts.get("anomalous_train", 0)
    taken = f", {taught} real defects set aside for methods that learn from some" if taught else ""
    return (
        f"{counts['train']} good images to fit, {counts['holdout']} held out{taken}; tested on "
        f"{counts['test_normal']} good and {counts['test_anomalous']} defective ones; "
        f"`data/index.json`, SHA-256 {evaluation['index_sha256'][:16]}…"
    )


def _code(tags: Mapping[str, str]) -> str:
    if "git_commit" not in tags:
        return "outside git"
    changed = ", with changes that are not committed" if tags.get("git_dirty") == "true" else ""
    return f"commit {tags['git_commit']}{changed}"


def _threshold(threshold: Mapping[str, Any]) -> str:
    promise = "" if threshold["attainable"] else f", which takes {threshold['num_images_needed']} to promise"
    return (
        f"{threshold['value']:.6g}: number {threshold['rank']} from below of {threshold['num_images']} held-out good "
        f"parts, set for {100 * threshold['rate_requested']:g} % false alarms{promise}; expected "
        f"{100 * threshold['expected_rate']:.1f} %, 95 % interval {100 * threshold['interval_low']:.1f} to "
        f"{100 * threshold['interval_high']:.1f} %. A score above it is a defect."
    )


def _figures(evaluation: Mapping[str, Any]) -> str:
    metrics, intervals = evaluation["metrics"], evaluation["intervals"]
    lines = ["| Metric | % | 95 % interval |", "| --- | ---: | ---: |"]
    for metric in METRICS:
        value = metrics.get(metric.key)
        if value is not None:
            low, high = intervals.get(metric.key, (None, None))
            interval = "-" if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f}"
            lines.append(f"| {metric.title}{' (oracle)' if metric.oracle else ''} | {100 * value:.1f} | {interval} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _defects(defects: Mapping[str, Mapping[str, Any]]) -> str:
    found = [f"{name} {round(d['recall'] * d['count'])} of {d['count']}" for name, d in defects.items()]
    return f"Defects found: {', '.join(found)}." if found else ""


def _images(predictions: Sequence[Mapping[str, str]], label: str, decision: str, *, lowest_first: bool) -> str:
    """The test images that were decided wrongly, the worst first."""
    wrong = [
        row for row in predictions if row["split"] == "test" and row["label"] == label and row["decision"] == decision
    ]
    wrong.sort(key=lambda row: float(row["score"]), reverse=not lowest_first)
    shown = [f"`{row['path']}` ({float(row['score']):.4g})" for row in wrong[:_SHOWN]]
    more = [f"{len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []
    return ", ".join([*shown, *more]) or "none"
