"""`blemish watch` on a backlog: pictures a second, memory, and what it takes to look through a folder where they stay.

Run `python benchmarks/watch.py BUNDLE FOLDER_OF_PICTURES [PICTURES]`. They are copied under new names.
"""

import itertools
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from pipelines.inference.proven import Proven
from pipelines.inference.watch import Pace, watch


def main(bundle: Path, folder: Path, number: int = 2000) -> None:
    with tempfile.TemporaryDirectory() as name:
        camera, output = Path(name, "camera"), Path(name, "watched")
        camera.mkdir()
        pictures = itertools.cycle(sorted(folder.rglob("*.png")))
        for place, path in enumerate(itertools.islice(pictures, number)):
            shutil.copyfile(path, camera / f"{place:06}.png")
        proven = Proven(bundle, threads=1)
        for what in ("all", "again, nothing to do"):
            told: list[float] = []
            begun = time.perf_counter()
            watch(
                camera,
                proven,
                output,
                [],
                lambda _, told=told: told.append(time.perf_counter()),
                threading.Event(),
                pace=Pace(settle=0.0),
                once=True,
            )
            took = time.perf_counter() - begun
            memory = psutil.Process().memory_info().rss / 1e6
            print(f"{what}: {len(told)} of {number} pictures decided in {took:.1f} s, {memory:.0f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
