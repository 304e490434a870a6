"""What `sweep --set` adds to params.yaml."""

from pathlib import Path

import pytest
import yaml
from conftest import tiny_params, write_params
from tiny_projects import INPUTS, MODELS, TEACHER

from pipelines.errors import ParamsError
from pipelines.preview.check import load_checked
from pipelines.sweeps.overrides import add_overrides


@pytest.fixture
def path(tmp_path: Path) -> Path:
    values = tiny_params() | INPUTS["efficient_ad"]
    write_params(tmp_path, values | {"models": {name: MODELS[name] for name in ("fapm", "efficient_ad")}})
    return tmp_path / "params.yaml"


def add(path: Path, *asked: str) -> list[str]:
    return add_overrides(path, asked, load_checked(path))


def test_each_combination_is_a_variant_but_for_the_model_itself(path: Path) -> None:
    lines = add(path, "fapm.grid=2,4", "fapm.backbone.layers=[2,3],[2]")
    names = ["fapm_grid_2_layers_2", "fapm_grid_4_layers_2_3", "fapm_grid_4_layers_2"]
    assert lines == [f"params.yaml: {name} is new" for name in names]
    params = load_checked(path)
    assert list(params.models) == ["fapm", "efficient_ad", *names]
    assert params.method_of(names[0]) == "fapm"
    base = params.model_config_of("fapm").model_dump()
    found = params.model_config_of(names[2]).model_dump()
    assert found == base | {"grid": 4, "backbone": base["backbone"] | {"layers": (2,)}}


def test_what_is_there_is_not_added_again(path: Path) -> None:
    assert len(add(path, "fapm.grid=1,4")) == 2
    before = path.read_bytes()
    assert add(path, "fapm.grid=4,1") == []
    assert path.read_bytes() == before


def test_what_is_made_for_a_model_is_made_for_its_variants(path: Path) -> None:
    assert add(path, "efficient_ad.learning_rate=1.0e-3") == ["params.yaml: efficient_ad_learning_rate_0_001 is new"]
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    name = "efficient_ad_learning_rate_0_001"
    assert found["models"][name]["teacher"] == TEACHER.replace("efficient_ad", name)
    assert found["distill"][name] == found["distill"]["efficient_ad"]


def test_a_long_name_is_shortened(path: Path) -> None:
    asked = [f"efficient_ad.{key}=0.25" for key in ("quantile_low", "penalty_weight", "overall_weight")]
    (line,) = add(path, *asked)
    assert line.startswith("params.yaml: efficient_ad_")
    assert len(line) < 60


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("fapm.grid", "cannot be read; write MODEL.KEY=a,b,c"),
        ("grid=2", "cannot be read; write MODEL.KEY=a,b,c"),
        ("fapm.grid=", "cannot be read; write MODEL.KEY=a,b,c"),
        ("fapm.grid=[2", "[2 cannot be read as YAML's values; write MODEL.KEY=a,b,c"),
        ("fappm.grid=2", "no model 'fappm' in params.yaml (did you mean 'fapm'?); it has: fapm, efficient_ad"),
        ("fapm.grids=2", "fapm has no setting 'grids' (did you mean 'grid'?)"),
        ("fapm.neighbours=4,five", "fapm.neighbours=five: neighbours: Input should be a valid integer"),
        ("fapm.batch_size=0", "fapm.batch_size=0: batch_size: Input should be greater than 0"),
    ],
)
def test_what_cannot_be_set(path: Path, asked: str, told: str) -> None:
    before = path.read_bytes()
    with pytest.raises(ParamsError) as error:
        add(path, asked)
    assert told in str(error.value)
    assert str(error.value).startswith("--set ")
    assert len(str(error.value).splitlines()) == 1
    assert path.read_bytes() == before


def test_a_setting_is_named_once(path: Path) -> None:
    with pytest.raises(ParamsError, match=r"--set fapm.grid=4: fapm.grid is set twice; name all values at once"):
        add(path, "fapm.grid=1", "fapm.grid=4")
