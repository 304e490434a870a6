"""The summary as tables and sentences for report.md, the README and MLflow."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from pipelines.evaluation.certainty import AVERAGE, Comparison
from pipelines.evaluation.measures import METRIC_BY_KEY, METRICS, PROMISED
from pipelines.evaluation.outcomes import GROUP_COLUMNS, NOTHING_TO_TEST_ON
from pipelines.names import in_markdown
from pipelines.numbers import UNKNOWN, count, decimal, interval, percent, rate, score, seconds, spread
from pipelines.paths import CURVES_PICTURE, Project
from pipelines.report.seeds import SeedFigures
from pipelines.report.summary import MAIN_METRIC, Average, CellSummary, Summary, leaders

_SPOKEN_OF = ("image_auroc", "aupro_30", "spro_05")  # metrics whose comparisons are written out
_FIRST = ("image_auroc", "recall", "false_alarms", "pixel_auroc", "aupro_30", "spro_05")  # where there is room for few
_SEED_METRICS = ("image_auroc", "recall", "false_alarms", "pixel_auroc", "pixel_f1_max", "aupro_30", "spro_05")
_SEED_NOTE = "Mean ± standard deviation over runs that differ in nothing but their seed (`train.seeds`)."


@dataclass(frozen=True, slots=True)
class Column:
    """A number of the leaderboard."""

    key: str
    title: str
    show: Callable[[float | None], str]

    def of(self, row: CellSummary | Average) -> str:
        return self.show(row.figures.get(self.key))


def _of_metrics() -> Iterator[Column]:
    """Beside the false alarms that the test images raised, the rate that the held-out ones can promise."""
    for metric in METRICS:
        yield Column(metric.key, metric.heading, percent)
        if metric.key == "false_alarms":
            yield Column(PROMISED, "Promised", percent)


COLUMNS = (
    *_of_metrics(),
    Column("train_steps", "Steps", count),
    Column("train_seconds", "Train, s", seconds),
    Column("latency_ms", "Latency, ms", decimal),
    Column("onnx_megabytes", "ONNX, MB", decimal),
)


NOTES = """\
Percentages. AUROC and AP need no threshold, F1-max chooses it on the test images (hence *oracle*). *Defects found* \
and *false alarms* are decisions at the deployed threshold, which comes from held-out good parts alone; *promised* is \
the false-alarm rate that so few of them can promise on further good parts, whatever was asked for. *Pixel F1* is that \
of all test pixels at the deployed threshold of the map (SegF1 of MVTec AD 2). AUPRO is integrated to a false-positive \
rate of 0.3 and of 0.05, and so is sPRO to 0.05, which is in its place where a part of a defect may count as all \
(MVTec LOCO). The average weighs every category alike. *Test images* are \
good + defective ones; real defects that are *apart* are not among them, since a model learns from them. *95 %* is the \
interval of the figure before it over the test images, good and defective ones drawn apart. *Latency* is the median \
time from a file to a decision, one image at a time."""


ASSUMED = (
    "What is promised assumes that further good parts are exchangeable with the held-out ones: of the same days, lots "
    "and cameras. No groups were told apart (prepare.groups) that could show whether it holds on others."
)


def untested(summary: Summary) -> list[str]:
    """A sentence for each category that there is no image of to test on."""
    names = {cell.category: cell.counts.num_tested for cell in summary.cells}
    return [f"{name}: {NOTHING_TO_TEST_ON}." for name, number in names.items() if not number]


def promises(summary: Summary) -> str:
    """The false-alarm rate that the held-out parts of each category can promise, beside the one asked for."""
    places: dict[str, dict[str, None]] = {}
    for cell in summary.cells:
        places.setdefault(rate(cell.threshold.expected_rate), {})[cell.category] = None
    asked = rate(summary.cells[0].threshold.rate_requested)
    told = [f"{share} on {', '.join(names)}" for share, names in places.items()] if len(places) > 1 else list(places)
    return f"False alarms that the held-out good parts promise: {'; '.join(told)} (asked for: {asked})."


def absences(summary: Summary) -> list[str]:
    """A sentence for each cell of params.yaml that the report lacks, or that lacks an exported file."""
    return [f"{'Not exported' if cell.evaluated else 'Not in this report'}: {cell.text}" for cell in summary.absent]


def differing(summary: Summary) -> list[str]:
    """A sentence on the cells whose groups of held-out parts differ, if there are any."""
    cells = [f"{cell.model} on {cell.category}" for cell in summary.cells if cell.groups and cell.groups.differ]
    told = "Groups of held-out parts score differently, so that the promise does not hold for a new one"
    return [f"{told}: {', '.join(cells)}."] if cells else []


def inherited(summary: Summary) -> list[str]:
    """Who is champion of each category whose test is frozen, and who was refused."""
    return [line for category, found in summary.successions.items() for line in found.sentences(category)]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], num_names: int = 2) -> str:
    """The first `num_names` columns to the left, numbers to the right."""
    rule = ["---" if i < num_names else "---:" for i in range(len(header))]
    escaped = [[re.sub(r"(?<!\\)\|", r"\\|", text) for text in row] for row in [header, rule, *rows]]
    return "\n".join(f"| {' | '.join(row)} |" for row in escaped)


def leaderboard_table(summary: Summary) -> str:
    """Cells grouped by model, each group closed by its average if there are several categories.

    What no cell has is left out.
    """
    first, *others = (c for c in COLUMNS if any(c.of(cell) != UNKNOWN for cell in summary.cells))
    columns: list[tuple[str, Callable[[CellSummary | Average], str]]] = [
        ("Model", lambda row: row.model),
        ("Category", lambda row: in_markdown(row.category)),
        ("Test images", lambda row: row.counts.test_images),
        (first.title, first.of),
        ("95 %", lambda row: interval(row.intervals.get(first.key))),
        *(shown for column in others for shown in _with_groups(column)),
    ]
    columns = [(title, of) for title, of in columns if any(of(cell) != UNKNOWN for cell in summary.cells)]
    rows = []
    for average in summary.averages:
        group = [cell for cell in summary.cells if cell.model == average.model]
        rows += [[of(cell) for _, of in columns] for cell in group]
        if len(group) > 1:
            shown = [of(average) for _, of in columns]
            rows.append([f"**{text}**" if text != UNKNOWN else "" for text in shown])
    return markdown_table([title for title, _ in columns], rows)


def averages_table(summary: Summary) -> str:
    """A row per model, with the average over the categories of each metric that any model has one of."""
    return markdown_table(*_averages(summary, METRIC_BY_KEY), num_names=1)


def overview_table(summary: Summary) -> str:
    """The same of what matters first, with the size of the file."""
    header, rows = _averages(summary, _FIRST)
    whole = [[*row, decimal(average.onnx_megabytes_mean)] for row, average in zip(rows, summary.averages, strict=True)]
    return markdown_table([*header, "ONNX, MB"], whole, num_names=1)


def _averages(summary: Summary, keys: Iterable[str]) -> tuple[list[str], list[list[str]]]:
    """Header and rows, of the metrics that any model has an average of."""
    known = [key for key in keys if any(row.metrics.get(key) is not None for row in summary.averages)]
    rows = [[row.model, *(percent(row.metrics.get(key)) for key in known)] for row in summary.averages]
    return ["Model", *(METRIC_BY_KEY[key].heading for key in known)], rows


def _with_groups(column: Column) -> Iterator[tuple[str, Callable[[CellSummary | Average], str]]]:
    """A column of the leaderboard; beside what is promised, the false alarms of groups that set no threshold."""
    yield column.title, column.of
    if column.key == PROMISED:
        yield "Left-out groups", _left_out


def _left_out(row: CellSummary | Average) -> str:
    groups = row.groups if isinstance(row, CellSummary) else None
    if groups is None or groups.left_out is None:
        return UNKNOWN
    low, mean, high = groups.left_out
    return f"{percent(mean)} ({interval((low, high))})"


def results_tables(summary: Summary) -> str:
    """The leaderboard and, where several seeds are known, their spread below it."""
    seeds = seed_table(summary)
    return "\n\n".join([leaderboard_table(summary), *([_SEED_NOTE, seeds] if seeds else [])])


def champion_table(summary: Summary) -> str:
    """Who is best by each of the field's metrics, with those that cannot be told from it."""
    metrics = [metric for metric in METRICS if metric.key in summary.champions]
    best = [summary.champions[metric.key] for metric in metrics]
    rows = [
        [in_markdown(place), *(" = ".join(leaders(found[place])) or UNKNOWN for found in best)]
        for place in (*summary.categories, AVERAGE)
    ]
    return markdown_table(["Category", *(metric.title for metric in metrics)], rows, num_names=1 + len(metrics))


