"""What a sweep shows while it runs: a table that changes where someone watches, lines elsewhere."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipelines.numbers import UNKNOWN
from pipelines.settings.params import Resources


@dataclass(slots=True)
class _Row:
    """A model's cells."""

    wants: Resources
    total: int = 0
    done: int = 0
    failed: int = 0
    lost: int = 0  # workers or machines, with a cell
    seconds: float = 0.0  # of those done

    @property
    def left(self) -> int:
        return self.total - self.done - self.failed


@dataclass(slots=True)
class Board:
    """Counts by model, how much is in use, and how long it will take."""

    console: Console
    has: Mapping[str, float]  # what all machines have together, as Ray calls it
    in_use: Callable[[], str]  # in words
    rows: dict[str, _Row] = field(default_factory=dict)
    _started: float = field(default_factory=time.monotonic)
    _live: Live | None = None

    def expect(self, model: str, wants: Resources) -> None:
        self.rows.setdefault(model, _Row(wants)).total += 1

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live = Live(console=self.console, get_renderable=self._shown, refresh_per_second=1)
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.__exit__(kind, error, trace)

    def done(self, model: str, seconds: float, told: str) -> None:
        row = self.rows[model]
        row.done += 1
        row.seconds += seconds
        self._say(f"{told}; {self.time_left()}")

    def failed(self, model: str, told: str) -> None:
        self.rows[model].failed += 1
        self._say(told)

    def lost(self, model: str, told: str) -> None:
        self.rows[model].lost += 1
        self.console.print(told, highlight=False, markup=False, soft_wrap=True)

    def _say(self, told: str) -> None:
        ended = sum(row.done + row.failed for row in self.rows.values())
        total = sum(row.total for row in self.rows.values())
        self.console.print(f"{ended} of {total}: {told}", highlight=False, markup=False, soft_wrap=True)

    def time_left(self) -> str:
        """As the cells of a model took that are done, on average; those of a model without one, as all did."""
        done = sum(row.done for row in self.rows.values())
        if not done:
            return "time left unknown"
        mean = sum(row.seconds for row in self.rows.values()) / done
        needs = dict.fromkeys(self.has, 0.0)  # of each thing, times seconds
        for row in self.rows.values():
            seconds = row.left * (row.seconds / row.done if row.done else mean)
            for name, amount in demands(row.wants).items():
                needs[name] = needs.get(name, 0.0) + seconds * amount
        left = max((need / self.has[name] for name, need in needs.items() if self.has.get(name)), default=0.0)
        return f"about {left / 60:.0f} min left" if left >= 90 else f"about {left:.0f} s left"

    def _shown(self) -> Group:
        table = Table()
        for name in ("model", "done", "left", "failed", "workers lost", "s per cell"):
            table.add_column(name, justify="left" if name == "model" else "right")
        for model, row in self.rows.items():
            counts = (row.done, row.left, row.failed, row.lost)
            table.add_row(model, *map(str, counts), f"{row.seconds / row.done:.0f}" if row.done else UNKNOWN)
        return Group(table, Text(f"{self.in_use()}; {self.time_left()}"))


def demands(wants: Resources) -> dict[str, float]:
    """By Ray's names; memory in bytes."""
    found = {"CPU": wants.num_cpus, "GPU": wants.num_gpus, "memory": wants.memory * 2**30}
    return {name: amount for name, amount in found.items() if amount}
