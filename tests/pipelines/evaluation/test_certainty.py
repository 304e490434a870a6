import math
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from made_up import PIXEL_THRESHOLD, draw_maps, draw_scores, pixels_of, put_evaluation
from numpy.typing import NDArray
from scipy.stats import t as student
from sklearn.metrics import roc_auc_score

from anomaly_models.common.sizes import Size
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
    spread_of,
)
from pipelines.evaluation.intervals import bounded_interval
from pipelines.evaluation.measures import METRICS
from pipelines.evaluation.metrics import ExactPixelMetrics, image_metrics
from pipelines.evaluation.outcomes import (
    Evaluation,
    Outcome,
    PixelCounts,
    TestSet,
    bin_edges,
    count_pixels,
    read_outcome,
)

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
    return count_pixels(pixels_of(maps, masks), edges, PIXEL_THRESHOLD)


# One model


def test_a_perfect_score_is_not_certain() -> None:
    """The bound is that of 12 of 12, the smaller class."""
    test_set = images_of(12, 30)
    measured = measure(outcome("a", test_set, np.where(labels_of(test_set), 9.0, 1.0)), 100)
    assert measured.values["image_auroc"] == 1.0
    for name in ("image_auroc", "image_ap", "image_f1_max"):
        assert measured.intervals[name] == pytest.approx((0.025 ** (1 / 12), 1.0))
    assert measured.intervals["recall"] == pytest.approx((0.025 ** (1 / 30), 1.0))
    assert measured.intervals["false_alarms"] == pytest.approx((0.0, 1 - 0.025 ** (1 / 12)))


def test_what_rounds_to_perfect_is_not_certain_either() -> None:
    """A float32 that fell short of 1 used to pass for a figure without an interval."""
    test_set = images_of(12, 30)
    perfect = outcome("a", test_set, np.where(labels_of(test_set), 9.0, 1.0))
    nearly = {**perfect.values, "image_auroc": 0.99999994, "image_ap": 0.99999994}
    measured = measure(replace(perfect, values=nearly), 100)
    for name in ("image_auroc", "image_ap"):
        assert measured.intervals[name][0] == pytest.approx(0.025 ** (1 / 12), abs=1e-6)


def test_pixel_figures_are_as_sure_as_the_images_with_defects_are_many() -> None:
    labels = np.arange(30) >= 10
    maps, masks = draw_maps(np.where(labels, 6.0, 1.0), labels, "nut")
    values = exact_metrics(maps, masks).compute().figures
    measured = measure(Outcome("a", images_of(10, 20), np.zeros(30), 1.0, values, counts_of(maps, masks)), 50)
    for name, value in values.items():
        assert measured.intervals[name] == bounded_interval(value, 20)


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
    cells = [drawn("a", f"category {number}", 0.85) for number in range(9)]
    row = average(cells)
    assert row.values["image_auroc"] == pytest.approx(np.mean([cell.values["image_auroc"] for cell in cells]))
    assert row.num_images == 9 * 80
    low, high = row.intervals["image_auroc"]
    widths = [cell.intervals["image_auroc"][1] - cell.intervals["image_auroc"][0] for cell in cells]
    assert high - low == pytest.approx(np.mean(widths) / 3, rel=0.1)


def test_an_average_of_perfect_scores_is_not_certain_either() -> None:
    test_set = images_of(20, 20)
    scores = np.where(labels_of(test_set), 9.0, 1.0)
    cells = [measure(outcome("a", replace(test_set, category=f"category {n}"), scores), 50) for n in range(4)]
    low, high = average(cells).intervals["image_auroc"]
    assert high == 1.0
    assert low == pytest.approx(1 - (1 - 0.025 ** (1 / 20)) / 2)  # a quarter of the sum of four equal squares' root


def test_a_metric_that_a_category_lacks_has_no_average() -> None:
    cells = [drawn("a", "one"), measure(outcome("a", images_of(10, 0, "two"), np.arange(10.0)), 50)]
    row = average(cells)
    assert set(row.values) == set(row.intervals) == {"false_alarms"}


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


