"""Bundles as they are used away from the project: run by Python alone, and served on loopback."""

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests
import uvicorn

from pipelines.inference.serve import Limits, application, configuration

LIMITS = Limits()
LONG = 30  # seconds that a request may take
# What a bundle may need of other people's packages, with what these themselves import.
ONLY = "flatbuffers google humanfriendly coloredlogs ml_dtypes mpmath numpy onnxruntime packaging PIL sympy"
# Put before the bundle's own start: nothing else can be imported, as where nothing else is installed.
ALONE = f"""
import runpy, sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        first = name.partition(".")[0]
        known = {{*sys.stdlib_module_names, *{ONLY.split()!r}, "pipelines", "anomaly_models"}}
        if first not in known and not first.startswith("_"):
            raise ModuleNotFoundError(f"No module named {{first!r}}", name=first)
sys.meta_path.insert(0, Nothing())
sys.argv = sys.argv[1:]
sys.path[0] = sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def play(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A bundle's verb in a Python that has nothing but what a bundle asks for, away from the project."""
    command = [sys.executable, "-c", ALONE, str(path), *arguments]
    return subprocess.run(command, cwd=path.parent, capture_output=True, text=True, check=False)


@contextlib.contextmanager
def running(*paths: Path, limits: Limits = LIMITS, token: str | None = None) -> Iterator[str]:
    """The address of a server of these bundles."""
    app = application(paths, limits, token, threads=1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        web = uvicorn.Server(configuration(app, "127.0.0.1", taken.getsockname()[1]))
        thread = threading.Thread(target=web.run, kwargs={"sockets": [taken]})
        thread.start()
        while not web.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{taken.getsockname()[1]}"
        finally:
            web.should_exit = True
            thread.join(LONG)
            assert not thread.is_alive()


def post(address: str, content: Any, **more: Any) -> requests.Response:
    return requests.post(f"{address}/predict", data=content, timeout=LONG, **more)
