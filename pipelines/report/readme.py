"""The tables of README.md and docs/results.md, written from kept reports so that no number is ever typed by hand.

Between markers of `results` stand all cells, and their spread over seeds; between those of `averages`, a row per model.
"""

import re
from pathlib import Path

from pipelines.errors import StageError
from pipelines.files import atomic_file
from pipelines.paths import Project
from pipelines.report.markdown import overview_table, results_tables
from pipelines.report.summary import Summary

PAGES = ("README.md", "docs/results.md")
_TABLES = {"results": results_tables, "averages": overview_table}


def keep_report(project: Project, experiment: str, name: str) -> None:
    """Copy the numbers of an experiment's last report to `benchmarks/results/<name>.json`, which is committed.

    Raises:
        StageError: there is no report yet, or it is damaged.
    """
    Summary.of(project, experiment).for_keeping().save(_kept(project, name))


def update_pages(project: Project, name: str) -> list[Path]:
    """Renew the tables between the markers of `name` in README.md and docs/results.md; gives the pages that have any.

    Raises:
        StageError: no kept report of this name, or no page with such markers.
    """
    summary, pages = kept_report(project, name), []
    for page in (project.root / path for path in PAGES):
        if page.exists():
            before = page.read_text(encoding="utf-8")
            after, number = with_tables(before, name, summary)
            pages += [page] * (number > 0)
            if after != before:
                with atomic_file(page) as temporary:
                    temporary.write_text(after, encoding="utf-8")
    if not pages:
        start, end = _markers("results", name)
        raise StageError(f"{', '.join(PAGES)}: no table '{name}'; it goes between the lines {start} and {end}")
    return pages


def kept_report(project: Project, name: str) -> Summary:
    return Summary.load(_kept(project, name), f"make one with `blemish publish {name} --from-report`")


def with_tables(text: str, name: str, summary: Summary) -> tuple[str, int]:
    """A page with the tables of `name` renewed, and how many there are."""
    found = 0
    for kind, table in _TABLES.items():
        start, end = _markers(kind, name)
        pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
        block = f"{start}\n{table(summary)}\n{end}".replace("\\", "\\\\")  # which a replacement takes for its own sign
        text, number = pattern.subn(block, text)
        found += number
    return text, found


def _markers(kind: str, name: str) -> tuple[str, str]:
    return f"<!-- {kind}:{name} -->", f"<!-- /{kind}:{name} -->"


def _kept(project: Project, name: str) -> Path:
    return project.root / "benchmarks" / "results" / f"{name}.json"
