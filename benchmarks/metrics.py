"""Time and memory of the exact and the streaming pixel metrics on the largest category of MVTec AD at 256 px.

Run `python benchmarks/metrics.py`; each row is measured in a process of its own, on one thread. Data are drawn batch
by batch and not timed. Peak memory is that of the whole process; the first row only draws, so that the others can be
compared with it.
"""

import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pipelines.evaluation.metrics import ExactPixelMetrics, PixelMetrics, PixelResult, StreamingPixelMetrics

NUM_IMAGES, SIDE, BATCH_SIZE = 167, 256, 16  # as many images as pill
ROWS: dict[str, Callable[[], PixelMetrics] | None] = {
    "drawing only": None,
    "exact": ExactPixelMetrics,
    "streaming, 16 bits": lambda: StreamingPixelMetrics(bits=16),
    "streaming, 20 bits": lambda: StreamingPixelMetrics(bits=20),
}


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    """Log-normal maps, higher inside two discs in five of every six images."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    for first in range(0, NUM_IMAGES, BATCH_SIZE):
        size = min(BATCH_SIZE, NUM_IMAGES - first)
        centre = torch.randint(SIDE, (size, 2, 2, 1, 1), generator=generator)
        radius = torch.randint(3, 25, (size, 2, 1, 1), generator=generator)
        mask = ((y - centre[:, :, 0]) ** 2 + (x - centre[:, :, 1]) ** 2 < radius**2).any(dim=1)
        mask &= (torch.arange(first, first + size) % 6 != 0)[:, None, None]
        yield (torch.randn((size, SIDE, SIDE), generator=generator) + 1.5 * mask).exp(), mask


def measure(name: str) -> None:
    """Print the row of one implementation."""
    torch.set_num_threads(1)
    make = ROWS[name]
    metrics = make() if make else None
    update_seconds = 0.0
    for anomaly_map, mask in batches():
        start = time.perf_counter()
        if metrics:
            metrics.update(anomaly_map, mask)
        update_seconds += time.perf_counter() - start
    start = time.perf_counter()
    result = metrics.compute() if metrics else None
    compute_seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(row(name, update_seconds, compute_seconds, peak, result))


def row(name: str, update_seconds: float, compute_seconds: float, peak: float, result: PixelResult | None) -> str:
    if result is None:
        return f"| {name} | | | {peak:.0f} | | | | |"
    values = " | ".join(f"{value:.7f}" for value in (result.auroc, result.ap, result.f1_max, result.aupro_30))
    return f"| {name} | {update_seconds:.2f} | {compute_seconds:.2f} | {peak:.0f} | {values} |"


def main() -> None:
    print(f"{NUM_IMAGES * SIDE**2 / 1e6:.1f} million pixels, torch {torch.__version__}, one thread\n")
    print("| | update, s | compute, s | peak memory, MiB | AUROC | AP | F1-max | AUPRO@0.3 |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for name in ROWS:
        subprocess.run([sys.executable, __file__, name], check=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(sys.argv[1])
    else:
        main()
