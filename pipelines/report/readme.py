"""The README's tables, written from kept reports so that no number is ever typed by hand."""

import re
from pathlib import Path

from pipelines.errors import StageError
from pipelines.files import atomic_file
from pipelines.paths import Project
from pipelines.report.markdown import results_tables
from pipelines.report.summary import Summary


def keep_report(project: Project, name: str) -> None:
    """Copy the last report's numbers to `benchmarks/results/<name>.json`, which is committed.

    Raises:
        StageError: there is no report yet, or it is damaged.
    """
    Summary.of(project).for_keeping().save(_kept(project, name))


def update_readme(project: Project, name: str) -> None:
    """Replace what stands between `<!-- results:NAME -->` and `<!-- /results:NAME -->` in README.md.

    Raises:
        StageError: no kept report of this name, or no README with such markers.
    """
    readme = project.root / "README.md"
    before = readme.read_text(encoding="utf-8") if readme.exists() else ""
    text = with_table(before, name, kept_report(project, name))
    with atomic_file(readme) as temporary:
        temporary.write_text(text, encoding="utf-8")


def kept_report(project: Project, name: str) -> Summary:
    return Summary.load(_kept(project, name), f"make one with `blemish publish {name} --from-report`")


def with_table(readme: str, name: str, summary: Summary) -> str:
    """The README's text with the table of `name` renewed."""
    start, end = f"<!-- results:{name} -->", f"<!-- /results:{name} -->"
    pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(readme):
        raise StageError(f"README.md: no table '{name}'; it goes between the lines {start} and {end}")
    return pattern.sub(lambda _: f"{start}\n{results_tables(summary)}\n{end}", readme)


def _kept(project: Project, name: str) -> Path:
    return project.root / "benchmarks" / "results" / f"{name}.json"
