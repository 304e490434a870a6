"""Every cell's metrics -> tables, macro averages, and a summary run. Reads what `evaluate` and `export` wrote."""

import csv
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from pipelines.errors import StageError
from pipelines.files import atomic_folder, read_json, write_json
from pipelines.params import Params
from pipelines.paths import Project

if TYPE_CHECKING:
    from rich.console import Console

Cell = dict[str, Any]  # one row of the leaderboard
Summary = dict[str, Any]  # summary.json


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _megabytes(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


@dataclass(frozen=True, slots=True)
class Column:
    """A number of the leaderboard; averaged over categories if it is a metric."""

    key: str
    title: str
    show: Callable[[float | None], str]
    is_metric: bool = True


COLUMNS = (
    Column("image_auroc", "Image AUROC", _percent),
    Column("image_ap", "Image AP", _percent),
    Column("image_f1_max", "Image F1-max (oracle)", _percent),
    Column("recall", "Defects found", _percent),
    Column("false_alarms", "False alarms", _percent),
    Column("pixel_auroc", "Pixel AUROC", _percent),
    Column("pixel_ap", "Pixel AP", _percent),
    Column("pixel_f1_max", "Pixel F1-max (oracle)", _percent),
    Column("aupro_30", "AUPRO 0.3", _percent),
    Column("aupro_05", "AUPRO 0.05", _percent),
    Column("train_seconds", "Train, s", _seconds, is_metric=False),
    Column("onnx_megabytes", "ONNX, MB", _megabytes, is_metric=False),
)

NOTES = """\
Percentages. AUROC and AP need no threshold, F1-max chooses it on the test images (hence *oracle*). *Defects found* \
and *false alarms* are decisions at the deployed threshold, which comes from held-out good parts alone. AUPRO is \
integrated to a false-positive rate of 0.3 and of 0.05. The average weighs every category alike."""


def report(params: Params, project: Project) -> Path:
    """Write `reports/`: summary.json, leaderboard.csv, report.md; log the macro averages to MLflow; gives report.md.

    Raises:
        StageError: a cell of the params file has not been evaluated.
    """
    from pipelines import tracking

    summary = summarise(params, project)
    with atomic_folder(project.reports) as folder:
        write_json(folder / "summary.json", summary)
        _write_leaderboard(folder / "leaderboard.csv", summary["cells"])
        (folder / "report.md").write_text(_markdown(summary, project), encoding="utf-8")
    run_ids = sorted(cell["run_id"] for cell in summary["cells"])
    key = hashlib.sha256(json.dumps(run_ids).encode()).hexdigest()[:16]
    with tracking.summary_run(project.root, params.tracking.experiment, key) as run:
        for row in summary["averages"]:
            run.metrics({f"{row['model']}.{c.key}": row[c.key] for c in COLUMNS if row.get(c.key) is not None})
        run.tags({"cells": " ".join(run_ids), "categories": ", ".join(summary["categories"])})
        run.file(project.reports / "report.md", "report")
        run.file(project.reports / "leaderboard.csv", "report")
    return project.reports / "report.md"


def summarise(params: Params, project: Project) -> Summary:
    """The numbers of every cell of the params file, and nothing of cells that are no longer in it."""
    cells = [_cell(project, model, category) for model, category in params.cells()]
    return {
        "categories": list(params.data.categories),
        "models": {name: next(cell["settings"] for cell in cells if cell["model"] == name) for name in params.models},
        "cells": cells,
        "averages": [_average(name, [cell for cell in cells if cell["model"] == name]) for name in params.models],
    }


def _cell(project: Project, model: str, category: str) -> Cell:
    path = project.evaluation(model, category) / "evaluation.json"
    if not path.exists():
        raise StageError(f"{path}: not there; run `blemish evaluate {model} {category}`, or `dvc repro` for everything")
    evaluation = read_json(path)
    onnx = project.export(model, category) / "model.onnx"
    return {
        "model": model,
        "category": category,
        "run_id": evaluation["run_id"],
        "settings": evaluation["settings"],
        **evaluation["metrics"],
        "onnx_megabytes": round(onnx.stat().st_size / 1e6, 2) if onnx.exists() else None,
        "threshold": evaluation["threshold"],
        "counts": evaluation["counts"],
        "defects": evaluation["defects"],
    }


def _average(model: str, cells: Sequence[Cell]) -> Cell:
    """Macro average: each category weighs the same; a metric that some category lacks has no average."""
    row: Cell = {"model": model, "category": "average"}
    for column in COLUMNS:
        values = [cell.get(column.key) for cell in cells]
        known = [value for value in values if value is not None]
        row[column.key] = sum(known) / len(known) if column.is_metric and len(known) == len(values) else None
    return row


def one_line(metrics: dict[str, float | None]) -> str:
    """The main figures of one evaluation, for the terminal."""
    shown = [c for c in COLUMNS if c.key in ("image_auroc", "recall", "false_alarms", "pixel_auroc", "aupro_30")]
    return ", ".join(f"{c.title} {c.show(metrics.get(c.key))}" for c in shown)


def _write_leaderboard(path: Path, cells: Sequence[Cell]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["cell", "model", "category", *(c.key for c in COLUMNS)], extrasaction="ignore")
        writer.writeheader()
        writer.writerows({**cell, "cell": f"{cell['model']}-{cell['category']}"} for cell in cells)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], num_names: int = 2) -> str:
    """The first `num_names` columns to the left, numbers to the right."""
    rule = ["---" if i < num_names else "---:" for i in range(len(header))]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])


