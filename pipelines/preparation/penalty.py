"""Penalty images: what a student must not describe as its teacher does, since it is not the part (EfficientAD).

Batzner et al., WACV 2024, Algorithm 1, lines 9 to 11, takes them from ImageNet; any folder of everyday photos will do.
A photo is resized to twice the image size and its centre cut out: the model sees the middle at the scale at which a
part is seen. The photos keep their colour here; the model makes three in ten grey at random.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import RootModel
from rich.console import Console

from anomaly_models.common.sizes import Size
from pipelines.pictures import images
from pipelines.preparation.photo_sets import PhotoSetConfig, make_photo_set


class Penalties(RootModel[dict[str, PhotoSetConfig]]):
    """The section `penalty`, by the model that the images are for."""


def make_penalty(config: PhotoSetConfig, photos: Path, destination: Path, console: Console) -> int:
    """Decode the centres of `photos` into `destination`; gives their number. Raises as `make_photo_set`."""
    return make_photo_set(config, _centre, photos, destination, console, kind="penalty")


def _centre(photo: NDArray[np.uint8], size: Size) -> NDArray[np.uint8]:
    height, width = size
    top, left = size.divided(2)
    return images.resize_rgb(photo, Size(2 * height, 2 * width), "bilinear")[top : top + height, left : left + width]
