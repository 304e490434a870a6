"""Pictures of something else than the part, decoded once for one model, and dealt out beside its training batches.

EfficientAD's penalty images and DiffusionAD's textures are such sets: see `penalty` and `textures`.
"""

import math
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from anomaly_models.common.settings import Sides
from anomaly_models.common.sizes import Size
from pipelines.data.arrays import DEVICE_BYTES, Rows, stream_rows, to_image
from pipelines.errors import StageError
from pipelines.paths import INDEX_FILE
from pipelines.records import Record

Kind = Literal["penalty", "textures"]  # the verb that makes it, and its section of params.yaml
_WHAT: dict[Kind, str] = {"penalty": "penalty images", "textures": "textures"}
_STREAMS: dict[Kind, int] = {"penalty": 1, "textures": 2}  # apart from the part's images, drawn by the same seed


class PhotoSetIndex(Record):
    """What such a folder holds."""

    format: Literal[1]
    image_size: Sides
    sha256: str  # of every photo's bytes, in the order of the rows
    photos: tuple[str, ...]  # relative to the folder of photos, posix


class PhotoSet:
    """The pictures that a verb made for a model, as an endless stream; `folder` is `pretrained/<model>/<kind>`.

    Raises:
        StageError: there are none, or of another size, or they are damaged; the remedy is the verb.
    """

    def __init__(self, folder: Path, image_size: Size, device: torch.device, kind: Kind) -> None:
        model = folder.parent.name
        remedy = f"run `blemish {kind} {model}`"
        if not (folder / INDEX_FILE).is_file():
            raise StageError(f"{folder}: no {_WHAT[kind]}; {remedy}")
        index = PhotoSetIndex.load(folder / INDEX_FILE, remedy)
        if index.image_size != image_size:
            raise StageError(
                f"{folder}: {_WHAT[kind]} of {index.image_size} pixels, but the model's image_size is "
                f"{image_size}; set {kind}.{model}.image_size to it and {remedy}"
            )
        file = folder / f"images_{image_size}.npy"
        self.sha256 = index.sha256
        self._stream = _STREAMS[kind]
        shape = (len(index.photos), *image_size, 3)
        resident = math.prod(shape) <= DEVICE_BYTES
        self._rows = Rows(file, shape, np.uint8, remedy, device, resident)

    def __len__(self) -> int:
        return len(self._rows)

    def images(self, seed: int, step: int, batch_size: int) -> Tensor:
        """(B, 3, H, W) in [0, 1]; a function of (seed, step)."""
        return to_image(self._rows.gather(stream_rows(len(self), (seed, self._stream), step, batch_size)))
