"""Tables as the field prints them: one metric each, a row per method, the average first, then the categories.

In Markdown, CSV and LaTeX. Where the data set is MVTec AD, its categories come in the usual order and published results
stand below ours, with what keeps the two from being compared in footnotes.
"""

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipelines.evaluation.certainty import AVERAGE
from pipelines.names import in_markdown
from pipelines.numbers import UNKNOWN, decimal
from pipelines.report.literature import MVTEC_AD_ORDER, Published, is_mvtec_ad, load_published
from pipelines.report.markdown import untested
from pipelines.report.summary import Summary, leaders

FIELD_METRICS = {
    "image_auroc": "Image-Level AUC",
    "pixel_auroc": "Pixel-Level AUC",
    "pixel_f1_max": "Pixel F1 Score",
    "pixel_f1": "SegF1",
    "aupro_30": "AUPRO",
    "spro_05": "sPRO",
}
_OURS = "this run"
_METRIC_NOTES = {
    "pixel_f1_max": "Pixel F1 Score is an oracle number: its threshold is the best one for the test masks.",
    "pixel_f1": "SegF1 is the F1 of all test pixels at the deployed threshold, which held-out good parts set.",
    "aupro_30": "AUPRO is integrated to a false-positive rate of 0.3, exactly, over all test images.",
    "spro_05": "sPRO is integrated to a false-positive rate of 0.05, over the defects of all types together.",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One method's figures in percent; None where there is none."""

    method: str
    source: str
    average: float | None
    values: tuple[float | None, ...]  # by category
    best: frozenset[str]  # categories (or the average) where this is the best, or not distinguishable from it
    notes: tuple[str, ...]  # letters of the footnotes

    def shown(self, categories: Sequence[str], bold: str) -> list[str]:
        """The average, then the figure of each category; `bold` is the template of what is best."""
        figures = zip((AVERAGE, *categories), (self.average, *self.values), strict=True)
        return [bold.format(decimal(value)) if place in self.best else decimal(value) for place, value in figures]


@dataclass(frozen=True, slots=True)
class FieldTable:
    """One metric. `tests` are the test images of our rows: what to call them, then in all and by category."""

    metric: str
    title: str
    categories: tuple[str, ...]
    tests: tuple[tuple[str, ...], ...]
    rows: tuple[Row, ...]
    notes: Mapping[str, str]  # letter -> text

    def markdown(self) -> str:
        names = [in_markdown(category_title(category)) for category in self.categories]
        header = ["Method", "Avg", *names]
        lines = [header, ["---", *["---:"] * (len(header) - 1)]]
        lines += [[f"*{in_markdown(text)}*" for text in test] for test in self.tests]
        for row in self.rows:
            mark = f" <sup>{' '.join(row.notes)}</sup>" if row.notes else ""
            lines.append([in_markdown(row.method) + mark, *row.shown(self.categories, "**{}**")])
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        notes = "\n".join(f"- <sup>{letter}</sup> {text}" for letter, text in self.notes.items())
        parts = [f"## {self.title}", table, self._remark(), notes]
        return "\n\n".join(part for part in parts if part)

    def csv(self) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["method", "source", "average", *self.categories])
        writer.writerows([name.lower(), "", *numbers] for name, *numbers in self.tests)
        for row in self.rows:
            values = ("" if value is None else f"{value:.2f}" for value in (row.average, *row.values))
            writer.writerow([row.method, row.source, *values])
        return text.getvalue()

    def latex(self) -> str:
        """A booktabs table, no wider than the text whatever the number of categories."""
        names = [_escape_latex(category_title(category)) for category in self.categories]
        lines = [
            r"% needs \usepackage{adjustbox,booktabs,graphicx}",
            r"\begin{table}",
            rf"\caption{{{_escape_latex(self.title)}, \%. {_escape_latex(self._remark())}}}",
            r"\begin{adjustbox}{max width=\textwidth}",
            rf"\begin{{tabular}}{{l{'r' * (1 + len(names))}}}",
            r"\toprule",
            " & ".join(["Method", "Avg", *(rf"\rotatebox{{90}}{{{name}}}" for name in names)]) + r" \\",
            r"\midrule",
            *(" & ".join(map(_escape_latex, test)) + r" \\" for test in self.tests),
            *self._latex_rows(),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{adjustbox}",
            *(rf"\par\footnotesize ${{}}^{{{k}}}$ {_escape_latex(text)}" for k, text in self.notes.items()),
            r"\end{table}",
        ]
        return "\n".join(lines) + "\n"

    def _latex_rows(self) -> Iterator[str]:
        before = None
        for row in self.rows:
            if before is not None and (before == _OURS) != (row.source == _OURS):
                yield r"\midrule"
            before = row.source
            mark = f"$^{{{','.join(row.notes)}}}$" if row.notes else ""
            figures = row.shown(self.categories, r"\textbf{{{}}}")
            yield " & ".join([_escape_latex(row.method) + mark, *figures]) + r" \\"

    def _remark(self) -> str:
        several = sum(row.source == _OURS for row in self.rows) > 1
        bold = "Bold: the best of this run, and what cannot be told from it on these test images." if several else ""
        return " ".join(part for part in (bold, _METRIC_NOTES.get(self.metric, "")) if part)


