"""The summary in the terminal."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from pipelines.evaluation.measures import METRIC_BY_KEY, PROMISED
from pipelines.evaluation.outcomes import NOTHING_TO_TEST_ON, Evaluation
from pipelines.numbers import narrow_interval, percent, score
from pipelines.paths import Cell, Project
from pipelines.report.answers import best_cells, headline
from pipelines.report.markdown import (
    COLUMNS,
    Column,
    absences,
    against_the_best,
    differing,
    inherited,
    over_seeds,
    promises,
    untested,
)
from pipelines.report.summary import Absent, Average, CellSummary, Summary
from pipelines.settings.params import Params

if TYPE_CHECKING:
    from rich.console import Console


def one_line(metrics: dict[str, float | None]) -> str:
    """The main figures of one evaluation, for the terminal."""
    keys = ("image_auroc", "recall", "false_alarms", "pixel_auroc", _region_metric([metrics]))
    shown = [c for c in COLUMNS if c.key in keys]
    if all(metrics.get(c.key) is None for c in shown):
        return f"{NOTHING_TO_TEST_ON}, {score(metrics['threshold'])}"
    figures = {c.key: f"{c.title} {c.show(metrics.get(c.key))}" for c in shown}
    figures["false_alarms"] += f" (promised: {percent(metrics.get(PROMISED))})"
    return ", ".join(figures.values())


def _region_metric(cells: Iterable[Mapping[str, float | None]]) -> str:
    """AUPRO, or sPRO where that is all there is."""
    known = {key for metrics in cells for key, value in metrics.items() if value is not None}
    return "spro_05" if "spro_05" in known and "aupro_30" not in known else "aupro_30"


def print_results(project: Project, params: Params, console: "Console") -> bool:
    """The leaderboard in the terminal, what it lacks, and where to look next; tells whether it lacks nothing.

    Raises:
        StageError: there is no report yet, or it is damaged.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    summary = Summary.of(project, params.tracking.experiment)
    by_region = _region_metric([cell.metrics for cell in summary.cells])
    keys = ("image_auroc", "recall", "false_alarms", PROMISED, by_region, "latency_ms")
    shown = [c for c in COLUMNS if c.key in keys]
    console.print("Percent; averages weigh categories alike; 95 % is the interval of the AUROC", highlight=False)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=0)  # the box alone keeps columns apart
    for title in ("Model", "Category"):
        table.add_column(title, no_wrap=True)
    decisions = "Defects\nfound", "False\nalarms", "Pro-\nmise"
    overlap = METRIC_BY_KEY[by_region].title.replace(" ", "\n")
    for title in ("Test\nimages", "Image\nAUROC", "95 %", *decisions, overlap, "Time,\nms"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in summary.averages:
        for cell in [c for c in summary.cells if c.model == row.model]:
            table.add_row(*_short_row(cell, shown))
        if len(summary.categories) > 1:
            table.add_row(*_short_row(row, shown), style="bold", end_section=True)
    console.print(table)
    if any(cell.counts.apart for cell in summary.cells):
        console.print(
            "Test images: good + defective - those apart, from which a model learns; they are not in this test",
            highlight=False,
        )
    told = [*over_seeds(summary), *summary.variants, promises(summary), *differing(summary), *untested(summary)]
    for sentence in [*told, *against_the_best(summary)]:
        console.print(sentence, highlight=False)
    console.print(f"{headline(best_cells(summary))}.", highlight=False)
    for sentence in inherited(summary):
        console.print(sentence, highlight=False, markup=False)
    lacking = what_it_lacks(project, params, summary)
    for sentence in lacking:
        console.print(sentence, highlight=False, markup=False, style="yellow")
    _print_next_steps(summary, project, params, console)
    return not lacking


def _print_next_steps(summary: Summary, project: Project, params: Params, console: "Console") -> None:
    category = summary.categories[0]
    best = best_cells(summary, category)[0]
    first = project.cell(best.model, category, best.seed)
    console.print(f"The whole report:    {project.report(params.tracking.experiment) / 'report.html'}")
    if first.examples.exists():
        console.print(f"Defects found:       {first.examples}")
    console.print(f"Compare runs:        {'make' if (project.root / 'Makefile').exists() else 'blemish'} ui")
    succession = summary.successions.get(category)
    if succession is None:  # else that which lies here may have been refused
        console.print(f"Use a model:         blemish predict {first.onnx} IMAGE_OR_FOLDER", soft_wrap=True)
    packed = shlex.quote(f"bundles/{succession.reigns if succession else first.model}-{category}.zip")
    bundled = "champion" if succession else first.model
    console.print(f"Take it to the line: blemish bundle {bundled} {shlex.quote(category)}", soft_wrap=True)
    console.print(f"                     blemish verify {packed}", soft_wrap=True)
    console.print(f"                     blemish serve {packed}", soft_wrap=True)


def what_it_lacks(project: Project, params: Params, summary: Summary) -> list[str]:
    """A sentence for each cell that a report does not tell of, or of an earlier state."""
    return [*absences(summary), *_stale(project, params, summary)]


def _stale(project: Project, params: Params, summary: Summary) -> list[str]:
    """What the report does not know yet, or does not know any more."""
    shown = {_cell(cell): cell.run_id for cell in summary.cells}
    known = shown.keys() | {_cell(cell) for cell in summary.absent}
    cells = [project.cell(*cell, params.seed) for cell in params.cells()]
    new = [cell for cell in cells if (cell.model, cell.category) not in known]
    told = [f"Not in this report, which is of other cells: {cell.model} on {cell.category}" for cell in new]
    told += [
        f"No longer in params.yaml: {model} on {name}" for model, name in shown if (model, name) not in params.cells()
    ]
    runs = {(*cell, str(params.seed)): run for cell, run in shown.items()}
    runs |= {(*_cell(cell), seed): run for cell in summary.cells for seed, run in cell.runs_of_seeds.items()}
    later = [
        f"{model} on {name}" + ("" if seed == params.seed else f", seed {seed}")
        for model, name, seed in params.trainings()
        if (model, name) in shown
        and (run := _evaluated_run(project.cell(model, name, seed)))
        and runs.get((model, name, str(seed))) != run
    ]
    told += [f"Trained or evaluated anew since this report: {name}" for name in later]
    return [*told, "`blemish run` brings it up to date"] if told else []


def _cell(of: CellSummary | Absent | Cell) -> tuple[str, str]:
    return of.model, of.category


def _evaluated_run(cell: Cell) -> str | None:
    """None where no evaluation is there."""
    if not cell.evaluation.exists():
        return None
    return Evaluation.load(cell.evaluation, f"run {cell.verb('evaluate')} again").run_id


def _test_images(row: CellSummary | Average) -> str:
    counts = row.counts
    return f"{counts.test_normal}+{counts.test_anomalous}" + (f"-{counts.apart}" if counts.apart else "")


def _short_row(row: CellSummary | Average, columns: Sequence[Column]) -> list[str]:
    """For a terminal of 80 columns."""
    first, *others = (column.of(row) for column in columns)
    ends = narrow_interval(row.intervals.get(columns[0].key))
    return [row.model, row.category, _test_images(row), first, ends, *others]
