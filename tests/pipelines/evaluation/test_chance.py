import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from made_up import PIXEL_THRESHOLD, draw_maps, draw_scores, pixels_of, rng
from numpy.typing import NDArray
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score, roc_auc_score

from pipelines.evaluation.chance import Difference, differences
from pipelines.evaluation.metrics import ExactPixelMetrics
from pipelines.evaluation.outcomes import Outcome, PixelCounts, TestSet, bin_edges, count_pixels


def outcome(
    name: str, scores: NDArray[np.float64], labels: NDArray[np.bool_], pixels: PixelCounts | None = None
) -> Outcome:
    images = tuple((f"{place:03}.png", bool(label)) for place, label in enumerate(labels))
    return Outcome(name, TestSet("nut", images, "data", 256, "pixels", None), scores, 5.0, {}, pixels)


def pixel_figures(
    maps: NDArray[np.float32], masks: NDArray[np.bool_], threshold: float = PIXEL_THRESHOLD
) -> tuple[dict[str, float], PixelCounts]:
    exact = ExactPixelMetrics()
    exact.update(torch.from_numpy(maps), torch.from_numpy(masks))
    points = exact.operating_points()
    counts = count_pixels(pixels_of(maps, masks), bin_edges(points.curves().threshold), threshold)
    return points.result().figures | {"pixel_f1": counts.f1}, counts


def f1_max(labels: NDArray[np.bool_], scores: NDArray[np.float64]) -> float:
    called = [scores >= threshold for threshold in scores]
    return max(2 * (labels & c).sum() / (labels.sum() + c.sum()) for c in called)


def test_what_is_observed_is_the_difference_of_the_figures() -> None:
    """Of pixels up to the bins."""
    labels = np.arange(30) >= 12
    scores = [draw_scores(auroc, labels, "nut", name, 0) for name, auroc in (("a", 0.9), ("b", 0.7))]
    made = [draw_maps(s, labels, "nut") for s in scores]
    figures, counts = zip(*(pixel_figures(*maps) for maps in made), strict=True)
    a, b = (outcome(n, s, labels, c) for n, s, c in zip("ab", scores, counts, strict=True))
    found = differences(a, b, 5)
    for name, metric in (
        ("image_auroc", roc_auc_score),
        ("image_ap", average_precision_score),
        ("image_f1_max", f1_max),
    ):
        assert found[name].observed == pytest.approx(metric(labels, scores[0]) - metric(labels, scores[1]))
    called = [s > 5.0 for s in scores]
    assert found["recall"].observed == pytest.approx(called[0][labels].mean() - called[1][labels].mean())
    assert found["false_alarms"].observed == pytest.approx(called[0][~labels].mean() - called[1][~labels].mean())
    for name, value in figures[0].items():
        assert found[name].observed == pytest.approx(value - figures[1][name], abs=3e-3)


def test_every_exchange_is_the_difference_of_the_figures_with_results_exchanged() -> None:
    """With two images of a kind there are 16 exchanges, each of which many draws find; scales do not matter."""
    labels = np.array([False, False, True, True])
    ours, theirs = np.array([1.0, 2.0, 3.0, 1.5]), np.array([10.0, 40.0, 20.0, 30.0])
    found = differences(outcome("a", ours, labels), outcome("b", theirs, labels), 400)["image_auroc"]
    ranks = rankdata(ours), rankdata(theirs)
    expected = set()
    for swapped in product((False, True), repeat=4):
        one, other = np.where(swapped, ranks[1], ranks[0]), np.where(swapped, ranks[0], ranks[1])
        expected.add(round(roc_auc_score(labels, one) - roc_auc_score(labels, other), 9))
    assert set(found.exchanged.round(9).tolist()) == expected
    assert len(found.exchanged) == 400


