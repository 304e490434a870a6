"""Every cell's results -> one summary: the figures, how sure they are, who beats whom. All reports are made from it."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field

from pipelines import refusals
from pipelines.deployment.records import Latency
from pipelines.errors import StageError, told
from pipelines.evaluation.certainty import (
    AVERAGE,
    Champion,
    Comparison,
    Measured,
    average,
    champion,
    compare_all,
    measure,
)
from pipelines.evaluation.intervals import CONFIDENCE
from pipelines.evaluation.measures import METRICS, PROMISED
from pipelines.evaluation.outcomes import (
    Confusion,
    Counts,
    DefectOutcome,
    Evaluation,
    GroupsOutcome,
    Interval,
    Protocol,
    Review,
    Threshold,
    read_outcome,
)
from pipelines.evaluation.succession import Succession
from pipelines.paths import Cell, Project
from pipelines.records import Record
from pipelines.report.seeds import DIGITS, SeedFigures, Seeds, average_seeds
from pipelines.settings.params import Params
from pipelines.settings.variants import Variant, sentences
from pipelines.tracking.records import CellRun, as_texts
from pipelines.unreadable import reading

if TYPE_CHECKING:
    from pipelines.tracking.pages import Pages

MAIN_METRIC = "image_auroc"
_NOBODY = Champion(None, (), None)


class Row(Record):
    """A row of the leaderboard: a cell, or the average of a model's cells."""

    model: str
    category: str
    counts: Counts  # of an average: of all categories together
    metrics: dict[str, float | int | None]
    intervals: dict[str, Interval]  # of the metrics that have one
    seeds: SeedFigures | None  # None where one seed is known


class CellSummary(Row):
    """What `evaluate`, `export` and `latency` found of one cell."""

    method: str
    run_id: str | None  # None in a kept report, as is its address
    # Of the file's other seeds, by seed; none in a kept report.
    runs_of_seeds: dict[str, str] = Field(default_factory=dict)
    run_url: str | None  # where a store shows it
    settings: dict[str, Any]  # the model's
    protocol: Protocol
    frozen: str | None = None  # since when its test is; ISO 8601
    threshold: Threshold
    review: Review | None = None  # None in a report that was kept before there was one
    confusion: Confusion
    defects: dict[str, DefectOutcome]
    groups: GroupsOutcome | None
    onnx_megabytes: float | None
    latency: Latency | None

    @property
    def seed(self) -> int:
        return self.protocol.seed

    @property
    def figures(self) -> dict[str, float | int | None]:
        """The metrics, the promise of the threshold, and what a part costs."""
        milliseconds = self.latency.milliseconds.total.p50 if self.latency else None
        return self.metrics | {
            PROMISED: self.threshold.expected_rate,
            "latency_ms": milliseconds,
            "onnx_megabytes": self.onnx_megabytes,
        }


class Average(Row):
    """Macro average: each category weighs the same; a figure that some category lacks has no average."""

    train_seconds_total: float | None
    onnx_megabytes_mean: float | None
    latency_p50: float | None

    @property
    def figures(self) -> dict[str, float | int | None]:
        """The metrics alone: what is promised and what a model costs is said of each cell."""
        return self.metrics


class Absent(Record):
    """A cell of the params file that lacks something, and why."""

    model: str
    category: str
    seed: int | None = None  # None: all that the report shows of the cell; else what this one adds to its spread
    evaluated: bool  # if so, its figures are in the report; what it lacks is the exported file
    reason: str

    @property
    def without_figures(self) -> bool:
        """Whether the report has none of the cell; not where just one more seed of it is absent."""
        return self.seed is None and not self.evaluated

    @property
    def text(self) -> str:
        seed = "" if self.seed is None else f", seed {self.seed}"
        return f"{self.model} on {self.category}{seed}: {self.reason}"


class Tracking(Record):
    """The store that the runs are in."""

    experiment: str
    experiment_id: str | None
    page: str | None


