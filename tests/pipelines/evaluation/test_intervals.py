import math

import numpy as np
import pytest
from made_up import draw_scores, rng
from numpy.typing import NDArray
from scipy.special import expit, logit
from scipy.stats import binomtest
from scipy.stats import t as student
from sklearn.metrics import roc_auc_score

from pipelines.evaluation.intervals import auroc_interval, bounded_interval, mean_interval, placements, share_interval

LABELS = np.arange(140) >= 60


def wins(scores: NDArray[np.float64], labels: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(A, N): 1 where an anomalous image scores above a normal one, 1/2 where they tie."""
    return (scores[labels][:, None] > scores[~labels]) + 0.5 * (scores[labels][:, None] == scores[~labels])


@pytest.mark.parametrize(("hits", "n"), [(0, 12), (12, 12), (5, 12), (1, 41), (40, 41), (29, 100)])
def test_a_share_has_the_exact_interval(hits: int, n: int) -> None:
    expected = binomtest(hits, n).proportion_ci(0.95, method="exact")
    assert share_interval(hits / n, n) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert bounded_interval(hits / n, n) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_a_mean_that_is_no_whole_number_of_images_lies_between_those_that_are() -> None:
    ends = [bounded_interval(hits / 20, 20) for hits in (18, 18.5, 19)]
    assert ends[0] < ends[1] < ends[2]
    assert bounded_interval(1 - 1e-9, 20) == pytest.approx(bounded_interval(1.0, 20), abs=1e-6)


def test_placements_are_the_wins_of_each_image() -> None:
    scores = rng("ties").integers(0, 9, size=140).astype(np.float64)
    above, below = placements(scores[LABELS], scores[~LABELS])
    assert above == pytest.approx(wins(scores, LABELS).mean(1))
    assert below == pytest.approx(wins(scores, LABELS).mean(0))
    assert above.mean() == pytest.approx(roc_auc_score(LABELS, scores))


def test_the_interval_of_an_auroc_is_delongs_on_the_logit_scale() -> None:
    """Where many images are ranked wrongly nothing widens it."""
    scores = draw_scores(0.7, LABELS, "nut", "a", 0)
    by_image = wins(scores, LABELS)
    value, parts = by_image.mean(), (by_image.mean(1).var(ddof=1) / 80, by_image.mean(0).var(ddof=1) / 60)
    variance = sum(parts)
    freedom = variance**2 / (parts[0] ** 2 / 79 + parts[1] ** 2 / 59)
    margin = student.ppf(0.975, freedom) * math.sqrt(variance) / (value * (1 - value))
    low, high = auroc_interval(scores, LABELS)
    assert high == pytest.approx(expit(logit(value) + margin), abs=2e-3)  # Hanley and McNeil's may be a little larger
    assert low == pytest.approx(expit(logit(value) - margin), abs=2e-3)


def test_one_image_ranked_wrongly_is_not_surer_than_none() -> None:
    labels = np.arange(120) >= 20
    perfect = np.where(labels, 9.0, 1.0) + np.arange(120) / 1000
    one_wrong = perfect.copy()
    one_wrong[25] = 1.0185  # above all normal images but one
    assert auroc_interval(perfect, labels) == pytest.approx((0.025 ** (1 / 20), 1.0))
    low, high = auroc_interval(one_wrong, labels)
    assert low <= 0.025 ** (1 / 20)
    assert 0.9995 < high < 1


def test_useless_scores_and_single_images() -> None:
    labels = np.arange(30) >= 10
    assert auroc_interval(np.where(labels, 1.0, 9.0), labels) == pytest.approx((0.0, 1 - 0.025 ** (1 / 10)))
    low, high = auroc_interval(np.ones(30), labels)  # all tie
    assert low < 0.35
    assert high > 0.65
    assert auroc_interval(np.array([1.0, 2.0, 1.5]), np.array([False, True, True])) == pytest.approx((0.025, 1.0))
    assert auroc_interval(np.array([1.0, 2.0, 0.5]), np.array([False, True, True])) == (0.0, 1.0)


def test_a_mean_of_independent_figures() -> None:
    """Zou and Donner: distances to the ends, squared and added."""
    low, high = mean_interval([0.9, 0.8], [(0.6, 0.95), (0.4, 0.9)])
    assert low == pytest.approx(0.85 - math.hypot(0.3, 0.4) / 2)
    assert high == pytest.approx(0.85 + math.hypot(0.05, 0.1) / 2)
