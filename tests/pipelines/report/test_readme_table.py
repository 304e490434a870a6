import json
import re
from pathlib import Path

import pytest
from drawn_cells import read_summary, summary_of

from pipelines.errors import StageError
from pipelines.files import read_json
from pipelines.paths import Project
from pipelines.report.markdown import leaderboard_table
from pipelines.report.readme import keep_report, kept_report, update_readme, with_table

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
    assert with_table(README, "demo", SUMMARY) == expected
    assert with_table(expected, "demo", SUMMARY) == expected


def test_empty_markers_are_filled() -> None:
    text = with_table(README, "demo_2", SUMMARY)
    assert text.endswith(f"<!-- results:demo_2 -->\n{TABLE}\n<!-- /results:demo_2 -->\n")
    assert "| old |" in text


def test_several_seeds_show_their_spread_below() -> None:
    content = summary_of(["a"], ["nut"])
    figure = {"mean": 0.975, "sd": 0.004, "values": [0.971, 0.979]}
    content["cells"][0]["seeds"] = {"seeds": [0, 1], "metrics": {"image_auroc": figure}}
    _, text, _ = re.split("<!-- /?results:demo_2 -->", with_table(README, "demo_2", read_summary(content)))
    table, note, seeds = text.strip().split("\n\n")
    assert table == TABLE
    assert "train.seed" in note
    assert "| a | nut | 0, 1 | 97.5 ± 0.4 |" in seeds


def test_text_is_taken_literally() -> None:
    summary = read_summary(summary_of(["a"], [r"\1 \g<0>"]))
    assert r"| a | \\1 \\g&lt;0> | 4 + 8 | 98.0 |" in with_table(README, "demo", summary)


def test_what_no_cell_has_is_no_column() -> None:
    content = summary_of(["a"], ["nut"])
    content["cells"][0] |= {"intervals": {}, "latency": None}
    assert leaderboard_table(read_summary(content)).splitlines()[0] == (
        "| Model | Category | Test images | Image AUROC | Image F1-max (oracle) | False alarms | Promised | ONNX, MB |"
    )


@pytest.mark.parametrize("readme", ["", README.replace("/results:demo ", "/result:demo "), README.replace("demo", "x")])
def test_unknown_markers_are_named(readme: str) -> None:
    with pytest.raises(StageError) as caught:
        with_table(readme, "demo", SUMMARY)
    lines = "<!-- results:demo --> and <!-- /results:demo -->"
    assert str(caught.value) == f"README.md: no table 'demo'; it goes between the lines {lines}"


def test_a_project_without_a_readme_has_no_table(tmp_path: Path) -> None:
    SUMMARY.save(tmp_path / "benchmarks" / "results" / "demo.json")
    with pytest.raises(StageError, match=r"README\.md: no table 'demo'"):
        update_readme(Project(tmp_path), "demo")


def test_a_report_is_kept_without_the_ids_of_this_machine(tmp_path: Path) -> None:
    project = Project(tmp_path)
    SUMMARY.save(project.summary)
    (tmp_path / "README.md").write_text(README, encoding="utf-8")
    keep_report(project, "demo")
    kept = read_json(tmp_path / "benchmarks" / "results" / "demo.json")
    assert "0123" not in json.dumps(kept)
    assert "127.0.0.1" not in json.dumps(kept)
    (cell,) = kept["cells"]
    assert {**cell, "run_id": "0123", "run_url": CONTENT["cells"][0]["run_url"]} == CONTENT["cells"][0]
    assert kept == {**CONTENT, "cells": [cell], "tracking": None, "comparisons": []}
    update_readme(project, "demo")
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == README.replace("| old |", TABLE)


@pytest.mark.parametrize("content", ["", "{}", json.dumps(CONTENT | {"cells": [{"model": "a"}]})])
def test_a_damaged_summary_is_one_line(tmp_path: Path, content: str) -> None:
    project = Project(tmp_path)
    project.reports.mkdir()
    project.summary.write_text(content, encoding="utf-8")
    with pytest.raises(StageError) as caught:
        keep_report(project, "demo")
    assert str(caught.value).startswith(f"{project.summary}: damaged, or by another version of Blemish (")
    assert str(caught.value).endswith("); run `make demo` or `dvc repro`")
    assert len(str(caught.value).splitlines()) == 1


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    project = Project(tmp_path)
    (tmp_path / "README.md").write_text(README, encoding="utf-8")
    with pytest.raises(StageError) as caught:
        keep_report(project, "demo")
    assert str(caught.value) == f"{project.summary}: not there; run `make demo` or `dvc repro`"
    with pytest.raises(StageError) as caught:
        update_readme(project, "demo")
    remedy = "make one with `blemish publish demo --from-report`"
    assert str(caught.value) == f"{tmp_path}/benchmarks/results/demo.json: not there; {remedy}"
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == README


def test_the_tables_of_the_readme_are_those_that_were_measured() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    names = re.findall(r"<!-- results:(\S+) -->", text)
    assert set(names) == {path.stem for path in (ROOT / "benchmarks" / "results").glob("*.json")}
    for name in names:
        summary = kept_report(Project(ROOT), name)
        assert leaderboard_table(summary) in text
        assert with_table(text, name, summary) == text
