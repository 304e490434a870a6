"""How sure the figures are: intervals over the test images, models compared on the same images, and ties called ties.

Every interval is 95 %. A test set is a sample: with other images of the same kind the figures would have been others.
The bootstrap (Efron and Tibshirani, 1993) draws test images with replacement, good and anomalous ones apart, and
computes every metric anew, pixel metrics too, from counts per image and threshold. All models of a category get the
same draws, so that the difference of two models is judged on the images that both saw: an image that is hard for both
does not blur it. Categories are drawn independently, and a macro average is averaged draw by draw.

What resampling cannot say is said otherwise: a share of images (defects found, false alarms) has the exact interval of
Clopper and Pearson, and so has a perfect separation, whose every draw is perfect too. What another training seed would
have given is in no test image; where runs with several seeds are known, their spread widens the comparison.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal

import numpy as np
from scipy.special import betaincinv, stdtrit

from pipelines.evaluation.curves import PRO_LIMITS, Curve, Floats, image_curve
from pipelines.evaluation.measures import METRIC_BY_KEY, METRICS
from pipelines.evaluation.outcomes import Outcome, PixelCounts, TestSet
from pipelines.numbers import half, percent

CONFIDENCE = 0.95
AVERAGE = "average"  # the category of a macro average
_TAIL = (1 - CONFIDENCE) / 2
_SHARES = ("recall", "false_alarms")
_SEPARATION = ("image_auroc", "image_ap", "image_f1_max")  # all 1 exactly when good and anomalous images separate


# ---- resampling ----------------------------------------------------------------------------------------------------


def resample(test_set: TestSet, resamples: int) -> Floats:
    """How often each image is drawn: (1 + resamples, N), the first row being the test set itself.

    Good and anomalous images are drawn apart, so that no draw lacks either. The draws depend on the names and labels of
    the images alone: two models on the same images get the same ones.
    """
    key = hashlib.sha256(repr((test_set.category, test_set.images)).encode()).digest()
    rng = np.random.default_rng(list(key))
    labels = np.array([label for _, label in test_set.images], dtype=bool)
    draws = np.ones((1 + resamples, len(labels)))
    for of_class in (np.flatnonzero(~labels), np.flatnonzero(labels)):
        if len(of_class):
            n = len(of_class)
            draws[1:, of_class] = rng.multinomial(n, np.full(n, 1 / n), size=resamples)
    return draws


def _image_draws(outcome: Outcome, draws: Floats) -> dict[str, Floats]:
    labels = outcome.labels
    called = outcome.scores > outcome.threshold
    shares = {}
    if labels.any():
        shares["recall"] = draws[:, labels] @ called[labels] / labels.sum()
    if not labels.all():
        shares["false_alarms"] = draws[:, ~labels] @ called[~labels] / (~labels).sum()
    if labels.all() or not labels.any():
        return shares
    _, curve = image_curve(outcome.scores, labels, draws)
    return {"image_auroc": curve.auroc(), "image_ap": curve.ap(), "image_f1_max": curve.f1().max(-1), **shares}


def _pixel_draws(pixels: PixelCounts | None, draws: Floats) -> dict[str, Floats]:
    if pixels is None or not pixels.anomalous.any() or not pixels.normal.any():
        return {}
    counts = (pixels.normal, pixels.anomalous, pixels.regions)
    curve = Curve.of(*(draws @ count.astype(np.float64) for count in counts))  # each (R, B)
    return {
        "pixel_auroc": curve.auroc(),
        "pixel_ap": curve.ap(),
        "pixel_f1_max": curve.f1().max(-1),
        **{name: curve.aupro(limit) for name, limit in PRO_LIMITS.items()},
    }


# ---- one model -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spread:
    """What training again with another seed does to a figure."""

    sd: float  # between single runs
    num_runs: int


@dataclass(frozen=True, slots=True)
class Measured:
    """A model's figures on a category, or on the average of several, and how they vary over drawn test sets."""

    name: str
    category: str
    values: Mapping[str, float]
    draws: Mapping[str, Floats]  # (1 + resamples,), the first of the test set itself
    intervals: Mapping[str, tuple[float, float]]
    test_sets: tuple[TestSet, ...]
    spreads: Mapping[str, Spread] = field(default_factory=dict)

    @property
    def num_images(self) -> int:
        return sum(len(test_set.images) for test_set in self.test_sets)


