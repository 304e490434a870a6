"""Three answers: accept a part, reject it, or let a person look; how many a person will have to look at.

A score up to the threshold is accepted, as ever. Above it a part may be rejected without a look only if the score is
above a second threshold, for which there is a reason:

- where defects are known that this model neither learnt from nor is tested on, it is the conformal quantile of their
  scores from below: of defects like them, at most a stated share is left to a person;
- else it is that of the held-out good parts at a second, smaller rate of false alarms. Where too few were held out to
  promise it, nothing is rejected without a look: no score that was seen says how far one must be from good.

Of good parts, those between the two go to a person for nothing. The share of a continuous distribution between the
k-th and the l-th of n order statistics is Beta(l - k, n + 1 - l + k) distributed (David and Nagaraja, Order Statistics,
2003, chapter 2), whatever the distribution. A second threshold that comes from elsewhere lies between two of the good
parts' order statistics: the lower end of the interval is that of the one below it, the upper end and the expectation
are those of the one above, so that the load is rather overstated (tests/pipelines/evaluation/test_review.py).
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from scipy.special import betaincinv

from pipelines.evaluation.intervals import TAIL
from pipelines.evaluation.outcomes import HoldoutThreshold, Review
from pipelines.evaluation.thresholds import threshold_at


def review(
    held_out: Sequence[float],
    threshold: HoldoutThreshold,
    known_defects: Sequence[float],
    *,
    reject_rate: float,
    review_rate: float,
) -> Review:
    """The second threshold, from known defects where there are any, and what lies between the two.

    `threshold` is that of the scores `held_out`, of at least one good part. `reject_rate`: of good parts, that may be
    rejected without a look. `review_rate`: of defects, that may be left to a person.
    """
    if known_defects:
        return _of_defects(held_out, threshold, sorted(known_defects), review_rate)
    return _of_good(held_out, threshold, reject_rate)


def _of_defects(held_out: Sequence[float], threshold: HoldoutThreshold, defects: list[float], rate: float) -> Review:
    exact = Fraction(repr(float(rate)))
    rank = max(1, math.floor((len(defects) + 1) * exact))
    above = max(defects[rank - 1], threshold.value)
    n, k = len(held_out), threshold.rank
    within = sum(score <= above for score in held_out) - k  # of the held-out ones, between the two
    is_empty = above == threshold.value
    needed = math.ceil(1 / exact) - 1
    return Review(
        reject_above=above,
        comes_from="known defects",
        num_images=len(defects),
        rate_requested=rate,
        expected_rate=rank / (len(defects) + 1),
        attainable=len(defects) >= needed,
        num_images_needed=needed,
        expected_load=0.0 if is_empty else (within + 1) / (n + 1),
        load_low=0.0 if is_empty else _end(within, n, TAIL),
        load_high=0.0 if is_empty else _end(within + 1, n, 1 - TAIL),
    )


def _of_good(held_out: Sequence[float], threshold: HoldoutThreshold, rate: float) -> Review:
    upper = threshold_at(torch.tensor(held_out), rate)
    # The first threshold's own word counts too: it knows where the scores are not what good parts will score.
    is_supported = upper.attainable and threshold.attainable
    n = len(held_out)
    between = (upper.rank if is_supported else n + 1) - threshold.rank
    return Review(
        reject_above=upper.value if is_supported else None,
        comes_from="held-out good parts",
        num_images=n,
        rate_requested=rate,
        expected_rate=upper.expected_rate if is_supported else 0.0,
        attainable=is_supported,
        num_images_needed=upper.num_images_needed,
        expected_load=between / (n + 1),
        load_low=_end(between, n, TAIL),
        load_high=_end(between, n, 1 - TAIL),
    )


def _end(between: int, n: int, tail: float) -> float:
    """A quantile of the share between two of n order statistics that are so many places apart."""
    return 0.0 if between == 0 else float(betaincinv(between, n + 1 - between, tail))
