import json
import re
from pathlib import Path

import pytest
from drawn_cells import read_summary, summary_of

from pipelines.errors import StageError
from pipelines.files import read_json
from pipelines.paths import Project
from pipelines.report.markdown import leaderboard_table, overview_table
from pipelines.report.readme import PAGES, keep_report, kept_report, update_pages, with_tables

ROOT = Path(__file__).parents[3]

CONTENT = summary_of(["a"], ["nut"])
SUMMARY = read_summary(CONTENT)
HEADING = (
    "| Model | Category | Test images | Image AUROC | 95 % | Image F1-max (oracle) | False alarms | Promised "
    "| Latency, ms | ONNX, MB |"
)
TABLE = f"""\
{HEADING}
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| a | nut | 4 + 8 | 98.0 | 96.0 to 100.0 | 88.0 | 2.0 | 4.8 | 8.0 | 20.9 |"""
README = """\
# Title

<!-- results:demo -->
| old |
<!-- /results:demo -->

Between \\1 and \\g<0>.

<!-- results:demo_2 -->
<!-- /results:demo_2 -->
"""


def test_only_what_stands_between_the_markers_is_replaced() -> None:
    expected = README.replace("| old |", TABLE)
    assert with_tables(README, "demo", SUMMARY) == (expected, 1)
    assert with_tables(expected, "demo", SUMMARY) == (expected, 1)


def test_empty_markers_are_filled() -> None:
    text, _ = with_tables(README, "demo_2", SUMMARY)
    assert text.endswith(f"<!-- results:demo_2 -->\n{TABLE}\n<!-- /results:demo_2 -->\n")
    assert "| old |" in text


def test_several_seeds_show_their_spread_below() -> None:
    content = summary_of(["a"], ["nut"])
    figure = {"mean": 0.975, "sd": 0.004, "values": [0.971, 0.979]}
    content["cells"][0]["seeds"] = {"seeds": [0, 1], "metrics": {"image_auroc": figure}}
    _, text, _ = re.split("<!-- /?results:demo_2 -->", with_tables(README, "demo_2", read_summary(content))[0])
    table, note, seeds = text.strip().split("\n\n")
    assert table == TABLE
    assert "train.seeds" in note
    assert "| a | nut | 0, 1 | 97.5 ± 0.4 |" in seeds


def test_text_is_taken_literally() -> None:
    summary = read_summary(summary_of(["a"], [r"\1 \g<0>"]))
    assert r"| a | \\1 \\g&lt;0> | 4 + 8 | 98.0 |" in with_tables(README, "demo", summary)[0]


def test_what_no_cell_has_is_no_column() -> None:
    content = summary_of(["a"], ["nut"])
    content["cells"][0] |= {"intervals": {}, "latency": None}
    assert leaderboard_table(read_summary(content)).splitlines()[0] == (
        "| Model | Category | Test images | Image AUROC | Image F1-max (oracle) | False alarms | Promised | ONNX, MB |"
    )


@pytest.mark.parametrize(
    "readme", [None, "", README.replace("/results:demo ", "/result:demo "), README.replace("demo", "x")]
)
def test_unknown_markers_are_named(tmp_path: Path, readme: str | None) -> None:
    SUMMARY.save(tmp_path / "benchmarks" / "results" / "demo.json")
    if readme is not None:
        (tmp_path / "README.md").write_text(readme, encoding="utf-8")
    with pytest.raises(StageError) as caught:
        update_pages(Project(tmp_path), "demo")
    lines = "<!-- results:demo --> and <!-- /results:demo -->"
    assert str(caught.value) == f"README.md, docs/results.md: no table 'demo'; it goes between the lines {lines}"


def test_averages_stand_where_a_page_has_room_for_no_more(tmp_path: Path) -> None:
    SUMMARY.save(tmp_path / "benchmarks" / "results" / "demo.json")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "results.md").write_text(README, encoding="utf-8")
    (tmp_path / "README.md").write_text("<!-- averages:demo -->\n<!-- /averages:demo -->\n", encoding="utf-8")
    pages = update_pages(Project(tmp_path), "demo")
    assert pages == [tmp_path / "README.md", tmp_path / "docs" / "results.md"]
    first, header, _, row, last = (tmp_path / "README.md").read_text(encoding="utf-8").splitlines()
    assert (first, last) == ("<!-- averages:demo -->", "<!-- /averages:demo -->")
    assert header == "| Model | Image AUROC | False alarms | ONNX, MB |"
    assert row == "| a | 98.0 | 2.0 | 20.9 |"
    assert TABLE in (tmp_path / "docs" / "results.md").read_text(encoding="utf-8")


def test_a_report_is_kept_without_the_ids_of_this_machine(tmp_path: Path) -> None:
    project = Project(tmp_path)
    SUMMARY.save(project.summary("demo"))
    (tmp_path / "README.md").write_text(README, encoding="utf-8")
    keep_report(project, "demo", "demo")
    kept = read_json(tmp_path / "benchmarks" / "results" / "demo.json")
    assert "0123" not in json.dumps(kept)
    assert "127.0.0.1" not in json.dumps(kept)
    (cell,) = kept["cells"]
    assert {**cell, "run_id": "0123", "run_url": CONTENT["cells"][0]["run_url"]} == CONTENT["cells"][0]
    assert kept == {**CONTENT, "cells": [cell], "tracking": None, "comparisons": [], "successions": {}, "tuned": {}}
    update_pages(project, "demo")
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == README.replace("| old |", TABLE)


@pytest.mark.parametrize("content", ["", "{}", json.dumps(CONTENT | {"cells": [{"model": "a"}]})])
def test_a_damaged_summary_is_one_line(tmp_path: Path, content: str) -> None:
    project = Project(tmp_path)
    project.report("demo").mkdir(parents=True)
    project.summary("demo").write_text(content, encoding="utf-8")
    with pytest.raises(StageError) as caught:
        keep_report(project, "demo", "demo")
    assert str(caught.value).startswith(f"{project.summary('demo')}: damaged, or by another version of Blemish (")
    assert str(caught.value).endswith("); run `make demo` or `dvc repro`")
    assert len(str(caught.value).splitlines()) == 1


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    project = Project(tmp_path)
    (tmp_path / "README.md").write_text(README, encoding="utf-8")
    with pytest.raises(StageError) as caught:
        keep_report(project, "demo", "demo")
    assert str(caught.value) == f"{project.summary('demo')}: not there; run `make demo` or `dvc repro`"
    with pytest.raises(StageError) as caught:
        update_pages(project, "demo")
    remedy = "make one with `blemish publish demo --from-report`"
    assert str(caught.value) == f"{tmp_path}/benchmarks/results/demo.json: not there; {remedy}"
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == README


def test_the_tables_of_the_pages_are_those_that_were_measured() -> None:
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    names = re.findall(r"<!-- results:(\S+) -->", text)
    assert set(names) == {path.stem for path in (ROOT / "benchmarks" / "results").glob("*.json")}
    for name in names:
        summary = kept_report(Project(ROOT), name)
        assert leaderboard_table(summary) in text
        assert with_tables(text, name, summary)[0] == text
    assert overview_table(kept_report(Project(ROOT), "demo")) in (ROOT / "README.md").read_text(encoding="utf-8")
