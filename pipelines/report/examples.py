"""A few test images of the best model for the first page: what it found, what it missed, what it flagged wrongly."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice, zip_longest

from pipelines.evaluation.outcomes import ScoredImage
from pipelines.pictures.panels import Verdict
from pipelines.report.gallery import CategoryGallery
from pipelines.report.summary import CellSummary

# By the name that style and script know a decision by: its word, and the sign that stands beside it.
DECISIONS = {
    "hit": (Verdict.HIT, "✓"),
    "miss": (Verdict.MISS, "✗"),
    "alarm": (Verdict.FALSE_ALARM, "!"),
    "pass": (Verdict.PASS, "·"),
}
# How many of each, and whether the highest scores come first: the surest hits and false alarms, the clearest misses.
_SHOWN = (("hit", 3, True), ("miss", 2, False), ("alarm", 2, True), ("pass", 1, False))


@dataclass(frozen=True, slots=True)
class Example:
    """A test image, and what was decided about it."""

    cell: CellSummary
    image: ScoredImage
    decision: str  # of DECISIONS


def examples(cells: Sequence[CellSummary], galleries: Mapping[str, CategoryGallery]) -> list[Example]:
    """Of one model's cells, from as many categories as there are."""
    chosen = list[Example]()
    for decision, number, highest_first in _SHOWN:
        lists = [_decided(cell, galleries[cell.category], decision, highest_first) for cell in cells]
        in_turns = chain.from_iterable(zip_longest(*lists))
        chosen += islice((example for example in in_turns if example), number)
    return chosen


def _decided(cell: CellSummary, gallery: CategoryGallery, decision: str, highest_first: bool) -> Iterator[Example]:
    verdict, _ = DECISIONS[decision]
    tested = sorted(gallery.tested[cell.model].values(), key=lambda image: image.score, reverse=highest_first)
    for image in tested:
        if Verdict.of(image.label, image.score, cell.threshold.value) is verdict:
            yield Example(cell, image, decision)
