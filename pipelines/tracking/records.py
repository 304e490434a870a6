"""Runs of a tracking store as plain data."""

from collections.abc import Mapping
from dataclasses import dataclass

SEED = "train.seed"  # the setting in which two trainings of the same cell may differ
TRAIN_SECONDS = "train_seconds"  # the metric of how long a training took, however often it was killed


@dataclass(frozen=True, slots=True)
class CellRun:
    """One training of a model on a category that has been evaluated."""

    run_id: str
    model: str
    category: str
    started: int  # milliseconds since 1970
    settings: Mapping[str, str]  # flat, as logged: the model's, the seed, the data's hashes
    metrics: Mapping[str, float]
    tags: Mapping[str, str]

    @property
    def seed(self) -> int | None:
        found = self.settings.get(SEED)
        return int(found) if found is not None else None

    @property
    def cell(self) -> tuple[str, str]:
        return self.model, self.category