def test_the_variance_of_a_difference_of_aurocs_is_delongs() -> None:
    """The jackknife's, of each class, is that of the placement values."""
    labels = np.arange(140) >= 60
    a, b = (draw_scores(0.9, labels, "nut", name, 0, alike=0.8) for name in "ab")
    wins = [(s[labels][:, None] > s[~labels]).astype(float) for s in (a, b)]
    difference = wins[0] - wins[1]
    found = differences(outcome("a", a, labels), outcome("b", b, labels), 5)["image_auroc"]
    (of_anomalous, freedom), (of_normal, other_freedom) = found.parts
    assert (freedom, other_freedom) == (79, 59)
    assert of_anomalous == pytest.approx(difference.mean(1).var(ddof=1) / 80)
    assert of_normal == pytest.approx(difference.mean(0).var(ddof=1) / 60)


def test_pixels_are_exchanged_whatever_the_models_scales_and_sizes_are() -> None:
    """A model against itself in other units, on maps of twice the side: no exchange makes a difference."""
    labels = np.arange(20) >= 8
    maps, masks = draw_maps(draw_scores(0.8, labels, "nut", "a", 0), labels, "nut")
    maps = (maps * 20).round() / 20
    larger = np.exp(maps).repeat(2, axis=1).repeat(2, axis=2)
    (_, counts), (_, same) = (
        pixel_figures(maps, masks, 1.02),
        pixel_figures(larger, masks.repeat(2, axis=1).repeat(2, axis=2), math.exp(1.02)),
    )
    scores = np.arange(20.0)
    found = differences(outcome("a", scores, labels, counts), outcome("b", scores, labels, same), 50)
    for name in ("pixel_auroc", "pixel_ap", "pixel_f1", "pixel_f1_max", "aupro_30", "aupro_05"):
        assert np.abs(found[name].exchanged).max() < 1e-6  # region shares are kept as float32
        assert abs(found[name].observed) < 1e-6


def test_exchanges_are_those_of_the_images_and_not_of_the_models() -> None:
    labels = np.arange(20) >= 8
    a, b = (outcome(name, draw_scores(0.8, labels, "nut", name, 0), labels) for name in "ab")
    one = differences(a, b, 30)["image_auroc"].exchanged
    again = differences(replace(b, name="x"), replace(a, name="y"), 30)["image_auroc"].exchanged
    assert one == pytest.approx(-again)
    assert np.unique(one).size > 10


def test_separated_by_both_is_no_difference() -> None:
    labels = np.arange(20) >= 8
    a, b = (outcome(name, np.where(labels, 9.0, 1.0) + rng(name).random(20), labels) for name in "ab")
    found = differences(a, b, 30)["image_auroc"]
    assert found.p_value(found.observed, []) == 1.0


def test_a_class_of_one_image_tells_nothing() -> None:
    """Where a perfect model and a useless one are compared too; shares of the other class are told all the same."""
    labels = np.arange(21) >= 1
    good, bad = np.where(labels, 9.0, 1.0), np.where(labels, 1.0, 9.0)
    found = differences(outcome("a", good, labels), outcome("b", bad, labels), 99)
    assert found["image_auroc"].p_value(found["image_auroc"].observed, []) == 1.0
    assert found["false_alarms"].p_value(found["false_alarms"].observed, []) == 1.0
    assert found["recall"].p_value(found["recall"].observed, []) == pytest.approx(0.01)


def test_the_less_certain_answer_counts() -> None:
    """One in a hundred by exchange; by Student's t with 10 degrees of freedom, 2.228 standard errors are 5 %."""
    exchanged = np.linspace(-1, 1, 199)
    difference = Difference(1.0, exchanged, ((0.2, 10),))
    assert difference.p_value(2.228 * math.sqrt(0.2), []) == pytest.approx(0.05, abs=2e-3)
    assert difference.p_value(9.0, []) == 1 / 200
    assert Difference(1.0, exchanged, ((0.0, 10),)).p_value(1.0, []) == pytest.approx(3 / 200)


def test_an_average_weighs_categories_alike() -> None:
    one = Difference(0.1, np.array([0.1, 0.3]), ((0.04, 9),))
    two = Difference(0.3, np.array([-0.1, 0.1]), ((0.08, 19),))
    mean = Difference.mean([one, two])
    assert mean.observed == pytest.approx(0.2)
    assert mean.exchanged.tolist() == pytest.approx([0.0, 0.2])
    assert mean.parts == ((0.01, 9), (0.02, 19))
