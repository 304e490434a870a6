"""Time one training step of EfficientAD against anomalib's, on one CPU thread, and print a Markdown table.

    PYTHONPATH=. python benchmarks/efficient_ad_step.py
    PYTHONPATH=. python benchmarks/efficient_ad_step.py --curves

Every contender takes one step in turn, so that a busy neighbour slows all of them alike; the table holds medians.
A step is: the three terms of the loss for one 256 px image and one penalty image, backward, Adam. Weights and images
are random, which costs the same. anomalib 2.7 is measured where it is importable; the project itself does not need it.

With --curves the question is another: does training in bf16 go the same way? Two runs in float32 that differ in their
seed show by how much a loss curve differs anyway; one in bf16 with the first one's seed must stay as close to the
first. The images are the embedded data set's gears and textures. Ends with status 1 if it does not.
"""

import argparse
import platform
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anomaly_models.base import Batch, Progress
from anomaly_models.efficient_ad import EfficientAD, EfficientADConfig, Precision, Width, patch_description_network
from pipelines.data.arrays import stream_rows, to_image
from pipelines.sources.demo_data import TEXTURE_CLASSES
from pipelines.sources.demo_scenes import photograph
from pipelines.sources.demo_surfaces import GOOD
from pipelines.sources.demo_textures import draw_texture

SIZE = 256
WARM_UP = 2  # steps: the first ones allocate memory and pick kernels
NUM_PARTS = 20  # images that the loss curves are made on
WINDOW = 20  # steps that a loss curve is averaged over: a single step's loss depends on its image

Step = Callable[[], object]


class Seconds(NamedTuple):
    wall: float
    cpu: float


def published_settings(width: Width, precision: Precision) -> EfficientADConfig:
    return EfficientADConfig(
        image_size=SIZE,
        resize="bilinear",
        fit="stretch",
        tiles=None,
        batch_size=1,
        width=width,
        teacher="random",
        steps=70_000,
        learning_rate=1e-4,
        weight_decay=1e-5,
        hard_quantile=0.999,
        penalty_weight=1.0,
        overall_weight=0.5,
        quantile_low=0.9,
        quantile_high=0.995,
        precision=precision,
    )


