"""Folders on their way to another machine and back."""

from pathlib import Path

import pytest

from pipelines.sweeps import parcels
from pipelines.sweeps.parcels import Parcel, packed, receive, remove, unpack


def tree(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def sent(tmp_path: Path) -> Path:
    root = tmp_path / "sent"
    for name, content in {"a/b/one": b"1" * 5000, "a/two words": b"", "c.json": b"{}"}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


@pytest.mark.parametrize("size", [100, 2**20])
def test_what_is_unpacked_is_what_was_packed(
    sent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """In however many pieces."""
    monkeypatch.setattr(parcels, "PIECE", size)
    pieces = list(packed(sent, {"x/a": "a", "c.json": "c.json", "absent": "absent"}))
    assert {path for path, _ in pieces} == {"x/a", "c.json"}
    assert all(len(piece) <= size for _, piece in pieces)
    unpack(pieces, tmp_path / "there")
    assert tree(tmp_path / "there") == {"x/a/b/one": b"1" * 5000, "x/a/two words": b"", "c.json": b"{}"}


def test_a_folder_is_replaced_as_a_whole(sent: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    unpack(packed(sent, {"a": "a"}), there)
    (there / "a" / "old").write_bytes(b"of an earlier time")
    unpack(packed(sent, {"a": "a"}), there)
    assert tree(there) == {"a/b/one": b"1" * 5000, "a/two words": b""}


def test_links_travel_as_what_they_lead_to(sent: Path, tmp_path: Path) -> None:
    """People link their photos into a project."""
    (sent / "linked").symlink_to(sent / "a", target_is_directory=True)
    (sent / "a" / "file").symlink_to(sent / "c.json")
    unpack(packed(sent, {"linked": "linked"}), tmp_path / "there")
    assert not (tmp_path / "there" / "linked").is_symlink()
    assert (tmp_path / "there" / "linked" / "file").read_bytes() == b"{}"
    assert not (tmp_path / "there" / "linked" / "file").is_symlink()


def test_a_machine_takes_a_parcel_once(sent: Path, tmp_path: Path) -> None:
    taken: list[str] = []

    def pieces(digest: str) -> None:
        def fetched() -> object:
            for path, piece in packed(sent, {"a": "a"}):
                taken.append(digest)
                yield path, piece

        receive(Parcel("category a", digest, ()), fetched(), tmp_path / "there")

    for digest in ("first", "first", "second"):
        pieces(digest)
    assert taken == ["first", "second"]


def test_what_is_removed_may_be_anything(sent: Path) -> None:
    for name in ("a", "c.json", "absent"):
        remove(sent / name)
    assert tree(sent) == {}
