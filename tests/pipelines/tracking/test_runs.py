import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import mlflow
import psutil
import pytest
from mlflow.entities import Run
from mlflow.types import DataType

from pipelines.errors import StageError
from pipelines.paths import Cell
from pipelines.tracking import cells, pages, registry, runs
from pipelines.tracking.pages import page_of, serve
from pipelines.tracking.records import flatten
from pipelines.tracking.runs import OpenRun, cell_run, git_tags, summary_run
from pipelines.tracking.store import tracking_uri

# SQLAlchemy warns of what MLflow's tables ask of it.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning")

ROOT = Path(__file__).parents[3]
EXPERIMENT = "parts"
FIGURES = ["image_auroc", "recall"]

CHILD = """
import os, sys, time
from pathlib import Path
from pipelines.paths import Cell
from pipelines.tracking.runs import cell_run
from mlflow.telemetry.client import get_telemetry_client

assert get_telemetry_client() is None, "telemetry is on"
project, what = Path(sys.argv[1]), sys.argv[2]
with cell_run(Cell(project, "fapm", what, 0), "parts", None) as run:
    run.params({"what": what})
    run.metrics({"loss": 1.0})
    (project / f"{what}.id").write_text(run.run_id)
    if what.startswith("wait"):
        time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test of this file may open a connection, and none is told where to track."""

    def refuse(_socket: socket.socket, address: object) -> None:
        raise AssertionError(f"connects to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID", "DVC_STAGE", "DVC_EXP_NAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables, which take seconds to make."""
    folder = tmp_path_factory.mktemp("store")
    mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    return folder / "mlflow.db"


@pytest.fixture
def project(tmp_path: Path, empty_store: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    shutil.copy(empty_store, folder / "mlflow.db")
    return folder


def start(project: Path, what: str) -> subprocess.Popen[bytes]:
    # What pytest and CI put there would turn telemetry off by itself.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW", "PYTEST", "CI", "GITHUB"))}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-c", CHILD, project, what]
    with (project / f"{what}.log").open("w", encoding="utf-8") as log:
        return subprocess.Popen(command, env=environment, stderr=log)


def log_of(project: Path, what: str) -> str:
    return (project / f"{what}.log").read_text(encoding="utf-8")


def wait_for_run(project: Path, what: str, child: subprocess.Popen[bytes]) -> str:
    path = project / f"{what}.id"
    until = time.monotonic() + 60
    while not path.exists() or not path.read_text():
        assert child.poll() is None, log_of(project, what)
        assert time.monotonic() < until, "the run was not opened in a minute"
        time.sleep(0.05)
    return path.read_text()


def client_of(project: Path) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(tracking_uri(project))


def runs_in(project: Path, experiment: str = EXPERIMENT) -> list[Run]:
    client = client_of(project)
    found = client.get_experiment_by_name(experiment)
    return [] if found is None else list(client.search_runs([found.experiment_id]))


def status(project: Path, run_id: str) -> str:
    return str(client_of(project).get_run(run_id).info.status)


def open_cell(project: Path, run_id: str | None = None, experiment: str = EXPERIMENT) -> str:
    with cell_run(Cell(project, "fapm", "bolt", 0), experiment, run_id) as run:
        return run.run_id


# How a run ends


def test_a_run_is_running_and_then_finished(project: Path) -> None:
    with cell_run(Cell(project, "fapm", "bolt", 0), EXPERIMENT, None) as run:
        assert status(project, run.run_id) == "RUNNING"
    (found,) = runs_in(project)
    assert found.info.run_id == run.run_id
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "fapm-bolt"
    assert found.data.tags["model"] == "fapm"
    assert found.data.tags["category"] == "bolt"
    assert found.data.tags["environment.python"] == platform.python_version()
    assert found.data.tags["host"] == socket.gethostname()
    assert found.data.tags["pid"] == str(os.getpid())


@pytest.mark.parametrize(
    ("error", "expected"),
    [(RuntimeError, "FAILED"), (StageError, "FAILED"), (KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED")],
)
def test_an_exception_ends_the_run_and_goes_on(project: Path, error: type[BaseException], expected: str) -> None:
    with pytest.raises(error), cell_run(Cell(project, "fapm", "bolt", 0), EXPERIMENT, None) as run:
        raise error
    assert status(project, run.run_id) == expected
    assert mlflow.active_run() is None


def test_sigterm_ends_the_run_and_then_has_its_old_meaning(project: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped, cell_run(Cell(project, "fapm", "bolt", 0), EXPERIMENT, None) as run:
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.code == 143
    assert status(project, run.run_id) == "KILLED"
    assert signal.getsignal(signal.SIGTERM) is before


def test_killed_processes(project: Path) -> None:
    """SIGTERM marks the run at once; after SIGKILL the next run does, and leaves the runs of living processes alone."""
    children = {what: start(project, what) for what in ("wait-term", "wait-kill")}
    ids = {what: wait_for_run(project, what, child) for what, child in children.items()}
    open_cell(project)
    assert [status(project, run_id) for run_id in ids.values()] == ["RUNNING", "RUNNING"]

    terminated, killed = children.values()
    terminated.terminate()
    assert terminated.wait(20) == 143
    assert status(project, ids["wait-term"]) == "KILLED"
    assert log_of(project, "wait-term") == ""

    killed.kill()
    while psutil.Process(killed.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert status(project, ids["wait-kill"]) == "RUNNING"
    open_cell(project)  # nobody has waited for the killed process, so that its number still exists
    assert status(project, ids["wait-kill"]) == "KILLED"
    assert killed.wait() == -signal.SIGKILL


def duration(project: Path, run_id: str) -> float:
    """What MLflow's page shows, in seconds."""
    info = client_of(project).get_run(run_id).info
    return float(info.end_time - info.start_time) / 1000


def test_a_run_lasts_as_long_as_its_training(project: Path) -> None:
    with cell_run(Cell(project, "fapm", "bolt", 0), EXPERIMENT, None) as run:
        run.metrics({"train_seconds": 3600.5})
    assert duration(project, run.run_id) == 3600.5
    open_cell(project, run.run_id)  # a later stage
    assert duration(project, run.run_id) == 3600.5
    with pytest.raises(StageError), cell_run(Cell(project, "fapm", "bolt", 0), EXPERIMENT, run.run_id):
        raise StageError("fails")
    assert (status(project, run.run_id), duration(project, run.run_id)) == ("FAILED", 3600.5)
    client_of(project).update_run(run.run_id, "RUNNING")
    client_of(project).set_tag(run.run_id, "pid_started", "0")
    open_cell(project)
    assert (status(project, run.run_id), duration(project, run.run_id)) == ("KILLED", 3600.5)


def test_what_is_no_training_lasts_until_its_end(project: Path) -> None:
    before = time.time()
    with summary_run(project, EXPERIMENT, "key") as run:
        time.sleep(0.1)
    assert 0.1 <= duration(project, run.run_id) <= time.time() - before + 0.01


def started(seconds: float = 0.0) -> str:
    return str(psutil.Process().create_time() + seconds)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({"host": "here", "pid": "gone", "pid_started": "0.0"}, "KILLED"),
        ({"host": "here", "pid": "mine", "pid_started": "12345.0"}, "KILLED"),  # the number was given out again
        ({"host": "here", "pid": "mine", "pid_started": started()}, "RUNNING"),
        ({"host": "here", "pid": "mine", "pid_started": started(1.0)}, "RUNNING"),  # the clock was set
        ({"host": "elsewhere", "pid": "gone", "pid_started": "0.0"}, "RUNNING"),
        ({}, "RUNNING"),  # somebody else's
    ],
)
def test_whose_runs_are_marked(project: Path, tags: dict[str, str], expected: str) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    real = {"here": socket.gethostname(), "gone": str(gone.pid), "mine": str(os.getpid())}
    open_cell(project)
    client = client_of(project)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    left = client.create_run(experiment.experiment_id, tags={k: real.get(v, v) for k, v in tags.items()})
    open_cell(project)
    assert status(project, left.info.run_id) == expected


# Opening again


def test_a_known_run_is_opened_again(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_cell(project)
    monkeypatch.setenv("DVC_STAGE", "evaluate@fapm-bolt")
    with cell_run(Cell(project, "fapm", "bolt", 0), EXPERIMENT, first) as run:
        assert run.run_id == first
        assert status(project, first) == "RUNNING"
    (found,) = runs_in(project)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "fapm-bolt"
    assert found.data.tags["stage"] == "evaluate@fapm-bolt"


def test_the_experiment_of_dvc_is_a_tag(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = open_cell(project)
    assert "dvc_exp_name" not in client_of(project).get_run(plain).data.tags
    monkeypatch.setenv("DVC_EXP_NAME", "noble-rook")
    trained = open_cell(project)
    monkeypatch.setenv("DVC_EXP_NAME", "dusty-hare")
    open_cell(project, trained)
    tags = client_of(project).get_run(trained).data.tags
    assert (tags["dvc_exp_name"], tags["latest.dvc_exp_name"]) == ("noble-rook", "dusty-hare")


def test_an_unknown_id_makes_a_new_run(project: Path) -> None:
    new = open_cell(project, "0123456789abcdef0123456789abcdef")
    assert new != "0123456789abcdef0123456789abcdef"
    assert len(runs_in(project)) == 1


def test_a_deleted_run_is_not_opened_again(project: Path) -> None:
    first = open_cell(project)
    client_of(project).delete_run(first)
    assert open_cell(project, first) != first


def test_a_run_stays_where_it_is_when_the_experiment_is_renamed(project: Path) -> None:
    first = open_cell(project)
    assert open_cell(project, first, experiment="renamed") == first
    assert [run.info.run_id for run in runs_in(project)] == [first]
    assert runs_in(project, "renamed") == []
    assert len({first, open_cell(project, None, "renamed")}) == 2
    assert len(runs_in(project, "renamed")) == 1


def test_a_deleted_experiment_says_what_to_do(project: Path) -> None:
    open_cell(project)
    client = client_of(project)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    client.delete_experiment(experiment.experiment_id)
    with pytest.raises(StageError) as caught:
        open_cell(project)
    assert str(caught.value) == (
        f"experiment 'parts' is deleted in {tracking_uri(project)}; restore it there (`mlflow experiments restore "
        f"--experiment-id {experiment.experiment_id}`), or change tracking.experiment in params.yaml"
    )


def test_the_same_key_opens_the_same_summary(project: Path) -> None:
    def summary(key: str) -> str:
        with summary_run(project, EXPERIMENT, key) as run:
            run.metrics({"fapm.image_auroc": 0.9})
            return run.run_id

    ids = [summary("aaaa"), summary("bbbb"), summary("aaaa")]
    assert ids[0] == ids[2] != ids[1]
    assert {run.info.run_name for run in runs_in(project)} == {"summary"}
    assert len(runs_in(project)) == 2


# What is logged


@pytest.fixture
def run(project: Path) -> Iterator[OpenRun]:
    with cell_run(Cell(project, "fapm", "bolt", 0), EXPERIMENT, None) as opened:
        yield opened


def logged(run: OpenRun) -> Any:
    return run.client.get_run(run.run_id).data


def test_settings_are_logged_flat_and_once(run: OpenRun) -> None:
    run.params({"models": {"fapm": {"layers": [2, 3], "rule": None}}, "seed": 0})
    run.params({"models": {"fapm": {"layers": [1], "rule": None}}, "seed": 0, "new": "x" * 9000})
    found = logged(run).params
    assert found.pop("new") == "x" * 5000
    assert found == {"models.fapm.layers": "[2, 3]", "models.fapm.rule": "None", "seed": "0"}


def test_what_methods_share_has_one_name(run: OpenRun) -> None:
    run.settings({"models": {"fapm": {"image_size": 256, "backbone": {"name": "r18"}}}, "train": {"seed": 3}})
    assert logged(run).params == {
        "models.fapm.image_size": "256",
        "models.fapm.backbone.name": "r18",
        "train.seed": "3",
        "image_size": "256",
        "backbone.name": "r18",
        "seed": "3",
    }


def test_a_resumed_run_keeps_its_settings(project: Path) -> None:
    with cell_run(Cell(project, "fapm", "bolt", 0), EXPERIMENT, None) as first:
        first.params({"seed": 0})
    with cell_run(Cell(project, "fapm", "bolt", 0), EXPERIMENT, first.run_id) as again:
        again.params({"seed": 1, "more": 2})
        assert logged(again).params == {"seed": "0", "more": "2"}


def test_more_than_one_call_takes(run: OpenRun) -> None:
    run.metric_points([("loss", step / 2, step) for step in range(2345)])
    history = run.client.get_metric_history(run.run_id, "loss")
    assert sorted((point.step, point.value) for point in history) == [(step, step / 2) for step in range(2345)]
    run.params({f"p{number}": number for number in range(250)})
    assert len(logged(run).params) == 250
    run.metric_points([])


def test_any_name_of_a_defect_is_a_metric(run: OpenRun) -> None:
    defects = {"recall.crack & (dent) 50%": 0.5, "recall.Kratzer_groß": 0.25, "recall.a+b": 0.1, "recall.a=b": 0.2}
    run.metrics(defects | {f"recall.{'x' * 250}": 0.3, "image_auroc": 1.0})
    metrics = logged(run).metrics
    (long,) = (name for name in metrics if "xxx" in name)
    assert metrics == {
        "recall.crack _x26_ _x28_dent_x29_ 50_x25_": 0.5,
        "recall.Kratzer_groß": 0.25,
        "recall.a_x2b_b": 0.1,
        "recall.a_x3d_b": 0.2,
        long: 0.3,
        "image_auroc": 1.0,
    }


def test_tags_are_flat_text(run: OpenRun) -> None:
    run.tags({"threshold": {"value": 1.5, "attainable": False}, "long": "x" * 9000})
    tags = logged(run).tags
    assert (tags["threshold.value"], tags["threshold.attainable"]) == ("1.5", "False")
    assert len(tags["long"]) == 5000


def test_files_lie_in_the_project(run: OpenRun, project: Path, tmp_path: Path) -> None:
    (tmp_path / "report.md").write_text("text")
    run.file(tmp_path / "report.md", "report")
    (found,) = (project / "mlartifacts").rglob("report.md")
    assert found.read_text() == "text"
    assert found.parts[-4:] == (run.run_id, "artifacts", "report", "report.md")


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """What stands for a bundle where nobody asks it."""
    (tmp_path / "fapm-nut.zip").write_bytes(b"any")
    return tmp_path / "fapm-nut.zip"


def test_weights_lie_on_the_disk_once(run: OpenRun, project: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for content in (b"one", b"another"):  # a training that was repeated
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        for _ in range(2):
            run.output(path, "checkpoint")
            (logged,) = (project / "mlartifacts" / run.run_id / "artifacts" / "checkpoint").iterdir()
            assert logged.samefile(path)
            assert (
                Path(run.client.download_artifacts(run.run_id, "checkpoint/model.safetensors")).read_bytes() == content
            )


def test_weights_are_copied_where_there_are_no_links(
    run: OpenRun, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(18, "Invalid cross-device link")))
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    run.output(tmp_path / "model.safetensors", "checkpoint")
    (logged,) = (project / "mlartifacts" / run.run_id / "artifacts" / "checkpoint").iterdir()
    assert logged.read_bytes() == b"weights"
    assert not logged.samefile(tmp_path / "model.safetensors")


def test_an_exported_model_is_logged_with_its_signature(run: OpenRun, packed: Path) -> None:
    run.decision_model(packed)
    (model,) = run.client.get_run(run.run_id).outputs.model_outputs
    stored = run.client.get_logged_model(model.model_id)
    assert stored.source_run_id == run.run_id
    described = mlflow.models.get_model_info(urlparse(stored.artifact_location).path).signature
    assert described is not None
    assert described.inputs.input_types() == [DataType.string]
    assert described.outputs.input_names() == ["score", "threshold", "decision", "disposition", "error"]


def test_the_champion_is_the_exported_model_of_a_run(project: Path, packed: Path) -> None:
    ids = {}
    for model in ("fapm", "adfa", "unexported"):
        with cell_run(Cell(project, model, "nut", 0), EXPERIMENT, None) as run:
            ids[model] = run.run_id
            if model != "unexported":
                run.decision_model(packed)
    client = mlflow.MlflowClient(tracking_uri(project))

    def crown(model: str | None) -> dict[str, Any]:
        registry.crown(project, EXPERIMENT, "it's parts/nut", ids[model] if model else None, f"why {model}")
        aliases = client.get_registered_model("it's parts_x2f_nut").aliases  # a database has numbers, a server texts
        return {alias: str(version) for alias, version in aliases.items()}

    assert crown("fapm") == {"champion": "1"}
    assert crown("adfa") == {"champion": "2"}
    assert crown("fapm") == {"champion": "1"}  # no version twice
    champion = client.get_model_version_by_alias("it's parts_x2f_nut", "champion")
    assert (champion.run_id, champion.description) == (ids["fapm"], "why fapm")
    assert (Path(urlparse(champion.source).path) / "artifacts" / packed.name).read_bytes() == packed.read_bytes()
    assert crown("unexported") == {}
    assert crown("adfa") == {"champion": "2"}
    assert crown(None) == {}
    registry.crown(project, EXPERIMENT, "bolt", None, "")
    assert [model.name for model in client.search_registered_models()] == ["it's parts_x2f_nut"]


def test_nested_settings_become_dotted_names() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": [1, {"e": 2}]}, "f": None, "g": {}}) == {
        "a.b.c": 1,
        "a.d": [1, {"e": 2}],
        "f": None,
    }


def test_a_run_tells_of_itself_at_the_top_of_its_page(run: OpenRun) -> None:
    run.describe("**words**" + "x" * 9000)
    assert run.known_tags()["mlflow.note.content"].startswith("**words**")
    assert len(run.known_tags()["mlflow.note.content"]) == 5000


def test_every_package_is_logged_once(project: Path) -> None:
    first = open_cell(project)
    (path,) = (project / "mlartifacts").rglob("packages.txt")
    assert "\nmlflow==" in path.read_text()
    path.write_text("of the training")
    open_cell(project, first)
    assert path.read_text() == "of the training"


def test_the_environment_is_logged_whole_and_tagged_in_part(project: Path) -> None:
    with cell_run(Cell(project, "fapm", "bolt", 0), EXPERIMENT, None) as run:
        tags = logged(run).tags
    (path,) = (project / "mlartifacts").rglob("environment.json")
    found = json.loads(path.read_text())
    assert {"python", "cpu", "memory_gigabytes", "mlflow"} <= found.keys()
    tagged = {name for name in tags if name.startswith("environment.")}
    assert tagged == {"environment.python", "environment.torch", "environment.cpu"}


def test_runs_of_several_seeds_have_names_of_their_own() -> None:
    assert [Cell(Path(), "fapm", "bolt", seed).name for seed in (0, 1)] == ["fapm-bolt", "fapm-bolt-seed1"]


def test_a_data_set_has_its_name_and_digest(run: OpenRun, project: Path) -> None:
    run.dataset("demo/bolt", "0123456789abcdef" * 4, project / "bolt")
    (found,) = run.client.get_run(run.run_id).inputs.dataset_inputs
    assert (found.dataset.name, found.dataset.digest) == ("demo/bolt", "0123456789abcdef" * 2)


def points(project: Path, run_id: str, name: str) -> list[Any]:
    return sorted(client_of(project).get_metric_history(run_id, name), key=lambda point: point.step)


class Clock:
    """Passes only while the sampler waits, until it is told to stop."""

    def __init__(self, end: float) -> None:
        self.now, self.end = 0.0, end

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 1e9 + self.now

    def wait(self, seconds: float) -> bool:
        self.now = min(self.now + seconds, self.end)
        return self.now == self.end


class Recorder:
    """Stands in for an open run."""

    def __init__(self) -> None:
        self.calls: list[list[tuple[str, float, int, float]]] = []

    def timed_points(self, points: list[tuple[str, float, int, float]]) -> None:
        self.calls.append(points)

    def steps(self, name: str) -> list[int]:
        return [step for call in self.calls for found, _, step, _ in call if found == name]


def sampled(monkeypatch: pytest.MonkeyPatch, seconds: float, before: int = 0) -> Recorder:
    clock, run = Clock(seconds), Recorder()
    monkeypatch.setattr(runs, "time", clock)
    runs._sample(run, clock, threading.Event(), before)  # type: ignore[arg-type]
    return run


def test_what_a_run_uses_is_drawn_by_its_age(monkeypatch: pytest.MonkeyPatch) -> None:
    run = sampled(monkeypatch, 10.5)
    assert run.steps("system/process_memory_megabytes") == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10]
    assert all(20 < value < 1e5 for call in run.calls for name, value, *_ in call if "memory" in name)
    # each at its own time, however many are sent at once
    assert all(seconds == pytest.approx(1e9 + step, abs=0.5) for call in run.calls for *_, step, seconds in call)
    assert run.steps("system/process_cpu_percentage") == run.steps("system/process_memory_megabytes")
    # a resumed run goes on in time
    assert sampled(monkeypatch, 2, before=300).steps("system/process_memory_megabytes") == [301, 302]


def test_a_day_is_drawn_with_some_hundred_points_in_few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    run = sampled(monkeypatch, 24 * 3600)
    steps = run.steps("system/process_memory_megabytes")
    assert 350 < len(steps) < 450
    assert steps[-1] == 24 * 3600
    assert len(run.calls) < 50


def test_a_short_run_is_drawn_too_and_one_that_is_only_opened_is_not(project: Path) -> None:
    with runs.open_run(project, EXPERIMENT, "fapm-bolt", {}, None, sampled=True) as run:
        pass
    (point,) = points(project, run.run_id, "system/process_memory_megabytes")
    assert points(project, open_cell(project), "system/process_memory_megabytes") == []
    with runs.open_run(project, EXPERIMENT, "", {}, run.run_id, sampled=True) as again:
        again.metric_points([("system/process_memory_megabytes", 1.0, 300)])
    with runs.open_run(project, EXPERIMENT, "", {}, run.run_id, sampled=True):
        pass
    assert points(project, run.run_id, "system/process_memory_megabytes")[-1].step >= 300
    assert point.step < 300


# What is read back


def evaluated(project: Path, model: str = "fapm", seed: int = 0) -> str:
    with cell_run(Cell(project, model, "bolt", 0), EXPERIMENT, None) as run:
        run.settings({"models": {model: {"grid": 4}}, "train": {"seed": seed}})
        run.metrics({"threshold": 1.5, "image_auroc": 0.9})
        return run.run_id


def test_evaluated_runs_are_read_back(project: Path) -> None:
    run_id = evaluated(project, seed=7)
    open_cell(project)  # trained and not yet evaluated
    with summary_run(project, EXPERIMENT, "key") as summary:
        summary.metrics({"threshold": 1.0})
    (found,) = cells.cell_runs(project, EXPERIMENT)
    assert (found.run_id, found.model, found.category, found.seed) == (run_id, "fapm", "bolt", 7)
    assert found.settings == {"models.fapm.grid": "4", "train.seed": "7"}
    assert found.metrics["image_auroc"] == 0.9
    assert not any(name.startswith("mlflow.") for name in found.tags)


def test_more_runs_than_one_call_gives(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = {evaluated(project, f"model_{number}") for number in range(5)}
    monkeypatch.setattr(cells, "RUNS_PER_CALL", 2)
    assert {run.run_id for run in cells.cell_runs(project, EXPERIMENT)} == ids


def test_reading_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"mlflow\.db: no runs yet; run `dvc repro`"):
        cells.cell_runs(tmp_path, EXPERIMENT)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_experiment_is_named_with_those_there_are(project: Path) -> None:
    evaluated(project)
    with pytest.raises(StageError) as caught:
        cells.cell_runs(project, "else")
    assert str(caught.value).startswith(f"experiment 'else' is not in {tracking_uri(project)}, which has: 'parts'")
    assert client_of(project).get_experiment_by_name("else") is None


def test_files_are_fetched_for_as_long_as_they_are_needed(project: Path, tmp_path: Path) -> None:
    (tmp_path / "scores.csv").write_text("1")
    ids = []
    for has_file in (True, False):
        with cell_run(Cell(project, "fapm", "bolt", 0), EXPERIMENT, None) as run:
            if has_file:
                run.file(tmp_path / "scores.csv", "evaluation")
        ids.append(run.run_id)
    with cells.fetched(project, ids, ["scores.csv", "else.csv"], "evaluation") as folders:
        assert (folders[ids[0]] / "scores.csv").read_text() == "1"
        assert list(folders[ids[1]].iterdir()) == []
    assert not folders[ids[0]].exists()


def test_the_pages_of_runs(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = pages.pages(project, EXPERIMENT)
    mode = "workflowType=machine_learning"
    assert found.run("abc") == f"http://127.0.0.1:5000/#/experiments/{found.experiment_id}/runs/abc?{mode}"
    monkeypatch.setattr(pages, "prepare_store", lambda *_: ("https://me:secret@mlflow.example.org/", "7"))
    url = pages.pages(project, EXPERIMENT).run("abc")
    assert url == f"https://mlflow.example.org/#/experiments/7/runs/abc?{mode}"


# Where it is logged


def test_four_processes_at_once_on_a_fresh_store(tmp_path: Path) -> None:
    children = {f"cell{number}": start(tmp_path, f"cell{number}") for number in range(4)}
    for what, child in children.items():
        assert child.wait(100) == 0, log_of(tmp_path, what)
    found = runs_in(tmp_path)
    assert {run.data.tags["category"] for run in found} == set(children)
    assert {run.info.status for run in found} == {"FINISHED"}
    assert all(run.data.metrics == {"loss": 1.0} for run in found)


def test_the_store_is_an_absolute_path_in_the_project(
    project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(project)
    assert tracking_uri(Path()) == f"sqlite:///{project / 'mlflow.db'}"
    open_cell(Path())
    monkeypatch.chdir(tmp_path)
    assert len(runs_in(project)) == 1
    experiment = client_of(project).get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    assert experiment.artifact_location == (project / "mlartifacts").as_uri()


def test_two_projects_in_one_process_stay_apart(project: Path, tmp_path: Path, empty_store: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(empty_store, other / "mlflow.db")
    first = open_cell(project)
    second = open_cell(other)
    assert [run.info.run_id for run in runs_in(project)] == [first]
    assert [run.info.run_id for run in runs_in(other)] == [second]
    assert "MLFLOW_TRACKING_URI" not in os.environ


def test_another_store_can_be_named(
    project: Path, tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"sqlite:///{tmp_path / 'shared.db'}"
    shutil.copy(empty_store, tmp_path / "shared.db")
    (project / "mlflow.db").unlink()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    run_id = open_cell(project)
    assert mlflow.MlflowClient(uri).get_run(run_id).info.status == "FINISHED"
    assert not (project / "mlflow.db").exists()
    assert os.environ["MLFLOW_TRACKING_URI"] == uri


@pytest.mark.parametrize(
    ("uri", "reason"),
    [("./mlruns", "The filesystem tracking backend"), ("ftp://example.org", ".*unsupported URI 'ftp://example.org'")],
)
def test_a_store_that_cannot_be_used_is_one_line(
    project: Path, monkeypatch: pytest.MonkeyPatch, uri: str, reason: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(StageError, match=rf"^tracking store {uri}: {reason}.*check MLFLOW_TRACKING_URI$") as caught:
        open_cell(project)
    assert len(str(caught.value).splitlines()) == 1


def test_a_server_has_a_page_of_its_own(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example.org")
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("another server is started"))
    serve(project, 5000)


def test_the_address_leads_to_the_runs(project: Path) -> None:
    with cell_run(Cell(project, "fapm", "nut", 0), "tests", None) as run:
        experiment_id = run.client.get_run(run.run_id).info.experiment_id
    page = f"/#/experiments/{experiment_id}/runs?workflowType=machine_learning"
    assert page_of(project, "tests", 5123, FIGURES) == f"http://127.0.0.1:5123{page}&viewStateShareKey=figures"


def test_the_page_is_served_to_this_machine_only(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []
    monkeypatch.setenv("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "true")
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", "another")
    monkeypatch.setattr(os, "execv", lambda _program, arguments: called.append(arguments))
    serve(project, 5123)
    assert called[0][0] == sys.executable
    assert " ".join(called[0][1:]) == "-m mlflow ui --host 127.0.0.1 --port 5123 --workers 1"
    assert os.environ["MLFLOW_BACKEND_STORE_URI"] == f"sqlite:///{project / 'mlflow.db'}"


# Which code it was


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", folder, *identity, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_the_commit_and_whether_the_code_differs_from_it(tmp_path: Path) -> None:
    assert git_tags(tmp_path) == {}  # no repository
    git(tmp_path, "init")
    assert git_tags(tmp_path) == {}  # no commit
    (tmp_path / "metrics").mkdir()
    for name in ("params.yaml", "dvc.lock", "metrics/a.json"):
        (tmp_path / name).write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert git_tags(tmp_path) == {"git_commit": commit, "git_dirty": "false"}
    (tmp_path / "another project").mkdir()
    assert git_tags(tmp_path / "another project") == {}
    (tmp_path / "untracked").touch()
    for name in ("dvc.lock", "metrics/a.json"):
        (tmp_path / name).write_text("2")  # rewritten by the stages before this one
    assert git_tags(tmp_path)["git_dirty"] == "false"
    (tmp_path / "params.yaml").write_text("2")
    assert git_tags(tmp_path) == {"git_commit": commit, "git_dirty": "true"}


def test_without_git_there_are_no_tags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_tags(ROOT) == {}


def test_telemetry_is_off_by_its_own_name() -> None:
    assert runs.os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
