"""What a GPU makes of it, in one table: EfficientAD's latency and throughput, a training step of every model.

    python -m benchmarks.gpu            # the published settings, on the GPU, within 9 minutes
    python -m benchmarks.gpu --small    # the demo's settings, a few steps, on whatever there is

Nothing is read from a network: weights are random and pictures drawn, which takes as long. Latency is of one picture
from the host's memory to its map and score there; throughput is of batches of 16, likewise. A share of the bound is
what the chip would need for the counted operations, or for the bytes of weights, pictures and maps if that is longer,
of what it took. Rows for which there is no time left say so.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from anomaly_models import MODELS
from anomaly_models.base import AnomalyModel, Batch, Config
from anomaly_models.common.shards import WHOLE
from anomaly_models.common.sizes import Size
from anomaly_models.efficient_ad import patch_description_network
from pipelines.data.arrays import to_image
from pipelines.sources.demo_scenes import photograph
from pipelines.sources.demo_surfaces import GOOD
from pipelines.training.loop import Learner, Schedule, follow_steps
from pipelines.training.trained import build

ROOT = Path(__file__).resolve().parents[1]
CATEGORIES, NORMALS = 15, 218  # of MVTec AD: nine tenths of 3,629 good images, a category's mean
DRAWN = 8  # pictures
# Dense operations a second by precision, and bytes a second, as NVIDIA states them; torch lets convolutions of float32
# run in TF32
CHIPS = {
    "H100": {"fp32": 494e12, "bf16": 989e12, "fp16": 989e12, "bytes": 3.35e12},
    "H200": {"fp32": 494e12, "bf16": 989e12, "fp16": 989e12, "bytes": 4.8e12},
    "A100": {"fp32": 156e12, "bf16": 312e12, "fp16": 312e12, "bytes": 2.04e12},
}
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Machine:
    device: torch.device
    small: bool
    until: float  # by time.monotonic

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def chip(self) -> dict[str, float] | None:
        name = torch.cuda.get_device_name() if self.is_gpu else ""
        return next((bounds for chip, bounds in CHIPS.items() if chip in name), None)

    @property
    def is_late(self) -> bool:
        return time.monotonic() > self.until

    def wait(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()


def configs(machine: Machine) -> dict[str, Config]:
    file = ROOT / "presets" / ("demo.yaml" if machine.small else "mvtec_ad.yaml")
    models = yaml.safe_load(file.read_text(encoding="utf-8"))["models"]
    return {name: MODELS[name].Config(**settings) for name, settings in models.items()}


def built(method: str, config: Config) -> AnomalyModel:
    """With random weights, also where a teacher's or a backbone's would be loaded."""
    model = build(method, config, 0)
    if config.wants.teacher is not None:
        model.load_teacher(patch_description_network(config.width).state_dict())
    return model


def shipped(config: Config, machine: Machine) -> nn.Module:
    """EfficientAD as it is exported; channels last, in which tensor cores compute."""
    folded = built("efficient_ad", config).eval().exportable()
    return folded.to(machine.device, memory_format=torch.channels_last)


@cache
def drawn(size: Size) -> Tensor:
    """Gears (N, 3, H, W) in [0, 1]."""
    side = max(size)
    pictures = [
        photograph("gear", GOOD, (0, number), side).image[: size.height, : size.width] for number in range(DRAWN)
    ]
    return to_image(torch.from_numpy(np.stack(pictures)))


def batch_of(config: Config, machine: Machine, size: int) -> Batch:
    """Drawn parts, and all that any model wants beside them."""
    image = drawn(config.image_size)[torch.arange(size) % DRAWN].to(machine.device)
    nothing = torch.zeros_like(image[:, :1])
    label = torch.zeros(size, dtype=torch.bool, device=machine.device)
    other = image.flip(0).flip(3)
    return Batch(image, nothing, label, penalty=other, texture=other, foreground=torch.ones_like(nothing))


# ---- a picture -------------------------------------------------------------------------------------------------------


def inference(machine: Machine) -> Iterator[list[str]]:
    """Rows of EfficientAD in two widths, three precisions and three ways."""
    base = configs(machine)["efficient_ad"]
    many = 2 if machine.small else 16
    for width in ("small",) if machine.small else ("small", "medium"):
        config = base.model_copy(update={"width": width, "overall_weight": 0.5})
        model = shipped(config, machine)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(batch_of(config, machine, 1).image)
        for precision in TYPES:
            for way, prepare in WAYS.items():
                name = f"EfficientAD-{width[0].upper()}, {precision}, {way}"
                if machine.is_late:
                    yield [name, "no time left"]
                    continue
                if way == "CUDA graph" and not machine.is_gpu:
                    yield [name, "needs a GPU"]
                    continue
                try:
                    alone, together = (
                        host_to_host(model, config, machine, size, precision, prepare) for size in (1, many)
                    )
                except RuntimeError as error:  # the other rows are still of use
                    yield [name, reason(error)]
                    continue
                bound = least_seconds(model, config, machine, counter.get_total_flops(), precision)
                share = "" if bound is None else f"{bound / alone:.0%}; {many * bound / together:.0%}"
                yield [name, f"{1000 * alone:.3g} ms", f"{many / together:,.3g} a second", share]


def host_to_host(
    model: nn.Module, config: Config, machine: Machine, size: int, precision: str, prepare: Callable[..., Any]
) -> float:
    """Seconds of a batch, the median."""
    batch = batch_of(config, machine, size).image
    host = batch.cpu().pin_memory() if machine.is_gpu else batch.cpu()
    with torch.no_grad():
        forward = prepare(model, batch, precision)

        def once() -> None:
            maps, scores = forward(host)
            maps.cpu()
            scores.cpu()

        for _ in range(1 if machine.small else 10):
            once()
        return timed(once, machine, 1 if machine.small else 100, 3.0)


def timed(once: Callable[[], object], machine: Machine, most: int, seconds: float) -> float:
    taken: list[float] = []
    end = time.monotonic() + seconds
    while not taken or (len(taken) < most and time.monotonic() < end):
        machine.wait()
        started = time.perf_counter()
        once()
        machine.wait()
        taken.append(time.perf_counter() - started)
    return median(taken)


def in_precision(model: Callable[[Tensor], Any], precision: str, device: str) -> Callable[[Tensor], Any]:
    """Convolutions and products in it, as autocast chooses; maps and scores leave as float32."""
    kind = TYPES[precision]

    def forward(image: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(device, kind, enabled=kind != torch.float32):
            maps, scores = model(image)
        return maps.float(), scores.float()

    return forward


def eager(model: nn.Module, batch: Tensor, precision: str) -> Callable[[Tensor], Any]:
    forward = in_precision(model, precision, batch.device.type)
    return lambda host: forward(host.to(batch.device, non_blocking=True))


def compiled(model: nn.Module, batch: Tensor, precision: str) -> Callable[[Tensor], Any]:
    """By the inductor on a GPU; on a CPU, where the tests have no compiler, as far as its graph."""
    torch.compiler.reset()  # or the widths and precisions before would count as its recompilations
    graph = torch.compile(model, backend="inductor" if batch.device.type == "cuda" else "eager")
    forward = in_precision(graph, precision, batch.device.type)
    return lambda host: forward(host.to(batch.device, non_blocking=True))


def captured(model: nn.Module, batch: Tensor, precision: str) -> Callable[[Tensor], Any]:
    """One launch for all kernels."""
    forward, taken = in_precision(model, precision, "cuda"), batch.clone()
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):
            forward(taken)
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = forward(taken)

    def replay(host: Tensor) -> Any:
        taken.copy_(host, non_blocking=True)
        graph.replay()
        return found

    return replay


WAYS = {"eager": eager, "compiled": compiled, "CUDA graph": captured}


def least_seconds(
    model: nn.Module, config: Config, machine: Machine, operations: float, precision: str
) -> float | None:
    """Of a picture, by the chip's own figures; None where they are not known."""
    if machine.chip is None:
        return None
    weights = sum(value.numel() * value.element_size() for value in model.parameters())
    pixels = 4 * 4 * config.image_size.area  # three channels and the map
    return max(operations / machine.chip[precision], (weights + pixels) / machine.chip["bytes"])


