import json
from pathlib import Path

import numpy as np
import pytest
from conftest import CATEGORY, draw_part

from anomaly_models.common.sizes import Size
from pipelines.deployment import latency as module
from pipelines.deployment.latency import PARTS, measure
from pipelines.deployment.records import Latency, Milliseconds, Percentiles
from pipelines.inference.detector import ModelCard
from pipelines.inference.engine import Inputs
from pipelines.pictures import images
from pipelines.settings.params import LatencyConfig

FRAME = (Size.square(32), "bilinear", "stretch", None, False, 1, None)
READING = (0, 65535, "refuse", None, "file", 90)
CARD = ModelCard("a", "nut", *FRAME, *READING, 0.5, 0.5, 0.05, None, None, None, "run", "sha", [], {})


class Clock:
    """Seconds that pass only when a part of the work says so."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class FakeDetector:
    """Takes 10 ms for one image and 20 ms for a batch; every fifth single one takes 100."""

    provider = "CPUExecutionProvider"
    card = CARD

    def __init__(self, clock: Clock) -> None:
        self.clock, self.calls = clock, 0

    def read(self, path: Path) -> np.ndarray:
        return images.load_rgb(path, CARD.reading)

    def load(self, _path: Path) -> Inputs:
        return Inputs(np.zeros((1, 32, 32, 3), np.uint8), None)

    def fitted(self, _rgb: np.ndarray, _name: str) -> Inputs:
        return self.load(Path())

    def restored(self, anomaly_map: np.ndarray, _rgb: np.ndarray) -> np.ndarray:
        return anomaly_map

    def __call__(self, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
        self.calls += 1
        single, number = 0.1 if self.calls % 5 == 0 else 0.01, len(inputs.pixels)
        self.clock.now += single if number == 1 else 0.02
        return np.zeros((number, 1, 32, 32), np.float32), np.zeros(number, np.float32)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    found = [tmp_path / f"{number}.png" for number in range(2)]
    for number, path in enumerate(found):
        draw_part(np.random.default_rng(number), square=False)[0].save(path)
    return found


def test_percentiles_by_part_and_throughput(clock: Clock, paths: list[Path]) -> None:
    found = measure(FakeDetector(clock), paths, LatencyConfig(threads=2, seconds=5.6, batch_size=4), "test images")
    # 3 warm-ups, then 1 slow call in 5: 28 ms on average, 200 of them in 5.6 seconds
    assert found.num_runs == pytest.approx(200, abs=5)
    assert found.milliseconds.network == Percentiles(p50=10.0, p95=100.0, p99=100.0)
    assert found.milliseconds.total == found.milliseconds.network
    assert found.milliseconds.decode == Percentiles(p50=0.0, p95=0.0, p99=0.0)
    assert set(Milliseconds.model_fields) == {*PARTS, "total"}
    assert (found.throughput.batch_size, found.throughput.images_per_second) == (4, 200.0)
    assert (found.threads, found.num_images) == (2, 2)
    assert found.metrics()["latency.network.p95"] == 100.0
    assert found.metrics()["latency.images_per_second"] == 200.0


def test_a_slow_model_is_run_often_enough(clock: Clock, paths: list[Path]) -> None:
    config = LatencyConfig(threads=1, seconds=0.001, batch_size=1)
    assert measure(FakeDetector(clock), paths, config, "test images").num_runs == 10


def test_an_exported_cell_is_measured(root, blemish) -> None:
    for verb in ("prepare", "train", "evaluate", "export", "latency"):
        outcome = blemish(*([verb, CATEGORY] if verb == "prepare" else [verb, "fapm", CATEGORY]))
        assert outcome.code == 0, outcome.err
    found = Latency.load(root / "latency" / "fapm" / f"{CATEGORY}.json", "measure again")
    total = found.milliseconds.total.p50
    assert outcome.out.startswith(f"fapm on {CATEGORY}: {total:.1f} ms from file")
    assert all(0 < getattr(found.milliseconds, part).p50 < total for part in PARTS)
    assert (found.num_images, found.images) == (8, "test images")
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert run.data.metrics["latency.total.p50"] == total
    assert run.data.metrics["onnx_megabytes"] > 1
    assert run.data.tags["latency.hardware"] == found.hardware
    explains_itself(root, run, client)


def explains_itself(root, run, client) -> None:
    """All that a stranger needs who has this run and nothing else; here, since the cell has been through all stages."""
    index = json.loads((root / "data" / "prepared" / CATEGORY / "index.json").read_text())
    tags = run.data.tags
    expected = {"data_set": "images", "category": CATEGORY, "seed": "0", "data_sha256": index["data_sha256"]}
    assert tags.items() >= (expected | {"protocol.threshold_from": "held-out good parts"}).items()
    assert run.data.params["train.seed"] == "0"
    assert {"threshold.value", "threshold.rank", "threshold.num_images"} <= tags.keys()
    assert tags["environment.torch"]
    assert tags["environment.cpu"]
    assert "**fapm** on **squares**" in tags["mlflow.note.content"]
    (dataset,) = run.inputs.dataset_inputs
    assert dataset.dataset.name == f"images/{CATEGORY}"
    folders = ("data", "environment", "evaluation", "figures", "latency")
    there = {item.path for folder in folders for item in client.list_artifacts(run.info.run_id, folder)}
    evaluated = {f"evaluation/{name}" for name in ("evaluation.json", "pixels.npz", "predictions.csv")}
    pages = {"data/index.json", "environment/packages.txt", "figures/curves.png", "figures/examples.png"}
    assert {*evaluated, *pages, f"latency/{CATEGORY}.json"} <= there
    kept = json.loads(Path(client.download_artifacts(run.info.run_id, "data/index.json")).read_text())
    assert kept == index
    assert run.data.metrics["system/process_memory_megabytes"] > 50


def test_what_is_missing_is_named(root, blemish) -> None:
    assert "exported/fapm/squares/model.onnx: no such file" in blemish("latency", "fapm", CATEGORY).err
