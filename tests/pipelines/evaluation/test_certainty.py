import math
import time
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from made_up import draw_maps, draw_scores, pixels_of, put_evaluation, rng
from numpy.typing import NDArray
from scipy.stats import binomtest
from scipy.stats import t as student
from sklearn.metrics import average_precision_score, roc_auc_score

from pipelines.errors import StageError
from pipelines.evaluation.certainty import (
    Champion,
    Measured,
    Spread,
    average,
    champion,
    compare,
    compare_all,
    measure,
    resample,
    share_interval,
    spread_of,
)
from pipelines.evaluation.measures import METRICS
from pipelines.evaluation.metrics import ExactPixelMetrics, image_metrics
from pipelines.evaluation.outcomes import Outcome, PixelCounts, TestSet, bin_edges, count_pixels, read_outcome

KEYS = [metric.key for metric in METRICS]


def images_of(good: int, defect: int, category: str = "nut") -> TestSet:
    names = [(f"test/good/{number:03}.png", False) for number in range(good)]
    names += [(f"test/cut/{number:03}.png", True) for number in range(defect)]
    return TestSet(category, tuple(sorted(names)), "data", 256, "pixels", None)


def labels_of(test_set: TestSet) -> NDArray[np.bool_]:
    return np.array([label for _, label in test_set.images])


def outcome(
    name: str, test_set: TestSet, scores: NDArray[np.float64], threshold: float = 5.0, pixels: PixelCounts | None = None
) -> Outcome:
    """With the metrics of these scores."""
    labels, called = labels_of(test_set), scores > threshold
    values = image_metrics(torch.from_numpy(scores), torch.from_numpy(labels)).figures
    if labels.any():
        values["recall"] = float(called[labels].mean())
    if not labels.all():
        values["false_alarms"] = float(called[~labels].mean())
    values = {key: value for key, value in values.items() if not math.isnan(value)}
    return Outcome(name, test_set, scores, threshold, values, pixels)


def drawn(
    name: str, category: str = "nut", auroc: float = 0.9, seed: int = 0, *, size: Any = (30, 50), resamples: int = 400
) -> Measured:
    """`size`: how many good and anomalous images there are."""
    test_set = images_of(*size, category)
    scores = draw_scores(auroc, labels_of(test_set), category, name, seed)
    return measure(outcome(name, test_set, scores), resamples)


def exact_metrics(maps: NDArray[np.float32], masks: NDArray[np.bool_]) -> ExactPixelMetrics:
    exact = ExactPixelMetrics()
    exact.update(torch.from_numpy(maps), torch.from_numpy(masks))
    return exact


def counts_of(maps: NDArray[np.float32], masks: NDArray[np.bool_]) -> PixelCounts:
    edges = bin_edges(exact_metrics(maps, masks).operating_points().curves().threshold)
    return count_pixels(pixels_of(maps, masks), edges)


# What is drawn


def test_a_draw_has_as_many_good_and_anomalous_images_as_the_test_set() -> None:
    test_set = images_of(7, 11)
    draws = resample(test_set, 200)
    labels = labels_of(test_set)
    assert draws.shape == (201, 18)
    assert (draws[0] == 1).all()
    assert (draws[:, labels].sum(1) == 11).all()
    assert (draws[:, ~labels].sum(1) == 7).all()
    # each image is drawn once on average, with the variance 1 - 1 / n of a multinomial count
    assert draws[1:].mean(0) == pytest.approx(np.ones(18), abs=0.25)
    assert draws[1:, labels].var() == pytest.approx(10 / 11, rel=0.1)


def test_the_draws_are_those_of_the_images_and_not_of_the_model() -> None:
    one = resample(images_of(5, 5), 10)
    assert (one == resample(images_of(5, 5), 10)).all()
    assert (one != resample(images_of(5, 5, "bolt"), 10)).any()
    assert (one[:, :4] != resample(images_of(4, 6), 10)[:, :4]).any()


