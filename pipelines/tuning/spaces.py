"""What a search tries: for each method the settings that benchmarks/settings.md found to matter, or what a user names.

    KEY=LOW:HIGH        numbers between the two; whole ones where the model's own value is whole
    KEY=LOW:HIGH:log    likewise, as many between 1 and 10 as between 10 and 100
    KEY=a,b,c           these values, as YAML reads them: [2,3],[1,2,3] are two
    KEY=x0.3:x3         LOW and HIGH as multiples of the model's own value

A key is a setting of the model's section, nested ones under dotted names: `backbone.layers`.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.errors import ParamsError, hint
from pipelines.settings.sections import Section, has, keys, value_at, values_of

# None of them changes what a score is made of, nor how long a training lasts.
SPACES: Mapping[str, Sequence[str]] = {
    "adfa": (
        "start=whitened,identity",
        "centres.number=256,512,1024,2048",
        "objective.k=1:8",
        "blur_sigma=2.0:8.0:log",
        "learning_rate=x0.3:x3:log",
    ),
    "bgad": (
        "learning_rate=x0.3:x3:log",
        "masks.abnormal=0.1:0.5",
        "normaliser.factor=1.0:2.5",
        "push_pull_weight=x0.3:x3:log",
        "pastes_per_batch=0:3",
    ),
    "diffusion_ad": (
        "learning_rate=x0.3:x3:log",
        "segmentation_learning_rate=x0.3:x3:log",
        "synthesis.probability=0.5:0.9",
        "synthesis.perlin_threshold=0.3:0.6",
        "top_pixels=1:48:log",
    ),
    "efficient_ad": ("learning_rate=x0.3:x3:log", "hard_quantile=0.5,0.9,0.99,0.999"),
    "fapm": (
        "grid=1,2,4,8",
        "coreset_ratio=0.03:0.3:log",
        "adaptive_ratio=1:4",
        "neighbours=2:9",
        "blur_sigma=1.0:8.0:log",
    ),
}
# Of settings that mean something only where another one says so: which, and what it says where they mean nothing.
_IDLE = {"learning_rate": ("epochs", 0), "neighbours": ("image_score", "max")}
# Not searched, and why not.
_FIXED = {
    **dict.fromkeys(("image_size", "resize", "fit", "tiles"), "pictures are prepared for it"),
    **dict.fromkeys(("teacher", "width"), "its teacher is made for it"),
    "method": "it is the method",
    "tuned": "it is no setting",
}
_DIGITS = 3  # significant ones, of a number that is tried
_NUMBER = re.compile(r"(x?)([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)")

Value = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from `low` to `high`, both included."""

    low: float
    high: float
    log: bool
    whole: bool

    @property
    def ends(self) -> list[Any]:
        return [self.low, self.high]

    def holds(self, value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high

    def value(self, drawn: Any) -> Any:
        """As it stands in params.yaml: with few digits, within the range."""
        if self.whole:
            return int(drawn)
        return min(max(float(f"{drawn:.{_DIGITS}g}"), self.low), self.high)

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}{', log' if self.log else ''}"


@dataclass(frozen=True, slots=True)
class Choices:
    """Some values of any kind, each under a name that a database can hold."""

    values: tuple[Any, ...]

    @property
    def ends(self) -> list[Any]:
        return list(self.values)

    @property
    def names(self) -> list[Value]:
        return [named(value) for value in self.values]

    def holds(self, value: Any) -> bool:
        return named(value) in self.names

    def value(self, drawn: Any) -> Any:
        return self.values[self.names.index(drawn)]

    def __str__(self) -> str:
        return ", ".join(map(str, self.names))


Space = dict[str, Range | Choices]
Refusal = Callable[[Mapping[str, Any]], str | None]  # of other values, by their settings' dotted names


def named(value: Any) -> Value:
    """A value as Optuna keeps it: lists and mappings as JSON."""
    return value if isinstance(value, Value) else json.dumps(value, sort_keys=True)


