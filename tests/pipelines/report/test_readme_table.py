import json
import re
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import StageError
from pipelines.files import read_json, write_json
from pipelines.paths import Project
from pipelines.report.markdown import leaderboard_table
from pipelines.report.readme import keep_report, kept_report, update_readme, with_table

ROOT = Path(__file__).parents[3]

CELL = {"model": "a", "category": "nut", "run_id": "0123", "image_auroc": 0.8, "settings": {"grid": 8}}
CELL |= {"run_url": "http://127.0.0.1:5000/#/experiments/1/runs/0123"}
SUMMARY: dict[str, Any] = {
    "categories": ["nut"],
    "models": {"a": {"grid": 8}},
    "cells": [CELL],
    "averages": [{"model": "a", "category": "average", "image_auroc": 0.8}],
    "tracking": {"page": "http://127.0.0.1:5000"},
    "comparisons": [{"a": "a", "b": "b"}],
}
TABLE = "| Model | Category | Image AUROC |\n| --- | --- | ---: |\n| a | nut | 80.0 |"
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


def test_text_is_taken_literally() -> None:
    summary = {**SUMMARY, "cells": [{**CELL, "category": r"\1 \g<0>"}]}
    assert r"| a | \1 \g<0> | 80.0 |" in with_table(README, "demo", summary)


@pytest.mark.parametrize("readme", ["", README.replace("/results:demo ", "/result:demo "), README.replace("demo", "x")])
def test_unknown_markers_are_named(readme: str) -> None:
    with pytest.raises(StageError) as caught:
        with_table(readme, "demo", SUMMARY)
    assert str(caught.value) == (
        "README.md: no table 'demo'; it goes between the lines <!-- results:demo --> and <!-- /results:demo -->"
    )


def test_a_report_is_kept_without_the_ids_of_this_machine(tmp_path: Path) -> None:
    project = Project(tmp_path)
    write_json(project.reports / "summary.json", SUMMARY)
    (tmp_path / "README.md").write_text(README, encoding="utf-8")
    keep_report(project, "demo")
    kept = read_json(tmp_path / "benchmarks" / "results" / "demo.json")
    assert "0123" not in json.dumps(kept)
    assert "127.0.0.1" not in json.dumps(kept)
    assert kept["cells"] == [{key: value for key, value in CELL.items() if key not in ("run_id", "run_url")}]
    assert set(SUMMARY) - set(kept) == {"tracking", "comparisons"}
    assert {**kept, "cells": 0} == {**{key: SUMMARY[key] for key in kept}, "cells": 0}
    update_readme(project, "demo")
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == README.replace("| old |", TABLE)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    project = Project(tmp_path)
    (tmp_path / "README.md").write_text(README, encoding="utf-8")
    with pytest.raises(StageError) as caught:
        keep_report(project, "demo")
    assert str(caught.value) == f"{tmp_path / 'reports' / 'summary.json'}: no report yet; run `dvc repro` first"
    with pytest.raises(StageError) as caught:
        update_readme(project, "demo")
    assert str(caught.value) == (
        f"{tmp_path / 'benchmarks' / 'results' / 'demo.json'}: no kept report of this name; make one with "
        "`blemish publish demo --from-report`"
    )
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == README


def test_the_tables_of_the_readme_are_those_that_were_measured() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    names = re.findall(r"<!-- results:(\S+) -->", text)
    assert set(names) == {path.stem for path in (ROOT / "benchmarks" / "results").glob("*.json")}
    for name in names:
        summary = kept_report(Project(ROOT), name)
        assert leaderboard_table(summary) in text
        assert with_table(text, name, summary) == text