def test_every_draw_is_the_metric_of_the_images_drawn() -> None:
    """Against scikit-learn and the exact pixel metrics, on images that really are repeated; with ties."""
    test_set = images_of(6, 8)
    labels = labels_of(test_set)
    scores = rng("ties").integers(0, 6, size=14).astype(np.float64)
    maps, masks = draw_maps(scores, labels, "nut")
    maps = (maps * 40).round() / 40  # few distinct scores: every one has a bin of its own
    one = outcome("a", test_set, scores, 2.0, counts_of(maps, masks))
    measured = measure(replace(one, values={**one.values, **exact_metrics(maps, masks).compute().figures}), 20)
    for draw, weights in enumerate(resample(test_set, 20).astype(int)):
        repeated = np.repeat(np.arange(14), weights)
        s, y = scores[repeated], labels[repeated]
        called = s > 2.0
        expected = {
            "image_auroc": roc_auc_score(y, s),
            "image_ap": average_precision_score(y, s),
            "image_f1_max": max(2 * (y & (s > t)).sum() / (y.sum() + (s > t).sum()) for t in range(-1, 6)),
            "recall": called[y].mean(),
            "false_alarms": called[~y].mean(),
            **exact_metrics(maps[repeated], masks[repeated]).compute().figures,
        }
        assert {key: values[draw] for key, values in measured.draws.items()} == pytest.approx(expected, abs=1e-6)


def test_five_hundred_bins_are_close_to_every_pixel() -> None:
    labels = np.arange(40) >= 20
    maps = rng("maps").gamma(2, size=(40, 64, 64)).astype(np.float32)
    masks = np.zeros((40, 64, 64), dtype=bool)
    masks[labels, 10:30, 20:24] = True
    masks[labels, 40:44, 40:44] = True
    maps += masks * 2
    counts = counts_of(maps, masks)
    assert counts.normal.shape == (40, 500)
    assert counts.normal.sum() == (~masks).sum()
    assert counts.anomalous.sum() == masks.sum()
    assert counts.regions.sum(1) == pytest.approx(np.where(labels, 2, 0), abs=1e-4)
    values = exact_metrics(maps, masks).compute().figures
    measured = measure(Outcome("a", images_of(20, 20), np.zeros(40), 1.0, values, counts), 1)
    assert {key: measured.draws[key][0] for key in values} == pytest.approx(values, abs=1e-3)


# Intervals


def delong_variance(scores: NDArray[np.float64], labels: NDArray[np.bool_]) -> float:
    """DeLong, DeLong and Clarke-Pearson, Biometrics 44, 1988: from the placement values."""
    wins = (scores[labels][:, None] > scores[~labels][None]) + 0.5 * (scores[labels][:, None] == scores[~labels][None])
    return float(wins.mean(1).var(ddof=1) / labels.sum() + wins.mean(0).var(ddof=1) / (~labels).sum())


@pytest.mark.parametrize("auroc", [0.7, 0.85, 0.95])
def test_the_spread_of_the_draws_is_delongs(auroc: float) -> None:
    test_set = images_of(60, 80)
    scores = draw_scores(auroc, labels_of(test_set), "nut", "a", 0)
    measured = measure(outcome("a", test_set, scores), 2000)
    expected = math.sqrt(delong_variance(scores, labels_of(test_set)))
    assert measured.draws["image_auroc"][1:].std() == pytest.approx(expected, rel=0.08)


def test_the_paired_spread_is_delongs() -> None:
    """Of a difference: the covariance of the placement values of two models on the same images."""
    test_set = images_of(60, 80)
    labels = labels_of(test_set)
    a, b = (draw_scores(0.9, labels, "nut", name, 0, alike=0.8) for name in "ab")
    wins = [(s[labels][:, None] > s[~labels][None]).astype(float) for s in (a, b)]
    difference = wins[0] - wins[1]
    variance = difference.mean(1).var(ddof=1) / 80 + difference.mean(0).var(ddof=1) / 60
    found = compare("image_auroc", *(measure(outcome(n, test_set, s), 2000) for n, s in (("a", a), ("b", b))))
    assert (found.high - found.low) / 2 / 1.96 == pytest.approx(math.sqrt(variance), rel=0.1)


def test_ninety_five_of_a_hundred_intervals_hold_the_truth() -> None:
    hits = 0
    for seed in range(300):
        low, high = drawn("a", f"category {seed}", 0.85, seed, resamples=300).intervals["image_auroc"]
        hits += low <= 0.85 <= high
    assert 0.90 < hits / 300 < 0.985


