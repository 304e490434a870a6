"""Folders on their way between machines that share no disk, as tars in pieces.

They travel through Ray's object store and not by DVC's remote: prepared arrays have no cache (see dvc.yaml), results
are not yet DVC's, and no worker needs the remote's credentials.
"""

import io
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from filelock import FileLock

from pipelines.files import atomic_file, atomic_folder

PIECE = 32 * 2**20  # bytes
Piece = tuple[str, bytes]  # the path that it is of, and a part of its tar
_ITSELF = "."  # what a path is called in its tar


@dataclass(frozen=True, slots=True)
class Parcel:
    """What a cell needs: `pieces` are references to them in the store, not themselves."""

    name: str  # which no other parcel of a sweep has
    digest: str
    pieces: tuple[Any, ...]


def packed(root: Path, places: Mapping[str, str]) -> Iterator[Piece]:
    """Files and folders by where they are to lie; where they lie is told from `root`. What is not there is left out."""
    for path, source in places.items():
        if (root / source).exists():
            with tempfile.TemporaryFile() as file:
                with tarfile.open(fileobj=file, mode="w", dereference=True) as tar:  # what links lead to
                    tar.add(root / source, _ITSELF)
                file.seek(0)
                while piece := file.read(PIECE):
                    yield path, piece


def unpack(pieces: Iterable[Piece], root: Path) -> None:
    """Put them below `root`, where they are to lie; each path is whole or as it was."""
    for path, of_path in groupby(pieces, key=lambda piece: piece[0]):
        stream = io.BufferedReader(_Joined(piece for _, piece in of_path))
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            _extract(tar, root / path)


def _extract(tar: tarfile.TarFile, place: Path) -> None:
    first = tar.next()
    assert first is not None, "a tar that was packed here"
    if first.isfile():
        content = tar.extractfile(first)
        assert content is not None, "it is a file"
        with atomic_file(place) as temporary, temporary.open("wb") as file:
            shutil.copyfileobj(content, file)
        return
    with atomic_folder(place) as temporary:
        for member in tar:
            tar.extract(member, temporary, filter="data")


def receive(parcel: Parcel, pieces: Iterable[Piece], root: Path) -> None:
    """Unpack a parcel below `root` unless it lies there already: one worker of a machine does it for all."""
    known = root / "work" / "parcels" / parcel.name
    known.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(known.with_name(f"{known.name}.lock")):
        if known.exists() and known.read_text(encoding="utf-8") == parcel.digest:
            return
        known.unlink(missing_ok=True)
        unpack(pieces, root)
        with atomic_file(known) as temporary:
            temporary.write_text(parcel.digest, encoding="utf-8")


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class _Joined(io.RawIOBase):
    """A stream of the pieces, of which no two are in memory."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._rest = pieces, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            self._rest = memoryview(next(self._pieces, b""))
        number = min(len(buffer), len(self._rest))
        buffer[:number] = self._rest[:number]
        self._rest = self._rest[number:]
        return number
