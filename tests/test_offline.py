"""That nothing can be reached where tests/test_own_folder.py goes its whole way, from a folder to a report."""

import subprocess
import sys

import pytest
from isolated import isolated


@pytest.mark.parametrize("address", ["127.0.0.1", "192.0.2.1"])
def test_nothing_can_be_reached(address: str) -> None:
    if not isolated():
        pytest.skip("this machine permits no network namespace")
    connect = f"import socket; socket.create_connection(('{address}', 80), timeout=5)"
    tried = subprocess.run([*isolated(), sys.executable, "-c", connect], capture_output=True, text=True, check=False)
    assert "Network is unreachable" in tried.stderr