@pytest.mark.parametrize(("hits", "n"), [(0, 12), (12, 12), (5, 12), (1, 41), (40, 41)])
def test_a_share_has_the_exact_interval(hits: int, n: int) -> None:
    expected = binomtest(hits, n).proportion_ci(0.95, method="exact")
    assert share_interval(hits / n, n) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_a_perfect_score_is_not_certain() -> None:
    """All draws of separated images are perfect; the bound is that of 12 of 12, the smaller class."""
    test_set = images_of(12, 30)
    measured = measure(outcome("a", test_set, np.where(labels_of(test_set), 9.0, 1.0)), 100)
    assert measured.values["image_auroc"] == 1.0
    for name in ("image_auroc", "image_ap", "image_f1_max"):
        assert measured.intervals[name] == pytest.approx((0.025 ** (1 / 12), 1.0))
    assert measured.intervals["recall"] == pytest.approx((0.025 ** (1 / 30), 1.0))
    assert measured.intervals["false_alarms"] == pytest.approx((0.0, 1 - 0.025 ** (1 / 12)))


def test_good_images_alone_have_false_alarms_only() -> None:
    measured = measure(outcome("a", images_of(10, 0), np.arange(10.0), 8.0), 50)
    assert set(measured.intervals) == {"false_alarms"}
    assert measured.values["false_alarms"] == 0.1


def test_every_interval_holds_its_value() -> None:
    for seed in range(20):
        measured = drawn("a", f"category {seed}", 0.97, seed, size=(5, 5))
        for name, (low, high) in measured.intervals.items():
            assert 0 <= low <= measured.values[name] <= high <= 1


def test_an_average_over_categories_is_surer_than_one() -> None:
    cells = [drawn("a", f"category {number}", 0.85, resamples=2000) for number in range(9)]
    row = average(cells)
    assert row.values["image_auroc"] == pytest.approx(np.mean([cell.values["image_auroc"] for cell in cells]))
    assert row.num_images == 9 * 80
    mean_variance = np.mean([cell.draws["image_auroc"][1:].var() for cell in cells])
    assert row.draws["image_auroc"][1:].var() == pytest.approx(mean_variance / 9, rel=0.15)


def test_an_average_of_perfect_scores_is_not_certain_either() -> None:
    test_set = images_of(20, 20)
    scores = np.where(labels_of(test_set), 9.0, 1.0)
    cells = [measure(outcome("a", replace(test_set, category=f"category {n}"), scores), 50) for n in range(4)]
    low, high = average(cells).intervals["image_auroc"]
    assert high == 1.0
    assert low == pytest.approx(1 - (1 - 0.025 ** (1 / 20)) / 2)  # a quarter of the sum of four equal squares' root


def test_a_metric_that_a_category_lacks_has_no_average() -> None:
    cells = [drawn("a", "one", resamples=50), measure(outcome("a", images_of(10, 0, "two"), np.arange(10.0)), 50)]
    row = average(cells)
    assert set(row.values) == set(row.draws) == {"false_alarms"}


# Comparisons


def test_two_seeds_of_one_model_are_not_distinguishable() -> None:
    """On one category and on the average of five: at most the one in twenty that chance allows, and a margin."""
    for num_categories in (1, 5):
        verdicts = []
        for trial in range(100):
            categories = [f"category {trial} {number}" for number in range(num_categories)]
            models = [
                average([drawn("same", category, 0.95, seed, resamples=200) for category in categories])
                for seed in (0, 1)
            ]
            verdicts.append(compare("image_auroc", *models).verdict)
        assert verdicts.count("tie") >= 90


def test_a_planted_difference_of_five_points_is_one() -> None:
    """0.93 and 0.98 on five categories of 80 images."""
    for trial in range(40):
        categories = [f"category {trial} {number}" for number in range(5)]
        weak, strong = (
            average([drawn(name, category, auroc, resamples=200) for category in categories])
            for name, auroc in (("weak", 0.93), ("strong", 0.98))
        )
        found = compare("image_auroc", weak, strong)
        assert found.verdict == "b"
        assert found.difference < 0
        assert found.text.startswith("strong beats weak by ")
        assert compare("image_auroc", strong, weak).verdict == "a"


def test_pairing_sees_what_separate_intervals_do_not() -> None:
    """A model that is a little better on every image: the intervals overlap widely, the difference is clear."""
    test_set = images_of(40, 40)
    labels = labels_of(test_set)
    hard = draw_scores(0.8, labels, "nut", "a", 0, alike=1.0)
    a, b = (measure(outcome(name, test_set, hard + shift * labels), 500) for name, shift in (("a", 0.4), ("b", 0.0)))
    assert a.intervals["image_auroc"][0] < b.intervals["image_auroc"][1]
    assert compare("image_auroc", a, b).verdict == "a"