def space_of(method: str, model: str, own: Section, asked: Sequence[str], refusal: Refusal) -> Space:
    """What is searched for a model: what a user `asked` for, or else what its method has, as far as its settings go.

    `own` is its section, and `refusal` says why it does not take other values of some settings, None if it does.

    Raises:
        ParamsError: what is asked cannot be read, is no setting of the model or one that is fixed, or has a value that
            the model refuses; or nothing is asked, and the method has nothing.
    """
    if asked:
        space: Space = {}
        for text in asked:
            key, setting = _parsed(text, model, own)
            if key in space:
                raise ParamsError(f"--search {text}: {key} is named twice; name it once")
            _require_taken(text, key, setting, refusal)
            space[key] = setting
        return space
    found = dict(_of_method(method, model, own, refusal))
    if not found:
        raise ParamsError(
            f"model '{model}': {method} has no settings to search of its own; name some: --search KEY=LOW:HIGH or "
            "KEY=a,b,c"
        )
    return found


def _of_method(method: str, model: str, own: Section, refusal: Refusal) -> Iterator[tuple[str, Range | Choices]]:
    """With the model's own value within, and without values that it refuses."""
    for text in SPACES.get(method, ()):
        key = text.partition("=")[0]
        idle = _IDLE.get(key)
        if not has(own, key) or (idle is not None and own.get(idle[0]) == idle[1]):
            continue
        _, setting = _parsed(text, model, own)
        value = value_at(own, key)
        if isinstance(setting, Choices):
            values = setting.values if setting.holds(value) else (*setting.values, value)
            taken = [v for v in values if refusal({key: v}) is None]
            if len(taken) > 1:
                yield key, Choices(tuple(taken))
        elif isinstance(value, int | float):
            low, high = (
                end if refusal({key: end}) is None else value
                for end in (min(setting.low, value), max(setting.high, value))
            )
            if low < high:
                yield key, Range(low, high, setting.log and low > 0, setting.whole)


def _require_taken(text: str, key: str, setting: Range | Choices, refusal: Refusal) -> None:
    for end in setting.ends:
        if (why := refusal({key: end})) is not None:
            raise ParamsError(f"--search {text}: {why}")


def _parsed(text: str, model: str, own: Section) -> tuple[str, Range | Choices]:
    key, equals, values = (part.strip() for part in text.partition("="))
    if not equals or not key or not values:
        raise ParamsError(f"--search {text}: cannot be read; write KEY=LOW:HIGH, KEY=LOW:HIGH:log or KEY=a,b,c")
    if (why := _FIXED.get(key.partition(".")[0])) is not None:
        raise ParamsError(
            f"--search {text}: {key} is not searched, since {why}; add a variant that has another, and tune that"
        )
    if not has(own, key):
        raise ParamsError(f"--search {text}: {model} has no setting '{key}'{hint(key, keys(own))}")
    low, colon, rest = values.partition(":")
    if colon and not values.startswith(("[", "{", '"', "'")):
        return key, _range(text, key, low, rest, value_at(own, key))
    return key, _choices(text, values)


def _range(text: str, key: str, low: str, rest: str, own: Any) -> Range:
    high, colon, kind = rest.partition(":")
    matches = [_NUMBER.fullmatch(end.strip()) for end in (low, high)]
    if None in matches or (colon and kind != "log"):
        raise ParamsError(f"--search {text}: cannot be read; write KEY=LOW:HIGH, KEY=LOW:HIGH:log or KEY=a,b,c")
    if not isinstance(own, int | float) or isinstance(own, bool):
        raise ParamsError(f"--search {text}: {key} = {own!r} is no number; write KEY=a,b,c")
    ends = [float(match[2]) * (own if match[1] else 1) for match in matches if match is not None]
    whole = isinstance(own, int)
    if whole and any(end % 1 and not match[1] for end, match in zip(ends, matches, strict=True) if match is not None):
        raise ParamsError(f"--search {text}: {key} is a whole number; write whole ones")
    if not all(map(math.isfinite, ends)):
        raise ParamsError(f"--search {text}: no such number; write smaller ones")
    first, last = (round(end) if whole else float(f"{end:.{_DIGITS}g}") for end in ends)
    if first >= last:
        raise ParamsError(f"--search {text}: {first:g} is not below {last:g}; write the lower one first")
    if colon and first <= 0:
        raise ParamsError(f"--search {text}: {first:g} has no logarithm; begin above 0, or leave out :log")
    return Range(first, last, log=bool(colon), whole=whole)


def _choices(text: str, values: str) -> Choices:
    try:
        found = values_of(values)
    except ValueError:
        raise ParamsError(f"--search {text}: {values} cannot be read as YAML's values; write KEY=a,b,c") from None
    choices = Choices(tuple(found))
    if len(set(map(str, choices.names))) < len(found):
        raise ParamsError(f"--search {text}: a value stands there twice; name each once")
    return choices
