"""What `bench.py` measures: a module for each row of its table, which has a `ROW`.

A contender's `load` is called in a process of its own, by the Python that has what it imports, so that nothing but the
standard library and numpy is imported at the top of these modules.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

NAMES = (
    "metrics",
    "epoch",
    "fapm_fit",
    "fapm_fit.SEARCH",
    "fapm_predict",
    "fapm_predict.SEARCH",
    "efficient_ad_step",
    "efficient_ad_exported",
    "start_up",
)


class Loaded(NamedTuple):
    """A contender that is ready."""

    results: Mapping[str, Any]  # what must be equal on all sides: numbers, or nested lists of them
    act: Callable[[], object]  # what is timed


@dataclass(frozen=True)
class Contender:
    load: Callable[[Path], Loaded]  # given the folder that the row's `make` has filled
    is_peer: bool = False  # whether it needs the environment of what people use


@dataclass(frozen=True)
class Row:
    title: str
    contenders: Mapping[str, Contender]  # ours first; each other one is compared with it
    equal: str  # what all sides have in common
    target: Mapping[str, float]  # how many times faster ours is to be than these
    make: Callable[[Path], None]  # write what all sides read, in our environment; not called again on what is there
    tolerance: Mapping[str, float] = field(default_factory=dict)  # by result, absolute
    missed: str = ""  # why a target is not reached, where it is not


def row(name: str) -> Row:
    """Of `NAMES`: a module, and which of its rows if it has several."""
    module, _, attribute = name.partition(".")
    found = getattr(importlib.import_module(f"benchmarks.rows.{module}"), attribute or "ROW")
    assert isinstance(found, Row)
    return found


def differences(row: Row, results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The largest difference of each result between ours and any other that has it.

    Raises:
        ValueError: one is beyond its tolerance.
    """
    ours, *others = results.values()
    found = {}
    for name, allowed in row.tolerance.items():
        apart = [np.abs(np.asarray(ours[name]) - np.asarray(other[name])).max() for other in others if name in other]
        found[name] = float(np.max(apart))  # NaN, if any is
        if not found[name] <= allowed:
            raise ValueError(f"{row.title}: {name} differs by {found[name]:.2g}, where {allowed:.2g} is allowed")
    return found
