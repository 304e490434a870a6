"""Runs of a tracking store as plain data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
SEED = "train.seed"  # the setting in which two trainings of the same cell may differ
MAX_TEXT = 5000  # characters that every store accepts in a tag
TRAIN_SECONDS = "train_seconds"  # the metric of how long a training took, however often it was killed

_SECTIONS = ("models", "distill", "inputs", "prepare", "train", "data")  # of a run's settings
_OF_METHODS = ("models", "distill")  # whose next part is the name of a method


def common_name(name: str) -> str | None:
    """What a setting is called whatever the method; None where it has that name already, or can have no other.

    `image_size` for `models.fapm.image_size`, and `seed` for a training's.
    """
    if name == SEED:
        return "seed"
    section, _, rest = name.partition(".")
    common = rest.partition(".")[2]
    if section not in _OF_METHODS or not common or common.partition(".")[0] in _SECTIONS:
        return None
    return common


def common_settings(settings: Mapping[str, T]) -> dict[str, T]:
    """The settings that can have a common name, under it."""
    found = {common_name(name): value for name, value in settings.items()}
    return {name: value for name, value in found.items() if name is not None}


def as_texts(values: Mapping[str, Any]) -> dict[str, str]:
    """As settings and tags are logged: under dotted names, and no longer than any store takes."""
    return {name: str(value)[:MAX_TEXT] for name, value in flatten(values).items()}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


@dataclass(frozen=True, slots=True)
class CellRun:
    """One training of a model on a category that has been evaluated."""

    run_id: str
    model: str
    category: str
    started: int  # milliseconds since 1970
    settings: Mapping[str, str]  # flat, under their full names: the model's, the seed, the data's hashes
    metrics: Mapping[str, float]
    tags: Mapping[str, str]

    @property
    def seed(self) -> int | None:
        found = self.settings.get(SEED)
        return int(found) if found is not None else None

    @property
    def cell(self) -> tuple[str, str]:
        return self.model, self.category
