"""From nothing to a report and a prediction, in a network namespace with no route, where not even loopback is up."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from clone import commit, copy_project, environment
from conftest import CATEGORY, draw_category, tiny_params, write_params

# root needs no user namespace, which some machines forbid to everybody else
UNSHARE = ("unshare", "--net") if os.geteuid() == 0 else ("unshare", "--map-root-user", "--net")


def offline(*command: str, root: Path | None = None) -> "subprocess.CompletedProcess[str]":
    programs = environment(Path(sys.executable).parent)
    return subprocess.run([*UNSHARE, *command], cwd=root, env=programs, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module", autouse=True)
def no_route() -> None:
    try:
        done = offline("true")
    except FileNotFoundError:
        pytest.skip("no `unshare` here: it takes Linux")
    if done.returncode != 0:
        pytest.skip(f"this machine permits no network namespace: {done.stderr.strip()}")


@pytest.mark.parametrize("address", ["127.0.0.1", "192.0.2.1"])
def test_nothing_can_be_reached(address: str) -> None:
    tried = offline(sys.executable, "-c", f"import socket; socket.create_connection(('{address}', 80), timeout=5)")
    assert "Network is unreachable" in tried.stderr


def test_from_nothing_to_a_report_and_a_prediction(tmp_path: Path) -> None:
    code = ("anomaly_models", "pipelines", "pretrained", ".dvc", "cli.py", "dvc.yaml", ".dvcignore", ".gitignore")
    root = copy_project(tmp_path, *code)
    draw_category(root / "images" / CATEGORY, train=8, good=3, defect=3)
    write_params(root, tiny_params())
    commit(root)
    for command in (
        ("dvc", "repro"),
        ("python", "cli.py", "results"),
        ("python", "cli.py", "predict", f"exported/fapm/{CATEGORY}/model.onnx", f"images/{CATEGORY}/test"),
    ):
        done = offline(*command, root=root)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert (root / "reports" / "tests" / "report.html").stat().st_size > 10_000
    assert len((root / "predictions" / "predictions.csv").read_text().splitlines()) == 1 + 6
