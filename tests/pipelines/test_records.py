from pathlib import Path

import numpy as np
import pytest

from pipelines.errors import StageError
from pipelines.records import Record, read_array, read_arrays


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


def pickled(path: Path) -> None:
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)


ARRAY = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)


@pytest.mark.parametrize("mapped", [True, False])
def test_an_array_is_read_or_refused_in_a_line(tmp_path: Path, mapped: bool) -> None:
    path = tmp_path / "a.npy"
    np.save(path, ARRAY)
    whole = path.read_bytes()
    assert np.array_equal(read_array(path, (2, 3, 4), np.uint8, "run it again", mapped=mapped), ARRAY)
    damaged = [whole[:length] for length in (0, 4, 30, len(whole) - 1)]
    damaged += [whole[::-1], b"{}", b"PK" + whole, whole.replace(b"(2, 3, 4)", b"(2, 3, 4, 999999999999)", 1)]
    for content in damaged:
        path.write_bytes(content)
        assert refused(path, (2, 3, 4), mapped).startswith(f"{path}: damaged, or by another version of Blemish (")
    pickled(path)
    assert "; run it again" in refused(path, (1,), mapped)
    np.save(path, ARRAY)
    assert refused(path, (3, 3, 4), mapped).endswith("(not uint8 of shape (3, 3, 4)); run it again")
    np.save(path, ARRAY.astype(np.int64))
    assert "not uint8" in refused(path, (2, 3, 4), mapped)
    path.unlink()
    assert refused(path, (2, 3, 4), mapped) == f"{path}: not there; run it again"


def refused(path: Path, shape: tuple[int, ...], mapped: bool) -> str:
    with pytest.raises(StageError) as caught:
        read_array(path, shape, np.uint8, "run it again", mapped=mapped)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_arrays_of_one_file_are_read_or_refused_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, a=ARRAY, b=ARRAY[:, 0])
    whole = path.read_bytes()
    assert [array.shape for array in read_arrays(path, ("a", "b"), "")] == [(2, 3, 4), (2, 4)]
    damaged = [whole[:length] for length in (0, 30, len(whole) - 9)] + [b"{}", whole[:60] + bytes(40) + whole[100:]]
    for content, names in [(content, ("a", "b")) for content in damaged] + [(whole, ("a", "c"))]:
        path.write_bytes(content)
        with pytest.raises(StageError) as caught:
            read_arrays(path, names, "run it again")
        assert str(caught.value).startswith(f"{path}: damaged, or by another version of Blemish (")
        assert len(str(caught.value).splitlines()) == 1
    np.savez_compressed(path, a=ARRAY, b=ARRAY[:1])
    with pytest.raises(StageError, match="arrays of different length"):
        read_arrays(path, ("a", "b"), "run it again")