def training(config: EfficientADConfig, normals: list[Batch]) -> Callable[[Batch, Progress], float]:
    """A fresh model; gives a function that takes one step on it and returns the loss before the step."""
    model = EfficientAD(config)
    model.load_teacher(patch_description_network(config.width).state_dict())
    model.prepare(normals)
    optimizer, schedule = model.optimizer(config.steps)

    def step(batch: Batch, progress: Progress) -> float:
        loss = torch.stack(list(next(model.losses(batch, progress)).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        return float(loss.detach())

    return step


def our_step(width: Width, precision: Precision, batch: Batch) -> Step:
    config = published_settings(width, precision)
    take = training(config, [batch])
    generator = torch.Generator().manual_seed(0)
    return lambda: take(batch, Progress(0, config.steps, generator))


def anomalib_step(width: Width, batch: Batch) -> Step:
    """What anomalib's Lightning module does in a step, without Lightning and its logging; raises ImportError."""
    from anomalib.models.image.efficient_ad.torch_model import EfficientAdModel, EfficientAdModelSize

    size = {"small": EfficientAdModelSize.S, "medium": EfficientAdModelSize.M}[width]
    model = EfficientAdModel(teacher_out_channels=384, model_size=size, padding=False)
    model.mean_std.update({"mean": torch.zeros(1, 384, 1, 1), "std": torch.ones(1, 384, 1, 1)})
    model.train()
    optimizer = torch.optim.Adam([*model.student.parameters(), *model.ae.parameters()], lr=1e-4, weight_decay=1e-5)

    def step() -> None:
        terms = model(batch=batch.image, batch_imagenet=batch.penalty)
        optimizer.zero_grad()
        sum(terms).backward()
        optimizer.step()

    return step


def without_defects(image: Tensor, penalty: Tensor) -> Batch:
    return Batch(image, torch.zeros_like(image[:, :1]), torch.zeros(len(image), dtype=torch.bool), penalty)


def contenders(width: Width, precisions: list[Precision]) -> dict[str, Step]:
    torch.manual_seed(0)
    image, penalty = torch.rand(2, 1, 3, SIZE, SIZE)
    batch = without_defects(image, penalty)
    steps: dict[str, Step] = {}
    try:
        steps[f"anomalib {version('anomalib')}, float32"] = anomalib_step(width, batch)
    except ImportError as error:  # also when it is installed but one of its own imports fails
        print(f"anomalib is not importable here ({error}): only this project's step is timed.\n")
    for precision in precisions:
        steps[f"this project, {precision}"] = our_step(width, precision, batch)
    return steps


def alternate(steps: dict[str, Step], num_steps: int) -> dict[str, Seconds]:
    """Median seconds per step of each, after the warm-up."""
    taken: dict[str, list[Seconds]] = {name: [] for name in steps}
    for _ in range(WARM_UP + num_steps):
        for name, step in steps.items():
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            taken[name].append(Seconds(time.perf_counter() - wall, time.process_time() - cpu))
    measured = {name: seconds[WARM_UP:] for name, seconds in taken.items()}
    return {name: Seconds(*map(median, zip(*seconds, strict=True))) for name, seconds in measured.items()}


def drawn_images() -> tuple[Tensor, Tensor]:
    """Gears and textures of the embedded data set, as (N, 3, 256, 256) in [0, 1]."""
    gears = [photograph("gear", GOOD, (0, number), SIZE).image for number in range(NUM_PARTS)]
    textures = [draw_texture(name, (0, number), SIZE) for number, name in enumerate(TEXTURE_CLASSES)]
    return as_tensor(gears), as_tensor(textures)


def as_tensor(pictures: list[NDArray[np.uint8]]) -> Tensor:
    return to_image(torch.from_numpy(np.stack(pictures)))


def loss_curve(config: EfficientADConfig, seed: int, images: tuple[Tensor, Tensor], num_steps: int) -> Tensor:
    """The loss (num_steps,) of a run whose weights, order of images and chance all come from `seed`."""
    normals, textures = images
    torch.manual_seed(seed)
    take = training(config, [without_defects(image, image) for image in normals.split(1)])
    generator = torch.Generator()

    def losses() -> Iterator[float]:
        for step in range(num_steps):
            generator.manual_seed(seed * num_steps + step)
            image = normals[stream_rows(len(normals), (seed,), step, 1)]
            penalty = textures[stream_rows(len(textures), (seed, 1), step, 1)]
            yield take(without_defects(image, penalty), Progress(step, config.steps, generator))

    return torch.tensor(list(losses()))


def distance(left: Tensor, right: Tensor) -> float:
    """By what factor two loss curves differ, on average over the steps: the mean of |log ratio| of moving averages."""
    smooth = [curve.unfold(0, WINDOW, 1).mean(dim=1).log() for curve in (left, right)]
    return float((smooth[0] - smooth[1]).abs().mean().exp())


def compare_curves(width: Width, num_steps: int) -> bool:
    """Print three loss curves and how far apart they are; gives whether bf16 is within the spread of two seeds."""
    images = drawn_images()
    runs: dict[str, tuple[Precision, int]] = {
        "float32, seed 0": ("float32", 0),
        "float32, seed 1": ("float32", 1),
        "bf16, seed 0": ("bf16", 0),
    }
    curves = {
        name: loss_curve(published_settings(width, precision), seed, images, num_steps)
        for name, (precision, seed) in runs.items()
    }
    print(f"| steps | {' | '.join(curves)} |")
    print(f"|---|{'---:|' * len(curves)}")
    for end in range(WINDOW, num_steps + 1, WINDOW):
        means = [float(curve[end - WINDOW : end].mean()) for curve in curves.values()]
        print(f"| {end - WINDOW + 1} to {end} | {' | '.join(f'{mean:.3f}' for mean in means)} |")
    first, second, bf16 = curves.values()
    spread, away = distance(first, second), distance(first, bf16)
    verdict = "within" if away <= spread else "OUTSIDE"
    print(f"\nTwo seeds differ by a factor of {spread:.3f} on average, bf16 from float32 by {away:.3f}: {verdict}.")
    return away <= spread


def has_bf16_instructions() -> bool | None:
    """Whether the processor multiplies bf16 natively; None if the system does not say."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return None
    words = set(cpuinfo.read_text().split())
    return not words.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", choices=["small", "medium"], default="small")
    parser.add_argument("--precisions", nargs="+", choices=["float32", "bf16"], default=["float32", "bf16"])
    parser.add_argument("--steps", type=int, default=10, help="measured steps of each (default: %(default)s)")
    parser.add_argument("--curves", action="store_true", help="compare loss curves in bf16 and float32 instead")
    parser.add_argument("--curve-steps", type=int, default=200, help="steps of each curve (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"EfficientAD, {arguments.width}, {SIZE} px, batch 1, one thread; torch {torch.__version__}, {cpu_name()}")
    if "bf16" in arguments.precisions and has_bf16_instructions() is False:
        print("This processor has no bf16 instructions: bf16 is emulated here, and slower than float32.")
    print()
    if arguments.curves:
        sys.exit(0 if compare_curves(arguments.width, arguments.curve_steps) else 1)
    results = alternate(contenders(arguments.width, arguments.precisions), arguments.steps)
    baseline = next(iter(results.values()))
    print(f"| step (median of {arguments.steps}) | wall s | CPU s | speed, by CPU s |")
    print("|---|---:|---:|---:|")
    for name, seconds in results.items():
        print(f"| {name} | {seconds.wall:.2f} | {seconds.cpu:.2f} | {baseline.cpu / seconds.cpu:.2f} |")


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
