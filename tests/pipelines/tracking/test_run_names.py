from pathlib import Path

import mlflow
import pytest

from pipelines.tracking.run_names import run_name
from pipelines.tracking.runs import open_run
from pipelines.tracking.store import tracking_uri

# SQLAlchemy warns of what MLflow's tables ask of it.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning")

FIRST = {
    "models.fapm.grid": "4",
    "models.fapm.backbone.name": "r18",
    "models.fapm.image_score": "max",
    "inputs.teacher_sha256": "0123456789abcdef",
    "prepare.holdout": "0.25",
    "train.seed": "0",
    "data.sha256": "0123456789abcdef",
    "data.index_sha256": "0123456789abcdef",
}
EARLIER = [("fapm-gear", FIRST)]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"models.fapm.grid": "8"}, "fapm-gear, grid 8"),
        ({"models.fapm.backbone.name": "r50"}, "fapm-gear, backbone r50"),
        ({"prepare.holdout": "0.5", "data.index_sha256": "fedcba9876543210"}, "fapm-gear, holdout 0.5"),
        ({"data.sha256": "fedcba9876543210", "data.index_sha256": "fedcba9876543210"}, "fapm-gear, data fedcba98"),
        ({"inputs.teacher_sha256": "fedcba9876543210"}, "fapm-gear, teacher fedcba98"),
        ({"models.fapm.grid": "8", "models.fapm.image_score": "released"}, "fapm-gear, grid 8, image_score released"),
        ({"models.fapm.newer": "1"}, "fapm-gear, newer 1"),
        ({"models.fapm.grid": "x" * 90}, f"fapm-gear, grid {'x' * 23}…"),
        ({}, "fapm-gear (2)"),
        ({"train.seed": "1"}, "fapm-gear (2)"),  # a cell's name tells of the seed
    ],
)
def test_a_run_is_called_after_what_differs(changed: dict[str, str], expected: str) -> None:
    assert run_name("fapm-gear", FIRST | changed, EARLIER) == expected


def test_the_first_run_has_the_name_of_its_cell() -> None:
    assert run_name("fapm-gear", FIRST, []) == "fapm-gear"
    assert run_name("fapm-gear-seed1", FIRST | {"train.seed": "1"}, EARLIER) == "fapm-gear-seed1"


def test_many_differences_are_counted() -> None:
    changed = {f"models.fapm.s{number}": str(number) for number in range(9)}
    assert run_name("fapm-gear", FIRST | changed, EARLIER) == "fapm-gear, s0 0, s1 1, s2 2, 6 more"


def test_a_run_whose_settings_are_unknown_is_compared_with_none() -> None:
    assert run_name("fapm-gear", FIRST, [("fapm-gear", {}), *EARLIER]) == "fapm-gear (2)"


def test_no_two_names_are_the_same_nor_too_long() -> None:
    earlier = list[tuple[str, dict[str, str]]]()
    for _ in range(12):
        earlier.append((run_name("a" * 300, FIRST, earlier), FIRST))
    names = [name for name, _ in earlier]
    assert len(set(names)) == 12
    assert {len(name) for name in names} == {250}
    assert names[-1].endswith("a (12)")


def test_runs_of_a_cell_are_told_apart_and_a_resumed_one_keeps_its_name(tmp_path: Path) -> None:
    client = mlflow.MlflowClient(tracking_uri(tmp_path))

    def trained(name: str, tags: dict[str, str], grid: int, run_id: str | None = None) -> tuple[str, str]:
        settings = {"models": {"fapm": {"grid": grid}}}
        with open_run(tmp_path, "parts", name, tags, run_id, settings=settings) as run:
            run.settings(settings)
        return run.run_id, client.get_run(run.run_id).info.run_name

    gear, nut = ({"model": "fapm", "category": category, "stage": ""} for category in ("gear", "two words"))
    first, name = trained("fapm-gear", gear, 4)
    assert name == "fapm-gear"
    assert trained("fapm-two words", nut, 8)[1] == "fapm-two words"
    assert trained("fapm-gear", gear, 8)[1] == "fapm-gear, grid 8"
    assert trained("fapm-gear", gear, 8)[1] == "fapm-gear, grid 8 (2)"
    assert trained("fapm-gear", gear, 4, first) == (first, "fapm-gear")
    teacher = {"model": "fapm", "stage": "distill"}
    assert [trained("distill-fapm", teacher, grid)[1] for grid in (4, 8)] == ["distill-fapm", "distill-fapm, grid 8"]
