"""Textures: pictures of other surfaces, which synthetic defects are filled with (DiffusionAD).

Zhang et al., "DiffusionAD", TPAMI 2025, takes the Describable Textures Dataset, each picture as a whole.
"""

from pathlib import Path

from pydantic import RootModel
from rich.console import Console

from pipelines.preparation.photo_sets import PhotoSetConfig, make_photo_set
from pipelines.preparation.photos import whole


class TextureSets(RootModel[dict[str, PhotoSetConfig]]):
    """The section `textures`, by the model that they are for."""


def make_textures(config: PhotoSetConfig, photos: Path, destination: Path, console: Console) -> int:
    """Decode `photos` into `destination`; gives their number. Raises as `make_photo_set`."""
    return make_photo_set(config, whole, photos, destination, console, kind="textures")
