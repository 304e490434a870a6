"""What the demo leaves on the disk, where weights are one file under several names."""

from pathlib import Path

from benchmarks.rows import Contender, Figures, Loaded, Row
from benchmarks.rows.demo import run_demo

KEPT = ("models", "exported", "evaluations", "mlartifacts", ".dvc/cache")


def make(folder: Path) -> None:
    """The demo, unless its own row has left all of it."""
    if not (demo_project(folder) / "reports").exists():
        run_demo(demo_project(folder))


def demo_project(folder: Path) -> Path:
    return folder.parent / "demo" / "project"


def counted(folder: Path) -> Loaded:
    kept = [demo_project(folder) / name for name in KEPT]

    def act() -> Figures:
        names = [file.stat() for inside in kept for file in inside.rglob("*") if file.is_file()]
        files = {status.st_ino: status.st_blocks * 512 / 1e6 for status in names}
        copies = sum(status.st_blocks * 512 / 1e6 for status in names)
        return Figures(
            {"megabytes on the disk": sum(files.values()), "share of what copies take": sum(files.values()) / copies}
        )

    return Loaded({}, act)


ROW = Row(
    title="disk after the demo",
    contenders={"links": Contender(counted)},
    equal="nothing to compare with; models, exported files, evaluations, MLflow's files and DVC's cache are counted",
    target={},
    make=make,
    at_most={"share of what copies take": 0.5},
    missed="Weights have three names (their stage's, DVC's, MLflow's), an exported file two, a decision model in "
    "MLflow's registry one: an archive with the exported file in it cannot be the same file as another. Were all three "
    "of one size, that is 3 of 6, a half. Beside the file, an archive holds samples: test pictures, as they came.",
)
