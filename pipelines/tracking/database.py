"""The project's own store, an SQLite file: begun whole or not at all, and looked at before it is used."""

import contextlib
import functools
import logging
import math
import re
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pipelines.files import atomic_file

_LOG = logging.getLogger(__name__)  # whose warnings Python writes to stderr as they are, if nobody asked otherwise
_WAIT = 60.0  # seconds for another process that is writing
_TABLES = {"experiments", "runs", "params", "metrics", "latest_metrics", "tags"}  # without which nothing can be read


@contextlib.contextmanager
def opened(path: Path) -> Iterator[sqlite3.Connection]:
    """Raises sqlite3.Error, also where bytes are damaged that were text."""
    connection = sqlite3.connect(path, timeout=_WAIT, isolation_level=None)
    try:
        yield connection
    except UnicodeDecodeError as error:
        raise sqlite3.DatabaseError(f"damaged ({error.reason})") from None
    finally:
        connection.close()


def in_address(path: Path) -> str:
    """A path as it stands in an address of SQLAlchemy's, where these marks mean something; braces do to Optuna."""
    return re.sub("[%?#{}]", lambda mark: quote(mark[0]), str(path))


def begin(path: Path, make: Callable[[Path], None]) -> None:
    """Let `make` write a database elsewhere, for seconds, and put it in place whole.

    What a process left that was killed while it made one in place, as earlier versions did, is set aside. Call it under
    the lock of the store.
    """
    if path.exists():
        if not _is_half_made(path):
            return
        aside = path.with_name(f"{path.name}.half-made")
        path.replace(aside)
        _LOG.warning("%s: begun and never finished; it is now %s, and a new one is made", path, aside.name)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, atomic_file(path) as temporary:
        made = Path(folder) / path.name
        make(made)
        with opened(made) as source, opened(temporary) as target:
            source.backup(target)


def require_whole(path: Path) -> None:
    """Raise sqlite3.DatabaseError if pages are damaged, or tables are missing; a file is looked at once a process."""
    _require_whole(path, path.stat().st_ino)


@functools.cache  # of hundreds of megabytes it takes a quarter of a second, and a verb opens its store several times
def _require_whole(path: Path, _inode: int) -> None:
    with opened(path) as connection:
        (found,) = _first(connection, "PRAGMA quick_check(1)")
        if found != "ok":
            raise sqlite3.DatabaseError(f"damaged ({' '.join(str(found).split())})")
        if missing := _TABLES - _tables(connection):
            raise sqlite3.DatabaseError(f"damaged (no table {', '.join(sorted(missing))})")


@dataclass(frozen=True, slots=True)
class StoredRun:
    """What MLflow keeps of a run, but for its history and its files."""

    run_id: str
    started: int  # milliseconds since 1970
    params: dict[str, str]
    metrics: dict[str, float]  # the last value of each
    tags: dict[str, str]


def finished_runs(path: Path, experiment_id: str) -> list[StoredRun]:
    """The finished runs of an experiment, as MLflow's client gives them, which takes much longer for thousands.

    Raises:
        sqlite3.Error: the store cannot be read.
    """
    finished = "FROM runs WHERE experiment_id = ? AND status = 'FINISHED' AND lifecycle_stage = 'active'"
    with opened(path) as connection:
        connection.execute("BEGIN")  # all of one moment
        newest_first = f"SELECT run_uuid, start_time {finished} ORDER BY start_time DESC, run_uuid"
        found = {run: StoredRun(run, at, {}, {}, {}) for run, at in connection.execute(newest_first, (experiment_id,))}

        def rows(query: str) -> Iterator[tuple[Any, ...]]:
            return connection.execute(f"{query} WHERE run_uuid IN (SELECT run_uuid {finished})", (experiment_id,))

        for run_id, key, value in rows("SELECT run_uuid, key, value FROM params"):
            found[run_id].params[key] = value
        for run_id, key, value in rows("SELECT run_uuid, key, value FROM tags"):
            found[run_id].tags[key] = value
        for run_id, key, value, is_nan in rows("SELECT run_uuid, key, value, is_nan FROM latest_metrics"):
            found[run_id].metrics[key] = math.nan if is_nan else value
    return list(found.values())


def _is_half_made(path: Path) -> bool:
    """Whether there is no experiment in it: MLflow writes the first one last, when all tables are there."""
    with opened(path) as connection:
        return "experiments" not in _tables(connection) or _first(connection, "SELECT 1 FROM experiments") is None


def _first(connection: sqlite3.Connection, query: str) -> Any:
    return connection.execute(query).fetchone()


def _tables(connection: sqlite3.Connection) -> set[str]:
    return {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
