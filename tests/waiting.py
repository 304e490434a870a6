"""Until another process or thread is so far."""

import subprocess
import time
from collections.abc import Callable
from typing import Any


def until(holds: Callable[[], object], seconds: float = 120, running: "subprocess.Popen[Any] | None" = None) -> None:
    """The process, if one is given, must not have ended by then.

    Raises:
        AssertionError: it has, or the time is up.
    """
    deadline = time.monotonic() + seconds
    while not holds():
        assert running is None or running.poll() is None, "it has ended"
        assert time.monotonic() < deadline, f"not so after {seconds:g} s"
        time.sleep(0.01)
