"""`report.html`: one file with tables, galleries, a threshold to move, costs; it opens from the disk and works alone.

Tables are written here and complete without JavaScript; the script sorts them and draws the rest from embedded JSON,
one block per category, read when its page is opened. Names of categories, defects and files are other people's: Jinja
escapes them in the text, JSON blocks cannot be left from inside, the script writes text and never HTML, and a content
security policy allows this one script and no connection: nothing but the large pictures that lie beside the file.
"""

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import numpy as np

from pipelines.evaluation.certainty import AVERAGE, Champion, Comparison
from pipelines.evaluation.intervals import share_interval
from pipelines.evaluation.measures import METRICS, Metric
from pipelines.evaluation.outcomes import GROUP_COLUMNS, Threshold
from pipelines.files import atomic_file, read_json
from pipelines.numbers import UNKNOWN, count, counted, decimal, interval, listed, percent, rate, score, spread
from pipelines.paths import Cell, Project
from pipelines.pictures.overlays import FULL, coloured_map, opacity
from pipelines.report.answers import best_cells, headline, meaning, standing
from pipelines.report.examples import DECISIONS, Example, examples
from pipelines.report.gallery import CategoryGallery, choose_quality
from pipelines.report.large import Originals, write_large
from pipelines.report.markdown import ASSUMED, absences, differing, inherited, promises, untested
from pipelines.report.summary import MAIN_METRIC, Average, CellSummary, Summary, leaders
from pipelines.report.terms import OF_METRICS, TERMS, explained
from pipelines.unreadable import reading

_TEMPLATES = Path(__file__).parent / "templates"
_LEVELS = 256  # of a kept map
_ON_THIS_MACHINE = "http://127.0.0.1"  # where `make ui` serves the runs while it is running
_STRIP_SIDE = 224  # px, of the pictures on the first page


@dataclass(frozen=True, slots=True)
class _Column:
    title: str
    term: str  # that explains it, if any
    images: str  # how many test images, where all rows have as many
    higher_is_better: bool


@dataclass(frozen=True, slots=True)
class _Figure:
    """One number of the leaderboard."""

    value: float | None
    text: str
    interval: str
    spread: str  # over training seeds
    mark: str  # "best", "tie" or nothing
    href: str


_ABSENT = _Figure(None, UNKNOWN, "", "", "", "")


@dataclass(frozen=True, slots=True)
class _Row:
    model: str
    cells: list[_Figure]
    num_tested: int
    test_images: str


@dataclass(frozen=True, slots=True)
class _Board:
    """The leaderboard by one metric, or by all on average."""

    key: str
    title: str
    sentence: str
    columns: list[_Column]
    rows: list[_Row]
    comparisons: list[Comparison]


@dataclass(frozen=True, slots=True)
class _Shown:
    """A test image on the first page."""

    href: str
    picture: str  # a data URI
    decision: str  # of DECISIONS
    verdict: str
    what: str
    score: str


@dataclass(frozen=True, slots=True)
class _Answer:
    """What the best model of a category does there."""

    category: str
    href: str
    headline: str


def write(summary: Summary, project: Project, folder: Path, place: Path, originals: Originals) -> Path:
    """Write `folder`/report.html from summary.json's content and the evaluations of its cells; gives its path.

    The folder will be moved to `place`: what the page links to is counted from there.
    """
    galleries = {}
    for category in summary.categories:
        places = {
            cell.model: project.cell(cell.model, category, cell.seed)
            for cell in summary.cells
            if cell.category == category
        }
        folders = {model: places[model].evaluated for model in summary.best_first(category)}
        galleries[category] = CategoryGallery(project.prepared(category), folders)
    quality = choose_quality(list(galleries.values()), len(summary.cells))
    blocks = [
        _category(summary, category, project, gallery)
        | {"pictures": asdict(gallery.pictures(quality))}
        | {"large": asdict(write_large(gallery, originals, folder, place, quality.side))}
        for category, gallery in galleries.items()
    ]
    path = folder / "report.html"
    with atomic_file(path) as temporary:
        temporary.write_text(_render(summary, blocks, _strip(summary, galleries)), encoding="utf-8")
    return path


