from pathlib import Path

import pytest

from pipelines.errors import StageError
from pipelines.records import Record


class Inner(Record):
    share: float | None


class Found(Record):
    name: str
    counts: dict[str, int]
    ends: tuple[float, float]
    inner: tuple[Inner, ...]


FOUND = Found(name="nüt", counts={"train": 3}, ends=(0.1, 1.0), inner=(Inner(share=None), Inner(share=0.1 + 0.2)))


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    FOUND.save(tmp_path / "found.json")
    assert Found.load(tmp_path / "found.json", "run it again") == FOUND
    assert '"nüt"' in (tmp_path / "found.json").read_text(encoding="utf-8")


NUT = '{"name": "nut", '


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "the file: Invalid JSON: EOF while parsing a value at line 1 column 0"),
        ('{"name": "nut"', "the file: Invalid JSON: EOF while parsing an object at line 1 column 14"),
        ("[]", "the file: Input should be an object"),
        (NUT + '"counts": {}, "ends": [0, 1]}', "inner: Field required"),
        (NUT + '"counts": {"a": "3"}, "ends": [0, 1], "inner": []}', "counts.a: Input should be a valid integer"),
        (NUT + '"counts": {}, "ends": [0, NaN], "inner": []}', "ends.1: Input should be a finite number"),
        (
            NUT + '"counts": {}, "ends": [0, 1], "inner": [{"share": 1, "old": 2}]}',
            "inner.0.old: Extra inputs are not permitted",
        ),
    ],
)
def test_what_is_damaged_gets_a_line(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "found.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(StageError) as caught:
        Found.load(path, "run it again")
    assert str(caught.value) == f"{path}: damaged, or by another version of Blemish ({reason}); run it again"


def test_what_is_missing_gets_a_line(tmp_path: Path) -> None:
    with pytest.raises(StageError) as caught:
        Found.load(tmp_path / "found.json", "run it again")
    assert str(caught.value) == f"{tmp_path / 'found.json'}: not there; run it again"
