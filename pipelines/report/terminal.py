"""The summary in the terminal."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipelines.errors import StageError
from pipelines.files import read_json
from pipelines.numbers import narrow_interval
from pipelines.paths import Project
from pipelines.report.markdown import COLUMNS, Column, against_the_best, test_images
from pipelines.report.summary import Cell

if TYPE_CHECKING:
    from rich.console import Console


def one_line(metrics: dict[str, float | None]) -> str:
    """The main figures of one evaluation, for the terminal."""
    shown = [c for c in COLUMNS if c.key in ("image_auroc", "recall", "false_alarms", "pixel_auroc", "aupro_30")]
    return ", ".join(f"{c.title} {c.show(metrics.get(c.key))}" for c in shown)


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
    shown = [c for c in COLUMNS if c.key in ("image_auroc", "recall", "false_alarms", "aupro_30", "latency_ms")]
    console.print("Percent; averages weigh categories alike; 95 % is the interval of the AUROC", highlight=False)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=0)  # the box alone keeps columns apart
    for title in ("Model", "Category"):
        table.add_column(title, no_wrap=True)
    for title in ("Test\nimages", "Image\nAUROC", "95 %", "Defects\nfound", "False\nalarms", "AUPRO\n0.3", "Time,\nms"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in summary["averages"]:
        for cell in [c for c in summary["cells"] if c["model"] == row["model"]]:
            table.add_row(*_short_row(cell, shown))
        if len(summary["categories"]) > 1:
            table.add_row(*_short_row(row, shown), style="bold", end_section=True)
    console.print(table)
    for sentence in against_the_best(summary):
        console.print(sentence, highlight=False)
    first = summary["cells"][0]
    example = project.evaluation(first["model"], first["category"]) / "examples.png"
    onnx = project.export(first["model"], first["category"]) / "model.onnx"
    console.print(f"The whole report:    {project.reports / 'report.html'}")
    console.print(f"Defects found:       {example}")
    console.print("Compare runs:        make ui")
    console.print(f"Use a model:         blemish predict {onnx} IMAGE_OR_FOLDER", soft_wrap=True)


def _short_row(cell: Cell, columns: Sequence[Column]) -> list[str]:
    """For a terminal of 80 columns."""
    ends = narrow_interval(cell["intervals"].get(columns[0].key))
    first, *rest = (column.show(cell.get(column.key)) for column in columns)
    return [cell["model"], cell["category"], test_images(cell).replace(" ", ""), first, ends, *rest]
