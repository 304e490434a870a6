"""What several rows stand on: FAPM on 200 photographs of 1,024 pixels, of which it sees 256."""

import contextlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SIDE, DRAWN, TESTED = 1024, 12, 8  # pixels, pictures
GOOD, HELD_OUT = 200, 10
SIZE = 256  # pixels that models see


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
    """Made once, beside the folders of the rows."""
    import yaml

    root = folder.parent / "fapm"
    made = root / "made"
    if made.exists():
        return root
    if not (root / "images").exists():
        photographs(root / "images" / "part" / "test" / "good", TESTED)
        photographs(root / "images" / "part" / "train" / "good", GOOD)
    values = yaml.safe_load((ROOT / "presets" / "demo.yaml").read_text(encoding="utf-8"))
    values["data"] = {"root": "images", "categories": ["part"]}
    values["prepare"] |= {"holdout": HELD_OUT / GOOD, "surfaces": []}
    values["models"] = {"fapm": values["models"]["fapm"]}
    values |= {"distill": {}, "download": {}, "textures": {}}
    (root / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    for verb in ("check", "prepare part", "train fapm part", "evaluate fapm part", "export fapm part"):
        called(root, verb)
    made.touch()
    return root


def exported_fapm(folder: Path) -> Path:
    return fapm_project(folder) / "exported" / "fapm" / "part" / "model.onnx"


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


def called(root: Path, words: str) -> None:
    """A verb in this process, which does not import all of it anew; it may be of another commit."""
    from cli import app

    with contextlib.chdir(root):
        app(words.split(), standalone_mode=False)


def test_pictures(root: Path) -> list[Path]:
    return sorted((root / "images" / "part" / "test").rglob("*.png"))
