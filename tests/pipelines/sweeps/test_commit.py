"""Many stages taken as done at once, as `dvc commit --force` takes each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipelines.errors import StageError
from pipelines.paths import Project
from pipelines.sweeps.processes import Processes

NAMES = [f"copy@{name}" for name in "abc"]
PIPELINE = {
    "stages": {
        "copy": {
            "foreach": ["a", "b", "c"],
            "do": {"cmd": "false", "deps": ["source"], "params": ["one.${item}"], "outs": ["made/${item}"]},
        },
        "later": {"cmd": "false", "deps": ["made/a"], "outs": ["later"]},
    }
}


def dvc(root: Path, *arguments: str) -> None:
    environment = os.environ | {"DVC_NO_ANALYTICS": "true"}
    subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=root, env=environment, check=True)


@pytest.fixture(params=["plain", "a b #1"])
def project(tmp_path: Path, request: pytest.FixtureRequest) -> Project:
    root = tmp_path / request.param
    root.mkdir()
    dvc(root, "init", "--no-scm", "--quiet")
    (root / "dvc.yaml").write_text(yaml.safe_dump(PIPELINE))
    (root / "params.yaml").write_text("one: {a: 1, b: [2], c: {d: 3}}")
    (root / "source").write_text("from")
    (root / "later").write_text("to")
    for name in "abc":
        (root / "made" / name).mkdir(parents=True)
        (root / "made" / name / "file").write_text(name)
    return Project(root)


def test_it_is_what_dvc_writes_down(project: Project) -> None:
    lock = project.root / "dvc.lock"
    dvc(project.root, "commit", "--force", "--quiet", *NAMES)
    expected, _ = lock.read_text(), lock.unlink()
    assert {"md5", "one.c", "made/c"} <= set(expected.replace(":", " ").split())
    with Processes(project) as processes:
        processes.commit(NAMES)
    assert lock.read_text() == expected


def test_what_is_not_there_is_told_and_nothing_written(project: Project) -> None:
    (project.root / "made" / "b" / "file").unlink()
    (project.root / "made" / "b").rmdir()
    with Processes(project) as processes, pytest.raises(StageError, match=r"output 'made/b' does not exist"):
        processes.commit(NAMES)
    assert not (project.root / "dvc.lock").exists()
