"""A project under any name, moved and copied: its runs' files are in it, and nothing is written where it was."""

import shutil
import sqlite3
from pathlib import Path
from urllib.parse import unquote, urlparse

import mlflow
import pytest
from mlflow.tracking._tracking_service.utils import _artifact_repos_cache

from pipelines.errors import StageError
from pipelines.paths import Cell
from pipelines.tracking import cells, registry
from pipelines.tracking.pages import page_of
from pipelines.tracking.runs import cell_run
from pipelines.tracking.store import tracking_uri

EXPERIMENT = "parts"
# In an address, a percent sign, a question mark and a number sign mean something else than in a path.
NAMES = ["my%41project", "what?now", "# 50% ü;&'[]:@+", "a?b#c%20d"]


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables, which take seconds to make."""
    folder = tmp_path_factory.mktemp("store")
    mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    return folder / "mlflow.db"


@pytest.fixture(autouse=True)
def _own_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def project(tmp_path: Path, empty_store: Path) -> Path:
    folder = tmp_path / "first" / "project"
    folder.mkdir(parents=True)
    shutil.copy(empty_store, folder / "mlflow.db")
    return folder


def evaluate(project: Path, run_id: str | None = None, text: str = "1") -> str:
    """A run with all that the verbs write: a file, metrics, an exported model, and that as champion."""
    (project / "work").mkdir(exist_ok=True)
    (project / "work" / "fapm-bolt.zip").write_bytes(b"a bundle")
    (project / "work" / "scores.csv").write_text(text)
    with cell_run(Cell(project, "fapm", "bolt", 0), EXPERIMENT, run_id) as run:
        run.metrics({"threshold": 1.5})
        run.file(project / "work" / "scores.csv", "evaluation")
        run.decision_model(project / "work" / "fapm-bolt.zip")
    registry.crown(project, EXPERIMENT, "bolt", run.run_id, "why")
    return run.run_id


def scores(project: Path) -> list[str]:
    """What `compare` reads."""
    ids = [run.run_id for run in cells.cell_runs(project, EXPERIMENT)]
    with cells.fetched(project, ids, ["scores.csv"], "evaluation") as folders:
        return [(folders[run_id] / "scores.csv").read_text() for run_id in ids]


def champion(project: Path) -> Path:
    client = mlflow.MlflowClient(tracking_uri(project))
    return Path(unquote(urlparse(client.get_model_version_by_alias("bolt", "champion").source).path))


def files(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", NAMES)
def test_a_project_may_have_any_name(project: Path, name: str) -> None:
    project = project.rename(project.with_name(name))
    run_id = evaluate(project)
    assert evaluate(project, run_id) == run_id
    assert scores(project) == ["1"]
    assert champion(project).is_relative_to(project / "mlartifacts")
    assert (champion(project) / "artifacts" / "fapm-bolt.zip").read_bytes() == b"a bundle"
    assert [path.name for path in project.parent.iterdir()] == [name]
    assert not list(project.glob("**/mlruns"))


@pytest.mark.parametrize("name", ["second", *NAMES])
def test_a_moved_project_takes_its_store_along(project: Path, tmp_path: Path, name: str) -> None:
    run_id = evaluate(project)
    moved = tmp_path / name
    shutil.move(project, moved)
    _artifact_repos_cache.clear()  # of a process, which has one project
    assert scores(moved) == ["1"]
    assert champion(moved).is_relative_to(moved / "mlartifacts")
    assert (champion(moved) / "artifacts" / "fapm-bolt.zip").read_bytes() == b"a bundle"
    assert evaluate(moved, run_id, "2") == run_id
    assert scores(moved) == ["2"]
    evaluate(moved, text="2")
    assert len(list((moved / "mlartifacts").rglob("scores.csv"))) == 2
    assert champion(moved).is_relative_to(moved / "mlartifacts")
    assert not project.exists()
    database = (moved / "mlflow.db").read_bytes()
    assert str(project).encode() not in database


@pytest.mark.parametrize("whole", [True, False])
def test_a_copy_leaves_the_original_alone(project: Path, tmp_path: Path, whole: bool) -> None:
    run_id = evaluate(project)
    copy = tmp_path / "copy"
    shutil.copytree(project, copy, ignore=None if whole else shutil.ignore_patterns("mlartifacts"))
    before = files(project)
    _artifact_repos_cache.clear()  # of a process, which has one project
    evaluate(copy, run_id, "2")
    assert scores(copy) == ["2"]
    assert files(project) == before
    _artifact_repos_cache.clear()
    assert champion(copy).is_relative_to(copy / "mlartifacts")
    assert scores(project) == ["1"]
    assert champion(project).is_relative_to(project / "mlartifacts")


def test_moved_twice_and_every_experiment(project: Path, tmp_path: Path) -> None:
    evaluate(project)
    page_of(project, "other", 5000, ["recall"])
    for name in ("second", "third"):
        project = project.rename(tmp_path / name)
        page_of(project, EXPERIMENT, 5000, ["recall"])
    client = mlflow.MlflowClient(tracking_uri(project))
    places = {client.get_experiment_by_name(name).artifact_location for name in (EXPERIMENT, "other")}
    assert places == {(project / "mlartifacts").as_uri()}


def test_what_a_user_put_elsewhere_stays_there(project: Path, tmp_path: Path) -> None:
    elsewhere = (tmp_path / "disk" / "artifacts").as_uri()
    mlflow.MlflowClient(tracking_uri(project)).create_experiment(EXPERIMENT, elsewhere)
    evaluate(project)
    assert list((tmp_path / "disk").rglob("scores.csv"))
    assert not (project / "mlartifacts").exists()


def test_a_store_that_is_no_database_is_one_line(project: Path) -> None:
    (project / "mlflow.db").write_text("this was a database" * 1000)
    with pytest.raises(StageError, match=r"^tracking store sqlite:.*: file is not a database; put a copy") as caught:
        cells.cell_runs(project, EXPERIMENT)
    assert "\n" not in str(caught.value)


def test_nothing_is_written_where_nothing_has_moved(project: Path) -> None:
    evaluate(project)
    before = (project / "mlflow.db").read_bytes()
    (project / ".mlflow.lock").unlink()
    scores(project)
    assert (project / "mlflow.db").read_bytes() == before
    assert not (project / ".mlflow.lock").exists()
    with sqlite3.connect(project / "mlflow.db") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()
