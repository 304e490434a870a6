import contextlib
import csv
import io
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from drawn_cells import LATENCY, groups, threshold, to_person
from made_up import BOTH, params_of, put, put_both, put_evaluation
from rich.console import Console

from pipelines.errors import StageError
from pipelines.evaluation.certainty import Champion
from pipelines.files import write_json
from pipelines.paths import Project
from pipelines.refusals import Refusal
from pipelines.report import markdown
from pipelines.report.report import report
from pipelines.report.seeds import SeedFigure, SeedFigures
from pipelines.report.summary import Summary, summarise
from pipelines.report.terminal import one_line, print_results
from pipelines.settings.params import Params, TrackingConfig
from pipelines.tracking.pages import Pages

FEW = threshold() | {"value": 1.23456, "num_images": 10, "rank": 10, "expected_rate": 0.0909, "attainable": False}
FEW |= {"interval_low": 0.0025, "interval_high": 0.308, "oracle": 1.5}
ONE = params_of(["a"], ["nut"])


def write_latency(project: Project, model: str, category: str, network: float = 20.0, threads: int = 1) -> None:
    """As the latency stage does."""
    fast = {"p50": 1.0, "p95": 2.0, "p99": 3.0}
    slow = {"p50": network, "p95": 2 * network, "p99": 3 * network}
    parts = {"decode": fast, "resize": fast, "network": slow, "postprocess": fast, "total": slow}
    found = {"threads": threads, "milliseconds": parts, "throughput": {"batch_size": 8, "images_per_second": 55.24}}
    write_json(project.cell(model, category, 0).latency, LATENCY | found)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return put_both(Project(tmp_path))


def shown(value: float) -> str:
    return f"{100 * value:.1f}"


def test_the_leaderboard(project: Project) -> None:
    summary = summarise(BOTH, project)
    lines = markdown.leaderboard_table(summary).splitlines()
    assert lines[0] == (
        "| Model | Category | Test images | Image AUROC | 95 % | Image AP | Image F1-max (oracle) | Defects found "
        "| False alarms | Promised | Pixel AUROC | Pixel AP | Pixel F1 | Pixel F1-max (oracle) | AUPRO 0.3 "
        "| AUPRO 0.05 | Steps | Train, s |"
    )
    assert [line.split(" | ")[:3] for line in lines[2:]] == [
        ["| a", "nut", "30 + 40"],
        ["| a", "my bolt", "20 + 20"],
        ["| **a**", "**average**", "**50 + 60**"],
        ["| b", "nut", "30 + 40"],
        ["| b", "my bolt", "20 + 20"],
        ["| **b**", "**average**", "**50 + 60**"],
    ]
    cell, average = summary.cells[0], summary.averages[0]
    low, high = cell.intervals["image_auroc"]
    assert lines[2].split(" | ")[3:5] == [shown(cell.metrics["image_auroc"]), f"{shown(low)} to {shown(high)}"]
    assert lines[3].endswith("| - | - | - | - | - | 300 | 12 |")  # no masks
    assert lines[4].split(" | ")[3] == f"**{shown(average.metrics['image_auroc'])}**"
    assert lines[4].endswith("|  |  |  |  |  |  |  |")  # nor an average of them; nor of promises and seconds


def test_one_category_needs_no_average(project: Project) -> None:
    table = markdown.leaderboard_table(summarise(params_of(["a", "b"], ["nut"]), project))
    assert "average" not in table
    assert len(table.splitlines()) == 4


def test_every_row_of_a_table_has_every_column(project: Project) -> None:
    write_latency(project, "a", "nut")
    summary = summarise(BOTH, project)
    tables = [
        markdown.leaderboard_table(summary),
        markdown.defect_table(summary),
        markdown.champion_table(summary),
        markdown.latency_table(summary),
    ]
    tables += [markdown.threshold_table(summary).split("\n\n")[0], markdown.markdown_table(["a", "b", "c"], [])]
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_a_bar_in_a_name_does_not_end_its_cell() -> None:
    table = markdown.markdown_table(["Category", "AUROC"], [["left|right", "99.0"]], num_names=1)
    assert table.endswith("\n| left\\|right | 99.0 |")


