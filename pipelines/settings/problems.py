"""YAML read strictly, and pydantic's errors in the user's words."""

import re
from datetime import date
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError

from pipelines.errors import ParamsError, hint


def read_yaml(path: Path) -> dict[str, Any]:
    """The file's mapping, unvalidated.

    Raises:
        ParamsError: there is no such file, it is not YAML, or not a mapping at the top.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ParamsError(
            f"{path}: no such file; run in the project's folder, begin a project with `blemish init`, or put a preset "
            "in place with `blemish preset demo`"
        ) from None
    except UnicodeDecodeError as error:
        raise ParamsError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    try:
        # DVC's own reader: PyYAML reads YAML 1.1, where `08`, `12e4`, `0o7` and `yes` are something else than for DVC.
        value = YAML(typ="safe").load(text)
    except MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f" in line {error.problem_mark.line + 1}"
        raise ParamsError(f"{path}: not valid YAML{line}: {_said(error)}") from None
    except Exception as error:  # from whatever a value that is none, such as `0x_` or `2001-99-99`, makes fail
        raise ParamsError(f"{path}: not valid YAML: {' '.join(str(error).split()) or type(error).__name__}") from None
    if not isinstance(value, dict):
        raise ParamsError(f"{path}: holds {type(value).__name__}, not a mapping of sections")
    return value


def _said(error: MarkedYAMLError) -> str:
    twice = re.match('found duplicate key "(.*?)" with value', str(error.problem))
    return f"key '{twice[1]}' appears twice" if twice else str(error.problem)


def section_problems(raw: dict[str, Any], name: str, schema: type[BaseModel]) -> list[str]:
    section = raw.get(name)
    if not isinstance(section, dict):
        return []  # already reported
    try:
        schema.model_validate(section)
    except ValidationError as error:
        return problems_in(error, name, schema, section)
    return []


def refusal(path: Path, problems: list[str]) -> ParamsError:
    """One message with every problem of a file."""
    count = f"{len(problems)} problem" + ("s" if len(problems) > 1 else "")
    return ParamsError("\n  ".join([f"{path}: {count}", *problems]))


def problems_in(error: ValidationError, prefix: str, schema: type[BaseModel], value: object) -> list[str]:
    """Each problem that validation found, as `dotted.path = value: what is wrong`."""
    return [_problem(dict(detail), prefix, schema, value) for detail in error.errors(include_url=False)]


def _problem(detail: dict[str, Any], prefix: str, schema: type[BaseModel], value: object) -> str:
    """`dotted.path = value: what is wrong`, with a guess at what a misspelt key was to be."""
    kind, found, context = detail["type"], detail["input"], detail.get("ctx", {})
    parts = _parts_of_the_file(detail["loc"], value)
    if kind == "missing":
        parts.append(str(detail["loc"][-1]))
    if kind in ("union_tag_invalid", "union_tag_not_found"):  # the key that chooses between several schemas
        parts.append(context["discriminator"].strip("'"))
        found = context.get("tag")
    path = ".".join([prefix, *parts] if prefix else parts) or "settings"
    if kind in ("missing", "union_tag_not_found"):
        return f"{path}: missing"
    what = path if isinstance(found, dict) else f"{path} = {found!r}"
    if kind == "extra_forbidden":
        return f"{what}: unknown key{hint(parts[-1], _known_keys(schema, detail['loc'][:-1]))}"
    return f"{what}: {_message(detail, found)}"


def _message(detail: dict[str, Any], found: object) -> str:
    """Pydantic's message, where it does not speak of Python or pydantic."""
    match detail["type"]:
        case "model_type" | "dict_type":
            return "Input should be a mapping"
        case "tuple_type":
            return "Input should be a list"
        case "union_tag_invalid":
            return f"Input should be one of {detail['ctx']['expected_tags']}"
        case "string_type" if isinstance(found, int | float | date):
            return f"{detail['msg']}: put it in quotes as you wrote it, such as '08'"
        case _:
            return str(detail["msg"]).removeprefix("Value error, ")


def _parts_of_the_file(location: tuple[int | str, ...], value: Any) -> list[str]:
    """Pydantic's location without its own additions, such as the name of the tried member of a union."""
    parts = []
    for part in location:
        held = value if isinstance(value, dict) else dict(enumerate(value)) if isinstance(value, list) else {}
        if part in held:
            value = held[part]
            parts.append(str(part))
    return parts


def _known_keys(schema: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The keys that the section at `location` may have."""
    schemas = [schema]
    for part in location:
        fields = [known.model_fields[part] for known in schemas if part in known.model_fields]
        if fields:
            schemas = [inner for field in fields for inner in _schemas_in(field.annotation)]
    return [name for known in schemas for name in known.model_fields]


def _schemas_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [schema for argument in get_args(annotation) for schema in _schemas_in(argument)]
