"""`prepare`: 208 photographs of 1,024 pixels, decoded, resized and written as one array, on all cores."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.rows import Contender, Figures, Loaded, Row
from benchmarks.rows.project import GOOD, SIZE, TESTED, called, fapm_project

ROOT = Path(__file__).resolve().parents[2]
PICTURES = GOOD + TESTED
OURS: dict[str, int | None] = {"all cores": None, "one core": 1}


def make(folder: Path) -> None:
    """For each of ours a project with one size to prepare, on the photographs of another one."""
    import yaml

    values = yaml.safe_load((ROOT / "presets" / "demo.yaml").read_text(encoding="utf-8"))
    values["data"] = {"root": str(fapm_project(folder) / "images"), "categories": ["part"]}
    values["models"] = {"fapm": values["models"]["fapm"]}
    values["prepare"] |= {"surfaces": []}
    values |= {"distill": {}, "download": {}, "textures": {}}
    for cores in OURS.values():
        root = project(folder, cores)
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        (root / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        called(root, "check")


def project(folder: Path, cores: int | None) -> Path:
    return folder / f"on {cores or 'all'}"


def mean(array: np.ndarray) -> dict[str, float]:
    return {"pictures": len(array), "mean": float(array.mean())}


def ours(cores: int | None) -> Callable[[Path], Loaded]:
    """On so many cores; None: on all."""

    def load(folder: Path) -> Loaded:
        root = project(folder, cores)
        prepared = root / "data" / "prepared" / "part"
        if cores is not None:
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])  # whatever it starts is kept there, too

        def act() -> Figures:
            shutil.rmtree(prepared, ignore_errors=True)
            started = time.perf_counter()
            called(root, "prepare part")
            return Figures({"pictures a second": PICTURES / (time.perf_counter() - started)})

        act()
        return Loaded(mean(np.load(prepared / f"images_{SIZE}_bilinear.npy")), act)

    return load


def pillow(folder: Path) -> Loaded:
    """What prepare does to a picture, by the same library, one after the other."""
    from PIL import Image

    files = sorted((fapm_project(folder) / "images" / "part").rglob("*.png"))

    def act() -> np.ndarray:
        found = []
        for file in files:
            with Image.open(file) as picture:
                small = picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
            found.append(np.asarray(small))
        array = np.stack(found)
        np.save(folder / "pillow.npy", array)
        return array

    return Loaded(mean(act()), act)


ROW = Row(
    title=f"`prepare` of {PICTURES:,} PNGs of 1,024 pixels",
    contenders={
        **{name: Contender(ours(cores)) for name, cores in OURS.items()},
        "Pillow in a loop": Contender(pillow),
    },
    equal="files, filter, nothing left to import, the mean of all pixels to 0.01 of 255; ours hashes and checks every "
    "file, too",
    target={"one core": 1.8},
    make=make,
    warmed=False,
    tolerance={"pictures": 0, "mean": 0.01},
    missed="One thread writes what the others have decoded, and two cores share one memory.",
)
