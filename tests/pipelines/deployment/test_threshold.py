"""`blemish threshold`: the exported file with another threshold, and who chose it, how and on what."""

import csv
import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bright_model import CARD, SIDE, write_model

from pipelines.deployment.threshold import threshold
from pipelines.errors import ArgumentError, ExportError, StageError
from pipelines.files import file_sha256
from pipelines.inference.card import ThresholdChoice
from pipelines.inference.detector import Detector, ModelCard
from pipelines.inference.engine import Inputs
from pipelines.paths import Cell, Project

MODEL, CATEGORY = CARD.model, CARD.category


@pytest.fixture
def cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cell:
    """Exported, in a project that is the working directory."""
    monkeypatch.chdir(tmp_path)
    return export(Project(Path()).cell(MODEL, CATEGORY, 0), CARD)


def export(cell: Cell, card: ModelCard) -> Cell:
    cell.exported.mkdir(parents=True, exist_ok=True)
    write_model(cell.onnx, card.to_metadata())
    return cell


def choose(value: float, because: str | None = None, by: str | None = "anna") -> ThresholdChoice:
    done = threshold(MODEL, CATEGORY, value, because, by, Project(Path()))
    assert done.left_behind is None
    return done.choice


def test_the_copy_holds_the_choice_and_the_same_network(cell: Cell) -> None:
    exported = file_sha256(cell.onnx)
    choice = choose(0.25, "two scratches were missed")
    assert (choice.threshold, choice.former, choice.by) == (0.25, CARD.threshold, "anna")
    assert choice.because == "two scratches were missed"
    assert datetime.fromisoformat(choice.at).tzinfo is not None
    assert choice.on_test_images is None  # nothing is evaluated here
    assert file_sha256(cell.onnx) == exported
    card = Detector(cell.deployed).card
    assert card == replace(CARD, threshold=0.25, false_alarm_rate=None, review_load=None, choices=(choice,))
    before, after = (onnx.load(path) for path in (cell.onnx, cell.deployed))
    assert before.graph.SerializeToString() == after.graph.SerializeToString()
    pixels = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8)
    for one, other in zip(*(Detector(path)(Inputs(pixels, None)) for path in (cell.onnx, cell.deployed)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_choices_follow_one_another_and_the_first_threshold_keeps_its_promise(cell: Cell) -> None:
    made = [choose(value) for value in (0.25, -0.75, CARD.threshold)]
    assert [choice.former for choice in made] == [CARD.threshold, 0.25, -0.75]
    card = Detector(cell.deployed).card
    assert card.choices == tuple(made)
    assert (card.false_alarm_rate, card.review_load) == (CARD.false_alarm_rate, CARD.review_load)


def test_a_new_training_begins_anew_and_says_so(cell: Cell) -> None:
    choose(0.25)
    export(cell, replace(CARD, run_id="4567", threshold=9.0))
    done = threshold(MODEL, CATEGORY, 8.0, None, "anna", Project(Path()))
    assert done.choice.former == 9.0
    assert Detector(cell.deployed).card.choices == (done.choice,)
    expected = "the file deployed before was trained in run 0123, the exported one in run 4567"
    assert done.left_behind == expected


def test_an_older_file_is_replaced(cell: Cell) -> None:
    cell.deployed.parent.mkdir(parents=True)
    write_model(cell.deployed, {**CARD.to_metadata(), "blemish.format": "5"})
    done = threshold(MODEL, CATEGORY, 8.0, None, "anna", Project(Path()))
    assert done.left_behind == f"{cell.deployed}: written in format 5, this version reads 7; export it again"
    assert Detector(cell.deployed).card.threshold == 8.0


def write_evaluation(cell: Cell, run_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three good parts and two defects, and a held-out part, which does not count."""
    rows = [("good", 0, score) for score in (0.1, 0.2, 0.6)] + [("cut", 1, score) for score in (0.3, 0.9)]
    cell.evaluated.mkdir(parents=True, exist_ok=True)
    with cell.predictions.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "split", "defect", "label", "score", "decision", "group"])
        for number, (defect, label, score) in enumerate(rows):
            writer.writerow([f"{number}.png", "test", defect, label, score, "good", ""])
        writer.writerow(["held.png", "holdout", "good", 0, 5.0, "good", ""])

    class Record:
        def __init__(self) -> None:
            self.run_id = run_id

    def load(*_: Any) -> Record:
        return Record()

    monkeypatch.setattr("pipelines.deployment.threshold.Evaluation.load", load)


def test_what_the_choice_means_on_the_test_images_is_kept(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    write_evaluation(cell, CARD.run_id, monkeypatch)
    said = "2 of 2 defects found and 1 of 3 good parts rejected, 1 and 1 before"
    assert choose(0.25).on_test_images == said
    assert Detector(cell.deployed).card.choices[0].on_test_images == said


def test_scores_of_another_training_say_nothing(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    write_evaluation(cell, "4567", monkeypatch)
    assert choose(0.25).on_test_images is None


def test_who_is_logged_in_chooses(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "berta")
    assert choose(0.25, by=None).by == "berta"

    def nobody() -> str:
        raise OSError("No username set in the environment")

    monkeypatch.setattr("getpass.getuser", nobody)
    with pytest.raises(ArgumentError, match=r"^no name is known here of who is logged in: give --by$"):
        choose(0.5, by=None)
    assert Detector(cell.deployed).card.threshold == 0.25


def test_a_model_that_is_not_exported_is_refused(cell: Cell) -> None:
    with pytest.raises(StageError) as caught:
        threshold("fapm", CATEGORY, 0.25, None, "anna", Project(Path()))
    expected = "fapm on part is not exported: no exported/fapm/part/model.onnx; run `blemish export fapm part` first"
    assert str(caught.value) == expected


def test_names_that_lead_elsewhere_are_refused(cell: Cell) -> None:
    with pytest.raises(ExportError) as caught:
        threshold(MODEL, f"../{MODEL}/{CATEGORY}", 0.25, None, "anna", Project(Path()))
    assert str(caught.value).endswith(f": of {MODEL} on {CATEGORY}, not of {MODEL} on ../{MODEL}/{CATEGORY}")
    assert not (cell.root / "deployed").exists()


def test_a_full_disk_leaves_the_former_file(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(0.25)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipelines.deployment.threshold.onnx.save", full)
    with pytest.raises(Exception, match="No space left"):
        choose(0.5)
    assert Detector(cell.deployed).card.threshold == 0.25
    assert [path.name for path in cell.deployed.parent.iterdir()] == ["model.onnx"]


def test_the_command_line(cell: Cell, blemish: Any) -> None:
    outcome = blemish("threshold", MODEL, CATEGORY, "-0.5", "--because", "cracks", "--by", "anna")
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines() == [
        "deployed/brightness/part/model.onnx: threshold -0.5 instead of 0.502, chosen by anna",
        "Use it: blemish predict deployed/brightness/part/model.onnx IMAGE_OR_FOLDER",
    ]
    (kept,) = json.loads(onnx_metadata(cell.deployed)["blemish.choices"])
    assert (kept["because"], kept["by"]) == ("cracks", "anna")
    for value in ("nan", "inf", "much"):
        outcome = blemish("threshold", MODEL, CATEGORY, value)
        assert outcome.code == 1
        assert outcome.err == f"error: threshold '{value}': not a finite number; give one such as 2.5\n"
    assert Detector(cell.deployed).card.threshold == -0.5


def onnx_metadata(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}
