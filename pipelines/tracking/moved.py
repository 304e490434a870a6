"""Where the artifacts of the project's own store lie: MLflow keeps absolute addresses, and projects move."""

import sqlite3
from pathlib import Path

from filelock import FileLock

from pipelines.tracking.database import opened

LOCK = ".mlflow.lock"  # beside the database: whoever makes or changes what all its users share
_FOLDER = "mlartifacts"
# Every column of MLflow's tables that may hold the address of an artifact.
_COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def artifact_root(project: Path) -> str:
    return (project.resolve() / _FOLDER).as_uri()


def bring_along(project: Path, database: Path) -> None:
    """Let the store say that its artifacts lie in this project, if it was made in another folder.

    The project was moved, and there is nothing in the old place; or it was copied, and the original is not this
    project's to write to. Files are not touched: a copy made without its artifacts has none of its earlier runs.
    """
    with opened(database) as connection:
        if not _elsewhere(connection, artifact_root(project)):
            return
    with FileLock(project / LOCK), opened(database) as connection, connection:
        connection.execute("BEGIN IMMEDIATE")
        for old in _elsewhere(connection, artifact_root(project)):  # another process may have been first
            for table, column in _COLUMNS:
                if _has(connection, table, column):
                    _rewrite(connection, table, column, old, artifact_root(project))


def _elsewhere(connection: sqlite3.Connection, here: str) -> list[str]:
    """The roots of experiments that the pipeline made in another folder; one that a user put elsewhere stays there."""
    if not _has(connection, "experiments", "artifact_location"):
        return []
    query = (
        "SELECT DISTINCT artifact_location FROM experiments WHERE artifact_location LIKE ? AND artifact_location <> ?"
    )
    return [location for (location,) in connection.execute(query, (f"file:///%/{_FOLDER}", here))]


def _has(connection: sqlite3.Connection, table: str, column: str) -> bool:
    found = connection.execute("SELECT 1 FROM pragma_table_info(?) WHERE name = ?", (table, column))
    return found.fetchone() is not None


def _rewrite(connection: sqlite3.Connection, table: str, column: str, old: str, new: str) -> None:
    connection.execute(
        f"UPDATE {table} SET {column} = ? || substr({column}, ?) "  # noqa: S608  # names from the table above
        f"WHERE {column} = ? OR substr({column}, 1, ?) = ?",
        (new, len(old) + 1, old, len(old) + 1, f"{old}/"),
    )
