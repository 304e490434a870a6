"""What several rows stand on: a project on 200 photographs of 1,024 pixels, with FAPM and EfficientAD-S at 256."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SIDE, DRAWN, GOOD, TESTED = 1024, 12, 200, 8  # pixels, pictures
SIZE = 256  # that models see


def photographs(folder: Path, count: int, side: int = SIDE) -> None:
    """PNGs of gears, as a camera's are: some drawn, the others the same moved and with noise of their own."""
    from PIL import Image

    from pipelines.sources.demo_scenes import photograph
    from pipelines.sources.demo_surfaces import GOOD as NO_DEFECT

    drawn = [photograph("gear", NO_DEFECT, (0, number), side).image for number in range(DRAWN)]
    folder.mkdir(parents=True, exist_ok=True)

    def save(number: int) -> None:
        generator = np.random.default_rng(number)
        moved = np.roll(drawn[number % DRAWN], generator.integers(-40, 40, 2), (0, 1)).astype(np.int16)
        noisy = (moved + generator.integers(-2, 3, moved.shape, dtype=np.int16)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{number:04}.png", compress_level=1)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(save, range(count)))


def project(folder: Path) -> Path:
    """Made once, beside the folders of the rows."""
    import yaml

    root = folder.parent / "project"
    if (root / "reports").exists():
        return root
    if not (root / "images").exists():
        photographs(root / "images" / "part" / "test" / "good", TESTED)
        photographs(root / "images" / "part" / "train" / "good", GOOD)
    shutil.rmtree(root / ".dvc", ignore_errors=True)
    begin(root)
    values = yaml.safe_load((ROOT / "presets" / "demo.yaml").read_text(encoding="utf-8"))
    values["data"] = {"root": "images", "categories": ["part"]}
    del values["download"]["demo"]
    values["prepare"] |= {"holdout": 0.05, "surfaces": []}
    values["models"] = {"fapm": values["models"]["fapm"], "efficient_ad": efficient_ad(values)}
    values["textures"] = {}
    values["distill"]["efficient_ad"] |= {"width": "small", "steps": 2}
    (root / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    blemish(root, "run")
    return root


def begin(root: Path) -> None:
    """A project that DVC keeps without Git, which is told to leave these folders out."""
    blemish(root, "init")
    (root / ".dvc" / "config.local").write_text("[core]\nno_scm = true\n")


def efficient_ad(values: dict[str, Any]) -> dict[str, Any]:
    """In its published size; how well it has learnt changes no time."""
    return {**values["models"]["efficient_ad"], "image_size": SIZE, "width": "small", "steps": 2, "overall_weight": 0.5}


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
