"""What an evaluation leaves on disk, written and read: its record, predictions, pixel counts, test set."""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator

from anomaly_models.common.settings import Settings, Sides
from anomaly_models.common.sizes import Size
from pipelines.data.index import GOOD, Split
from pipelines.evaluation.curves import Bools, Floats, f1
from pipelines.evaluation.regions import Pixels, Regions
from pipelines.numbers import UNKNOWN, counted, interval, p_value, percent, score
from pipelines.paths import PIXELS_FILE, PREDICTIONS_FILE
from pipelines.pictures.frames import Fit
from pipelines.pictures.images import Filter
from pipelines.pictures.panels import Picture
from pipelines.records import Record, read_arrays
from pipelines.unreadable import reading, refusal

NOTHING_TO_TEST_ON = "no image to test on, hence no figure: there is a detector, and its threshold from held-out parts"
EVALUATION_FOLDER = "evaluation"  # where a run keeps what `evaluate` wrote

_CHANCE = 0.05  # a smaller p-value is not put down to it
Share = float  # of images, in [0, 1]
Interval = tuple[float, float]  # 95 %, over the draw of the test images


class Protocol(Record):
    """How a cell was measured."""

    image_size: Sides
    resize: Filter
    fit: Fit
    resolution: Literal["prepared", "native"]
    mask_resize: Literal["none", "nearest"]
    compared: Sides  # of the centre whose pixels are compared, of `image_size`
    of_interest: bool  # whether only those of a region are
    pixel_metrics: Literal["exact", "streaming"]
    threshold_from: str
    seed: int

    @property
    def region(self) -> str | None:
        """Which pixels are compared, None if all are."""
        found = []
        if self.of_interest:
            found.append("the region of interest")
        if self.fit == "crop":
            found.append("what the crop leaves of a picture")
        if self.compared != self.image_size:
            compared, whole = (f"{size.width} x {size.height}" for size in (self.compared, self.image_size))
            found.append(f"the centre {compared} of {whole} pixels")
        return ", of it ".join(found) or None


class Counts(Record):
    """Images of a category by what they were for this model: which test a figure is of."""

    train: int
    holdout: int
    test_normal: int
    test_anomalous: int
    apart: int  # real defects that are not in this test, since this model or another learns from them

    @property
    def num_tested(self) -> int:
        return self.test_normal + self.test_anomalous

    @property
    def test_images(self) -> str:
        """Good and defective ones, and those apart: "30 + 24 (6 apart)"."""
        return f"{self.test_normal} + {self.test_anomalous}" + (f" ({self.apart} apart)" if self.apart else "")

    def of_test(self) -> dict[str, int]:
        """For the tags of a run."""
        return {"good": self.test_normal, "defective": self.test_anomalous, "defects_apart": self.apart}

    @classmethod
    def total(cls, counts: Iterable["Counts"]) -> "Counts":
        """Of several categories."""
        parts = [one.model_dump() for one in counts]
        return cls(**{name: sum(part[name] for part in parts) for name in cls.model_fields})


class HoldoutThreshold(Record):
    """Anomalous if score > value. The rates are false-alarm rates: normal images called anomalous."""

    value: float
    rate_requested: Share
    num_images: int
    rank: int  # `value` is the rank-th smallest of the held-out scores
    expected_rate: Share
    interval_low: Share  # central 95 %, over the draw of the held-out images
    interval_high: Share
    attainable: bool  # False: too few images to promise the requested rate
    num_images_needed: int  # the fewest images that can promise it


class Threshold(HoldoutThreshold):
    """The deployed one, and those that stand beside it."""

    pixel_value: float  # likewise for the map
    oracle: float | None  # what the test images would have chosen; never used


