"""Addresses of MLflow's pages, and its own server."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import mlflow

from pipelines.errors import StageError
from pipelines.tracking.runs import reap
from pipelines.tracking.secrets import shown
from pipelines.tracking.store import errors_told, prepare_store, tracking_uri

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
    base = shown(uri).rstrip("/") if uri.startswith("http") else f"http://127.0.0.1:{DEFAULT_PORT}"
    return Pages(base, experiment_id)


def page_of(project: Path, experiment: str, port: int) -> str:
    """The address of the experiment's runs on the page that `serve` shows, in MLflow's mode for models.

    The experiment is made if it is not there yet, and runs of dead processes are marked.

    Raises:
        StageError: the runs are on a server, which has its own page, or the store cannot be used.
    """
    _refuse_server(tracking_uri(project))
    uri, experiment_id = prepare_store(project, experiment)
    with errors_told(uri):
        reap(mlflow.MlflowClient(uri), experiment_id)
    return f"http://127.0.0.1:{port}/#/experiments/{experiment_id}/runs?{_MODELS_MODE}"


def serve(project: Path, port: int) -> None:
    """Replace this process by MLflow's own server on this machine's loopback address.

    Raises:
        StageError: the runs are on a server, which has its own page.
    """
    uri = tracking_uri(project)
    _refuse_server(uri)
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # seven more processes that nothing here uses
    os.environ["MLFLOW_BACKEND_STORE_URI"] = uri  # as an argument, every user of this machine could read its password
    arguments = ["-m", "mlflow", "ui", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    os.execv(sys.executable, [sys.executable, *arguments])


def _refuse_server(uri: str) -> None:
    if uri.startswith("http"):
        raise StageError(f"MLFLOW_TRACKING_URI is {shown(uri)}, a server with its own page: open it in a browser")
