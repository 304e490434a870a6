"""Files whose bytes are not what they should be, refused in one line that says what to do."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from pipelines.errors import BlemishError, StageError
from pipelines.memory import out_of_memory

_LONGEST_REASON = 200  # characters


@contextlib.contextmanager
def reading(path: Path, remedy: str) -> Iterator[None]:
    """Raise StageError, in one line, whatever the bytes of `path` make fail within."""
    try:
        yield
    except BlemishError:
        raise
    except Exception as error:  # damaged bytes make numpy, torch and safetensors fail in any way there is
        if out_of_memory(error):
            raise
        raise refusal(path, error, remedy) from None


def refusal(path: Path, error: Exception, remedy: str) -> StageError:
    """Why a file cannot be read, in one line."""
    if isinstance(error, FileNotFoundError):
        return StageError(f"{path}: not there; {remedy}")
    if isinstance(error, OSError) and error.strerror:
        return StageError(f"{path}: {error.strerror}; {remedy}")
    return StageError(f"{path}: damaged, or by another version of Blemish ({in_short(error)}); {remedy}")


def in_short(error: Exception) -> str:
    """What it says, on one line that is not too long."""
    pydantic = sys.modules.get("pydantic")  # which a machine on the line need not have
    if pydantic is not None and isinstance(error, pydantic.ValidationError):
        first = error.errors(include_url=False)[0]
        return f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}"
    return " ".join(str(error).split())[:_LONGEST_REASON] or type(error).__name__
