"""What `blemish sweep --set MODEL.KEY=a,b` adds to the grid: a variant in params.yaml for each value.

DVC knows of cells by that file, so that what is tried stands there, and can be tried again by anyone.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipelines.errors import ParamsError, hint
from pipelines.preview.check import wrong_name
from pipelines.preview.variants import Variant, add_variants
from pipelines.settings.params import Params
from pipelines.settings.sections import changed, has, keys, values_of

_FORM = "write MODEL.KEY=a,b,c, such as fapm.grid=2,4"
Grid = dict[str, dict[str, list[Any]]]  # values by the settings of a model


def add_overrides(path: Path, asked: Sequence[str], params: Params) -> list[str]:
    """Put every combination of a model's values into the params file that is not there by another name; tell of each.

    Raises:
        ParamsError: what is asked cannot be read, names no model or setting of the file, or has a value that the model
            refuses; the file is what it was then.
    """
    found: list[Variant] = []
    known = {name: _content(name, params) for name in params.models}
    for model, grid in _read(asked, params).items():
        for values in product(*grid.values()):
            variant = _variant(model, dict(zip(grid, values, strict=True)), params)
            content = (variant.method, dict(variant.settings))
            if content in known.values():
                continue
            if variant.name in known:
                raise ParamsError(f"models.{variant.name}: is in params.yaml with other settings; give it another name")
            known[variant.name] = content
            found.append(variant)
    if not found:
        return []
    return [f"params.yaml: {variant.name} is new" for variant in found] + add_variants(path, found)


def _read(asked: Sequence[str], params: Params) -> Grid:
    grid: Grid = {}
    for text in asked:
        place, equals, values = (part.strip() for part in text.partition("="))
        model, _, key = place.partition(".")
        if not equals or not values or not model or not key:
            raise ParamsError(f"--set {text}: cannot be read; {_FORM}")
        if model not in params.models:
            raise ParamsError(
                f"--set {text}: no model '{model}' in params.yaml{hint(model, params.models)}; it has: "
                f"{', '.join(params.models)}"
            )
        own = _content(model, params)[1]
        if not has(own, key):
            raise ParamsError(f"--set {text}: {model} has no setting '{key}'{hint(key, keys(own))}")
        if key in grid.setdefault(model, {}):
            raise ParamsError(f"--set {text}: {place} is set twice; name all values at once")
        try:
            grid[model][key] = values_of(values)
        except ValueError as error:
            raise ParamsError(f"--set {text}: {error}; {_FORM}") from None
    return grid


def _content(model: str, params: Params) -> tuple[str, dict[str, Any]]:
    """Method and settings."""
    return params.method_of(model), params.model_config_of(model).model_dump(mode="json")


def _variant(model: str, values: Mapping[str, Any], params: Params) -> Variant:
    method, own = _content(model, params)
    try:
        config = type(params.model_config_of(model)).model_validate(changed(own, values))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        shown = ", ".join(f"{model}.{key}={value}" for key, value in values.items())
        raise ParamsError(f"--set {shown}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    name = _name(model, values)
    if (wrong := wrong_name(name, method)) is not None:
        raise ParamsError(f"--set: {wrong}")
    return Variant(name, model, method, config.model_dump(mode="json"))


def _name(model: str, values: Mapping[str, Any]) -> str:
    """In words as far as a name has room and signs for them: fapm_grid_2."""
    name = "_".join([model, *_words(values)])
    if len(name) <= 60:
        return name
    return f"{model[:40]}_{hashlib.sha256(repr(sorted(values.items())).encode()).hexdigest()[:12]}"


def _words(values: Mapping[str, Any]) -> Iterator[str]:
    for key, value in values.items():
        yield key.rpartition(".")[2]
        yield re.sub("[^a-z0-9]+", "_", str(value).lower()).strip("_")
