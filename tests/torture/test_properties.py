"""Whatever text, value or bytes hypothesis thinks of: a refusal or a value comes of it; names stay in their folder."""

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from bright_model import CARD
from conftest import tiny_params
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anomaly_models.common.settings import Tiles
from anomaly_models.common.sizes import Size
from pipelines.errors import ImageError, ParamsError
from pipelines.inference.card import Card
from pipelines.pictures.images import read_bytes
from pipelines.pictures.reading import Reading
from pipelines.settings.params import load_params

READING = Reading(0, 65535, "refuse", page=None, dicom_window="file", max_megapixels=90)
# The same in each run, and none that is too slow on a busy machine.
CALM = settings(derandomize=True, database=None, deadline=None, suppress_health_check=[*HealthCheck])
PART, WHOLE = settings(CALM, max_examples=200), settings(CALM, max_examples=5000)

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)
HEADS = (b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"II*\0", b"MM\0*", b"BM", b"RIFF\x10\0\0\0WEBP", b"GIF89a")


def paths_in(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys that lead to everything in it."""
    yield above
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in inner:
        yield from paths_in(below, (*above, key))


def put(whole: Any, path: tuple[Any, ...], value: Any) -> Any:
    """The same, with that value there."""
    if not path:
        return value
    changed = copy.deepcopy(whole)
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return changed


@pytest.fixture
def calm(thorough: bool) -> settings:
    return WHOLE if thorough else PART


def accepted(path: Path, text: str) -> Any:
    """The params, if they are; else a list of problems, each on its line."""
    path.write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
    try:
        return load_params(path)
    except ParamsError as error:
        said = str(error)
    assert said.startswith(f"{path}: ")
    assert "Traceback" not in said
    return None


def test_any_text_for_params(tmp_path: Path, calm: settings) -> None:
    @calm
    @given(st.text())
    def holds(text: str) -> None:
        assert accepted(tmp_path / "params.yaml", text) is None

    holds()


def test_any_value_anywhere_in_params(tmp_path: Path, calm: settings) -> None:
    whole = tiny_params()

    @calm
    @given(st.sampled_from([*paths_in(whole)]), VALUES)
    def holds(path: tuple[Any, ...], value: Any) -> None:
        accepted(tmp_path / "params.yaml", yaml.safe_dump(put(whole, path, value), allow_unicode=True))

    holds()


def test_a_category_of_any_name_stays_in_its_folder(tmp_path: Path, calm: settings) -> None:
    root, taken = (tmp_path / "data").resolve(), []

    @calm
    @given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12))
    def holds(name: str) -> None:
        values = put(tiny_params(), ("data", "categories"), [name])
        if accepted(tmp_path / "params.yaml", yaml.safe_dump(values, allow_unicode=True)) is not None:
            taken.append(name)
            assert (root / name).resolve().parent == root

    holds()
    assert len(set(taken)) > 5


def test_any_bytes_for_a_picture(calm: settings) -> None:
    @calm
    @given(st.sampled_from(HEADS), st.binary(max_size=200), st.sampled_from(["a.png", "a.jpg", "a.tif", "a.dcm"]))
    def holds(head: bytes, rest: bytes, name: str) -> None:
        try:
            found = read_bytes(head + rest, Path(name), READING)
            assert found.rgb.ndim == 3
        except ImageError as error:
            said = str(error)
        else:
            return
        assert said.startswith(f"{name}: ")
        assert "\n" not in said

    holds()


def test_any_card_is_read_back(calm: settings) -> None:
    sides = st.builds(Size, st.integers(1, 4096), st.integers(1, 4096))
    finite = st.floats(allow_nan=False, allow_infinity=False)

    @calm
    @given(sides, sides, finite, st.none() | st.floats(0, 1), st.text(), st.lists(st.text()))
    def holds(image: Size, tile: Size, threshold: float, rate: float | None, groups: str, weights: list[str]) -> None:
        card = replace(
            CARD,
            image_size=image,
            tiles=Tiles(side=tile, overlap=min(tile) - 1),
            threshold=threshold,
            false_alarm_rate=rate,
            groups=groups,
            weights=weights,
        )
        written = json.loads(json.dumps(card.to_json()))
        plain = Card.from_json(written)
        assert plain.to_json() == written
        assert (plain.threshold, plain.input_size) == (threshold, card.input_size)

    holds()
