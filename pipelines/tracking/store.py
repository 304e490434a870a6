"""Where the store is, created once; its errors in one line.

The default store is one SQLite file in the project folder, named by its absolute path (a relative one would be made
anew inside every temporary copy of the project) and created once under a lock (several processes at once break it).
"""

import contextlib
import os
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import mlflow
from filelock import FileLock
from google.protobuf.json_format import ParseError
from mlflow.exceptions import MlflowException

from pipelines.errors import StageError
from pipelines.tracking import moved
from pipelines.tracking.database import begin, in_address, require_whole
from pipelines.tracking.secrets import shown, without_secrets
from pipelines.variables import set_for_now

_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # not chats, which MLflow assumes
_FIRST_ANSWER = "4"  # seconds that a server has for it, twice
# Of databases that a store may be in, by the name that Python imports: what to install.
_DRIVERS = {"psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary", "pymysql": "pymysql", "pyodbc": "pyodbc"}
_DRIVERS |= {"MySQLdb": "mysqlclient"}
RUNS_PER_CALL = 1000  # MLflow's limit for one answer
STORE_ERRORS = (MlflowException, ParseError, sqlite3.Error)  # the second: JSON of another kind than MLflow's own


def tracking_uri(project: Path) -> str:
    return os.environ.get("MLFLOW_TRACKING_URI") or local_uri(project)


def local_uri(project: Path) -> str:
    return _address(database(project))


def _address(database: Path) -> str:
    address = in_address(database)
    # MLflow makes a folder of the address as it is written, unless it names the driver.
    return f"sqlite:///{address}" if address == str(database) else f"sqlite+pysqlite:///{address}"


def database(project: Path) -> Path:
    return project.resolve() / "mlflow.db"


def bring_along(project: Path) -> None:
    """Before the project's own store is read: its artifacts lie in the folder that the project has now.

    Raises:
        StageError: the database cannot be used.
    """
    uri = tracking_uri(project)
    if uri == local_uri(project) and database(project).exists():
        with errors_told(uri):
            require_whole(database(project))
            moved.bring_along(project, database(project))


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
    except ModuleNotFoundError as error:
        if error.name not in _DRIVERS:
            raise
        raise StageError(
            f"tracking store {shown(uri)}: the package that reaches it is missing; `pip install {_DRIVERS[error.name]}`"
        ) from None


@contextlib.contextmanager
def told_at_once(uri: str) -> Iterator[None]:
    """A server that does not answer is asked twice, not for minutes as where hours of training would be lost."""
    with set_for_now(MLFLOW_HTTP_REQUEST_MAX_RETRIES="1"), errors_told(uri):
        yield


def require_answer(project: Path) -> None:
    """Ask a server whether it is there, so that nobody works for it in vain; a local store is not looked at.

    Raises:
        StageError: it has not answered within a quarter of a minute, or not as an MLflow server does.
    """
    uri = tracking_uri(project)
    if uri.startswith("http"):
        with asked_briefly(), errors_told(uri):
            mlflow.MlflowClient(uri).search_experiments(max_results=1)


def asked_briefly() -> contextlib.AbstractContextManager[None]:
    """A server that is away, or takes a call and says nothing, costs seconds."""
    return set_for_now(MLFLOW_HTTP_REQUEST_MAX_RETRIES="1", MLFLOW_HTTP_REQUEST_TIMEOUT=_FIRST_ANSWER)


# Of what SQLAlchemy says, what the database's driver said: "(sqlite3.OperationalError) disk I/O error"
_OF_DRIVER = re.compile(r"\(\w+(?:\.\w+)+\) (.+?)(?: \[SQL: | \(Background on this error |$)")
# What PostgreSQL, SQLite and MySQL say of a row that is there already
_ENTERED = re.compile("duplicate key value|UNIQUE constraint failed|Duplicate entry")
_NOT_WRITTEN = ("disk I/O error", "disk is full", "readonly database", "unable to open database file")


def unusable(uri: str, error: Exception) -> StageError:
    reason = " ".join(without_secrets(str(error)).split())
    if "Max retries exceeded" in reason:
        reason = "does not answer"
    elif found := _OF_DRIVER.search(reason):
        reason = found[1]
    remedy = "mend it, or check MLFLOW_TRACKING_URI"
    if any(told in reason for told in _NOT_WRITTEN):
        remedy = "free some space, or see to it that this user may write there, and run again"
    elif "database is locked" in reason:
        remedy = "another process has it: wait for it to end, and run again"
    elif isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError):
        remedy = "put a copy of it in place, or move it away and the next run begins another"
    return StageError(f"tracking store {shown(uri)}: {reason}; {remedy}")


def prepare_store(project: Path, experiment: str) -> tuple[str, str]:
    """Create the database and the experiment exactly once, however many processes ask; gives URI and experiment id."""
    uri = tracking_uri(project)
    if uri == local_uri(project):
        with errors_told(uri), FileLock(project / moved.LOCK):
            begin(database(project), make)
    bring_along(project)
    with errors_told(uri), FileLock(project / moved.LOCK):
        client = mlflow.MlflowClient(uri)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            remote = uri.startswith("http")  # a server has a place of its own for artifacts
            folder = None if remote else moved.artifact_root(project)
            try:
                return uri, client.create_experiment(experiment, folder, _EXPERIMENT_TAGS)
            except MlflowException as error:
                if not is_there_by_now(error):
                    raise
                found = client.get_experiment_by_name(experiment)
        if found is None or not found.experiment_id:
            raise MlflowException("it answers, but not as an MLflow server does")
    if found.lifecycle_stage == "deleted":
        raise StageError(
            f"experiment '{experiment}' is deleted in {shown(uri)}; restore it there (`mlflow experiments restore "
            f"--experiment-id {found.experiment_id}`), or change tracking.experiment in params.yaml"
        )
    return uri, str(found.experiment_id)


def is_there_by_now(error: MlflowException) -> bool:
    """Whether another process has entered at the same moment what was to be entered, which is found from now on."""
    return error.error_code == "RESOURCE_ALREADY_EXISTS" or bool(_ENTERED.search(str(error)))


def make(path: Path) -> None:
    """A database with MLflow's tables and its first experiment."""
    mlflow.MlflowClient(_address(path)).search_experiments(max_results=1)


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
        else:  # of two that lie in one another, MLflow takes it out for the inner one alone
            os.environ.pop("MLFLOW_TRACKING_URI", None)
