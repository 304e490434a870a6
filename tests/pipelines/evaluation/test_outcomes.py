from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_up import put_evaluation, scored_image

from anomaly_models.common.sizes import Size
from pipelines.errors import StageError
from pipelines.evaluation.outcomes import (
    Evaluation,
    PixelCounts,
    TestSet,
    equal_scores,
    read_predictions,
    write_predictions,
)
from pipelines.evaluation.regions import Regions, centre


def test_an_evaluation_is_read_as_it_was_written(tmp_path: Path) -> None:
    evaluation = put_evaluation(tmp_path, "a", "nut")
    assert isinstance(evaluation.metrics["train_steps"], int)
    read = Evaluation.load(tmp_path / "evaluation.json", "evaluate again")
    assert read == evaluation
    assert isinstance(read.metrics["train_steps"], int)  # 300, and not 300.0, for whoever reads the file


def test_equal_scores_are_told(tmp_path: Path) -> None:
    """Of the test images alone; nothing to test on is nothing to tell of."""
    tested = [scored_image(f"{number}.png", "good", False, 0.25, threshold=1.0) for number in range(3)]
    held_out = [scored_image("h.png", "good", False, 0.5, "holdout", threshold=1.0)]
    for rows, said in ((tested + held_out, True), (tested[:1] + held_out, False), (held_out, False)):
        write_predictions(tmp_path, rows)
        assert bool(equal_scores(tmp_path)) == said
    write_predictions(tmp_path, tested + held_out)
    assert str(equal_scores(tmp_path)).startswith("all 3 test images score 0.25, so that no figure of images means")
    write_predictions(tmp_path, [*tested, scored_image("3.png", "cut", True, 0.26, threshold=1.0)])
    assert equal_scores(tmp_path) is None


def test_predictions_are_read_as_they_were_written(tmp_path: Path) -> None:
    rows = [scored_image('test/a, "b"/0.png', 'a, "b"', True, 0.1 + 0.2, threshold=0.3)]
    rows.append(scored_image("train/good/0.png", "good", False, 1e-9, "holdout", threshold=0.3))
    write_predictions(tmp_path, rows)
    assert read_predictions(tmp_path) == rows


HEADER = "path,split,defect,label,score,decision\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "no image"),
        (HEADER, "no image"),
        (HEADER + "a.png,test,good,0", "the file: Input should be a valid string"),
        (HEADER + "a.png,test,good,0,1.5,good,9", "the file: Input should be a valid string"),
        (HEADER + "a.png,test,good,0,nan,good", "score: Input should be a finite number"),
        (HEADER + '"a.png', "unexpected end of data"),
        ("path,label\na.png,0", "split: Field required"),
    ],
)
def test_damaged_predictions_get_a_line(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "predictions.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(StageError) as caught:
        read_predictions(tmp_path, "run it again")
    assert str(caught.value) == f"{path}: damaged, or by another version of Blemish ({reason}); run it again"


def test_pixels_survive_the_file(tmp_path: Path) -> None:
    bins = np.eye(3, dtype=np.int32), np.ones((3, 3), np.int32), np.full((3, 3), 0.25, np.float32)
    kept = PixelCounts(*bins, np.array([[4, 1], [0, 0], [2, 3]]), np.array([False, True, True]))
    kept.save(tmp_path / "pixels.npz")
    read = PixelCounts.load(tmp_path / "pixels.npz", "").of([2, 0])
    assert (read.normal == [[0, 0, 1], [1, 0, 0]]).all()
    assert read.regions.dtype == np.float32
    assert read.called.tolist() == [[2, 3], [4, 1]]
    assert read.saturated.tolist() == [True, False]
    assert read.f1 == pytest.approx(2 * 4 / (6 + 4 + 6))  # 4 of 6 anomalous pixels called, and 6 normal ones


def test_the_centre_of_a_picture_keeps_its_proportions() -> None:
    assert centre((256, 256), Size.square(224), Size.square(256)) == (slice(16, 240), slice(16, 240))
    assert centre((100, 1000), Size.square(224), Size.square(256)) == (slice(6, 94), slice(62, 938))
    assert centre((64, 80), Size.square(64), Size.square(64)) == (slice(0, 64), slice(0, 80))


def test_regions_of_a_window_are_those_of_the_cut_mask() -> None:
    mask = np.zeros((8, 8), dtype=bool)
    mask[0:4, 0:3] = mask[6, 6] = True
    anomaly_map = np.arange(64, dtype=np.float32).reshape(8, 8)
    window = centre((8, 8), Size.square(4), Size.square(8))
    found = Regions.of(mask, window).split(anomaly_map, "a")
    expected = Regions.of(mask[window]).split(anomaly_map[window], "a")
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert found.num_regions == 1


def test_pixels_of_two_regions_are_not_compared() -> None:
    whole = TestSet("nut", (("test/good/0.png", False),), "data", 256, "pixels", None)
    centre_only = replace(whole, region="the centre 224 x 224 of 256 x 256 pixels")
    assert whole.difference(centre_only) is None
    assert centre_only.difference(centre_only, by_pixel=True) is None
    assert whole.difference(centre_only, by_pixel=True) == (
        "nut is measured on all pixels and on the centre 224 x 224 of 256 x 256 pixels; set evaluate.region: image for "
        "both"
    )
