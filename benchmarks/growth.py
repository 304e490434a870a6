"""How time and memory grow with good pictures, their size and the number of categories: a table, and fitted exponents.

Run `python -m benchmarks.growth [fapm] [efficient_ad] [categories]`, some 40 minutes for all. FAPM has the demo's
settings; EfficientAD the published ones of its small network, of which a step and the pass before are measured, not
all steps. Each measurement is a process of its own, on one thread, in seconds of the processor; memory is what the
process grew by. Pictures are drawn gears, moved and with noise of their own. An exponent is the slope of a line through
logarithms, over the upper half of what was tried.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import yaml

from anomaly_models import MODELS
from anomaly_models.base import Batch, Config, Progress
from anomaly_models.efficient_ad import patch_description_network
from benchmarks.bf16_curves import published_settings, without_defects
from pipelines.sources.demo_scenes import photograph
from pipelines.sources.demo_surfaces import GOOD
from pipelines.training.trained import build
from pipelines.training.weights import load_pretrained

ROOT = Path(__file__).resolve().parents[1]
IMAGES = (50, 100, 200, 400, 800, 1600, 3200)
SIDES = (128, 256, 512, 1024)
CATEGORIES = (1, 2, 4, 8, 15)
SIDE = {"fapm": 256, "efficient_ad": 128}  # where the number of pictures grows
FEW = {"fapm": 50, "efficient_ad": 5}  # where their size grows
DRAWN = 8


def pictures(count: int, side: int, size: int) -> Iterator[Batch]:
    drawn = [photograph("gear", GOOD, (0, number), side).image for number in range(DRAWN)]
    for first in range(0, count, size):
        several = []
        for number in range(first, min(first + size, count)):
            generator = np.random.default_rng(number)
            moved = np.roll(drawn[number % DRAWN], generator.integers(-8, 9, 2), (0, 1)).astype(np.int16)
            several.append((moved + generator.integers(-2, 3, moved.shape)).clip(0, 255).astype(np.float32) / 255)
        image = torch.from_numpy(np.stack(several)).permute(0, 3, 1, 2).contiguous()
        yield without_defects(image, image)


def megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def settings_of_fapm(side: int) -> Config:
    values = yaml.safe_load((ROOT / "presets" / "demo.yaml").read_text(encoding="utf-8"))["models"]["fapm"]
    return MODELS["fapm"].Config(**values | {"image_size": side, "crop": side})


def fapm(count: int, side: int) -> dict[str, float]:
    config = settings_of_fapm(side)
    model = build("fapm", config, 0)
    load_pretrained(model.backbone)
    model.backbone(torch.rand(config.batch_size, 3, side, side))
    before, started = megabytes(), time.process_time()
    model.prepare(pictures(count, side, config.batch_size))
    found = {"fit, s": time.process_time() - started, "fit, MB": megabytes() - before}
    image = next(pictures(1, side, 1)).image
    return found | {"picture, s": per_picture(model.eval(), image)}


def efficient_ad(count: int, side: int) -> dict[str, float]:
    config = published_settings("small", "float32").model_copy(update={"image_size": settings_of_fapm(side).image_size})
    model = build("efficient_ad", config, 0)
    model.load_teacher(patch_description_network("small").state_dict())
    before, started = megabytes(), time.process_time()
    model.prepare(pictures(count, side, 1))
    found = {"before the first step, s": time.process_time() - started}
    batch = next(pictures(1, side, 1))
    optimizer, _ = model.optimizer(config.steps)
    model.train()
    taken = []
    for step in range(3):
        started = time.process_time()
        for terms in model.losses(batch, Progress(step, config.steps, torch.Generator().manual_seed(step))):
            optimizer.zero_grad()
            torch.stack(list(terms.values())).sum().backward()
            optimizer.step()
        taken.append(time.process_time() - started)
    found |= {"step, s": min(taken), "training, MB": megabytes() - before}
    return found | {"picture, s": per_picture(model.eval(), batch.image)}


@torch.no_grad()
def per_picture(model: torch.nn.Module, image: torch.Tensor) -> float:
    taken = []
    for _ in range(3):
        started = time.process_time()
        model(image)
        taken.append(time.process_time() - started)
    return min(taken)


def categories(count: int, side: int) -> dict[str, float]:
    """FAPM on so many categories of twenty small pictures, from `init` to the report."""
    from benchmarks.rows.project import blemish, photographs

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        blemish(root, "init")
        names = [f"part{number}" for number in range(count)]
        for name in names:
            for split, number in (("train", 20), ("test", 4)):
                photographs(root / "images" / name / split / "good", number, side)
        values = yaml.safe_load((ROOT / "presets" / "demo.yaml").read_text(encoding="utf-8"))
        values["data"] = {"root": "images", "categories": names}
        values["models"] = {"fapm": values["models"]["fapm"] | {"image_size": side, "crop": side, "grid": 1}}
        values |= {"download": {}, "distill": {}, "textures": {}}
        values["prepare"]["surfaces"] = []
        (root / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        before = os.times()
        blemish(root, "run", "--jobs", "1")
        after = os.times()
        spent = after.children_user + after.children_system - before.children_user - before.children_system
        return {"whole, s": spent}


MEASURED = {"fapm": fapm, "efficient_ad": efficient_ad, "categories": categories}


def measured(what: str, count: int, side: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.growth", what, str(count), str(side)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def exponent(sizes: list[float], figures: list[float]) -> float:
    upper = len(sizes) // 2
    return float(np.polyfit(np.log(sizes[upper:]), np.log(figures[upper:]), 1)[0])


def table(what: str, name: str, tried: list[tuple[int, int, int]]) -> Iterator[str]:
    """Lines of Markdown; `tried` are what the line is headed by, and the number and size of pictures."""
    found = [measured(what, count, side) for _, count, side in tried]
    heads = [str(head) for head, _, _ in tried]
    yield f"| {what}, {name} | {' | '.join(heads)} | exponent |"
    yield f"|---|{'---:|' * (len(heads) + 1)}"
    for figure in found[0]:
        values = [max(one[figure], 1e-6) for one in found]
        slope = exponent([float(head) for head in heads], values)
        cells = [f"{value:.3g}" if value < 1000 else f"{value:,.0f}" for value in values]
        yield f"| {figure} | {' | '.join(cells)} | {slope:.2f} |"
    yield ""


def main(chosen: list[str]) -> None:
    for what in chosen:
        if what == "categories":
            trials = {"number": [(count, count, 64) for count in CATEGORIES]}
        else:
            trials = {
                f"good pictures of {SIDE[what]} pixels": [(count, count, SIDE[what]) for count in IMAGES],
                f"pixels a side of {FEW[what]} pictures": [(side, FEW[what], side) for side in SIDES],
            }
        for name, tried in trials.items():
            for line in table(what, name, tried):
                print(line, flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[2].isdigit():
        torch.set_num_threads(1)
        with torch.no_grad() if sys.argv[1] == "fapm" else torch.enable_grad():
            print(json.dumps(MEASURED[sys.argv[1]](int(sys.argv[2]), int(sys.argv[3]))))
    else:
        main(sys.argv[1:] or list(MEASURED))
