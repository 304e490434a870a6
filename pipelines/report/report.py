"""The summary of all cells as tables for the terminal, the README, MLflow and the report's folder."""

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from pipelines.errors import StageError
from pipelines.evaluation.certainty import AVERAGE, METRICS
from pipelines.files import atomic_folder, read_json, write_json
from pipelines.paths import Project
from pipelines.report.field_tables import write_tables
from pipelines.report.summary import Cell, Summary, summarise
from pipelines.settings.params import Params

if TYPE_CHECKING:
    from rich.console import Console

_SPOKEN_OF = ("image_auroc", "aupro_30")  # metrics whose comparisons are written out
_SEED_METRICS = ("image_auroc", "pixel_auroc", "pixel_f1_max", "aupro_30")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _one_digit(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _interval(value: Sequence[float] | None) -> str:
    return "-" if value is None else f"{100 * value[0]:.1f} to {100 * value[1]:.1f}"


@dataclass(frozen=True, slots=True)
class Column:
    """A number of the leaderboard."""

    key: str
    title: str
    show: Callable[[Any], str]


COLUMNS = (
    *(Column(metric.key, metric.title + " (oracle)" * metric.oracle, _percent) for metric in METRICS),
    Column("train_steps", "Steps", _count),
    Column("train_seconds", "Train, s", _seconds),
    Column("latency_ms", "Latency, ms", _one_digit),
    Column("onnx_megabytes", "ONNX, MB", _one_digit),
)

NOTES = """\
Percentages. AUROC and AP need no threshold, F1-max chooses it on the test images (hence *oracle*). *Defects found* \
and *false alarms* are decisions at the deployed threshold, which comes from held-out good parts alone. AUPRO is \
integrated to a false-positive rate of 0.3 and of 0.05. The average weighs every category alike. *95 %* is the \
interval of the figure before it over the test images, good and defective ones drawn apart. *Latency* is the median \
time from a file to a decision, one image at a time."""


def report(params: Params, project: Project) -> Path:
    """Write `reports/`: summary.json, tables, report.md, report.html; log the averages to MLflow; gives report.md.

    The best model of each category becomes its champion in the model registry.

    Raises:
        StageError: a cell of the params file has not been evaluated.
    """
    from pipelines.report import page as html_report
    from pipelines.tracking import runs as tracking

    experiment = params.tracking.experiment
    pages = tracking.pages(project.root, experiment)
    summary = summarise(params, project, tracking.cell_runs(project.root, experiment), pages)
    with atomic_folder(project.reports) as folder:
        write_json(folder / "summary.json", summary)
        _write_leaderboard(folder / "leaderboard.csv", summary["cells"])
        write_tables(folder, summary)
        (folder / "report.md").write_text(_markdown(summary, project), encoding="utf-8")
        html_report.write(summary, project, folder)
    run_ids = sorted(cell["run_id"] for cell in summary["cells"])
    key = hashlib.sha256(json.dumps(run_ids).encode()).hexdigest()[:16]
    with tracking.summary_run(project.root, experiment, key) as run:
        for row in summary["averages"]:
            run.metrics({f"{row['model']}.{c.key}": row[c.key] for c in COLUMNS if row.get(c.key) is not None})
        run.tags({"cells": " ".join(run_ids), "categories": ", ".join(summary["categories"])})
        run.describe("\n".join([*(f"- {line}" for line in headlines(summary)), "", "The tables are under `report/`."]))
        for name in ("report.html", "report.md", "tables.md", "leaderboard.csv", "summary.json"):
            run.file(project.reports / name, "report")
    for category, run_id, why in _crowned(summary):
        tracking.crown(project.root, experiment, f"{summary['data_set']}-{category}", run_id, why)
    return project.reports / "report.md"


def _crowned(summary: Summary) -> Iterator[tuple[str, str | None, str]]:
    """Each category with the run of its best model by the main metric, None without a best, and the reason in words."""
    metric = next(m for m in summary["metrics"] if m["key"] == summary["main_metric"])
    places = summary["champions"].get(metric["key"], {})
    for category in summary["categories"]:
        found = places.get(category, {"best": None, "tied_with": [], "reason": "nothing to compare by"})
        cell = next((c for c in summary["cells"] if (c["model"], c["category"]) == (found["best"], category)), None)
        if cell is None:
            yield category, None, found["reason"]
            continue
        tied = f"; not distinguishable from {', '.join(found['tied_with'])}" if found["tied_with"] else ""
        yield category, cell["run_id"], f"{cell['model']}: {metric['title']} {_percent(cell[metric['key']])}{tied}"


def one_line(metrics: dict[str, float | None]) -> str:
    """The main figures of one evaluation, for the terminal."""
    shown = [c for c in COLUMNS if c.key in ("image_auroc", "recall", "false_alarms", "pixel_auroc", "aupro_30")]
    return ", ".join(f"{c.title} {c.show(metrics.get(c.key))}" for c in shown)


def _write_leaderboard(path: Path, cells: Sequence[Cell]) -> None:
    """A row per cell: each metric with the ends of its interval, and the test images behind them."""
    ends = [f"{metric.key}_{end}" for metric in METRICS for end in ("low", "high")]
    names = ["cell", "model", "category", "seed", "test_normal", "test_anomalous", *(c.key for c in COLUMNS), *ends]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        for cell in cells:
            intervals = {
                f"{key}_{end}": value
                for key, interval in cell["intervals"].items()
                for end, value in zip(("low", "high"), interval, strict=True)
            }
            writer.writerow({**cell, **cell["counts"], **intervals, "cell": f"{cell['model']}-{cell['category']}"})


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], num_names: int = 2) -> str:
    """The first `num_names` columns to the left, numbers to the right."""
    rule = ["---" if i < num_names else "---:" for i in range(len(header))]
    escaped = [[text.replace("|", "\\|") for text in row] for row in [header, rule, *rows]]
    return "\n".join(f"| {' | '.join(row)} |" for row in escaped)


