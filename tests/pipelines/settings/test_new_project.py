"""What `blemish init` writes, beside what the repository has."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines import lineage
from pipelines.errors import ParamsError, StageError
from pipelines.lineage import ROOT
from pipelines.paths import Project
from pipelines.preview import check
from pipelines.preview.check import load_checked, write_checked
from pipelines.settings.new_project import begin, dvc_yaml
from pipelines.settings.presets import PRESETS

OURS: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
MADE: dict[str, dict[str, Any]] = yaml.safe_load(dvc_yaml())


def test_the_stages_are_the_repositorys_but_for_code_and_command() -> None:
    assert list(MADE["stages"]) == list(OURS["stages"])
    assert {key: value for key, value in MADE.items() if key != "stages"} == {
        key: value for key, value in OURS.items() if key != "stages"
    }
    for name, stage in MADE["stages"].items():
        ours = OURS["stages"][name]
        expected = ours | {"cmd": ours["cmd"].replace("python cli.py", "blemish")}
        if name == "check":
            expected |= {"deps": ["params.yaml"], "always_changed": True}
        assert stage == expected, name
    assert "cli.py" not in dvc_yaml()


@pytest.fixture
def other_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Blemish, to be changed."""
    root = tmp_path / "other"
    for name in ("anomaly_models", "pipelines"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(lineage, "ROOT", root)
    monkeypatch.setattr(check, "ROOT", root)
    return root


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ("anomaly_models/fapm.py", {"models/fapm.txt", "models/fapm_wide.txt"}),
        ("anomaly_models/common/wiener.py", {"models/diffusion_ad.txt"}),
        ("pipelines/report/templates/report.css", {"stages/report.txt"}),
        ("pipelines/teachers/distill.py", {"stages/distill.txt"}),
        ("pipelines/deployment/records.py", {f"stages/{name}.txt" for name in ("export", "latency", "report")}),
        ("pipelines/training/loop.py", {"stages/train.txt", "stages/distill.txt"}),
        ("pipelines/settings/presets.py", set()),
    ],
)
def test_only_what_depends_on_changed_code_is_told_of(
    tmp_path: Path, other_version: Path, changed: str, told: set[str]
) -> None:
    """A method's variants all do."""
    values = yaml.safe_load((PRESETS / "demo.yaml").read_text(encoding="utf-8"))
    values["models"]["fapm_wide"] = values["models"]["fapm"] | {"method": "fapm", "grid": 8}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    params, checked = load_checked(tmp_path / "params.yaml"), tmp_path / "checked"

    def content() -> dict[str, str]:
        write_checked(params, Project(tmp_path))
        return {path.relative_to(checked).as_posix(): path.read_text() for path in checked.rglob("*.txt")}

    before = content()
    with (other_version / changed).open("a", encoding="utf-8") as file:
        file.write("\n")
    after = content()
    assert {name for name in after if before[name] != after[name]} == told


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
