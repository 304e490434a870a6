"""The summary as tables and sentences for report.md, the README and MLflow."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from pipelines.evaluation.certainty import AVERAGE
from pipelines.evaluation.measures import METRICS
from pipelines.numbers import UNKNOWN, count, decimal, interval, percent, score, seconds, spread
from pipelines.paths import Project
from pipelines.report.summary import Cell, Summary

_SPOKEN_OF = ("image_auroc", "aupro_30")  # metrics whose comparisons are written out
_SEED_METRICS = ("image_auroc", "pixel_auroc", "pixel_f1_max", "aupro_30")


@dataclass(frozen=True, slots=True)
class Column:
    """A number of the leaderboard."""

    key: str
    title: str
    show: Callable[[Any], str]


COLUMNS = (
    *(Column(metric.key, metric.title + " (oracle)" * metric.oracle, percent) for metric in METRICS),
    Column("train_steps", "Steps", count),
    Column("train_seconds", "Train, s", seconds),
    Column("latency_ms", "Latency, ms", decimal),
    Column("onnx_megabytes", "ONNX, MB", decimal),
)


NOTES = """\
Percentages. AUROC and AP need no threshold, F1-max chooses it on the test images (hence *oracle*). *Defects found* \
and *false alarms* are decisions at the deployed threshold, which comes from held-out good parts alone. AUPRO is \
integrated to a false-positive rate of 0.3 and of 0.05. The average weighs every category alike. *95 %* is the \
interval of the figure before it over the test images, good and defective ones drawn apart. *Latency* is the median \
time from a file to a decision, one image at a time."""


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
            rows.append([f"**{text}**" if text != UNKNOWN else "" for text in _row(row, columns, with_intervals)])
    return markdown_table(header, rows)


def _row(cell: Cell, columns: Sequence[Column], with_intervals: bool) -> list[str]:
    names, figures = [cell["model"], cell["category"]], [c.show(cell.get(c.key)) for c in columns]
    if not with_intervals:
        return [*names, *figures]
    return [*names, test_images(cell), figures[0], interval(cell["intervals"].get(columns[0].key)), *figures[1:]]


def test_images(cell: Cell) -> str:
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
    return UNKNOWN if found["best"] is None else " = ".join([found["best"], *found["tied_with"]])


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
            f"{titles[key]} {percent(row[key])} ({interval(row['intervals'].get(key))})"
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
    return [UNKNOWN if s is None else spread(s["mean"], s["sd"]) for s in found]


def latency_table(summary: Summary) -> str:
    """Percentiles by part, and the machine they were measured on."""
    rows = []
    for cell in summary["cells"]:
        if (found := cell["latency"]) is None:
            continue
        parts = [found["milliseconds"][part] for part in ("decode", "resize", "network", "postprocess", "total")]
        shown = [" / ".join(decimal(part[p]) for p in ("p50", "p95", "p99")) for part in parts]
        throughput = found["throughput"]
        rows.append(
            [
                cell["model"],
                cell["category"],
                *shown,
                f"{decimal(throughput['images_per_second'])} in batches of {throughput['batch_size']}",
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
                score(t["value"]),
                percent(t["rate_requested"]) + ("" if t["attainable"] else " †"),
                percent(t["expected_rate"]),
                interval((t["interval_low"], t["interval_high"])),
                f"{percent(cell['false_alarms'])} of {good}",
                score(t["oracle"]),
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
            percent(found["recall"]),
            interval(found["recall_interval"]),
            percent(found["recall_at_rate"]),
            percent(found["auroc"]),
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


def report_markdown(summary: Summary, project: Project) -> str:
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