def measure(outcome: Outcome, resamples: int, spreads: Mapping[str, Spread] | None = None) -> Measured:
    """Intervals of every metric that `outcome.values` and the images allow."""
    weights = resample(outcome.test_set, resamples)
    drawn = {**_image_draws(outcome, weights), **_pixel_draws(outcome.pixels, weights)}
    draws = {name: values for name, values in drawn.items() if name in outcome.values}
    intervals = {name: _interval(outcome.values[name], values) for name, values in draws.items()}
    labels = outcome.labels
    for name, of_class in zip(_SHARES, (labels, ~labels), strict=True):
        if name in draws:
            intervals[name] = share_interval(outcome.values[name], int(of_class.sum()))
    if outcome.values.get("image_auroc") == 1.0:
        # Whatever is missing from the test set is no more than what could have stayed out of its smaller class.
        bound = share_interval(1.0, int(min(labels.sum(), (~labels).sum())))
        intervals |= dict.fromkeys([name for name in _SEPARATION if name in draws], bound)
    return Measured(
        name=outcome.name,
        category=outcome.test_set.category,
        values=dict(outcome.values),
        draws=draws,
        intervals=intervals,
        test_sets=(outcome.test_set,),
        spreads=spreads or {},
    )


def average(cells: Sequence[Measured], spreads: Mapping[str, Spread] | None = None) -> Measured:
    """The macro average of one model over categories: each weighs the same; a metric that one lacks has none."""
    values, draws, intervals = {}, {}, {}
    for metric in METRICS:
        name = metric.key
        if all(name in cell.values for cell in cells):
            values[name] = math.fsum(cell.values[name] for cell in cells) / len(cells)
        if all(name in cell.draws for cell in cells):
            draws[name] = np.mean([cell.draws[name] for cell in cells], axis=0)
            intervals[name] = _average_interval(name, values[name], draws[name], cells)
    test_sets = tuple(test_set for cell in cells for test_set in cell.test_sets)
    return Measured(cells[0].name, AVERAGE, values, draws, intervals, test_sets, spreads or {})


def _average_interval(name: str, value: float, draws: Floats, cells: Sequence[Measured]) -> tuple[float, float]:
    """The bootstrap's, at least as wide as independent categories would make it of their own intervals.

    A category that is separated perfectly adds nothing to the bootstrap, and yet its figure is not certain.
    """
    low, high = _interval(value, draws)
    below = math.sqrt(math.fsum((cell.values[name] - cell.intervals[name][0]) ** 2 for cell in cells)) / len(cells)
    above = math.sqrt(math.fsum((cell.intervals[name][1] - cell.values[name]) ** 2 for cell in cells)) / len(cells)
    return max(0.0, min(low, value - below)), min(1.0, max(high, value + above))


def _interval(value: float, draws: Floats) -> tuple[float, float]:
    """The central 95 % of the draws, moved by what binning changed, clipped to [0, 1] and to hold the value.

    The draws of F1-max lie above it, since a maximum profits from chance.
    """
    low, high = np.quantile(draws[1:], [_TAIL, 1 - _TAIL]) + (value - draws[0])
    return max(0.0, min(float(low), value)), min(1.0, max(float(high), value))


def share_interval(share: float, num_images: int) -> tuple[float, float]:
    """Clopper and Pearson's interval of a share of independent images."""
    hits = round(share * num_images)
    low = float(betaincinv(hits, num_images - hits + 1, _TAIL)) if hits else 0.0
    high = float(betaincinv(hits + 1, num_images - hits, 1 - _TAIL)) if hits < num_images else 1.0
    return low, high


# ---- two models ----------------------------------------------------------------------------------------------------

