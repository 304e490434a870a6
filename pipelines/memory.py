"""Whether an error means that the memory ran out: each library says so in its own class and words."""

import errno
from collections.abc import Iterator

_SAID = (
    "bad_alloc",
    "can't allocate memory",
    "cannot allocate memory",
    "failed to allocate memory",
    "can't start new thread",
    "could not create a primitive",  # oneDNN, for its scratchpad
    "failed to map segment from shared object",
    "failed to serialize proto",
    "out of memory",
    "unable to allocate",
)


def out_of_memory(error: BaseException) -> str | None:
    """One line for the user, if this error or one that it comes of is that of an allocation; else None."""
    for cause in _causes(error):
        if _is_of_memory(cause):
            said = " ".join(str(cause).split())[:200] or type(cause).__name__
            return (
                f"the memory ran out ({said}); close other programs, or set a smaller `batch_size` or `image_size` of "
                "the model, and run again: what was finished is kept"
            )
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and all that it comes of, each once: what was raised, and what was being handled then."""
    waiting, seen = [error], set[int]()
    while waiting:
        cause = waiting.pop(0)
        if id(cause) not in seen:
            seen.add(id(cause))
            yield cause
            waiting += [other for other in (cause.__cause__, cause.__context__) if other is not None]


def _is_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    text = str(error).lower()
    return isinstance(error, Exception) and any(said in text for said in _SAID)
