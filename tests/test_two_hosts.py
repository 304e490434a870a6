"""A sweep over two machines that share no disk, of which one dies: two nodes of Ray, each with a folder of its own."""

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from clone import commit, copy_project, environment
from conftest import CATEGORY, draw_category, tiny_params, write_params
from mlflow import MlflowClient
from team_services import database, free_port, missing, tracking_server

from pipelines.sweeps.local import outdated
from pipelines.sweeps.worker import FOLDER

absent = missing()
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="starts servers as Debian has them"),
    pytest.mark.skipif(bool(absent), reason=f"not installed here: {', '.join(absent)}"),
]

CODE = ("anomaly_models", "pipelines", "pretrained", ".dvc", "cli.py", "dvc.yaml", ".dvcignore", ".gitignore")
TOKEN = "0123456789abcdef" * 4
SEEDS = 6
STARTS = 5  # of a node, before it is given up


def shell(**more: str) -> dict[str, str]:
    return environment(Path(sys.executable).parent, **{"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, **more})


@contextmanager
def node(log: Path, *arguments: str, **more: str) -> Iterator[psutil.Process]:
    """What `ray start` runs once the node is there, in a process tree that ends with the block."""
    command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats", *arguments]
    # Without Ray's wish that workers give way to all else on the machine, which here are other tests
    more |= {"RAY_worker_niceness": "0", "RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S": "300"}
    for _ in range(STARTS):
        with log.open("wb") as file:
            process = psutil.Popen(command, stdout=file, stderr=file, env=shell(**more))
        try:
            if is_there(process, log):
                yield process
                return
        finally:
            killed(process)
    pytest.fail(f"a node of Ray did not start:\n{log.read_text()}")


def is_there(process: psutil.Process, log: Path) -> bool:
    """Ray gives up where a node is not there within 30 s, as on a busy machine."""
    while process.poll() is None:
        if "Ray runtime started" in log.read_text():
            return True
        time.sleep(0.1)
    return False


def killed(process: psutil.Process) -> None:
    """With all that it has begun, at once."""
    try:
        tree = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for one in tree:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(tree, timeout=20)


def killed_at_work(process: psutil.Process) -> None:
    """In the middle of a cell, not between two."""
    while not any("".join(one.cmdline()[:1]).startswith("ray::fapm") for one in process.children(recursive=True)):
        assert process.status() != psutil.STATUS_ZOMBIE, "the machine was gone before it had a cell"
        time.sleep(0.01)
    killed(process)


@dataclass(frozen=True)
class Services:
    """Ray on two machines, and MLflow on PostgreSQL."""

    address: str  # of Ray
    for_clients: str  # the same, from anywhere
    tracking: str
    hosts: dict[str, psutil.Process]
    folder: Path


@pytest.fixture(scope="module")
def services() -> Iterator[Services]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True)))
        store = stack.enter_context(database())
        stack.enter_context(store.started())
        tracking = stack.enter_context(tracking_server(folder, store.uri))
        port, for_clients = free_port(), free_port()
        address = f"127.0.0.1:{port}"
        head = ["--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false"]
        head.append(f"--ray-client-server-port={for_clients}")
        here = "--node-ip-address=127.0.0.1"
        stack.enter_context(node(folder / "head.log", *head, here, f"--temp-dir={folder / 'ray'}"))
        hosts = {}
        for name in ("one", "other"):
            more = {FOLDER: str(folder / name), "RAY_TMPDIR": str(folder / "ray")}
            joined = node(folder / f"{name}.log", f"--address={address}", "--num-cpus=1", here, **more)
            hosts[name] = stack.enter_context(joined)
        yield Services(address, f"ray://127.0.0.1:{for_clients}", tracking, hosts, folder)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = copy_project(tmp_path_factory.mktemp("swept"), *CODE)
    values = tiny_params()
    values["train"]["seeds"] = list(range(SEEDS))
    write_params(root, values)
    draw_category(root / "images" / CATEGORY, train=8, good=3, defect=3)
    commit(root)
    return root


def sweep(root: Path, address: str, **more: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "cli.py", "sweep", "--address", address],
        cwd=root,
        env=shell(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_another_token_is_refused(services: Services, project: Path) -> None:
    for address in (services.address, services.for_clients):
        wrong = {"MLFLOW_TRACKING_URI": services.tracking, "RAY_AUTH_TOKEN": "f" * 64}
        said, _ = sweep(project, address, **wrong).communicate()
        assert said.splitlines() == [
            f"error: Ray at {address} refuses the token: set RAY_AUTH_TOKEN to the cluster's, or put it into "
            "~/.ray/auth_token"
        ]


def test_runs_need_a_server(services: Services, project: Path) -> None:
    said, _ = sweep(project, services.for_clients).communicate()
    assert "shares no disk with the project, and MLFLOW_TRACKING_URI names no server" in said.splitlines()[-1]


def test_the_loss_of_a_host_loses_no_finished_cell(services: Services, project: Path) -> None:
    address, tracking, hosts, folder = services.address, services.tracking, services.hosts, services.folder
    said, kept = list[str](), set[str]()
    with sweep(project, address, MLFLOW_TRACKING_URI=tracking) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            if f"2 of {SEEDS}: fapm" in line:
                killed_at_work(hosts["other"])
                kept = set(re.findall(rf"^\d of {SEEDS}: fapm on {CATEGORY}(?:, seed (\d))?:", "".join(said), re.M))
    assert process.returncode == 0, "".join(said)
    assert all(list((folder / name).glob("*/work/parcels/category*")) for name in hosts)  # both had what cells need
    assert any("its worker was lost (" in line for line in said)
    assert not any("(raylet)" in line for line in said)  # Ray's words are in a log
    assert not list((folder / "one").rglob("*.safetensors"))  # what is sent home does not stay
    assert len(list(project.glob("models/fapm/*/*/model.safetensors"))) == SEEDS
    status = subprocess.run(
        [sys.executable, "-m", "dvc", "status", "--json"], cwd=project, env=shell(), capture_output=True, check=True
    )
    assert outdated(status.stdout.decode()) <= {"check"}

    client = MlflowClient(tracking)
    (experiment,) = [one for one in client.search_experiments() if one.name == "tests"]
    runs = client.search_runs([experiment.experiment_id], "tags.model = 'fapm'")
    seeds = [run.data.tags["seed"] for run in runs]
    assert set(seeds) == set(map(str, range(SEEDS)))
    assert [seeds.count(seed or "0") for seed in kept] == [1, 1]  # what was done is not done again
    assert {run.info.status for run in runs} <= {"FINISHED", "KILLED"}
    assert any((folder / "artifacts").iterdir())
