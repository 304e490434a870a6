from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from drawn_cells import THRESHOLDS, picture
from made_up import scored_image
from PIL import Image

from pipelines.evaluation.outcomes import read_tested, write_predictions
from pipelines.pictures.overlays import coloured_map, heat_overlay
from pipelines.pictures.panels import (
    MARKS,
    STRIP,
    KeptMaps,
    Layout,
    Thresholds,
    Verdict,
    panels,
    read_panel,
    save_strip,
    sheet,
    strip,
    strip_file,
)

DEFECT = picture("test/cut/000.png", "cut", score=3.0)
GOOD = picture("test/good/000.png", "good", score=1.0)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.parametrize(
    ("label", "score", "expected"),
    [
        (True, 2.001, "defect found"),
        (True, 2.0, "defect missed"),  # the threshold itself is not above it
        (False, 2.001, "false alarm"),
        (False, 2.0, "good part passed"),
    ],
)
def test_a_verdict_is_the_decision_against_the_truth(label: bool, score: float, expected: str) -> None:
    assert Verdict.of(label, score, 2.0) == expected


def test_the_five_panels() -> None:
    found, heat, overlay, mask, truth = (pixels(panel) for panel in panels(DEFECT, THRESHOLDS, (64, 64)))
    np.testing.assert_array_equal(found, DEFECT.rgb)
    np.testing.assert_array_equal(heat, coloured_map(DEFECT.anomaly_map, 1.0))
    np.testing.assert_array_equal(overlay, heat_overlay(DEFECT.rgb, DEFECT.anomaly_map, 1.0))
    np.testing.assert_array_equal(mask, np.where(DEFECT.anomaly_map > 1.0, 255, 0)[..., None].repeat(3, axis=2))
    np.testing.assert_array_equal(truth, np.where(DEFECT.truth, 255, 0)[..., None].repeat(3, axis=2))


def test_a_good_part_shows_nothing() -> None:
    found, _, overlay, mask, truth = (pixels(panel) for panel in panels(GOOD, THRESHOLDS, (64, 64)))
    np.testing.assert_array_equal(overlay, found)
    assert not mask.any()
    assert not truth.any()


def test_without_masks_the_truth_is_grey_not_black() -> None:
    grey = pixels(panels(replace(DEFECT, truth=None), THRESHOLDS, (64, 64))[4])
    assert (grey == grey[0, 0]).all()
    assert grey[0, 0, 0] > 200


def test_panels_keep_the_proportions_of_the_original_and_lie_apart() -> None:
    layout = Layout(100)
    assert layout.fitted(80, 64) == (100, 80)
    assert layout.fitted(30, 3000) == (1, 100)
    boxes = [layout.box(panel, 80, 64) for panel in range(5)]
    assert [right - left for left, _, right, _ in boxes] == [100] * 5
    assert [bottom - top for _, top, _, bottom in boxes] == [80] * 5
    assert all(after[0] > before[2] for before, after in pairwise(boxes))
    assert (boxes[2][0], boxes[2][1] - layout.cell(2)[1]) == (layout.cell(2)[0], 10)
    left, top, right, _ = layout.box(1, 64, 80)
    assert (left - layout.cell(1)[0], right - left, top) == (10, 80, layout.cell(1)[1])
    width, height = layout.size
    assert boxes[-1][2] == width
    assert boxes[0][3] < height


def test_a_strip_marks_its_verdict_and_holds_its_panels() -> None:
    for shown, verdict in ((DEFECT, Verdict.HIT), (replace(DEFECT, score=1.0), Verdict.MISS), (GOOD, Verdict.PASS)):
        drawn = strip(shown, THRESHOLDS)
        assert drawn.size == STRIP.size
        assert tuple(pixels(drawn)[10, 5]) == MARKS[verdict]
        box = STRIP.box(4, 64, 64)
        np.testing.assert_array_equal(pixels(drawn.crop(box)), pixels(panels(shown, THRESHOLDS, (256, 256))[4]))


def test_long_names_are_shortened_and_stay_inside() -> None:
    long = replace(DEFECT, path="x" * 500, defect="y\n" + "y" * 500)
    white = pixels(strip(long, THRESHOLDS))[:24, -3:]
    assert (white == 255).all()


