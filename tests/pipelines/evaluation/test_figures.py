import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_cells import picture
from PIL import Image

from pipelines.evaluation.figures import draw, histogram_edges, telling, thinned
from pipelines.evaluation.metrics import ExactPixelMetrics, PixelCurves
from pipelines.evaluation.outcomes import TestImage
from pipelines.files import read_json
from pipelines.pictures.panels import KeptMaps, Picture, Thresholds, panels, read_panel


def results(good: Sequence[float], defects: Sequence[float]) -> list[TestImage]:
    blank = np.zeros((2, 2), dtype=np.float32)
    return [
        TestImage(f"{label}/{row}", "cut" if label else "good", label, score, blank, blank, None, 2, 2, None)
        for row, (label, score) in enumerate([*((False, s) for s in good), *((True, s) for s in defects)])
    ]


def shown(good: Sequence[float], defects: Sequence[float]) -> list[tuple[str, list[float]]]:
    return [(title, [r.score for r in chosen]) for title, chosen in telling(results(good, defects), threshold=2.0)]


def test_best_hits_worst_misses_and_worst_false_alarms() -> None:
    assert shown([2.5, 1, 9, 0.5, 3, 4, 5], [0.1, 8, 1.9, 7, 3, 6, 5, 2.0, 0.2, 0.3]) == [
        ("Best hits (5 of 10 defects found)", [8, 7, 6, 5]),
        ("Worst misses (5 of 10 defects missed)", [0.1, 0.2, 0.3, 1.9]),
        ("Worst false alarms (5 of 7 good parts)", [9, 5, 4, 3]),
    ]


def test_where_there_is_no_error_the_closest_calls_are_shown() -> None:
    assert shown([1, 1.9, 0.5], [3, 8, 7, 6, 5, 4]) == [
        ("Best hits (6 of 6 defects found)", [8, 7, 6, 5]),
        ("No defect missed; the weakest hits", [3, 4]),
        ("No false alarm; the good parts with the highest scores", [1.9, 1, 0.5]),
    ]


def test_no_group_is_empty() -> None:
    assert shown([1.0], []) == [("No false alarm; the good parts with the highest scores", [1.0])]
    assert shown([], [1.0]) == [("Worst misses (1 of 1 defects missed)", [1.0])]


@pytest.mark.parametrize("scores", [[1.0, 2.0, 5.0], [3.0], [-4.0, 2.5, 2.6]])
def test_no_bar_of_the_histogram_holds_both_decisions(scores: list[float]) -> None:
    edges = histogram_edges(np.array(scores), 2.5)
    assert 2.5 in edges.tolist()
    assert edges[0] <= min(scores)
    assert edges[-1] >= max(scores)
    np.testing.assert_allclose(np.diff(edges), edges[1] - edges[0])


def test_equal_scores_have_a_histogram() -> None:
    assert histogram_edges(np.array([2.5, 2.5]), 2.5).tolist() == [1.5, 2.5, 3.5]


def test_curves_for_the_report_have_few_points() -> None:
    steps = np.linspace(0, 1, 2001)
    curves = PixelCurves(1 - steps, steps, np.sqrt(steps), 1 - steps / 2, steps**2)
    kept = thinned(curves)
    assert {name: len(x) for name, (x, _) in kept.items()} == {"roc": 101, "precision_recall": 101, "pro": 101}
    rate, recall = kept["roc"]
    np.testing.assert_allclose(recall, np.sqrt(rate), atol=1e-4)
    recall, precision = kept["precision_recall"]
    np.testing.assert_allclose(precision[1:], 1 - np.square(recall[1:]) / 2, atol=1e-3)
    rate, overlap = kept["pro"]
    assert (rate[0], rate[-1]) == (0, 0.3)
    np.testing.assert_allclose(overlap, np.square(rate), atol=1e-4)


def test_one_class_has_no_curves() -> None:
    assert thinned(PixelCurves(*[np.empty(0)] * 5)) == {}


PICTURES = (
    picture("test/cut/0.png", "cut", 3.0, seed=0, size=(80, 40)),
    picture("test/cut/1.png", "cut", 1.0, seed=1),
    picture("test/good/0.png", "good", 1.2, seed=2),
)


def outcomes(pictures: Sequence[Picture] = PICTURES) -> list[TestImage]:
    fields = dataclasses.fields(Picture)
    return [TestImage(*(getattr(p, field.name) for field in fields), None) for p in pictures]


def test_all_pictures_of_a_cell_are_drawn(tmp_path: Path) -> None:
    metrics = ExactPixelMetrics()
    for p in PICTURES:
        metrics.update(torch.from_numpy(p.anomaly_map)[None], torch.from_numpy(p.truth)[None])
    curves = metrics.operating_points().curves()
    assert draw(tmp_path, outcomes(), Thresholds(2.0, 1.0), curves) == ["examples.png", "curves.png"]
    for p in PICTURES:
        size = (p.width, p.height)
        for number, expected in enumerate(panels(p, Thresholds(2.0, 1.0), (256, 256 * p.height // p.width))):
            found = read_panel(tmp_path, p.path, number, size)
            assert abs(np.asarray(found).astype(int) - np.asarray(expected)).mean() < 8  # JPEG
    kept = KeptMaps.load(tmp_path)
    assert kept.sizes.tolist() == [[80, 40], [64, 64], [64, 64]]
    assert [levels.max() > 127 for levels in kept.levels] == [True, False, False]
    assert set(read_json(tmp_path / "curves.json")) == {"roc", "precision_recall", "pro"}
    with Image.open(tmp_path / "curves.png") as curves, Image.open(tmp_path / "examples.png") as examples:
        assert curves.height > 700  # two rows
        assert examples.width == 2 * (5 * 160 + 4 * 6 + 24)


def test_without_masks_there_are_image_curves_only(tmp_path: Path) -> None:
    draw(tmp_path, outcomes(), Thresholds(2.0, 1.0), None)
    assert not (tmp_path / "curves.json").exists()
    with Image.open(tmp_path / "curves.png") as curves:
        assert curves.height < 400  # one row


@pytest.mark.parametrize("kept", [PICTURES[:2], PICTURES[2:]])
def test_one_class_is_drawn_too(tmp_path: Path, kept: Sequence[Picture]) -> None:
    assert draw(tmp_path, outcomes(kept), Thresholds(2.0, 1.0), None) == ["examples.png", "curves.png"]
