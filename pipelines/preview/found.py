"""What `check` found, for as long as nothing has changed that it depends on: DVC asks it at every `repro`.

To validate what models are told takes torch's import, which is seconds; to see that all is as it was takes none.
"""

import contextlib
import hashlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipelines.files import read_json, sha256_lines, write_json
from pipelines.lineage import ROOT
from pipelines.paths import Project

# By their names alone, which tell versions: to read each one's metadata would take as long as all else.
_INSTALLED = (".dist-info", ".egg-info")


def found_before(project: Project) -> list[str] | None:
    """The lines that `check` has said of all as it is now; None if there are none, or what it made is not there."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # never checked, or damaged
        found = read_json(project.found)
        if found["state"] == _state(project) and all(project.inputs(name).is_dir() for name in found["models"]):
            return [str(line) for line in found["lines"]]
    return None


def keep(project: Project, models: Iterable[str], lines: Iterable[str]) -> None:
    write_json(project.found, {"state": _state(project), "models": list(models), "lines": list(lines)})


def _state(project: Project) -> str:
    """SHA-256 of params.yaml, of what `check` made of it, of this project's code, and of what is installed."""
    settings = sha256_lines([project.params, *_files(project.checked)], project.root)
    code = sha256_lines([ROOT / "cli.py", *_files(ROOT / "anomaly_models"), *_files(ROOT / "pipelines")], ROOT)
    folders = [folder for place in sys.path if (folder := Path(place)).is_dir()]
    installed = sorted(path.name for folder in folders for path in folder.iterdir() if path.suffix in _INSTALLED)
    return hashlib.sha256("\n".join([sys.version, *installed, settings, code]).encode()).hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".pyc")
