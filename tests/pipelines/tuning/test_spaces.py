"""What a search tries, as a user writes it and as methods have it."""

import re

import pytest
from tiny_models import SETTINGS

from anomaly_models import MODELS
from pipelines.errors import ParamsError
from pipelines.settings.sections import changed
from pipelines.tuning.spaces import SPACES, Choices, Range, space_of

OWN = {"grid": 4, "rate": 0.01, "far": {"name": "mean"}, "layers": [2, 3], "epochs": 0, "limit": None}


def takes_all(values):
    return None


def space(*asked, refusal=takes_all):
    return space_of("fapm", "mine", OWN, asked, refusal)


def test_what_is_asked_for():
    assert space("grid=1:8") == {"grid": Range(1, 8, log=False, whole=True)}
    assert space("rate=1e-4:1e-2:log") == {"rate": Range(0.0001, 0.01, log=True, whole=False)}
    assert space("rate=x0.5:x3") == {"rate": Range(0.005, 0.03, log=False, whole=False)}
    assert space("grid = 1, 2, 8") == {"grid": Choices((1, 2, 8))}
    assert space("layers=[2,3],[1,2,3]") == {"layers": Choices(([2, 3], [1, 2, 3]))}
    assert space("far.name=mean,median", "grid=1,2").keys() == {"far.name", "grid"}
    assert space("far={name: mean},{name: none}")["far"].names == ['{"name": "mean"}', '{"name": "none"}']
    assert space("limit=null,1")["limit"].values == (None, 1)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("grd=1,2", "mine has no setting 'grd' (did you mean 'grid'?)"),
        ("far.nam=a,b", "mine has no setting 'far.nam' (did you mean 'far.name'?)"),
        ("grid", "cannot be read; write KEY=LOW:HIGH, KEY=LOW:HIGH:log or KEY=a,b,c"),
        ("grid=", "cannot be read; write KEY="),
        ("=1:2", "cannot be read; write KEY="),
        ("grid=1:", "cannot be read; write KEY="),
        ("grid=1:2:lin", "cannot be read; write KEY="),
        ("grid=one:two", "cannot be read; write KEY="),
        ("grid=1.5:3", "grid is a whole number; write whole ones"),
        ("rate=0.3:0.1", "0.3 is not below 0.1; write the lower one first"),
        ("rate=0:0.1:log", "0 has no logarithm; begin above 0, or leave out :log"),
        ("rate=1:1e999", "no such number; write smaller ones"),
        ("far.name=1:2", "far.name = 'mean' is no number; write KEY=a,b,c"),
        ("grid=[1", "[1 cannot be read as YAML's values; write KEY=a,b,c"),
        ("grid=2,2", "a value stands there twice; name each once"),
        ("image_size=64,128", "image_size is not searched, since pictures are prepared for it; add a variant"),
        ("teacher=a,b", "teacher is not searched, since its teacher is made for it; add a variant"),
    ],
)
def test_what_cannot_be_searched_is_refused_in_a_line(asked, told):
    with pytest.raises(ParamsError, match=f"^{re.escape(f'--search {asked}: {told}')}") as caught:
        space(asked)
    assert "\n" not in str(caught.value)


def test_each_end_must_be_taken_by_the_model():
    def refusal(values):
        return f"grid is too large: {values['grid']}" if values["grid"] > 4 else None

    with pytest.raises(ParamsError, match=r"^--search grid=1:8: grid is too large: 8$"):
        space("grid=1:8", refusal=refusal)


def test_a_setting_is_named_once():
    with pytest.raises(ParamsError, match=r"^--search grid=1:2: grid is named twice; name it once$"):
        space("grid=1,2", "grid=1:2")


def test_a_method_without_a_space_asks_for_one():
    with pytest.raises(ParamsError, match=r"^model 'mine': mean_colour has no settings to search of its own"):
        space_of("mean_colour", "mine", OWN, [], takes_all)


@pytest.mark.parametrize("method", SPACES)
def test_a_methods_own_space_holds_what_the_model_has_and_takes(method):
    config = MODELS[method].Config.model_validate(SETTINGS[method])
    own = config.model_dump(mode="json")

    def refusal(values):
        try:
            type(config).model_validate(changed(own, values))
        except ValueError as error:
            return str(error)
        return None

    found = space_of(method, method, own, [], refusal)
    assert len(found) >= 2
    for key, setting in found.items():
        value = own
        for part in key.split("."):
            value = value[part]
        assert setting.holds(value), key
        assert [refusal({key: end}) for end in setting.ends] == [None, *[None] * (len(setting.ends) - 1)]


def test_every_method_has_a_space():
    assert set(SPACES) == set(MODELS)


def test_what_would_change_nothing_is_left_out():
    own = MODELS["fapm"].Config.model_validate(SETTINGS["fapm"]).model_dump(mode="json")
    assert "neighbours" in space_of("fapm", "fapm", own, [], takes_all)
    assert "neighbours" not in space_of("fapm", "fapm", own | {"image_score": "max"}, [], takes_all)


def test_numbers_have_few_digits_and_stay_within():
    found = Range(0.0123, 0.5, log=True, whole=False)
    assert found.value(0.0345678) == 0.0346
    assert found.value(0.01230001) == 0.0123
    assert Range(0.12345, 0.5, log=False, whole=False).value(0.12345) == 0.12345
    assert Range(1, 8, log=False, whole=True).value(3) == 3
    assert Choices(([2, 3], [2])).value("[2]") == [2]


def test_a_section_is_changed_under_dotted_names():
    assert changed(OWN, {"far.name": "none", "grid": 2}) == OWN | {"far": {"name": "none"}, "grid": 2}
    assert OWN["far"] == {"name": "mean"}