def test_the_words_for_a_tie_a_winner_and_for_equals() -> None:
    a, b = drawn("a", auroc=0.9), drawn("b", auroc=0.9)
    found = compare("image_auroc", a, b)
    ahead, behind = ("a", "b") if found.difference > 0 else ("b", "a")
    points = f"{abs(100 * found.difference):.1f} points"
    assert found.text == (
        f"{ahead} is {points} ahead of {behind}, as may be chance (p = {found.p:.2g}): not distinguishable"
    )
    assert replace(found, p=0.0004, verdict="a").text == f"{ahead} beats {behind} by {points} (p < 0.001)"
    assert compare("image_auroc", a, a).text == "a equals a: not distinguishable"


def test_the_p_values_of_a_table_allow_for_all_its_pairs() -> None:
    """Holm: three pairs, of which the smallest counts threefold; two models are one pair, and count as they are."""
    models = [drawn(name, auroc=auroc) for name, auroc in (("a", 0.97), ("b", 0.9), ("c", 0.7))]
    alone = {(a.name, b.name): compare("image_auroc", a, b).p for a, b in combinations(models, 2)}
    ordered = sorted(alone.values())
    expected, largest = {}, 0.0
    for factor, p in zip((3, 2, 1), ordered, strict=True):
        largest = max(largest, min(1.0, factor * p))
        expected[p] = largest
    for found in compare_all(["image_auroc"], models):
        assert found.p == pytest.approx(expected[alone[found.a, found.b]])
        assert (found.verdict == "tie") == (found.p > 0.05)
    [pair] = compare_all(["image_auroc"], models[:2])
    assert pair.p == alone["a", "b"]


def test_the_spread_over_seeds_widens_a_comparison() -> None:
    """By Welch: two single runs with sd 0.02 of 3 and 0.01 of 5 runs, on images that add nothing."""
    test_set = images_of(40, 40)
    one = outcome("a", test_set, draw_scores(0.9, labels_of(test_set), "nut", "a", 0))
    variance = 0.02**2 + 0.01**2
    freedom = variance**2 / (0.02**4 / 2 + 0.01**4 / 4)
    margin = student.ppf(0.975, freedom) * math.sqrt(variance)
    for factor, verdict in ((0.8, "tie"), (1.2, "a")):
        better = {**one.values, "image_auroc": one.values["image_auroc"] + factor * margin}
        a = measure(replace(one, values=better), 2000, {"image_auroc": Spread(0.02, 3)})
        b = measure(replace(one, name="b"), 2000, {"image_auroc": Spread(0.01, 5)})
        assert compare("image_auroc", a, b).verdict == verdict
    p = 2 * student.sf(1.2 * margin / math.sqrt(variance), freedom)
    assert compare("image_auroc", a, b).p == pytest.approx(p, abs=0.02)


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
        ({"images": images_of(6, 3).images}, "10 and 9 test images of nut"),
        ({"images": images_of(5, 4).images, "files_sha256": "x"}, "10 and 9 test images of nut"),
        (
            {"images": (*OURS.images[:-1], ("test/good/new.png", False))},
            "the test images of nut are not the same: test/good/004.png is in one of the two only",
        ),
        ({"files_sha256": "x", "pixels_sha256": "y"}, "the test files of nut changed between the two evaluations"),
        (
            {"files_sha256": "x", "image_size": Size.square(128)},
            "the test files of nut changed between the two evaluations",
        ),
        ({"files_sha256": "x"}, None),  # a training image was added; the test images are what they were
        (
            {"image_size": Size.square(128), "pixels_sha256": "y"},
            None,
        ),  # the same files, seen by a model of another size
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
        assert (found.verdict, found.difference, found.p) == ("refused", None, None)
        assert found.text == f"a and b cannot be compared by Image AUROC: {reason}"