class Summary(Record):
    """summary.json."""

    data_set: str
    categories: tuple[str, ...]
    # With their settings, those of `cells`; the best first on average, as are cells and averages.
    models: dict[str, dict[str, Any]]
    tuned: dict[str, str] = Field(default_factory=dict)  # in words, of the models that `tune` chose the settings of
    confidence: float  # of all intervals
    resamples: int  # test sets drawn for them
    tracking: Tracking | None  # None in a kept report
    cells: tuple[CellSummary, ...]
    absent: tuple[Absent, ...] = ()  # of the params file: what a verb refused, or has not made yet
    averages: tuple[Average, ...]  # of each model, without figures where one of its cells is absent
    comparisons: tuple[Comparison, ...]  # none in a kept report
    champions: dict[str, dict[str, Champion]]  # by metric and category, for metrics that any cell has
    # By category, of those with a frozen test and a champion in the model registry.
    successions: dict[str, Succession] = Field(default_factory=dict)

    @classmethod
    def of(cls, project: Project, experiment: str) -> Self:
        """The last report's of a tracking experiment.

        Raises:
            StageError: there is none, or it is damaged.
        """
        return cls.load(project.summary(experiment), "run `make demo` or `dvc repro`")

    @property
    def rows(self) -> Mapping[tuple[str, str], CellSummary | Average]:
        """By model and category, which is "average" for the averages; what is absent is not there."""
        rows: tuple[CellSummary | Average, ...] = (*self.averages, *self.cells)
        return {(row.model, row.category): row for row in rows}

    @property
    def regions(self) -> list[str]:
        """Of each model whose pixels are compared on a part of the image alone, on which."""
        found = {cell.model: cell.protocol.region for cell in self.cells if cell.protocol.region}
        return [f"pixel metrics of {model} on {region}, which is all it sees" for model, region in found.items()]

    @property
    def variants(self) -> list[str]:
        """A sentence on each model that is a variant of another's method: what its settings say differently."""
        methods = {cell.model: cell.method for cell in self.cells}
        models = [
            Variant(name, methods[name], as_texts(found), self.tuned.get(name)) for name, found in self.models.items()
        ]
        return list(sentences(models).values())

    def champion(self, metric: str, category: str) -> Champion | None:
        """None where no cell has the metric, and for one model alone, which wins nothing."""
        return self.champions.get(metric, {}).get(category) if len(self.models) > 1 else None

    def best_first(self, category: str = AVERAGE) -> list[str]:
        """The models that have results of a category, or of any, as `ranked`."""
        found = self.champions.get(MAIN_METRIC, {}).get(category)
        cells = [cell for cell in self.cells if category in (cell.category, AVERAGE)]
        return ranked(dict.fromkeys(cell.model for cell in cells), cells, found.best if found else None)

    def for_keeping(self) -> Self:
        """Without what means nothing outside the store that made it, and the thousands of comparisons."""
        nothing: dict[str, Any] = {"run_id": None, "run_url": None, "runs_of_seeds": {}}
        cells = tuple(cell.model_copy(update=nothing) for cell in self.cells)
        return self.model_copy(update={"tracking": None, "comparisons": (), "cells": cells, "successions": {}})


def leaders(found: Champion) -> tuple[str, ...]:
    """The best and what cannot be told from it; nobody where there is no best."""
    return () if found.best is None else (found.best, *found.tied_with)


def ranked(models: Iterable[str], cells: Sequence[CellSummary], best: str | None) -> list[str]:
    """Models, the best first: the champion, if there is one, then by the main metric over these cells.

    One that lacks a category comes after those that do not, since its mean is of something else. Where there is no
    defect, hence no such figure, by the fewest false alarms; where there is no test either, as given.
    """

    def key(model: str) -> tuple[bool, int, float, float]:
        own = [cell.metrics for cell in cells if cell.model == model]
        return model != best, -len(own), -_mean_of_known(own, MAIN_METRIC), _mean_of_known(own, "false_alarms")

    return sorted(models, key=key)


def _mean_of_known(cells: Sequence[Mapping[str, float | None]], figure: str) -> float:
    """Over the cells that have it; 0 where none has."""
    known = [value for cell in cells if (value := cell.get(figure)) is not None]
    return math.fsum(known) / len(known) if known else 0.0


