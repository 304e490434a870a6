import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from anomaly_models.fapm import FAPMConfig
from pipelines.errors import ParamsError
from pipelines.preview.check import load_checked
from pipelines.settings.params import Params, load_params
from pipelines.settings.problems import read_yaml

DEMO = Path(__file__).parents[3] / "presets" / "demo.yaml"

Problems = Callable[..., list[str]]
MISSING = object()

SOURCES = "demo, demo_textures, mvtec_ad, dtd, imagenette"


def demo_with_one_model() -> str:
    """The demo's file with FAPM alone, and nothing that the others read: one problem at a time can be told apart."""
    text = DEMO.read_text(encoding="utf-8")
    for section in ("distill", "textures"):
        text = re.sub(rf"^{section}:.*?(?=^\S)", f"{section}: {{}}\n\n", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"(?<=^models:\n).*?(?=^  fapm:)", "", text, flags=re.DOTALL | re.MULTILINE)


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    """The demo's parameters, of FAPM alone, with some dotted keys changed, added or, for MISSING, left out."""
    values: dict[str, Any] = yaml.safe_load(demo_with_one_model())
    for path, value in changes.items():
        *parents, last = path.split(".")
        section = values
        for name in parents:
            section = section[name]
        if value is MISSING:
            del section[last]
        else:
            section[last] = value
    return values


@pytest.fixture
def problems(tmp_path: Path) -> Problems:
    """The lines of the message about the demo's parameters, changed."""

    def of(changes: dict[str, Any], with_models: bool = True) -> list[str]:
        path = tmp_path / "params.yaml"
        path.write_text(yaml.safe_dump(changed(changes), sort_keys=False), encoding="utf-8")
        with pytest.raises(ParamsError) as caught:
            load_checked(path) if with_models else load_params(path)
        first, *lines = str(caught.value).splitlines()
        count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
        assert first == f"{path}: {count}"
        assert all(line.startswith("  ") for line in lines)
        return [line.removeprefix("  ") for line in lines]

    return of


def load_text(tmp_path: Path, text: str | bytes) -> Params:
    path = tmp_path / "params.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_checked(path)


def test_the_demo_is_read() -> None:
    params = load_checked(DEMO)
    assert list(params.models) == ["adfa", "bgad", "diffusion_ad", "efficient_ad", "fapm"]
    assert params.cells()[-2:] == [("fapm", "fabric"), ("fapm", "gear")]
    assert len(params.cells()) == 10
    assert isinstance(params.model_config_of("fapm"), FAPMConfig)
    assert params.model_config_of("fapm").image_size == 256
    assert params.export.tolerance == 1e-4
    params.check_category("gear")


def test_models_need_not_be_checked(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(changed({"models": {"no_such_model": {"anything": 1}}})))
    assert load_params(path).cells()[0] == ("no_such_model", "fabric")
    with pytest.raises(ParamsError, match="unknown model"):
        load_checked(path)


def test_unknown_names_are_refused_later_too() -> None:
    params = load_checked(DEMO)
    with pytest.raises(ParamsError) as caught:
        params.model_config_of("padim")
    listed = "adfa, bgad, diffusion_ad, efficient_ad, fapm"
    assert str(caught.value) == f"model 'padim' is not in params.yaml, which lists: {listed}"
    with pytest.raises(ParamsError) as caught:
        params.check_category("Gear")
    assert str(caught.value) == "category 'Gear' is not in params.yaml, whose data.categories lists: fabric, gear"


