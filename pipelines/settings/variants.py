"""Models of params.yaml that are variants of one method: what their settings say differently, in words."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

_MOST = 8  # differences that are named
_LONGEST = 40  # characters of a value


@dataclass(frozen=True, slots=True)
class Variant:
    """A model by its name in params.yaml, and all that it is made with."""

    name: str
    method: str
    settings: Mapping[str, str]  # flat, under dotted names: `backbone.name`
    tuned: str | None = None  # what they were chosen on, in words, if `tune` has chosen them


def sentences(models: Sequence[Variant]) -> dict[str, str]:
    """By name, what each has otherwise than the first of its method: "fapm_wide is fapm with grid 8 (4)".

    First is the one that is called as the method, or else the first that is given. Nothing is said of it, but what it
    was tuned on.
    """
    told = {}
    for method in dict.fromkeys(model.method for model in models):
        own = [model for model in models if model.method == method]
        first = next((model for model in own if model.name == method), own[0])
        for model in own:
            if model is not first:
                told[model.name] = f"{model.name} is {first.name} with {_difference(model, first)}"
            if model.tuned is not None:
                told[model.name] = f"{told[model.name]}, {model.tuned}" if model is not first else _was_tuned(model)
    return told


def _was_tuned(model: Variant) -> str:
    return f"{model.name} was {model.tuned}"


def _difference(model: Variant, first: Variant) -> str:
    """What it has, and in brackets what the first has: "grid 8 (4), backbone.name resnet18 (resnet50)"."""
    found = list(_differences(model.settings, first.settings))
    hidden = found[_MOST:]
    return ", ".join([*found[:_MOST], f"{len(hidden)} more"] if hidden else found) or "the same settings"


def _differences(own: Mapping[str, str], first: Mapping[str, str]) -> Iterator[str]:
    for name in dict.fromkeys((*first, *own)):
        mine, theirs = own.get(name), first.get(name)
        if mine != theirs:
            yield f"{name} {_short(mine)} ({_short(theirs)})"


def _short(value: str | None) -> str:
    if value is None:
        return "unset"
    return value if len(value) <= _LONGEST else f"{value[: _LONGEST - 1]}…"
