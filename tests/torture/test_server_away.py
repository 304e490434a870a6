"""A real tracking server that is killed in the middle of a training and comes back: every point is there, once."""

import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from conftest import CATEGORY
from tiny_projects import lay_out
from verbs import begin, run

PATIENCE = 180.0  # seconds that a server, or a training, may take to get somewhere
THIRD = 3  # step at which the server goes away


@dataclass(frozen=True, slots=True)
class Tracked:
    """To this server, which is asked but twice; with `held` the third step waits until somebody says to go on."""

    uri: str
    held: bool = False

    def __call__(self) -> None:
        from pipelines.training import loop

        os.environ |= {"MLFLOW_TRACKING_URI": self.uri, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
        if not self.held:
            return
        take, steps = loop._Stepper.take, Counter[str]()

        def held(*given: Any) -> None:
            steps["done"] += 1
            if steps["done"] == THIRD:
                Path("arrived").touch()
                while not Path("go on").exists():
                    time.sleep(0.01)
            take(*given)

        loop._Stepper.take = held


@contextlib.contextmanager
def server(folder: Path, port: int) -> Iterator[str]:
    """MLflow's own, over a store in `folder`; killed at the end, with all its processes."""
    folder.mkdir(exist_ok=True)
    store = ["--backend-store-uri", f"sqlite:///{folder / 'server.db'}", "--artifacts-destination", str(folder / "art")]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen([*command, *store], env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        until, address = time.monotonic() + PATIENCE, f"http://127.0.0.1:{port}"
        while True:
            with contextlib.suppress(requests.RequestException):
                if requests.get(f"{address}/health", timeout=5).ok:
                    break
            assert time.monotonic() < until, (folder / "log").read_text()
            time.sleep(0.1)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def points(database: Path) -> Counter[tuple[str, int, float]]:
    """What was logged of the losses: name, step, value; and that there is one run, which is finished."""
    with contextlib.closing(sqlite3.connect(database)) as store:
        assert store.execute("SELECT status FROM runs").fetchall() == [("FINISHED",)]
        return Counter(store.execute("SELECT key, step, value FROM metrics WHERE key LIKE 'loss%'").fetchall())


def test_a_server_that_is_killed_and_comes_back(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone, away = tmp_path / "alone", tmp_path / "away"
    for root in (alone, away):
        root.mkdir()
        for verb in lay_out(root, "adfa")[:2]:
            assert run(root, *verb).code == 0
    verb = ("train", "adfa", CATEGORY)
    assert run(alone, *verb).code == 0
    with server(tmp_path / "server", port) as address:
        training = begin(away, *verb, fault=Tracked(address, held=True))
        until = time.monotonic() + PATIENCE
        while not (away / "arrived").exists():
            assert time.monotonic() < until
            time.sleep(0.01)
    (away / "go on").touch()
    ended = training.ended()
    assert ended.code == 1, ended.output
    assert ended.lines[-1].startswith(f"error: tracking store http://127.0.0.1:{port}: does not answer")
    with server(tmp_path / "server", port) as address:
        again = run(away, *verb, fault=Tracked(address))
    assert again.code == 0, again.output
    expected = points(alone / "mlflow.db")
    assert len(expected) > THIRD
    assert points(tmp_path / "server" / "server.db") == expected
    weights = [next((root / "models").rglob("model.safetensors")).read_bytes() for root in (alone, away)]
    assert weights[0] == weights[1]
