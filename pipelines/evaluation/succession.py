"""Whether a challenger may take a champion's place: not where it is found worse on what both were tested on.

The two are compared on the same pictures, image by image (`chance`): on each type of defect by itself, by the share
that is found at the deployed thresholds and by the AUROC against all good parts; on the good parts by the false
alarms; and on all of them by the AUROC. Worse is what is so bad by chance in at most 5 % of comparisons with an equally
good model; the other direction is not asked about. P-values are not adjusted for the number of types: a needless
refusal costs a look at the parts that it names, a needless change of the champion escaped defects (docs/statistics.md
says how often either happens).

Seeds do not count as chance here: it is two trained networks that are compared, not two methods.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from shlex import quote
from typing import Literal

import numpy as np

from pipelines.evaluation.chance import differences
from pipelines.evaluation.curves import Bools, image_curve
from pipelines.evaluation.measures import METRIC_BY_KEY
from pipelines.evaluation.outcomes import Outcome, Share
from pipelines.numbers import counted, p_value, percent
from pipelines.records import Record

Figure = Literal["recall", "image_auroc", "false_alarms"]
Images = tuple[tuple[str, bool], ...]  # (path, anomalous), sorted

_CHANCE = 0.05
_NAMED = 5  # parts in a sentence


class Worse(Record):
    """What a challenger does worse."""

    figure: Figure
    defect: str | None  # the type; None: all test images, or for the false alarms all good parts
    before: Share
    now: Share
    p: float  # how often an equally good challenger does as badly, or worse
    changed_sides: tuple[str, ...]  # parts that the champion decided on rightly, and the challenger does not
    num_images: int  # of this type, or good ones

    @property
    def text(self) -> str:
        where = f" on {self.defect}" if self.defect else ""
        parts = self.changed_sides
        more = f" and {len(parts) - _NAMED} more" if len(parts) > _NAMED else ""
        sides = {"recall": "no longer found", "false_alarms": "now rejected"}.get(self.figure, "now decided wrongly")
        named = f"{sides}: {', '.join(parts[:_NAMED])}{more}" if parts else "no decision is another"
        title, of = METRIC_BY_KEY[self.figure].title, counted(self.num_images, "image")
        return (
            f"{title}{where} {percent(self.now)} instead of {percent(self.before)} ({of}, {p_value(self.p)}): {named}"
        )


class Trial(Record):
    """A challenger."""

    model: str
    run_id: str
    worse: tuple[Worse, ...] = ()
    refused: str | None = None  # why there is nothing to compare

    @property
    def passed(self) -> bool:
        return not self.worse and self.refused is None

    @property
    def sentences(self) -> list[str]:
        """Why it is refused."""
        reasons = [self.refused] if self.refused else [worse.text for worse in self.worse]
        return [f"{self.model} of run {self.run_id[:8]} is refused: {reason}." for reason in reasons]


class Succession(Record):
    """The champion of a category whose test is frozen, and those that could take its place, in their order."""

    model: str
    run_id: str
    since: str  # when the test was frozen
    trials: tuple[Trial, ...] = ()  # none where it is among the best itself

    @property
    def successor(self) -> Trial | None:
        """The first that is not found worse; None: the champion stays."""
        return next((trial for trial in self.trials if trial.passed), None)

    @property
    def reigns(self) -> str:
        """The model that is champion then."""
        return self.model if self.successor is None else self.successor.model

    def sentences(self, category: str) -> list[str]:
        """What became of it, and why."""
        old = f"{self.model} of run {self.run_id[:8]}"
        if (new := self.successor) is not None:
            return [
                f"Champion of {category}: {new.model} of run {new.run_id[:8]}, not found worse than {old} on any type "
                f"of defect of the test that is frozen since {self.since[:10]}."
            ]
        if not self.trials:
            return [f"Champion of {category}: {old}, as before."]
        return [
            f"Champion of {category}: still {old}. Its bundle: blemish bundle champion {quote(category)}",
            *(sentence for trial in self.trials for sentence in trial.sentences),
            "To have the best of this report all the same, remove the alias 'champion' on MLflow's page of the "
            "registered model, and run: blemish report",
        ]


def trial(champion: Outcome, challenger: Outcome, defects: Mapping[str, str], run_id: str, resamples: int) -> Trial:
    """Compare the two; `defects`: the type of each defective test image, by its path."""
    if (reason := champion.test_set.difference(challenger.test_set)) is not None:
        return Trial(model=challenger.name, run_id=run_id, refused=reason)
    shared = champion.test_set.shared(challenger.test_set)
    good = tuple(image for image in shared if not image[1])
    of_type = {
        name: tuple(sorted((*good, *(image for image in shared if image[1] and defects[image[0]] == name))))
        for name in sorted({defects[path] for path, label in shared if label})
    }
    # Of one type alone, its AUROC is that of all.
    groups = [*of_type.items(), (None, shared)]
    worse = [found for defect, images in groups for found in _worse(champion, challenger, images, defect, resamples)]
    if len(of_type) == 1:
        worse = [found for found in worse if found.figure != "image_auroc" or found.defect]
    return Trial(model=challenger.name, run_id=run_id, worse=tuple(worse))


def _worse(
    champion: Outcome, challenger: Outcome, images: Images, defect: str | None, resamples: int
) -> Iterator[Worse]:
    """By each figure that tells of these images, and of a type of defect by itself or of all."""
    before, now = (replace(outcome.of(images), pixels=None) for outcome in (champion, challenger))
    found = differences(before, now, resamples)
    figures: tuple[Figure, ...] = ("false_alarms", "image_auroc") if defect is None else ("recall", "image_auroc")
    for figure in figures:
        if figure not in found:
            continue
        difference = found[figure].observed
        p, better = found[figure].p_value(difference, ()) / 2, METRIC_BY_KEY[figure].higher_is_better
        if p > _CHANCE or (difference > 0) != better:
            continue
        of, lost = _images_of(figure, before, defect), _lost(before, now)
        named = lost if figure == "image_auroc" else of & lost  # the AUROC of a type is that against all good parts
        yield Worse(
            figure=figure,
            defect=defect,
            before=_value(figure, before),
            now=_value(figure, now),
            p=p,
            changed_sides=tuple(path for (path, _), is_named in zip(images, named, strict=True) if is_named),
            num_images=int(of.sum()),
        )


def _images_of(figure: Figure, outcome: Outcome, defect: str | None) -> Bools:
    """Those that a figure is of: defects, good parts, or both."""
    if figure == "false_alarms":
        return ~outcome.labels
    return outcome.labels if defect else np.ones_like(outcome.labels)


def _lost(before: Outcome, now: Outcome) -> Bools:
    """Whether each image was decided on rightly, and is no longer."""
    right, still = ((outcome.scores > outcome.threshold) == outcome.labels for outcome in (before, now))
    lost: Bools = right & ~still
    return lost


def _value(figure: Figure, outcome: Outcome) -> float:
    if figure == "image_auroc":
        return float(image_curve(outcome.scores, outcome.labels)[1].auroc())
    of = outcome.labels if figure == "recall" else ~outcome.labels
    return float((outcome.scores[of] > outcome.threshold).mean())