class Review(Record):
    """What is left to a person: scores above the threshold and not above this one."""

    reject_above: float | None  # None: nothing is rejected without a look
    comes_from: Literal["known defects", "held-out good parts"]
    num_images: int  # of these
    num_known_defects: int
    rate_requested: Share  # of defects like them, that are left to a person; or of good parts, rejected without a look
    expected_rate: Share  # likewise
    attainable: bool  # False: too few to promise the requested rate
    num_images_needed: int  # the fewest that can promise it
    expected_load: Share  # of good parts, that go to a person
    load_low: Share  # its central 95 % interval
    load_high: Share

    @property
    def load_ends(self) -> tuple[float, float, float]:
        """Expected, lowest and highest."""
        return self.expected_load, self.load_low, self.load_high

    def text(self, threshold: float) -> str:
        """What is rejected at once and what a person looks at, and how sure that is."""
        ends = interval((self.load_low, self.load_high))
        load = f"Of good parts, {percent(self.expected_load)} % are expected to go there (95 % interval {ends} %)."
        asked, number, needed = f"{100 * self.rate_requested:g} %", self.num_images, self.num_images_needed
        if self.reject_above is None:
            others = ", or known defects" if not self.num_known_defects else ""
            known = f", and the lowest of {counted(self.num_known_defects, 'known defect')} score like good parts"
            return (
                f"A score above the threshold goes to a person: {counted(number, 'held-out good part')} cannot promise "
                f"that {asked} of good parts are rejected without a look (it takes {needed}{others})"
                f"{known if self.num_known_defects else ''}. {load}"
            )
        said = f"A score above {score(self.reject_above)} is rejected at once"
        if self.comes_from == "known defects":
            few = "" if self.attainable else f" ({asked} were asked for, which take {needed} known ones)"
            expected = f"{percent(self.expected_rate)} % are expected not to be"
            said = f"{said}: of defects like {counted(number, 'known one')}, {expected}{few}"
        else:
            said = f"{said}, as are {percent(self.expected_rate)} % of good parts like the {number} held out"
        if self.reject_above == threshold:
            return f"{said}. Nothing is left to a person."
        return f"{said}; one between the two goes to a person. {load}"


class Confusion(Record):
    """Decisions against labels at one threshold."""

    true_positives: int
    false_positives: int
    true_negatives: int
    false_negatives: int

    @property
    def f1(self) -> float:
        """NaN when nothing is anomalous and nothing is called so."""
        wrong = self.false_positives + self.false_negatives
        found = 2 * self.true_positives
        return found / (found + wrong) if found + wrong else float("nan")


class DefectOutcome(Record):
    """How many images of one type of defect are found, and the AUROC of this type alone against all good ones.

    `recall` is at the deployed threshold. Two models whose thresholds let different shares of good test images through
    are compared by `recall_at_rate`: at the lowest threshold that lets no more than the asked share of them through,
    which only the test images can tell.
    """

    count: int
    recall: Share
    recall_interval: Interval
    recall_at_rate: Share | None
    auroc: Share | None


_SHOWN_GROUPS = 12  # of one cell, in a table
GROUP_COLUMNS = (
    "Group",
    "Fitted",
    "Held out",
    "false alarms",
    "mean score",
    "at the others' threshold, %",
    "Good test images",
    "false alarms",
    "mean score",
)


class GroupScores(Record):
    """Good parts of one group, and how many of them exceed the deployed threshold."""

    count: int
    false_alarms: int
    mean_score: float


class GroupOutcome(Record):
    """A group of `prepare.groups`: good parts that were made or photographed together."""

    name: str | None  # None: test images of no group
    fitted: int  # images that the model learnt from
    held_out: GroupScores | None
    left_out: Share | None  # of the held-out ones, above a threshold of the same promise from the other groups
    tested: GroupScores | None


class GroupsOutcome(Record):
    """How good parts of different groups score, by `pipelines.evaluation.groups`."""

    p_value: float | None  # of held-out groups that differ as much by chance, or more; None with fewer than two
    groups: tuple[GroupOutcome, ...]

    @property
    def differ(self) -> bool:
        """Whether the held-out groups score differently by more than chance explains."""
        return self.p_value is not None and self.p_value < _CHANCE

    @property
    def left_out(self) -> tuple[Share, Share, Share] | None:
        """Lowest, mean and highest false-alarm rate of a held-out group whose scores set no threshold."""
        rates = [group.left_out for group in self.groups if group.left_out is not None]
        return (min(rates), math.fsum(rates) / len(rates), max(rates)) if rates else None

    def worst_first(self) -> list[GroupOutcome]:
        """By the share of false alarms in the test, then among the held-out ones."""

        def share(scores: GroupScores | None) -> float:
            return scores.false_alarms / scores.count if scores else -1.0

        return sorted(self.groups, key=lambda group: (-share(group.tested), -share(group.held_out), str(group.name)))

    def table(self) -> list[list[str]]:
        """Below `GROUP_COLUMNS`, the worst groups, and how many more there are."""

        def of(scores: GroupScores | None) -> list[str]:
            return [str(scores.count), str(scores.false_alarms), score(scores.mean_score)] if scores else [UNKNOWN] * 3

        rows = [
            [
                group.name or "of no group",
                str(group.fitted),
                *of(group.held_out),
                percent(group.left_out),
                *of(group.tested),
            ]
            for group in self.worst_first()[:_SHOWN_GROUPS]
        ]
        num_left = len(self.groups) - len(rows)
        return [*rows, [f"and {num_left} more", *[""] * (len(GROUP_COLUMNS) - 1)]] if num_left else rows

    @property
    def text(self) -> str:
        """One sentence, for whoever relies on the promised rate."""
        held_out = [str(group.name) for group in self.groups if group.held_out]
        if self.p_value is None or self.left_out is None:
            return (
                f"all held-out good parts are of one group ({held_out[0]}): whether another scores alike is not known"
            )
        found = "cannot be told apart by their scores"
        if self.differ:
            found = "score differently, so that the promised false-alarm rate does not hold for a new group"
        low, mean, high = map(percent, self.left_out)
        return (
            f"the {len(held_out)} groups of held-out good parts {found} ({p_value(self.p_value)}); at the threshold of "
            f"the others, {low} to {high} % of a group are false alarms, {mean} % on average; {len(held_out)} groups "
            f"promise a new one {percent(1 / (len(held_out) + 1))} % at best"
        )


