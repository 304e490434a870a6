"""Work on picture after picture by several threads, in order, with bounded memory."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

_AHEAD = 64  # items begun before the first of them is asked for: bounds memory, however many there are


def threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1))


def in_order(work: Callable[[T], R], items: Sequence[T], pool: ThreadPoolExecutor) -> Iterator[R]:
    """What `work` makes of each item, in their order."""
    waiting = deque(pool.submit(work, item) for item in items[:_AHEAD])
    try:
        for item in items[_AHEAD:]:
            yield waiting.popleft().result()
            waiting.append(pool.submit(work, item))
        while waiting:
            yield waiting.popleft().result()
    finally:
        for one in waiting:
            one.cancel()
