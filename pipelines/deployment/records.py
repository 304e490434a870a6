"""What `export` and `latency` leave of a cell. Neither torch nor onnxruntime: the report reads it."""

import math
from typing import Annotated, Any, Literal

from pydantic import Field

from pipelines.errors import ExportError
from pipelines.evaluation.outcomes import (
    Evaluation,
    GroupsOutcome,
    Review,
    ScoredImage,
    Share,
    Threshold,
)
from pipelines.numbers import percent, scores_apart
from pipelines.records import Record

# Without test images good parts stand in; all of them were learnt from where thresholds come from folds.
Tried = Literal["test images", "held-out good parts", "good parts"]
Difference = Annotated[float, Field(allow_inf_nan=True)]  # infinite where a map or score is no number


class Deviation(Record):
    """How far the exported graph's scores or maps are from the original's, on the image where that is worst."""

    image: str
    difference: Difference  # the largest, absolute
    allowed: float
    spread: float  # standard deviation over held-out good parts, which `allowed` is a share of

    @property
    def excess(self) -> float:
        """Above 1: more than allowed."""
        return self.difference / self.allowed if self.difference else 0.0


class Decision(Record):
    """An image that the exported graph and its original disagree about."""

    image: str
    shipped: Difference  # its score by the graph
    seen: float  # by the original
    rounding: bool  # the two scores differ by no more than float32 rounds, and the threshold lies between them


class Parity(Record):
    """How far the exported graph is from its original, over real images from their original files."""

    num_images: int
    images: Tried
    num_held_out: int
    max_difference: float  # in spreads
    score: Deviation
    map: Deviation
    batch: Deviation  # of scores or maps, several images at once against one by one
    input_levels: float  # largest difference, of 255 levels, between a file as it is read now and as it was prepared
    input_image: str  # where that is
    threshold: float
    disagreements: tuple[Decision, ...]
    onnxruntime: str

    @property
    def decisions_changed(self) -> int:
        """Those that rounding does not explain."""
        return sum(not decision.rounding for decision in self.disagreements)

    @property
    def at_threshold(self) -> str | None:
        """In one line, which decisions rounding has changed."""
        found = [decision for decision in self.disagreements if decision.rounding]
        if not found or self.images != "test images":  # one of them is the threshold
            return None
        return (
            f"{len(found)} of {self.num_images} decisions hang on the last digits, of {found[0].image} first: but for "
            f"rounding its score {found[0].seen:.7g} is the threshold, set by a held-out part that looks the same; "
            "hold out more parts, that differ from one another (`prepare.holdout`)"
        )

    def tags(self) -> dict[str, Any]:
        """For MLflow."""
        return self.model_dump(exclude={"disagreements"}) | {"decisions_changed": self.decisions_changed}

    def check(self, model: str, category: str) -> None:
        """Raise ExportError if the file must not be kept."""
        if problem := self._changed() or self._too_far():
            raise ExportError(f"{model} on {category}: {problem}; {self._remedy()}; the file was not kept")

    def _changed(self) -> str | None:
        changed = [decision for decision in self.disagreements if not decision.rounding]
        if not changed:
            return None
        return (
            f"the exported graph changes {len(changed)} of {self.num_images} decisions, of {changed[0].image} first, "
            f"whose score was {changed[0].seen:.4g} and is {changed[0].shipped:.4g} (threshold: {self.threshold:.4g})"
        )

    def _too_far(self) -> str | None:
        name, worst = max(
            [("score", self.score), ("map", self.map), ("result in a batch", self.batch)],
            key=lambda named: named[1].excess,
        )
        if worst.excess <= 1:
            return None
        return (
            f"the exported graph differs from the trained model by {worst.difference:.2g} in the {name} of "
            f"{worst.image} (allowed: {worst.allowed:.2g}; good parts spread by {worst.spread:.2g}) and changes "
            f"{self.decisions_changed} of {self.num_images} decisions"
        )

    def _remedy(self) -> str:
        """What to do about it, by where it comes from."""
        if self.input_levels:
            return (
                f"{self.input_image} is not read as `prepare` read it (up to {self.input_levels:.0f} of 255 levels "
                "apart): prepare and train again"
            )
        remedy = f"onnxruntime {self.onnxruntime} computes something else: try another `export.opset`"
        if self.decisions_changed or not math.isfinite(self.score.difference + self.map.difference):
            return remedy
        return f"{remedy}, or raise `export.max_difference` if so little does not matter"


