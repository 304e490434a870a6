"""The summary of all cells as tables for the terminal, the README, MLflow and the report's folder."""

import csv
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipelines.evaluation.certainty import Champion
from pipelines.evaluation.measures import METRIC_BY_KEY, METRICS
from pipelines.files import atomic_folder, write_json
from pipelines.names import registered_model
from pipelines.numbers import percent
from pipelines.paths import SUMMARY_FILE, Project
from pipelines.report.field_tables import write_tables
from pipelines.report.large import Originals
from pipelines.report.markdown import COLUMNS, averages_table, headlines, report_markdown
from pipelines.report.summary import MAIN_METRIC, CellSummary, Summary, summarise
from pipelines.settings.params import Params

_MAIN_FIGURES = (MAIN_METRIC, "recall", "false_alarms")


def report(params: Params, project: Project) -> Path:
    """Write `reports/<experiment>/`: summary.json, tables, report.md, report.html and its pictures; gives report.md.

    And `metrics/summary.json`, the averages for DVC. Reports of other experiments stay.

    The averages are logged to MLflow, and the best model of each category becomes its champion in the model registry;
    where the test is frozen, only if it is not found worse than the champion (`pipelines.evaluation.succession`).

    Raises:
        StageError: a cell of the params file has not been evaluated.
    """
    from pipelines.report import page as html_report
    from pipelines.report.heirs import successions
    from pipelines.tracking.cells import cell_runs
    from pipelines.tracking.pages import pages
    from pipelines.tracking.registry import crown
    from pipelines.tracking.runs import summary_run
    from pipelines.tracking.store import prepare_store

    experiment = params.tracking.experiment
    place = project.report(experiment)
    prepare_store(project.root, experiment)  # a store that knows no run of these cells yet adds none to their figures
    originals = Originals(project.root / params.data.root, params.prepare.reading)
    summary = summarise(params, project, cell_runs(project.root, experiment), pages(project.root, experiment))
    summary = summary.model_copy(update={"successions": successions(summary, project, experiment)})
    with atomic_folder(place) as folder:
        summary.save(folder / SUMMARY_FILE)
        _write_leaderboard(folder / "leaderboard.csv", summary.cells)
        write_tables(folder, summary)
        (folder / "report.md").write_text(report_markdown(summary, project, place), encoding="utf-8")
        html_report.write(summary, project, folder, place, originals)
    write_json(project.averages, _main_figures(summary))
    run_ids = sorted(str(cell.run_id) for cell in summary.cells)
    key = hashlib.sha256(json.dumps(run_ids).encode()).hexdigest()[:16]
    with summary_run(project.root, experiment, key) as run:
        # No metrics: on MLflow's page, each would be a chart of its own beside those of the cells.
        run.tags({"cells": " ".join(run_ids), "categories": ", ".join(summary.categories)})
        told = "\n".join(f"- {line}" for line in headlines(summary))
        run.describe(f"{averages_table(summary)}\n\n{told}\n\nAll tables are under `report/`.")
        for name in ("report.html", "report.md", "tables.md", "leaderboard.csv", SUMMARY_FILE):
            run.output(place / name, "report")
    for category, run_id, why in _crowned(summary):
        crown(project.root, experiment, registered_model(summary.data_set, category), run_id, why)
    return place / "report.md"


def _main_figures(summary: Summary) -> dict[str, dict[str, float | int | None]]:
    """By metric, then by model in the order of their names, so that what is compared stands side by side."""
    averages = sorted(summary.averages, key=lambda row: row.model)
    return {key: {row.model: row.metrics.get(key) for row in averages} for key in _MAIN_FIGURES}


def _crowned(summary: Summary) -> Iterator[tuple[str, str | None, str]]:
    """Each category whose champion may change, with the run of its best model by the main metric, and why in words.

    Without a best, the run is None.
    """
    places = summary.champions.get(MAIN_METRIC, {})
    for category in summary.categories:
        if (succession := summary.successions.get(category)) is not None:
            if (new := succession.successor) is not None:
                yield category, new.run_id, succession.sentences(category)[0]
            continue
        found = places.get(category, Champion(None, (), "nothing to compare by"))
        cell = next((c for c in summary.cells if (c.model, c.category) == (found.best, category)), None)
        if cell is None:
            yield category, None, found.reason or ""
            continue
        tied = f"; not distinguishable from {', '.join(found.tied_with)}" if found.tied_with else ""
        figure = f"{METRIC_BY_KEY[MAIN_METRIC].title} {percent(cell.metrics[MAIN_METRIC])}"
        yield category, cell.run_id, f"{cell.model}: {figure}{tied}"


def _write_leaderboard(path: Path, cells: Sequence[CellSummary]) -> None:
    """A row per cell: each metric with the ends of its interval, and the test images behind them."""
    ends = [f"{metric.key}_{end}" for metric in METRICS for end in ("low", "high")]
    test = ("test_normal", "test_anomalous", "apart")
    columns = ["cell", "model", "category", "seed", *test, *(c.key for c in COLUMNS), *ends]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        for cell in cells:
            intervals = {
                f"{key}_{end}": value
                for key, interval in cell.intervals.items()
                for end, value in zip(("low", "high"), interval, strict=True)
            }
            names = {"cell": f"{cell.model}-{cell.category}", "model": cell.model, "category": cell.category}
            counts = {"seed": cell.protocol.seed, **cell.counts.model_dump()}
            writer.writerow({**names, **counts, **cell.figures, **intervals})
