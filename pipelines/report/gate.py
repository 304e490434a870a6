"""Verb gate: whether the last report's figures are what one asks for, so that a CI job fails where they are not."""

from dataclasses import dataclass

from pipelines.errors import StageError, hint
from pipelines.evaluation.measures import METRIC_BY_KEY
from pipelines.numbers import counted, percent
from pipelines.paths import Project
from pipelines.report.summary import CellSummary, Summary
from pipelines.report.terminal import what_it_lacks
from pipelines.settings.params import Params


@dataclass(frozen=True, slots=True)
class Gate:
    """What every cell must keep to."""

    metric: str
    at_least: float | None  # shares, as in metrics/: 0.9 for 90 %
    at_most: float | None
    model: str | None  # None: all
    category: str | None


def gate(project: Project, params: Params, asked: Gate) -> str:
    """Say in one line that all cells pass.

    Raises:
        StageError: one does not, has no such figure, or is not in the report; or what is asked for makes no sense.
    """
    metric = METRIC_BY_KEY.get(asked.metric)
    if metric is None:
        raise StageError(
            f"metric '{asked.metric}': unknown{hint(asked.metric, METRIC_BY_KEY)}; known: {', '.join(METRIC_BY_KEY)}"
        )
    if asked.at_least is None and asked.at_most is None:
        raise StageError(f"{asked.metric}: nothing is asked for; give --at-least or --at-most, as a share such as 0.9")
    summary = Summary.of(project, params.tracking.experiment)
    cells = [
        cell for cell in summary.cells if asked.model in (None, cell.model) and asked.category in (None, cell.category)
    ]
    if not cells:
        chosen = " on ".join(name for name in (asked.model, asked.category) if name)
        raise StageError(f"{chosen}: not in the last report; run `blemish run`, or correct the name")
    problems = [*what_it_lacks(project, params, summary), *(told for cell in cells if (told := _problem(cell, asked)))]
    if problems:
        raise StageError("\n  - ".join([f"{counted(len(problems), 'thing')} not as asked for", *problems]))
    return f"{metric.title} {_bounds(asked)} in {counted(len(cells), 'cell')}"


def _problem(cell: CellSummary, asked: Gate) -> str | None:
    """Why a cell does not pass; None if it does."""
    title, value = METRIC_BY_KEY[asked.metric].title, cell.metrics.get(asked.metric)
    if value is None:
        return f"{cell.model} on {cell.category}: no {title}"
    if (asked.at_least is None or value >= asked.at_least) and (asked.at_most is None or value <= asked.at_most):
        return None
    return f"{cell.model} on {cell.category}: {title} {percent(value)}, asked for: {_bounds(asked)}"


def _bounds(asked: Gate) -> str:
    bounds = [f"at least {percent(asked.at_least)}"] if asked.at_least is not None else []
    return " and ".join(bounds + ([f"at most {percent(asked.at_most)}"] if asked.at_most is not None else []))