def leaderboard_table(summary: Summary) -> str:
    """Cells grouped by model, each group closed by its average if there are several categories.

    A report of an earlier version has neither intervals nor latencies, and no columns for them.
    """
    columns = [c for c in COLUMNS if any(cell.get(c.key) is not None for cell in summary["cells"])]
    header = ["Model", "Category", *(c.title for c in columns)]
    if with_intervals := any("intervals" in cell for cell in summary["cells"]):
        header = ["Model", "Category", "Test images", columns[0].title, "95 %", *(c.title for c in columns[1:])]
    rows = []
    for row in summary["averages"]:
        group = [cell for cell in summary["cells"] if cell["model"] == row["model"]]
        rows += [_row(cell, columns, with_intervals) for cell in group]
        if len(group) > 1:
            rows.append([f"**{text}**" if text != "-" else "" for text in _row(row, columns, with_intervals)])
    return markdown_table(header, rows)


def _row(cell: Cell, columns: Sequence[Column], with_intervals: bool) -> list[str]:
    names, figures = [cell["model"], cell["category"]], [c.show(cell.get(c.key)) for c in columns]
    if not with_intervals:
        return [*names, *figures]
    return [*names, _test_images(cell), figures[0], _interval(cell["intervals"].get(columns[0].key)), *figures[1:]]


def _test_images(cell: Cell) -> str:
    """Good and defective ones; the sum of both for an average."""
    if "num_test_images" in cell:
        return str(cell["num_test_images"])
    return f"{cell['counts']['test_normal']} + {cell['counts']['test_anomalous']}"


def champion_table(summary: Summary) -> str:
    """Who is best by each of the field's metrics, with those that cannot be told from it."""
    metrics = [metric for metric in METRICS if metric.key in summary["champions"]]
    rows = [
        [place, *(_champion(summary["champions"][metric.key][place]) for metric in metrics)]
        for place in (*summary["categories"], AVERAGE)
    ]
    return markdown_table(["Category", *(metric.title for metric in metrics)], rows, num_names=1 + len(metrics))


def _champion(found: Mapping[str, Any]) -> str:
    return "-" if found["best"] is None else " = ".join([found["best"], *found["tied_with"]])


def sentences(summary: Summary, metrics: Sequence[str] = _SPOKEN_OF) -> list[str]:
    """The comparisons of the averages in words: every pair of models."""
    titles = {metric["key"]: metric["title"] for metric in summary["metrics"]}
    return [
        f"{titles[found['metric']]}: {found['text']}."
        for metric in metrics
        for found in summary["comparisons"]
        if found["metric"] == metric and found["category"] == AVERAGE
    ]


def headlines(summary: Summary) -> list[str]:
    """The averages of each model, and who beats whom."""
    titles = {metric["key"]: metric["title"] for metric in summary["metrics"]}
    figures = [
        ", ".join(
            f"{titles[key]} {_percent(row[key])} ({_interval(row['intervals'].get(key))})"
            for key in _SPOKEN_OF
            if row[key] is not None
        )
        for row in summary["averages"]
    ]
    rows = zip(summary["averages"], figures, strict=True)
    return [*(f"{row['model']}: {text or 'no defect to find'}" for row, text in rows), *sentences(summary)]


def against_the_best(summary: Summary) -> list[str]:
    """The best average of the main metric compared with every other, in words; every pair where there is no best."""
    places = summary["champions"].get(summary["main_metric"])
    best = places[AVERAGE]["best"] if places else None
    pairs = [pair for pair in summary["comparisons"] if best is None or best in (pair["a"], pair["b"])]
    return sentences({**summary, "comparisons": pairs}, [summary["main_metric"]])


