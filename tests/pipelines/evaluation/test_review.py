"""Three answers: where the second threshold comes from, and whether so many parts go to a person as is said."""

import numpy as np
import pytest
import torch
from scipy.stats import norm

from pipelines.evaluation.outcomes import Review
from pipelines.evaluation.review import review
from pipelines.evaluation.thresholds import threshold_at

RATES = {"reject_rate": 0.01, "review_rate": 0.1}


def reviewed(held_out, known_defects=(), rate=0.05, **rates) -> Review:
    threshold = threshold_at(torch.tensor(held_out, dtype=torch.float64), rate)
    return review(list(held_out), threshold, list(known_defects), **RATES | rates)


def test_known_defects_set_it_from_below() -> None:
    held_out, defects = [float(n) for n in range(1, 41)], [50.0 + n for n in range(19)]
    found = reviewed(held_out, defects)  # the threshold is 39, the second lowest of 19 defects 51
    assert (found.reject_above, found.comes_from, found.num_images) == (51.0, "known defects", 19)
    assert (found.expected_rate, found.attainable, found.num_images_needed) == (2 / 20, True, 9)
    assert found.expected_load == 2 / 41
    assert found.load_low < 1 / 41 < found.expected_load < found.load_high


def test_too_few_known_defects_say_what_they_can_promise() -> None:
    found = reviewed([1.0] * 5 + [2.0], [5.0, 4.0])
    assert (found.reject_above, found.expected_rate, found.attainable) == (4.0, 1 / 3, False)


def test_defects_that_score_like_good_parts_reject_nothing_without_a_look() -> None:
    found = reviewed([float(n) for n in range(1, 41)], [float(n) for n in range(19)])
    assert (found.reject_above, found.comes_from, found.num_known_defects) == (None, "held-out good parts", 19)
    assert "the lowest of 19 known defects score like good parts" in found.text(39.0)
    # Where enough good parts are held out, they say what is far enough.
    found = reviewed([float(n) for n in range(1, 200)], [50.0 + n for n in range(19)])
    assert (found.reject_above, found.comes_from) == (198.0, "held-out good parts")


def test_without_known_defects_enough_good_parts_set_it() -> None:
    found = reviewed([float(n) for n in range(1, 200)])
    assert (found.reject_above, found.comes_from, found.num_images) == (198.0, "held-out good parts", 199)
    assert (found.expected_rate, found.attainable, found.num_images_needed) == (2 / 200, True, 99)
    assert found.expected_load == 8 / 200
    assert reviewed([float(n) for n in range(1, 200)], reject_rate=0.05).load_ends == (0.0, 0.0, 0.0)


def test_too_few_good_parts_reject_nothing_without_a_look() -> None:
    found = reviewed([float(n) for n in range(1, 21)])
    assert (found.reject_above, found.attainable, found.num_images_needed, found.expected_rate) == (
        None,
        False,
        99,
        0.0,
    )
    threshold = threshold_at(torch.arange(1, 21, dtype=torch.float64), 0.05)
    assert found.load_ends == pytest.approx((threshold.expected_rate, threshold.interval_low, threshold.interval_high))


def test_a_threshold_that_promises_nothing_takes_the_second_with_it() -> None:
    held_out = [float(n) for n in range(1, 200)]
    threshold = threshold_at(torch.tensor(held_out), 0.05).model_copy(update={"attainable": False})
    assert review(held_out, threshold, [], **RATES).reject_above is None


@pytest.mark.parametrize(
    ("num_good", "num_defects", "apart"), [(20, 0, 0), (150, 0, 0), (40, 10, 2.5), (40, 40, 2.5), (40, 40, 5)]
)
def test_so_many_good_parts_go_to_a_person_as_is_said(num_good: int, num_defects: int, apart: float) -> None:
    """Of 4,000 draws: scores of normal distribution, those of defects so many standard deviations above."""
    rng = np.random.default_rng(0)
    covered, said, happened, at_once, left = [], [], [], [], []
    for _ in range(4000):
        held_out, defects = rng.normal(size=num_good), rng.normal(apart, size=num_defects)
        threshold = threshold_at(torch.from_numpy(held_out), 0.05)
        found = review(held_out.tolist(), threshold, defects.tolist(), **RATES)
        above = np.inf if found.reject_above is None else found.reject_above
        load = norm.sf(threshold.value) - norm.sf(above)
        happened.append(load)
        said.append(found.expected_load)
        covered.append(found.load_low - 1e-12 <= load <= found.load_high + 1e-12)
        at_once.append(norm.sf(above))
        left.append(norm.cdf(above - apart))
    assert np.mean(covered) > 0.94
    assert np.mean(happened) <= np.mean(said) + 0.002
    assert np.mean(said) - np.mean(happened) < 0.02
    if not num_defects:
        assert np.mean(at_once) < 0.011
    if apart == 5:  # where the defects score higher than the good parts
        assert np.mean(left) == pytest.approx(4 / 41, abs=0.01)
