"""What is asked first, in plain words: how many defects are found, how many good parts rejected, what to expect."""

from collections.abc import Sequence

from pipelines.evaluation.certainty import AVERAGE
from pipelines.evaluation.measures import METRIC_BY_KEY
from pipelines.numbers import counted, listed, rate
from pipelines.report.summary import MAIN_METRIC, CellSummary, Summary


def best_cells(summary: Summary, category: str = AVERAGE) -> list[CellSummary]:
    """Those of the best model: on a category, or of all categories where it is the best on average."""
    model = summary.best_first(category)[0]
    return [cell for cell in summary.cells if cell.model == model and category in (cell.category, AVERAGE)]


def headline(cells: Sequence[CellSummary]) -> str:
    """What one model decided on the test images of its cells, at their deployed thresholds."""
    decided = [cell.confusion for cell in cells]
    found, missed = sum(c.true_positives for c in decided), sum(c.false_negatives for c in decided)
    rejected, passed = sum(c.false_positives for c in decided), sum(c.true_negatives for c in decided)
    told = []
    if found + missed:
        told.append(f"finds {found} of {counted(found + missed, 'defect')}")
    if rejected + passed:
        told.append(f"rejects {rejected} of {counted(rejected + passed, 'good part')}")
    return f"{cells[0].model} {' and '.join(told) or 'was tested on no image'}"


def meaning(cells: Sequence[CellSummary]) -> list[str]:
    """What its thresholds promise of further parts, and what they do not."""
    thresholds = [cell.threshold for cell in cells]
    ends = min(t.expected_rate for t in thresholds), max(t.expected_rate for t in thresholds)
    expected = " to ".join(dict.fromkeys(f"{rate(share)} (1 in {round(1 / share)})" for share in ends))
    source = "held-out good parts" if cells[0].counts.holdout else "good parts that were not learnt from"
    told = [
        f"Its threshold was set on {source} and has not seen the test images: of further good parts like those, expect "
        f"it to reject {expected}."
    ]
    if any(cell.counts.test_anomalous for cell in cells):
        told.append("Of further defects nothing is promised: what was found here holds for defects like these.")
    if missed := [threshold for threshold in thresholds if not threshold.attainable]:
        needed = max(threshold.num_images_needed for threshold in missed)
        asked = rate(missed[0].rate_requested)
        told.append(f"To promise the {asked} that was asked for takes {needed} held-out good parts a category.")
    return told


def standing(summary: Summary) -> str:
    """How the best model came to be first; empty where it is the only one."""
    if len(summary.models) == 1:
        return ""
    if not any(cell.counts.num_tested for cell in summary.cells):
        return "Without a test no model is better than another: they stand in the order of params.yaml."
    if all(cell.metrics.get(MAIN_METRIC) is None for cell in summary.cells):
        return "Without a defect in the test, models are ranked by false alarms: it has the fewest."
    found = summary.champion(MAIN_METRIC, AVERAGE if len(summary.categories) > 1 else summary.categories[0])
    first = f"Of {len(summary.models)} models it comes first by {METRIC_BY_KEY[MAIN_METRIC].title}"
    if found and found.tied_with:
        return f"{first}; {listed(found.tied_with)} cannot be told apart from it on these images."
    if found and found.best:
        return f"{first}, distinguishable from every other."
    return f"{first}."
