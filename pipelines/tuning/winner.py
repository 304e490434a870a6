"""The winner becomes a model of params.yaml."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.errors import ParamsError
from pipelines.preview.check import wrong_name
from pipelines.preview.variants import Variant, add_variants
from pipelines.settings.params import Params
from pipelines.settings.problems import read_yaml
from pipelines.settings.tuned import Tuned, tuned_of


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
    found = (read_yaml(path).get("models") or {}).get(name)
    if found is not None and not _is_earlier(tuned_of(found), tuned.model, tuned.category):
        raise ParamsError(f"{path}: models.{name} is in it by now; call again with another --name, and nothing is lost")
    return add_variants(path, [Variant(name, tuned.model, method, settings, tuned)])
