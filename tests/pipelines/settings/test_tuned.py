"""The record of what settings were chosen on: beside them in params.yaml, and no setting."""

import copy
import re

import pytest
from conftest import FAPM, tiny_params, write_params
from tiny_projects import MODELS

from pipelines.errors import ParamsError
from pipelines.paths import Project
from pipelines.preview.check import load_checked, write_checked
from pipelines.settings.params import load_params

RECORD = {"model": "fapm", "category": "gear", "trials": 3, "defects": "synthetic", "objective": 0.9, "before": 0.8}


def with_variant(root, record, **models):
    values = tiny_params()
    values["models"] |= {"mine": copy.deepcopy(FAPM) | {"method": "fapm", "tuned": record}} | models
    values["prepare"]["anomalous_train"]["count"] = 6
    write_params(root, values)
    return root / "params.yaml"


def test_it_is_read_and_is_no_setting(tmp_path):
    path = with_variant(tmp_path, RECORD)
    for params in (load_params(path), load_checked(path)):
        assert params.tuned_of("mine").model_dump() == RECORD
        assert params.tuned_of("fapm") is None
        said = "tuned on gear: 3 trials against synthetic defects on good parts; test images and held-out parts unseen"
        assert (params.told_of("mine"), params.told_of("fapm")) == (said, None)
    assert load_checked(path).model_config_of("mine") == load_checked(path).model_config_of("fapm")
    write_checked(load_checked(path), Project(tmp_path))
    told = [(tmp_path / "checked" / "models" / f"{name}.txt").read_text() for name in ("fapm", "mine")]
    assert told[0] == told[1]


@pytest.mark.parametrize(
    ("record", "told"),
    [
        (RECORD | {"trials": 0}, "models.mine.tuned.trials = 0: Input should be greater than 0"),
        (RECORD | {"defects": "drawn"}, "models.mine.tuned.defects = 'drawn': Input should be 'synthetic' or 'real'"),
        (RECORD | {"objectiv": 1}, "models.mine.tuned.objectiv = 1: unknown key (did you mean 'objective'?)"),
        ({}, "models.mine.tuned.model: missing"),
        ("yes", "models.mine.tuned"),
    ],
)
def test_one_that_is_wrong_is_refused(tmp_path, record, told):
    path = with_variant(tmp_path, record)
    for load in (load_params, load_checked):
        with pytest.raises(ParamsError, match=re.escape(told)):
            load(path)


def test_who_was_tuned_on_real_defects_is_not_tested_on_them(tmp_path):
    params = load_checked(with_variant(tmp_path, RECORD | {"defects": "real"}))
    assert params.chosen_on_defects("mine")
    assert not params.chosen_on_defects("fapm")
    assert params.defects_apart(learns=True)
    assert params.defects_apart(learns=False)  # tested_by_nobody
    synthetic = load_checked(with_variant(tmp_path, RECORD))
    assert not synthetic.defects_apart(learns=False)
    with_bgad = load_checked(with_variant(tmp_path, RECORD, bgad=MODELS["bgad"]))
    assert with_bgad.defects_apart(learns=False)
    write_checked(params, Project(tmp_path))
    told = [(tmp_path / "checked" / "tests" / f"{name}.txt").read_text() for name in ("fapm", "mine")]
    assert told == ["defects tested on: but for those that models learn from\n"] * 2