class OtherDecision(Record):
    """A test image that the int8 file decides otherwise than the float32 one, each by its own threshold."""

    image: str
    float32: float  # its score
    int8: float
    decision: Literal["good", "defect"]  # by the int8 file


class Int8(Record):
    """What the int8 file decides, beside the float32 one: `int8.json`."""

    refused: str | None  # why the file was not kept
    float32_auroc: Share | None
    max_auroc_loss: Share
    metrics: dict[str, float | int | None]  # by the int8 file, of images; None as in an evaluation
    float32_threshold: float
    threshold: Threshold  # set anew, on the held-out parts with the int8 file, as are the next two
    review: Review
    groups: GroupsOutcome | None
    images: tuple[ScoredImage, ...]  # by the int8 file: those tested, then those held out
    others: tuple[OtherDecision, ...]
    max_decisions_changed: Share  # of the images tested
    num_calibrating: int  # good parts, or tiles of them, that training saw
    megabytes: float
    float32_megabytes: float
    onnxruntime: str

    @property
    def tested(self) -> list[ScoredImage]:
        return [image for image in self.images if image.split == "test"]

    @property
    def num_tested(self) -> int:
        return len(self.tested)

    @property
    def text(self) -> str:
        """How it decides, in one line."""
        own, others = scores_apart(self.threshold.value, self.float32_threshold)
        return (
            f"image AUROC {percent(self.metrics['image_auroc'])}, in float32 {percent(self.float32_auroc)}; "
            f"{len(self.others)} of {self.num_tested} test images are decided otherwise, at the threshold {own} for "
            f"{others}; "
            f"{self.megabytes:.1f} MB for {self.float32_megabytes:.1f}"
        )

    def tags(self) -> dict[str, Any]:
        """For MLflow."""
        told = self.model_dump(exclude={"images", "others", "groups"})
        return told | {"num_tested": self.num_tested, "decisions_changed": len(self.others)}

    def of(self, evaluation: Evaluation) -> Evaluation:
        """The same of the int8 file: what only the float32 one was measured for is left out."""
        own = {"metrics": self.metrics, "threshold": self.threshold, "review": self.review, "groups": self.groups}
        return evaluation.model_copy(update={**own, "intervals": {}, "defects": {}})


class Percentiles(Record):
    p50: float
    p95: float
    p99: float


class Milliseconds(Record):
    """Of one image, by part of the way from its file to a decision."""

    decode: Percentiles
    resize: Percentiles
    network: Percentiles
    postprocess: Percentiles
    total: Percentiles


class Throughput(Record):
    """The network alone, on images that are already decoded and resized."""

    batch_size: int
    images_per_second: float


class Latency(Record):
    """Milliseconds of single images by part, and images a second in batches; beside them those of the int8 file."""

    hardware: str
    provider: str
    threads: int
    onnxruntime: str
    num_images: int  # different files
    images: Tried
    num_runs: int
    milliseconds: Milliseconds
    throughput: Throughput
    int8: "Latency | None" = None

    def metrics(self, prefix: str = "latency") -> dict[str, float]:
        """Flat, for MLflow."""
        parts = self.milliseconds.model_dump()
        flat = {f"{prefix}.{part}.{p}": value for part, found in parts.items() for p, value in found.items()}
        flat[f"{prefix}.images_per_second"] = self.throughput.images_per_second
        return flat | (self.int8.metrics("latency_int8") if self.int8 else {})
