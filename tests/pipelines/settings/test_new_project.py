"""What `blemish init` writes, beside what the repository has."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from anomaly_models import MODELS
from pipelines.errors import ParamsError, StageError
from pipelines.files import file_sha256
from pipelines.lineage import ROOT
from pipelines.paths import Project
from pipelines.preview.check import load_checked, write_checked
from pipelines.settings import new_project
from pipelines.settings.new_project import begin, dvc_yaml, write_code
from pipelines.settings.presets import PRESETS

OURS: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
MADE: dict[str, dict[str, Any]] = yaml.safe_load(dvc_yaml())
CODE, TOLD = ("anomaly_models/", "pipelines/"), "checked/code/"


def without(stage: dict[str, Any], *beginnings: str) -> dict[str, Any]:
    """A stage that depends on none of these, does not say how it is called, nor whether it runs always."""
    kept = [dep for dep in stage["deps"] if not dep.startswith(beginnings)]
    return {key: value for key, value in stage.items() if key not in ("cmd", "always_changed")} | {"deps": kept}


def test_the_stages_are_the_repositorys_but_for_code_and_command() -> None:
    assert list(MADE["stages"]) == list(OURS["stages"])
    assert {key: value for key, value in MADE.items() if key != "stages"} == {
        key: value for key, value in OURS.items() if key != "stages"
    }
    for name, stage in MADE["stages"].items():
        assert without(stage, TOLD) == without(OURS["stages"][name], *CODE), name
        assert stage["cmd"] == OURS["stages"][name]["cmd"].replace("python cli.py", "blemish")
    assert [name for name, stage in MADE["stages"].items() if "always_changed" in stage] == ["check"]
    assert "cli.py" not in dvc_yaml()


@pytest.mark.parametrize("model", MODELS)
def test_what_check_tells_of_the_code_is_what_the_repositorys_stages_depend_on(tmp_path: Path, model: str) -> None:
    write_code(tmp_path / "code")
    for name, stage in MADE["stages"].items():
        told = [dep.removeprefix(TOLD).replace("${item.model}", model) for dep in stage["deps"] if TOLD in dep]
        lines = [line for file in told for line in (tmp_path / "code" / file).read_text().splitlines()]
        named = [ROOT / dep.replace("${item.model}", model) for dep in OURS["stages"][name]["deps"] if CODE[1] in dep]
        named += [ROOT / dep.replace("${item.model}", model) for dep in OURS["stages"][name]["deps"] if CODE[0] in dep]
        files = {file for path in named for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()}
        files = {file for file in files if file.suffix != ".pyc"}
        assert set(lines) == {f"{file_sha256(file)}  {file.relative_to(ROOT).as_posix()}" for file in files}, name


@pytest.fixture
def other_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Blemish, to be changed."""
    root = tmp_path / "other"
    for name in ("anomaly_models", "pipelines"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(new_project, "ROOT", root)
    return root


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ("anomaly_models/fapm.py", {"models/fapm.txt"}),
        ("pipelines/report/templates/report.css", {"report.txt"}),
        ("pipelines/teachers/distill.py", {"distill.txt"}),
        ("pipelines/deployment/records.py", {"export.txt", "latency.txt", "report.txt"}),
        ("pipelines/settings/presets.py", set()),
    ],
)
def test_only_what_depends_on_changed_code_is_told_of(
    tmp_path: Path, other_version: Path, changed: str, told: set[str]
) -> None:
    write_code(tmp_path / "before")
    with (other_version / changed).open("a", encoding="utf-8") as file:
        file.write("\n")
    write_code(tmp_path / "after")
    files = [path.relative_to(tmp_path / "after") for path in (tmp_path / "after").rglob("*.txt")]
    differing = [
        path for path in files if (tmp_path / "before" / path).read_text() != (tmp_path / "after" / path).read_text()
    ]
    assert {path.as_posix() for path in differing} == told


