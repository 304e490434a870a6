"""A project without code of its own: what `init` writes where Blemish is installed from a wheel.

Its `dvc.yaml` is made of the repository's, so that there is one source. `check` depends on the code there; here, where
that lies in some environment, it runs always. Either way it writes down the SHA-256 of the files that each stage
depends on, so that another version of Blemish rebuilds what depends on code that changed, and nothing else.
"""

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipelines.errors import StageError
from pipelines.files import atomic_file
from pipelines.lineage import ROOT
from pipelines.paths import Project
from pipelines.settings.presets import put_in_place

_MEANT, _AS_IT_IS = r"[\\*?\[]", r"\\\g<0>"  # signs that Git takes for patterns

STAGES = ROOT / "dvc.yaml"
HEADER = """\
Made by `blemish init` of the stages of Blemish: each calls a verb of the `blemish` that is installed.
`checked/stages/` has the SHA-256 of each file of its code, for DVC to see what another version changes; `check` writes
them, and runs always, since nobody else knows which version is installed.
"""


def begin(project: Project, preset: str | None, force: bool) -> Iterator[str]:
    """Write what a project needs beside its images, a line of each; what is there stays, and gets what it lacks.

    Raises:
        ParamsError: as `put_in_place`, where a preset is named.
        StageError: the folder is a clone, or has a `dvc.yaml` of another version or of one's own, and not `force`.
    """
    if not is_without_code(project):
        raise StageError(f"{project.root.resolve()}: the repository itself, which has all that a project needs")
    stages = project.root / "dvc.yaml"
    if stages.exists() and stages.read_text(encoding="utf-8") != dvc_yaml() and not force:
        raise StageError(
            f"{stages}: other stages than this version's; keep what is yours of it elsewhere, and write it anew with "
            "`blemish init --force`"
        )
    if preset is not None or not project.params.exists():
        put_in_place(preset or "demo", project.params, force=False)
        yield f"params.yaml: preset {preset or 'demo'}"
    _write(stages, dvc_yaml())
    yield "dvc.yaml: the stages, which call the installed `blemish`"
    for name in (".gitignore", ".dvcignore"):
        if _complete(project.root / name, (ROOT / name).read_text(encoding="utf-8")):
            yield f"{name}: what the pipeline makes"
    if not (project.root / ".dvc").exists():
        yield from _begin_dvc(project.root)


def is_without_code(project: Project) -> bool:
    """Whether the code that runs lies elsewhere."""
    return project.root.resolve() != ROOT


def dvc_yaml() -> str:
    """The repository's stages, for a project without code."""
    from ruamel.yaml import YAML

    reader = YAML()
    reader.width = 200
    reader.indent(mapping=2, sequence=4, offset=2)
    document = reader.load(STAGES.read_text(encoding="utf-8"))
    document.yaml_set_start_comment(HEADER.rstrip("\n"))
    for stage in document["stages"].values():
        stage["cmd"] = stage["cmd"].replace("python cli.py ", "blemish ")
    check = document["stages"]["check"]
    check["deps"] = ["params.yaml"]
    check.insert(1, "always_changed", True)
    text = io.StringIO()
    reader.dump(document, text)
    return text.getvalue()


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def keep_out_of_git(project: Project, folders: Iterable[str]) -> list[str]:
    """Add folders of the project to its `.gitignore`, if it has one; gives the lines that were not there."""
    path = project.root / ".gitignore"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    new = [line for folder in folders if not {line := _ignoring(folder), _ignoring(folder.split("/")[0])} & set(lines)]
    _complete(path, "".join(f"{line}\n" for line in new))
    return new


def _ignoring(folder: str) -> str:
    """The line for a folder, whatever signs are in its name."""
    return f"/{re.sub(_MEANT, _AS_IT_IS, folder)}/"


def _complete(path: Path, text: str) -> bool:
    """Write the lines, those that the file lacks below what stands there; whether any was missing."""
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    missing = [line for line in text.splitlines() if line not in before.splitlines()]
    if any(missing):
        _write(path, "\n".join([before.rstrip(), "", *missing, ""]) if before.strip() else text)
    return any(missing)


def _begin_dvc(root: Path) -> Iterator[str]:
    for name in (".gitignore", "config"):
        _write(root / ".dvc" / name, (ROOT / ".dvc" / name).read_text(encoding="utf-8"))
    if any((folder / ".git").exists() for folder in (root.resolve(), *root.resolve().parents)):
        yield ".dvc: DVC, beside Git"
        return
    _write(root / ".dvc" / "config.local", "[core]\n    no_scm = true\n")
    yield ".dvc: DVC without Git, since there is none; after `git init`, delete .dvc/config.local"
