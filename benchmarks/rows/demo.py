"""The demo from `blemish init` to its report, cell beside cell."""

import shutil
from pathlib import Path

from benchmarks.rows import Contender, Figures, Loaded, Row
from benchmarks.rows.project import begin, blemish

TRAINING, PART = "seconds of training: {}", "milliseconds of a part: {}"  # of a model


def make(_folder: Path) -> None:
    """Nothing: it draws its own pictures."""


def run_demo(root: Path) -> None:
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    begin(root)
    blemish(root, "run")


def run(folder: Path) -> Loaded:
    from pipelines.paths import Project
    from pipelines.report.summary import Summary

    root = folder / "project"

    def act() -> Figures:
        run_demo(root)
        found = Figures()
        for row in Summary.of(Project(root), "demo").averages:
            assert row.train_seconds_total is not None, "a cell has failed"
            assert row.latency_p50 is not None
            found[TRAINING.format(row.model)] = row.train_seconds_total  # both categories
            found[PART.format(row.model)] = row.latency_p50
        return found

    return Loaded({}, act)


ROW = Row(
    title="the demo, warm: five models, two categories, two processes at once",
    contenders={"demo": Contender(run)},
    equal="nothing to compare with",
    target={},
    make=make,
    at_most={"wall": 480},
    once=True,
    missed="A third of it is DiffusionAD's steps, which two processes take side by side. With AVX-512 it took 494 s, "
    "before ONNX files were written in less time and pictures drawn on both cores.",
)
