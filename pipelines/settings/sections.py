"""Sections of params.yaml as YAML has them: settings under dotted names, and entries put in by text.

Where a mapping is written in one line (`models: {...}`), the file is written anew by ruamel.yaml, which keeps comments
and order.
"""

import copy
import io
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.representer import RoundTripRepresenter
from yaml.resolver import Resolver

Section = dict[str, Any]


def has(section: Section, key: str) -> bool:
    """Whether there is a setting of that dotted name."""
    inner: Any = section
    for part in key.split("."):
        if not isinstance(inner, dict) or part not in inner:
            return False
        inner = inner[part]
    return True


def value_at(section: Section, key: str) -> Any:
    inner: Any = section
    for part in key.split("."):
        inner = inner[part]
    return inner


def keys(section: Section, prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings, and of those that hold others."""
    for key, value in section.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from keys(value, f"{prefix}{key}.")


def changed(own: Section, values: Mapping[str, Any]) -> Section:
    """A section with other values, under their dotted names."""
    section = copy.deepcopy(own)
    for key, value in values.items():
        *way, last = key.split(".")
        inner = section
        for part in way:
            inner = inner[part]
        inner[last] = value
    return section


def values_of(text: str) -> list[Any]:
    """What stands between commas, as YAML reads it: "[2,3],[1,2,3]" are two.

    Raises:
        ValueError: YAML does not.
    """
    try:
        found = YAML(typ="safe", pure=True).load(f"[{text}]")
    except YAMLError as error:
        raise ValueError(f"{text} cannot be read as YAML's values") from error
    return list(found)


def with_entry(text: str, section: str, name: str, entry: Mapping[str, Any]) -> str:
    """The text of a YAML file with an entry more at the end of a section, or in the place of the one of that name."""
    expected = YAML(typ="safe").load(text)
    expected[section][name] = dict(entry)
    spliced = _spliced(text, section, name, entry)
    if spliced is not None and YAML(typ="safe").load(spliced) == expected:
        return spliced
    return with_value(text, section, name, dict(entry))


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


def with_value(text: str, section: str, key: str, value: Any) -> str:
    """The text of a YAML file with another value of a key, written anew; comments and order stay."""
    round_trip = _yaml()
    content = round_trip.load(text)
    content[section][key] = value
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
        kind = Resolver().resolve(yaml.ScalarNode, value, (True, False))  # type: ignore[no-untyped-call]  # in its stubs
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