def seed_table(summary: Summary) -> str:
    """Mean and spread over the seeds of cells and averages that have several."""
    rows = [
        [cell["model"], cell["category"], ", ".join(map(str, cell["seeds"]["seeds"])), *_spreads(cell["seeds"])]
        for cell in (*summary["cells"], *summary["averages"])
        if cell["seeds"]
    ]
    return markdown_table(["Model", "Category", "Seeds", *_seed_titles(summary)], rows, num_names=3) if rows else ""


def _seed_titles(summary: Summary) -> list[str]:
    return [metric["title"] for metric in summary["metrics"] if metric["key"] in _SEED_METRICS]


def _spreads(seeds: Mapping[str, Any]) -> list[str]:
    found = [seeds["metrics"].get(key) for key in _SEED_METRICS]
    return ["-" if s is None else f"{100 * s['mean']:.1f} ± {100 * s['sd']:.1f}" for s in found]


def latency_table(summary: Summary) -> str:
    """Percentiles by part, and the machine they were measured on."""
    rows = []
    for cell in summary["cells"]:
        if (found := cell["latency"]) is None:
            continue
        parts = [found["milliseconds"][part] for part in ("decode", "resize", "network", "postprocess", "total")]
        shown = [" / ".join(f"{part[p]:.1f}" for p in ("p50", "p95", "p99")) for part in parts]
        throughput = found["throughput"]
        rows.append(
            [
                cell["model"],
                cell["category"],
                *shown,
                f"{throughput['images_per_second']:.1f} in batches of {throughput['batch_size']}",
                str(found["num_runs"]),
            ]
        )
    if not rows:
        return ""
    header = ["Model", "Category", "Decode", "Resize", "Network", "Post-processing", "Total", "Images/s", "Runs"]
    return markdown_table(header, rows)


def latency_machines(cells: Iterable[Cell]) -> str:
    """Where the latencies were measured; several machines are not to be compared."""
    found = {
        f"{cell['latency']['hardware']}, {cell['latency']['threads']} thread"
        f"{'s' if cell['latency']['threads'] > 1 else ''}, ONNX Runtime {cell['latency']['onnxruntime']}"
        for cell in cells
        if cell["latency"]
    }
    several = "Several machines, whose figures cannot be compared: " if len(found) > 1 else ""
    return several + "; ".join(sorted(found))


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
            _interval(found["recall_interval"]),
            _percent(found["recall_at_rate"]),
            _percent(found["auroc"]),
        ]
        for cell in summary["cells"]
        for defect, found in cell["defects"].items()
    ]
    header = [
        "Model",
        "Category",
        "Defect",
        "Images",
        "Found",
        "95 %",
        "Found at the same rate (oracle)",
        "Image AUROC",
    ]
    return markdown_table(header, rows, num_names=3)


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
        "As the field prints them, next to published results where there are any: [tables.md](tables.md).",
        *_comparison_parts(summary),
        *_seed_parts(summary),
        "## Thresholds",
        threshold_table(summary),
        "*Expected* and its interval are the false-alarm rate on further good parts like the held-out ones, whatever "
        "the distribution of scores (order statistics). *Oracle* is what F1-max would choose by looking at the test "
        "images; it is never used.",
        "## Defect types",
        defect_table(summary),
        "*Found* is at the deployed threshold, with the interval of Clopper and Pearson. Thresholds of different "
        "models let different shares of the good test images through; *at the same rate*, all let through the share "
        "that was asked for, which only the test images can tell.",
        *_latency_parts(summary),
        "## Examples",
        "The best hits, the worst misses and the worst false alarms of each model on each category.",
        *pictures,
    ]
    return "\n\n".join(parts) + "\n"


def _comparison_parts(summary: Summary) -> list[str]:
    if len(summary["models"]) < 2:
        return []
    return [
        "## Who is best",
        champion_table(summary),
        "The first of each is the highest figure; what stands after *=* cannot be told from it on these test images.",
        "\n".join(f"- {sentence}" for sentence in sentences(summary)),
        "Points of a hundred, ± half the 95 % interval of the difference on the same test images, and over seeds where "
        "several are known. One in twenty comparisons of equal models is called a difference by chance.",
    ]


def _seed_parts(summary: Summary) -> list[str]:
    table = seed_table(summary)
    if not table:
        return ["One seed each: the intervals tell nothing of what another training would have given."]
    return ["## Seeds", table, "Mean ± standard deviation over runs that differ in nothing but `train.seed`."]


def _latency_parts(summary: Summary) -> list[str]:
    table = latency_table(summary)
    if not table:
        return []
    note = "Milliseconds of one image at a time, p50 / p95 / p99"
    return ["## Latency", table, f"{note}, on {latency_machines(summary['cells'])}."]


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
    interval = cell["intervals"].get(columns[0].key)
    ends = "-" if interval is None else f"{100 * interval[0]:.0f}-{100 * interval[1]:.0f}"
    first, *rest = (column.show(cell.get(column.key)) for column in columns)
    return [cell["model"], cell["category"], _test_images(cell).replace(" ", ""), first, ends, *rest]
