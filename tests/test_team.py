"""Two people, one MLflow server on PostgreSQL and one DVC remote over SSH, all of them real."""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from clone import commit, copy_project, environment
from conftest import CATEGORY, draw_category, tiny_params, write_params
from mlflow import MlflowClient
from team_services import Database, SecureShell, bucket, database, missing, ssh_server, tracking_server

from pipelines.tracking.runs import OpenRun
from pipelines.tracking.store import prepare_store

absent = missing()
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="starts servers as Debian has them"),
    pytest.mark.skipif(bool(absent), reason=f"not installed here: {', '.join(absent)}"),
]


@dataclass(frozen=True, slots=True)
class Team:
    """What both share."""

    database: Database
    tracking: str
    remote: SecureShell
    folder: Path

    def shell(self, root: Path, *command: str) -> "subprocess.CompletedProcess[str]":
        """As one of them types it, in their project."""
        shown = environment(Path(sys.executable).parent, MLFLOW_TRACKING_URI=self.tracking)
        return subprocess.run(command, cwd=root, env=shown, capture_output=True, text=True, check=False)

    def done(self, root: Path, *command: str) -> str:
        done = self.shell(root, *command)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def knows_the_remote(self, root: Path) -> None:
        """With a key of one's own, which is nobody else's business."""
        for name, value in (("keyfile", str(self.remote.key)), ("allow_agent", "false")):
            self.done(root, "dvc", "remote", "modify", "--local", "team", name, value)


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    folder = tmp_path_factory.mktemp("team")
    with (
        database() as store,
        store.started(),
        tracking_server(folder, store.uri) as tracking,
        ssh_server(folder / "ssh") as remote,
    ):
        yield Team(store, tracking, remote, folder)


@pytest.fixture(scope="module")
def anna(team: Team) -> Path:
    """She begins: trains, and pushes."""
    code = ("anomaly_models", "pipelines", "pretrained", ".dvc", "cli.py", "dvc.yaml", ".dvcignore", ".gitignore")
    root = copy_project(team.folder / "anna", *code)
    values = tiny_params()
    values["download"] = {}
    write_params(root, values)
    draw_category(root / "images" / CATEGORY, train=8, good=3, defect=3)
    (root / ".dvc" / "config").unlink(missing_ok=True)
    commit(root)
    team.done(root, "dvc", "remote", "add", "--default", "team", team.remote.url)
    team.knows_the_remote(root)
    team.done(root, "dvc", "repro")
    team.done(root, "dvc", "push")
    commit(root)
    return root


@pytest.fixture(scope="module")
def ben(team: Team, anna: Path) -> Path:
    """He clones what she has committed."""
    root = team.folder / "ben"
    team.done(team.folder, "git", "clone", "-q", str(anna), str(root))
    team.knows_the_remote(root)
    return root


def ran(output: str) -> set[str]:
    return {line.split("'")[1].partition("@")[0] for line in output.splitlines() if line.startswith("Running stage")}


def runs(team: Team) -> dict[str, str]:
    """Names by id, of the experiment's cells."""
    client = MlflowClient(team.tracking)
    (experiment,) = [one for one in client.search_experiments() if one.name == "tests"]
    return {
        run.info.run_id: run.info.run_name
        for run in client.search_runs([experiment.experiment_id])
        if run.info.run_name != "summary"
    }


def test_nothing_of_the_runs_lies_in_the_project(team: Team, anna: Path) -> None:
    assert list(runs(team).values()) == [f"fapm-{CATEGORY}"]
    assert not (anna / "mlflow.db").exists()
    assert not (anna / "mlartifacts").exists()
    with team.database.connect("mlflow") as connection:
        ((number,),) = connection.execute("SELECT count(*) FROM runs WHERE status = 'FINISHED'").fetchall()
    assert number == 2  # and the summary


def test_he_trains_nothing_that_she_has_trained(team: Team, ben: Path) -> None:
    team.done(ben, "dvc", "pull")
    output = team.done(ben, "dvc", "repro", "--pull", "--allow-missing")
    assert ran(output).isdisjoint({"train", "evaluate", "export"})
    assert (ben / "exported" / "fapm" / CATEGORY / "model.onnx").exists()
    assert len(runs(team)) == 1


