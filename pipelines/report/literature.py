"""Published results on MVTec AD, each with its source and with what keeps it from being compared with ours."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipelines.evaluation.certainty import AVERAGE
from pipelines.sources.catalogue import MVTEC_AD_COUNTS

_TEXTURES = ("carpet", "grid", "leather", "tile", "wood")
# The field's order: five textures, then ten objects
MVTEC_AD_ORDER = (*_TEXTURES, *(category for category in MVTEC_AD_COUNTS if category not in _TEXTURES))
_FILE = Path(__file__).with_suffix(".yaml")


@dataclass(frozen=True, slots=True)
class Published:
    """One method's figures as somebody published them, in percent."""

    method: str
    model: str | None  # ours of the same method
    source: str
    notes: tuple[str, ...]
    metrics: Mapping[str, Mapping[str, float]]  # metric -> "average" (over all 15 categories) or category -> percent

    def average(self, metric: str, categories: Sequence[str]) -> float | None:
        """As published if these are all categories; over these alone if not, where each of them is known."""
        found = self.metrics[metric]
        if set(categories) == set(MVTEC_AD_ORDER):
            return found[AVERAGE]
        known = [found[category] for category in categories if category in found]
        return sum(known) / len(known) if len(known) == len(categories) else None


def load_published() -> tuple[Published, ...]:
    entries: list[dict[str, Any]] = yaml.safe_load(_FILE.read_text(encoding="utf-8"))
    return tuple(Published(**{**entry, "notes": tuple(entry["notes"])}) for entry in entries)


def is_mvtec_ad(good_training_images: Mapping[str, int]) -> bool:
    """Whether these categories, with as many good training images each, are those of MVTec AD.

    A folder of one's own may well have a category called `bottle`; it will not have 209 images in it.
    """
    return bool(good_training_images) and all(
        category in MVTEC_AD_COUNTS and MVTEC_AD_COUNTS[category].train_good == number
        for category, number in good_training_images.items()
    )