class Evaluation(Record):
    """One cell measured: `evaluation.json`."""

    model: str  # as params.yaml calls it
    method: str  # that it is, or is a variant of
    category: str
    run_id: str
    data_set: str
    data_sha256: str  # of all files of the category
    test_sha256: str  # of those that any model may be tested on
    index_sha256: str
    frozen: str | None = None  # since when the test is, because pictures were learnt: ISO 8601
    pixels_sha256: str  # of the test images as the model saw them
    settings: dict[str, Any]  # the model's
    protocol: Protocol
    counts: Counts
    metrics: dict[str, float | int | None]  # None where the images do not allow it; pixel metrics need masks
    threshold: Threshold
    review: Review
    confusion: Confusion
    defects: dict[str, DefectOutcome]
    intervals: dict[str, Interval]  # of the metrics that have one
    groups: GroupsOutcome | None  # None where `prepare.groups` is null

    @property
    def known(self) -> dict[str, float]:
        """The metrics that have a value."""
        return {name: value for name, value in self.metrics.items() if value is not None}

    @property
    def recalls(self) -> dict[str, Share]:
        """Flat, beside the metrics in MLflow and DVC."""
        return {f"recall.{name}": found.recall for name, found in self.defects.items()}


@dataclass(frozen=True, slots=True)
class TestImage(Picture):
    """One test image's outcome: all that is kept of it, so that it is gathered once."""

    __test__ = False  # nothing for pytest to collect

    regions: Regions | None  # at the size at which pixels are compared; None where the category has no masks


@dataclass(frozen=True, slots=True)
class HeldOutImage:
    """A good part that the thresholds come from."""

    path: str
    score: float
    peak: float  # the map's highest value

    def or_higher(self, other: "HeldOutImage") -> "HeldOutImage":
        """This one, with the figures of another calibration where they are higher."""
        return replace(self, score=max(self.score, other.score), peak=max(self.peak, other.peak))


class ScoredImage(Settings):
    """A row of `predictions.csv`."""

    path: str
    split: Split
    defect: str
    label: bool
    score: float
    decision: Literal["good", "defect"]
    group: Annotated[str | None, BeforeValidator(lambda text: text or None)]


def scored(
    results: Sequence[TestImage],
    held_out: Sequence[HeldOutImage],
    threshold: float,
    groups: Mapping[str, str | None],
) -> list[ScoredImage]:
    """The test images, then the held-out ones that the threshold comes from; `groups` by their paths."""

    def row(image: TestImage | HeldOutImage, split: Split, defect: str, label: bool) -> ScoredImage:
        return ScoredImage(
            path=image.path,
            split=split,
            defect=defect,
            label=label,
            score=image.score,
            decision="defect" if image.score > threshold else "good",
            group=groups[image.path],
        )

    tested = [row(image, "test", image.defect, image.label) for image in results]
    return tested + [row(image, "holdout", GOOD, False) for image in held_out]


def write_predictions(folder: Path, images: Iterable[ScoredImage]) -> None:
    with (folder / PREDICTIONS_FILE).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(ScoredImage.model_fields)
        for i in images:
            writer.writerow([i.path, i.split, i.defect, int(i.label), repr(i.score), i.decision, i.group])


