from typing import Any

from drawn_cells import read_summary, summary_of, threshold

from pipelines.report.answers import best_cells, headline, meaning, standing
from pipelines.report.summary import Summary


def summary_with(confusions: dict[tuple[str, str], tuple[int, int, int, int]], **thresholds: Any) -> Summary:
    """By model and category: defects found and missed, good parts rejected and passed."""
    models, categories = (list(dict.fromkeys(names)) for names in zip(*confusions, strict=True))
    content = summary_of(models, categories)
    for cell in content["cells"]:
        found, missed, rejected, passed = confusions[cell["model"], cell["category"]]
        counts = {"true_positives": found, "false_negatives": missed}
        cell["confusion"] = counts | {"false_positives": rejected, "true_negatives": passed}
        cell["threshold"] = threshold() | thresholds
    return read_summary(content)


TWO = {
    ("fapm", "nut"): (20, 10, 1, 39),
    ("fapm", "bolt"): (6, 10, 3, 26),
    ("bgad", "nut"): (30, 0, 9, 31),
    ("bgad", "bolt"): (16, 0, 9, 20),
}


def test_the_best_model_is_told_in_counts() -> None:
    summary = summary_with(TWO)
    assert headline(best_cells(summary)) == "fapm finds 26 of 46 defects and rejects 4 of 69 good parts"
    assert headline(best_cells(summary, "bolt")) == "fapm finds 6 of 16 defects and rejects 3 of 29 good parts"


def test_what_was_not_tested_is_not_told() -> None:
    def told(*counts: int) -> str:
        return headline(best_cells(summary_with({("fapm", "nut"): counts})))  # type: ignore[dict-item]

    assert told(0, 0, 1, 3) == "fapm rejects 1 of 4 good parts"
    assert told(1, 0, 0, 0) == "fapm finds 1 of 1 defect"
    assert told(0, 0, 0, 0) == "fapm was tested on no image"


def test_the_promise_is_told_as_one_in_so_many() -> None:
    first, second = meaning(best_cells(summary_with(TWO)))
    assert first == (
        "Its threshold was set on held-out good parts and has not seen the test images: of further good parts like "
        "those, expect it to reject 4.76\xa0% (1 in 21)."
    )
    assert second.startswith("Of further defects nothing is promised")
    cells = best_cells(summary_with(TWO))
    counts = cells[0].counts.model_copy(update={"test_anomalous": 0})
    assert meaning([cell.model_copy(update={"counts": counts}) for cell in cells]) == [first]


def test_promises_that_differ_are_a_range_and_a_broken_one_says_what_it_takes() -> None:
    cells = best_cells(summary_with(TWO, attainable=False, num_images_needed=99, rate_requested=0.01))
    few = cells[0].threshold.model_copy(update={"expected_rate": 0.1})
    told = meaning([cells[0].model_copy(update={"threshold": few}), cells[1]])
    assert "expect it to reject 4.76\xa0% (1 in 21) to 10\xa0% (1 in 10)." in told[0]
    assert told[-1] == "To promise the 1\xa0% that was asked for takes 99 held-out good parts a category."


def test_folds_hold_nothing_out() -> None:
    cells = best_cells(summary_with(TWO))
    counts = cells[0].counts.model_copy(update={"holdout": 0})
    told = meaning([cell.model_copy(update={"counts": counts}) for cell in cells])
    assert told[0].startswith("Its threshold was set on good parts that were not learnt from and ")


def test_the_best_model_says_how_it_came_to_be_first() -> None:
    summary = summary_with(TWO)
    first = "Of 2 models it comes first by Image AUROC"
    assert standing(summary) == f"{first}, distinguishable from every other."
    tie = summary.champions["image_auroc"]["nut"]
    tied = summary.champions["image_auroc"] | {"average": tie}
    assert standing(summary.model_copy(update={"champions": {"image_auroc": tied}})) == (
        f"{first}; bgad cannot be told apart from it on these images."
    )
    assert standing(summary.model_copy(update={"champions": {}})) == f"{first}."
    assert standing(summary_with({("fapm", "nut"): (1, 0, 0, 1)})) == ""


def test_without_defects_or_without_a_test_it_says_so() -> None:
    summary = summary_with(TWO)
    cells = [cell.model_copy(update={"metrics": cell.metrics | {"image_auroc": None}}) for cell in summary.cells]
    assert standing(summary.model_copy(update={"cells": tuple(cells)})) == (
        "Without a defect in the test, models are ranked by false alarms: it has the fewest."
    )
    nothing = {"test_normal": 0, "test_anomalous": 0}
    cells = [cell.model_copy(update={"counts": cell.counts.model_copy(update=nothing)}) for cell in cells]
    assert standing(summary.model_copy(update={"cells": tuple(cells)})) == (
        "Without a test no model is better than another: they stand in the order of params.yaml."
    )
