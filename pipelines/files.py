"""Writes that are either whole or not there, whatever kills the process."""

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.errors import BlemishError

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class DiskFull(BlemishError):
    """Nothing more can be written; what was there before is untouched."""


@contextlib.contextmanager
def reporting_full_disk(path: Path) -> Iterator[None]:
    """Turn the operating system's "no space left" into one clear line that names `path`."""
    try:
        yield
    except Exception as error:
        refusal = _refusal(error)
        if refusal is None:
            raise
        raise DiskFull(f"{path}: {refusal.strerror}; nothing was kept of it: free some space and run again") from error


def _refusal(error: BaseException | None) -> OSError | None:
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
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    temporary.chmod(0o644)  # mkstemp's 0600 would follow the file into caches and artifact stores
    try:
        with reporting_full_disk(path):
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give an empty temporary folder beside `path`; it replaces `path` only when the block ends well.

    The temporary names are fixed, so that what a killed process left behind is swept away by the next one. Two
    processes that write the same folder at once are for the caller to prevent.

    Raises:
        DiskFull: the disk is full; the temporary folder is gone and `path` is what it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    try:
        with reporting_full_disk(path):
            temporary.mkdir()
            yield temporary
            if path.exists():
                path.replace(old)  # deleting takes a while, and a kill in the middle would leave half a folder
            temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` atomically, keys in the given order; NaN is refused, since other readers do not take it."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
