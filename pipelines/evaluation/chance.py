"""What chance makes of the difference of two models on the same test images.

Two answers, of which the less certain one counts, since each is wrong where the other is right:

- Exchange: were the two models equally good and alike, it would not matter which of them an image got its result from.
  Exchanging their results on every second image, at random and many times, shows what differences that makes (Bandos,
  Rockette and Gur, Statistics in Medicine 24, 2005, for the AUROC; here for every figure). Scores of two models have
  scales of their own, so they are replaced by their ranks, pixel scores by the share of all pixels that lies above.
  It holds for few images, where nearly all of them separate and a variance cannot be estimated.
- Jackknife: Student's t with the variance of the difference, from leaving out one image after another (Efron and Stein,
  Annals of Statistics 9, 1981; for the AUROC it is DeLong's). It holds for models that are equally good in different
  ways, which exchange takes for a difference where one class has few images.

Simulated with two equally good models, the two together call a difference in 5 % of comparisons or less
(docs/statistics.md).
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr
from scipy.stats import rankdata

from pipelines.evaluation.curves import Bools, Curve, Floats, f1, image_curve
from pipelines.evaluation.intervals import freedom
from pipelines.evaluation.outcomes import Outcome, PixelCounts

Places = NDArray[np.intp]
Part = tuple[float, int]  # a variance and its degrees of freedom

_CHUNK = 256  # test sets at once: they stay in the processor's cache
_NOTHING = 1e-10  # what rounding leaves between equal figures


@dataclass(frozen=True, slots=True)
class Difference:
    """Of one figure of two models, a minus b, on the images of one category or averaged over several."""

    observed: float
    exchanged: Floats  # (R,)
    parts: tuple[Part, ...]  # what the variance is made of; not finite where too few images tell

    @classmethod
    def mean(cls, differences: Sequence["Difference"]) -> "Difference":
        """Of independent ones, which weigh the same."""
        number = len(differences)
        return cls(
            math.fsum(difference.observed for difference in differences) / number,
            np.mean([difference.exchanged for difference in differences], axis=0),
            tuple((variance / number**2, degrees) for found in differences for variance, degrees in found.parts),
        )

    def p_value(self, observed: float, seeds: Sequence[Part]) -> float:
        """How often equally good models differ by `observed` or more.

        `seeds` are what training again adds, variances of single runs: it belongs to the chance that is allowed for.
        """
        return max(self._by_exchange(observed, seeds), self._by_jackknife(observed, seeds))

    def _by_exchange(self, observed: float, seeds: Sequence[Part]) -> float:
        draws = self.exchanged
        if seeds:
            sd = math.sqrt(sum(variance for variance, _ in seeds))
            draws = draws + sd * np.random.default_rng(0).standard_t(freedom(seeds), size=len(draws))
        as_large = np.abs(draws) >= abs(observed) - _NOTHING
        return (1 + int(as_large.sum())) / (1 + len(draws))

    def _by_jackknife(self, observed: float, seeds: Sequence[Part]) -> float:
        parts = [*self.parts, *seeds]
        variance = sum(part for part, _ in parts)
        if not math.isfinite(variance):
            return 1.0
        if variance <= _NOTHING**2:
            return float(abs(observed) <= _NOTHING)
        return float(2 * stdtr(freedom(parts), -abs(observed) / math.sqrt(variance)))


@lru_cache(maxsize=4096)  # a table asks for each figure of a pair by itself, and the average for all of them again
def differences(a: Outcome, b: Outcome, resamples: int) -> dict[str, Difference]:
    """By every figure that both have, on the images that both were tested on."""
    shared = a.test_set.shared(b.test_set)
    a, b = a.of(shared), b.of(shared)
    labels = a.labels
    exchanges = _exchanges(a.test_set.category, a.test_set.images, resamples)
    results = _results(a, b)
    found: dict[str, list[Floats]] = {}
    for own, other in _test_sets(exchanges, len(labels)):
        for result in results:
            mine, theirs = result.figures(own, other), result.figures(other, own)
            for name, values in mine.items():
                found.setdefault(name, []).append(values - theirs[name])
    return {name: _difference(np.concatenate(parts), labels, resamples) for name, parts in found.items()}


def _exchanges(category: str, images: Sequence[tuple[str, bool]], resamples: int) -> Floats:
    """1 where an image's results are exchanged: (R, N). The same for every pair of models on these images."""
    key = hashlib.sha256(repr((category, images)).encode()).digest()
    return np.random.default_rng(list(key)).integers(0, 2, size=(resamples, len(images))).astype(np.float64)


def _test_sets(exchanges: Floats, num_images: int) -> Iterator[tuple[Floats, Floats]]:
    """How often each image counts with its own model's results, and with the other's: twice (rows, N), in chunks.

    The images as they are, then every exchange, then the images without each of them.
    """
    swapped = np.concatenate([np.zeros((1, num_images)), exchanges])
    for start in range(0, len(swapped), _CHUNK):
        rows = swapped[start : start + _CHUNK]
        yield 1 - rows, rows
    for start in range(0, num_images, _CHUNK):
        left_out = np.arange(start, min(start + _CHUNK, num_images))
        yield 1.0 * (left_out[:, None] != np.arange(num_images)), np.zeros((len(left_out), num_images))


