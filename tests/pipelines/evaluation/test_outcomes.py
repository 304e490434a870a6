from pathlib import Path

import numpy as np
import pytest
from made_up import put_evaluation, scored_image

from pipelines.errors import StageError
from pipelines.evaluation.outcomes import Evaluation, PixelCounts, read_predictions, write_predictions


def test_an_evaluation_is_read_as_it_was_written(tmp_path: Path) -> None:
    evaluation = put_evaluation(tmp_path, "a", "nut")
    assert isinstance(evaluation.metrics["train_steps"], int)
    read = Evaluation.load(tmp_path / "evaluation.json", "evaluate again")
    assert read == evaluation
    assert isinstance(read.metrics["train_steps"], int)  # 300, and not 300.0, for whoever reads the file


def test_predictions_are_read_as_they_were_written(tmp_path: Path) -> None:
    rows = [scored_image('test/a, "b"/0.png', 'a, "b"', True, 0.1 + 0.2, threshold=0.3)]
    rows.append(scored_image("train/good/0.png", "good", False, 1e-9, "holdout", threshold=0.3))
    write_predictions(tmp_path, rows)
    assert read_predictions(tmp_path) == rows


HEADER = "path,split,defect,label,score,decision,milliseconds\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "no image"),
        (HEADER, "no image"),
        (HEADER + "a.png,test,good,0", "the file: Input should be a valid string"),
        (HEADER + "a.png,test,good,0,1.5,good,1.0,9", "the file: Input should be a valid string"),
        (HEADER + "a.png,test,good,0,nan,good,1.0", "score: Input should be a finite number"),
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
    kept = PixelCounts(np.eye(3, dtype=np.int32), np.ones((3, 3), np.int32), np.full((3, 3), 0.25, np.float32))
    kept.save(tmp_path / "pixels.npz")
    read = PixelCounts.load(tmp_path / "pixels.npz", "").of([2, 0])
    assert (read.normal == [[0, 0, 1], [1, 0, 0]]).all()
    assert read.regions.dtype == np.float32
