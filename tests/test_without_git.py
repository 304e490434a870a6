"""The project as GitHub's "Download ZIP" gives it, without `.git`: DVC works there as in a clone."""

import subprocess
import sys
from pathlib import Path

import pytest
from clone import commit, copy_project, environment
from conftest import CATEGORY, draw_category, tiny_params, write_params


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folders = ("anomaly_models", "pipelines", "pretrained", ".dvc")
    files = ("cli.py", "dvc.yaml", "Makefile", "pyproject.toml", "requirements.lock", ".dvcignore", ".gitignore")
    root = copy_project(tmp_path / "blemish-main", *folders, *files)
    (root / ".venv" / "bin").mkdir(parents=True)
    (root / ".venv" / "bin" / "dvc").symlink_to(Path(sys.executable).parent / "dvc")
    (root / ".venv" / ".installed").touch()
    draw_category(root / "images" / CATEGORY, train=8, good=3, defect=3)
    write_params(root, tiny_params())
    return root


def run(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    env = environment(Path(sys.executable).parent, DVC_NO_ANALYTICS="true")
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)


def test_a_downloaded_zip(root: Path) -> None:
    refused = run(root, "dvc", "status")
    assert "is not a git repository" in refused.stderr  # what `make setup` mends
    assert run(root, "make", "setup").returncode == 0
    prepared = run(root, "dvc", "repro", f"prepare@{CATEGORY}")
    assert prepared.returncode == 0, prepared.stderr
    assert (root / "data" / "prepared" / CATEGORY / "index.json").is_file()
    assert "up to date" in run(root, "dvc", "status", f"prepare@{CATEGORY}").stdout


def test_what_the_user_set_stays(root: Path) -> None:
    mine = "[core]\n    no_scm = false\n"
    (root / ".dvc" / "config.local").write_text(mine)
    assert run(root, "make", "setup").returncode == 0
    assert (root / ".dvc" / "config.local").read_text() == mine


def test_a_clone_is_told_nothing(root: Path) -> None:
    commit(root)
    assert run(root, "make", "setup").returncode == 0
    assert not (root / ".dvc" / "config.local").exists()
    assert run(root, "dvc", "status").returncode == 0