def sentences(comparisons: Sequence[Comparison], metrics: Sequence[str] = _SPOKEN_OF) -> list[str]:
    """Those of the averages in words."""
    return [
        f"{METRIC_BY_KEY[metric].title}: {found.text}."
        for metric in metrics
        for found in comparisons
        if (found.metric, found.category) == (metric, AVERAGE)
    ]


def headlines(summary: Summary) -> list[str]:
    """The averages of each model, and who beats whom."""
    figures = [
        ", ".join(
            f"{METRIC_BY_KEY[key].title} {percent(row.metrics[key])} ({interval(row.intervals.get(key))})"
            for key in _SPOKEN_OF
            if row.metrics.get(key) is not None
        )
        for row in summary.averages
    ]
    rows = zip(summary.averages, figures, strict=True)
    nothing = "nothing to test on" if not any(cell.counts.num_tested for cell in summary.cells) else "no defect to find"
    lacking = {cell.model for cell in summary.absent if cell.without_figures}
    told = [f"{row.model}: {text or ('no average' if row.model in lacking else nothing)}" for row, text in rows]
    lacking_test = [*absences(summary), *untested(summary)]
    return [*told, *summary.variants, *lacking_test, *inherited(summary), *sentences(summary.comparisons)]


def against_the_best(summary: Summary) -> list[str]:
    """The best average of the main metric compared with every other, in words; every pair where there is no best."""
    champion = summary.champion(MAIN_METRIC, AVERAGE)
    best = champion.best if champion else None
    return sentences([c for c in summary.comparisons if best is None or best in (c.a, c.b)], [MAIN_METRIC])


