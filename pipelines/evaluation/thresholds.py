"""The deployed threshold, from held-out good parts alone."""

import math
from fractions import Fraction

import torch
from scipy.special import betaincinv
from torch import Tensor

from pipelines.evaluation.metrics import checked_image_scores
from pipelines.evaluation.outcomes import HoldoutThreshold

_INTERVAL_TAIL = 0.025  # on each side of a central 95 % interval


def threshold_at(scores: Tensor, false_alarm_rate: float) -> HoldoutThreshold:
    """The threshold that held-out normal scores (N,) support at a stated false-alarm rate (the conformal quantile).

    The value is the k-th smallest score, k = min(n, ceil((n + 1)(1 - rate))). If held-out and future normal images are
    exchangeable and scores continuous, the k-th of n order statistics leaves above it a Beta(n + 1 - k, k) distributed
    share of the normal images, whose mean is (n + 1 - k) / (n + 1), at most the requested rate unless k was cut to n
    (David and Nagaraja, Order Statistics, 2003, chapter 2; Vovk, Machine Learning 92, 2013). Ties only lower it.

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
