"""The README's three steps to a sixth model suffice: a copy of the project takes one, and its own suites accept it."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from clone import copy_project
from conftest import MeanColour, MeanColourConfig

HEADER = '''"""The mean colour of normal parts, as a sixth model."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from anomaly_models.base import AnomalyModel, Batch, Config, Prediction, Progress
from anomaly_models.common.scoring import highest, within


'''


def change(path: Path, pattern: str, replacement: str) -> None:
    text = path.read_text(encoding="utf-8")
    changed, count = re.subn(pattern, lambda _: replacement, text, count=1)
    assert count == 1, f"{path.name}: {pattern}"
    path.write_text(changed, encoding="utf-8")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The project with `mean_colour` added in three steps."""
    folders = ("anomaly_models", "pipelines", "tests", "presets", "pretrained")
    files = ("cli.py", "dvc.yaml", "params.yaml", "pyproject.toml", ".gitignore")
    root = copy_project(tmp_path / "project", *folders, *files)
    # 1: the file
    source = HEADER + inspect.getsource(MeanColourConfig) + "\n\n" + inspect.getsource(MeanColour)
    (root / "anomaly_models" / "mean_colour.py").write_text(source, encoding="utf-8")
    # 2: its place in MODELS
    table = root / "anomaly_models" / "__init__.py"
    place = '\n        "mean_colour": "anomaly_models.mean_colour:MeanColour",'
    change(table, r"(?<=MODELS = _Models\(\n    \{)", place)
    # 3: its section in params.yaml
    section = "\n  mean_colour:\n    image_size: 256\n    resize: bilinear\n    fit: stretch"
    section += "\n    tiles: null\n    batch_size: 4\n    steps: 2\n    learning_rate: 0.01"
    change(root / "params.yaml", r"(?<=\nmodels:)", section)
    return root


def run(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


def test_three_steps_make_a_sixth_model(copy: Path) -> None:
    checked = run(copy, "cli.py", "check")
    assert checked.returncode == 0, checked.stderr
    assert (copy / "pretrained" / "mean_colour").is_dir()  # DVC wants it to be there
    contract = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_contract.py", "-k", "mean_colour")
    asked = run(copy, *contract)
    assert "mean_colour is in MODELS, but tiny_models.SETTINGS has no smallest settings for it" in asked.stdout
    entry = (
        '"mean_colour": {"image_size": 64, "resize": "bilinear", "fit": "stretch", "tiles": None, '
        '"batch_size": 4, "steps": 3, "learning_rate": 0.1},'
    )
    change(copy / "tests" / "tiny_models.py", r"(?<=\nSETTINGS: dict\[str, dict\[str, Any\]\] = \{)", f"\n    {entry}")
    accepted = run(copy, *contract)
    assert accepted.returncode == 0, accepted.stdout
    number = re.search(r"(\d+) passed", accepted.stdout)
    assert number is not None
    assert int(number[1]) >= 12