# ---- a training ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Same:
    """One batch, again and again."""

    batch: Batch
    device: torch.device

    def training_batch(self, seed: int, step: int, batch_size: int) -> Batch:  # noqa: ARG002
        return self.batch


def trainings(machine: Machine) -> Iterator[list[str]]:
    """A row for each model, and one for all of them on all of MVTec AD."""
    whole = 0.0
    for name, config in configs(machine).items():
        if machine.is_late:
            yield [name, "no time left"]
            whole = float("nan")
            continue
        if machine.is_gpu:
            torch.cuda.reset_peak_memory_stats()
        model = built(name, config).to(machine.device)
        batch = batch_of(config, machine, config.batch_size)
        passes = 1 + (NORMALS - 1) // config.batch_size if not machine.small else 2
        machine.wait()
        started = time.perf_counter()
        model.prepare([batch] * passes)
        machine.wait()
        prepared = time.perf_counter() - started
        total = model.total_steps(NORMALS)
        training = model.optimizer(total)
        if model.same_every_step and training is not None:
            alone, share = steps(model, training, batch, machine, total, recorded=False)
            yield [f"{name}, kernel by kernel", f"{1 / alone:.3g} steps a second", "", "", share]
        try:
            step, share = (0.0, "") if training is None else steps(model, training, batch, machine, total)
        except RuntimeError as error:
            yield [name, reason(error)]
            whole = float("nan")
            continue
        whole += CATEGORIES * (prepared + total * step)
        rate = "learns at once" if training is None else f"{1 / step:.3g} steps a second"
        memory = f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if machine.is_gpu else ""
        yield [
            name,
            rate,
            f"{total:,} steps and {prepared:.3g} s: {(prepared + total * step) / 60:.3g} min",
            memory,
            share,
        ]
        del model, training
    yield ["all of them, 15 categories", "", f"{whole / 3600:.3g} h", "", ""]