def leaderboard_table(summary: Summary) -> str:
    """Cells grouped by model, each group closed by its average if there are several categories."""
    columns = [c for c in COLUMNS if any(cell.get(c.key) is not None for cell in summary["cells"])]
    rows = []
    for average in summary["averages"]:
        group = [cell for cell in summary["cells"] if cell["model"] == average["model"]]
        rows += [_row(cell, columns) for cell in group]
        if len(group) > 1:
            rows.append([f"**{text}**" if text != "-" else "" for text in _row(average, columns)])
    return markdown_table(["Model", "Category", *(c.title for c in columns)], rows)


def _row(cell: Cell, columns: Sequence[Column]) -> list[str]:
    return [cell["model"], cell["category"], *(c.show(cell.get(c.key)) for c in columns)]


def threshold_table(summary: Summary) -> str:
    """Where each decision threshold comes from, and what so few held-out parts can promise."""
    header = [
        "Model",
        "Category",
        "Held-out",
        "Threshold",
        "Asked",
        "Expected",
        "95 % interval",
        "Seen on test",
        "Oracle",
    ]
    rows = []
    for cell in summary["cells"]:
        t, good = cell["threshold"], cell["counts"]["test_normal"]
        rows.append(
            [
                cell["model"],
                cell["category"],
                str(t["num_images"]),
                f"{t['value']:.4g}",
                _percent(t["rate_requested"]) + ("" if t["attainable"] else " †"),
                _percent(t["expected_rate"]),
                f"{_percent(t['interval_low'])} to {_percent(t['interval_high'])}",
                f"{_percent(cell['false_alarms'])} of {good}",
                "-" if t["oracle"] is None else f"{t['oracle']:.4g}",
            ]
        )
    text = markdown_table(header, rows)
    if any(not cell["threshold"]["attainable"] for cell in summary["cells"]):
        text += "\n\n† Too few held-out parts to promise this rate: the threshold is their highest score."
    return text


def defect_table(summary: Summary) -> str:
    """Recall at the deployed threshold per defect type, which an average over types hides."""
    rows = [
        [
            cell["model"],
            cell["category"],
            defect,
            str(found["count"]),
            _percent(found["recall"]),
            _percent(found["auroc"]),
        ]
        for cell in summary["cells"]
        for defect, found in cell["defects"].items()
    ]
    return markdown_table(["Model", "Category", "Defect", "Images", "Found", "Image AUROC"], rows, num_names=3)


def _markdown(summary: Summary, project: Project) -> str:
    pictures = [
        f"### {cell['model']} on {cell['category']}\n\n"
        f"![examples](../evaluations/{cell['model']}/{quote(cell['category'])}/examples.png)\n\n"
        f"![curves](../evaluations/{cell['model']}/{quote(cell['category'])}/curves.png)"
        for cell in summary["cells"]
        if (project.evaluation(cell["model"], cell["category"]) / "examples.png").exists()
    ]
    parts = [
        "# Report",
        leaderboard_table(summary),
        NOTES,
        "## Thresholds",
        threshold_table(summary),
        "*Expected* and its interval are the false-alarm rate on further good parts like the held-out ones, whatever "
        "the distribution of scores (order statistics). *Oracle* is what F1-max would choose by looking at the test "
        "images; it is never used.",
        "## Defect types",
        defect_table(summary),
        "## Examples",
        "Input, true mask, anomaly map over the input, predicted mask; from the best hits to the worst misses.",
        *pictures,
    ]
    return "\n\n".join(parts) + "\n"


def print_results(project: Project, console: "Console") -> None:
    """The leaderboard in the terminal, and where to look next.

    Raises:
        StageError: there is no report yet.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    path = project.reports / "summary.json"
    if not path.exists():
        raise StageError(f"{path}: no report yet; run `make demo` or `dvc repro`")
    summary = read_json(path)
    shown = [c for c in COLUMNS if c.key not in ("image_ap", "pixel_ap", "aupro_05", "image_f1_max", "pixel_f1_max")]
    table = Table(
        title="Percent; averages weigh categories alike", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for title in ("Model", "Category"):
        table.add_column(title, no_wrap=True)
    for column in shown:
        table.add_column(column.title.replace(" ", "\n"), justify="right", no_wrap=True)
    for average in summary["averages"]:
        for cell in [c for c in summary["cells"] if c["model"] == average["model"]]:
            table.add_row(*_row(cell, shown))
        if len(summary["categories"]) > 1:
            table.add_row(*_row(average, shown), style="bold", end_section=True)
    console.print(table)
    first = summary["cells"][0]
    example = project.evaluation(first["model"], first["category"]) / "examples.png"
    onnx = project.export(first["model"], first["category"]) / "model.onnx"
    console.print(f"The whole report:    {project.reports / 'report.md'}")
    console.print(f"Defects found:       {example}")
    console.print("Compare runs:        make ui")
    console.print(f"Use a model:         blemish predict {onnx} IMAGE_OR_FOLDER", soft_wrap=True)
