"""Work on picture after picture by several threads, in order, with bounded memory."""

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

_AHEAD = 64  # items begun before the first of them is asked for: bounds memory, however many there are


@contextlib.contextmanager
def threads(most: int = 8) -> Iterator[ThreadPoolExecutor]:
    """As many as there are cores, up to so many; what they have not begun when the block ends is not done."""
    pool = ThreadPoolExecutor(min(8, most, os.cpu_count() or 1))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def in_order(work: Callable[[T], R], items: Sequence[T], pool: ThreadPoolExecutor) -> Iterator[R]:
    """What `work` makes of each item, in their order; raises what it raises."""
    waiting = deque(pool.submit(work, item) for item in items[:_AHEAD])
    for item in items[_AHEAD:]:
        yield waiting.popleft().result()
        waiting.append(pool.submit(work, item))
    while waiting:
        yield waiting.popleft().result()
