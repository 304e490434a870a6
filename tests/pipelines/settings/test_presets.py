import subprocess
from pathlib import Path

import pytest
from dvc.utils.serialize import modify_yaml

from pipelines.errors import ParamsError
from pipelines.preview.check import load_checked
from pipelines.settings.presets import PRESETS, names, put_in_place


def content(name: str) -> bytes:
    return (PRESETS / f"{name}.yaml").read_bytes()


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", folder, *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A params.yaml in a git repository without commits, in a sub-folder."""
    git(tmp_path, "init")
    folder = tmp_path / "project"
    folder.mkdir()
    return folder / "params.yaml"


def commit(target: Path) -> None:
    git(target.parent, "add", target.name)
    git(target.parent, "commit", "-m", "params")


def test_every_preset_is_valid() -> None:
    assert names() == ["demo", "dinov2", "folder", "medical", "mvtec_ad", "solar"]
    for name in names():
        params = load_checked(PRESETS / f"{name}.yaml")
        assert params.tracking.experiment == {"dinov2": "my_images", "folder": "my_images"}.get(name, name)


def test_the_committed_params_are_the_demo() -> None:
    assert (PRESETS.parent / "params.yaml").read_bytes() == content("demo")


def test_the_noise_of_diffusion_ad_is_the_paper_s_once_reduced() -> None:
    """The paper's is for 256 pixels, where `mvtec_ad` works too."""
    for name in sorted({*names()} - {"dinov2"}):
        settings = load_checked(PRESETS / f"{name}.yaml").models["diffusion_ad"]
        assert settings.noise_scale == settings.unet.image_size.width / 256, name


def test_a_preset_is_put_where_nothing_is(tmp_path: Path) -> None:
    put_in_place("mvtec_ad", tmp_path / "params.yaml", force=False)
    assert (tmp_path / "params.yaml").read_bytes() == content("mvtec_ad")


def test_an_untouched_preset_is_replaced_even_outside_git(tmp_path: Path) -> None:
    target = tmp_path / "params.yaml"
    target.write_bytes(content("demo"))
    put_in_place("folder", target, force=False)
    assert target.read_bytes() == content("folder")


def test_edits_that_are_not_committed_are_refused(target: Path) -> None:
    edited = content("demo").replace(b"seed: 0", b"seed: 1")
    target.write_bytes(content("demo"))
    commit(target)
    target.write_bytes(edited)
    git(target.parent, "add", target.name)  # staged is not committed
    with pytest.raises(ParamsError) as caught:
        put_in_place("mvtec_ad", target, force=False)
    assert str(caught.value) == (
        f"{target}: has edits that are not committed; commit them, or overwrite them with "
        "`blemish preset mvtec_ad --force`"
    )
    assert target.read_bytes() == edited


def test_committed_edits_are_replaced(target: Path) -> None:
    target.write_bytes(content("demo").replace(b"seed: 0", b"seed: 1"))
    commit(target)
    put_in_place("mvtec_ad", target, force=False)
    assert target.read_bytes() == content("mvtec_ad")


@pytest.mark.parametrize("repository", [True, False])
def test_an_own_file_without_any_commit_is_refused(tmp_path: Path, repository: bool) -> None:
    if repository:
        git(tmp_path, "init")
    target = tmp_path / "params.yaml"
    target.write_text("mine: 1\n")
    with pytest.raises(ParamsError, match="not committed"):
        put_in_place("demo", target, force=False)
    assert target.read_text() == "mine: 1\n"


@pytest.mark.parametrize("path", [PRESETS.parent / "params.yaml", *sorted(PRESETS.glob("*.yaml"))], ids=str)
def test_a_preset_is_in_the_form_that_dvc_writes(tmp_path: Path, path: Path) -> None:
    """So that `dvc exp run -S` changes one line of it."""
    target = tmp_path / "params.yaml"
    target.write_bytes(path.read_bytes())
    with modify_yaml(target) as values:
        values["prepare"]["seed"] += 1
    before, after = (file.read_text(encoding="utf-8").splitlines() for file in (path, target))
    assert [pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]] == [("  seed: 0", "  seed: 1")]


def test_force_overwrites(tmp_path: Path) -> None:
    target = tmp_path / "params.yaml"
    target.write_text("mine: 1\n")
    put_in_place("demo", target, force=True)
    assert target.read_bytes() == content("demo")
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]


def test_without_git_edits_are_refused_and_presets_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    target = tmp_path / "params.yaml"
    target.write_bytes(content("demo"))
    put_in_place("folder", target, force=False)
    target.write_text("mine: 1\n")
    with pytest.raises(ParamsError, match="not committed"):
        put_in_place("demo", target, force=False)


@pytest.mark.parametrize("name", ["", "mvtec", "../params", "demo.yaml"])
def test_an_unknown_preset_lists_those_there_are(tmp_path: Path, name: str) -> None:
    with pytest.raises(ParamsError) as caught:
        put_in_place(name, tmp_path / "params.yaml", force=True)
    assert (
        str(caught.value)
        == f"preset '{name}': no such preset; there are: demo, dinov2, folder, medical, mvtec_ad, solar"
    )
    assert not (tmp_path / "params.yaml").exists()


def test_a_write_that_fails_leaves_the_old_file(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise RuntimeError

    target.write_bytes(content("demo"))
    monkeypatch.setattr(Path, "write_bytes", failing)
    with pytest.raises(RuntimeError):
        put_in_place("folder", target, force=False)
    assert target.read_bytes() == content("demo")
