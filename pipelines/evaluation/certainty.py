"""How sure the figures are: intervals over the test images, models compared on the same images, and ties called ties.

Every interval is 95 % (`intervals` says how). Every comparison is on the images that both models were tested on, so
that an image that is hard for both does not blur it (`chance` says how). What another training seed would have given
is in no test image; where runs with several seeds are known, their spread belongs to the chance that is allowed for.

Of all the pairs of models in a table none is called a difference by chance in more than 5 % of tables: p-values are
adjusted for the number of pairs (Holm, Scandinavian Journal of Statistics 6, 1979).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, permutations
from typing import Literal

import numpy as np

from pipelines.evaluation.chance import Difference, Part, differences
from pipelines.evaluation.intervals import (
    CONFIDENCE,
    Ends,
    auroc_interval,
    bounded_interval,
    mean_interval,
    share_interval,
)
from pipelines.evaluation.measures import METRIC_BY_KEY, METRICS, PIXEL_METRICS, REGION_METRICS
from pipelines.evaluation.outcomes import Outcome
from pipelines.numbers import counted, p_value, percent

AVERAGE = "average"  # the category of a macro average
_ALPHA = 1 - CONFIDENCE
_SHARES = ("recall", "false_alarms")


# ---- one model -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spread:
    """What training again with another seed does to a figure."""

    sd: float  # between single runs
    num_runs: int


@dataclass(frozen=True, slots=True)
class Measured:
    """A model's figures on a category, or on the average of several, and how sure they are."""

    name: str
    category: str
    values: Mapping[str, float]
    intervals: Mapping[str, Ends]
    outcomes: tuple[Outcome, ...]  # one a category
    resamples: int  # how often chance is tried when it is compared
    spreads: Mapping[str, Spread] = field(default_factory=dict)

    @property
    def num_images(self) -> int:
        return sum(len(outcome.test_set.images) for outcome in self.outcomes)


def measure(outcome: Outcome, resamples: int, spreads: Mapping[str, Spread] | None = None) -> Measured:
    """A model's figures on one category, ready to be compared."""
    return Measured(
        name=outcome.name,
        category=outcome.test_set.category,
        values=dict(outcome.values),
        intervals=intervals_of(outcome),
        outcomes=(outcome,),
        resamples=resamples,
        spreads=spreads or {},
    )


def intervals_of(outcome: Outcome) -> dict[str, Ends]:
    """Of every metric that `outcome.values` and the images allow."""
    values, labels = outcome.values, outcome.labels
    num_normal, num_anomalous = int((~labels).sum()), int(labels.sum())
    found = {}
    for name, number in zip(_SHARES, (num_anomalous, num_normal), strict=True):
        if name in values and number:
            found[name] = share_interval(values[name], number)
    for name in ("image_ap", "image_f1_max"):
        if name in values:
            found[name] = bounded_interval(values[name], min(num_normal, num_anomalous))
    if "image_auroc" in values:
        found["image_auroc"] = auroc_interval(outcome.scores, labels)
    if outcome.pixels is not None and (num_carrying := int(outcome.pixels.anomalous.any(axis=1).sum())):
        found |= {name: bounded_interval(values[name], num_carrying) for name in PIXEL_METRICS if name in values}
    return {name: _around(values[name], ends) for name, ends in found.items()}


def _around(value: float, ends: Ends) -> Ends:
    """So that rounding does not leave the value outside."""
    return min(ends[0], value), max(ends[1], value)


def average(cells: Sequence[Measured], spreads: Mapping[str, Spread] | None = None) -> Measured:
    """The macro average of one model over categories: each weighs the same; a metric that one lacks has none.

    But for AUPRO and sPRO, of which a category has the one or the other: these are averaged over those that have it.
    """
    values, intervals = {}, {}
    for name in (metric.key for metric in METRICS):
        own = [cell for cell in cells if not _measured_otherwise(name, cell.values)]
        if own and all(name in cell.values for cell in own):
            of_cells = [cell.values[name] for cell in own]
            values[name] = math.fsum(of_cells) / len(own)
            if all(name in cell.intervals for cell in own):
                ends = mean_interval(of_cells, [cell.intervals[name] for cell in own])
                intervals[name] = _around(values[name], ends)
    outcomes = tuple(outcome for cell in cells for outcome in cell.outcomes)
    return Measured(cells[0].name, AVERAGE, values, intervals, outcomes, cells[0].resamples, spreads or {})


def _measured_otherwise(metric: str, values: Mapping[str, float]) -> bool:
    """Whether a category has another measure of regions in place of this one."""
    return any(metric in own and not other.isdisjoint(values) for own, other in permutations(REGION_METRICS))


# ---- two models ----------------------------------------------------------------------------------------------------

