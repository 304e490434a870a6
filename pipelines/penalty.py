"""Penalty images: what a student must not describe as its teacher does, since it is not the part (EfficientAD).

Batzner et al., WACV 2024, Algorithm 1, lines 9 to 11, takes them from ImageNet; any folder of everyday photos will do.
A photo is resized to twice the image size and its centre cut out: the model sees the middle at the scale at which a
part is seen. The photos keep their colour here; the model makes three in ten grey at random.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, PositiveInt, RootModel
from rich.console import Console
from torch import Tensor

from anomaly_models.base import Batch
from pipelines import images
from pipelines.arrays import DEVICE_BYTES, BatchSource, Rows, stream_rows, to_image
from pipelines.errors import StageError
from pipelines.files import atomic_folder, read_json, write_json
from pipelines.photos import INDEX_FILE, find_photos, write_arrays

FORMAT = 1  # of a penalty folder; raised when what is written changes
_STREAM = 1  # apart from the part's images, which are drawn by the same seed


class PenaltyConfig(BaseModel):
    """An entry of the section `penalty`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    image_size: PositiveInt  # that of the model
    limit: PositiveInt  # photos taken at most, evenly from the sorted list


class Penalties(RootModel[dict[str, PenaltyConfig]]):
    """The section `penalty`, by the model that the images are for."""


def make_penalty(config: PenaltyConfig, photos: Path, destination: Path, console: Console) -> int:
    """Decode `photos`, searched to the bottom, into `destination`; gives their number. Same files, same bytes.

    Raises:
        DatasetError: the folder is missing or holds no photo.
        ImageError: photos that cannot be read; the message lists them.
    """
    paths = _evenly(find_photos([photos]), config.limit)
    size = config.image_size
    with atomic_folder(destination) as folder:
        sha256 = write_arrays(paths, lambda photo: {size: _centre(photo, size)}, [size], folder, console, "penalty")
        index = {
            "format": FORMAT,
            "image_size": size,
            "sha256": sha256,
            "photos": [path.relative_to(photos).as_posix() for path in paths],
        }
        write_json(folder / INDEX_FILE, index)
    return len(paths)


def _evenly(paths: Sequence[Path], limit: int) -> list[Path]:
    """At most `limit` of them, from all parts of the list: folders of photos are often sorted by class."""
    number = min(limit, len(paths))
    return [paths[place * len(paths) // number] for place in range(number)]


def _centre(photo: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    border = size // 2
    return images.resize_rgb(photo, 2 * size)[border : border + size, border : border + size]


class PenaltyImages:
    """The images that `penalty` made, as an endless stream.

    Raises:
        StageError: there are none, or of another size; the remedy is the verb.
    """

    def __init__(self, folder: Path, image_size: int, device: torch.device) -> None:
        remedy = f"run `blemish penalty {folder.parent.name}`"
        if not (folder / INDEX_FILE).is_file():
            raise StageError(f"{folder}: no penalty images; {remedy}")
        index: dict[str, Any] = read_json(folder / INDEX_FILE)
        if index["format"] != FORMAT:
            raise StageError(f"{folder}: made in format {index['format']}, this version reads {FORMAT}; {remedy}")
        if index["image_size"] != image_size:
            raise StageError(
                f"{folder}: penalty images of {index['image_size']} pixels, but the model's image_size is "
                f"{image_size}; set penalty.{folder.parent.name}.image_size to it and {remedy}"
            )
        file = folder / f"images_{image_size}.npy"
        self.sha256: str = index["sha256"]
        self._rows = Rows(file, device, resident=file.stat().st_size <= DEVICE_BYTES)

    def __len__(self) -> int:
        return len(self._rows)

    def images(self, seed: int, step: int, batch_size: int) -> Tensor:
        """(B, 3, H, W) in [0, 1]; a function of (seed, step)."""
        return to_image(self._rows.gather(stream_rows(len(self), (seed, _STREAM), step, batch_size)))


@dataclass(frozen=True, slots=True)
class WithPenalty:
    """A stream of batches, each with as many penalty images as it has images."""

    parts: BatchSource[Batch]
    penalty: PenaltyImages

    @property
    def device(self) -> torch.device:
        return self.parts.device

    def training_batch(self, seed: int, step: int, batch_size: int) -> Batch:
        batch = self.parts.training_batch(seed, step, batch_size)
        return replace(batch, penalty=self.penalty.images(seed, step, batch_size))
