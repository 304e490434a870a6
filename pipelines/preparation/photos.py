"""Any folder of photos -> uint8 arrays of one size, decoded once: for distillation, pretraining and penalty images."""

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import MofNCompleteColumn

from anomaly_models.common.sizes import Size
from pipelines.errors import DatasetError, ImageError, told
from pipelines.files import atomic_folder, read_json, write_json
from pipelines.paths import INDEX_FILE
from pipelines.pictures import images
from pipelines.pictures.reading import Reading
from pipelines.preparation.rows import array_file
from pipelines.progress import counting
from pipelines.threads import in_order, threads

FORMAT = 1  # of a folder of arrays; raised when what is written changes

# Photos with 16 bits use all of them.
_PHOTO = Reading(
    black_level=0, white_level=65535, above_white="refuse", page=None, dicom_window="file", max_megapixels=None
)

Resize = Callable[[NDArray[np.uint8], Size], NDArray[np.uint8]]  # (H, W, 3), resized to that size


@dataclass(frozen=True, slots=True)
class PhotoArrays:
    """A folder with `images_<size>.npy`, (N, height, width, 3) uint8, one for each size that was asked for."""

    folder: Path
    num_photos: int
    sha256: str  # of every photo's bytes, in the order of the rows

    def file(self, size: Size) -> Path:
        return self.folder / f"images_{size}.npy"

    def shape(self, size: Size) -> tuple[int, int, int, int]:
        return (self.num_photos, *size, 3)

    @property
    def remedy(self) -> str:
        """For whoever finds a file damaged."""
        return f"delete {self.folder} and run again"


def find_photos(folders: Sequence[Path]) -> list[Path]:
    """The images in `folders`, searched to the bottom; in the order of the folders, sorted within each.

    Raises:
        DatasetError: one of the folders is missing, or holds no image.
    """
    found = []
    for folder in folders:
        if not folder.is_dir():
            raise DatasetError(f"{folder}: no such folder of photos; make it, or correct the path")
        paths = [
            path
            for path in folder.rglob("*")
            if path.suffix.lower() in images.SUFFIXES and not _is_hidden(path.relative_to(folder)) and path.is_file()
        ]
        if not paths:
            kinds = ", ".join(sorted(images.SUFFIXES))
            raise DatasetError(f"{folder}: holds no photos, at any depth; put images there ({kinds})")
        found += sorted(paths)
    return found


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith(".") or images.is_litter(part) for part in relative.parts)


def decode_once(
    folders: Sequence[Path], sizes: Sequence[Size], destination: Path, console: Console, label: str
) -> PhotoArrays:
    """The photos of `folders`, each as a whole at every size, in `destination`; decoded only if they are not there.

    What is there is taken if the same files, by path, length and time of change, were decoded to the same sizes.

    Raises:
        DatasetError: a folder is missing or holds no photo.
        ImageError: photos that cannot be read; the message lists them.
    """
    paths = find_photos(folders)
    listing = {
        "format": FORMAT,
        "sizes": [str(size) for size in sizes],
        "photos": [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in paths],
    }
    index_file = destination / INDEX_FILE
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # not there, or damaged: decoded anew
        index = dict(read_json(index_file))
        if listing.items() <= index.items():
            return PhotoArrays(destination, len(paths), str(index["sha256"]))
    with atomic_folder(destination) as folder:
        sha256 = write_arrays(paths, whole, sizes, folder, console, label)
        write_json(folder / INDEX_FILE, listing | {"sha256": sha256})
    return PhotoArrays(destination, len(paths), sha256)


def whole(photo: NDArray[np.uint8], size: Size) -> NDArray[np.uint8]:
    """The whole photo at the size."""
    return images.resize_rgb(photo, size, "bilinear")


def write_arrays(
    paths: Sequence[Path], resize: Resize, sizes: Sequence[Size], folder: Path, console: Console, label: str
) -> str:
    """Decode `paths` into `folder/images_<size>.npy`, row by row; gives the SHA-256 over the photos' bytes.

    Raises:
        ImageError: photos that cannot be read; the message lists them.
    """
    digest = hashlib.sha256()
    problems: list[ImageError] = []
    with contextlib.ExitStack() as stack:
        files = [
            stack.enter_context(array_file(folder / f"images_{size}.npy", (len(paths), *size, 3), np.uint8))
            for size in sizes
        ]
        pool = stack.enter_context(threads())
        show = stack.enter_context(counting(console, label, MofNCompleteColumn()))
        decoding = in_order(lambda path: _decode(path, resize, sizes), paths, pool)
        for done, decoded in enumerate(decoding, start=1):
            if isinstance(decoded, ImageError):
                problems.append(decoded)
            else:
                photo_digest, resized = decoded
                digest.update(photo_digest)
                for file, pixels in zip(files, resized, strict=True):
                    file.write(pixels.tobytes())
            show(done, len(paths))
    if problems:
        raise ImageError(told(problems, f"{len(problems)} photos cannot be read:"))
    return digest.hexdigest()


def _decode(path: Path, resize: Resize, sizes: Sequence[Size]) -> tuple[bytes, list[NDArray[np.uint8]]] | ImageError:
    try:
        photo = images.load_rgb(path, _PHOTO)
    except ImageError as error:
        return error
    return hashlib.sha256(path.read_bytes()).digest(), [resize(photo, size) for size in sizes]
