"""Writes that are either whole or not there, whatever kills the process."""

import contextlib
import ctypes
import errno
import glob
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipelines.errors import BlemishError

if sys.platform != "win32":
    import fcntl

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_RANDOM = 8  # characters that tempfile puts into a name
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


class Busy(BlemishError):
    """Another process is writing the same result."""


class DiskFull(BlemishError):
    """Nothing more can be written; what was there before is untouched."""


@contextlib.contextmanager
def reporting_full_disk(path: Path) -> Iterator[None]:
    """Turn the operating system's "no space left" into one clear line that names `path`."""
    try:
        yield
    except Exception as error:
        refusal = full_disk(error)
        if refusal is None:
            raise
        raise DiskFull(f"{path}: {refusal.strerror}; nothing was kept of it: free some space and run again") from error


def full_disk(error: BaseException | None) -> OSError | None:
    """What the operating system said, which may lie below: torch.save ends in a RuntimeError about positions."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            return error
        error = error.__context__
    return None


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; it takes the name `path` only when the block ends well.

    Raises:
        DiskFull: the disk is full; the temporary file is gone and `path` is what it was.
    """
    with reporting_full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        temporary, handle = _temporary(path)
    try:
        temporary.chmod(0o644)  # mkstemp's 0600 would follow the file into caches and artifact stores
        with reporting_full_disk(path):
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        if handle is not None:
            os.close(handle)


def _temporary(path: Path) -> tuple[Path, int | None]:
    """An empty file beside `path`, and the handle that keeps others from sweeping it away.

    None on Windows, where they do not, and where a file that is open cannot take another name.
    """
    while True:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
        if sys.platform == "win32":
            os.close(handle)
            return Path(name), None
        with contextlib.suppress(OSError):  # some network file systems have no such locks: then nothing is swept either
            _lock(handle)
        if Path(name).exists():
            return Path(name), handle
        os.close(handle)  # swept away before it was locked


def _sweep(path: Path) -> None:
    """Remove what killed processes left of `path`; what a living one writes is locked."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.{'?' * _RANDOM}{glob.escape(path.suffix)}"):
        with contextlib.suppress(OSError), leftover.open("rb") as file:  # another process may sweep as well
            if _lock(file.fileno()):
                leftover.unlink()


def _lock(handle: int) -> bool:
    """Keep other processes from an open file or folder, by the system's lock on it, which ends with this process.

    False if another one has it, and on Windows, which has no such locks.
    """
    if sys.platform != "win32":
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    return False


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder that replaces `path` only when the block ends well.

    One process at a time writes a folder: all that is not yet whole lies beside it, in a folder that is locked. What a
    killed process left there is swept away by the next. On Linux old and new change places in one step; elsewhere a
    process that is killed between two may have moved the old folder there, and the next one puts it back.

    Raises:
        Busy: another process is writing the folder.
        DiskFull: the disk is full; `path` is what it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    place = path.with_name(f".{path.name}.partial")
    new, old = place / "new", place / "old"
    with reporting_full_disk(path), _held(place, path):
        try:
            _put_back(old, path)
            shutil.rmtree(new, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
            new.mkdir()
            yield new
            if not (path.exists() and _exchanged(new, path)):
                if path.exists():
                    path.replace(old)  # deleting takes a while, and a kill in the middle would leave half a folder
                new.replace(path)
        finally:
            _put_back(old, path)
            shutil.rmtree(place, ignore_errors=True)


def _exchanged(one: Path, other: Path) -> bool:
    """Let two folders change places in one step; False where the system or the file system does not offer that."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0


def _put_back(old: Path, path: Path) -> None:
    if old.exists() and not path.exists():
        old.replace(path)


@contextlib.contextmanager
def _held(place: Path, path: Path) -> Iterator[None]:
    """Make the folder and keep it from other processes; on Windows it is not kept from them.

    No file marks the lock: a killed process would leave it behind.
    """
    if sys.platform == "win32":
        place.mkdir(exist_ok=True)
        yield
        return
    while True:
        with contextlib.suppress(FileExistsError):  # `exist_ok` would look at it, when its writer may have finished
            place.mkdir()
        try:
            handle = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue  # its writer has just finished
        if not _lock(handle):
            os.close(handle)
            raise Busy(f"{path}: another process is writing it; wait for it to end, and run again")
        if _is_open_as(handle, place):
            break
        os.close(handle)
    try:
        yield
    finally:
        os.close(handle)


def _is_open_as(handle: int, path: Path) -> bool:
    """Whether the open folder is still the one of that name: between opening and locking, its writer may finish."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[io.BytesIO]:
    """Collect what an encoder writes, and write it when the block ends well.

    Pillow's encoders of JPEG and GIF write to a file by themselves, and take a short write, as on a full disk, for a
    whole one: the picture would be cut off, and nobody told.
    """
    content = io.BytesIO()
    yield content
    path.write_bytes(content.getbuffer())


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_lines(files: Iterable[Path], folder: Path) -> str:
    """Of files in the folder, as `sha256sum` prints them there."""
    return "".join(f"{file_sha256(file)}  {file.relative_to(folder).as_posix()}\n" for file in files)


def write_json(path: Path, value: Any) -> None:
    """Write `value` atomically, keys in the given order; NaN is refused, since other readers do not take it."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
