"""What an evaluation leaves on disk, written and read: predictions, pixel counts, test set."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.data.index import GOOD
from pipelines.errors import StageError
from pipelines.evaluation.curves import Bools, Floats
from pipelines.evaluation.regions import Pixels, Regions
from pipelines.pictures.panels import Picture


@dataclass(frozen=True, slots=True)
class TestImage(Picture):
    """One test image's outcome: all that is kept of it, so that it is gathered once."""

    __test__ = False  # nothing for pytest to collect

    milliseconds: float  # that the model took for it, alone
    regions: Regions | None  # at the size at which pixels are compared; None where the category has no masks


@dataclass(frozen=True, slots=True)
class HeldOutImage:
    """A good part that the thresholds come from."""

    path: str
    score: float
    peak: float  # the map's highest value
    milliseconds: float


def write_predictions(
    path: Path, results: Sequence[TestImage], held_out: Sequence[HeldOutImage], threshold: float
) -> None:
    """The test images, then the held-out ones that the threshold comes from."""
    rows = [("test", r.path, r.defect, r.label, r.score, r.milliseconds) for r in results]
    rows += [("holdout", r.path, GOOD, False, r.score, r.milliseconds) for r in held_out]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "split", "defect", "label", "score", "decision", "milliseconds"])
        for split, name, defect, label, score, milliseconds in rows:
            decision = "defect" if score > threshold else "good"
            writer.writerow([name, split, defect, int(label), repr(score), decision, f"{milliseconds:.2f}"])


@dataclass(frozen=True, slots=True)
class TestedImage:
    """A test image as `predictions.csv` has it."""

    __test__ = False  # nothing for pytest to collect

    path: str
    defect: str
    label: bool
    score: float


def read_tested(folder: Path) -> list[TestedImage]:
    """The test images of an evaluation, in the order of its kept maps."""
    with (folder / PREDICTIONS_FILE).open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    return [TestedImage(row["path"], row["defect"], row["label"] == "1", float(row["score"])) for row in rows]


# What `evaluate` writes and everything here is read from
EVALUATION_FILE = "evaluation.json"
PREDICTIONS_FILE = "predictions.csv"  # a row per test and held-out image
PIXELS_FILE = "pixels.npz"  # absent without masks
EVALUATION_FOLDER = "evaluation"  # where a run keeps them
_PIXEL_BINS = 500  # along the curves; the metrics of 500 bins are within a thousandth of the exact ones


@dataclass(frozen=True, slots=True)
class PixelCounts:
    """The pixels of N test images by their score, in B bins from the highest scores to the lowest.

    `regions` counts each pixel inside an anomalous region as one over the region's size: a whole region adds 1.
    """

    normal: NDArray[np.int32]  # (N, B), outside all regions
    anomalous: NDArray[np.int32]  # (N, B)
    regions: NDArray[np.float32]  # (N, B)

    def save(self, path: Path) -> None:
        np.savez_compressed(path, normal=self.normal, anomalous=self.anomalous, regions=self.regions)

    @classmethod
    def load(cls, path: Path) -> "PixelCounts":
        with np.load(path) as arrays:
            return cls(arrays["normal"], arrays["anomalous"], arrays["regions"])

    def of(self, rows: Sequence[int]) -> "PixelCounts":
        """The counts of these images, in this order."""
        return PixelCounts(self.normal[rows], self.anomalous[rows], self.regions[rows])


def bin_edges(curve_thresholds: Floats) -> NDArray[np.float32]:
    """At most `_PIXEL_BINS` thresholds, highest first, of a curve whose points lie evenly along it.

    The curve begins with nothing called anomalous and ends with everything.
    """
    inner = curve_thresholds[1:]
    kept = np.linspace(0, len(inner) - 1, min(_PIXEL_BINS, len(inner))).round().astype(int)
    edges: NDArray[np.float32] = np.unique(inner[kept].astype(np.float32))[::-1]
    return edges


