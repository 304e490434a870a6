"""Complete params files, and the verb that puts one in place."""

import subprocess
from pathlib import Path

from pipelines.errors import ParamsError
from pipelines.files import atomic_file

PRESETS = Path(__file__).resolve().parents[2] / "presets"


def names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def put_in_place(name: str, target: Path, force: bool) -> None:
    """Copy the preset `name` to `target` unless that would lose edits that are saved nowhere else.

    Raises:
        ParamsError: no such preset, or `target` holds edits that are neither committed nor a preset's, and not `force`.
    """
    if name not in names():
        raise ParamsError(f"preset '{name}': no such preset; there are: {', '.join(names())}")
    replace((PRESETS / f"{name}.yaml").read_bytes(), target, force, f"`blemish preset {name} --force`")


def replace(content: bytes, target: Path, force: bool, remedy: str) -> None:
    """Write a params file unless that would lose edits that are saved nowhere else; `remedy` does it nevertheless.

    Raises:
        ParamsError: `target` holds edits that are neither committed nor a preset's, and not `force`.
    """
    if target.exists() and not force and target.read_bytes() != content and not _is_saved_elsewhere(target):
        raise ParamsError(f"{target}: has edits that are not committed; commit them, or overwrite them with {remedy}")
    with atomic_file(target) as temporary:
        temporary.write_bytes(content)


def _is_saved_elsewhere(target: Path) -> bool:
    content = target.read_bytes()
    if any(content == (PRESETS / f"{name}.yaml").read_bytes() for name in names()):
        return True
    try:
        committed = subprocess.run(
            ["git", "-C", str(target.parent), "show", f"HEAD:./{target.name}"], capture_output=True, check=False
        )
    except FileNotFoundError:
        return False  # no git on this machine
    return committed.returncode == 0 and committed.stdout == content
