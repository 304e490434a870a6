"""A CI job fails where a figure is not what was asked for, and where it is not known."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import tiny_params
from drawn_cells import read_summary, summary_of

from pipelines.errors import StageError
from pipelines.paths import Project
from pipelines.report.gate import Gate, gate
from pipelines.settings.params import Params

MODELS, CATEGORIES = ["fapm", "bgad"], ["nut", "bolt"]  # image AUROC 98.0 and 97.8, 97.0 and 96.8


@pytest.fixture
def project(tmp_path: Path) -> Project:
    read_summary(summary_of(MODELS, CATEGORIES)).save(Project(tmp_path).summary("tests"))
    return Project(tmp_path)


def params(categories: list[str] = CATEGORIES) -> Params:
    values: dict[str, Any] = tiny_params()
    values["data"]["categories"] = categories
    values["models"] = {model: {} for model in MODELS}
    return Params.model_validate(values)


def asked(metric: str, **bounds: Any) -> Gate:
    return Gate(**({"at_least": None, "at_most": None, "model": None, "category": None} | {"metric": metric} | bounds))


def refused(project: Project, found: Gate, of: Params | None = None) -> str:
    with pytest.raises(StageError) as caught:
        gate(project, of or params(), found)
    return str(caught.value)


def test_all_cells_pass_or_each_that_does_not_is_named(project: Project) -> None:
    assert gate(project, params(), asked("image_auroc", at_least=0.968)) == "Image AUROC at least 96.8 in 4 cells"
    assert refused(project, asked("image_auroc", at_least=0.97)) == (
        "1 thing not as asked for\n  - bgad on bolt: Image AUROC 96.8, asked for: at least 97.0"
    )
    assert gate(project, params(), asked("image_auroc", at_least=0.978, model="fapm")).endswith("in 2 cells")
    assert gate(project, params(), asked("image_auroc", at_most=0.97, at_least=0.9, model="bgad", category="nut")) == (
        "Image AUROC at least 90.0 and at most 97.0 in 1 cell"
    )
    assert "bgad on nut: Image AUROC 97.0, asked for: at most 95.0" in refused(
        project, asked("image_auroc", at_most=0.95)
    )


def test_what_is_not_known_does_not_pass(project: Project) -> None:
    assert "fapm on nut: no AUPRO 0.3" in refused(project, asked("aupro_30", at_least=0.1))
    told = refused(project, asked("image_auroc", at_least=0.1), params([*CATEGORIES, "screw"]))
    assert "Not in this report, which is of other cells: fapm on screw" in told


def test_what_makes_no_sense(project: Project, tmp_path: Path) -> None:
    assert refused(project, asked("recal", at_least=0.9)).startswith("metric 'recal': unknown (did you mean 'recall'?)")
    assert refused(project, asked("recall")) == (
        "recall: nothing is asked for; give --at-least or --at-most, as a share such as 0.9"
    )
    told = "adfa on nut: not in the last report; run `blemish run`, or correct the name"
    assert refused(project, asked("recall", at_least=0.9, model="adfa", category="nut")) == told
    with pytest.raises(StageError, match=r"summary\.json: not there"):
        gate(Project(tmp_path / "other"), params(), asked("recall", at_least=0.9))


def test_the_verb_ends_with_an_exit_code(root: Path, blemish: Any) -> None:
    values = tiny_params()
    values["models"] = {"fapm": values["models"]["fapm"]}
    values["data"]["categories"] = ["nut"]
    (root / "params.yaml").write_text(yaml.safe_dump(values))
    read_summary(summary_of(["fapm"], ["nut"])).save(Project(root).summary("tests"))
    passed = blemish("gate", "--metric", "image_auroc", "--at-least", "0.9")
    assert (passed.code, passed.out) == (0, "Image AUROC at least 90.0 in 1 cell\n")
    assert blemish("gate", "--metric", "image_auroc", "--at-least", "0.99").code == 1
