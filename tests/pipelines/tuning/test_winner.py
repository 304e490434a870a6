"""How the winner gets into params.yaml, and how little else of it changes."""

import difflib

import pytest
import yaml
from conftest import FAPM, tiny_params, write_params
from made_up import distill_settings
from tiny_projects import INPUTS, MODELS, TEACHER

from pipelines.errors import ParamsError
from pipelines.paths import Project
from pipelines.preview.check import load_checked
from pipelines.settings.presets import PRESETS
from pipelines.settings.tuned import Tuned
from pipelines.tuning.winner import require_name, write_winner

TUNED = Tuned(model="fapm", category="gear", trials=3, defects="synthetic", objective=0.9, before=0.8)


def differences(before, after):
    return [line for line in difflib.ndiff(before.splitlines(), after.splitlines()) if line[0] in "+-"]


@pytest.mark.parametrize("preset", [path.stem for path in PRESETS.glob("*.yaml")])
def test_a_presets_every_other_line_stays(tmp_path, preset):
    path = tmp_path / "params.yaml"
    before = (PRESETS / f"{preset}.yaml").read_text(encoding="utf-8")
    path.write_text(before, encoding="utf-8")
    model = next(iter(load_checked(path).models))
    own = load_checked(path).model_config_of(model).model_dump(mode="json")
    tuned = TUNED.model_copy(update={"model": model})
    write_winner(path, "mine", model, own | {"batch_size": 3}, tuned)
    after = path.read_text(encoding="utf-8")
    changes = differences(before, after)
    assert {line[:2] for line in changes} == {"+ "}
    assert changes[0] == "+   mine:"
    params = load_checked(path)
    assert params.model_config_of("mine").batch_size == 3
    assert params.tuned_of("mine") == tuned
    assert yaml.safe_load(before)["models"][model] == yaml.safe_load(after)["models"][model]
    # Once more, with another result: it takes the place of the first.
    write_winner(path, "mine", model, own | {"batch_size": 4}, tuned.model_copy(update={"trials": 4}))
    again = differences(after, path.read_text(encoding="utf-8"))
    assert sorted(again) == ["+       trials: 4", "+     batch_size: 4", "-       trials: 3", "-     batch_size: 3"]


def test_a_teacher_is_described_for_the_variant_too(tmp_path):
    values = tiny_params() | INPUTS["efficient_ad"] | {"models": {"efficient_ad": MODELS["efficient_ad"]}}
    write_params(tmp_path, values)
    path = tmp_path / "params.yaml"
    own = load_checked(path).model_config_of("efficient_ad").model_dump(mode="json")
    tuned = TUNED.model_copy(update={"model": "efficient_ad"})
    assert write_winner(path, "mine", "efficient_ad", own, tuned) == []
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert found["models"]["mine"]["teacher"] == TEACHER.replace("efficient_ad", "mine")
    assert found["distill"]["mine"] == distill_settings(steps=6, batch_size=2)
    assert found["penalty"]["mine"] == found["penalty"]["efficient_ad"]
    # A teacher that nothing makes is the user's to copy.
    write_params(tmp_path, values | {"distill": {}})
    (note,) = write_winner(path, "mine", "efficient_ad", own, tuned)
    assert note.startswith(f"copy {TEACHER} to pretrained/mine/teacher/teacher.safetensors")


def test_a_file_that_would_not_be_in_order_stays_as_it_is(tmp_path):
    write_params(tmp_path, tiny_params())
    path = tmp_path / "params.yaml"
    before = path.read_bytes()
    with pytest.raises(ParamsError, match=r"left as it is, since mine would not be in order"):
        write_winner(path, "mine", "fapm", {"grid": 2}, TUNED)
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["params.yaml"]


def test_a_name_that_somebody_has_taken_meanwhile(tmp_path):
    values = tiny_params()
    values["models"]["mine"] = FAPM | {"method": "fapm"}
    write_params(tmp_path, values)
    before = (tmp_path / "params.yaml").read_bytes()
    with pytest.raises(ParamsError, match=r"models.mine is in it by now; call again with another --name"):
        write_winner(tmp_path / "params.yaml", "mine", "fapm", FAPM, TUNED)
    assert (tmp_path / "params.yaml").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Mine", r"^--name Mine: models.Mine: a variant's name has small letters, digits and underscores"),
        ("adfa", r"^--name adfa: models.adfa.method = 'fapm': adfa is a method's own name"),
        ("fapm", r"^--name fapm: models.fapm is in params.yaml, and no earlier result of tuning fapm on gear; give"),
        ("wide", r"^--name wide: models.wide is in params.yaml, and no earlier result"),
        ("other", r"^--name other: models.other is in params.yaml, and no earlier result"),
    ],
)
def test_a_name_that_is_taken_or_none(tmp_path, name, told):
    values = tiny_params()
    record = TUNED.model_dump()
    values["models"]["wide"] = FAPM | {"method": "fapm"}
    values["models"]["fapm_tuned"] = FAPM | {"method": "fapm", "tuned": record}
    values["models"]["other"] = FAPM | {"method": "fapm", "tuned": record | {"category": "nut"}}
    write_params(tmp_path, values)
    params = load_checked(Project(tmp_path).params)
    require_name("fapm_tuned", "fapm", "gear", params)
    require_name("new", "fapm", "gear", params)
    with pytest.raises(ParamsError, match=told):
        require_name(name, "fapm", "gear", params)
