"""Does training in bf16 go the same way? Loss curves of EfficientAD at 256 pixels; ends with status 1 if it does not.

    python -m benchmarks.bf16_curves

Two runs in float32 that differ in their seed show by how much a loss curve differs anyway; one in bf16 with the first
one's seed must stay as close to the first. The images are the embedded data set's gears and textures. How long a step
takes is a row of `bench.py`.
"""

import argparse
import sys
from collections.abc import Callable, Iterator

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
NUM_PARTS = 20  # images that the loss curves are made on
WINDOW = 20  # steps that a loss curve is averaged over: a single step's loss depends on its image


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


def training(config: EfficientADConfig, normals: list[Batch]) -> tuple[EfficientAD, Callable[[Batch, Progress], float]]:
    """A fresh model, and a function that takes one step on it and returns the loss before the step."""
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

    return model, step


def without_defects(image: Tensor, penalty: Tensor) -> Batch:
    return Batch(image, torch.zeros_like(image[:, :1]), torch.zeros(len(image), dtype=torch.bool), penalty)


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
    _, take = training(config, [without_defects(image, image) for image in normals.split(1)])
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", choices=["small", "medium"], default="small")
    parser.add_argument("--steps", type=int, default=200, help="steps of each curve (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sys.exit(0 if compare_curves(arguments.width, arguments.steps) else 1)


if __name__ == "__main__":
    main()