def test_every_problem_is_listed_at_once(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    demo = demo_with_one_model()
    for old, new in (
        ("  root: data/demo", "  roots: data/demo"),
        ("\n    - gear", "\n    - Fabric"),
        ("      - gear", "      - gaer"),
        ("  holdout: 0.25", "  holdout: 1.5"),
        ("train:\n  seed: 0", "train:\n  seed: -1"),
        ("prepared # or", "prepard # or"),
        ("opset: 18", "opset: 9"),
        ("tolerance: 1.0e-4", "tolerance: 1e-4"),
        ("tracking:\n  experiment: demo\n", ""),
        ("  demo_textures:", "  demo_texture:"),
        ("    grid: 8", "    gird: 8"),
        ("      weights: embedded", "      weight: embedded"),
        ("name: mean", "name: quantile\n      valu: 0.5"),
        ("neighbours: 4", "neighbours: many"),
    ):
        assert demo.count(old) == 1, old
        demo = demo.replace(old, new)
    path.write_text(demo, encoding="utf-8")
    with pytest.raises(ParamsError) as caught:
        load_checked(path)
    assert (
        str(caught.value)
        == f"""{path}: 18 problems
  data.root: missing
  data.categories = ['fabric', 'Fabric']: 'fabric' and 'Fabric' are the same folder where case is ignored: rename one
  data.roots = 'data/demo': unknown key (did you mean 'root'?)
  prepare.holdout = 1.5: Input should be less than 1
  train.seed = -1: Input should be greater than or equal to 0
  evaluate.resolution = 'prepard': Input should be 'prepared' or 'native'
  export.opset = 9: Input should be greater than or equal to 18
  export.tolerance = '1e-4': Input should be a valid number; YAML takes it for text: write 1.0e-4, not 1e-4
  tracking: missing
  download.demo.categories.1 = 'gaer': unknown category (did you mean 'gear'?); known: blister, fabric, gear, wood
  download.demo_texture: unknown data set; known: demo, demo_textures, mvtec_ad, dtd, imagenette
  models.fapm.backbone.weights: missing
  models.fapm.backbone.weight = 'embedded': unknown key (did you mean 'weights'?)
  models.fapm.grid: missing
  models.fapm.far_rule.value: missing
  models.fapm.far_rule.valu = 0.5: unknown key (did you mean 'value'?)
  models.fapm.neighbours = 'many': Input should be a valid integer
  models.fapm.gird = 8: unknown key (did you mean 'grid'?)"""
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"evaluat": {}, "evaluate": MISSING},
            ["evaluate: missing", "evaluat: unknown key (did you mean 'evaluate'?)"],
        ),
        ({"data.category": 1}, ["data.category = 1: unknown key (did you mean 'categories'?)"]),
        ({"train.learning": 1}, ["train.learning = 1: unknown key"]),
        ({"download.demo.sed": 1}, ["download.demo.sed = 1: unknown key (did you mean 'seed'?)"]),
        (
            {"download.mvtec_ad": {"archiv": "official"}},
            [
                "download.mvtec_ad.archive: missing",
                "download.mvtec_ad.archiv = 'official': unknown key (did you mean 'archive'?)",
            ],
        ),
        ({"prepare.seed": 1.5}, ["prepare.seed = 1.5: Input should be a valid integer"]),
        ({"prepare.seed": True}, ["prepare.seed = True: Input should be a valid integer"]),
        ({"export.opset": "18"}, ["export.opset = '18': Input should be a valid integer"]),
        ({"export.tolerance": float("inf")}, ["export.tolerance = inf: Input should be a finite number"]),
        ({"evaluate.false_alarm_rate": 0}, ["evaluate.false_alarm_rate = 0: Input should be greater than 0"]),
        (
            {"evaluate.false_alarm_rate": float("nan")},
            ["evaluate.false_alarm_rate = nan: Input should be a finite number"],
        ),
        (
            {"evaluate.pixel_metrics": "fast"},
            ["evaluate.pixel_metrics = 'fast': Input should be 'exact' or 'streaming'"],
        ),
        ({"tracking.experiment": ""}, ["tracking.experiment = '': String should have at least 1 character"]),
        ({"data": 5}, ["data = 5: Input should be a mapping"]),
        ({"data": None}, ["data = None: Input should be a mapping"]),
        ({"download": 5}, ["download = 5: Input should be a mapping"]),
        ({"download.demo": 5}, ["download.demo = 5: Input should be a mapping"]),
        (
            {"download": {}},
            [f"download: names no data set; known: {SOURCES}"],
        ),
        ({"models": {}}, ["models: Dictionary should have at least 1 item"]),
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
            {"prepare.image_sizes": [128, 512]},
            ["models.fapm.image_size = 256: not one of prepare.image_sizes [128, 512]"],
        ),
    ],
)
def test_what_is_said(problems: Problems, changes: dict[str, Any], expected: list[str]) -> None:
    found = problems(changes)
    assert len(found) == len(expected)
    assert all(line.startswith(start) for line, start in zip(found, expected, strict=True)), found


