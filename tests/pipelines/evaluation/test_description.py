from pathlib import Path

from drawn_cells import groups, threshold
from made_up import put_evaluation

from pipelines.evaluation.description import description
from pipelines.evaluation.outcomes import read_tested

TAGS = {"git_commit": "c0ffee", "git_dirty": "true"}


def described(tmp_path: Path, **changes: object) -> str:
    evaluation = put_evaluation(tmp_path, "fapm", "nut", auroc=0.7, **changes)
    return description(evaluation, read_tested(tmp_path), TAGS)


def test_who_has_the_run_alone_can_name_data_split_code_and_threshold(tmp_path: Path) -> None:
    text = described(tmp_path)
    assert "| Data | made_up/nut, SHA-256 of its files dddddddddddddddd…, resized to 256 pixels (bilinear) |" in text
    assert "40 good images to fit, 20 held out; tested on 20 good and 20 defective ones" in text
    assert "`data/index.json`, SHA-256 iiiiiiiiiiiiiiii…" in text
    assert "| Code | commit c0ffee, with changes that are not committed |" in text
    assert "| Seed | 0 |" in text
    assert "number 20 from below of 20 held-out good parts, set for 5 % false alarms; expected 4.8 %" in text
    assert "| Image F1-max (oracle) |" in text
    assert "Defects found: cut " in text


def test_the_worst_errors_come_first(tmp_path: Path) -> None:
    text = described(tmp_path)
    missed = sorted((r.score, r.path) for r in read_tested(tmp_path) if r.label and r.decision == "good")
    assert len(missed) > 5
    line = next(line for line in text.splitlines() if line.startswith("| Missed defects |"))
    places = [line.index(path) for _, path in missed[:5]]
    assert places == sorted(places)
    assert line.endswith(f"{len(missed) - 5} more |")


def test_a_threshold_that_promises_nothing_says_what_would(tmp_path: Path) -> None:
    few = {"num_images": 10, "rank": 10, "expected_rate": 0.0909, "attainable": False}
    text = described(tmp_path, threshold=threshold() | few)
    assert "their highest, since 5 % false alarms take 19 to promise; expected 9.1 %" in text


def test_groups_of_good_parts(tmp_path: Path) -> None:
    text = described(tmp_path, groups=groups())
    assert "| Groups | The 2 groups of held-out good parts score differently, so that the promised" in text
    assert "at best. False alarms of good test images: `<i>wed` 1 of 1, `mon` 0 of 3. |" in text
    assert "| Groups |" not in described(tmp_path)


def test_names_of_defects_mean_nothing(tmp_path: Path) -> None:
    defects = {
        "<b>x</b>|`y`": {"count": 4, "recall": 0.5, "recall_interval": (0, 1), "recall_at_rate": 0.5, "auroc": 0.9}
    }
    assert "Defects found: &lt;b>x&lt;/b>\\|\\`y\\` 2 of 4." in described(tmp_path, defects=defects)


def test_good_parts_alone_and_no_git(tmp_path: Path) -> None:
    evaluation = put_evaluation(tmp_path, "fapm", "nut", good=5, defect=0)
    text = description(evaluation, read_tested(tmp_path), {})
    assert "| Code | outside git |" in text
    assert "| Missed defects | none |" in text
    assert "Defects found" not in text
