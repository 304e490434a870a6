"""The runs of a tracking store as plain data: which one stands for a cell, and which are the same but for the seed."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipelines.evaluation.certainty import Spread, spread_of
from pipelines.evaluation.measures import METRICS
from pipelines.records import Record
from pipelines.tracking.records import SEED, CellRun

DIGITS = 6  # of a fraction that a summary keeps: as many as anyone reads


def latest(runs: Iterable[CellRun]) -> list[CellRun]:
    """The last run of each cell, under the lowest seed that it has been trained with.

    Models in the order of their names, categories too.
    """
    known = sorted(runs, key=lambda run: run.started)
    found = {run.cell: run for run in known}
    return [next(iter(seeds_of(found[cell], known).values()), found[cell]) for cell in sorted(found)]


def seeds_of(run: CellRun, runs: Iterable[CellRun]) -> dict[int, CellRun]:
    """The runs that differ from `run` in nothing but the seed, itself among them; the last one of each seed."""
    found: dict[int, CellRun] = {}
    for other in sorted(runs, key=lambda run: run.started):
        if other.seed is not None and other.cell == run.cell and _without_seed(other) == _without_seed(run):
            found[other.seed] = other
    if run.seed is not None:
        found[run.seed] = run
    return dict(sorted(found.items()))


def _without_seed(run: CellRun) -> dict[str, str]:
    return {name: value for name, value in run.settings.items() if name != SEED}


class SeedFigure(Record):
    """One metric under several seeds."""

    mean: float
    sd: float  # between single runs
    values: tuple[float, ...]


class SeedFigures(Record):
    """What a summary keeps of several seeds."""

    seeds: tuple[int, ...]
    metrics: dict[str, SeedFigure]


@dataclass(frozen=True, slots=True)
class Seeds:
    """A model's figures under several seeds: on a category, or averaged over those that have every one of them."""

    seeds: tuple[int, ...]
    values: Mapping[str, tuple[float, ...]]  # metric -> one value a seed

    def spreads(self) -> dict[str, Spread]:
        found = {name: spread_of(values) for name, values in self.values.items()}
        return {name: spread for name, spread in found.items() if spread is not None}

    def figures(self) -> SeedFigures | None:
        """Mean and standard deviation by metric; None for a single seed, which has no spread."""
        if len(self.seeds) < 2:
            return None
        metrics = {
            name: SeedFigure(
                mean=round(sum(self.values[name]) / len(self.values[name]), DIGITS),
                sd=round(spread.sd, DIGITS),
                values=tuple(round(value, DIGITS) for value in self.values[name]),
            )
            for name, spread in self.spreads().items()
        }
        return SeedFigures(seeds=self.seeds, metrics=metrics)


def average_seeds(cells: Sequence[CellRun], runs: Sequence[CellRun]) -> Seeds:
    """The macro average of one model's cells, or of one alone, for each seed that all of them were trained with."""
    by_seed = [seeds_of(run, runs) for run in cells]
    shared = sorted(set.intersection(*map(set, by_seed)))
    values = {
        metric.key: tuple(sum(cell[seed].metrics[metric.key] for cell in by_seed) / len(cells) for seed in shared)
        for metric in METRICS
        if shared and all(metric.key in cell[seed].metrics for cell in by_seed for seed in shared)
    }
    return Seeds(tuple(shared), values)


def short_names(runs: Sequence[CellRun]) -> dict[str, str]:
    """Run id -> a name that tells these runs apart: the model, with its seed or the id's beginning if need be."""
    names: dict[str, str] = {}
    for model in dict.fromkeys(run.model for run in runs):
        own = [run for run in runs if run.model == model]
        if len({run.category for run in own}) == len(own):
            names |= {run.run_id: model for run in own}
        elif len({(run.category, run.seed) for run in own}) == len(own):
            names |= {run.run_id: f"{model} seed {run.seed}" for run in own}
        else:
            names |= {run.run_id: f"{model} {run.run_id[:8]}" for run in own}
    return names