def steps(
    model: AnomalyModel, training: Any, batch: Batch, machine: Machine, total: int, *, recorded: bool = True
) -> tuple[float, str]:
    """Seconds of a step in the loop that trains, after it has begun, and the share of the chip's bound."""
    learner = Learner(model, model.losses, training, recorded and model.same_every_step)
    source = Same(batch, machine.device)

    def taken(number: int) -> float:
        """Seconds of so many, the last ones of the schedule."""
        machine.wait()
        started = time.perf_counter()
        follow_steps(learner, source, Schedule(0, len(batch.image), total - number, total), WHOLE)
        machine.wait()
        return time.perf_counter() - started

    few = 1 if machine.small else 10
    with FlopCounterMode(display=False) as counter:
        taken(1)
    taken(few)  # libraries choose their kernels
    begun = taken(few)
    more = few if machine.small else max(few, min(300, int(20 / begun * few), total - few))
    step = max(taken(few + more) - begun, 1e-9) / more
    if machine.chip is None:
        return step, ""
    kind = getattr(model.config, "precision", "float32").replace("float32", "fp32")
    return step, f"{counter.get_total_flops() / machine.chip[kind] / step:.0%}"


def reason(error: RuntimeError) -> str:
    return f"failed: {' '.join(str(error).split())[:200]}".replace("|", "/")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="the demo's settings, a few steps")
    parser.add_argument("--minutes", type=float, default=8.5, help="after which no row is begun (default: %(default)s)")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not arguments.small:
        parser.error("there is no GPU here; --small runs everything at small sizes")
    machine = Machine(device, arguments.small, time.monotonic() + 60 * arguments.minutes)
    torch.backends.cudnn.benchmark = True
    print(f"{torch.cuda.get_device_name() if machine.is_gpu else 'CPU'}, torch {torch.__version__}\n")
    for head, rows in (
        (["network", "batch 1", "batch 16", "of the bound, 1; 16"], inference(machine)),
        (["model", "rate", "a category", "memory", "of the bound"], trainings(machine)),
    ):
        print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
        for row in rows:
            print(f"| {' | '.join([*row, *[''] * (len(head) - len(row))])} |", flush=True)
        print()


if __name__ == "__main__":
    main()