def test_names_mean_nothing_in_markdown(project: Project) -> None:
    found = {"count": 12, "recall": 0.75, "recall_interval": (0.428, 0.945), "recall_at_rate": 0.5, "auroc": 0.95}
    put(project, "a", "nut", defects={"<b>x|`y` _z_": found})
    text = markdown.report_markdown(summarise(ONE, project), project, project.report("demo"))
    assert "| a | nut | &lt;b>x\\|\\`y\\` \\_z\\_ | 12 |" in text
    assert "<b>" not in text


def test_the_thresholds_say_what_few_parts_can_promise(project: Project) -> None:
    put(project, "a", "nut", threshold=FEW, good=30, defect=40)
    summary = summarise(ONE, project)
    alarms = shown(summary.cells[0].metrics["false_alarms"])
    lines = markdown.threshold_table(summary).splitlines()
    assert lines[2] == f"| a | nut | 10 | 1.235 | 5.0 † | 9.1 | 0.2 to 30.8 | {alarms} of 30 | 1.5 |"
    assert lines[-1].startswith("† Too few held-out parts")
    put(project, "a", "nut", threshold={**FEW, "attainable": True, "oracle": None}, good=30, defect=40)
    lines = markdown.threshold_table(summarise(ONE, project)).splitlines()
    assert lines[2:] == [f"| a | nut | 10 | 1.235 | 5.0 | 9.1 | 0.2 to 30.8 | {alarms} of 30 | - |"]


def test_three_answers_say_from_where_on_and_how_many(project: Project) -> None:
    put(project, "a", "nut", review=to_person(), good=30, defect=40)
    text = markdown.report_markdown(summarise(ONE, project), project, project.report("demo"))
    shown_threshold = f"{summarise(ONE, project).cells[0].threshold.value:.4g}"
    assert f"| a | nut | {shown_threshold} | 3 | 9 known defects | 4.8 | 0.0 to 16.8 |" in text
    never = {**to_person(), "reject_above": None, "comes_from": "held-out good parts", "num_images": 20}
    put(project, "a", "nut", review=never, good=30, defect=40)
    text = markdown.report_markdown(summarise(ONE, project), project, project.report("demo"))
    assert f"| a | nut | {shown_threshold} | never | 20 held-out good parts | 4.8 | 0.0 to 16.8 |" in text
    summary = summarise(ONE, project)
    cells = tuple(cell.model_copy(update={"review": None}) for cell in summary.cells)
    older = summary.model_copy(update={"cells": cells})
    assert "Three answers" not in markdown.report_markdown(older, project, project.report("demo"))


def test_the_promise_between_groups(project: Project) -> None:
    summary = summarise(BOTH, project)
    assert markdown.ASSUMED in markdown.report_markdown(summary, project, project.report("demo"))
    assert "Left-out groups" not in markdown.leaderboard_table(summary)
    for model in ("a", "b"):
        put(project, model, "nut", groups=groups(), good=30, defect=40)
    summary = summarise(BOTH, project)
    header, _, first, *_ = (line.split(" | ") for line in markdown.leaderboard_table(summary).splitlines())
    assert header[header.index("Promised") + 1] == "Left-out groups"
    assert first[header.index("Left-out groups")] == "12.5 (0.0 to 25.0)"
    text = markdown.report_markdown(summary, project, project.report("demo"))
    assert "- a on nut: the 2 groups of held-out good parts score differently, so that" in text
    assert "| a | nut | &lt;i>wed | 0 | 8 | 1 | 1.5 | 25.0 | 1 | 1 | 2.2 |" in text
    assert f"my bolt: {markdown.ASSUMED}" in text
    assert markdown.differing(summary) == [
        "Groups of held-out parts score differently, so that the promise does not hold for a new one: a on nut, b on "
        "nut."
    ]
    assert markdown.differing(summarise(ONE, put_both(project))) == []


def test_one_promise_names_no_category(project: Project) -> None:
    expected = "False alarms that the held-out good parts promise: 4.76\xa0% (asked for: 5\xa0%)."
    assert markdown.promises(summarise(BOTH, project)) == expected