def over_seeds(summary: Summary) -> list[str]:
    """The averages of the main metric over several seeds in one sentence, if there are any."""
    figures = [
        (row.model, row.seeds.seeds, row.seeds.metrics[MAIN_METRIC])
        for row in summary.averages
        if row.seeds and MAIN_METRIC in row.seeds.metrics
    ]
    told = []
    for seeds in dict.fromkeys(seeds for _, seeds, _ in figures):
        own = ", ".join(f"{model} {spread(found.mean, found.sd)}" for model, of, found in figures if of == seeds)
        told.append(f"{METRIC_BY_KEY[MAIN_METRIC].title} over seeds {', '.join(map(str, seeds))}: {own}")
    return told


def seed_table(summary: Summary) -> str:
    """Mean and spread over the seeds of cells and averages that have several."""
    several = [(row, row.seeds) for row in (*summary.cells, *summary.averages) if row.seeds]
    shown = [key for key in _SEED_METRICS if key != "spro_05" or any(key in seeds.metrics for _, seeds in several)]
    rows = [
        [row.model, in_markdown(row.category), ", ".join(map(str, seeds.seeds)), *_spreads(seeds, shown)]
        for row, seeds in several
    ]
    titles = [METRIC_BY_KEY[key].title for key in shown]
    return markdown_table(["Model", "Category", "Seeds", *titles], rows, num_names=3) if rows else ""


def _spreads(seeds: SeedFigures, metrics: Iterable[str]) -> list[str]:
    found = [seeds.metrics.get(key) for key in metrics]
    return [UNKNOWN if figure is None else spread(figure.mean, figure.sd) for figure in found]


def latency_table(summary: Summary) -> str:
    """Percentiles by part, and the machine they were measured on."""
    rows = [
        [
            f"{cell.model}{name}",
            in_markdown(cell.category),
            *(" / ".join(map(decimal, (part.p50, part.p95, part.p99))) for _, part in latency.milliseconds),
            f"{decimal(latency.throughput.images_per_second)} in batches of {latency.throughput.batch_size}",
            str(latency.num_runs),
        ]
        for cell in summary.cells
        if cell.latency
        for name, latency in (("", cell.latency), (", int8", cell.latency.int8))
        if latency
    ]
    if not rows:
        return ""
    header = ["Model", "Category", "Decode", "Resize", "Network", "Post-processing", "Total", "Images/s", "Runs"]
    return markdown_table(header, rows)