def field_tables(summary: Summary) -> list[FieldTable]:
    """A table for each of the field's metrics that any cell has."""
    published: Sequence[Published] = ()
    categories = summary.categories
    if is_mvtec_ad({cell.category: cell.counts.train + cell.counts.holdout for cell in summary.cells}):
        published = load_published()
        categories = tuple(category for category in MVTEC_AD_ORDER if category in categories)
    tests = _tests(summary, categories)
    tables = []
    for metric, title in FIELD_METRICS.items():
        ours = [_our_row(summary, model, metric, categories) for model in summary.models]
        if all(value is None for row in ours for value in row.values):
            continue
        theirs, notes = _published_rows(published, metric, categories)
        if theirs:
            notes = {"*": _protocol(summary, categories), **notes}
            ours = [replace(row, notes=("*",)) for row in ours]
        tables.append(FieldTable(metric, title, categories, tests, (*ours, *theirs), notes))
    return tables


def _tests(summary: Summary, categories: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Good + defective test images, a line for all models, or for each group of them that was tested otherwise."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for model in summary.models:
        cells = [summary.rows.get((model, category)) for category in (AVERAGE, *categories)]
        groups.setdefault(tuple(cell.counts.test_images if cell else UNKNOWN for cell in cells), []).append(model)
    return tuple(
        ("Test images" if len(groups) == 1 else f"Test images of {', '.join(models)}", *numbers)
        for numbers, models in groups.items()
    )


def _our_row(summary: Summary, model: str, metric: str, categories: Sequence[str]) -> Row:
    places, rows = (AVERAGE, *categories), summary.rows
    champions = {place: summary.champion(metric, place) for place in places}
    best = frozenset(place for place, found in champions.items() if found and model in leaders(found))
    found = (rows[model, place].metrics.get(metric) if (model, place) in rows else None for place in places)
    average, *values = map(_times_100, found)
    return Row(model, _OURS, average, tuple(values), best, ())


def _published_rows(
    published: Sequence[Published], metric: str, categories: Sequence[str]
) -> tuple[list[Row], dict[str, str]]:
    """The rows of published figures and the footnotes, by letters in the order of their first use."""
    letters: dict[str, str] = {}  # text -> letter

    def letter(text: str) -> str:
        return letters.setdefault(text, _letter(len(letters)))

    rows = []
    for entry in published:
        if metric not in entry.metrics:
            continue
        average = entry.average(metric, categories)
        values = tuple(entry.metrics[metric].get(category) for category in categories)
        if average is None and all(value is None for value in values):
            continue
        notes = [letter(f"From: {entry.source}."), *(letter(f"{note[0].upper()}{note[1:]}.") for note in entry.notes)]
        rows.append(Row(entry.method, "published", average, values, frozenset(), tuple(notes)))
    return rows, {mark: text for text, mark in letters.items()}


def _protocol(summary: Summary, categories: Sequence[str]) -> str:
    """What our own rows rest on, which published ones do not share."""
    sizes = sorted({cell.protocol.image_size for cell in summary.cells})
    native = summary.cells[0].protocol.resolution == "native"
    taught = max(cell.counts.apart for cell in summary.cells)
    without = [model for model in summary.models if any(c.counts.apart for c in summary.cells if c.model == model)]
    whose = "any model" if len(without) == len(summary.models) else ", ".join(without)
    held_out = sum(cell.counts.holdout for cell in summary.cells) // len(summary.models)
    parts = [
        f"whole images at {', '.join(map(str, sizes))} pixels",
        "masks at their own size" if native else "masks resized by the nearest pixel",
        *summary.regions,
        "good test images included",
        "the last checkpoint, chosen without the test set",
        f"{held_out} good training images held out for thresholds" if held_out else "thresholds from folds",
    ]
    if taught:
        parts.append(
            f"up to {taught} real defects per category, from which the supervised method learns, are not in the test "
            f"of {whose}"
        )
    some = len(categories) < len(MVTEC_AD_ORDER)
    return f"This run: {'; '.join(parts)}." + (" Published averages are over the categories shown." if some else "")


def write_tables(folder: Path, summary: Summary) -> None:
    """tables.md with all of them; tables/<metric>.csv and .tex."""
    tables = field_tables(summary)
    (folder / "tables").mkdir()
    for table in tables:
        (folder / "tables" / f"{table.metric}.csv").write_text(table.csv(), encoding="utf-8")
        (folder / "tables" / f"{table.metric}.tex").write_text(table.latex(), encoding="utf-8")
    head = ["# Tables", "Percent; the average weighs every category alike.", *untested(summary)]
    text = "\n\n".join([*head, *(table.markdown() for table in tables)])
    (folder / "tables.md").write_text(text + "\n", encoding="utf-8")


def category_title(category: str) -> str:
    """As the field writes it: Metal Nut."""
    return category.replace("_", " ").title() if category in MVTEC_AD_ORDER else category


def _times_100(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _letter(number: int) -> str:
    """a, b, ..., z, aa, ab, ..."""
    return (_letter(number // 26 - 1) if number >= 26 else "") + chr(ord("a") + number % 26)


def _escape_latex(text: str) -> str:
    return re.sub(r"([&%$#_{}])", r"\\\1", text)
