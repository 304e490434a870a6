"""AUROC, AP, F1-max and AUPRO in one place: of images, of pixels, and of test sets drawn from either.

All four are read off the same curve: what is called anomalous as the threshold falls. Its counts need not be whole
numbers: a drawn test set counts an image as often as it was drawn. A metric that needs a class which is absent is NaN,
not 0 or 1. AUPRO follows the reference evaluation of MVTec AD (Bergmann et al., IJCV 129, 2021): the curve from (0, 0)
to (1, 1) is cut at the limit by linear interpolation.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

PRO_LIMITS = {"aupro_30": 0.3, "aupro_05": 0.05}  # of the false-positive rate, by the metric's name
SPRO_LIMITS = {"spro_05": 0.05}  # likewise, where the overlap of a region saturates (MVTec LOCO)

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Curve:
    """Cumulative counts (..., P) as the threshold falls, from nothing called anomalous to everything.

    Leading axes are test sets that share their thresholds.
    """

    false_positives: Floats
    true_positives: Floats
    region_overlap: Floats | None = None  # the found share of each region, summed; images have none

    @classmethod
    def of(cls, normal: NDArray[Any], anomalous: NDArray[Any], regions: NDArray[Any] | None = None) -> "Curve":
        """From the counts (..., P - 1) of what is between two thresholds, the highest scores first."""
        return cls(_cumulative(normal), _cumulative(anomalous), None if regions is None else _cumulative(regions))

    @property
    def recall(self) -> Floats:
        return self.true_positives / self._totals()[1]

    @property
    def false_positive_rate(self) -> Floats:
        return self.false_positives / self._totals()[0]

    @property
    def precision(self) -> Floats:
        """1 where nothing is called anomalous yet, as the curve is drawn everywhere."""
        called = self.true_positives + self.false_positives
        return np.divide(self.true_positives, called, out=np.ones_like(called), where=called > 0)

    @property
    def mean_overlap(self) -> Floats:
        """PRO: the found share of a region, on average over regions, which all weigh the same."""
        assert self.region_overlap is not None
        num_regions = self.region_overlap[..., -1:]  # up to rounding
        return self.region_overlap / np.where(num_regions > 0, num_regions, np.nan)

    @property
    def num_anomalous(self) -> Floats:
        """(...), NaN where nothing is normal or nothing is anomalous."""
        return self._totals()[1][..., 0]

    def auroc(self) -> Floats:
        """(...), ties counted half."""
        fp, tp = self.false_positives, self.true_positives
        num_normal, num_anomalous = (total[..., 0] for total in self._totals())
        area: Floats = (np.diff(fp) * (tp[..., 1:] + tp[..., :-1])).sum(-1) / 2
        return area / (num_normal * num_anomalous)

    def ap(self) -> Floats:
        """(...), the step function, not the trapezoid."""
        gain: Floats = (np.diff(self.true_positives) * self.precision[..., 1:]).sum(-1)
        return gain / self._totals()[1][..., 0]

    def f1(self) -> Floats:
        """(..., P), at each threshold."""
        return f1(self.true_positives, self.false_positives, self._totals()[1])

    def overlaps(self, *, saturated: bool) -> dict[str, Floats]:
        """(...), AUPRO by the metric's name; what it is called where overlaps are saturated."""
        limits = SPRO_LIMITS if saturated else PRO_LIMITS
        return {name: self.aupro(limit) for name, limit in limits.items()}

    def aupro(self, limit: float) -> Floats:
        """(...), the area under PRO over the false-positive rate up to `limit`, interpolated there, over `limit`."""
        rate, overlap = self.false_positive_rate, self.mean_overlap
        width, rise = np.diff(rate), np.diff(overlap)
        kept = np.clip(limit - rate[..., :-1], 0, width)  # of each step's width
        share = np.divide(kept, width, out=np.zeros_like(width), where=width > 0)
        area: Floats = (kept * (2 * overlap[..., :-1] + share * rise)).sum(-1) / 2
        return np.minimum(area / limit, 1.0)  # rounding may exceed the 1 of a perfect map

    def _totals(self) -> tuple[Floats, Floats]:
        """How much is normal and anomalous, (..., 1); both NaN where either is nothing."""
        totals = self.false_positives[..., -1:], self.true_positives[..., -1:]
        both = (totals[0] > 0) & (totals[1] > 0)
        return np.where(both, totals[0], np.nan), np.where(both, totals[1], np.nan)


def f1(true_positives: Floats, false_positives: Floats, num_anomalous: Floats) -> Floats:
    """(...), the harmonic mean of precision and recall."""
    return 2 * true_positives / (num_anomalous + true_positives + false_positives)


def image_curve(scores: Floats, labels: Bools, weights: Floats | float = 1.0) -> tuple[Floats, Curve]:
    """The distinct ones of scores (N,), highest first: (D,); and the curve (..., 1 + D) that calls one after another.

    `weights` (..., N) is how often each image counts.
    """
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    last = last_of_equals(ranked)
    of_images = Curve.of((weights * ~labels)[..., order], (weights * labels)[..., order])
    points = np.append(0, last + 1)
    return ranked[last], Curve(of_images.false_positives[..., points], of_images.true_positives[..., points])


def last_of_equals(ranked: NDArray[Any]) -> NDArray[np.int64]:
    """The places in sorted scores (N,) after which another score begins: equal ones make one point of a curve."""
    return np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True)[: len(ranked)])


def _cumulative(counts: NDArray[Any]) -> Floats:
    summed = np.zeros((*counts.shape[:-1], counts.shape[-1] + 1))
    np.cumsum(counts, axis=-1, out=summed[..., 1:])
    return summed