def test_the_defects(project: Project) -> None:
    defects = {
        "cut": {"count": 12, "recall": 0.75, "recall_interval": (0.428, 0.945), "recall_at_rate": 0.5, "auroc": 0.95},
        "hole": {"count": 12, "recall": 0.25, "recall_interval": (0, 0.5), "recall_at_rate": None, "auroc": None},
    }
    put(project, "a", "nut", defects=defects)
    lines = markdown.defect_table(summarise(ONE, project)).splitlines()
    assert lines[2:] == [
        "| a | nut | cut | 12 | 75.0 | 42.8 to 94.5 | 50.0 | 95.0 |",
        "| a | nut | hole | 12 | 25.0 | 0.0 to 50.0 | - | - |",
    ]


def test_who_is_best(project: Project) -> None:
    summary = summarise(BOTH, project)
    lines = markdown.champion_table(summary).splitlines()
    assert lines[0].startswith("| Category | Image AUROC | Image AP |")
    assert lines[-1].startswith("| average | a | a |")
    (sentence,) = [s for s in markdown.sentences(summary.comparisons) if s.startswith("Image AUROC: a beats b by ")]
    assert sentence.endswith(".")
    places = summary.champions["image_auroc"]
    champions = summary.champions | {"image_auroc": places | {"nut": replace(places["nut"], tied_with=("b",))}}
    table = markdown.champion_table(summary.model_copy(update={"champions": champions}))
    assert table.splitlines()[2].startswith("| nut | a = b |")


def test_seeds_are_a_mean_and_a_spread(project: Project) -> None:
    summary = summarise(ONE, project)
    assert markdown.seed_table(summary) == ""
    figure = SeedFigure(mean=0.97, sd=0.004, values=(0.966, 0.97, 0.974))
    seeds = SeedFigures(seeds=(0, 1, 2), metrics={"image_auroc": figure})
    cell = summary.cells[0].model_copy(update={"seeds": seeds})
    lines = markdown.seed_table(summary.model_copy(update={"cells": (cell,)})).splitlines()
    assert lines[2] == "| a | nut | 0, 1, 2 | 97.0 ± 0.4 | - | - | - | - | - |"


def test_latency_names_its_machine(project: Project) -> None:
    assert markdown.latency_table(summarise(BOTH, project)) == ""
    write_latency(project, "a", "nut")
    summary = summarise(BOTH, project)
    assert markdown.latency_table(summary).splitlines()[2:] == [
        "| a | nut | 1.0 / 2.0 / 3.0 | 1.0 / 2.0 / 3.0 | 20.0 / 40.0 / 60.0 | 1.0 / 2.0 / 3.0 | 20.0 / 40.0 / 60.0 "
        "| 55.2 in batches of 8 | 100 |"
    ]
    assert markdown.latency_machines(summary.cells) == "A CPU (2 cores), 1 thread, ONNX Runtime 1.0"
    write_latency(project, "b", "nut", threads=2)
    several = markdown.latency_machines(summarise(BOTH, project).cells)
    assert several.startswith("Several machines, whose figures cannot be compared: A CPU (2 cores), 1 thread, ")
    assert "2 threads" in several


def test_one_line_for_the_terminal() -> None:
    found = {"image_auroc": 0.98765, "recall": 1.0, "false_alarms": 0.0, "false_alarms_promised": 1 / 9}
    assert one_line(found | {"threshold": 3.0}) == (
        "Image AUROC 98.8, Defects found 100.0, False alarms 0.0 (promised: 11.1), Pixel AUROC -, AUPRO 0.3 -"
    )


