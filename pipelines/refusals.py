"""Why a stage refused what it was to make, kept until it works: one failure must not cost the report of all others.

Only what DVC runs is kept: who calls a verb by hand reads why it fails, and what was made before is still as good.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from pipelines.errors import BlemishError
from pipelines.memory import out_of_memory
from pipelines.records import Record

_OF_DVC = "DVC_STAGE"  # in the environment of every command that DVC runs


class Refusal(Record):
    """One file's content."""

    verb: str
    reason: str

    @property
    def told(self) -> str:
        return f"refused by {self.verb}: {self.reason}"


@contextlib.contextmanager
def kept(path: Path, verb: str) -> Iterator[None]:
    """Write down in `path` why a stage failed; what the same verb left there is gone once it has worked."""
    try:
        yield
    except Exception as error:  # whatever it was, the report says what became of the cell
        if _OF_DVC in os.environ:
            Refusal(verb=verb, reason=reason(error)).save(path)
        raise
    found = read(path)
    if found is not None and found.verb == verb:
        path.unlink()


def reason(error: Exception) -> str:
    """What to say of it: a word of ours stands by itself, any other needs its name."""
    return str(error) if isinstance(error, BlemishError) else out_of_memory(error) or f"{type(error).__name__}: {error}"


def read(path: Path) -> Refusal | None:
    """What is kept in `path`; None if there is nothing.

    Raises:
        StageError: the file is damaged.
    """
    return Refusal.load(path, "delete it, and run `dvc repro`") if path.exists() else None
