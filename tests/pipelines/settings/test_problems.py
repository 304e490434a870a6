"""What is said of a file that is no YAML or holds what it must not: each problem in one line."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from changed_params import DEMO, MISSING, load_text, problems_of
from dvc.utils.serialize import parse_yaml

from pipelines.errors import ParamsError
from pipelines.settings.params import load_params
from pipelines.settings.problems import read_yaml

SOURCES = "demo, demo_textures, mvtec_ad, dtd, imagenette, elpv"


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
        ({"export.max_difference": float("inf")}, ["export.max_difference = inf: Input should be a finite number"]),
        (
            {"export.precisions": ["int8"]},
            [
                "export.precisions = ['int8']: float32, of which others are made, and each once: [float32] or "
                "[float32, int8]"
            ],
        ),
        (
            {"export.precisions": ["float32", "int4"]},
            ["export.precisions.1 = 'int4': Input should be 'float32' or 'int8'"],
        ),
        (
            {"export.max_decisions_changed": 1.5},
            ["export.max_decisions_changed = 1.5: Input should be less than or equal to 1"],
        ),
        (
            {"export.precisions": ["float32", "int8"], "prepare.holdout": "folds"},
            [
                "export.precisions: int8 with prepare.holdout = 'folds': its threshold is set on good parts that it "
                "has not learnt from; hold out a share, such as 0.25, or write [float32]"
            ],
        ),
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
        *(
            (
                {"tracking.experiment": name},
                [f"tracking.experiment = {name!r}: the report's folder in reports/ is called so"],
            )
            for name in ("a/../../b", "..", "/", ".", "${data.root}", "a\\b", "a ", "a\tb", "x" * 201)
        ),
        ({"data": 5}, ["data = 5: Input should be a mapping"]),
        ({"data": None}, ["data = None: Input should be a mapping"]),
        ({"download": 5}, ["download = 5: Input should be a mapping"]),
        ({"download.demo": 5}, ["download.demo = 5: Input should be a mapping"]),
        (
            {"download": {"demos": {}}},
            [f"download.demos: unknown data set; known: {SOURCES}"],
        ),
        ({"models": {}}, ["models: Dictionary should have at least 1 item"]),
    ],
)
def test_what_is_said(tmp_path: Path, changes: dict[str, Any], expected: list[str]) -> None:
    found = problems_of(load_params, tmp_path, changes)
    assert len(found) == len(expected)
    assert all(line.startswith(start) for line, start in zip(found, expected, strict=True)), found


def test_a_long_section_is_not_printed(tmp_path: Path) -> None:
    assert problems_of(load_params, tmp_path, {"modles": {"fapm": {"image_size": 256}}}) == [
        "modles: unknown key (did you mean 'models'?)"
    ]


def test_a_preset_can_share_settings_between_sections(tmp_path: Path) -> None:
    text = DEMO.read_text(encoding="utf-8")
    text = text.replace("  fapm:\n", "  fapm: &fapm\n")
    text = text.replace("\ntrain: ", "  fapm_wide:\n    <<: *fapm\n    method: fapm\n    grid: 8\n\ntrain: ")
    params = load_text(load_params, tmp_path, text)
    assert params.models["fapm_wide"] == params.models["fapm"] | {"method": "fapm", "grid": 8}  # its own key wins
    assert params.method_of("fapm_wide") == params.method_of("fapm") == "fapm"


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    assert load_text(load_params, tmp_path, b"\xef\xbb\xbf" + DEMO.read_bytes()) == load_params(DEMO)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: 2\na: 3\n", "not valid YAML in line 3: key 'a' appears twice"),
        ("models:\n  fapm: {}\n  fapm: {}\n", "not valid YAML in line 3: key 'fapm' appears twice"),
        ("a: [1,\n", "not valid YAML in line 2: did not find expected node content"),
        ("a: {{ b }}\n", "not valid YAML in line 1: found unhashable key"),
        ("a:\n\t- 1\n", "not valid YAML in line 2: found character that cannot start any token"),
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
        load_text(load_params, tmp_path, text)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'params.yaml'}: {expected}")
    assert len(message.splitlines()) == 1


NUMBERS = ["01", "08", "12e4", "1_000", "0o7", "0x1f", "012", "1.5", "2001-01-01", ".inf"]
TEXTS = ["yes", "on", "NO", "1:30", "0b2"]


@pytest.mark.parametrize("text", NUMBERS)
def test_a_name_that_dvc_takes_for_a_number_is_refused(tmp_path: Path, text: str) -> None:
    demo = DEMO.read_text(encoding="utf-8")
    with pytest.raises(ParamsError, match=r"categories\.1 = .*: Input should be a valid string: put it in quotes"):
        load_text(load_params, tmp_path, demo.replace("\n  - gear\n", f"\n  - {text}\n", 1))
    quoted = load_text(read_yaml, tmp_path, demo.replace("\n  - gear\n", f'\n  - "{text}"\n'))
    assert quoted["data"]["categories"][1] == text


@pytest.mark.parametrize("text", [*NUMBERS, *TEXTS, "true", "null"])
def test_keys_and_values_are_what_dvc_reads(tmp_path: Path, text: str) -> None:
    document = f"{text}:\n  a: {text}\n  b:\n  - {text}\n"
    found = load_text(read_yaml, tmp_path, document)
    assert repr(found) == repr(parse_yaml(document, ""))
    assert text not in TEXTS or found == {text: {"a": text, "b": [text]}}


@pytest.mark.parametrize("text", ["0x_", "2001-99-99", '"\\U00110000"', "!!bool x", "!!float x", "[" * 3000])
def test_a_value_that_is_none_is_one_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(ParamsError, match="not valid YAML") as caught:
        load_text(read_yaml, tmp_path, f"a: {text}")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["demo", "folder", "mvtec_ad"])
def test_the_presets_say_the_same_in_both_versions_of_yaml(name: str) -> None:
    path = DEMO.with_name(f"{name}.yaml")
    assert read_yaml(path) == yaml.safe_load(path.read_text(encoding="utf-8"))


def test_keys_that_are_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"(?m)^  7 = 7: Keys should be strings$"):
        load_text(load_params, tmp_path, DEMO.read_text(encoding="utf-8") + "7: 8\n")


def test_a_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ParamsError) as caught:
        read_yaml(tmp_path / "params.yaml")
    assert str(caught.value) == (
        f"{tmp_path / 'params.yaml'}: no such file; run in the project's folder, begin a project with `blemish init`, "
        "or put a preset in place with `blemish preset demo`"
    )
