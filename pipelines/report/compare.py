"""Runs of a tracking store side by side in the terminal, wherever made: figures, intervals, who beats whom."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipelines.errors import StageError
from pipelines.evaluation.certainty import (
    AVERAGE,
    Champion,
    Comparison,
    Measured,
    average,
    champion,
    compare,
    compare_all,
    measure,
)
from pipelines.evaluation.measures import METRIC_BY_KEY
from pipelines.evaluation.outcomes import EVALUATION_FOLDER, DefectOutcome, Evaluation, read_outcome
from pipelines.numbers import UNKNOWN, decimal, interval, narrow_interval, percent, seconds
from pipelines.paths import EVALUATION_FILE, PIXELS_FILE, PREDICTIONS_FILE
from pipelines.report.seeds import average_seeds, latest, short_names
from pipelines.report.summary import leaders
from pipelines.settings import variants
from pipelines.settings.variants import Variant
from pipelines.tracking.records import CellRun

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

By = Literal["model", "category", "defect"]
_MANY = 10  # comparisons in words; of more than this, only those with the best
_FEWEST_CHARACTERS = 4  # of the beginning of a run's id


@dataclass(frozen=True, slots=True)
class Compared:
    """Runs under the names they are shown by, with all that was fetched of them."""

    names: tuple[str, ...]
    categories: tuple[str, ...]
    runs: Mapping[tuple[str, str], CellRun]  # (name, category)
    measured: Mapping[tuple[str, str], Measured]  # (name, category or "average")
    defects: Mapping[tuple[str, str], Mapping[str, DefectOutcome]]


def compare_runs(
    project: Path,
    experiment: str,
    by: By,
    metric: str | None,
    run_ids: Sequence[str],
    resamples: int,
    console: "Console",
) -> None:
    """Print the last run of every model and category, or the runs of `run_ids`, by one metric.

    Raises:
        StageError: no such metric, experiment or run, or the store cannot be reached.
    """
    from pipelines.tracking.cells import cell_runs, fetched

    metric = metric or ("recall" if by == "defect" else "image_auroc")
    _check_metric(metric, by)
    runs = cell_runs(project, experiment)
    if not runs:
        raise StageError(
            f"experiment '{experiment}': no run has been evaluated yet; run `dvc repro`, or with --force where all was "
            "made while MLFLOW_TRACKING_URI named another store"
        )
    chosen = [_find(runs, run_id) for run_id in run_ids] or latest(runs)
    names = short_names(chosen)
    files = (EVALUATION_FILE, PREDICTIONS_FILE, PIXELS_FILE)
    with fetched(project, [run.run_id for run in chosen], files, EVALUATION_FOLDER) as folders:
        compared = gather(chosen, names, runs, folders, resamples)
    title, table = _TABLES[by](compared, metric)
    console.print(title, style="bold", highlight=False)
    console.print(table)
    for line in [*_variants(compared), *(sentences(compared, metric) if by != "defect" else [])]:
        console.print(line, highlight=False, markup=False)


def _check_metric(metric: str, by: By) -> None:
    known = ("recall", "recall_at_rate", "image_auroc") if by == "defect" else tuple(METRIC_BY_KEY)
    if metric not in known:
        raise StageError(
            f"metric '{metric}': unknown{' by defect' if by == 'defect' else ''}; there are: {', '.join(known)}"
        )


def _find(runs: Sequence[CellRun], run_id: str) -> CellRun:
    """The run whose id begins like this."""
    found = [run for run in runs if run.run_id.startswith(run_id)] if len(run_id) >= _FEWEST_CHARACTERS else []
    if len(found) == 1:
        return found[0]
    if found:
        raise StageError(f"run '{run_id}': {len(found)} runs begin so; give more of the id")
    raise StageError(
        f"run '{run_id}': no evaluated run's id begins so (with at least {_FEWEST_CHARACTERS} characters); "
        "the MLflow page shows the ids"
    )


def gather(
    chosen: Sequence[CellRun],
    names: Mapping[str, str],
    runs: Sequence[CellRun],
    folders: Mapping[str, Path],
    resamples: int,
) -> Compared:
    """Measure what was fetched; `runs` are all, of which some tell the spread over seeds.

    Raises:
        StageError: a run was evaluated by another version of Blemish, and its scores are not there.
    """
    shown = tuple(dict.fromkeys(names[run.run_id] for run in chosen))
    by_cell = {(names[run.run_id], run.category): run for run in chosen}
    measured: dict[tuple[str, str], Measured] = {}
    defects = {}
    for cell, run in by_cell.items():
        folder, remedy = folders[run.run_id], f"run `blemish evaluate {run.model} {run.category}` again"
        if not (folder / EVALUATION_FILE).exists() or not (folder / PREDICTIONS_FILE).exists():
            raise StageError(
                f"run {run.run_id} ({run.model} on {run.category}): holds no {EVALUATION_FOLDER}/{PREDICTIONS_FILE}; "
                f"{remedy}"
            )
        evaluation = Evaluation.load(folder / EVALUATION_FILE, remedy)
        outcome = read_outcome(folder, evaluation, cell[0])
        measured[cell] = measure(outcome, resamples, average_seeds([run], runs).spreads())
        defects[cell] = evaluation.defects
    for name in shown:
        own = sorted((run for (other, _), run in by_cell.items() if other == name), key=lambda run: run.category)
        cells = [measured[name, run.category] for run in own]
        measured[name, AVERAGE] = average(cells, average_seeds(own, runs).spreads())
    categories = tuple(sorted({run.category for run in chosen}))
    return Compared(shown, categories, by_cell, measured, defects)


# ---- tables --------------------------------------------------------------------------------------------------------


def table_by_model(compared: Compared, metric: str) -> "tuple[str, Table]":
    """Title, and a row per model: its average, what it costs, and how it stands to the best."""
    table = _table()
    for title in ("Model", "%", "95 %", "Against\nthe best", "Images", "Seeds", "Train,\ns", "Time,\nms", "ONNX,\nMB"):
        table.add_column(title, justify="left" if title in ("Model", "Against\nthe best") else "right", no_wrap=True)
    group = [compared.measured[name, AVERAGE] for name in compared.names]
    comparisons = compare_all([metric], group)
    best = champion(metric, group, comparisons).best
    sign = 1 if METRIC_BY_KEY[metric].higher_is_better else -1
    for row in sorted(group, key=lambda row: -sign * row.values.get(metric, -sign * float("inf"))):
        own = [run for (name, _), run in compared.runs.items() if name == row.name]
        spread = row.spreads.get(metric)
        table.add_row(
            row.name,
            percent(row.values.get(metric)),
            interval(row.intervals.get(metric)),
            _against(row.name, best, comparisons),
            str(row.num_images),
            f"{spread.num_runs} (± {percent(spread.sd)})" if spread else "1",
            _sum(own, "train_seconds", seconds),
            _sum(own, "latency.total.p50", decimal, mean=True),
            _sum(own, "onnx_megabytes", decimal, mean=True),
            style="bold" if row.name == best else None,
        )
    return f"{METRIC_BY_KEY[metric].title}, percent; average over {', '.join(compared.categories)}", table


def _against(name: str, best: str | None, comparisons: Sequence[Comparison]) -> str:
    if best is None or name == best:
        return "" if best is None else "best"
    found = next(found for found in comparisons if {found.a, found.b} == {name, best})
    if found.difference is None:
        return "not comparable"
    difference = f"{100 * (found.difference if found.a == name else -found.difference):+.1f}"
    return f"tie ({difference})" if found.verdict == "tie" else difference


def table_by_category(compared: Compared, metric: str) -> "tuple[str, Table]":
    """Title, and a row per category with a column per model; bold is the best and what cannot be told from it."""
    from rich.markup import escape

    table = _table()
    table.add_column("Category", no_wrap=True)
    table.add_column("Images", justify="right", no_wrap=True)
    for name in compared.names:
        table.add_column(name, justify="right", no_wrap=True)
    for category in (*compared.categories, AVERAGE):
        group = [compared.measured[name, category] for name in compared.names if (name, category) in compared.measured]
        marked = leaders(_champion(metric, group)) if len(group) > 1 else ()
        values = {row.name: _with_interval(row, metric, row.name in marked) for row in group}
        images = sorted({row.num_images for row in group})
        texts = [values.get(name, UNKNOWN) for name in compared.names]
        if category == AVERAGE:
            table.add_section()
        table.add_row(escape(category), "/".join(map(str, images)), *texts)
    return f"{METRIC_BY_KEY[metric].title}, percent (95 % interval); bold: best, or tied with it", table


def _with_interval(row: Measured, metric: str, marked: bool) -> str:
    ends = row.intervals.get(metric)
    text = f"{percent(row.values.get(metric))}{f' ({narrow_interval(ends)})' if ends else ''}"
    return f"[bold]{text}[/bold]" if marked else text


def table_by_defect(compared: Compared, metric: str) -> "tuple[str, Table]":
    """Title, and a row per type of defect with a column per model."""
    from rich.markup import escape

    titles = {
        "recall": "Defects found at the deployed threshold",
        "recall_at_rate": "Defects found where all let the same share of good test images through (oracle)",
        "image_auroc": "Image AUROC of one type of defect against all good test images",
    }
    table = _table()
    for title in ("Category", "Defect"):
        table.add_column(title, no_wrap=True)
    for title in ("Images", *compared.names):
        table.add_column(title, justify="right", no_wrap=True)
    key = "auroc" if metric == "image_auroc" else metric
    for category in compared.categories:
        found = {name: compared.defects.get((name, category), {}) for name in compared.names}
        types = dict.fromkeys(defect for defects in found.values() for defect in defects)
        for defect in types:
            own = {name: defects[defect] for name, defects in found.items() if defect in defects}
            images = sorted({numbers.count for numbers in own.values()})
            texts = [percent(getattr(own[name], key)) if name in own else UNKNOWN for name in compared.names]
            table.add_row(escape(category), escape(defect), "/".join(map(str, images)), *texts)
        table.add_section()
    return f"{titles[metric]}, percent", table


_TABLES = {"model": table_by_model, "category": table_by_category, "defect": table_by_defect}


def sentences(compared: Compared, metric: str) -> list[str]:
    """The averages compared in words: every pair, or the best with each where there are many."""
    group = [compared.measured[name, AVERAGE] for name in compared.names]
    pairs = compare_all([metric], group) or [compare(metric, a, b) for a, b in combinations(group, 2)]  # refused
    if len(pairs) > _MANY:
        best = champion(metric, group, pairs).best
        pairs = [pair for pair in pairs if best in (pair.a, pair.b)]
    return [f"{pair.text}." for pair in pairs]


def _variants(compared: Compared) -> list[str]:
    """What the models of one method have otherwise, as their runs tell."""
    models: dict[str, Variant] = {}
    for run in compared.runs.values():
        prefix = f"models.{run.model}."
        settings = {name.removeprefix(prefix): text for name, text in run.settings.items() if name.startswith(prefix)}
        method, tuned = run.tags.get("method", run.model), run.tags.get("tuned")
        models.setdefault(run.model, Variant(run.model, method, settings, tuned))
    return [f"{sentence}." for sentence in variants.sentences(list(models.values())).values()]


def _champion(metric: str, group: Sequence[Measured]) -> Champion:
    return champion(metric, group, compare_all([metric], group))


def _table() -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))


def _sum(runs: Sequence[CellRun], metric: str, show: Callable[[float | None], str], *, mean: bool = False) -> str:
    values = [run.metrics[metric] for run in runs if metric in run.metrics]
    if len(values) < len(runs):
        return UNKNOWN
    return show(sum(values) / (len(values) if mean else 1))