def test_fewer_false_alarms_are_better() -> None:
    test_set = images_of(100, 10)
    scores = np.where(labels_of(test_set), 9.0, np.arange(110) / 110)
    many, few = (measure(outcome(n, test_set, scores, t), 300) for n, t in (("many", 0.5), ("few", 0.9)))
    found = compare("false_alarms", many, few)
    assert found.difference > 0
    assert found.verdict == "b"
    assert found.text.startswith("few beats many by ")
    assert champion("false_alarms", [many, few], [found]).best == "few"


def test_the_words_for_a_tie_and_for_equals() -> None:
    a, b = drawn("a", auroc=0.9), drawn("b", auroc=0.9)
    found = compare("image_auroc", a, b)
    winner, loser = ("a", "b") if found.difference > 0 else ("b", "a")
    points, margin = abs(100 * found.difference), 50 * (found.high - found.low)
    assert found.text == f"{winner} beats {loser} by {points:.1f} ± {margin:.1f}: not distinguishable"
    assert compare("image_auroc", a, a).text == "a equals a to ± 0.0: not distinguishable"


def test_the_spread_over_seeds_widens_a_comparison() -> None:
    """By Welch: two single runs with sd 0.02 of 3 and 0.01 of 5 runs, on images that add nothing."""
    test_set = images_of(40, 40)
    scores = draw_scores(0.9, labels_of(test_set), "nut", "a", 0)
    a = measure(outcome("a", test_set, scores), 100, {"image_auroc": Spread(0.02, 3)})
    b = measure(outcome("b", test_set, scores), 100, {"image_auroc": Spread(0.01, 5)})
    found = compare("image_auroc", a, b)
    variance = 0.02**2 + 0.01**2
    freedom = variance**2 / (0.02**4 / 2 + 0.01**4 / 4)
    margin = student.ppf(0.975, freedom) * math.sqrt(variance)
    assert (found.low, found.high) == pytest.approx((-margin, margin))


def test_the_same_model_with_two_seeds_and_nothing_else_is_never_a_difference() -> None:
    """Two runs whose difference is all that is known of the seeds' spread."""
    for trial in range(50):
        values = [0.91, 0.91 + trial / 1000]
        known = {"image_auroc": spread_of(values)}
        test_set = images_of(30, 30)
        scores = draw_scores(0.9, labels_of(test_set), f"{trial}", "a", 0)
        one = outcome("a", test_set, scores)
        a, b = (
            measure(replace(one, name=f"seed {n}", values={**one.values, "image_auroc": v}), 50, known)
            for n, v in enumerate(values)
        )
        assert compare("image_auroc", a, b).verdict == "tie"


def test_one_run_has_no_spread() -> None:
    assert spread_of([0.9]) is None
    assert spread_of([0.9, 0.92, 0.94]) == Spread(pytest.approx(0.02), 3)


OURS = images_of(5, 5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"category": "bolt"}, "nut and bolt are two categories"),
        ({"images": images_of(5, 4).images}, "10 and 9 test images of nut"),
        (
            {"images": (*OURS.images[:-1], ("test/good/new.png", False))},
            "the test images of nut are not the same: test/good/004.png is in one of the two only",
        ),
        ({"data_sha256": "x", "pixels_sha256": "y"}, "the files of nut changed between the two evaluations"),
        ({"data_sha256": "x", "image_size": 128}, "the files of nut changed between the two evaluations"),
        ({"data_sha256": "x"}, None),  # a training image was added; the test images are what they were
        ({"image_size": 128, "pixels_sha256": "y"}, None),  # the same files, seen by a model of another size
    ],
)
def test_different_test_images_are_refused(changes: dict[str, Any], reason: str | None) -> None:
    a, b = (
        measure(outcome(name, test_set, draw_scores(0.9, labels_of(test_set), "nut", name, 0)), 50)
        for name, test_set in (("a", OURS), ("b", replace(OURS, **changes)))
    )
    found = compare("image_auroc", a, b)
    assert found.reason == reason
    if reason:
        assert (found.verdict, found.difference, found.low) == ("refused", None, None)
        assert found.text == f"a and b cannot be compared by Image AUROC: {reason}"