Verdict = Literal["a", "b", "tie", "refused"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two models on the same test images by one metric."""

    metric: str
    category: str
    a: str
    b: str
    difference: float | None  # a minus b; None where there is nothing to compare
    p: float | None  # how often two equally good models differ as much, or more
    num_images: int  # that both were tested on
    shared: bool  # whether one was tested on more than these
    verdict: Verdict  # which one is better; a tie cannot be told from chance
    reason: str | None  # why it was refused

    @property
    def text(self) -> str:
        """One sentence, in points of a hundred."""
        title = METRIC_BY_KEY[self.metric].title
        if self.difference is None or self.p is None:
            return f"{self.a} and {self.b} cannot be compared by {title}: {self.reason}"
        where = f" on the {counted(self.num_images, 'image')} that both were tested on" if self.shared else ""
        if not self.difference:
            return f"{self.a} equals {self.b}{where}: not distinguishable"
        leads = METRIC_BY_KEY[self.metric].higher_is_better == (self.difference > 0)
        winner, loser = (self.a, self.b) if leads else (self.b, self.a)
        points, p = f"{percent(abs(self.difference))} points", p_value(self.p)
        if self.verdict == "tie":
            return f"{winner} is {points} ahead of {loser}{where}, as may be chance ({p}): not distinguishable"
        return f"{winner} beats {loser} by {points}{where} ({p})"


def compare(metric: str, a: Measured, b: Measured) -> Comparison:
    """Judge the difference of two models on their test images; refused where those are not of the same kind."""
    reason = _refusal(metric, a, b)
    if reason is not None:
        return Comparison(metric, a.category, a.name, b.name, None, None, a.num_images, False, "refused", reason)
    pairs = _pairs(metric, a, b)
    found = Difference.mean([differences(one, other, a.resamples)[metric] for one, other in pairs])
    shared = any(one.test_set.images != other.test_set.images for one, other in pairs)
    num_images = sum(len(one.test_set.shared(other.test_set)) for one, other in pairs)
    observed = found.observed if shared else a.values[metric] - b.values[metric]
    p = found.p_value(observed, _seed_parts(a.spreads.get(metric), b.spreads.get(metric)))
    return _judged(Comparison(metric, a.category, a.name, b.name, observed, p, num_images, shared, "tie", None))


def _judged(comparison: Comparison) -> Comparison:
    """With the verdict that its p-value allows."""
    assert comparison.difference is not None
    assert comparison.p is not None
    verdict: Verdict = "tie"
    if comparison.p <= _ALPHA:
        better = METRIC_BY_KEY[comparison.metric].higher_is_better == (comparison.difference > 0)
        verdict = "a" if better else "b"
    return replace(comparison, verdict=verdict)


def _pairs(metric: str, a: Measured, b: Measured) -> list[tuple[Outcome, Outcome]]:
    """Of each category that has the metric, the two models' outcomes."""
    pairs = zip(a.outcomes, b.outcomes, strict=True)
    return [
        (one, other)
        for one, other in pairs
        if not (_measured_otherwise(metric, one.values) and _measured_otherwise(metric, other.values))
    ]


def _refusal(metric: str, a: Measured, b: Measured) -> str | None:
    if len(a.outcomes) != len(b.outcomes):
        return f"{len(a.outcomes)} and {len(b.outcomes)} categories"
    pairs = _pairs(metric, a, b)
    for one, other in pairs:
        by_pixel = metric in PIXEL_METRICS
        if (difference := one.test_set.difference(other.test_set, by_pixel=by_pixel)) is not None:
            return difference
    title = METRIC_BY_KEY[metric].title
    if lacking := [model.name for model in (a, b) if metric not in model.values]:
        return f"{' and '.join(lacking)} without {title}"
    if any(metric not in differences(one, other, a.resamples) for one, other in pairs):
        return f"what is kept of the test images allows no {title}"
    return None


def _seed_parts(a: Spread | None, b: Spread | None) -> list[Part]:
    """The variance of a single run of each, where a spread is known."""
    return [(spread.sd**2, spread.num_runs - 1) for spread in (a, b) if spread is not None and spread.sd > 0]


def compare_all(metrics: Iterable[str], models: Sequence[Measured]) -> list[Comparison]:
    """Every pair of models on one category, by every metric that any of them has; p-values for all pairs together."""
    found = []
    for metric in metrics:
        if any(metric in model.values for model in models):
            found += _adjusted([compare(metric, a, b) for a, b in combinations(models, 2)])
    return found


def _adjusted(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Holm: the smallest of m p-values times m, the next times m - 1, and none below one that comes before it."""
    judged = list(comparisons)
    known = sorted((found.p, place) for place, found in enumerate(judged) if found.p is not None)
    largest = 0.0
    for rank, (p, place) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        judged[place] = _judged(replace(judged[place], p=largest))
    return judged


# ---- the champion --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Champion:
    """The best model of a category by one metric, and those that cannot be told from it."""

    best: str | None
    tied_with: tuple[str, ...]
    reason: str | None  # why there is no best


def champion(metric: str, models: Sequence[Measured], comparisons: Sequence[Comparison]) -> Champion:
    """The highest figure, with what ties it; nobody where a comparison with it had to be refused.

    `comparisons` are those of these models by this metric. A model that has the highest figure only because it was
    tested on other images, and is beaten on those that both saw, is not the best.
    """
    ranked = [model for model in models if metric in model.values]
    if not ranked:
        return Champion(None, (), f"no {METRIC_BY_KEY[metric].title}")
    beaten = {found.b if found.verdict == "a" else found.a for found in comparisons if found.verdict in ("a", "b")}
    sign = 1 if METRIC_BY_KEY[metric].higher_is_better else -1
    # the first of equals, in the file's order
    best = max(ranked, key=lambda model: (model.name not in beaten, sign * model.values[metric])).name
    tied = []
    for comparison in comparisons:
        if best not in (comparison.a, comparison.b):
            continue
        other = comparison.b if comparison.a == best else comparison.a
        if comparison.verdict == "refused" and any(model.name == other for model in ranked):
            return Champion(None, (), comparison.reason)
        if comparison.verdict == "tie":
            tied.append(other)
    return Champion(best, tuple(tied), None)


# ---- several seeds -------------------------------------------------------------------------------------------------


def spread_of(values: Sequence[float]) -> Spread | None:
    """The spread of a figure over runs that differ in their seed only; None for a single one."""
    if len(values) < 2:
        return None
    return Spread(float(np.std(values, ddof=1)), len(values))
