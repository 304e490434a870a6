import contextlib
import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipelines.errors import StageError
from pipelines.files import write_json
from pipelines.params import Params, load_params
from pipelines.paths import Project
from pipelines.report import (
    defect_table,
    leaderboard_table,
    markdown_table,
    one_line,
    print_results,
    report,
    summarise,
    threshold_table,
)

PRESETS = Path(__file__).parents[2] / "presets"


def evaluation(model: str, category: str, **metrics: float | None) -> dict[str, Any]:
    """What `evaluate` writes, in so far as the report reads it."""
    numbers = {"image_auroc": 0.9, "recall": 0.5, "false_alarms": 0.1, "threshold": 1.0, "train_seconds": 12.4}
    return {
        "model": model,
        "category": category,
        "run_id": f"run-{model}-{category}",
        "settings": {"image_size": 256},
        "counts": {"train": 40, "holdout": 10, "test_normal": 30, "test_anomalous": 24},
        "metrics": {**numbers, **metrics},
        "threshold": {
            "value": 1.23456,
            "rate_requested": 0.05,
            "num_images": 10,
            "rank": 10,
            "expected_rate": 0.0909,
            "interval_low": 0.0025,
            "interval_high": 0.308,
            "attainable": False,
            "num_images_needed": 19,
            "pixel_value": 2.0,
            "oracle": 1.5,
        },
        "defects": {
            "cut": {"count": 12, "recall": 0.75, "auroc": 0.95},
            "hole": {"count": 12, "recall": 0.25, "auroc": None},
        },
    }


def params_of(models: list[str], categories: list[str]) -> Params:
    params = load_params(PRESETS / "demo.yaml", check_models=False)
    data = params.data.model_copy(update={"categories": categories})
    return params.model_copy(update={"data": data, "models": {name: {} for name in models}})


def put(project: Project, *evaluations: dict[str, Any]) -> None:
    for one in evaluations:
        write_json(project.evaluation(one["model"], one["category"]) / "evaluation.json", one)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """Two models on two categories."""
    project = Project(tmp_path)
    put(
        project,
        evaluation("a", "nut", image_auroc=0.8, pixel_auroc=0.9),
        evaluation("a", "my bolt", image_auroc=0.9, pixel_auroc=0.7),
        evaluation("b", "nut", image_auroc=1.0, pixel_auroc=0.5),
        evaluation("b", "my bolt", image_auroc=0.5, pixel_auroc=None),
    )
    return project


BOTH = params_of(["a", "b"], ["nut", "my bolt"])


def test_the_average_weighs_every_category_alike(project: Project) -> None:
    averages = summarise(BOTH, project)["averages"]
    assert [row["model"] for row in averages] == ["a", "b"]
    assert averages[0]["image_auroc"] == pytest.approx(0.85)
    assert averages[0]["pixel_auroc"] == pytest.approx(0.8)
    assert averages[1]["image_auroc"] == pytest.approx(0.75)


def test_a_metric_that_a_category_lacks_has_no_average(project: Project) -> None:
    average = summarise(BOTH, project)["averages"][1]
    assert average["pixel_auroc"] is None  # null in one
    assert average["aupro_30"] is None  # not there in either
    assert average["train_seconds"] is None  # a sum of seconds is no metric


def test_cells_come_in_the_files_order_and_removed_ones_are_gone(project: Project) -> None:
    summary = summarise(BOTH, project)
    expected = [("a", "nut"), ("a", "my bolt"), ("b", "nut"), ("b", "my bolt")]
    assert [(cell["model"], cell["category"]) for cell in summary["cells"]] == expected
    summary = summarise(params_of(["b"], ["my bolt"]), project)
    assert [(cell["model"], cell["category"]) for cell in summary["cells"]] == [("b", "my bolt")]
    assert summary["categories"] == ["my bolt"]
    assert list(summary["models"]) == ["b"]
    assert "nut" not in json.dumps(summary)


def test_a_cell_that_is_not_evaluated_is_named(project: Project) -> None:
    with pytest.raises(StageError) as caught:
        summarise(params_of(["a"], ["nut", "screw"]), project)
    path = project.root / "evaluations" / "a" / "screw" / "evaluation.json"
    assert str(caught.value) == f"{path}: not there; run `blemish evaluate a screw`, or `dvc repro` for everything"


def test_the_size_of_the_exported_file_is_told_if_there_is_one(project: Project) -> None:
    onnx = project.export("a", "nut") / "model.onnx"
    onnx.parent.mkdir(parents=True)
    onnx.write_bytes(bytes(1_234_567))
    cells = summarise(BOTH, project)["cells"]
    assert [cell["onnx_megabytes"] for cell in cells] == [1.23, None, None, None]


def test_the_leaderboard(project: Project) -> None:
    assert (
        leaderboard_table(summarise(BOTH, project))
        == """\
| Model | Category | Image AUROC | Defects found | False alarms | Pixel AUROC | Train, s |
| --- | --- | ---: | ---: | ---: | ---: | ---: |
| a | nut | 80.0 | 50.0 | 10.0 | 90.0 | 12 |
| a | my bolt | 90.0 | 50.0 | 10.0 | 70.0 | 12 |
| **a** | **average** | **85.0** | **50.0** | **10.0** | **80.0** |  |
| b | nut | 100.0 | 50.0 | 10.0 | 50.0 | 12 |
| b | my bolt | 50.0 | 50.0 | 10.0 | - | 12 |
| **b** | **average** | **75.0** | **50.0** | **10.0** |  |  |"""
    )


