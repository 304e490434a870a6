"""What every call pays before it begins: `--help`."""

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.rows import Contender, Figures, Loaded, Row


def make(_folder: Path) -> None:
    """Nothing."""


def helped(program: str) -> Loaded:
    command = [str(Path(sys.executable).with_name(program)), "--help"]

    def act() -> None:
        subprocess.run(command, check=True, capture_output=True)

    return Loaded({}, act)


def verbs(_folder: Path) -> Loaded:
    import typer

    from cli import app

    names = sorted(typer.main.get_group(app).commands)

    def act() -> Figures:
        spent = {}
        for name in names:
            before = os.times()
            subprocess.run(
                [str(Path(sys.executable).with_name("blemish")), name, "--help"], check=True, capture_output=True
            )
            after = os.times()
            spent[name] = after.children_user + after.children_system - before.children_user - before.children_system
        return Figures({"seconds of processors for the slowest verb": max(spent.values())})

    return Loaded({}, act)


ROW = Row(
    title="start-up: `--help`",
    contenders={
        "blemish": Contender(lambda _folder: helped("blemish")),
        "anomalib": Contender(lambda _folder: helped("anomalib"), is_peer=True),
    },
    equal="nothing but the question",
    target={},
    make=make,
)

VERBS = Row(
    title="start-up: `--help` of every verb, one after the other",
    contenders={"blemish": Contender(verbs)},
    equal="nothing to compare with",
    target={},
    make=make,
    once=True,
    at_most={"seconds of processors for the slowest verb": 0.5},
    missed="Python's start is a tenth of it; the rest is typer's imports, of pydantic and rich most of all, and its "
    "drawing of the options' table. On another machine the slowest took 0.26 s.",
)
