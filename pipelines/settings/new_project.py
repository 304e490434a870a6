"""A project without code of its own: what `init` writes where Blemish is installed from a wheel.

Its `dvc.yaml` is made of the repository's, so that there is one source. A stage there depends on files of code; here,
where they lie in some environment, on what `check` writes of them: each file with its SHA-256. So another version of
Blemish rebuilds what depends on code that changed, and nothing else.
"""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pipelines.errors import StageError
from pipelines.files import atomic_file, file_sha256
from pipelines.lineage import ROOT
from pipelines.paths import Project
from pipelines.settings.presets import put_in_place

STAGES = ROOT / "dvc.yaml"
HEADER = """\
Made by `blemish init` of the stages of Blemish: each calls a verb of the `blemish` that is installed.
`checked/code/` has the SHA-256 of each file of its code, for DVC to see what another version changes; `check` writes
them, and runs always, since nobody else knows which version is installed.
"""
_OF_A_MODEL = re.compile(r"anomaly_models/(\$\{[^}]*\})\.py")


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
    for name, stage in document["stages"].items():
        stage["cmd"] = stage["cmd"].replace("python cli.py ", "blemish ")
        kept = [dep for dep in stage["deps"] if not _is_code(dep)]
        for dep in [dep for dep in stage["deps"] if _is_code(dep)]:
            stage["deps"].remove(dep)
            if (told := _told_in(name, dep)) not in kept:
                kept.append(told)
                stage["deps"].append(told)
    document["stages"]["check"].insert(1, "always_changed", True)
    text = io.StringIO()
    reader.dump(document, text)
    return text.getvalue()


def write_code(folder: Path) -> None:
    """What the stages of such a project depend on: a line for each file of a stage's code, as `sha256sum` prints it."""
    from anomaly_models import MODELS

    told: dict[str, list[Path]] = {}
    for name, stage in yaml.safe_load(STAGES.read_text(encoding="utf-8"))["stages"].items():
        for dep in filter(_is_code, stage["deps"]):
            if _OF_A_MODEL.fullmatch(dep) is None:
                told.setdefault(_told_in(name, dep), []).append(ROOT / dep)
    told |= {f"checked/code/models/{name}.txt": [ROOT / "anomaly_models" / f"{name}.py"] for name in MODELS}
    for path, named in told.items():
        target = folder / Path(path).relative_to("checked/code")
        target.parent.mkdir(parents=True, exist_ok=True)
        files = sorted({file for name in named for file in _files_of(name)})
        lines = [f"{file_sha256(file)}  {file.relative_to(ROOT).as_posix()}\n" for file in files]
        target.write_text("".join(lines), encoding="utf-8")


def _is_code(dep: Any) -> bool:
    return str(dep).startswith(("anomaly_models/", "pipelines/"))


def _told_in(stage: str, dep: str) -> str:
    """The file that stands for a dependency of a stage: the model's own, or that of all other code of the stage."""
    model = _OF_A_MODEL.fullmatch(dep)
    return f"checked/code/{stage}.txt" if model is None else f"checked/code/models/{model[1]}.txt"


def _files_of(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    else:
        yield from (file for file in path.rglob("*") if file.is_file() and file.parent.name != "__pycache__")


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


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