def latency_machines(cells: Iterable[CellSummary]) -> str:
    """Where the latencies were measured; several machines are not to be compared."""
    latencies = [cell.latency for cell in cells if cell.latency]
    found = {
        f"{latency.hardware}, {latency.threads} thread{'s' if latency.threads > 1 else ''}, "
        f"ONNX Runtime {latency.onnxruntime}"
        for latency in latencies
    }
    several = "Several machines, whose figures cannot be compared: " if len(found) > 1 else ""
    return several + "; ".join(sorted(found))


def threshold_table(summary: Summary) -> str:
    """Where each decision threshold comes from, and what so few held-out parts can promise."""
    header = ["Held-out", "Threshold", "Asked", "Expected", "95 % interval", "Seen on test", "Oracle"]
    text = markdown_table(["Model", "Category", *header], [_threshold_row(cell) for cell in summary.cells])
    if any(not cell.threshold.attainable for cell in summary.cells):
        text += "\n\n† Too few held-out parts to promise this rate: the threshold is their highest score."
    return text


def _threshold_row(cell: CellSummary) -> list[str]:
    t = cell.threshold
    return [
        cell.model,
        in_markdown(cell.category),
        str(t.num_images),
        score(t.value),
        percent(t.rate_requested) + ("" if t.attainable else " †"),
        percent(t.expected_rate),
        interval((t.interval_low, t.interval_high)),
        f"{percent(cell.metrics['false_alarms'])} of {cell.counts.test_normal}",
        score(t.oracle),
    ]


def defect_table(summary: Summary) -> str:
    """Recall at the deployed threshold per defect type, which an average over types hides."""
    rows = [
        [
            cell.model,
            in_markdown(cell.category),
            in_markdown(defect),
            str(found.count),
            percent(found.recall),
            interval(found.recall_interval),
            percent(found.recall_at_rate),
            percent(found.auroc),
        ]
        for cell in summary.cells
        for defect, found in cell.defects.items()
    ]
    header = ["Defect", "Images", "Found", "95 %", "Found at the same rate (oracle)", "Image AUROC"]
    return markdown_table(["Model", "Category", *header], rows, num_names=3)


def _address(place: Path, path: Path) -> str:
    """Of a file of the project, from the folder of the report."""
    return quote(Path(os.path.relpath(path, place)).as_posix())


def report_markdown(summary: Summary, project: Project, place: Path) -> str:
    """For report.md in `place`."""
    pictures = [
        f"### {cell.model} on {in_markdown(cell.category)}\n\n"
        f"![examples]({_address(place, found.examples)})\n\n"
        f"![curves]({_address(place, found.evaluated / CURVES_PICTURE)})"
        for cell in summary.cells
        if (found := project.cell(cell.model, cell.category, cell.seed)).examples.exists()
    ]
    parts = [
        "# Report",
        leaderboard_table(summary),
        *(f"{sentence}." for sentence in summary.variants),
        *absences(summary),
        *untested(summary),
        " ".join([NOTES, *(f"{region[0].upper()}{region[1:]}." for region in summary.regions)]),
        "As the field prints them, next to published results where there are any: [tables.md](tables.md).",
        *_champion_parts(summary),
        *_comparison_parts(summary),
        *_seed_parts(summary),
        "## Thresholds",
        threshold_table(summary),
        "*Expected* and its interval are the false-alarm rate on further good parts like the held-out ones, whatever "
        "the distribution of scores (order statistics); where good parts score exactly alike, or calibrate the model "
        "too, or all are learnt from (folds), it is at most that. *Oracle* is what F1-max would choose by looking at "
        "the test images; it is never used.",
        *_review_parts(summary),
        *_group_parts(summary),
        *_defect_parts(summary),
        *_latency_parts(summary),
    ]
    if pictures:
        parts += [
            "## Examples",
            "The best hits, the worst misses and the worst false alarms of each model on each category.",
            *pictures,
        ]
    return "\n\n".join(parts) + "\n"


