"""What `export` and `latency` leave of a cell. Neither torch nor onnxruntime: the report reads it."""

from typing import Annotated, Literal

from pydantic import Field

from pipelines.errors import ExportError
from pipelines.records import Record

Tried = Literal["test images", "held-out good parts"]  # the latter where there is nothing to test on
Difference = Annotated[float, Field(allow_inf_nan=True)]  # infinite where a map or score is no number


class Parity(Record):
    """How far the exported graph is from its original, over real images from their original files."""

    num_images: int
    images: Tried
    tolerance: float
    max_map_difference: Difference
    max_score_difference: Difference
    max_batch_difference: Difference  # of maps and scores, several images at once against one by one
    decisions_changed: int
    onnxruntime: str

    def check(self, model: str, category: str) -> None:
        """Raise ExportError if the file must not be kept."""
        worst = max(self.max_map_difference, self.max_score_difference, self.max_batch_difference)
        if self.decisions_changed or not worst <= self.tolerance:
            raise ExportError(
                f"{model} on {category}: the exported graph differs from the trained model by {worst:.2g} (allowed: "
                f"{self.tolerance:.2g}) and changes {self.decisions_changed} of {self.num_images} decisions; "
                "the file was not kept"
            )


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
    """Milliseconds of single images by part, and images a second in batches."""

    hardware: str
    provider: str
    threads: int
    onnxruntime: str
    num_images: int  # different files
    images: Tried
    num_runs: int
    milliseconds: Milliseconds
    throughput: Throughput

    def metrics(self) -> dict[str, float]:
        """Flat, for MLflow."""
        parts = self.milliseconds.model_dump()
        flat = {f"latency.{part}.{p}": value for part, found in parts.items() for p, value in found.items()}
        return flat | {"latency.images_per_second": self.throughput.images_per_second}