def count_pixels(images: Iterable[Pixels], edges: NDArray[np.float32]) -> PixelCounts:
    """Sort the pixels of each image into the bins that end at `edges`, highest first."""
    ascending, num_bins = edges[::-1], len(edges)
    counts: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
    for image in images:
        normal, anomalous = (
            # above how many edges the score is; rounding may put one on the last edge
            np.minimum(num_bins - np.searchsorted(ascending, scores, side="left"), num_bins - 1)
            for scores in (image.normal, image.anomalous)
        )
        counts[0].append(np.bincount(normal, minlength=num_bins))
        counts[1].append(np.bincount(anomalous, minlength=num_bins))
        counts[2].append(np.bincount(anomalous, 1.0 / image.region_sizes, minlength=num_bins))
    normal, anomalous, regions = (np.stack(kept) for kept in counts)
    return PixelCounts(normal.astype(np.int32), anomalous.astype(np.int32), regions.astype(np.float32))


@dataclass(frozen=True, slots=True)
class TestSet:
    """Which images a model was tested on. Two of them are the same if names, labels and pixels are."""

    __test__ = False  # nothing for pytest to collect

    category: str
    images: tuple[tuple[str, bool], ...]  # (path, anomalous), sorted
    data_sha256: str  # of all files of the category
    image_size: int
    pixels_sha256: str  # of the test images as the model saw them, at this size

    def difference(self, other: "TestSet") -> str | None:
        """What keeps results on the two from being compared, None if nothing does."""
        if self.category != other.category:
            return f"{self.category} and {other.category} are two categories"
        if self.images != other.images:
            if len(self.images) != len(other.images):
                return f"{len(self.images)} and {len(other.images)} test images of {self.category}"
            first = next(a for a, b in zip(self.images, other.images, strict=True) if a != b)
            return f"the test images of {self.category} are not the same: {first[0]} is in one of the two only"
        seen_alike = self.image_size == other.image_size and self.pixels_sha256 == other.pixels_sha256
        if self.data_sha256 != other.data_sha256 and not seen_alike:
            return f"the files of {self.category} changed between the two evaluations"
        return None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one model said of the test images of one category, in the order of `test_set.images`."""

    name: str
    test_set: TestSet
    scores: Floats  # (N,)
    threshold: float
    values: Mapping[str, float]  # as `evaluate` measured them, from every pixel
    pixels: PixelCounts | None

    @property
    def labels(self) -> Bools:
        return np.array([label for _, label in self.test_set.images], dtype=bool)


def read_outcome(folder: Path, evaluation: Mapping[str, Any], name: str) -> Outcome:
    """What `evaluate` wrote into `folder`; `evaluation` is the content of its JSON file, `name` what to call the model.

    Raises:
        StageError: the folder is not from this version.
    """
    rows = read_predictions(folder)
    if "pixels_sha256" not in evaluation or any("split" not in row for row in rows):
        model, category = evaluation["model"], evaluation["category"]
        raise StageError(f"{folder}: by another version of Blemish; run `blemish evaluate {model} {category}` again")
    tested = [row for row in rows if row["split"] == "test"]
    order = sorted(range(len(tested)), key=lambda place: tested[place]["path"])
    pixels = PixelCounts.load(folder / PIXELS_FILE).of(order) if (folder / PIXELS_FILE).exists() else None
    return Outcome(
        name=name,
        test_set=TestSet(
            category=evaluation["category"],
            images=tuple((tested[place]["path"], tested[place]["label"] == "1") for place in order),
            data_sha256=evaluation["data_sha256"],
            image_size=evaluation["protocol"]["image_size"],
            pixels_sha256=evaluation["pixels_sha256"],
        ),
        scores=np.array([float(tested[place]["score"]) for place in order]),
        threshold=evaluation["threshold"]["value"],
        values={key: value for key, value in evaluation["metrics"].items() if value is not None},
        pixels=pixels,
    )


def read_predictions(folder: Path) -> list[dict[str, str]]:
    """The rows of the images, test and held-out, in the order that `evaluate` wrote them."""
    with (folder / PREDICTIONS_FILE).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
