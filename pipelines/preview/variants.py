"""Variants put into params.yaml: with what is made for them, and not a byte of all else touched."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipelines.errors import ParamsError
from pipelines.files import atomic_file
from pipelines.numbers import listed
from pipelines.preview.check import INPUTS, load_checked
from pipelines.settings.sections import with_entry
from pipelines.settings.tuned import TUNED, Tuned


@dataclass(frozen=True, slots=True)
class Variant:
    """A model to be."""

    name: str
    model: str  # of the file, that it is made from
    method: str
    settings: Mapping[str, Any]  # all of them
    tuned: Tuned | None = None


def add_variants(path: Path, variants: Sequence[Variant]) -> list[str]:
    """Put variants into the params file; gives what its user still has to do, a line each.

    A model that is called so gives way.

    Raises:
        ParamsError: the file would not be in order with them in it.
    """
    text, notes = path.read_bytes().decode(), list[str]()
    content = YAML(typ="safe").load(text)
    for variant in variants:
        name, own = variant.name, dict(variant.settings)
        teacher = own.get("teacher")
        if isinstance(teacher, str) and teacher.startswith(f"pretrained/{variant.model}/"):
            own["teacher"] = teacher.replace(f"pretrained/{variant.model}/", f"pretrained/{name}/", 1)
            if variant.model not in (content.get("distill") or {}):
                notes.append(f"copy {teacher} to {own['teacher']}: distill does not make it")
        record = {} if variant.tuned is None else {TUNED: variant.tuned.model_dump()}
        text = with_entry(text, "models", name, {"method": variant.method, **record, **own})
        for inputs in INPUTS:
            if variant.model in (content.get(inputs) or {}):
                text = with_entry(text, inputs, name, content[inputs][variant.model])
    with atomic_file(path) as temporary:
        temporary.write_bytes(text.encode())
        try:
            load_checked(temporary)
        except ParamsError as error:
            names = listed(variant.name for variant in variants)
            raise ParamsError(f"{path}: left as it is, since {names} would not be in order:\n{error}") from None
    return notes