def _render(summary: Summary, blocks: Sequence[Mapping[str, Any]], strip: Sequence[_Shown]) -> str:
    style, script = ((_TEMPLATES / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"page": page, "count": count, "decimal": decimal, "explained": explained}
    report = {
        "dataSet": summary.data_set,
        "categories": summary.categories,
        "models": list(summary.models),
        "scale": _scale(),
        "decisions": DECISIONS,
        "terms": {term.key: term.words for term in TERMS if term.words},
    }
    best = best_cells(summary)
    latencies = [(cell, cell.latency) for cell in summary.cells if cell.latency]
    return environment.get_template("report.html").render(
        summary=summary,
        headline=headline(best),
        meaning=[*meaning(best), *differing(summary)],
        standing=standing(summary),
        strip=strip,
        answers=_answers(summary),
        inherited=inherited(summary),
        terms=TERMS,
        of_metrics=OF_METRICS,
        facts=_facts(summary),
        boards=_boards(summary),
        lacking=[*absences(summary), *untested(summary)],
        main_metric=MAIN_METRIC,
        group_columns=GROUP_COLUMNS,
        has_apart=any(cell.counts.apart for cell in summary.cells),
        has_seeds=any(cell.seeds for cell in summary.cells),
        latencies=latencies,
        hardware=sorted({latency.hardware for _, latency in latencies}),
        categories=[_json(block) for block in blocks],
        report=_json(report),
        style=style,
        script=script,
        style_hash=_csp_hash(style),
        script_hash=_csp_hash(script),
    )


def page(category: str, model: str = "", place: int | None = None) -> str:
    """The address of a category's page inside the report, and there of the test image at a place among them."""
    names = [quote(name, safe="") for name in (category, model) if name]
    return "#/" + "/".join(names if place is None else [*names, str(place)])


def _json(value: object) -> str:
    """JSON that holds no character by which the text could leave its <script>."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _csp_hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


# ---- the first page ------------------------------------------------------------------------------------------------


def _strip(summary: Summary, galleries: Mapping[str, CategoryGallery]) -> list[_Shown]:
    return [_shown(example, galleries[example.cell.category]) for example in examples(best_cells(summary), galleries)]


def _shown(example: Example, gallery: CategoryGallery) -> _Shown:
    model, category, image = example.cell.model, example.cell.category, example.image
    word, sign = DECISIONS[example.decision]
    return _Shown(
        href=page(category, model, list(gallery.images).index(image.path)),
        picture=gallery.overlay(model, image.path, _STRIP_SIDE),
        decision=example.decision,
        verdict=f"{sign} {word}",
        what=f"{category}: {image.defect}",
        score=f"score {score(image.score)}, threshold {score(example.cell.threshold.value)}",
    )


def _answers(summary: Summary) -> list[_Answer]:
    """Of each category, where there are several."""
    if len(summary.categories) == 1:
        return []
    found = {category: best_cells(summary, category) for category in summary.categories}
    return [_Answer(category, page(category, cells[0].model), headline(cells)) for category, cells in found.items()]


# ---- the leaderboard -----------------------------------------------------------------------------------------------


def _facts(summary: Summary) -> str:
    cells = summary.cells
    seeds = sorted({seed for cell in cells for seed in (cell.seeds.seeds if cell.seeds else [cell.protocol.seed])})
    sizes = sorted({cell.protocol.image_size for cell in cells})
    models = counted(len(summary.models), "model")
    categories = counted(len(summary.categories), "category", "categories")
    return (
        f"{models} on {categories} of {summary.data_set}, {listed(map(str, sizes))} px, "
        f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}. "
        f"{promises(summary)}"
        f"{''.join(f' {sentence}.' for sentence in summary.variants)}"
        f"{''.join(f' {region[0].upper()}{region[1:]}.' for region in summary.regions)}"
    )


def _boards(summary: Summary) -> list[_Board]:
    measured = [m for m in METRICS if any(cell.metrics.get(m.key) is not None for cell in summary.cells)]
    if not measured:
        return []
    return [*(_board(summary, metric) for metric in measured), _overview(summary, measured)]


def _board(summary: Summary, metric: Metric) -> _Board:
    key, names, rows, higher = metric.key, list(summary.categories), summary.rows, metric.higher_is_better
    if len(names) > 1:
        names.insert(0, AVERAGE)
    return _Board(
        key=key,
        title=metric.heading,
        sentence=_sentence(summary.champion(key, names[0]), names[0]),
        columns=[
            _Column(name, "", _num_images([row for row in summary.rows.values() if row.category == name]), higher)
            for name in names
        ],
        rows=[
            _row(
                rows[model, AVERAGE],
                [_figure(summary, rows[model, name], key) if (model, name) in rows else _ABSENT for name in names],
            )
            for model in summary.models
        ],
        comparisons=[c for name in names for c in summary.comparisons if (c.metric, c.category) == (key, name)],
    )


def _overview(summary: Summary, metrics: Sequence[Metric]) -> _Board:
    """Every metric, on average over the categories."""
    averages = summary.averages
    return _Board(
        key="all",
        title="All metrics" if len(summary.categories) == 1 else "All metrics, average over categories",
        sentence="",
        columns=[
            _Column(metric.heading, OF_METRICS[metric.key], _num_images(averages), metric.higher_is_better)
            for metric in metrics
        ],
        rows=[_row(row, [_figure(summary, row, metric.key) for metric in metrics]) for row in averages],
        comparisons=[],
    )


def _num_images(rows: Sequence[CellSummary | Average]) -> str:
    numbers = {row.counts.num_tested for row in rows}
    return counted(numbers.pop(), "image") if len(numbers) == 1 else f"{min(numbers)} to {max(numbers)} images"


def _row(row: CellSummary | Average, figures: list[_Figure]) -> _Row:
    return _Row(row.model, figures, row.counts.num_tested, row.counts.test_images)


def _figure(summary: Summary, row: CellSummary | Average, key: str) -> _Figure:
    value, ends = row.metrics.get(key), row.intervals.get(key)
    seeds = row.seeds.metrics.get(key) if row.seeds else None
    champion = summary.champion(key, row.category)
    tied = leaders(champion) if champion else ()
    return _Figure(
        value=value,
        text=percent(value),
        interval=interval(ends) if ends else "",
        spread=spread(seeds.mean, seeds.sd) if seeds else "",
        mark="" if row.model not in tied else "tie" if len(tied) > 1 else "best",
        href="" if row.category == AVERAGE or value is None else page(row.category, row.model),
    )


def _sentence(champion: Champion | None, name: str) -> str:
    if champion is None:
        return ""
    where = "On average" if name == AVERAGE else f"On {name}"
    if not champion.best:
        return f"{where} there is no winner: {champion.reason}." if champion.reason else ""
    if not champion.tied_with:
        return f"{where} the winner is {champion.best}, distinguishable from every other model."
    return f"{where} it is a tie: {listed(leaders(champion))} cannot be told apart on these images."


# ---- a category's page ---------------------------------------------------------------------------------------------


def _category(summary: Summary, name: str, project: Project, gallery: CategoryGallery) -> dict[str, Any]:
    """What the script needs for one page, beside its pictures; lists by image are in one order."""
    cells = [cell for cell in summary.cells if cell.category == name]
    return {
        "name": name,
        "models": summary.best_first(name),
        "hasMasks": gallery.has_masks,
        "images": [[image.path, image.defect, image.label] for image in gallery.images.values()],
        "sizes": [gallery.size(path) for path in gallery.images],
        "intervals": _intervals(gallery),
        "cells": {cell.model: _cell(cell, project.cell(cell.model, name, cell.seed), gallery) for cell in cells},
    }


def _intervals(gallery: CategoryGallery) -> dict[int, list[tuple[float, float]]]:
    """Number of images -> the interval of each share of them, of every group that the page counts: as in the tables."""
    sizes = set[int]()
    for tested in gallery.tested.values():
        for of in (attrgetter("defect"), attrgetter("label")):
            sizes.update(Counter(map(of, tested.values())).values())
    return {size: [share_interval(hits / size, size) for hits in range(size + 1)] for size in sorted(sizes)}


def _cell(cell: CellSummary, place: Cell, gallery: CategoryGallery) -> dict[str, Any]:
    tested = gallery.tested[cell.model]
    url = cell.run_url or ""
    return {
        "scores": [tested[path].score if path in tested else None for path in gallery.images],
        "threshold": cell.threshold.value,
        "review": {"above": cell.review.reject_above} if cell.review else None,
        "note": _threshold_note(cell.threshold, held_out=cell.counts.holdout > 0)
        + (f" {cell.review.text(cell.threshold.value)}" if cell.review else "")
        + ("" if cell.groups else f" {ASSUMED}"),
        "groups": {"text": cell.groups.text, "rows": cell.groups.table()} if cell.groups else None,
        "runUrl": url if url.startswith(("http://", "https://")) else None,
        "runNeedsServer": url.startswith(_ON_THIS_MACHINE),
        "curves": _curves(place),
    }


def _curves(place: Cell) -> Any:
    """Without masks there are fewer, and without a test none."""
    if not place.curves.exists():
        return {}
    with reading(place.curves, f"run {place.verb('evaluate')} again"):
        return dict(read_json(place.curves))


def _threshold_note(threshold: Threshold, *, held_out: bool) -> str:
    parts = counted(threshold.num_images, "held-out good part")
    if not held_out:
        parts = f"{counted(threshold.num_images, 'good part')}, each scored by a model of the other folds,"
    low, high = rate(threshold.interval_low), rate(threshold.interval_high)
    asked, needed = rate(threshold.rate_requested), threshold.num_images_needed
    set_for = f"for {asked} false alarms"
    if not threshold.attainable:
        set_for = f"as their highest score, since {asked} false alarms take {needed} to promise"
    return (
        f"The deployed threshold {score(threshold.value)} was set on {parts} {set_for}; expected on further parts like "
        f"them are {rate(threshold.expected_rate)} (95\u00a0% interval {low} to {high})."
    )


def _scale() -> dict[str, Any]:
    """The colours of the levels of a kept map, and how much of the picture they cover: the script knows no other."""
    ratio = np.linspace(0, FULL, _LEVELS, dtype=np.float32)[None]
    return {"colours": coloured_map(ratio, 1.0)[0].tolist(), "opacity": opacity(ratio, 1.0)[0].round(3).tolist()}
