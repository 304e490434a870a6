"""How far the truth may be from a figure: 95 % intervals over the draw of the test images, from the images alone.

A test set is a sample: with other images of the same kind the figures would have been others. What each figure gets is
what covered the truth in at least 93 of 100 simulated test sets, of 6 + 11 images to 100 + 200 (docs/statistics.md has
the table; the bootstrap, which needs no thought, covered 72 to 95):

- a share of images, such as the defects that were found: Clopper and Pearson, Biometrika 26, 1934;
- image AUROC: DeLong, DeLong and Clarke-Pearson, Biometrics 44, 1988, on the logit scale (Pepe, The Statistical
  Evaluation of Medical Tests, 2003, section 4.3.3), by Student's t with Satterthwaite's degrees of freedom; its
  variance no smaller than Hanley and McNeil's (Radiology 143, 1982), since few images that are ranked wrongly tell
  little of their own variance;
- the other figures: as if they were shares of the images that carry them. Of all quantities in [0, 1] with a given
  mean, those that are 0 or 1 vary the most (Hoeffding, JASA 58, 1963), so that this is wide, and safe;
- averages over categories: the distances to the ends of independent intervals, squared and added (Zou and Donner,
  Statistics in Medicine 27, 2008).
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import betaincinv, expit, logit, stdtrit
from scipy.stats import rankdata

from pipelines.evaluation.curves import Bools, Floats

CONFIDENCE = 0.95
TAIL = (1 - CONFIDENCE) / 2

Ends = tuple[float, float]


def share_interval(share: float, num_images: int) -> Ends:
    """Clopper and Pearson's interval of a share of independent images."""
    return bounded_interval(round(share * num_images) / num_images, num_images)


def bounded_interval(value: float, num_images: int) -> Ends:
    """The same of a mean of so many numbers in [0, 1], which need not be whole ones."""
    hits = value * num_images
    low = float(betaincinv(hits, num_images - hits + 1, TAIL)) if hits > 0 else 0.0
    high = float(betaincinv(hits + 1, num_images - hits, 1 - TAIL)) if hits < num_images else 1.0
    return low, high


def auroc_interval(scores: Floats, labels: Bools) -> Ends:
    """Of the AUROC of scores (N,), ties counted half, with images of both classes.

    No end is surer than it would be with a perfect figure, or a useless one: that of as many images as the smaller
    class has.
    """
    classes = scores[labels], scores[~labels]
    smaller = min(map(len, classes))
    surest = bounded_interval(1.0, smaller)[0], bounded_interval(0.0, smaller)[1]
    places = placements(*classes)
    value = float(places[0].mean())
    if not 0 < value < 1 or smaller < 2:
        return (surest[0], 1.0) if value == 1 else (0.0, surest[1]) if value == 0 else (0.0, 1.0)
    parts = [(float(place.var(ddof=1)) / len(place), len(place) - 1) for place in places]
    variance = max(sum(part for part, _ in parts), _hanley_mcneil(value, len(classes[0]), len(classes[1])))
    margin = student_quantile(parts) * math.sqrt(variance) / (value * (1 - value))
    low, high = float(expit(logit(value) - margin)), float(expit(logit(value) + margin))
    return min(low, surest[0]), max(high, surest[1])


def placements(anomalous: Floats, normal: Floats) -> tuple[Floats, Floats]:
    """The share of the other class that each score is on the right side of, ties counted half: (A,) and (N,)."""
    ranks = rankdata(np.concatenate([anomalous, normal]))
    above = (ranks[: len(anomalous)] - rankdata(anomalous)) / len(normal)
    below = 1 - (ranks[len(anomalous) :] - rankdata(normal)) / len(anomalous)
    return above, below


def _hanley_mcneil(value: float, num_anomalous: int, num_normal: int) -> float:
    """The variance of an AUROC, had both classes exponential scores."""
    both_anomalous, both_normal = value / (2 - value), 2 * value**2 / (1 + value)  # above, or below, one of the others
    spread = (num_anomalous - 1) * (both_anomalous - value**2) + (num_normal - 1) * (both_normal - value**2)
    return (value * (1 - value) + spread) / (num_anomalous * num_normal)


def student_quantile(parts: Sequence[tuple[float, int]]) -> float:
    """Half the width of a 95 % interval, in standard errors, of a sum of estimates.

    `parts` are their variances and degrees of freedom; Satterthwaite, Biometrics Bulletin 2, 1946.
    """
    return float(stdtrit(freedom(parts), 1 - TAIL))


def freedom(parts: Sequence[tuple[float, int]]) -> float:
    """Satterthwaite's degrees of freedom; the fewest of all where nothing varies."""
    total = sum(variance for variance, _ in parts)
    squares = sum(variance**2 / degrees for variance, degrees in parts)
    return total**2 / squares if squares > 0 else min(degrees for _, degrees in parts)


def mean_interval(values: Sequence[float], intervals: Sequence[Ends]) -> Ends:
    """Of the mean of independent figures, each with its own interval."""
    mean = math.fsum(values) / len(values)
    below = math.hypot(*(value - low for value, (low, _) in zip(values, intervals, strict=True)))
    above = math.hypot(*(high - value for value, (_, high) in zip(values, intervals, strict=True)))
    return max(0.0, mean - below / len(values)), min(1.0, mean + above / len(values))
