"""Progress bars, drawn only where someone watches: in a log or a pipe they would be noise."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn, track

T = TypeVar("T")


def progress_bar(console: Console, *amounts: ProgressColumn) -> Progress:
    """A description, a bar, `amounts`, and the time left."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *amounts,
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


@contextmanager
def counting(console: Console, description: str, *amounts: ProgressColumn) -> Iterator[Callable[[int, int], None]]:
    """Show how much is done; gives the function to call with (done, total)."""
    with progress_bar(console, *amounts) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def watched(items: Iterable[T], console: Console, description: str) -> Iterable[T]:
    """The items, one by one, with a bar."""
    return track(items, description, console=console, disable=not console.is_terminal)
