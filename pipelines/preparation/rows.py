"""Arrays that are written row by row: decoded by several threads, in order, with bounded memory."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from numpy.typing import DTypeLike

T = TypeVar("T")
R = TypeVar("R")

_CHUNK = 64  # images decoded before the next are started: bounds memory, however many there are


def threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1))


def in_order(decode: Callable[[T], R], items: Sequence[T], pool: ThreadPoolExecutor) -> Iterator[R]:
    """What `decode` makes of each item, in their order; a chunk of them at a time."""
    for start in range(0, len(items), _CHUNK):
        yield from pool.map(decode, items[start : start + _CHUNK])


@contextlib.contextmanager
def array_file(path: Path, shape: tuple[int, ...], dtype: DTypeLike) -> Iterator[BinaryIO]:
    """Begin a .npy file; its rows follow in order.

    Written as a plain stream: a full disk raises, where a memory map would kill the process.
    """
    with path.open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        yield file