def read_predictions(folder: Path, remedy: str = "evaluate again") -> list[ScoredImage]:
    """All images, in the order that `evaluate` wrote them; `remedy` ends the message if they cannot be read.

    Raises:
        StageError: there are none, or the file is damaged or another version's.
    """
    path = folder / PREDICTIONS_FILE
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file, restkey="too many", strict=True)
            found = [ScoredImage.model_validate_strings(row) for row in rows]
    except (OSError, ValueError, csv.Error) as error:
        raise refusal(path, error, remedy) from None
    if not found:
        raise refusal(path, ValueError("no image"), remedy)
    return found


def read_tested(folder: Path, remedy: str = "evaluate again") -> list[ScoredImage]:
    """The test images alone, in the order of the kept maps."""
    return [image for image in read_predictions(folder, remedy) if image.split == "test"]


def equal_scores(folder: Path) -> str | None:
    """In one line, that all test images of an evaluation score the same; None if they do not."""
    scores = [image.score for image in read_tested(folder)]
    if len(scores) < 2 or len(set(scores)) > 1:
        return None
    return (
        f"all {len(scores)} test images score {scores[0]:.6g}, so that no figure of images means anything (AUROC 50 is "
        "chance); the score is saturated, or the images are copies of one another: look at them, or train with other "
        "settings"
    )


def doubtful_promise(evaluation: Evaluation) -> str | None:
    """In one line, why the promised false-alarm rate may not be that of a new group; None if nothing says so."""
    groups = evaluation.groups
    return groups.text if groups and (groups.differ or groups.p_value is None) else None


_PIXEL_BINS = 500  # along the curves; the metrics of 500 bins are within a thousandth of the exact ones


@dataclass(frozen=True, slots=True)
class PixelCounts:
    """The pixels of N test images by their score, in B bins from the highest scores to the lowest.

    `regions` counts each pixel inside an anomalous region by what it adds to the overlap: a whole region adds 1.
    """

    normal: NDArray[np.int32]  # (N, B), outside all regions
    anomalous: NDArray[np.int32]  # (N, B)
    regions: NDArray[np.float32]  # (N, B)
    called: NDArray[np.int64]  # (N, 2), normal and anomalous ones above the deployed threshold of the map
    saturated: NDArray[np.bool_]  # (N,), whether a part of a region may count as all, which makes AUPRO sPRO

    def save(self, path: Path) -> None:
        np.savez_compressed(
            path,
            normal=self.normal,
            anomalous=self.anomalous,
            regions=self.regions,
            called=self.called,
            saturated=self.saturated,
        )

    @classmethod
    def load(cls, path: Path, remedy: str) -> "PixelCounts":
        """What `save` wrote; raises StageError where it is damaged."""
        names = "normal", "anomalous", "regions", "called", "saturated"
        return cls(*read_arrays(path, names, remedy))

    def of(self, rows: Sequence[int]) -> "PixelCounts":
        """The counts of these images, in this order."""
        binned = self.normal[rows], self.anomalous[rows], self.regions[rows]
        return PixelCounts(*binned, self.called[rows], self.saturated[rows])

    @property
    def f1(self) -> float:
        """At the deployed threshold, all pixels pooled: the SegF1 of MVTec AD 2 (Heckler-Kram et al., 2025)."""
        false_positives, true_positives = self.called.sum(0, dtype=np.float64)
        return float(f1(true_positives, false_positives, self.anomalous.sum(dtype=np.float64)))


def bin_edges(curve_thresholds: Floats) -> NDArray[np.float32]:
    """At most `_PIXEL_BINS` thresholds, highest first, of a curve whose points lie evenly along it.

    The curve begins with nothing called anomalous and ends with everything.
    """
    inner = curve_thresholds[1:]
    kept = np.linspace(0, len(inner) - 1, min(_PIXEL_BINS, len(inner))).round().astype(int)
    edges: NDArray[np.float32] = np.unique(inner[kept].astype(np.float32))[::-1]
    return edges


def count_pixels(images: Iterable[Pixels], edges: NDArray[np.float32], threshold: float) -> PixelCounts:
    """Sort the pixels of each image into the bins that end at `edges`, highest first; count those above `threshold`."""
    ascending, num_bins = edges[::-1], len(edges)
    counts: tuple[list[Any], ...] = ([], [], [], [], [])
    for image in images:
        normal, anomalous = (
            # above how many edges the score is; rounding may put one on the last edge
            np.minimum(num_bins - np.searchsorted(ascending, scores, side="left"), num_bins - 1)
            for scores in (image.normal, image.anomalous)
        )
        counts[0].append(np.bincount(normal, minlength=num_bins))
        counts[1].append(np.bincount(anomalous, minlength=num_bins))
        counts[2].append(np.bincount(anomalous, image.weights, minlength=num_bins))
        counts[3].append([int((scores > threshold).sum()) for scores in (image.normal, image.anomalous)])
        counts[4].append(image.saturated)
    normal, anomalous, regions, called, saturated = (np.stack(kept) for kept in counts)
    return PixelCounts(
        normal.astype(np.int32),
        anomalous.astype(np.int32),
        regions.astype(np.float32),
        called.astype(np.int64),
        saturated.astype(np.bool_),
    )


