"""What a run is called beside the earlier ones of the same cell: by what differs."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import count

from pipelines.tracking.records import SEED, common_name

_LONGEST = 250  # characters that a store takes
_LONGEST_VALUE = 24
_MOST = 3  # differences that are named
_HASH = 8  # characters
# Not named: the first stands in the name of a cell, the second follows from the data and the settings.
_UNNAMED = (SEED, "data.index_sha256")


def run_name(name: str, settings: Mapping[str, str], earlier: Sequence[tuple[str, Mapping[str, str]]]) -> str:
    """`name`, with the settings that are others than those of the first of the `earlier` runs: `fapm-gear, grid 8`.

    Of each earlier one, its name and its settings. Where nothing but time or code differs, a number: `fapm-gear (2)`.
    """
    differences = list(_differences(settings, next((known for _, known in earlier if known), settings)))
    hidden = differences[_MOST:]
    named = [*differences[:_MOST], f"{len(hidden)} more"] if hidden else differences
    full = ", ".join([name, *named])
    taken = {name for name, _ in earlier}
    return next(numbered for numbered in _numbered(full) if numbered not in taken)


def _differences(settings: Mapping[str, str], first: Mapping[str, str]) -> Iterator[str]:
    for name, value in settings.items():
        if name not in _UNNAMED and first.get(name) != value:
            yield _in_words(name, value)


def _in_words(name: str, value: str) -> str:
    """`grid 8` of `models.fapm.grid`, `backbone resnet18` of `models.fapm.backbone.name`, `data 1a2b3c4d` of a hash."""
    if name == "data.sha256":
        return f"data {value[:_HASH]}"
    short = common_name(name) or name.partition(".")[2]
    if short.endswith("_sha256"):
        return f"{short.removesuffix('_sha256')} {value[:_HASH]}"
    shown = value if len(value) <= _LONGEST_VALUE else f"{value[: _LONGEST_VALUE - 1]}…"
    return f"{short.removesuffix('.name')} {shown}"


def _numbered(name: str) -> Iterator[str]:
    yield name[:_LONGEST]
    for number in count(2):
        ending = f" ({number})"
        yield f"{name[: _LONGEST - len(ending)]}{ending}"
