"""What a worker knows of a cell: what it depends on, what of it is done, where it is worked on."""

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.errors import StageError
from pipelines.paths import Cell, Project
from pipelines.sweeps import worker
from pipelines.sweeps.worker import FOLDER, Done, fingerprint, results_of, stages_done

FILES = (
    "checked/models/fapm.txt",
    "checked/tests/fapm.txt",
    "checked/stages/train.txt",
    "checked/stages/evaluate.txt",
    "checked/stages/export.txt",
    "data/prepared/nut/index.json",
    "data/prepared/nut/seen_by/fapm.json",
    "pretrained/fapm/teacher/teacher.safetensors",
)
STAGES = ["train@fapm-nut-0", "evaluate@fapm-nut-0", "export@fapm-nut"]


def written(root: Path, name: str, text: str = "") -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text, encoding="utf-8")


@pytest.fixture
def cell(tmp_path: Path) -> Cell:
    for name in FILES:
        written(tmp_path, name)
    return Project(tmp_path).cell("fapm", "nut", 0)


def test_a_cell_depends_on_each_of_these_and_on_no_other(cell: Cell) -> None:
    project = Project(cell.root)
    seen = {fingerprint(project, cell, {})}
    for name in FILES:
        written(cell.root, name, "changed")
        seen.add(fingerprint(project, cell, {}))
    assert len(seen) == 1 + len(FILES)
    for name in ("checked/models/bgad.txt", "data/prepared/hook/index.json", "checked/stages/report.txt"):
        written(cell.root, name)
    assert fingerprint(project, cell, {}) in seen


def test_files_are_read_once(cell: Cell) -> None:
    sums: dict[Path, str] = {}
    first = fingerprint(Project(cell.root), cell, sums)
    written(cell.root, FILES[0], "changed")
    assert fingerprint(Project(cell.root), cell, sums) == first


def test_what_is_done_is_so_for_the_same_and_while_it_is_there(cell: Cell) -> None:
    assert stages_done(cell, "a") == []
    Done(fingerprint="a", stages=STAGES).save(cell.done)
    assert stages_done(cell, "a") == []  # nothing of it is there
    for path in (cell.weights, cell.evaluation, cell.onnx):
        written(cell.root, path.relative_to(cell.root).as_posix())
    assert stages_done(cell, "a") == STAGES
    assert stages_done(cell, "b") == []
    cell.evaluation.unlink()
    assert stages_done(cell, "a") == [STAGES[0], STAGES[2]]


def test_what_stages_write_is_told_from_the_project(cell: Cell) -> None:
    assert list(results_of(cell, STAGES)) == [
        "models/fapm/nut/seed0.trained",
        "evaluations/fapm/nut/seed0",
        "metrics/fapm/nut/seed0.json",
        "exported/fapm/nut",
    ]


def task(root: Path, sign: str) -> Any:
    return SimpleNamespace(project=root, sign=sign, params=pickle.dumps(None), environment={})


def test_a_disk_is_known_by_the_sign_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER, raising=False)
    written(tmp_path, "work/.sweep-1", "work/.sweep-1")
    written(tmp_path, "work/.sweep-2", "of another project")
    assert worker._shared_place(task(tmp_path, "work/.sweep-1")) == tmp_path
    assert worker._shared_place(task(tmp_path, "work/.sweep-2")) is None
    assert worker._shared_place(task(tmp_path, "work/.sweep-3")) is None
    monkeypatch.setenv(FOLDER, str(tmp_path / "own"))
    assert worker._shared_place(task(tmp_path, "work/.sweep-1")) is None
    assert worker._own_place(task(tmp_path, "work/.sweep-1")).parent == tmp_path / "own"
    assert worker._own_place(task(tmp_path, "")) != worker._own_place(task(tmp_path / "other", ""))


def test_runs_are_not_kept_where_nobody_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    with pytest.raises(StageError, match="shares no disk with the project, and MLFLOW_TRACKING_URI names no server"):
        worker.work(task(tmp_path, ""), lambda piece: piece)