def test_a_metric_that_one_lacks_is_refused() -> None:
    a = drawn("a")
    b = replace(a, name="b", values={}, intervals={})
    assert compare("image_auroc", a, b).reason == "b without Image AUROC"
    two = average([drawn("c", "nut"), drawn("c", "bolt")])
    assert compare("image_auroc", average([a]), two).reason == "1 and 2 categories"


def test_defects_that_one_model_learnt_from_are_left_out_of_the_comparison() -> None:
    """The one that learns from 8 of 40 defects, those that are hard, is judged on the 52 other images."""
    test_set = images_of(20, 40)
    labels = labels_of(test_set)
    fewer = replace(
        test_set, images=tuple(image for place, image in enumerate(test_set.images) if place not in range(8))
    )
    assert labels[:8].all()
    scores = draw_scores(0.9, labels, "nut", "a", 0)
    hidden = np.where(np.arange(60) < 8, scores.min() - 1, scores)
    a = measure(outcome("a", test_set, hidden), 100)
    b = measure(outcome("b", fewer, scores[8:]), 100)
    assert b.values["image_auroc"] > a.values["image_auroc"]
    found = compare("image_auroc", a, b)
    assert (found.difference, found.num_images, found.shared, found.verdict) == (0.0, 52, True, "tie")
    assert found.text == "a equals b on the 52 images that both were tested on: not distinguishable"
    better = measure(outcome("a", test_set, np.where(labels, 9.0, 1.0) + (np.arange(60) < 8) * -9.0), 400)
    beaten = compare_all(["image_auroc"], [better, b])
    assert better.values["image_auroc"] < b.values["image_auroc"]
    assert beaten[0].verdict == "a"
    assert " points on the 52 images that both were tested on (p" in beaten[0].text
    assert champion("image_auroc", [better, b], beaten) == Champion("a", (), None)


def test_pixels_that_were_not_kept_allow_no_comparison() -> None:
    a, b = (drawn(name) for name in "ab")
    a, b = (replace(model, values={**model.values, "pixel_auroc": 0.9}) for model in (a, b))
    assert compare("pixel_auroc", a, b).reason == "what is kept of the test images allows no Pixel AUROC"


# Champions


def measured_as(name: str, value: float) -> Measured:
    return Measured(name, "nut", {"image_auroc": value}, {}, (), 50)


def judged(*models: Measured, **verdicts: str) -> Champion:
    """`verdicts` are those of pairs, called "ab"; without one the higher figure wins."""
    found = [
        SimpleNamespace(
            a=a.name,
            b=b.name,
            verdict=verdicts.get(
                a.name + b.name, "a" if a.values.get("image_auroc", 0) > b.values.get("image_auroc", 0) else "b"
            ),
            reason="why",
        )
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
    lacking = Measured("b", "nut", {}, {}, (), 50)
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


def test_every_pair_of_a_table_is_compared_by_every_metric(tmp_path: Path) -> None:
    for model, auroc in (("a", 0.95), ("b", 0.9), ("c", 0.6)):
        for category in ("nut", "bolt"):
            put_evaluation(tmp_path / model / category, model, category, auroc=auroc)
    cells = {
        model: [
            measure(read_outcome(folder, Evaluation.load(folder / "evaluation.json", "again"), model), 200)
            for folder in (tmp_path / model / "nut", tmp_path / model / "bolt")
        ]
        for model in "abc"
    }
    found = [found for place in (0, 1) for found in compare_all(KEYS, [own[place] for own in cells.values()])]
    found += compare_all(KEYS, [average(own) for own in cells.values()])
    assert len(found) == 3 * 3 * (len(KEYS) - 1)  # none has sPRO
    assert not [comparison for comparison in found if comparison.p is None]


def test_norm_is_what_the_made_up_scores_have() -> None:
    """The generator of these tests: a hundred thousand images come near the AUROC asked for."""
    labels = np.arange(100_000) >= 50_000
    scores = draw_scores(0.93, labels, "nut", "a", 0)
    assert roc_auc_score(labels, scores) == pytest.approx(0.93, abs=0.003)
