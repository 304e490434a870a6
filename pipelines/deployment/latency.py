"""How fast an exported model answers, part by part: decode, resize, network, post-processing. Never imports torch.

One image at a time, as it comes from a line, then the network alone in batches. The time is that of this machine, so
its name and the number of threads stand beside every figure.
"""

import os
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from pipelines.data.index import PreparedIndex
from pipelines.deployment.records import Latency, Milliseconds, Percentiles, Throughput, Tried
from pipelines.environment import cpu_name
from pipelines.inference.detector import Detector
from pipelines.inference.engine import Inputs
from pipelines.paths import Project
from pipelines.pictures.overlays import Map, Mask, Pixels
from pipelines.settings.params import LatencyConfig, Params

PARTS = ("decode", "resize", "network", "postprocess")
_WARM_UP = 3  # ONNX Runtime plans its memory in the first runs
_FEWEST = 10  # runs, however slow the model: of fewer a percentile means nothing


def latency(model: str, category: str, params: Params, project: Project) -> Latency:
    """Write `latency/<model>/<category>.json`, and the same figures to the cell's run.

    Raises:
        ParamsError: no such category in the params file.
        StageError: the category is not prepared, or its files have changed since.
        ExportError: the cell is not exported.
    """
    from pipelines.tracking.runs import cell_run

    params.check_category(category)
    cell = project.cell(model, category, params.seed)
    detector = Detector(cell.onnx, threads=params.latency.threads)
    source = project.root / params.data.root / category
    index = PreparedIndex.load(project.prepared(category))
    tested = index.rows("test")  # those that every model is tested on: times are compared
    paths = [index.original(row, source) for row in tested or index.for_thresholds()]
    images: Tried = "test images" if tested else "good parts" if index.by_folds else "held-out good parts"
    found = measure(detector, paths, params.latency, images)
    if cell.int8.exists():
        int8 = measure(Detector(cell.int8, threads=params.latency.threads), paths, params.latency, images)
        found = found.model_copy(update={"int8": int8})
    found.save(cell.latency)
    with cell_run(cell, params.tracking.experiment, detector.card.run_id) as run:
        run.metrics(found.metrics() | {"onnx_megabytes": round(cell.onnx.stat().st_size / 1e6, 2)})
        run.tags({"latency": {"hardware": found.hardware, "threads": found.threads}})
        run.file(cell.latency, "latency")
    return found


def measure(detector: Detector, paths: list[Path], config: LatencyConfig, images: Tried) -> Latency:
    """Answer image after image, over and over, for as long as `config` says; then the same in batches.

    `images` says what the files show.
    """
    for path in islice(cycle(paths), _WARM_UP):
        _answer(detector, path)
    runs = [_answer(detector, path) for path in _for_seconds(cycle(paths), config.seconds)]
    timings = np.stack(runs) * 1000  # (runs, parts)
    by_part = {part: timings[:, place] for place, part in enumerate(PARTS)} | {"total": timings.sum(1)}
    return Latency(
        hardware=f"{cpu_name()} ({os.cpu_count()} cores)",
        provider=detector.provider,
        threads=config.threads,
        onnxruntime=onnxruntime.__version__,
        num_images=len(paths),
        images=images,
        num_runs=len(runs),
        milliseconds=Milliseconds(**{part: _percentiles(values) for part, values in by_part.items()}),
        throughput=_throughput(detector, paths, config),
    )


def _answer(detector: Detector, path: Path) -> NDArray[np.float64]:
    """Seconds of each part of the way from a file to a decision and a mask at the picture's own size."""
    clock = [time.perf_counter()]
    rgb = detector.read(path)
    clock.append(time.perf_counter())
    inputs = detector.fitted(rgb, str(path))
    clock.append(time.perf_counter())
    maps, scores = detector(inputs)
    clock.append(time.perf_counter())
    _decide(detector, rgb, maps[0, 0], scores[0])
    clock.append(time.perf_counter())
    return np.diff(clock)


def _decide(detector: Detector, rgb: Pixels, anomaly_map: Map, score: float) -> tuple[bool, Mask]:
    """Whether the part has a defect, and where, at the picture's own size."""
    card = detector.card
    return score > card.threshold, detector.restored(anomaly_map, rgb) > card.pixel_threshold


def _for_seconds(paths: Iterator[Path], seconds: float) -> Iterator[Path]:
    until = time.perf_counter() + seconds
    for number, path in enumerate(paths):
        if number >= _FEWEST and time.perf_counter() >= until:
            return
        yield path


def _percentiles(values: np.ndarray) -> Percentiles:
    p50, p95, p99 = (round(float(np.percentile(values, p)), 3) for p in (50, 95, 99))
    return Percentiles(p50=p50, p95=p95, p99=p99)


def _throughput(detector: Detector, paths: list[Path], config: LatencyConfig) -> Throughput:
    batch = Inputs.together([detector.load(path) for path in islice(cycle(paths), config.batch_size)])
    detector(batch)
    started, num_batches = time.perf_counter(), 0
    while num_batches == 0 or time.perf_counter() - started < config.seconds:
        detector(batch)
        num_batches += 1
    seconds = time.perf_counter() - started
    return Throughput(
        batch_size=config.batch_size, images_per_second=round(num_batches * config.batch_size / seconds, 2)
    )
