"""A set of photos for one model, decoded once."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import PositiveInt
from rich.console import Console

from anomaly_models.common.settings import Settings, Sides
from pipelines.data.photo_sets import Kind, PhotoSetIndex
from pipelines.files import atomic_folder
from pipelines.paths import INDEX_FILE
from pipelines.preparation.photos import Resize, find_photos, write_arrays


class PhotoSetConfig(Settings):
    """An entry of the sections `penalty` and `textures`."""

    image_size: Sides  # that of the model
    limit: PositiveInt  # photos taken at most, evenly from the sorted list


def make_photo_set(
    config: PhotoSetConfig, resize: Resize, photos: Path, destination: Path, console: Console, kind: Kind
) -> int:
    """Decode `photos`, searched to the bottom, into `destination`; gives their number. Same files, same bytes.

    Raises:
        DatasetError: the folder is missing or holds no photo.
        ImageError: photos that cannot be read; the message lists them.
    """
    paths = _evenly(find_photos([photos]), config.limit)
    with atomic_folder(destination) as folder:
        sha256 = write_arrays(paths, resize, [config.image_size], folder, console, kind)
        names = tuple(path.relative_to(photos).as_posix() for path in paths)
        index = PhotoSetIndex(format=1, image_size=config.image_size, sha256=sha256, photos=names)
        index.save(folder / INDEX_FILE)
    return len(paths)


def _evenly(paths: Sequence[Path], limit: int) -> list[Path]:
    """At most `limit` of them, from all parts of the list: folders of photos are often sorted by class."""
    number = min(limit, len(paths))
    return [paths[place * len(paths) // number] for place in range(number)]