@pytest.mark.parametrize(
    ("categories", "expected"),
    [
        (["A", "A"], "data.categories = ['A', 'A']: 'A' and 'A' are the same folder where case is ignored: rename one"),
        (["bolt", "nut", "Bolt"], "data.categories = ['bolt', 'nut', 'Bolt']: 'bolt' and 'Bolt' are the same folder"),
        ([], "data.categories = []: List should have at least 1 item"),
        (["a", 7], "data.categories.1 = 7: Input should be a valid string"),
        ([False], "data.categories.0 = False: Input should be a valid string"),
        *(([name], f"data.categories.0 = {name!r}: String should match pattern") for name in ("", "..", "a/b", "a-b")),
    ],
)
def test_categories_are_names_of_folders_and_cells(problems: Problems, categories: list[Any], expected: str) -> None:
    (found,) = problems({"data.categories": categories})
    assert found.startswith(expected)


def test_a_long_section_is_not_printed(problems: Problems) -> None:
    assert problems({"modles": {"fapm": {"image_size": 256}}}) == ["modles: unknown key (did you mean 'models'?)"]


def test_without_its_models_the_rest_is_still_checked(problems: Problems) -> None:
    assert problems({"models.fapm.crop": 512, "train.seed": -1}, with_models=False) == [
        "train.seed = -1: Input should be greater than or equal to 0"
    ]


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
    for path in paths:
        *parents, last = path.split(".")
        section = values
        for parent in parents:
            section = section[parent]
        section[last] = value
    with pytest.raises(ParamsError) as caught:
        load_text(tmp_path, yaml.safe_dump(values))
    message = str(caught.value)
    assert [path for path in paths if f"{path} = {value!r}: Input should be a finite number" not in message] == []


def test_a_preset_can_share_settings_between_sections(tmp_path: Path) -> None:
    text = DEMO.read_text(encoding="utf-8")
    text = text.replace("  test_normal: 0.25", "  <<: &seeded {seed: 5}\n  test_normal: 0.25")
    text = text.replace("train:\n  seed: 0", "train:\n  <<: *seeded")
    params = load_text(tmp_path, text)
    assert params.train.seed == 5
    assert params.prepare.seed == 0  # its own key wins


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    assert load_text(tmp_path, b"\xef\xbb\xbf" + DEMO.read_bytes()) == load_checked(DEMO)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: 2\na: 3\n", "not valid YAML in line 3: key 'a' appears twice"),
        ("models:\n  fapm: {}\n  fapm: {}\n", "not valid YAML in line 3: key 'fapm' appears twice"),
        ("a: [1,\n", "not valid YAML in line 2: expected the node content, but found '<stream end>'"),
        ("a: {{ b }}\n", "not valid YAML in line 1: found unhashable key"),
        ("a:\n\t- 1\n", "not valid YAML in line 2: found character '\\t' that cannot start any token"),
        ("a: !!python/object/apply:os.getcwd []\n", "not valid YAML in line 1: could not determine a constructor"),
        ("a: \0\n", "not valid YAML: unacceptable character #x0000"),
        (b"a: \xff\n", "not UTF-8 text (invalid start byte at byte 3)"),
        ("- a\n", "holds list, not a mapping of sections"),
        ("just words\n", "holds str, not a mapping of sections"),
        ("", "holds NoneType, not a mapping of sections"),
    ],
)
def test_what_is_no_mapping_is_refused_in_one_line(tmp_path: Path, text: str | bytes, expected: str) -> None:
    with pytest.raises(ParamsError) as caught:
        load_text(tmp_path, text)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'params.yaml'}: {expected}")
    assert len(message.splitlines()) == 1


def test_keys_that_are_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"(?m)^  7 = 7: Keys should be strings$"):
        load_text(tmp_path, DEMO.read_text(encoding="utf-8") + "7: 8\n")


def test_a_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ParamsError) as caught:
        read_yaml(tmp_path / "params.yaml")
    assert str(caught.value) == (
        f"{tmp_path / 'params.yaml'}: no such file; run in the project's folder, or put a preset in place with "
        "`blemish preset demo`"
    )
