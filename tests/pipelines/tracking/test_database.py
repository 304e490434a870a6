"""The project's own store is begun whole or not at all; what is damaged is told in a line."""

import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException

from pipelines.errors import StageError
from pipelines.tracking.database import begin, require_whole
from pipelines.tracking.store import bring_along, errors_told, prepare_store, unusable

BEGINS = "import sys; from pathlib import Path; from pipelines.tracking.store import prepare_store; "
BEGINS += "print('begins', flush=True); prepare_store(Path(sys.argv[1]), 'tests')"
NAMES = ("experiments", "runs", "params", "metrics", "latest_metrics", "tags")


def write(path: Path, *statements: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def make(path: Path) -> None:
    write(path, *(f"CREATE TABLE {name} (name TEXT)" for name in NAMES), "INSERT INTO experiments VALUES ('Default')")
    write(path, *(f"INSERT INTO tags VALUES ('{number:040}')" for number in range(500)))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "mlflow.db"


def test_a_store_is_begun_whole(path: Path) -> None:
    begin(path, make)
    require_whole(path)
    before = path.read_bytes()
    begin(path, make)  # there is one
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_store_that_could_not_be_begun_leaves_nothing(path: Path) -> None:
    def fail(made: Path) -> None:
        make(made)
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        begin(path, fail)
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("statements", [(), ("CREATE TABLE experiments (name TEXT)",), ("CREATE TABLE a (b TEXT)",)])
def test_a_half_made_store_is_set_aside(
    path: Path, caplog: pytest.LogCaptureFixture, statements: tuple[str, ...]
) -> None:
    path.touch()
    write(path, *statements)
    before = path.read_bytes()
    begin(path, make)
    require_whole(path)
    assert (path.parent / "mlflow.db.half-made").read_bytes() == before
    assert caplog.messages == [
        f"{path}: begun and never finished; it is now mlflow.db.half-made, and a new one is made"
    ]


@pytest.mark.parametrize("share", [0.0003, 0.01, 0.3])
def test_damage_is_told_in_a_line(path: Path, share: float) -> None:
    begin(path, make)
    whole, found = path.read_bytes(), list[str]()
    for seed in range(30):
        rng, content = random.Random(seed), bytearray(whole)
        for _ in range(max(1, round(share * len(content)))):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content)
        try:
            bring_along(path.parent)
        except StageError as error:
            found.append(str(error))
    assert len(found) >= (30 if share > 0.001 else 1)
    assert all(line.startswith(f"tracking store sqlite:///{path}: ") and "\n" not in line for line in found)


@pytest.mark.parametrize("size", [0, 100, 5_000])
def test_half_a_store_is_told_in_a_line(path: Path, size: int) -> None:
    begin(path, make)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(
        StageError, match=r"; put a copy of it in place, or move it away and the next run begins another$"
    ):
        bring_along(path.parent)


@pytest.mark.parametrize("name", NAMES)
def test_a_table_that_is_missing_is_named(path: Path, name: str) -> None:
    begin(path, make)
    write(path, f"DROP TABLE {name}")
    with pytest.raises(StageError, match=rf"damaged \(no table {name}\)"):
        bring_along(path.parent)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL on Windows")
def test_a_kill_while_the_store_is_begun(tmp_path: Path) -> None:
    for seconds in (0.3, 1.2, 2.0):
        child = subprocess.Popen([sys.executable, "-c", BEGINS, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        assert child.stdout.readline() == "begins\n"
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
    prepare_store(tmp_path, "tests")
    require_whole(tmp_path / "mlflow.db")
    assert not list(tmp_path.glob("*half-made"))


@pytest.mark.parametrize(("module", "package"), [("psycopg", "psycopg[binary]"), ("MySQLdb", "mysqlclient")])
def test_a_driver_that_is_missing_is_named(module: str, package: str) -> None:
    with pytest.raises(StageError) as caught, errors_told("postgresql://me:secret@host/runs"):
        raise ModuleNotFoundError(f"No module named '{module}'", name=module)
    assert str(caught.value).endswith(f"the package that reaches it is missing; `pip install {package}`")
    assert "secret" not in str(caught.value)


def test_other_modules_that_are_missing_are_our_own_fault() -> None:
    with pytest.raises(ModuleNotFoundError), errors_told("sqlite:///x"):
        raise ModuleNotFoundError("No module named 'x'", name="x")


def test_a_store_that_cannot_be_written_is_told_with_the_remedy(tmp_path: Path) -> None:
    """A limit on the size of a file is to SQLite what a full disk is; MLflow says 90 lines about it."""
    code = """
import resource, sys
from pathlib import Path
from pipelines.errors import StageError
from pipelines.tracking.runs import open_run
from pipelines.tracking.store import prepare_store
root = Path(sys.argv[1])
prepare_store(root, "tests")
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with open_run(root, "tests", "name", {"model": "m"}, None):
        pass
except StageError as error:
    sys.exit(str(error))
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False)
    remedy = "free some space, or see to it that this user may write there, and run again"
    assert done.stderr == f"tracking store sqlite:///{tmp_path / 'mlflow.db'}: disk I/O error; {remedy}\n"


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("(sqlite3.OperationalError) database is locked [SQL: SELECT 1] (Background on this error at: x)", "another"),
        ("(sqlite3.OperationalError) attempt to write a readonly database\n[SQL: INSERT]", "free some space"),
        ("(psycopg2.errors.DiskFull) could not extend file: no space\n(Background on this error at: x)", "mend it"),
    ],
)
def test_of_what_sqlalchemy_says_the_drivers_words_are_told(told: str, expected: str) -> None:
    message = str(unusable("sqlite:///mlflow.db", MlflowException(told)))
    assert expected in message
    assert "SQL:" not in message
    assert "Background" not in message
    assert "Error)" not in message