def _difference(values: Floats, labels: Bools, resamples: int) -> Difference:
    """From the differences of all test sets of `_test_sets`."""
    without = values[1 + resamples :]
    parts = []
    for of_class in (without[labels], without[~labels]):
        number = len(of_class)
        if np.isnan(of_class).any():  # without its only image there is no figure
            parts.append((math.inf, 1))
        elif number > 1:
            parts.append(((number - 1) / number * float(np.square(of_class - of_class.mean()).sum()), number - 1))
    return Difference(float(values[0]), values[1 : 1 + resamples], tuple(parts))


# ---- results that can be exchanged -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Decisions:
    """Whether each model calls each image anomalous: (N,)."""

    a: Bools
    b: Bools
    of: Bools  # the images that the share is of
    name: str

    def figures(self, from_a: Floats, from_b: Floats) -> dict[str, Floats]:
        """The share with each image counted so often (rows, N) with a's result and with b's."""
        of = self.of
        total = from_a[:, of].sum(1) + from_b[:, of].sum(1)
        called = from_a[:, of] @ self.a[of] + from_b[:, of] @ self.b[of]
        with np.errstate(invalid="ignore"):
            return {self.name: called / total}


@dataclass(frozen=True, slots=True)
class _Scores:
    """Ranks (N,) of each model's scores."""

    a: Floats
    b: Floats
    labels: Bools

    def figures(self, from_a: Floats, from_b: Floats) -> dict[str, Floats]:
        ranks, labels = np.concatenate([self.a, self.b]), np.concatenate([self.labels, self.labels])
        _, curve = image_curve(ranks, labels, np.concatenate([from_a, from_b], axis=1))
        return {"image_auroc": curve.auroc(), "image_ap": curve.ap(), "image_f1_max": curve.f1().max(-1)}


@dataclass(frozen=True, slots=True)
class _Pixels:
    """The pixels of each image in bins (N, B) that the models share, and those called anomalous (N, 2)."""

    a: tuple[Floats, Floats, Floats]  # normal, anomalous, regions
    b: tuple[Floats, Floats, Floats]
    a_called: Floats
    b_called: Floats
    saturated: bool

    @classmethod
    def of(cls, a: PixelCounts, b: PixelCounts) -> "_Pixels":
        heights = [_height(counts) for counts in (a, b)]
        shared, place = np.unique(np.concatenate(heights).round(12), return_inverse=True)
        places = place[: len(heights[0])], place[len(heights[0]) :]
        moved = [_moved(counts, where, len(shared)) for counts, where in zip((a, b), places, strict=True)]
        return cls(moved[0], moved[1], a.called / _total(a), b.called / _total(b), bool(a.saturated.any()))

    def figures(self, from_a: Floats, from_b: Floats) -> dict[str, Floats]:
        curve = Curve.of(*(from_a @ a + from_b @ b for a, b in zip(self.a, self.b, strict=True)))
        called = from_a @ self.a_called + from_b @ self.b_called
        return {
            "pixel_auroc": curve.auroc(),
            "pixel_ap": curve.ap(),
            "pixel_f1": f1(called[:, 1], called[:, 0], curve.num_anomalous),
            "pixel_f1_max": curve.f1().max(-1),
            **curve.overlaps(saturated=self.saturated),
        }


def _height(counts: PixelCounts) -> Floats:
    """The share of all pixels above the middle of each bin, (B,)."""
    own = (counts.normal + counts.anomalous).sum(0, dtype=np.float64)
    middle: Floats = np.cumsum(own) - own / 2
    return middle / own.sum()


def _total(counts: PixelCounts) -> float:
    return float(counts.normal.sum() + counts.anomalous.sum())


def _moved(counts: PixelCounts, place: Places, num_bins: int) -> tuple[Floats, Floats, Floats]:
    """Into the shared bins; pixels as shares of all, since the maps of two models may differ in size."""
    total = _total(counts)
    moved = [np.zeros((len(counts.normal), num_bins)) for _ in range(3)]
    for target, kind, unit in zip(
        moved, (counts.normal, counts.anomalous, counts.regions), (total, total, 1), strict=True
    ):
        np.add.at(target.T, place, kind.T / unit)
    return moved[0], moved[1], moved[2]


def _results(a: Outcome, b: Outcome) -> list[_Decisions | _Scores | _Pixels]:
    labels = a.labels
    called = a.scores > a.threshold, b.scores > b.threshold
    found: list[_Decisions | _Scores | _Pixels] = [
        _Decisions(*called, of, name) for name, of in (("recall", labels), ("false_alarms", ~labels)) if of.any()
    ]
    if labels.any() and not labels.all():
        found.append(_Scores(rankdata(a.scores), rankdata(b.scores), labels))
    if a.pixels is not None and b.pixels is not None and _has_both(a.pixels) and _has_both(b.pixels):
        found.append(_Pixels.of(a.pixels, b.pixels))
    return found


def _has_both(pixels: PixelCounts) -> bool:
    return bool(pixels.anomalous.any() and pixels.normal.any())