class Recorder:
    """Stands in for an open run."""

    def __init__(self) -> None:
        self.tagged, self.files, self.description = {}, [], ""

    def tags(self, values: dict[str, str]) -> None:
        self.tagged |= values

    def describe(self, text: str) -> None:
        self.description = text

    def output(self, path: Path, folder: str) -> None:
        assert path.exists()
        self.files.append(f"{folder}/{path.name}")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, Recorder]]:
    """(experiment, key, what was logged) of each summary run; no page is drawn."""
    opened: list[tuple[str, str, Recorder]] = []

    @contextlib.contextmanager
    def summary_run(_root: Path, experiment: str, key: str) -> Iterator[Recorder]:
        opened.append((experiment, key, Recorder()))
        yield opened[-1][2]

    def write_html(_summary: Any, _project: Project, folder: Path, _place: Path, _originals: Any) -> Path:
        (folder / "report.html").touch()
        return folder / "report.html"

    monkeypatch.setattr("pipelines.tracking.store.prepare_store", lambda *_: ("", ""))
    monkeypatch.setattr("pipelines.tracking.runs.summary_run", summary_run)
    monkeypatch.setattr("pipelines.tracking.pages.pages", lambda *_: Pages("http://127.0.0.1:5000", "3"))
    monkeypatch.setattr("pipelines.tracking.cells.cell_runs", lambda *_: [])
    monkeypatch.setattr("pipelines.report.page.write", write_html)
    monkeypatch.setattr("pipelines.tracking.registry.crown", lambda *_: None)
    return opened


