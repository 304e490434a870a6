"""`evaluate` of EfficientAD-S at 128 pixels, all of it imported before, against an earlier commit of this project."""

import json
from pathlib import Path
from typing import Any

from benchmarks.rows import Contender, Loaded, Row
from benchmarks.rows.project import called

ROOT = Path(__file__).resolve().parents[2]
EVALUATE = "evaluate efficient_ad part"
TRAIN, HELD_OUT, TESTED, SIDE = 4, 8, 8, 128  # pictures; pixels


def make(folder: Path) -> None:
    """Gears, every other one of the tested with a mark and its mask."""
    import numpy as np
    from PIL import Image

    from pipelines.sources.demo_scenes import photograph
    from pipelines.sources.demo_surfaces import GOOD

    root = folder / "part"
    for number in range(TRAIN + HELD_OUT + TESTED):
        image = photograph("gear", GOOD, (0, number), SIDE).image.copy()
        name, tested = f"{number:03}.png", number >= TRAIN + HELD_OUT
        if tested and number % 2:
            mask = np.zeros((SIDE, SIDE), np.uint8)
            mask[50:65, 45:75] = 255
            image[mask > 0] //= 3
            save(Image.fromarray(mask), root / "ground_truth" / "mark" / name.replace(".png", "_mask.png"))
        kind = "train/good" if not tested else "test/mark" if number % 2 else "test/good"
        save(Image.fromarray(image), root / kind / name)


def save(image: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def evaluate(folder: Path) -> Loaded:
    """By the code that the process was started in."""
    import yaml

    code = Path.cwd()
    root = folder / f"project_of_{code.name}"
    root.mkdir(exist_ok=True)
    values = yaml.safe_load((code / "presets" / "demo.yaml").read_text(encoding="utf-8"))
    values["data"] |= {"root": str(folder), "categories": ["part"]}
    values["prepare"] |= {"holdout": HELD_OUT / (TRAIN + HELD_OUT), "surfaces": []}
    small = {"image_size": SIDE, "width": "small", "steps": 2, "overall_weight": 0.5}
    values["models"] = {"efficient_ad": values["models"]["efficient_ad"] | small}
    values["distill"]["efficient_ad"] |= {"width": "small", "steps": 2}
    values["textures"] = {}
    (root / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")

    for verb in ("check", "download demo_textures", "prepare part", "distill efficient_ad", "train efficient_ad part"):
        called(root, verb)
    called(root, EVALUATE)
    (record,) = root.glob("metrics/efficient_ad/**/*.json")
    found = json.loads(record.read_text(encoding="utf-8"))
    results = {name: found[name] for name in ("image_auroc", "pixel_auroc", "threshold")}
    return Loaded(results, lambda: called(root, EVALUATE))


ROW = Row(
    title=f"`evaluate` of {HELD_OUT} held-out and {TESTED} test pictures, EfficientAD-S, {SIDE} pixels",
    contenders={"now": Contender(evaluate), "before": Contender(evaluate, is_earlier=True)},
    equal="pictures, settings, one thread, nothing left to import; AUROC and threshold to 1e-3",
    target={"before": 5},
    make=make,
    warmed=False,
    tolerance=dict.fromkeys(("image_auroc", "pixel_auroc", "threshold"), 1e-3),
    missed="A held-out part passes the networks once where it took six passes; a test picture takes one, as ever, and "
    "its convolutions run at the core's peak in float32 already (benchmarks/README.md). The more of them, the less "
    "there is to gain: with 590 and 20 held-out parts 1.1 times.",
)
