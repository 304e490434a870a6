"""Variables of the process's environment, which MLflow, DVC and Ray read."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def set_for_now(**variables: str) -> Iterator[None]:
    """With these, for a while."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def python_path(first: Path) -> str:
    """PYTHONPATH as it is, with a folder before it; an empty entry would be the folder that a process is begun in."""
    return os.pathsep.join(filter(None, [str(first), os.environ.get("PYTHONPATH")]))