def test_a_bucket_does_as_well(team: Team, anna: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """S3 as moto's server speaks it: a third one pulls what she pushes there."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    carla = team.folder / "carla"
    team.done(team.folder, "git", "clone", "-q", str(anna), str(carla))
    with bucket(team.folder, "blemish") as endpoint:
        for root in (anna, carla):
            team.done(root, "dvc", "remote", "add", "--local", "bucket", "s3://blemish/team")
            team.done(root, "dvc", "remote", "modify", "--local", "bucket", "endpointurl", endpoint)
        team.done(anna, "dvc", "push", "--remote", "bucket")
        team.done(carla, "dvc", "pull", "--remote", "bucket")
    model = Path("exported") / "fapm" / CATEGORY / "model.onnx"
    assert (carla / model).read_bytes() == (anna / model).read_bytes()


def test_each_sees_the_runs_of_both(team: Team, anna: Path, ben: Path) -> None:
    (first,) = runs(team)
    values = yaml.safe_load((ben / "params.yaml").read_text(encoding="utf-8"))
    values["models"]["fapm"]["neighbours"] = 3
    write_params(ben, values)
    assert {"train", "evaluate", "export"} <= ran(team.done(ben, "dvc", "repro"))
    (second,) = runs(team).keys() - {first}
    for root in (anna, ben):
        shown = team.done(root, sys.executable, "cli.py", "compare", "--runs", f"{first},{second}")
        assert {f"fapm {first[:8]}", f"fapm {second[:8]}"} <= set(re.findall(r"fapm \w{8}", shown))
    champion = MlflowClient(team.tracking).get_model_version_by_alias(f"images-{CATEGORY}", "champion")
    assert champion.run_id == second


def test_the_champion_travels_through_the_server(team: Team, ben: Path, tmp_path: Path) -> None:
    """Artifacts pass through it: nobody's project knows where they lie."""
    code = "import mlflow, sys; print(len(mlflow.pyfunc.load_model(sys.argv[1]).predict([sys.argv[2]])))"
    picture = next((ben / "images" / CATEGORY / "test").rglob("*.png"))
    address = f"models:/images-{CATEGORY}@champion"
    assert team.done(tmp_path, sys.executable, "-c", code, address, str(picture)).strip() == "1"
    assert any((team.folder / "artifacts").rglob("*.zip"))


def test_runs_that_begin_at_once_enter_experiment_and_data_set_together(
    team: Team, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two that look for what is not there yet and enter it, the second is refused by the database."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", team.tracking)
    client, count = MlflowClient(team.tracking), 8
    for attempt in range(10):
        together = threading.Barrier(count, timeout=60)

        def begin(number: int, attempt: int = attempt, together: threading.Barrier = together) -> str:
            (tmp_path / str(number)).mkdir(exist_ok=True)  # projects, whose lock is their own
            together.wait()
            _, experiment = prepare_store(tmp_path / str(number), f"at once {attempt}")
            run = client.create_run(experiment)
            together.wait()
            OpenRun(run.info.run_id, client, True).dataset("images/nut", f"{attempt:032}", tmp_path)
            return str(experiment)

        with ThreadPoolExecutor(count) as pool:
            (experiment,) = set(pool.map(begin, range(count)))
        entered = [run.inputs.dataset_inputs[0].dataset.digest for run in client.search_runs([experiment])]
        assert entered == [f"{attempt:032}"] * count


def test_a_wrong_key_is_told_and_nothing_is_lost(team: Team, ben: Path, tmp_path: Path) -> None:
    other = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(other)], check=True)
    config = ben / ".dvc" / "config.local"
    before = config.read_text()
    config.write_text(before.replace(str(team.remote.key), str(other)))
    try:
        refused = team.shell(ben, "dvc", "push")
        assert refused.returncode != 0
        assert "Permission denied" in refused.stderr or "authenticate" in refused.stderr.lower()
    finally:
        config.write_text(before)
    team.done(ben, "dvc", "push")


def test_a_database_that_is_away_is_told_in_a_line(team: Team, ben: Path) -> None:
    """With the server there, which has nothing to answer from."""
    pid = int((team.database.folder / "data" / "postmaster.pid").read_text().split()[0])
    os.kill(pid, 3)  # SIGQUIT: at once
    while (team.database.folder / "data" / "postmaster.pid").exists():
        time.sleep(0.05)
    refused = team.shell(ben, sys.executable, "cli.py", "compare")
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: ")
    assert len(refused.stderr.splitlines()) == 1
    with team.database.started():
        assert "fapm" in team.done(ben, sys.executable, "cli.py", "compare")
