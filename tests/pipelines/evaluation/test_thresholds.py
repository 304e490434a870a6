"""The threshold from held-out good parts: its rank, its promise, and what cannot be had."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import beta

from pipelines.evaluation.metrics import confusion_at
from pipelines.evaluation.thresholds import threshold_at


def test_too_few_images_promise_no_small_rate():
    threshold = threshold_at(torch.arange(10.0), 0.01)
    assert (threshold.value, threshold.rank, threshold.num_images) == (9.0, 10, 10)
    assert not threshold.attainable
    assert threshold.num_images_needed == 99
    assert threshold.expected_rate == pytest.approx(1 / 11)
    assert threshold.interval_low == pytest.approx(1 - 0.975**0.1)  # Beta(1, 10): (1 - x)^10 is its upper tail
    assert threshold.interval_high == pytest.approx(1 - 0.025**0.1)


def test_interval_is_the_beta_distribution():
    threshold = threshold_at(torch.randperm(200).float(), 0.05)
    assert threshold.rank == math.ceil(201 * 0.95) == 191
    assert threshold.value == 190.0
    assert threshold.attainable
    assert threshold.expected_rate == pytest.approx(10 / 201)
    assert [threshold.interval_low, threshold.interval_high] == pytest.approx(beta(10, 191).ppf([0.025, 0.975]))


@pytest.mark.parametrize(("num_images", "rate"), [(19, 0.05), (99, 0.01), (9, 0.1), (199, 0.005), (7, 0.125)])
def test_the_fewest_images_that_promise_a_rate(num_images, rate):
    enough, too_few = threshold_at(torch.rand(num_images), rate), threshold_at(torch.rand(num_images - 1), rate)
    assert enough.attainable
    assert not too_few.attainable
    assert enough.num_images_needed == too_few.num_images_needed == num_images
    assert enough.rank == num_images
    assert enough.expected_rate == pytest.approx(rate)


def test_the_rank_is_not_moved_by_rounding():
    assert 10 * (1 - 0.7) > 3  # in floating point
    assert threshold_at(torch.rand(9), 0.7).rank == 3


def test_the_promise_holds_by_simulation():
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand((4000, 39), generator=generator, dtype=torch.float64)
    rates, covered = [], 0
    for holdout in draws:
        threshold = threshold_at(holdout, 0.1)
        rate = 1 - threshold.value  # what a uniform score exceeds the threshold with
        rates.append(rate)
        covered += threshold.interval_low <= rate <= threshold.interval_high
    assert np.mean(rates) == pytest.approx(threshold.expected_rate, abs=0.003)
    assert threshold.expected_rate == pytest.approx(0.1)
    assert covered / len(draws) == pytest.approx(0.95, abs=0.012)


@pytest.mark.parametrize(
    ("scores", "rate", "message"),
    [
        ([], 0.01, "at least one held-out normal image"),
        ([0.0, math.nan], 0.01, "score of image 1 .* is nan"),
        ([math.inf, 0.0], 0.01, "score of image 0 .* is inf"),
        ([0.0, 1.0], 0.0, "between 0 and 1, both excluded, found 0.0"),
        ([0.0, 1.0], 1.0, "found 1.0"),
        ([0.0, 1.0], math.nan, "found nan"),
    ],
)
def test_thresholds_that_cannot_be_had(scores, rate, message):
    with pytest.raises(ValueError, match=message):
        threshold_at(torch.tensor(scores), rate)


def test_the_own_holdout_stays_below_its_threshold_but_for_the_rate():
    scores = torch.rand(100, generator=torch.Generator().manual_seed(1))
    threshold = threshold_at(scores, 0.05)
    assert confusion_at(scores, torch.zeros(100), threshold.value).false_positives == 100 - threshold.rank