def summarise(params: Params, project: Project, runs: Sequence[CellRun] = (), pages: "Pages | None" = None) -> Summary:
    """Everything about the cells of the params file, the best model first, and nothing of cells no longer in it.

    What is shown of a cell is that of the first seed. The other seeds of the file, and of the `runs` of the tracking
    store those that differ from the cell's own in the seed alone, tell its spread.

    Raises:
        StageError: there is no cell to tell of, or a file of one is damaged.
    """
    resamples = params.evaluate.bootstrap
    store = {run.run_id: run for run in runs}
    cells, measured, absent = list[CellSummary](), dict[tuple[str, str], Measured](), list[Absent]()
    own_runs: dict[str, CellRun] = {}
    of_seeds: dict[tuple[str, str], dict[str, str]] = {cell: {} for cell in params.cells()}
    for model, category, seed in params.trainings():
        place = project.cell(model, category, seed)
        found = _absence(project, place)
        if found is not None:
            absent.append(found if seed == params.seed else found.model_copy(update={"seed": seed}))
        if found is not None and not found.evaluated:
            continue
        if seed != params.seed:
            remedy = f"run {place.verb('evaluate')} again"
            of_seeds[model, category][str(seed)] = Evaluation.load(place.evaluation, remedy).run_id
        if (run := _run_of(place, store)) is not None:
            own_runs[run.run_id] = run
    runs = [*(run for run in runs if run.run_id not in own_runs), *own_runs.values()]
    lacking = {(cell.model, cell.category) for cell in absent if cell.without_figures}
    for model, category in [cell for cell in params.cells() if cell not in lacking]:
        place = project.cell(model, category, params.seed)
        evaluation = Evaluation.load(place.evaluation, f"run {place.verb('evaluate')}, or `dvc repro` for everything")
        run = own_runs.get(evaluation.run_id)
        seeds = average_seeds([run], runs) if run else Seeds((), {})
        outcome = read_outcome(place.evaluated, evaluation, model)
        measured[model, category] = measure(outcome, resamples, seeds.spreads())
        url = pages.run(evaluation.run_id) if pages and evaluation.run_id in store else None
        found_of_seeds = {"runs_of_seeds": of_seeds[model, category]}
        cells.append(_cell(place, evaluation, seeds, url).model_copy(update=found_of_seeds))
    if not cells:
        raise StageError(told([StageError(cell.text) for cell in absent], "no cell has been evaluated"))
    averages, models = [], list(dict.fromkeys(cell.model for cell in cells))
    categories = [name for name in params.data.categories if any(cell.category == name for cell in cells)]
    for model in models:
        group = [cell for cell in cells if cell.model == model]
        own = [own_runs[cell.run_id] for cell in group if cell.run_id in own_runs]
        seeds = average_seeds(own, runs) if len(own) == len(group) else Seeds((), {})
        if any(model == name for name, _ in lacking):
            averages.append(_without_figures(model, group))
            continue
        row = average([measured[model, cell.category] for cell in group], seeds.spreads())
        measured[model, AVERAGE] = row
        averages.append(_average(row, group, seeds))
    comparisons, champions = judge(measured, models, [*categories, AVERAGE])
    order = ranked(models, cells, champions.get(MAIN_METRIC, {}).get(AVERAGE, _NOBODY).best)
    return Summary(
        data_set=params.data.name,
        categories=tuple(categories),
        models={name: next(cell.settings for cell in cells if cell.model == name) for name in order},
        tuned={name: words for name in order if (words := params.told_of(name)) is not None},
        confidence=CONFIDENCE,
        resamples=resamples,
        tracking=Tracking(
            experiment=params.tracking.experiment,
            experiment_id=pages.experiment_id if pages else None,
            page=pages.base if pages else None,
        ),
        cells=tuple(sorted(cells, key=lambda cell: order.index(cell.model))),
        absent=tuple(absent),
        averages=tuple(sorted(averages, key=lambda row: order.index(row.model))),
        comparisons=tuple(comparisons),
        champions=champions,
    )


def judge(
    measured: Mapping[tuple[str, str], Measured], models: Sequence[str], categories: Sequence[str]
) -> tuple[list[Comparison], dict[str, dict[str, Champion]]]:
    """Every pair of models on every category and by every metric; and the champions by metric and category."""
    comparisons: list[Comparison] = []
    champions: dict[str, dict[str, Champion]] = {}
    for category in categories:
        group = [measured[model, category] for model in models if (model, category) in measured]
        found = compare_all((metric.key for metric in METRICS), group)
        comparisons += found
        for metric in METRICS:
            if any(metric.key in cell.values for cell in measured.values()):
                own = [comparison for comparison in found if comparison.metric == metric.key]
                champions.setdefault(metric.key, {})[category] = champion(metric.key, group, own)
    return comparisons, champions


def _absence(project: Project, place: Cell) -> Absent | None:
    """What a cell lacks, and why, in one line; None if nothing."""
    reason = _without_evaluation(project, place)
    evaluated = reason is None
    if evaluated and (found := refusals.read(place.refusal)) is not None:
        reason = f"refused by {found.verb}: {found.reason}"
    if reason is None:
        return None
    return Absent(model=place.model, category=place.category, evaluated=evaluated, reason=reason)


