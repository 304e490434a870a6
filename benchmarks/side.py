"""One contender of a row of `bench.py`, in a process of its own: does its work each time that it is asked to.

    python -m benchmarks.side ROW CONTENDER FOLDER

Answers with a line of JSON: first its results and versions, then for each line that it reads the seconds of one more
time, by the clock and of processors (its children's, too), and the most memory that it has had until then.
"""

import json
import os
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.rows import Figures, row
from benchmarks.rows.streaming import highest

PACKAGES = ("torch", "onnxruntime", "numpy", "pillow", "anomalib")


def main(name: str, contender: str, folder: Path) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    loaded = row(name).contenders[contender].load(folder)
    print(json.dumps({"results": dict(loaded.results), "versions": versions()}), file=answers, flush=True)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), processor()
        done = loaded.act()
        answer = {"wall": time.perf_counter() - wall, "cpu": processor() - cpu, "megabytes": highest()}
        answer |= done if isinstance(done, Figures) else {}
        print(json.dumps(answer), file=answers, flush=True)


def processor() -> float:
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
