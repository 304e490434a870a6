"""A folder of pictures becomes a short params.yaml, or a line that says what is wrong with it."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import CATEGORY, draw_category
from drawn_folders import draw_mvtec, draw_plain, write_image
from dvc.utils.serialize import modify_yaml
from ruamel.yaml import YAML

from pipelines.errors import DatasetError, ParamsError
from pipelines.paths import Project
from pipelines.preparation.layouts import choose_layout, list_category
from pipelines.preparation.listing import Findings
from pipelines.preparation.splits import split
from pipelines.preview.check import load_checked
from pipelines.preview.start import Started, start


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    draw_mvtec(tmp_path / "photos" / "nut")
    draw_plain(tmp_path / "photos" / "plate")
    return tmp_path / "photos"


def begun(folder: Path, *models: str, force: bool = False) -> Started:
    return start(folder, models or ("adfa", "fapm"), Project(folder.parent), 2, force=force)


def values(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((folder.parent / "params.yaml").read_text(encoding="utf-8"))
    return found


def test_what_is_written_is_short_and_in_order(pictures: Path) -> None:
    found = begun(pictures)
    path = pictures.parent / "params.yaml"
    params = load_checked(path)
    assert params.cells() == [("adfa", "nut"), ("adfa", "plate"), ("fapm", "nut"), ("fapm", "plate")]
    assert params.data.root == "photos"
    assert params.tracking.experiment == "photos"
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 130
    assert "\n\nmodels:\n  adfa:\n    image_size: 256 # of the square" in text  # comments stay
    assert re.findall(r"^(\w+): \{\}", text, re.MULTILINE) == ["download", "distill", "penalty", "textures"]
    assert YAML(typ="safe").load(text) == yaml.safe_load(text)
    with modify_yaml(path):  # as `dvc exp run -S` does
        pass
    assert path.read_text(encoding="utf-8") == text
    assert 0 < found.minutes < 10
    nut, plate = found.categories
    assert nut.text == (
        "nut (layout mvtec): 10 good parts; to test on 2 good parts and 3 defects of 2 types, with masks; 30 x 20 "
        "pixels, colour"
    )
    assert plate.text.startswith(
        "plate (layout folder): 10 good parts; to test on a quarter of them and 3 defects of 2 types, with masks; "
    )


def test_of_what_others_need_nothing_is_lost(pictures: Path) -> None:
    begun(pictures, "efficient_ad", "diffusion_ad", "bgad", "adfa", "fapm")
    params = load_checked(pictures.parent / "params.yaml")
    assert list(params.models) == ["adfa", "bgad", "diffusion_ad", "efficient_ad", "fapm"]
    assert list(params.download) == ["demo_textures"]
    assert list(params.distill) == ["efficient_ad"]
    assert list(params.textures) == ["diffusion_ad"]


def test_a_folder_may_be_one_category(pictures: Path) -> None:
    (pictures / "nut").rename(pictures.parent / "nut")
    begun(pictures.parent / "nut")
    assert values(pictures)["data"] == {"root": ".", "categories": ["nut"]}
    assert values(pictures)["tracking"]["experiment"] == "nut"


@pytest.mark.parametrize("name", ["08", "no", "1e3", "Gehäuse links", "~"])
def test_a_name_is_text_for_every_reader(pictures: Path, name: str) -> None:
    (pictures / "nut").rename(pictures / name)
    if name == "~":
        with pytest.raises(ParamsError, match="a name begins with a letter or a digit of any language"):
            begun(pictures)
        assert not (pictures.parent / "params.yaml").exists()
        return
    begun(pictures)
    text = (pictures.parent / "params.yaml").read_text(encoding="utf-8")
    assert sorted(YAML(typ="safe").load(text)["data"]["categories"]) == sorted([name, "plate"])
    assert load_checked(pictures.parent / "params.yaml").data.categories == sorted([name, "plate"])


def test_what_few_good_parts_can_promise(pictures: Path) -> None:
    notes = begun(pictures).notes
    assert values(pictures)["prepare"]["holdout"] == 0.25
    told = "nut: 3 good parts set the threshold and can promise 25\xa0% false alarms at best; 19 could promise 5 %: "
    assert f"{told}add good parts, or let all set it (prepare.holdout: folds)" in notes
    notes = begun(pictures, "bgad", force=True).notes
    assert f"{told}add good parts" in notes  # it cannot take folds
    assert "bgad: name the categories that fill the picture, as fabric does, in prepare.surfaces" in notes


@pytest.mark.parametrize(("layout", "number"), [("nut/train/good", 30), ("nut/normal", 45), ("nut/normal", 6)])
def test_as_many_are_told_to_set_the_threshold_as_will(tmp_path: Path, layout: str, number: int) -> None:
    for seed in range(number):
        write_image(tmp_path / "parts" / layout / f"{seed:03}.png", seed)
    notes = begun(tmp_path / "parts").notes
    settings = load_checked(tmp_path / "params.yaml").prepare
    source = tmp_path / "parts" / "nut"
    listing = list_category(source, choose_layout(source, "auto", Findings()), Findings())
    items = split(source, listing, {}, {path: path for path in listing.training}, {}, settings, Findings())
    held_out = sum(item.split == "holdout" for item in items)
    assert any(note.startswith(f"nut: {held_out} good parts set") or held_out == 1 for note in notes)


def test_pictures_stay_out_of_git(pictures: Path) -> None:
    project = pictures.parent
    assert not any(".gitignore" in note for note in begun(pictures).notes)  # nothing there speaks of Git
    subprocess.run(["git", "init", "-q"], cwd=project, check=True)
    (project / ".gitignore").write_text("/data/", encoding="utf-8")
    odd = pictures.rename(project / "a[b]* c!")
    said = ".gitignore: /a\\[b]\\* c!/, since pictures are not for Git"
    assert said in begun(odd, force=True).notes
    assert said not in begun(odd, force=True).notes
    assert (project / ".gitignore").read_text(encoding="utf-8").split("\n") == ["/data/", "", "/a\\[b]\\* c!/", ""]
    picture = next(odd.rglob("*.png"))
    ignored = subprocess.run(["git", "check-ignore", str(picture)], cwd=project, check=False, capture_output=True)
    assert ignored.returncode == 0
    inside = odd.rename(project / "data")
    begun(inside, force=True)
    assert "/data/nut" not in (project / ".gitignore").read_text(encoding="utf-8")
    one = (inside / "nut").rename(project / "nut")
    assert ".gitignore: /nut/, since pictures are not for Git" in begun(one, force=True).notes


def test_long_pictures_are_not_squeezed(tmp_path: Path) -> None:
    for number in range(12):
        write_image(tmp_path / f"seams/weld/train/good/{number:03}.png", number, width=1000, height=150)
    notes = begun(tmp_path / "seams", "adfa", "fapm", "efficient_ad").notes
    models = values(tmp_path / "seams")["models"]
    size = {"height": 128, "width": 640}
    assert models["adfa"]["image_size"] == models["fapm"]["image_size"] == models["fapm"]["crop"] == size
    assert models["fapm"]["grid"] == {"height": 2, "width": 10}
    assert models["efficient_ad"]["image_size"] == 128
    told = "adfa, fapm: image_size 640 x 128 (width x height), as the pictures are long; efficient_ad: stretched "
    assert f"{told}to squares" in notes
    assert "weld: no defects: a detector with its threshold, but no figure of how many defects it finds" in notes
    load_checked(tmp_path / "params.yaml")


def test_pictures_that_lose_most_of_their_pixels_are_told_of(tmp_path: Path) -> None:
    for number in range(3):
        write_image(tmp_path / f"boards/pcb/train/good/{number:03}.png", number, width=1600, height=1200)
    notes = begun(tmp_path / "boards").notes
    assert any("shown to the models 5 times smaller: if faults are only some 11 pixels wide" in note for note in notes)


def test_what_a_user_should_know(tmp_path: Path) -> None:
    for number in range(8):
        write_image(tmp_path / f"parts/lid/normal/day{number % 2}/{number:03}.png", number % 7)
    write_image(tmp_path / "parts/lid/abnormal/000.png", 100)
    (tmp_path / "parts" / "notes").mkdir()
    found = begun(tmp_path / "parts")
    assert [category.name for category in found.categories] == ["lid"]
    assert found.left_out == (
        f"{tmp_path}/parts/notes: is empty; expected train/good and test/ (as in MVTec AD), or normal/, or another "
        "layout of docs/layouts.md",
    )
    for note in (
        "lid: 1 file byte for byte another's: copies stay on one side of a split",
        "lid: no masks: figures by image only",
        "lid: good parts lie in day0, day1: if these are days, lots or cameras, set prepare.groups: {folder: 1}",
    ):
        assert note in found.notes


def test_what_is_no_folder_of_categories(tmp_path: Path) -> None:
    def told(folder: Path) -> str:
        with pytest.raises(DatasetError) as caught:
            begun(folder)
        assert not (tmp_path / "params.yaml").exists()
        return str(caught.value)

    assert told(tmp_path / "none").endswith("none: no such folder; give the one that holds your pictures")
    loose = tmp_path / "loose"
    write_image(loose / "a.png", 0)
    assert "1 picture in the folder itself, which does not say what is good: move good parts into normal/" in told(
        loose
    )
    write_image(tmp_path / "other/images/a.png", 0)
    assert told(tmp_path / "other").startswith(
        f"{tmp_path}/other: holds no category\n  - {tmp_path}/other/images: 1 picture"
    )
    draw_mvtec(tmp_path / "nut")
    write_image(tmp_path / "nut/normal/000.png", 0)
    assert "holds both train/good and normal" in told(tmp_path / "nut")


def test_edits_are_not_lost_and_models_must_be_known(root: Path, blemish: Any) -> None:
    (root / "images" / "empty").mkdir()
    refused = blemish("start", "images", "--models", "fapn")
    assert refused.code == 1
    assert "model 'fapn': unknown (did you mean 'fapm'?); known: adfa, bgad, " in refused.err
    assert "--models: no model; name some of adfa, bgad" in blemish("start", "images", "--models", ",").err
    refused = blemish("start", "images")
    assert refused.code == 1
    assert (
        "params.yaml: has edits that are not committed; commit them, or overwrite them with `blemish start"
        in refused.err
    )
    done = blemish("start", "images", "--models", "fapm", "--force")
    assert done.code == 0, done.err
    assert (
        f"{CATEGORY} (layout mvtec): 12 good parts; to test on 4 good parts and 4 defects, with masks; 80 x 64"
        in done.out
    )
    assert "- images/empty: is empty" in done.out.replace(f"{root}/", "")
    assert "params.yaml: fapm; `blemish run` takes about 1 minute here. Other models: --models all" in done.out
    again = blemish("start", "images", "--models", "fapm")
    assert again.code == 0, again.err  # the same content: nothing to lose
    draw_category(root / "images" / "second")
    assert blemish("start", "images", "--models", "fapm").code == 1