@dataclass(frozen=True, slots=True)
class TestSet:
    """Which images a model was tested on. Two of them are the same if names, labels and pixels are.

    Of one data set, the test set of a model that learns from defects may lack some that others are tested on.
    """

    __test__ = False  # nothing for pytest to collect

    category: str
    images: tuple[tuple[str, bool], ...]  # (path, anomalous), sorted
    files_sha256: str  # of all files of the category that any model may be tested on
    image_size: Size
    pixels_sha256: str  # of the test images as the model saw them, at this size
    region: str | None  # which of their pixels are compared, None if all are

    def difference(self, other: "TestSet", *, by_pixel: bool = False) -> str | None:
        """What keeps results on the two, of images or of pixels, from being compared, None if nothing does."""
        if by_pixel and self.region != other.region:
            own, others = (region or "all pixels" for region in (self.region, other.region))
            return f"{self.category} is measured on {own} and on {others}; set evaluate.region: image for both"
        if self.category != other.category:
            return f"{self.category} and {other.category} are two categories"
        if self.images != other.images and not (self.files_sha256 == other.files_sha256 and self._nested(other)):
            if len(self.images) != len(other.images):
                return f"{len(self.images)} and {len(other.images)} test images of {self.category}"
            first = next(a for a, b in zip(self.images, other.images, strict=True) if a != b)
            return f"the test images of {self.category} are not the same: {first[0]} is in one of the two only"
        seen_alike = self.image_size == other.image_size and self.pixels_sha256 == other.pixels_sha256
        if self.files_sha256 != other.files_sha256 and not seen_alike:
            return f"the test files of {self.category} changed between the two evaluations"
        return None

    def _nested(self, other: "TestSet") -> bool:
        """Whether all images of the one are among the other's."""
        return len(self.shared(other)) == min(len(self.images), len(other.images))

    def shared(self, other: "TestSet") -> tuple[tuple[str, bool], ...]:
        """The images that both have, sorted."""
        return tuple(sorted(set(self.images) & set(other.images)))


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What one model said of the test images of one category, in the order of `test_set.images`.

    It equals itself only, so that it can be the key of what follows from it.
    """

    name: str
    test_set: TestSet
    scores: Floats  # (N,)
    threshold: float
    values: Mapping[str, float]  # as `evaluate` measured them, from every pixel
    pixels: PixelCounts | None

    @property
    def labels(self) -> Bools:
        return np.array([label for _, label in self.test_set.images], dtype=bool)

    def of(self, images: tuple[tuple[str, bool], ...]) -> "Outcome":
        """On these of its test images alone; its figures are not those of them."""
        if images == self.test_set.images:
            return self
        place = {image: row for row, image in enumerate(self.test_set.images)}
        rows = [place[image] for image in images]
        pixels = None if self.pixels is None else self.pixels.of(rows)
        return replace(
            self, test_set=replace(self.test_set, images=images), scores=self.scores[rows], values={}, pixels=pixels
        )


def read_outcome(folder: Path, evaluation: Evaluation, name: str) -> Outcome:
    """What `evaluate` wrote into `folder`; `evaluation` is its record, `name` what to call the model.

    Raises:
        StageError: the predictions are damaged, or another version's.
    """
    remedy = f"run `blemish evaluate {evaluation.model} {evaluation.category}` again"
    tested = read_tested(folder, remedy)
    order = sorted(range(len(tested)), key=lambda place: tested[place].path)
    pixels, file = None, folder / PIXELS_FILE
    if file.exists():
        with reading(file, remedy):
            pixels = PixelCounts.load(file, remedy).of(order)
    return Outcome(
        name=name,
        test_set=TestSet(
            category=evaluation.category,
            images=tuple((tested[place].path, tested[place].label) for place in order),
            files_sha256=evaluation.test_sha256,
            image_size=evaluation.protocol.image_size,
            pixels_sha256=evaluation.pixels_sha256,
            region=evaluation.protocol.region,
        ),
        scores=np.array([tested[place].score for place in order]),
        threshold=evaluation.threshold.value,
        values=evaluation.known,
        pixels=pixels,
    )
