"""Where the store is, created once; its errors in one line.

The default store is one SQLite file in the project folder, named by its absolute path (a relative one would be made
anew inside every temporary copy of the project) and created once under a lock (several processes at once break it).
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import mlflow
from filelock import FileLock
from google.protobuf.json_format import ParseError
from mlflow.exceptions import MlflowException

from pipelines.errors import StageError
from pipelines.tracking.secrets import shown, without_secrets

_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # not chats, which MLflow assumes
RUNS_PER_CALL = 1000  # MLflow's limit for one answer
STORE_ERRORS = (MlflowException, ParseError)  # the second: JSON of another kind than MLflow's own


def tracking_uri(project: Path) -> str:
    return os.environ.get("MLFLOW_TRACKING_URI") or local_uri(project)


def local_uri(project: Path) -> str:
    return f"sqlite:///{project.resolve() / 'mlflow.db'}"


@contextlib.contextmanager
def errors_told(uri: str) -> Iterator[None]:
    """Whatever the store refuses becomes one line, without the password that may stand in its address.

    Raises:
        StageError: the store cannot be used.
    """
    try:
        yield
    except STORE_ERRORS as error:
        raise unusable(uri, error) from None  # whose own text has the address as it is


@contextlib.contextmanager
def told_at_once(uri: str) -> Iterator[None]:
    """A server that does not answer is asked twice, not for minutes as where hours of training would be lost."""
    before = os.environ.get("MLFLOW_HTTP_REQUEST_MAX_RETRIES")
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "1"
    try:
        with errors_told(uri):
            yield
    finally:
        if before is None:
            del os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"]
        else:
            os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = before


def unusable(uri: str, error: Exception) -> StageError:
    reason = (
        "does not answer" if "Max retries exceeded" in str(error) else " ".join(without_secrets(str(error)).split())
    )
    return StageError(f"tracking store {shown(uri)}: {reason}; mend it, or check MLFLOW_TRACKING_URI")


def prepare_store(project: Path, experiment: str) -> tuple[str, str]:
    """Create the database and the experiment exactly once, however many processes ask; gives URI and experiment id."""
    uri = tracking_uri(project)
    with errors_told(uri), FileLock(project / ".mlflow.lock"):
        client = mlflow.MlflowClient(uri)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            remote = uri.startswith("http")  # a server has a place of its own for artifacts
            folder = None if remote else (project.resolve() / "mlartifacts").as_uri()
            return uri, client.create_experiment(experiment, folder, _EXPERIMENT_TAGS)
        if not found.experiment_id:
            raise MlflowException("it answers, but not as an MLflow server does")
    if found.lifecycle_stage == "deleted":
        raise StageError(
            f"experiment '{experiment}' is deleted in {shown(uri)}; restore it there (`mlflow experiments restore "
            f"--experiment-id {found.experiment_id}`), or change tracking.experiment in params.yaml"
        )
    return uri, str(found.experiment_id)


def is_known(client: mlflow.MlflowClient, run_id: str) -> bool:
    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")  # a deleted run takes nothing more
    except MlflowException:
        return False


@contextlib.contextmanager
def used_by_mlflow(uri: str) -> Iterator[None]:
    """MLflow puts the URI it is to use into the environment, where another project in this process would find it."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(None)  # type: ignore[arg-type]  # its annotation forgets what its code allows
        if before is not None:
            os.environ["MLFLOW_TRACKING_URI"] = before
