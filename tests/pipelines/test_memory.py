import errno

import pytest

from pipelines.errors import StageError
from pipelines.memory import out_of_memory


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "MemoryError"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "[Errno 12] Cannot allocate memory"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
            "[enforce fail] Def",
        ),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
            "CUDA out of memory. Tried to allocate 2.00 GiB",
        ),
        (ImportError("_agg.so: failed to map segment from shared object"), "_agg.so: failed to map segment"),
    ],
)
def test_each_librarys_words_are_known(error: Exception, said: str) -> None:
    told = out_of_memory(error)
    assert told is not None
    assert told.startswith(f"the memory ran out ({said}")
    assert told.endswith("and run again: what was finished is kept")


def test_what_comes_of_it_is_known_by_its_cause() -> None:
    error = RuntimeError("step 3 of 5 failed")
    error.__cause__ = MemoryError()
    told = out_of_memory(error)
    assert told is not None
    assert "(MemoryError)" in told
    error.__cause__, error.__context__ = KeyError("a"), MemoryError()
    error.__context__.__context__ = error  # a library that raises anew what it caught
    assert out_of_memory(error) == told


def test_other_errors_are_none_of_it() -> None:
    assert out_of_memory(ValueError("3 is not 4")) is None
    assert out_of_memory(OSError(errno.ENOENT, "No such file or directory")) is None
    assert out_of_memory(StageError("models/x: not there")) is None