def test_one_category_needs_no_average(project: Project) -> None:
    table = leaderboard_table(summarise(params_of(["a", "b"], ["nut"]), project))
    assert "average" not in table
    assert len(table.splitlines()) == 4


def test_every_row_of_a_table_has_every_column(project: Project) -> None:
    summary = summarise(BOTH, project)
    tables = [leaderboard_table(summary), defect_table(summary), threshold_table(summary).split("\n\n")[0]]
    for table in (*tables, markdown_table(["a", "b", "c"], [])):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_the_thresholds_say_what_few_parts_can_promise(project: Project) -> None:
    lines = threshold_table(summarise(params_of(["a"], ["nut"]), project)).splitlines()
    assert lines[2] == "| a | nut | 10 | 1.235 | 5.0 † | 9.1 | 0.2 to 30.8 | 10.0 of 30 | 1.5 |"
    assert lines[-1].startswith("† Too few held-out parts")
    enough = evaluation("a", "nut", false_alarms=None)
    enough["threshold"] |= {"attainable": True, "oracle": None}
    put(project, enough)
    lines = threshold_table(summarise(params_of(["a"], ["nut"]), project)).splitlines()
    assert lines[2:] == ["| a | nut | 10 | 1.235 | 5.0 | 9.1 | 0.2 to 30.8 | - of 30 | - |"]


def test_the_defects(project: Project) -> None:
    lines = defect_table(summarise(params_of(["a"], ["nut"]), project)).splitlines()
    assert lines[2:] == ["| a | nut | cut | 12 | 75.0 | 95.0 |", "| a | nut | hole | 12 | 25.0 | - |"]


def test_one_line_for_the_terminal() -> None:
    assert one_line({"image_auroc": 0.98765, "recall": 1.0, "false_alarms": 0.0, "threshold": 3.0}) == (
        "Image AUROC 98.8, Defects found 100.0, False alarms 0.0, Pixel AUROC -, AUPRO 0.3 -"
    )


class Recorder:
    """Stands in for an open run."""

    def __init__(self) -> None:
        self.logged: dict[str, float] = {}
        self.tagged: dict[str, str] = {}
        self.files: list[str] = []

    def metrics(self, values: dict[str, float]) -> None:
        self.logged |= values

    def tags(self, values: dict[str, str]) -> None:
        self.tagged |= values

    def file(self, path: Path, folder: str) -> None:
        assert path.exists()
        self.files.append(f"{folder}/{path.name}")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, Recorder]]:
    """(experiment, key, what was logged) of each summary run."""
    opened: list[tuple[str, str, Recorder]] = []

    @contextlib.contextmanager
    def summary_run(_root: Path, experiment: str, key: str) -> Iterator[Recorder]:
        opened.append((experiment, key, Recorder()))
        yield opened[-1][2]

    monkeypatch.setattr("pipelines.tracking.summary_run", summary_run)
    return opened


def test_the_report_is_written_and_logged(project: Project, runs: list[tuple[str, str, Recorder]]) -> None:
    examples = project.evaluation("a", "my bolt") / "examples.png"
    examples.touch()
    path = report(BOTH, project)
    assert path == project.root / "reports" / "report.md"
    assert sorted(file.name for file in project.reports.iterdir()) == ["leaderboard.csv", "report.md", "summary.json"]
    text = path.read_text(encoding="utf-8")
    assert leaderboard_table(summarise(BOTH, project)) in text
    assert text.count("![examples](") == 1
    # a name with a space would end the link
    assert "![examples](../evaluations/a/my%20bolt/examples.png)" in text
    with (project.reports / "leaderboard.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["cell"] for row in rows] == ["a-nut", "a-my bolt", "b-nut", "b-my bolt"]
    assert (rows[0]["image_auroc"], rows[3]["pixel_auroc"]) == ("0.8", "")
    (experiment, _, run) = runs[0]
    assert experiment == "demo"
    assert run.logged["a.image_auroc"] == pytest.approx(0.85)
    assert "b.pixel_auroc" not in run.logged
    assert run.tagged["categories"] == "nut, my bolt"
    assert run.files == ["report/report.md", "report/leaderboard.csv"]


def test_the_same_cells_are_summed_up_in_the_same_run(project: Project, runs: list[tuple[str, str, Recorder]]) -> None:
    report(BOTH, project)
    report(params_of(["b", "a"], ["my bolt", "nut"]), project)
    report(params_of(["a"], ["nut"]), project)
    put(project, {**evaluation("a", "nut"), "run_id": "trained-again"})
    report(BOTH, project)
    keys = [key for _, key, _ in runs]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def printed(project: Project) -> str:
    text = io.StringIO()
    print_results(project, Console(file=text, width=120, no_color=True))
    return text.getvalue()


def test_results_are_printed_with_what_to_do_next(project: Project, runs: list[tuple[str, str, Recorder]]) -> None:
    report(BOTH, project)
    text = printed(project)
    assert "85.0" in text
    assert "my bolt" in text
    assert f"blemish predict {project.export('a', 'nut') / 'model.onnx'} IMAGE_OR_FOLDER" in text
    assert len(runs) == 1


def test_without_a_report_there_are_no_results(tmp_path: Path) -> None:
    with pytest.raises(StageError) as caught:
        printed(Project(tmp_path))
    path = tmp_path / "reports" / "summary.json"
    assert str(caught.value) == f"{path}: no report yet; run `make demo` or `dvc repro`"