def _review_parts(summary: Summary) -> list[str]:
    """What is rejected without a look, and how many good parts a person looks at."""
    rows = [
        [
            cell.model,
            in_markdown(cell.category),
            score(cell.threshold.value),
            "never" if cell.review.reject_above is None else score(cell.review.reject_above),
            f"{cell.review.num_images} {cell.review.comes_from}",
            percent(cell.review.expected_load),
            interval((cell.review.load_low, cell.review.load_high)),
        ]
        for cell in summary.cells
        if cell.review is not None
    ]
    if not rows:
        return []
    header = [
        "Model",
        "Category",
        "Accepted up to",
        "Rejected above",
        "By",
        "Good parts to a person, %",
        "95 % interval",
    ]
    return [
        "## Three answers",
        markdown_table(header, rows),
        "What scores between the two goes to a person. Above the second, a defect is rejected without a look; *never*: "
        "too few good parts were held out to say from where on, and no known defects score higher than they do.",
    ]


def _group_parts(summary: Summary) -> list[str]:
    """What the promise assumes, and where groups are known whether it holds between them."""
    known = [(cell, cell.groups) for cell in summary.cells if cell.groups]
    if not known:
        return [ASSUMED]
    rows = [
        [cell.model, in_markdown(cell.category), in_markdown(name), *figures]
        for cell, groups in known
        for name, *figures in groups.table()
    ]
    told = [f"- {cell.model} on {in_markdown(cell.category)}: {in_markdown(groups.text)}." for cell, groups in known]
    others = sorted({cell.category for cell in summary.cells if not cell.groups})
    return [
        "## Groups",
        "\n".join(told),
        markdown_table(["Model", "Category", *GROUP_COLUMNS], rows, num_names=3),
        "Good parts by `prepare.groups`, those with the most false alarms first. *At the others' threshold*: each "
        "held-out group is left out once, and the threshold set from the others; *left-out groups* gives the mean over "
        "groups, the lowest and the highest. *p* is that of the Kruskal-Wallis statistic of held-out scores, by "
        "permutation.",
        *([f"{in_markdown(', '.join(others))}: {ASSUMED}"] if others else []),
    ]


def _defect_parts(summary: Summary) -> list[str]:
    if not any(cell.defects for cell in summary.cells):
        return []
    return [
        "## Defect types",
        defect_table(summary),
        "*Found* is at the deployed threshold, with the interval of Clopper and Pearson. Thresholds of different "
        "models let different shares of the good test images through; *at the same rate*, all let through the share "
        "that was asked for, which only the test images can tell.",
    ]


def _champion_parts(summary: Summary) -> list[str]:
    told = inherited(summary)
    return ["## Champion", "\n".join(f"- {in_markdown(sentence)}" for sentence in told)] if told else []


def _comparison_parts(summary: Summary) -> list[str]:
    if len(summary.models) < 2 or not summary.champions:
        return []
    return [
        "## Who is best",
        champion_table(summary),
        "The first of each is the highest figure; what stands after *=* cannot be told from it on these test images.",
        "\n".join(f"- {sentence}" for sentence in sentences(summary.comparisons)),
        "Points of a hundred, on the same test images. *p* is how often two equally good models would differ as much "
        "by chance: that of the test images and, where several are known, that of the seeds. It allows for all pairs "
        "of models: among equally good ones, one table in twenty names a winner.",
    ]


def _seed_parts(summary: Summary) -> list[str]:
    table = seed_table(summary)
    if not table:
        return ["One seed each: the intervals tell nothing of what another training would have given."]
    return ["## Seeds", table, _SEED_NOTE]


def _latency_parts(summary: Summary) -> list[str]:
    table = latency_table(summary)
    if not table:
        return []
    images = " and ".join(sorted({cell.latency.images for cell in summary.cells if cell.latency}, reverse=True))
    note = f"Milliseconds of one image at a time ({images}), p50 / p95 / p99"
    return ["## Latency", table, f"{note}, on {latency_machines(summary.cells)}."]
