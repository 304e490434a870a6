"""A network namespace with no route, where not even loopback is up: what runs there reaches nothing."""

import functools
import os
import subprocess
import sys


@functools.cache
def isolated() -> tuple[str, ...]:
    """What stands before a command that is to run there; nothing, where this machine permits no such namespace."""
    if sys.platform != "linux":
        return ()
    # root needs no user namespace, which some machines forbid to everybody else
    words = ("unshare", "--net") if os.geteuid() == 0 else ("unshare", "--map-root-user", "--net")
    try:
        done = subprocess.run([*words, "true"], capture_output=True, check=False)
    except FileNotFoundError:
        return ()
    return words if done.returncode == 0 else ()
