"""What `deploy/` says of the servers is what the tests start."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
TEAM = ROOT / "deploy" / "team"


def test_the_server_has_the_versions_that_are_locked() -> None:
    locked = dict(re.findall(r"^([a-z-]+)==(\S+)", (ROOT / "requirements.lock").read_text(encoding="utf-8"), re.M))
    pinned = re.findall(r'"([a-z]+)(?:\[\w+\])?==([\d.]+)"', (TEAM / "Dockerfile").read_text(encoding="utf-8"))
    assert {name for name, _ in pinned} == {"mlflow", "psycopg"}
    assert all(locked[name] == found for name, found in pinned)


def test_mlflow_knows_what_is_asked_of_it() -> None:
    command = [sys.executable, "-m", "mlflow", "server", "--help"]
    known = set(re.findall(r"--[a-z-]+", subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    services = yaml.safe_load((TEAM / "compose.yaml").read_text(encoding="utf-8"))["services"]
    asked = [option.partition("=")[0] for option in services["mlflow"]["command"]]
    page = (TEAM / "README.md").read_text(encoding="utf-8")
    (typed,) = re.findall(r"^mlflow server (.*)$", page, re.M)
    asked += [word for word in shlex.split(typed) if word.startswith("--")]
    assert asked
    assert set(asked) <= known
    assert services["mlflow"]["environment"]["MLFLOW_BACKEND_STORE_URI"].startswith("postgresql+psycopg://")
    assert "127.0.0.1" in services["mlflow"]["ports"][0]