def test_a_metric_that_one_lacks_is_refused() -> None:
    a = drawn("a")
    b = Measured("b", "nut", {}, {}, {}, a.test_sets)
    assert compare("image_auroc", a, b).reason == "b without Image AUROC"
    two = average([drawn("c", "nut"), drawn("c", "bolt")])
    assert compare("image_auroc", average([a]), two).reason == "1 and 2 categories"


# Champions


def measured_as(name: str, value: float) -> Measured:
    return Measured(name, "nut", {"image_auroc": value}, {}, {}, ())


def judged(*models: Measured, **verdicts: str) -> Champion:
    """`verdicts` are those of pairs, called "ab"; without one the first wins."""
    found = [
        SimpleNamespace(a=a.name, b=b.name, verdict=verdicts.get(a.name + b.name, "a"), reason="why")
        for a, b in combinations(models, 2)
    ]
    return champion("image_auroc", models, found)


def test_the_champion_and_its_equals() -> None:
    models = measured_as("a", 0.97), measured_as("b", 0.98), measured_as("c", 0.9)
    assert judged(*models) == Champion("b", (), None)
    # what ties the second does not tie the first
    assert judged(*models, ab="tie", ac="tie") == Champion("b", ("a",), None)
    assert judged(*models, ac="refused", bc="refused") == Champion(None, (), "why")


def test_a_champion_of_one_and_of_none() -> None:
    assert champion("image_auroc", [measured_as("a", 0.5)], []).best == "a"
    lacking = Measured("b", "nut", {}, {}, {}, ())
    assert champion("image_auroc", [lacking], []).reason == "no Image AUROC"
    # a model without the metric does not keep the other from being best
    assert judged(measured_as("a", 0.9), lacking, ab="refused").best == "a"


# From the files


def test_an_outcome_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    evaluation = put_evaluation(tmp_path, "a", "nut", good=3, defect=4)
    read = read_outcome(tmp_path, evaluation, "shown")
    paths = [path for path, _ in read.test_set.images]
    assert read.name == "shown"
    assert all(x < y for x, y in pairwise(paths))
    assert read.labels.sum() == 4
    assert len(read.scores) == 7  # and not the held-out ones
    # an image's pixels went with it: only the anomalous have any inside
    assert ((read.pixels.anomalous.sum(1) > 0) == read.labels).all()
    assert roc_auc_score(read.labels, read.scores) == pytest.approx(evaluation.metrics["image_auroc"])


def test_files_of_another_version_say_so(tmp_path: Path) -> None:
    evaluation = put_evaluation(tmp_path, "a", "nut")
    path = tmp_path / "predictions.csv"
    path.write_text(path.read_text(encoding="utf-8").replace(",split,", ",part,", 1), encoding="utf-8")
    with pytest.raises(StageError) as caught:
        read_outcome(tmp_path, evaluation, "a")
    assert str(caught.value) == (
        f"{path}: damaged, or by another version of Blemish (split: Field required); run `blemish evaluate a nut` again"
    )


def test_five_models_on_fifteen_categories_take_seconds(tmp_path: Path) -> None:
    evaluation = put_evaluation(tmp_path, "a", "nut", good=40, defect=60)
    bins = 500
    labels = np.arange(100) >= 40
    normal = rng("n").poisson(np.linspace(1, 250, bins), (100, bins)).astype(np.int32)
    inside = (rng("a").poisson(3, (100, bins)) * labels[:, None]).astype(np.int32)
    PixelCounts(normal, inside, (inside / 100).astype(np.float32)).save(tmp_path / "pixels.npz")
    started = time.process_time()
    cells = [
        [
            measure(read_outcome(tmp_path, evaluation.model_copy(update={"category": f"c{c}"}), f"m{m}"), 1000)
            for c in range(15)
        ]
        for m in range(5)
    ]
    pairs = [compare_all(KEYS, [row[c] for row in cells]) for c in range(15)]
    pairs.append(compare_all(KEYS, [average(row) for row in cells]))
    assert time.process_time() - started < 20
    assert sum(map(len, pairs)) == 16 * 10 * len(KEYS)


def test_norm_is_what_the_made_up_scores_have() -> None:
    """The generator of these tests: a hundred thousand images come near the AUROC asked for."""
    labels = np.arange(100_000) >= 50_000
    scores = draw_scores(0.93, labels, "nut", "a", 0)
    assert roc_auc_score(labels, scores) == pytest.approx(0.93, abs=0.003)
