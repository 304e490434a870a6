from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from changed_params import DEMO, Load, changed, load_text, problems_of, put

from anomaly_models import MODELS
from anomaly_models.fapm import FAPMConfig
from pipelines.errors import ParamsError
from pipelines.preview.check import load_checked
from pipelines.settings.params import load_params


def test_the_demo_is_read() -> None:
    params = load_checked(DEMO)
    assert list(params.models) == ["adfa", "bgad", "diffusion_ad", "efficient_ad", "fapm"]
    assert params.cells()[-2:] == [("fapm", "fabric"), ("fapm", "gear")]
    assert len(params.cells()) == 10
    assert isinstance(params.model_config_of("fapm"), FAPMConfig)
    assert params.model_config_of("fapm").image_size == (256, 256)
    assert params.export.max_difference == 0.01
    params.check_category("gear")


@pytest.mark.parametrize("load", [load_params, load_checked])
def test_what_each_model_sees(load: Load) -> None:
    """Known to `prepare`, which does not know the models."""
    frames = load(DEMO).views().frames
    assert {model: str(frame) for model, frame in frames.items()} == {
        "adfa": "256 (bilinear)",
        "bgad": "256 (bilinear)",
        "diffusion_ad": "64 (bilinear)",
        "efficient_ad": "128 (bilinear)",
        "fapm": "256 (bilinear)",
    }


def test_sections_that_do_not_say_what_a_model_sees(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    values = changed({"models.fapm.image_size": 0, "models.bgad": {"resize": "cubic"}, "models.adfa": 3})
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    with pytest.raises(ParamsError) as caught:
        load_params(path).views()
    assert sorted(str(caught.value).splitlines()) == [
        "  models.adfa = 3: Input should be a mapping",
        "  models.bgad.fit: missing",
        "  models.bgad.image_size: missing",
        "  models.bgad.resize = 'cubic': Input should be 'bilinear' or 'lanczos'",
        "  models.fapm.image_size = 0: Input should be above 0: a number for a square, or `height` and `width`",
        "params.yaml:",
    ]


def test_unknown_names_are_refused_later_too() -> None:
    params = load_checked(DEMO)
    with pytest.raises(ParamsError) as caught:
        params.model_config_of("padim")
    listed = "adfa, bgad, diffusion_ad, efficient_ad, fapm"
    assert str(caught.value) == f"model 'padim' is not in params.yaml, which lists: {listed}"
    with pytest.raises(ParamsError) as caught:
        params.check_category("Gear")
    assert str(caught.value) == "category 'Gear' is not in params.yaml, whose data.categories lists: fabric, gear"


ALLOWED = ("pcb-1", "a--b-", "Zahnrad_grün", "0 1.2", "齿轮", "шестерня", "गियर", "gru\u0308n", "a" * 200)
REFUSED = (
    "",
    "..",
    ".a",
    "-a",
    " a",
    "a/b",
    "../b/part",
    "a\\b",
    "a\n",
    "a;b",
    "$(a)",
    "a'b",
    "a@b",
    "a:b",
    "a\u202eb",
)


@pytest.mark.parametrize("name", ALLOWED)
def test_names_of_categories_in_any_language(tmp_path: Path, name: str) -> None:
    values = changed({"data.categories": [name], "prepare.surfaces": []})
    assert load_text(load_params, tmp_path, yaml.safe_dump(values)).data.categories == [name]


def test_no_two_cells_share_a_name() -> None:
    """A stage is `train@MODEL-CATEGORY`: no model has a hyphen, so that the first one ends the model's name."""
    assert not [name for name in MODELS if "-" in name]


@pytest.mark.parametrize("section", ["data.root", "photos", "texture_photos"])
def test_a_home_is_written_out(tmp_path: Path, section: str) -> None:
    """DVC takes the path as it is."""
    home = Path.home()
    assert problems_of(load_params, tmp_path, {section: "~/parts"}) == [
        f"{section} = '~/parts': DVC does not know what ~ stands for: write {home}/parts"
    ]


@pytest.mark.parametrize(
    ("categories", "expected"),
    [
        (["A", "A"], "data.categories = ['A', 'A']: 'A' and 'A' are the same folder where case is ignored: rename one"),
        (["bolt", "nut", "Bolt"], "data.categories = ['bolt', 'nut', 'Bolt']: 'bolt' and 'Bolt' are the same folder"),
        ([], "data.categories = []: List should have at least 1 item"),
        (["a", 7], "data.categories.1 = 7: Input should be a valid string"),
        ([False], "data.categories.0 = False: Input should be a valid string"),
        (
            ["grün", "gru\u0308n"],
            "data.categories = ['grün', 'gru\u0308n']: 'grün' and 'gru\u0308n' are the same",
        ),
        (["a" * 201], f"data.categories.0 = '{'a' * 201}': a name may have 200 bytes, this has 201: rename the folder"),
        (["ü" * 101], f"data.categories.0 = '{'ü' * 101}': a name may have 200 bytes, this has 202: rename the folder"),
        *(([name], f"data.categories.0 = {name!r}: a name begins with a letter or a digit") for name in REFUSED),
    ],
)
def test_categories_are_names_of_folders_and_cells(tmp_path: Path, categories: list[Any], expected: str) -> None:
    (found,) = problems_of(load_params, tmp_path, {"data.categories": categories})
    assert found.startswith(expected)


def fractions(section: Any, path: str) -> Iterator[str]:
    """The dotted paths of all numbers with a fraction, as the presets write them."""
    if isinstance(section, dict):
        for name, value in section.items():
            yield from fractions(value, f"{path}.{name}".lstrip("."))
    elif isinstance(section, float):
        yield path


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_no_setting_is_infinite(tmp_path: Path, value: float) -> None:
    values = yaml.safe_load(DEMO.read_text(encoding="utf-8"))
    paths = list(fractions(values, ""))
    assert {"models.adfa.learning_rate", "distill.efficient_ad.weight_decay", "evaluate.false_alarm_rate"} < set(paths)
    put(values, dict.fromkeys(paths, value))
    with pytest.raises(ParamsError) as caught:
        load_text(load_checked, tmp_path, yaml.safe_dump(values))
    message = str(caught.value)
    assert [path for path in paths if f"{path} = {value!r}: Input should be a finite number" not in message] == []


@pytest.mark.parametrize("value", [1e300, -1e39, 3.5e38])
def test_no_setting_is_beyond_a_networks_numbers(tmp_path: Path, value: float) -> None:
    values = yaml.safe_load(DEMO.read_text(encoding="utf-8"))
    put(values, {"models.bgad.learning_rate": value})
    with pytest.raises(ParamsError, match=r"models\.bgad\.learning_rate = "):
        load_text(load_checked, tmp_path, yaml.safe_dump(values))
