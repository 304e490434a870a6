"""Sizes in files of settings: one number, or a height and a width."""

from typing import Any

import pytest
from pydantic import ValidationError

from anomaly_models.common.settings import Settings, Sides
from anomaly_models.common.sizes import Size


class Holder(Settings):
    size: Sides


@pytest.mark.parametrize(
    ("written", "read", "text"),
    [(64, Size(64, 64), "64"), ({"height": 300, "width": 2000}, Size(300, 2000), "2000x300")],
)
def test_a_size_is_written_as_it_was_read(written: Any, read: Size, text: str) -> None:
    found = Holder.model_validate({"size": written})
    assert found.size == read
    assert str(found.size) == text
    assert found.model_dump() == {"size": written}
    assert Holder.model_validate_json(found.model_dump_json()) == found
    assert Holder(size=read) == found


def test_equal_sides_are_a_square() -> None:
    assert Holder.model_validate({"size": {"height": 8, "width": 8}}).model_dump() == {"size": 8}


@pytest.mark.parametrize(
    "wrong",
    [
        *(0, -4, 1.5, True, "64", None, [64, 64]),
        {"height": 64},
        {"height": 64, "width": 0},
        {"height": 64, "width": "64"},
        {"height": 64, "width": 64, "depth": 3},
    ],
)
def test_what_is_no_size_is_told_once(wrong: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        Holder.model_validate({"size": wrong})
    (problem,) = caught.value.errors()
    assert problem["msg"] == "Input should be above 0: a number for a square, or `height` and `width`"


def test_a_stride_leaves_whole_cells() -> None:
    assert Size(300, 2000).divided(16) == (18, 125)
    assert Size(300, 2000).area == 600_000
