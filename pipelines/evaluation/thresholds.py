"""The deployed threshold, from held-out good parts alone, and what it promises of further ones.

A model that learns nothing from the held-out images (ADFA, DiffusionAD, FAPM) gives them and further good parts scores
that are exchangeable, and the promise of `threshold_at` is exact. EfficientAD and BGAD fix the scale of their map on
these images, and what helped to set a scale need not score like what did not. So a threshold comes from the higher of
two scores of each image: by the deployed model, which all of them calibrated, and by the model as others calibrate it
(`cross_fit`). EfficientAD needs the second: its quantiles lower the scores of those that they come from. BGAD needs the
first: its ceiling is a maximum, and fewer images have a lower one, to which a part scores lower.

This is the K-fold form of the jackknife. In general it has no guarantee (Barber, Candes, Ramdas and Tibshirani,
"Predictive inference with the jackknife+", Annals of Statistics 49, 2021). The relatives that have one, of twice the
rate and a little more (their CV+, and the cross-conformal predictors of Vovk, Annals of Mathematics and Artificial
Intelligence 74, 2015), compare a part with all K models, which an exported file does not hold. What is said here rests
on stability (one image more or less hardly moves a scale) and on simulation (tests/test_promise.py): of 11.1 % promised
with 8 held-out images, 7.8 to 9.2 happen with EfficientAD (up to 16.5 by the first score alone) and 11.1 with BGAD; of
4.8 % with 20 images, 3.7 to 4.3 (up to 7.2) and 4.8. The interval of `threshold_at` is that of the exact case.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction

import torch
from scipy.special import betaincinv
from torch import Tensor

from anomaly_models.base import AnomalyModel, Batch, ModelError
from pipelines.evaluation.metrics import checked_image_scores
from pipelines.evaluation.outcomes import HoldoutThreshold

NUM_FOLDS = 5  # with 2 or 3 the promise is kept with more to spare, with more alike; `refit` learns anew for each
_INTERVAL_TAIL = 0.025  # on each side of a central 95 % interval


def cross_fit(
    model: AnomalyModel, groups: Sequence[str | None], batches: Callable[[Sequence[int]], Iterable[Batch]]
) -> Iterator[tuple[AnomalyModel, Sequence[int]]]:
    """Yield models to score the held-out images with, and the places (from 0) of those that one was not calibrated on.

    `groups` has the group of each image, which stays whole, or None; `batches` gives the held-out images at such
    places. The model itself is not touched; if it does not calibrate, there is nothing to yield.

    Raises:
        ModelError: without some of them, the images are too few or too plain to calibrate on.
    """
    if type(model).calibrate is AnomalyModel.calibrate:
        return
    for fold in folds(groups):
        others = [place for place in range(len(groups)) if place not in fold]
        if len(others) < max(1, model.min_holdout):
            raise ModelError(f"{len(groups)} held-out images: {len(others)} are too few to calibrate on")
        by_others = model.copied()
        by_others.calibrate(batches(others))
        yield by_others, fold


def refit(
    model: AnomalyModel, fold_of: Sequence[int], batches: Callable[[Sequence[int]], Iterable[Batch]]
) -> Iterator[tuple[AnomalyModel, Sequence[int]]]:
    """Yield models that learn anew from all folds but one, and the places (from 0) of the images of that one.

    `fold_of` has the fold of each image that the `model` learnt from by `prepare` alone; it is not touched.

    Raises:
        ModelError: the other folds are too few, or too plain, to learn from.
    """
    for fold in sorted(set(fold_of)):
        by_others = copy.deepcopy(model)
        by_others.prepare(batches([place for place, own in enumerate(fold_of) if own != fold]))
        yield by_others, [place for place, own in enumerate(fold_of) if own == fold]


def folds(groups: Sequence[str | None]) -> list[list[int]]:
    """Places of images by folds of whole groups, in turn; a single group is no reason to have a single fold."""
    units: dict[str | int, list[int]] = {}
    several = len(set(groups)) > 1
    for place, group in enumerate(groups):
        units.setdefault(place if group is None or not several else group, []).append(place)
    num_folds = min(len(units), NUM_FOLDS)
    return [
        sorted(place for unit in list(units.values())[first::num_folds] for place in unit) for first in range(num_folds)
    ]


def threshold_at(scores: Tensor, false_alarm_rate: float) -> HoldoutThreshold:
    """The threshold that held-out normal scores (N,) support at a stated false-alarm rate (the conformal quantile).

    The value is the k-th smallest score, k = min(n, ceil((n + 1)(1 - rate))). If held-out and future normal images are
    exchangeable and scores continuous, the k-th of n order statistics leaves above it a Beta(n + 1 - k, k) distributed
    share of the normal images, whose mean is (n + 1 - k) / (n + 1), at most the requested rate unless k was cut to n
    (David and Nagaraja, Order Statistics, 2003, chapter 2; Vovk, Machine Learning 92, 2013). With ties the promise is
    kept from one side only: fewer false alarms may happen than are expected, none where all good parts score the same.

    Raises:
        ValueError: no score, a score that is NaN or infinite, or a rate outside (0, 1).
    """
    if not 0 < false_alarm_rate < 1:
        raise ValueError(f"a false-alarm rate lies between 0 and 1, both excluded, found {false_alarm_rate}")
    scores, _ = checked_image_scores(scores, torch.zeros_like(scores))
    n = len(scores)
    if n < 1:
        raise ValueError("a threshold needs at least one held-out normal image, found none: hold some out")
    rate = Fraction(repr(float(false_alarm_rate)))  # as written: in floating point 10 * (1 - 0.7) exceeds 3
    k = min(n, math.ceil((n + 1) * (1 - rate)))
    num_above = n + 1 - k
    num_images_needed = math.ceil(1 / rate) - 1
    return HoldoutThreshold(
        value=float(scores.sort().values[k - 1]),
        rate_requested=float(false_alarm_rate),
        num_images=n,
        rank=k,
        expected_rate=num_above / (n + 1),
        interval_low=float(betaincinv(num_above, k, _INTERVAL_TAIL)),
        interval_high=float(betaincinv(num_above, k, 1 - _INTERVAL_TAIL)),
        attainable=n >= num_images_needed,
        num_images_needed=num_images_needed,
    )