def test_check_tells_of_the_code_only_where_it_lies_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = load_checked(PRESETS / "demo.yaml")
    write_checked(params, Project(tmp_path))
    assert (tmp_path / "checked" / "code" / "train.txt").is_file()
    monkeypatch.setattr(new_project, "ROOT", tmp_path)
    write_checked(params, Project(tmp_path))
    assert not (tmp_path / "checked" / "code").exists()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "project").mkdir()
    return tmp_path / "project"


def files_in(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_an_empty_folder_becomes_a_project(folder: Path) -> None:
    assert list(begin(Project(folder), None, force=False)) == [
        "params.yaml: preset demo",
        "dvc.yaml: the stages, which call the installed `blemish`",
        ".gitignore: what the pipeline makes",
        ".dvcignore: what the pipeline makes",
        ".dvc: DVC without Git, since there is none; after `git init`, delete .dvc/config.local",
    ]
    found = files_in(folder)
    assert found.pop("dvc.yaml") == dvc_yaml()
    assert found.pop("params.yaml") == (PRESETS / "demo.yaml").read_text(encoding="utf-8")
    assert "no_scm = true" in found.pop(".dvc/config.local")
    assert found == {
        name: (ROOT / name).read_text() for name in (".gitignore", ".dvcignore", ".dvc/.gitignore", ".dvc/config")
    }


def test_beside_git_dvc_is_told_nothing(folder: Path) -> None:
    (folder.parent / ".git").mkdir()
    assert list(begin(Project(folder), "solar", force=False))[-1] == ".dvc: DVC, beside Git"
    assert (folder / "params.yaml").read_bytes() == (PRESETS / "solar.yaml").read_bytes()
    assert not (folder / ".dvc" / "config.local").exists()


def test_what_is_there_stays(folder: Path) -> None:
    (folder / "params.yaml").write_text("mine: 1\n")
    (folder / ".gitignore").write_text("/mine/\n")
    (folder / ".dvc").mkdir()
    list(begin(Project(folder), None, force=False))
    before = files_in(folder)
    assert before["params.yaml"] == "mine: 1\n"
    assert before[".gitignore"].startswith("/mine/\n\n# Made by the pipeline")
    assert not list((folder / ".dvc").iterdir())
    assert list(begin(Project(folder), None, force=False)) == [
        "dvc.yaml: the stages, which call the installed `blemish`"
    ]
    assert files_in(folder) == before


def test_what_another_version_ignores_comes_below(folder: Path) -> None:
    list(begin(Project(folder), None, force=False))
    whole = (folder / ".gitignore").read_text()
    (folder / ".gitignore").write_text(whole.replace("/models/\n", ""))
    assert ".gitignore: what the pipeline makes" in list(begin(Project(folder), None, force=False))
    assert (folder / ".gitignore").read_text() == whole.replace("/models/\n", "") + "\n/models/\n"


def test_a_named_preset_does_not_overwrite_edits(folder: Path) -> None:
    (folder / "params.yaml").write_text("mine: 1\n")
    with pytest.raises(ParamsError, match=r"params\.yaml: has edits that are not committed"):
        list(begin(Project(folder), "demo", force=False))
    assert list(files_in(folder)) == ["params.yaml"]


def test_other_stages_are_overwritten_by_force_only(folder: Path) -> None:
    (folder / "dvc.yaml").write_text("stages: {}\n")
    with pytest.raises(StageError, match=r"dvc\.yaml: other stages than this version's.*`blemish init --force`"):
        list(begin(Project(folder), None, force=False))
    assert list(files_in(folder)) == ["dvc.yaml"]
    list(begin(Project(folder), None, force=True))
    assert (folder / "dvc.yaml").read_text() == dvc_yaml()


def test_the_repository_is_a_project_already() -> None:
    with pytest.raises(StageError, match="the repository itself, which has all that a project needs"):
        list(begin(Project(ROOT), None, force=True))
