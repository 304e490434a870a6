"""How long the verbs that read the tracking store take where it has thousands of runs.

Run `python benchmarks/large_store.py PROJECT [RUNS]` on a project whose `dvc repro` is done. It is copied; in the
copy's SQLite store the first evaluated run is there again and again under other ids, as years of trials would leave
it, but for its curves, which these verbs do not read.
"""

import contextlib
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

VERBS = ("results", "compare", "report")


def multiply(path: Path, runs: int) -> None:
    """Let the store hold so many runs."""
    with contextlib.closing(sqlite3.connect(path)) as store, store:
        tables = {}
        for (table,) in store.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            columns = [row[1] for row in store.execute(f"PRAGMA table_info({table})")]
            if "run_uuid" in columns and table != "metrics":
                tables[table] = columns
        (first,) = store.execute("SELECT run_uuid FROM latest_metrics WHERE key = 'threshold' LIMIT 1").fetchone()
        (there,) = store.execute("SELECT count(*) FROM runs").fetchone()
        for _ in range(runs - there):
            new = uuid.uuid4().hex
            for table, columns in tables.items():
                taken = ", ".join("?" if column == "run_uuid" else column for column in columns)
                store.execute(
                    f"INSERT INTO {table} ({', '.join(columns)}) SELECT {taken} FROM {table} WHERE run_uuid = ?",
                    (new, first),
                )


def main(project: Path, runs: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        shutil.copytree(project, copy, symlinks=True, ignore=shutil.ignore_patterns(".venv", ".git", ".dvc"))
        multiply(copy / "mlflow.db", runs)
        print(f"{runs} runs, {(copy / 'mlflow.db').stat().st_size / 1e6:.0f} MB")
        for verb in VERBS:
            started = time.perf_counter()
            subprocess.run([sys.executable, "cli.py", verb], cwd=copy, check=True, stdout=subprocess.DEVNULL)
            print(f"{verb}: {time.perf_counter() - started:.1f} s, the start of Python and its imports included")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if sys.argv[2:] else 5000)