def _without_evaluation(project: Project, place: Cell) -> str | None:
    shared = [project.refusal("prepare", place.category)]
    shared += [project.refusal(verb, place.model) for verb in ("distill", "penalty", "textures")]
    for path in (*shared, place.refusal):
        found = refusals.read(path)
        if found is not None and found.verb != "export":
            return f"refused by {found.verb}: {found.reason}"
    if not place.evaluation.exists():
        return f"not evaluated; run {place.verb('evaluate')}, or `dvc repro` for everything"
    if place.run_record.exists():
        with reading(place.run_record, f"run {place.verb('train')} again"):
            trained = json.loads(place.run_record.read_bytes())["run_id"]
        if Evaluation.load(place.evaluation, f"run {place.verb('evaluate')} again").run_id != trained:
            return f"trained anew since it was evaluated; run {place.verb('evaluate')}, or `dvc repro` for everything"
    return None


def _run_of(place: Cell, store: Mapping[str, CellRun]) -> CellRun | None:
    """The run of an evaluated cell as the project's own files tell of it, or else as the tracking store does."""
    evaluation = Evaluation.load(place.evaluation, f"run {place.verb('evaluate')} again")
    if not place.run_record.exists():
        return store.get(evaluation.run_id)
    with reading(place.run_record, f"run {place.verb('train')} again"):
        settings = json.loads(place.run_record.read_bytes())["settings"]
    return CellRun(
        run_id=evaluation.run_id,
        model=evaluation.model,
        category=evaluation.category,
        started=round(1000 * place.run_record.stat().st_mtime),
        settings=as_texts(settings),
        metrics=evaluation.known,
        tags={"method": evaluation.method},
    )


def _cell(place: Cell, evaluation: Evaluation, seeds: Seeds, url: str | None) -> CellSummary:
    remedy = f"run {place.verb('latency')} again"
    return CellSummary(
        model=evaluation.model,
        method=evaluation.method,
        category=evaluation.category,
        metrics=evaluation.metrics,
        intervals=_rounded(evaluation.intervals),
        seeds=seeds.figures(),
        run_id=evaluation.run_id,
        run_url=url,
        settings=evaluation.settings,
        protocol=evaluation.protocol,
        frozen=evaluation.frozen,
        counts=evaluation.counts,
        threshold=evaluation.threshold,
        review=evaluation.review,
        confusion=evaluation.confusion,
        defects=evaluation.defects,
        groups=evaluation.groups,
        onnx_megabytes=round(place.onnx.stat().st_size / 1e6, 2) if place.onnx.exists() else None,
        latency=Latency.load(place.latency, remedy) if place.latency.exists() else None,
    )


def _without_figures(model: str, cells: Sequence[CellSummary]) -> Average:
    """Of a model that lacks a category: a mean of the others would compare with nothing."""
    return Average(
        model=model,
        category=AVERAGE,
        metrics={},
        intervals={},
        seeds=None,
        counts=Counts.total(cell.counts for cell in cells),
        train_seconds_total=None,
        onnx_megabytes_mean=None,
        latency_p50=None,
    )


def _average(row: Measured, cells: Sequence[CellSummary], seeds: Seeds) -> Average:
    figures = [cell.figures for cell in cells]
    return Average(
        model=row.name,
        category=AVERAGE,
        metrics={metric.key: row.values.get(metric.key) for metric in METRICS},
        intervals=_rounded(row.intervals),
        seeds=seeds.figures(),
        counts=Counts.total(cell.counts for cell in cells),
        train_seconds_total=_total(figures, "train_seconds"),
        onnx_megabytes_mean=_mean(figures, "onnx_megabytes"),
        latency_p50=_mean(figures, "latency_ms"),
    )


def _total(cells: Sequence[Mapping[str, float | None]], figure: str) -> float | None:
    known = [value for cell in cells if (value := cell.get(figure)) is not None]
    return sum(known) if len(known) == len(cells) else None


def _mean(cells: Sequence[Mapping[str, float | None]], figure: str) -> float | None:
    total = _total(cells, figure)
    return None if total is None else total / len(cells)


def _rounded(intervals: Mapping[str, Interval]) -> dict[str, Interval]:
    return {name: (round(low, DIGITS), round(high, DIGITS)) for name, (low, high) in intervals.items()}
