"""Time one training step of EfficientAD against anomalib's, on one CPU thread, and print a Markdown table.

    PYTHONPATH=. python benchmarks/efficient_ad_step.py

Every contender takes one step in turn, so that a busy neighbour slows all of them alike; the table holds medians.
A step is: the three terms of the loss for one 256 px image and one penalty image, backward, Adam. Weights and images
are random, which costs the same. anomalib 2.7 is measured where it is importable; the project itself does not need it.
"""

import argparse
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from anomaly_models.base import Batch, Progress
from anomaly_models.efficient_ad import EfficientAD, EfficientADConfig, Precision, Width, patch_description_network

SIZE = 256
WARM_UP = 2  # steps: the first ones allocate memory and pick kernels

Step = Callable[[], None]


class Seconds(NamedTuple):
    wall: float
    cpu: float


def our_step(width: Width, precision: Precision, batch: Batch) -> Step:
    config = EfficientADConfig(
        image_size=SIZE,
        batch_size=1,
        width=width,
        teacher="random",
        steps=70_000,
        learning_rate=1e-4,
        weight_decay=1e-5,
        hard_quantile=0.999,
        penalty_weight=1.0,
        quantile_low=0.9,
        quantile_high=0.995,
        precision=precision,
    )
    model = EfficientAD(config)
    model.load_teacher(patch_description_network(width).state_dict())
    model.prepare([batch])
    optimizer, schedule = model.optimizer(config.steps)
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        terms = next(model.losses(batch, Progress(0, config.steps, generator)))
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
        schedule.step()

    return step


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


def contenders(width: Width, precisions: list[Precision]) -> dict[str, Step]:
    torch.manual_seed(0)
    image, penalty = torch.rand(2, 1, 3, SIZE, SIZE)
    batch = Batch(image, torch.zeros(1, 1, SIZE, SIZE), torch.zeros(1, dtype=torch.bool), penalty)
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
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"EfficientAD, {arguments.width}, {SIZE} px, batch 1, one thread; torch {torch.__version__}, {cpu_name()}")
    if "bf16" in arguments.precisions and has_bf16_instructions() is False:
        print("This processor has no bf16 instructions: bf16 is emulated here, and slower than float32.")
    print()
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
