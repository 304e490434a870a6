"""Variables of the process's environment, which MLflow, DVC and Ray read."""

import contextlib
import os
from collections.abc import Iterator


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
