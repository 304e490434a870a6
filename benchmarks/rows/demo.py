"""The demo from `blemish init` to its report, cell beside cell, and what it leaves on the disk."""

import shutil
from pathlib import Path

from benchmarks.rows import Contender, Figures, Loaded, Row
from benchmarks.rows.project import blemish

KEPT = ("models", "exported", "evaluations", "mlartifacts", ".dvc/cache")


def make(_folder: Path) -> None:
    """Nothing: it draws its own pictures."""


def run(folder: Path) -> Loaded:
    root = folder / "project"

    def act() -> Figures:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        blemish(root, "init")
        (root / ".dvc" / "config.local").write_text("[core]\nno_scm = true\n")  # Git is told to leave this folder out
        blemish(root, "run")
        names = [file.stat() for name in KEPT for file in (root / name).rglob("*") if file.is_file()]
        files = {status.st_ino: status.st_blocks * 512 / 1e6 for status in names}
        copies = sum(status.st_blocks * 512 / 1e6 for status in names)
        return Figures(
            {"megabytes on the disk": sum(files.values()), "of what copies take": sum(files.values()) / copies}
        )

    return Loaded({}, act)


ROW = Row(
    title="the demo, warm: five models, two categories, two processes at once",
    contenders={"demo": Contender(run)},
    equal="nothing to compare with; on the disk: models, exported files, evaluations, MLflow's files, DVC's cache",
    target={},
    make=make,
    at_most={"wall": 480, "of what copies take": 0.5},
    once=True,
    missed="Weights lie on the disk once; but a decision model in MLflow's registry is an archive with the exported "
    "file in it, which cannot be the same file as another.",
)