@pytest.mark.usefixtures("runs")
def test_each_category_has_its_champion(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    crowned: list[Any] = []
    monkeypatch.setattr("pipelines.tracking.registry.crown", lambda _root, *rest: crowned.append(rest))
    report(BOTH, project)
    summary = summarise(BOTH, project)
    best = {cell.category: cell for cell in summary.cells if cell.model == "a"}
    assert crowned == [
        ("demo", f"demo-{name}", best[name].run_id, f"a: Image AUROC {shown(best[name].metrics['image_auroc'])}")
        for name in ("nut", "my bolt")
    ]


def test_the_report_is_written_and_logged(project: Project, runs: list[tuple[str, str, Recorder]]) -> None:
    project.cell("a", "my bolt", 0).examples.touch()
    path = report(BOTH, project)
    assert path == project.root / "reports" / "demo" / "report.md"
    names = ("report.html", "report.md", "tables.md", "leaderboard.csv", "summary.json")
    assert {file.name for file in project.report("demo").iterdir()} == {*names, "tables"}
    text = path.read_text(encoding="utf-8")
    assert markdown.leaderboard_table(summarise(BOTH, project)) in text
    assert "## Who is best" in text
    assert text.count("![examples](") == 1
    # a name with a space would end the link
    assert "![examples](../../evaluations/a/my%20bolt/seed0/examples.png)" in text
    assert {file.name for file in (project.report("demo") / "tables").iterdir()} == {
        f"{metric}.{kind}"
        for metric in ("image_auroc", "pixel_auroc", "pixel_f1", "pixel_f1_max", "aupro_30")
        for kind in ("csv", "tex")
    }
    with (project.report("demo") / "leaderboard.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["cell"] for row in rows] == ["a-nut", "a-my bolt", "b-nut", "b-my bolt"]
    assert (rows[0]["test_normal"], rows[0]["test_anomalous"], rows[0]["seed"]) == ("30", "40", "0")
    assert float(rows[0]["image_auroc_low"]) < float(rows[0]["image_auroc"]) < float(rows[0]["image_auroc_high"])
    assert (rows[1]["pixel_auroc"], rows[1]["pixel_auroc_low"]) == ("", "")
    (experiment, _, run) = runs[0]
    assert experiment == "demo"
    header, _, first, *_ = run.description.splitlines()
    assert header.startswith("| Model | Image AUROC | Image AP |")
    assert first.startswith(f"| a | {shown(summarise(BOTH, project).averages[0].metrics['image_auroc'])} |")
    assert "Pixel AUROC" not in header  # a category has none, and so no average
    assert run.tagged["categories"] == "nut, my bolt"
    assert "- Image AUROC: a beats b by " in run.description
    assert run.files == [f"report/{name}" for name in names]


@pytest.mark.usefixtures("runs")
def test_each_experiment_keeps_its_report(project: Project) -> None:
    first = report(ONE, project)
    told = first.read_text(encoding="utf-8")
    other = ONE.model_copy(update={"tracking": TrackingConfig(experiment="/Users/me/second try")})
    project.cell("a", "nut", 0).examples.touch()
    second = report(other, project)
    assert second == project.root / "reports" / "Users" / "me" / "second try" / "report.md"
    assert first.read_text(encoding="utf-8") == told
    (picture,) = re.findall(r"!\[examples\]\((.*)\)", second.read_text(encoding="utf-8"))
    assert (second.parent / picture).resolve() == project.cell("a", "nut", 0).examples.resolve()


def test_one_model_has_nobody_to_beat(project: Project, runs: list[tuple[str, str, Recorder]]) -> None:
    text = report(ONE, project).read_text(encoding="utf-8")
    assert "Who is best" not in text
    assert "One seed each" in text
    low, high = summarise(ONE, project).averages[0].intervals["image_auroc"]
    assert f" ({shown(low)} to {shown(high)}), AUPRO 0.3 " in runs[0][2].description


def test_the_same_cells_are_summed_up_in_the_same_run(project: Project, runs: list[tuple[str, str, Recorder]]) -> None:
    report(BOTH, project)
    report(params_of(["b", "a"], ["my bolt", "nut"]), project)
    report(ONE, project)
    put(project, "a", "nut", run_id="trained-again", good=30, defect=40)
    report(BOTH, project)
    keys = [key for _, key, _ in runs]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def printed(project: Project, width: int = 120, params: Params = BOTH) -> str:
    text = io.StringIO()
    print_results(project, params, Console(file=text, width=width, no_color=True))
    return text.getvalue()


def test_results_are_printed_with_what_to_do_next(project: Project, runs: list[tuple[str, str, Recorder]]) -> None:
    report(BOTH, project)
    text = printed(project)
    summary = summarise(BOTH, project)
    assert shown(summary.averages[0].metrics["image_auroc"]) in text
    assert "my bolt" in text
    assert "30+40" in text
    assert "Image AUROC: a beats b by " in text
    assert f"blemish predict {project.cell('a', 'nut', 0).onnx} IMAGE_OR_FOLDER" in text
    assert len(runs) == 1


@pytest.mark.usefixtures("runs")
def test_results_lead_to_the_best_model(project: Project) -> None:
    for category in ("nut", "my bolt"):
        project.cell("a", category, 0).examples.touch()
    report(params_of(["b", "a"], ["my bolt", "nut"]), project)
    text = printed(project, width=200)
    first = project.cell("a", "my bolt", 0)
    assert f"Defects found:       {first.examples}" in text
    assert f"blemish predict {first.onnx} IMAGE_OR_FOLDER" in text
    cells = [cell for cell in Summary.of(project, "demo").cells if cell.model == "a"]
    found = sum(cell.confusion.true_positives for cell in cells)
    rejected = sum(cell.confusion.false_positives for cell in cells)
    assert f"a finds {found} of 60 defects and rejects {rejected} of 50 good parts." in text


def test_the_promise_stands_beside_the_false_alarms(project: Project, runs: list[tuple[str, str, Recorder]]) -> None:
    """A hold-out of ten that cannot promise the 5 % asked for."""
    put(project, "a", "nut", threshold=FEW, good=30, defect=40)
    table = markdown.leaderboard_table(summarise(ONE, project)).splitlines()
    heading, line = table[0].split(" | "), table[2].split(" | ")
    place = heading.index("False alarms") + 1
    assert (heading[place], line[place]) == ("Promised", "9.1")
    report(BOTH, project)
    text = printed(project, width=200)
    assert "False alarms that the held-out good parts promise: 9.09\xa0% on nut; 4.76\xa0% on my bolt, nut" in text
    assert "(asked for: 5\xa0%)." in text
    (row,) = [line.split() for line in text.splitlines() if line.split()[:2] == ["a", "nut"]]
    assert "9.1" in row
    assert len(runs) == 1


def test_what_the_report_lacks_is_told_everywhere(project: Project, runs: list[tuple[str, str, Recorder]]) -> None:
    Refusal(verb="train", reason="a loss that is not finite").save(project.cell("a", "nut", 0).refusal)
    report(BOTH, project)
    told = "Not in this report: a on nut: refused by train: a loss that is not finite"
    assert told in printed(project)
    assert told in (project.report("demo") / "report.md").read_text(encoding="utf-8")
    assert told in runs[0][2].description
    assert "a: no average" in runs[0][2].description
    tables = (project.report("demo") / "tables.md").read_text(encoding="utf-8")
    assert "| a | - | - | **95.0** |" in tables.splitlines()


def test_a_report_of_other_cells_is_told(project: Project, runs: list[tuple[str, str, Recorder]]) -> None:
    report(ONE, project)
    text = printed(project, params=params_of(["a", "b"], ["my bolt"]))
    assert "Not in this report, which is of other cells: a on my bolt" in text
    assert "Not in this report, which is of other cells: b on my bolt" in text
    assert "No longer in params.yaml: a on nut" in text
    put(project, "a", "nut", run_id="trained-again", good=30, defect=40)
    assert "Trained or evaluated anew since this report: a on nut" in printed(project, params=ONE)
    assert len(runs) == 1


def test_a_second_seed_that_was_trained_after_the_report_is_told(
    project: Project, runs: list[tuple[str, str, Recorder]]
) -> None:
    two = ONE.model_copy(update={"train": ONE.train.model_copy(update={"seeds": [0, 1]})})
    second = project.cell("a", "nut", 1).evaluated
    put_evaluation(second, "a", "nut", run_id="first", good=30, defect=40)
    report(two, project)
    assert "anew since" not in printed(project, params=two)
    put_evaluation(second, "a", "nut", run_id="second", good=30, defect=40)
    assert "Trained or evaluated anew since this report: a on nut, seed 1" in printed(project, params=two)
    assert "Trained or evaluated anew since this report: a on nut\n" not in printed(project, params=two)
    assert len(runs) == 1


def test_results_fit_a_terminal_of_eighty_columns(project: Project, runs: list[tuple[str, str, Recorder]]) -> None:
    counts = {"train": 40, "holdout": 20, "test_normal": 20, "test_anomalous": 20, "apart": 6}
    for category in ("hazelnut_toy", "nut"):
        put(project, "efficient_ad", category, counts=counts)
        write_latency(project, "efficient_ad", category, 123.4)
    params = params_of(["efficient_ad"], ["hazelnut_toy", "nut"])
    report(params, project)
    text = printed(project, width=80, params=params)
    assert "…" not in text
    assert "20+20-6" in text
    assert "40+40-12" in text  # of the average
    assert "Test images: good + defective - those apart, from which a model learns;" in text
    report_md = (project.report("demo") / "report.md").read_text(encoding="utf-8")
    assert "| efficient_ad | nut | 20 + 20 (6 apart) |" in report_md
    assert (
        (project.report("demo") / "leaderboard.csv")
        .read_text(encoding="utf-8")
        .splitlines()[1]
        .startswith("efficient_ad-hazelnut_toy,efficient_ad,hazelnut_toy,0,20,20,6,")
    )
    assert "123.4" in text


def test_the_terminal_compares_with_the_best_alone(project: Project) -> None:
    put(project, "c", "nut", auroc=0.7, good=30, defect=40)
    put(project, "c", "my bolt", auroc=0.7)
    summary = summarise(params_of(["a", "b", "c"], ["nut", "my bolt"]), project)
    assert len(markdown.sentences(summary.comparisons, ["image_auroc"])) == 3
    told = markdown.against_the_best(summary)
    assert len(told) == 2
    assert all(line.startswith("Image AUROC: a beats ") for line in told)
    nobody = summary.champions["image_auroc"] | {"average": Champion(None, (), "why")}
    assert len(markdown.against_the_best(summary.model_copy(update={"champions": {"image_auroc": nobody}}))) == 3


def test_without_a_report_there_are_no_results(tmp_path: Path) -> None:
    with pytest.raises(StageError) as caught:
        printed(Project(tmp_path))
    assert str(caught.value) == f"{tmp_path}/reports/demo/summary.json: not there; run `make demo` or `dvc repro`"
