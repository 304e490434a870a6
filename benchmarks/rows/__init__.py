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
    "streaming",
    "epoch",
    "preparation",
    "fapm_fit",
    "fapm_fit.SEARCH",
    "fapm_predict",
    "fapm_predict.SEARCH",
    "efficient_ad_step",
    "efficient_ad_exported",
    "efficient_ad_exported.INT8",
    "steps.ADFA",
    "steps.BGAD",
    "steps.DIFFUSION_AD",
    "exported.ADFA",
    "exported.BGAD",
    "exported.DIFFUSION_AD",
    "evaluation",
    "start_up",
    "start_up.VERBS",
    "nothing_to_do",
    "demo",
    "disk",
)


class Figures(dict[str, float]):
    """What a turn has to say of itself beside its time, by words that say what and in which unit."""


class Loaded(NamedTuple):
    """A contender that is ready."""

    results: Mapping[str, Any]  # what must be equal on all sides: numbers, or nested lists of them
    act: Callable[[], object]  # what is timed; may give Figures


@dataclass(frozen=True)
class Contender:
    load: Callable[[Path], Loaded]  # given the folder that the row's `make` has filled
    is_peer: bool = False  # whether it needs the environment of what people use
    is_earlier: bool = False  # whether it is this project at the commit that its speed is compared with
    needs: str = ""  # a processor's flag, as Linux calls it; it is left out where there is none


@dataclass(frozen=True)
class Row:
    title: str
    contenders: Mapping[str, Contender]  # ours first; each other one, if any, is compared with it
    equal: str  # what all sides have in common
    target: Mapping[str, float]  # how many times faster ours is to be than these
    make: Callable[[Path], None]  # write what all sides read, in our environment; not called again on what is there
    tolerance: Mapping[str, float] = field(default_factory=dict)  # by result, absolute
    at_most: Mapping[str, float] = field(default_factory=dict)  # by figure of our side: "wall", or one of its Figures
    warmed: bool = True  # whether a turn that does not count comes first: not where loading has done the work, too
    once: bool = False  # one turn and none before it: it takes long, and is compared with nothing
    brief: str = ""  # what the README calls it, if it tells how it compares with the fastest of the others
    missed: str = ""  # why a target or limit is not reached, where it is not


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
