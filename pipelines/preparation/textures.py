"""Textures: pictures of other surfaces, which synthetic defects are filled with (DiffusionAD).

Zhang et al., "DiffusionAD", TPAMI 2025, takes the Describable Textures Dataset, each picture as a whole.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import RootModel
from rich.console import Console

from anomaly_models.base import Batch
from pipelines.data.arrays import BatchSource
from pipelines.data.photo_sets import PhotoSet, PhotoSetConfig, make_photo_set
from pipelines.preparation.photos import whole_photos


class TextureSets(RootModel[dict[str, PhotoSetConfig]]):
    """The section `textures`, by the model that they are for."""


def make_textures(config: PhotoSetConfig, photos: Path, destination: Path, console: Console) -> int:
    """Decode `photos` into `destination`; gives their number. Raises as `make_photo_set`."""
    return make_photo_set(config, whole_photos([config.image_size]), photos, destination, console, kind="textures")


@dataclass(frozen=True, slots=True)
class WithTextures:
    """A stream of batches, each with as many textures as it has images."""

    parts: BatchSource[Batch]
    textures: PhotoSet

    @property
    def device(self) -> torch.device:
        return self.parts.device

    def training_batch(self, seed: int, step: int, batch_size: int) -> Batch:
        batch = self.parts.training_batch(seed, step, batch_size)
        return replace(batch, texture=self.textures.images(seed, step, len(batch.image)))
