"""What several rows stand on: FAPM on 200 photographs of 1,024 pixels, EfficientAD-S on 6; both see 256 pixels."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SIDE, DRAWN, TESTED = 1024, 12, 8  # pixels, pictures
GOOD = 200  # pictures, of which FAPM remembers a part
FEW = 6  # EfficientAD looks at each of them again and again, and its file is as large and as fast with few
SIZE = 256  # that models see


def photographs(folder: Path, count: int, side: int = SIDE) -> None:
    """PNGs of gears, as a camera's are: some drawn, the others the same moved and with noise of their own."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)

    def save(number: int) -> None:
        generator = np.random.default_rng(number)
        moved = np.roll(drawn(number % DRAWN, side), generator.integers(-40, 40, 2), (0, 1)).astype(np.int16)
        noisy = (moved + generator.integers(-2, 3, moved.shape, dtype=np.int16)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{number:04}.png", compress_level=1)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(save, range(count)))


@cache
def drawn(number: int, side: int) -> np.ndarray:
    from pipelines.sources.demo_scenes import photograph
    from pipelines.sources.demo_surfaces import GOOD as NO_DEFECT

    return photograph("gear", NO_DEFECT, (0, number), side).image


def fapm_project(folder: Path) -> Path:
    """Made once, beside the folders of the rows, as is the next."""
    return _project(folder.parent / "fapm", "fapm", GOOD, 10, {})


def efficient_ad_project(folder: Path) -> Path:
    """EfficientAD in its published size; how well it and its teacher have learnt changes no time."""
    published = {"image_size": SIZE, "width": "small", "steps": 2, "overall_weight": 0.5}
    return _project(folder.parent / "efficient_ad", "efficient_ad", FEW, FEW // 2, published)


def _project(root: Path, model: str, good: int, held_out: int, settings: Mapping[str, Any]) -> Path:
    import yaml

    if (root / "reports").exists():
        return root
    if not (root / "images").exists():
        photographs(root / "images" / "part" / "test" / "good", TESTED)
        photographs(root / "images" / "part" / "train" / "good", good)
    shutil.rmtree(root / ".dvc", ignore_errors=True)
    begin(root)
    values = yaml.safe_load((ROOT / "presets" / "demo.yaml").read_text(encoding="utf-8"))
    values["data"] = {"root": "images", "categories": ["part"]}
    del values["download"]["demo"]
    values["prepare"] |= {"holdout": held_out / good, "surfaces": []}
    values["models"] = {model: values["models"][model] | settings}
    values["textures"] = {}
    values["distill"]["efficient_ad"] |= {"width": "small", "steps": 2}
    (root / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    blemish(root, "run")
    return root


def begin(root: Path) -> None:
    """A project that DVC keeps without Git, which is told to leave these folders out."""
    blemish(root, "init")
    (root / ".dvc" / "config.local").write_text("[core]\nno_scm = true\n")


def blemish(root: Path, *arguments: str) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), *arguments],
        cwd=root,
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
    )


def test_pictures(root: Path) -> list[Path]:
    return sorted((root / "images" / "part" / "test").rglob("*.png"))
