"""What the words of the page mean, each in a sentence or two, and where in a text they are to be explained."""

import re
from dataclasses import dataclass

from markupsafe import Markup, escape


@dataclass(frozen=True, slots=True)
class Term:
    """A word with its explanation."""

    key: str
    title: str
    text: str
    words: str = ""  # a pattern: what stands for it in a sentence


TERMS = (
    Term(
        "auroc",
        "AUROC",
        "How well scores tell defects from good parts, whatever the threshold: the chance that a defective image (or "
        "pixel) drawn at random scores higher than a good one. 100 is perfect, 50 is guessing.",
        "(?:image )?AUROC",
    ),
    Term(
        "ap",
        "AP, average precision",
        "How much of what is flagged is really defective, averaged over all thresholds from the strictest to the one "
        "that finds every defect. 100 is perfect; guessing gives the share of defects among the images (or pixels).",
    ),
    Term(
        "f1",
        "F1",
        "One figure of two: the share of defects that are found, and the share of flagged images (or pixels) that are "
        "defective (their harmonic mean). F1-max is the highest that any threshold gives, which is an oracle's.",
    ),
    Term(
        "aupro",
        "AUPRO",
        "How much of the area of each defect the map covers, small defects counting as much as large ones, averaged "
        "while the share of good pixels above the threshold goes from 0 to 0.3 (or 0.05). 100 is perfect.",
    ),
    Term(
        "spro",
        "sPRO",
        "As AUPRO, where covering a part of a defect may count as covering all of it, as in MVTec LOCO.",
    ),
    Term(
        "found",
        "Defects found",
        "The share of defective test images whose score is above the deployed threshold; also called recall.",
    ),
    Term(
        "alarms",
        "False alarms",
        "The share of good test images whose score is above the deployed threshold: good parts that would be rejected.",
    ),
    Term(
        "threshold",
        "Deployed threshold",
        "A part is called defective if its score is above this number. The exported model carries it.",
        "deployed thresholds?",
    ),
    Term(
        "oracle",
        "Oracle",
        "Its threshold is chosen by looking at the test images: what would be possible at best. For further parts "
        "nobody can choose so, and no exported model does.",
        "oracle",
    ),
    Term(
        "holdout",
        "Hold-out",
        "Good parts that are put aside: no model learns from them, and their scores set the threshold.",
        "held-out|held out",
    ),
    Term(
        "promised",
        "Promised false alarms",
        "The share of further good parts that the threshold is expected to reject, if they are like the held-out ones. "
        "Few held-out parts cannot promise a small share: n of them promise 1 in n + 1 at best.",
        "promised?|promises",
    ),
    Term(
        "interval",
        "95 % interval",
        "Other test images of the same kind would give another figure. Of such intervals, 95 in 100 hold the true one: "
        "the fewer the images, the wider.",
        "95.% intervals?",
    ),
    Term(
        "tie",
        "Tie",
        "The difference between two models may be chance: on these images nobody can say which of them is better.",
        "tie|cannot be told apart",
    ),
    Term(
        "seeds",
        "Training seeds",
        "Training draws at random, and another draw gives another model. The number after ± is the standard deviation "
        "between them.",
        "training seeds",
    ),
)
OF_METRICS = {
    "image_auroc": "auroc",
    "image_ap": "ap",
    "image_f1_max": "f1",
    "recall": "found",
    "false_alarms": "alarms",
    "pixel_auroc": "auroc",
    "pixel_ap": "ap",
    "pixel_f1": "f1",
    "pixel_f1_max": "f1",
    "aupro_30": "aupro",
    "aupro_05": "aupro",
    "spro_05": "spro",
}
_IN_TEXT = re.compile("|".join(rf"(?P<{term.key}>\b(?:{term.words})\b)" for term in TERMS if term.words), re.IGNORECASE)


def explained(text: str) -> Markup:
    """A sentence as HTML, in which each term can be opened where it first stands."""
    seen = set[str]()

    def button(found: re.Match[str]) -> str:
        key = str(found.lastgroup)
        if key in seen:
            return found[0]
        seen.add(key)
        return f'<button type="button" class="term" popovertarget="term-{key}">{found[0]}</button>'

    return Markup(_IN_TEXT.sub(button, str(escape(text))))  # noqa: S704
