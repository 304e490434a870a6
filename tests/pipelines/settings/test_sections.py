"""How little of params.yaml changes when something is put in."""

import pytest
import yaml

from pipelines.settings.sections import has, keys, value_at, values_of, with_entry

ANCHOR, TEXT = "k: &k\n  x: 1\nmodels:\n  a:\n    <<: *k\n", "models:\n  a:\n    x: |\n      text\n"
FIRST = "models:\n  a: # first\n    x: 1 # one\n    y:\n      - 1\n      - 2 # two\n\n# of what follows\nother: 1\n"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (FIRST, FIRST.replace("# two\n", "# two\n  b:\n    z: 1\n")),
        ("models:\n    a:\n        x: 1", "models:\n    a:\n        x: 1\n    b:\n      z: 1\n"),
        ("models:\r\n  a:\r\n    x: 1\r\n", "models:\r\n  a:\r\n    x: 1\r\n  b:\r\n    z: 1\r\n"),
        (f"{ANCHOR}end: 1\n", f"{ANCHOR}  b:\n    z: 1\nend: 1\n"),
        ("models:\n  a: {x: 1}\n  # end\n", "models:\n  a: {x: 1}\n  b:\n    z: 1\n  # end\n"),
        (f"{TEXT}end: 1\n", f"{TEXT}  b:\n    z: 1\nend: 1\n"),
        ("models:\n  b:\n    old: 1 # gone\n  a: 2\n", "models:\n  b:\n    z: 1\n  a: 2\n"),
        ("models: {a: {x: 1}} # c\nend: 1\n", "models: {a: {x: 1}, b: {z: 1}} # c\nend: 1\n"),
    ],
    ids=["comments", "no end of line", "windows", "anchor", "flow inside", "text", "replaced", "flow"],
)  # fmt: skip
def test_an_entry_is_put_in_and_nothing_else_changes(before, after):
    found = with_entry(before, "models", "b", {"z": 1})
    assert yaml.safe_load(found) == yaml.safe_load(after)
    if "{a: {x" not in before:  # ruamel's own way to write it
        assert found == after


def test_names_that_yaml_would_take_for_something_else():
    found = with_entry(
        "models:\n  a: 1\n", "models", "b", {"category": "08", "other": "no", "none": None, "small": 1e-5}
    )
    assert yaml.safe_load(found)["models"]["b"] == {"category": "08", "other": "no", "none": None, "small": 1e-5}


def test_settings_have_dotted_names():
    section = {"grid": 2, "far": {"name": "mean", "deep": {"er": 1}}}
    assert list(keys(section)) == ["grid", "far", "far.name", "far.deep", "far.deep.er"]
    assert all(has(section, key) for key in keys(section))
    assert not has(section, "grid.name")
    assert value_at(section, "far.deep.er") == 1


def test_values_are_those_of_yaml():
    assert values_of("1, 2.5,x,[2,3], null,true") == [1, 2.5, "x", [2, 3], None, True]
    with pytest.raises(ValueError, match="cannot be read"):
        values_of("[1")
