"""Any folder of photos -> square uint8 arrays, decoded once: for distillation, pretraining and penalty images."""

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import MofNCompleteColumn

from pipelines.errors import DatasetError, ImageError
from pipelines.files import atomic_folder, read_json, write_json
from pipelines.paths import INDEX_FILE
from pipelines.pictures import images
from pipelines.progress import progress_bar

FORMAT = 1  # of a folder of arrays; raised when what is written changes

_WHITE_LEVEL = 65535  # photos with 16 bits use all of them
_CHUNK = 64  # photos decoded before the next are started: bounds memory, whatever the size of the folder
_PROBLEMS_SHOWN = 10

Resize = Callable[[NDArray[np.uint8]], dict[int, NDArray[np.uint8]]]  # (H, W, 3) -> (S, S, 3) by side S


@dataclass(frozen=True, slots=True)
class PhotoArrays:
    """A folder with `images_<size>.npy`, (N, size, size, 3) uint8, one for each size that was asked for."""

    folder: Path
    num_photos: int
    sha256: str  # of every photo's bytes, in the order of the rows

    def file(self, size: int) -> Path:
        return self.folder / f"images_{size}.npy"


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
    return any(part.startswith(".") for part in relative.parts)


def whole_photos(sizes: Sequence[int]) -> Resize:
    """Each photo as a whole at every size; the aspect ratio is not kept."""
    return lambda photo: {size: images.resize_rgb(photo, size) for size in sizes}


def decode_once(
    folders: Sequence[Path], sizes: Sequence[int], destination: Path, console: Console, label: str
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
        "sizes": list(sizes),
        "photos": [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in paths],
    }
    index_file = destination / INDEX_FILE
    if index_file.is_file():
        index = read_json(index_file)
        if listing.items() <= index.items():
            return PhotoArrays(destination, len(paths), index["sha256"])
    with atomic_folder(destination) as folder:
        sha256 = write_arrays(paths, whole_photos(sizes), sizes, folder, console, label)
        write_json(folder / INDEX_FILE, listing | {"sha256": sha256})
    return PhotoArrays(destination, len(paths), sha256)


def write_arrays(
    paths: Sequence[Path], resize: Resize, sizes: Sequence[int], folder: Path, console: Console, label: str
) -> str:
    """Decode `paths` into `folder/images_<size>.npy`, row by row; gives the SHA-256 over the photos' bytes.

    Raises:
        ImageError: photos that cannot be read; the message lists them.
    """
    arrays = {
        size: np.lib.format.open_memmap(
            folder / f"images_{size}.npy", mode="w+", dtype=np.uint8, shape=(len(paths), size, size, 3)
        )
        for size in sizes
    }
    digest = hashlib.sha256()
    problems: list[str] = []
    workers = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool, progress_bar(console, MofNCompleteColumn()) as bar:
        task = bar.add_task(label, total=len(paths))
        for start in range(0, len(paths), _CHUNK):
            chunk = paths[start : start + _CHUNK]
            for row, decoded in enumerate(pool.map(lambda path: _decode(path, resize), chunk), start):
                if isinstance(decoded, ImageError):
                    problems.append(str(decoded))
                    continue
                photo_digest, resized = decoded
                digest.update(photo_digest)
                for size, pixels in resized.items():
                    arrays[size][row] = pixels
            bar.update(task, completed=start + len(chunk))
    for array in arrays.values():
        array.flush()
    _raise_problems(problems)
    return digest.hexdigest()


def _decode(path: Path, resize: Resize) -> tuple[bytes, dict[int, NDArray[np.uint8]]] | ImageError:
    try:
        photo = images.load_rgb(path, _WHITE_LEVEL)
    except ImageError as error:
        return error
    return hashlib.sha256(path.read_bytes()).digest(), resize(photo)


def _raise_problems(problems: list[str]) -> None:
    if not problems:
        return
    if len(problems) == 1:
        raise ImageError(problems[0])
    lines = [f"{len(problems)} photos cannot be read:", *(f"  - {line}" for line in problems[:_PROBLEMS_SHOWN])]
    if len(problems) > _PROBLEMS_SHOWN:
        lines.append(f"  and {len(problems) - _PROBLEMS_SHOWN} more")
    raise ImageError("\n".join(lines))
