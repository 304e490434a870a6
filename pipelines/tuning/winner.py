"""The winner becomes a model of params.yaml: its section is put in, and not a byte of all else is touched.

Where a mapping is written in one line (`models: {...}`), the file is written anew by ruamel.yaml, which keeps comments
and order.
"""

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from ruamel.yaml import YAML
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.representer import RoundTripRepresenter
from yaml.resolver import Resolver

from pipelines.errors import ParamsError
from pipelines.files import atomic_file
from pipelines.preview.check import INPUTS, load_checked, wrong_name
from pipelines.settings.params import Params
from pipelines.settings.tuned import TUNED, Tuned, tuned_of


def require_name(name: str, model: str, category: str, params: Params) -> None:
    """Before any trial: the winner can be called so.

    Raises:
        ParamsError: it is no name for a variant, or that of a model which is not the earlier result of the same search.
    """
    if (wrong := wrong_name(name, params.method_of(model))) is not None:
        raise ParamsError(f"--name {name}: {wrong}")
    if name not in params.models:
        return
    if name == model or not _is_earlier(params.tuned_of(name), model, category):
        raise ParamsError(
            f"--name {name}: models.{name} is in params.yaml, and no earlier result of tuning {model} on {category}; "
            "give another name"
        )


def _is_earlier(found: Tuned | None, model: str, category: str) -> bool:
    """Whether a record is that of an earlier result of the same search."""
    return found is not None and (found.model, found.category) == (model, category)


def write_winner(path: Path, name: str, method: str, settings: Mapping[str, Any], tuned: Tuned) -> list[str]:
    """Put a variant of the `tuned` model into the params file; gives what its user still has to do, a line each.

    An earlier result of that name gives way.

    Raises:
        ParamsError: the file has changed since the search began: the name is taken now, or the file would not be in
            order with the variant in it.
    """
    before = path.read_bytes().decode()
    content = YAML(typ="safe").load(before)
    model, own, notes = tuned.model, dict(settings), list[str]()
    if name in content["models"] and not _is_earlier(tuned_of(content["models"][name]), model, tuned.category):
        raise ParamsError(f"{path}: models.{name} is in it by now; call again with another --name, and nothing is lost")
    teacher = own.get("teacher")
    if isinstance(teacher, str) and teacher.startswith(f"pretrained/{model}/"):
        own["teacher"] = teacher.replace(f"pretrained/{model}/", f"pretrained/{name}/", 1)
        if model not in (content.get("distill") or {}):
            notes.append(f"copy {teacher} to {own['teacher']}: distill does not make it")
    text = with_entry(before, "models", name, {"method": method, TUNED: tuned.model_dump(), **own})
    for inputs in INPUTS:
        if model in (content.get(inputs) or {}):
            text = with_entry(text, inputs, name, content[inputs][model])
    with atomic_file(path) as temporary:
        temporary.write_bytes(text.encode())
        try:
            load_checked(temporary)
        except ParamsError as error:
            raise ParamsError(f"{path}: left as it is, since {name} would not be in order:\n{error}") from None
    return notes


def with_entry(text: str, section: str, name: str, entry: Mapping[str, Any]) -> str:
    """The text of a YAML file with an entry more at the end of a section, or in the place of the one of that name."""
    expected = YAML(typ="safe").load(text)
    expected[section][name] = dict(entry)
    spliced = _spliced(text, section, name, entry)
    if spliced is not None and YAML(typ="safe").load(spliced) == expected:
        return spliced
    return _written_anew(text, section, name, entry)


def _spliced(text: str, section: str, name: str, entry: Mapping[str, Any]) -> str | None:
    """None where the section is not written a line an entry."""
    mapping = _section(text, section)
    if mapping is None or mapping.flow_style or not mapping.value:
        return None
    lines = re.findall(r"[^\n]*\n|[^\n]+", text)
    column = mapping.value[0][0].start_mark.column
    block = _indented({name: dict(entry)}, column, "\r\n" if "\r\n" in text else "\n")
    places = {key.value: (key.start_mark.line, _last_line(key, value)) for key, value in mapping.value}
    if name in places:
        first, last = places[name]
        return "".join([*lines[:first], block, *lines[last + 1 :]])
    last = max(last for _, last in places.values())
    if not lines[last].endswith("\n"):
        lines[last] += "\n"
    return "".join([*lines[: last + 1], block, *lines[last + 1 :]])


def _section(text: str, section: str) -> MappingNode | None:
    root = YAML().compose(text)
    found = next((value for key, value in root.value if key.value == section), None)
    return found if isinstance(found, MappingNode) else None


def _last_line(key: Node, value: Node) -> int:
    """Of an entry. A mapping's own end mark stands behind comments that follow it, and an alias's value elsewhere."""
    first: int = key.start_mark.line
    if isinstance(value, MappingNode) and not value.flow_style and value.value:
        return max(first, _last_line(*value.value[-1]))
    if isinstance(value, SequenceNode) and not value.flow_style and value.value:
        return max(first, _last_line(value.value[-1], value.value[-1]))
    end: int = value.end_mark.line
    # A block of text ends where the next line begins.
    return max(first, end - 1 if value.end_mark.column == 0 and end > value.start_mark.line else end)


def _indented(value: Mapping[str, Any], column: int, newline: str) -> str:
    text = io.StringIO()
    _yaml().dump(value, text)
    return "".join(f"{' ' * column}{line}{newline}" for line in text.getvalue().splitlines())


def _written_anew(text: str, section: str, name: str, entry: Mapping[str, Any]) -> str:
    round_trip = _yaml()
    content = round_trip.load(text)
    content[section][name] = dict(entry)
    written = io.StringIO()
    round_trip.dump(content, written)
    return written.getvalue()


class _ForEveryReader(RoundTripRepresenter):
    """Writes what readers of YAML 1.1, such as PyYAML, take for the same: 1.0e-05, and "no" between quotes."""

    def number(self, value: float) -> ScalarNode:
        text = repr(value)
        plain = "." in text or "e" not in text
        return self.represent_scalar("tag:yaml.org,2002:float", text if plain else text.replace("e", ".0e"))

    def text(self, value: str) -> ScalarNode:
        kind = Resolver().resolve(yaml.ScalarNode, value, (True, False))  # type: ignore[no-untyped-call]
        same = kind == "tag:yaml.org,2002:str"
        return self.represent_scalar("tag:yaml.org,2002:str", value, style=None if same else '"')


_ForEveryReader.add_representer(float, _ForEveryReader.number)
_ForEveryReader.add_representer(str, _ForEveryReader.text)


def _yaml() -> YAML:
    found = YAML()
    found.Representer = _ForEveryReader
    found.width = 4096  # a comment stays on its line
    found.preserve_quotes = True
    return found
