"""The demo's params.yaml with a few changes, and what is said of it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.errors import ParamsError
from pipelines.settings.params import Params

DEMO = Path(__file__).parents[1] / "presets" / "demo.yaml"
MISSING = object()

Load = Callable[[Path], Params]


def demo_with_one_model() -> str:
    """The demo's file with FAPM alone, and nothing that the others read: one problem at a time can be told apart."""
    text = DEMO.read_text(encoding="utf-8")
    for section in ("distill", "textures"):
        text = re.sub(rf"^{section}:.*?(?=^\S)", f"{section}: {{}}\n\n", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"(?<=^models:\n).*?(?=^  fapm:)", "", text, flags=re.DOTALL | re.MULTILINE)


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    """The demo's parameters, of FAPM alone, with some dotted keys changed, added or, for MISSING, left out."""
    values: dict[str, Any] = yaml.safe_load(demo_with_one_model())
    put(values, changes)
    return values


def put(values: dict[str, Any], changes: dict[str, Any]) -> None:
    """Set dotted keys, or for MISSING take them out."""
    for path, value in changes.items():
        *parents, last = path.split(".")
        section = values
        for name in parents:
            section = section[name]
        if value is MISSING:
            del section[last]
        else:
            section[last] = value


def problems_of(load: Load, folder: Path, changes: dict[str, Any]) -> list[str]:
    """The lines of the message about the demo's parameters, changed."""
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump(changed(changes), sort_keys=False), encoding="utf-8")
    with pytest.raises(ParamsError) as caught:
        load(path)
    first, *lines = str(caught.value).splitlines()
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    assert first == f"{path}: {count}"
    assert all(line.startswith("  ") for line in lines)
    return [line.removeprefix("  ") for line in lines]


def load_text(load: Load, folder: Path, text: str | bytes) -> Params:
    path = folder / "params.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load(path)
