"""Three answers: accept a part, reject it, or let a person look; how many a person will have to look at.

A score up to the threshold is accepted, as ever. Above it a part may be rejected without a look only if the score is
above a second threshold, for which there is a reason:

- where defects are known that this model neither learnt from nor is tested on, it is the conformal quantile of their
  scores from below: of defects like them, at most a stated share is left to a person. But only if it is higher than
  any good part that was held out (or than all but the few that may be rejected without a look), or else the parts that
  the model is least sure of would be the ones that nobody looks at;
- else it is that of the held-out good parts at a second, smaller rate of false alarms;
- where too few were held out to promise it, nothing is rejected without a look: no score that was seen says how far one
  must be from good.

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
    upper = threshold_at(torch.tensor(held_out), reject_rate)  # too few held out: their highest score
    defects = sorted(known_defects)
    if defects and defects[_rank(len(defects), review_rate) - 1] > upper.value:
        return _of_defects(held_out, threshold, defects, review_rate)
    return _of_good(threshold, upper, len(defects))


def _rank(number: int, rate: float) -> int:
    """Of the score that so few defects have, at most; the lowest, if there are too few for that."""
    return max(1, math.floor((number + 1) * Fraction(repr(float(rate)))))  # as written


def _of_defects(held_out: Sequence[float], threshold: HoldoutThreshold, defects: list[float], rate: float) -> Review:
    rank, n = _rank(len(defects), rate), len(held_out)
    above = defects[rank - 1]
    within = sum(score <= above for score in held_out) - threshold.rank  # of the held-out ones, between the two
    needed = math.ceil(1 / Fraction(repr(float(rate)))) - 1
    return Review(
        reject_above=above,
        comes_from="known defects",
        num_images=len(defects),
        num_known_defects=len(defects),
        rate_requested=rate,
        expected_rate=rank / (len(defects) + 1),
        attainable=len(defects) >= needed,
        num_images_needed=needed,
        expected_load=(within + 1) / (n + 1),
        load_low=_end(within, n, TAIL),
        load_high=_end(within + 1, n, 1 - TAIL),
    )


def _of_good(threshold: HoldoutThreshold, upper: HoldoutThreshold, num_known_defects: int) -> Review:
    # The first threshold's own word counts too: it knows where the scores are not what good parts will score.
    is_supported = upper.attainable and threshold.attainable
    n = upper.num_images
    between = (upper.rank if is_supported else n + 1) - threshold.rank
    return Review(
        reject_above=upper.value if is_supported else None,
        comes_from="held-out good parts",
        num_images=n,
        num_known_defects=num_known_defects,
        rate_requested=upper.rate_requested,
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