Verdict = Literal["a", "b", "tie", "refused"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two models on the same test images by one metric; None throughout where there is nothing to compare."""

    metric: str
    category: str
    a: str
    b: str
    difference: float | None  # a minus b
    low: float | None
    high: float | None
    num_images: int
    verdict: Verdict  # which one is better; a tie cannot be told from chance
    reason: str | None  # why it was refused

    @property
    def text(self) -> str:
        """One sentence, in points of a hundred."""
        title = METRIC_BY_KEY[self.metric].title
        if self.difference is None or self.low is None or self.high is None:
            return f"{self.a} and {self.b} cannot be compared by {title}: {self.reason}"
        margin = half((self.low, self.high))
        if not self.difference:
            return f"{self.a} equals {self.b} to ± {margin}: not distinguishable"
        leads = METRIC_BY_KEY[self.metric].higher_is_better == (self.difference > 0)
        winner, loser = (self.a, self.b) if leads else (self.b, self.a)
        end = ": not distinguishable" if self.verdict == "tie" else ""
        return f"{winner} beats {loser} by {percent(abs(self.difference))} ± {margin}{end}"


def compare(metric: str, a: Measured, b: Measured) -> Comparison:
    """Judge the difference of two models on their test images; refused where those are not the same."""
    reason = _refusal(metric, a, b)
    if reason is not None:
        return Comparison(metric, a.category, a.name, b.name, None, None, None, a.num_images, "refused", reason)
    difference = a.values[metric] - b.values[metric]
    drawn = a.draws[metric] - b.draws[metric]
    low, high = np.quantile(drawn[1:], [_TAIL, 1 - _TAIL]) + (difference - drawn[0])
    seeds = _seed_margin(a.spreads.get(metric), b.spreads.get(metric))
    low = difference - math.hypot(max(difference - float(low), 0), seeds)
    high = difference + math.hypot(max(float(high) - difference, 0), seeds)
    verdict: Verdict = "tie"
    if low > 0 or high < 0:
        verdict = "a" if METRIC_BY_KEY[metric].higher_is_better == (difference > 0) else "b"
    return Comparison(metric, a.category, a.name, b.name, difference, low, high, a.num_images, verdict, None)


def _refusal(metric: str, a: Measured, b: Measured) -> str | None:
    if len(a.test_sets) != len(b.test_sets):
        return f"{len(a.test_sets)} and {len(b.test_sets)} categories"
    for mine, other in zip(a.test_sets, b.test_sets, strict=True):
        if (difference := mine.difference(other)) is not None:
            return difference
    lacking = [model.name for model in (a, b) if metric not in model.draws]
    return f"{' and '.join(lacking)} without {METRIC_BY_KEY[metric].title}" if lacking else None


def _seed_margin(a: Spread | None, b: Spread | None) -> float:
    """Half the 95 % interval of the difference of two single runs, by Welch's t; 0 where no spread is known."""
    parts = [(spread.sd**2, spread.num_runs - 1) for spread in (a, b) if spread is not None and spread.sd > 0]
    if not parts:
        return 0.0
    variance = sum(part for part, _ in parts)
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    return float(stdtrit(freedom, 1 - _TAIL)) * math.sqrt(variance)


def compare_all(metrics: Iterable[str], models: Sequence[Measured]) -> list[Comparison]:
    """Every pair of models on one category, by every metric that any of them has."""
    return [
        compare(metric, a, b)
        for metric in metrics
        if any(metric in model.values for model in models)
        for a, b in combinations(models, 2)
    ]


# ---- the champion --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Champion:
    """The best model of a category by one metric, and those that cannot be told from it."""

    best: str | None
    tied_with: tuple[str, ...]
    reason: str | None  # why there is no best


def champion(metric: str, models: Sequence[Measured], comparisons: Sequence[Comparison]) -> Champion:
    """The highest figure, with what ties it; nobody where a comparison with it had to be refused.

    `comparisons` are those of these models by this metric.
    """
    ranked = [model for model in models if metric in model.values]
    if not ranked:
        return Champion(None, (), f"no {METRIC_BY_KEY[metric].title}")
    sign = 1 if METRIC_BY_KEY[metric].higher_is_better else -1
    best = max(ranked, key=lambda model: sign * model.values[metric]).name  # the first of equals, in the file's order
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
