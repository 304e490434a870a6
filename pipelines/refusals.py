"""Why a verb refused what it was to make, kept until it works: one failure must not cost the report of all others."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from pipelines.errors import BlemishError
from pipelines.records import Record


class Refusal(Record):
    """One file's content."""

    verb: str
    reason: str


@contextlib.contextmanager
def kept(path: Path, verb: str) -> Iterator[None]:
    """Write down in `path` why the block failed; what the same verb left there is gone once it has worked."""
    try:
        yield
    except BlemishError as error:
        Refusal(verb=verb, reason=str(error)).save(path)
        raise
    except Exception as error:  # whatever it was, the report says what became of the cell
        Refusal(verb=verb, reason=f"{type(error).__name__}: {error}").save(path)
        raise
    found = read(path)
    if found is not None and found.verb == verb:
        path.unlink()


def read(path: Path) -> Refusal | None:
    """What is kept in `path`; None if there is nothing.

    Raises:
        StageError: the file is damaged.
    """
    return Refusal.load(path, "delete it, and run `dvc repro`") if path.exists() else None
