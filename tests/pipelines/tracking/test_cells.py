"""The project's own store is read by its tables, a server by MLflow's client: both say the same."""

import math
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest

from pipelines.tracking import cells
from pipelines.tracking.cells import cell_runs
from pipelines.tracking.store import prepare_store

TAGS = {"model": "fapm", "category": "bolt", "mlflow.note.content": "a note", "group": "ü'\"\n"}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a run of every kind, two of which count."""
    root = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        uri, experiment = prepare_store(root, "parts")
        _, other = prepare_store(root, "others")
    client = mlflow.MlflowClient(uri)

    def begin(within: str, started: int, tags: dict[str, str]) -> str:
        run_id: str = client.create_run(within, start_time=started, tags=tags).info.run_id
        client.log_param(run_id, "models.fapm.image_size", "256")
        client.log_param(run_id, "image_size", "256")  # its common name
        client.log_param(run_id, "train.seed", "3")
        return run_id

    counting = [begin(experiment, 2000, TAGS), begin(experiment, 1000, TAGS | {"category": "nut"})]
    running, deleted, failed = (begin(experiment, 3000, TAGS) for _ in range(3))
    nameless, elsewhere = begin(experiment, 3000, {}), begin(other, 3000, TAGS)
    for run_id in (*counting, running, deleted, failed, nameless, elsewhere):
        for step, value in ((0, 1.0), (2, 7.0), (1, 3.0)):  # the last one is not the latest
            client.log_metric(run_id, "threshold", value, step=step)
        for name, value in (("aupro", math.nan), ("most", math.inf), ("least", -math.inf), ("small", 1e-300)):
            client.log_metric(run_id, name, value)
    for run_id in (*counting, deleted, nameless, elsewhere):
        client.set_terminated(run_id)
    client.set_terminated(failed, "FAILED")
    client.delete_run(deleted)
    client.set_terminated(begin(experiment, 4000, TAGS))  # has no threshold: was never evaluated
    return root


@pytest.fixture(autouse=True)
def _own_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_finished_and_evaluated_runs_with_their_latest_figures(project: Path) -> None:
    newer, older = sorted(cell_runs(project, "parts"), key=lambda run: -run.started)
    assert (newer.cell, older.cell) == (("fapm", "bolt"), ("fapm", "nut"))
    assert (newer.started, newer.seed) == (2000, 3)
    assert newer.settings == {"models.fapm.image_size": "256", "train.seed": "3"}
    assert newer.tags == {name: value for name, value in TAGS.items() if name != "mlflow.note.content"}
    assert newer.metrics["threshold"] == 7.0
    assert math.isnan(newer.metrics["aupro"])


def test_the_tables_say_what_mlflow_says(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = cell_runs(project, "parts")
    monkeypatch.setattr(cells, "local_uri", lambda _project: "another store's")
    asked = cell_runs(project, "parts")
    assert len(own) == 2
    assert [run.run_id for run in own] == [run.run_id for run in asked]
    for ours, theirs in zip(own, asked, strict=True):
        assert ours.metrics == pytest.approx(theirs.metrics, nan_ok=True)
        assert replace(ours, metrics={}) == replace(theirs, metrics={})
