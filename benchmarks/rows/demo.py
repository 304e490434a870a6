"""The demo from `blemish init` to its report, cell beside cell."""

import shutil
from pathlib import Path

from benchmarks.rows import Contender, Loaded, Row
from benchmarks.rows.project import begin, blemish


def make(_folder: Path) -> None:
    """Nothing: it draws its own pictures."""


def run(folder: Path) -> Loaded:
    root = folder / "project"

    def act() -> None:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        begin(root)
        blemish(root, "run")

    return Loaded({}, act)


ROW = Row(
    title="the demo, warm: five models, two categories, two processes at once",
    contenders={"demo": Contender(run)},
    equal="nothing to compare with",
    target={},
    make=make,
    at_most={"wall": 480},
    once=True,
    missed="Half of it is DiffusionAD, whose steps were not made faster; in another run it took 490 s.",
)
