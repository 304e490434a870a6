"""Progress bars, drawn only where someone watches: in a log or a pipe they would be noise."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress


@contextmanager
def counting(console: Console, description: str) -> Iterator[Callable[[int, int], None]]:
    """Show "done of total" and the time left; gives the function to call with (done, total)."""
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
