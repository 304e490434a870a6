"""Every cell's results -> one summary: the figures, how sure they are, who beats whom. All reports are made from it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pipelines.deployment.records import Latency
from pipelines.evaluation.certainty import (
    AVERAGE,
    CONFIDENCE,
    Champion,
    Comparison,
    Measured,
    average,
    champion,
    compare_all,
    measure,
)
from pipelines.evaluation.measures import METRICS
from pipelines.evaluation.outcomes import Evaluation, read_outcome
from pipelines.paths import Project
from pipelines.report.seeds import Seeds, average_seeds, cell_seeds
from pipelines.settings.params import Params
from pipelines.tracking.records import CellRun

if TYPE_CHECKING:
    from pipelines.tracking.pages import Pages

Cell = dict[str, Any]  # one row of the leaderboard
Summary = dict[str, Any]  # summary.json

MAIN_METRIC = "image_auroc"
_DIGITS = 6  # of a fraction, in summary.json


def summarise(params: Params, project: Project, runs: Sequence[CellRun] = (), pages: "Pages | None" = None) -> Summary:
    """Everything about the cells of the params file, and nothing of cells that are no longer in it.

    `runs` are all of the tracking store: those that differ from a cell's own in the seed alone tell its spread.
    """
    resamples = params.evaluate.bootstrap
    store = {run.run_id: run for run in runs}
    cells, measured = list[Cell](), dict[tuple[str, str], Measured]()
    for model, category in params.cells():
        place = project.cell(model, category)
        evaluation = Evaluation.load(place.evaluation, f"run {place.verb('evaluate')}, or `dvc repro` for everything")
        run = store.get(evaluation.run_id)
        seeds = cell_seeds(run, runs) if run else Seeds((), {})
        outcome = read_outcome(place.evaluated, evaluation, model)
        measured[model, category] = measure(outcome, resamples, seeds.spreads())
        url = pages.run(evaluation.run_id) if pages and run else None
        cells.append(_cell(project, evaluation.model_dump(mode="json"), seeds, url))
    averages = []
    for model in params.models:
        group = [cell for cell in cells if cell["model"] == model]
        own = [store[cell["run_id"]] for cell in group if cell["run_id"] in store]
        seeds = average_seeds(own, runs) if len(own) == len(group) else Seeds((), {})
        row = average([measured[model, cell["category"]] for cell in group], seeds.spreads())
        measured[model, AVERAGE] = row
        averages.append(_average(row, group, seeds))
    comparisons, champions = judge(measured, list(params.models), [*params.data.categories, AVERAGE])
    return {
        "data_set": params.data.name,
        "categories": list(params.data.categories),
        "models": {name: next(cell["settings"] for cell in cells if cell["model"] == name) for name in params.models},
        "metrics": [asdict(metric) for metric in METRICS],
        "main_metric": MAIN_METRIC,
        "confidence": CONFIDENCE,
        "resamples": resamples,
        "tracking": {
            "experiment": params.tracking.experiment,
            "experiment_id": pages.experiment_id if pages else None,
            "page": pages.base if pages else None,
        },
        "cells": cells,
        "averages": averages,
        "comparisons": [_rounded({**asdict(found), "text": found.text}) for found in comparisons],
        "champions": {
            metric: {place: _rounded({**asdict(found), "is_tie": found.is_tie}) for place, found in places.items()}
            for metric, places in champions.items()
        },
    }


def judge(
    measured: Mapping[tuple[str, str], Measured], models: Sequence[str], categories: Sequence[str]
) -> tuple[list[Comparison], dict[str, dict[str, Champion]]]:
    """Every pair of models on every category and by every metric; and the champions by metric and category."""
    comparisons: list[Comparison] = []
    champions: dict[str, dict[str, Champion]] = {}
    for category in categories:
        group = [measured[model, category] for model in models]
        found = compare_all((metric.key for metric in METRICS), group)
        comparisons += found
        for metric in METRICS:
            if any(metric.key in cell.values for cell in measured.values()):
                own = [comparison for comparison in found if comparison.metric == metric.key]
                champions.setdefault(metric.key, {})[category] = champion(metric.key, group, own)
    return comparisons, champions


def _cell(project: Project, evaluation: Mapping[str, Any], seeds: Seeds, url: str | None) -> Cell:
    model, category = evaluation["model"], evaluation["category"]
    place = project.cell(model, category)
    onnx = place.onnx
    latency = Latency.load(place.latency, f"run {place.verb('latency')} again") if place.latency.exists() else None
    return {
        "model": model,
        "category": category,
        "run_id": evaluation["run_id"],
        "run_url": url,
        "settings": evaluation["settings"],
        "protocol": evaluation["protocol"],
        "seed": evaluation["protocol"]["seed"],
        **evaluation["metrics"],
        "onnx_megabytes": round(onnx.stat().st_size / 1e6, 2) if onnx.exists() else None,
        "latency_ms": latency.milliseconds.total.p50 if latency else None,
        "intervals": _rounded(evaluation["intervals"]),
        "threshold": evaluation["threshold"],
        "confusion": evaluation["confusion"],
        "counts": evaluation["counts"],
        "defects": evaluation["defects"],
        "latency": latency.model_dump() if latency else None,
        "seeds": _rounded(seeds.as_json()),
    }


def _average(row: Measured, cells: Sequence[Cell], seeds: Seeds) -> Cell:
    """Macro average: each category weighs the same; a metric that some category lacks has no average."""
    return {
        "model": row.name,
        "category": AVERAGE,
        **{metric.key: row.values.get(metric.key) for metric in METRICS},
        "intervals": _rounded(row.intervals),
        "seeds": _rounded(seeds.as_json()),
        "num_test_images": row.num_images,
        "train_seconds_total": _total([cell["train_seconds"] for cell in cells]),
        "onnx_megabytes_mean": _mean([cell["onnx_megabytes"] for cell in cells]),
        "latency_p50": _mean([cell["latency_ms"] for cell in cells]),
    }


def _total(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _mean(values: Sequence[float | None]) -> float | None:
    total = _total(values)
    return None if total is None else total / len(values)


def _rounded(value: Any) -> Any:
    """Fractions, however nested, to as many digits as anyone reads: thousands of them stand in summary.json."""
    if isinstance(value, float):
        return round(value, _DIGITS)
    if isinstance(value, Mapping):
        return {name: _rounded(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(inner) for inner in value]
    return value
