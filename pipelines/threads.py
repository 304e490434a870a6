"""Work on picture after picture by several threads, in order, with bounded memory."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

_CHUNK = 64  # items done before the next are started: bounds memory, however many there are


def threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1))


def in_order(work: Callable[[T], R], items: Sequence[T], pool: ThreadPoolExecutor) -> Iterator[R]:
    """What `work` makes of each item, in their order; a chunk of them at a time."""
    for start in range(0, len(items), _CHUNK):
        yield from pool.map(work, items[start : start + _CHUNK])