def test_names_in_other_alphabets_are_written() -> None:
    texts = [pixels(strip(replace(DEFECT, defect=name), THRESHOLDS))[24:40, :250] for name in ("царапина", "ржавчина")]
    assert (texts[0] != texts[1]).any()  # an unknown letter would be the same box in both


@pytest.mark.parametrize("size", [(64, 64), (80, 64), (48, 96)])
def test_a_kept_strip_gives_its_panels_back(tmp_path: Path, size: tuple[int, int]) -> None:
    shown = replace(DEFECT, width=size[0], height=size[1])
    save_strip(tmp_path, shown, THRESHOLDS)
    assert strip_file(tmp_path, "test/cut/000.png") == tmp_path / "panels" / "test" / "cut" / "000.png.jpg"
    expected = panels(shown, THRESHOLDS, STRIP.fitted(*size))
    for number in range(5):
        found = read_panel(tmp_path, shown.path, number, size)
        assert found.size == expected[number].size
        assert abs(pixels(found) - pixels(expected[number])).mean() < 8  # JPEG


def test_kept_maps_are_levels_of_the_scale(tmp_path: Path) -> None:
    ramp = np.linspace(0, 5, 256, dtype=np.float32)[None].repeat(256, axis=0)
    flat = np.full((64, 64), 1.25, dtype=np.float32)
    kept = KeptMaps.of([(ramp, (300, 200)), (ramp, (256, 256))], threshold=2.5)
    assert kept.levels.shape == (2, 128, 128)
    assert kept.sizes.tolist() == [[300, 200], [256, 256]]
    # 128 is the first level above the threshold, half-way through the scale
    above = ramp[0].reshape(128, 2).mean(1) > 2.5
    np.testing.assert_array_equal(kept.levels[0, 0] > 127.5, above)
    small = KeptMaps.of([(flat, (64, 64))], threshold=2.5)
    assert small.levels.shape == (1, 64, 64)
    assert (small.levels == 64).all()  # half of the threshold is a quarter of the scale: 63.75
    small.save(tmp_path)
    loaded = KeptMaps.load(tmp_path)
    np.testing.assert_array_equal(loaded.levels, small.levels)
    assert loaded.sizes.tolist() == [[64, 64]]
    stripes = np.tile(np.array([0, 2.5], dtype=np.float32), (256, 128))
    small = KeptMaps.of([(stripes, (256, 256))], threshold=2.5)
    assert set(np.unique(small.levels)) == {64}  # averaged, not picked


def test_the_scale_of_a_kept_map_ends_at_twice_the_threshold() -> None:
    anomaly_map = np.array([[-1.0, 0.0], [2.0, 9.0]], dtype=np.float32)
    kept = KeptMaps.of([(anomaly_map, (2, 2))], threshold=1.0)
    assert kept.levels.tolist() == [[[0, 0], [255, 255]]]


def test_a_sheet_has_two_strips_beside_each_other() -> None:
    tiles = [Image.new("RGB", (60, 20), (value, 0, 0)) for value in (10, 20, 30)]
    page = pixels(sheet([("first", tiles), ("second", tiles[:1])]))
    coloured = [(row, column) for row, column in np.argwhere((page[..., 0] == 10) & (page[..., 1] == 0))]
    assert len(coloured) == 2 * 60 * 20
    top = page[:, :, 0][:, 12 + 5]
    assert [int(value) for value in dict.fromkeys(top.tolist()) if value in (10, 30)] == [10, 30]
    right = 12 + 60 + 24 + 5
    assert (page[:, right, 0] == 20).sum() == 20


def test_only_test_images_are_read_back(tmp_path: Path) -> None:
    tested = scored_image("test/a, b/0.png", "a, b", True, 2.5, threshold=2.0)
    held_out = scored_image("train/good/0.png", "good", False, 1.5, "holdout", threshold=2.0)
    write_predictions(tmp_path, [tested, held_out])
    assert read_tested(tmp_path) == [tested]


def test_thresholds_are_of_score_and_pixel() -> None:
    # The decision and the mask may differ: the score is not the map's maximum for every model.
    quiet = replace(GOOD, score=5.0)
    assert quiet.verdict(Thresholds(score=2.0, pixel=1.0)) is Verdict.FALSE_ALARM
    assert not pixels(panels(quiet, THRESHOLDS, (64, 64))[3]).any()
