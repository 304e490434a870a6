"""Addresses of MLflow's pages, and its own server."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlflow

from pipelines.tracking.runs import reap
from pipelines.tracking.secrets import shown
from pipelines.tracking.store import prepare_store, told_at_once, tracking_uri
from pipelines.tracking.views import KEY, offer_view

_MODELS_MODE = "workflowType=machine_learning"  # of MLflow's page, which would open in its mode for chats
DEFAULT_PORT = 5000  # of `blemish ui`


@dataclass(frozen=True, slots=True)
class Pages:
    """Where an experiment's runs are shown: on the server's own page, or on the one that `blemish ui` serves."""

    base: str
    experiment_id: str

    def run(self, run_id: str) -> str:
        return f"{self.base}/#/experiments/{self.experiment_id}/runs/{run_id}?{_MODELS_MODE}"


def pages(project: Path, experiment: str) -> Pages:
    """The experiment is made if it is not there yet.

    Raises:
        StageError: the store cannot be used.
    """
    uri, experiment_id = prepare_store(project, experiment)
    return Pages(_base(uri, DEFAULT_PORT), experiment_id)


def page_of(project: Path, experiment: str, port: int, figures: Sequence[str]) -> str:
    """The address of the experiment's runs with their `figures`: the server's, or of the page that `serve` shows.

    The experiment is made if it is not there yet, and runs of dead processes are marked.

    Raises:
        StageError: the store cannot be used.
    """
    uri, experiment_id = prepare_store(project, experiment)
    with told_at_once(uri):
        client = mlflow.MlflowClient(uri)
        reap(client, experiment_id)
        view = f"&viewStateShareKey={KEY}" if offer_view(client, experiment_id, figures) else ""
    return f"{_base(uri, port)}/#/experiments/{experiment_id}/runs?{_MODELS_MODE}{view}"


def serve(project: Path, port: int) -> None:
    """Replace this process by MLflow's own server on this machine's loopback address.

    Where the runs are on a server, it has its own page, and nothing is done.
    """
    uri = tracking_uri(project)
    if uri.startswith("http"):
        return
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # seven more processes that nothing here uses
    os.environ["MLFLOW_BACKEND_STORE_URI"] = uri  # as an argument, every user of this machine could read its password
    arguments = ["-m", "mlflow", "ui", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    os.execv(sys.executable, [sys.executable, *arguments])


def _base(uri: str, port: int) -> str:
    return shown(uri).rstrip("/") if uri.startswith("http") else f"http://127.0.0.1:{port}"
