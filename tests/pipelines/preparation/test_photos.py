"""Photos are found at any depth, decoded once, and streamed as a function of (seed, step)."""

import io
import resource
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_folders import CONFIG, write_image
from rich.console import Console

from anomaly_models.common.sizes import Size
from pipelines import threads
from pipelines.data.arrays import Rows, stream_rows, to_image
from pipelines.errors import DatasetError, ImageError
from pipelines.files import DiskFull
from pipelines.pictures import images
from pipelines.preparation.photos import decode_once, find_photos


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    for seed, name in enumerate(["b/deep/er/1.png", "a/2.PNG", "z.png"]):
        write_image(root / name, seed)
    (root / "readme.txt").write_text("not a photo")
    write_image(root / ".thumbnails/1.png", 9)
    return root


def test_photos_are_found_to_the_bottom_and_sorted(folder):
    found = [path.relative_to(folder).as_posix() for path in find_photos([folder])]
    assert found == ["a/2.PNG", "b/deep/er/1.png", "z.png"]
    assert find_photos([folder / "b", folder / "a"]) == [folder / "b/deep/er/1.png", folder / "a/2.PNG"]


def test_a_missing_and_an_empty_folder_are_one_line(folder, tmp_path):
    with pytest.raises(DatasetError, match=r"^[^\n]*nowhere: no such folder of photos; [^\n]*$"):
        find_photos([folder, tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/notes.txt").write_text("x")
    with pytest.raises(DatasetError, match=r"^[^\n]*empty: holds no photos, at any depth; [^\n]*\.png[^\n]*$"):
        find_photos([tmp_path / "empty"])


def test_rows_are_what_images_reads(folder, tmp_path):
    arrays = decode_once([folder], [Size.square(16), Size.square(32)], tmp_path / "cache", quiet(), "decoding")
    assert arrays.num_photos == 3
    for size in (16, 32):
        rows = np.load(arrays.file(Size.square(size)))
        for row, path in enumerate(find_photos([folder])):
            photo = images.load_rgb(path, CONFIG.reading)
            assert np.array_equal(rows[row], images.resize_rgb(photo, Size.square(size), "bilinear"))


def test_photos_are_decoded_once(folder, tmp_path, monkeypatch):
    first = decode_once([folder], [Size.square(16)], tmp_path / "cache", quiet(), "decoding")
    before = first.file(Size.square(16)).stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(images, "load_rgb", None)  # would fail
        again = decode_once([folder], [Size.square(16)], tmp_path / "cache", quiet(), "decoding")
    assert again == first
    assert again.file(Size.square(16)).stat().st_mtime_ns == before


def test_other_photos_or_sizes_are_decoded_anew(folder, tmp_path):
    first = decode_once([folder], [Size.square(16)], tmp_path / "cache", quiet(), "decoding")
    assert (
        decode_once([folder], [Size.square(8)], tmp_path / "cache", quiet(), "decoding").file(Size.square(8)).exists()
    )
    write_image(folder / "a/2.PNG", 5, width=41)
    changed = decode_once([folder], [Size.square(16)], tmp_path / "cache", quiet(), "decoding")
    assert changed.sha256 != first.sha256
    write_image(folder / "new.png", 6)
    assert decode_once([folder], [Size.square(16)], tmp_path / "cache", quiet(), "decoding").num_photos == 4


def test_the_version_is_that_of_the_bytes_wherever_they_lie(folder, tmp_path):
    first = decode_once([folder], [Size.square(8)], tmp_path / "cache", quiet(), "decoding")
    folder.rename(tmp_path / "moved")
    assert (
        decode_once([tmp_path / "moved"], [Size.square(8)], tmp_path / "other", quiet(), "decoding").sha256
        == first.sha256
    )


def test_photos_that_cannot_be_read_are_listed_and_nothing_is_kept(folder, tmp_path):
    (folder / "broken.png").write_bytes(b"\x89PNG broken")
    (folder / "empty.jpg").write_bytes(b"")
    with pytest.raises(ImageError, match=r"(?s)^2 photos cannot be read:\n.*broken\.png.*\n.*empty\.jpg"):
        decode_once([folder], [Size.square(8)], tmp_path / "cache", quiet(), "decoding")
    assert not (tmp_path / "cache").exists()
    (folder / "empty.jpg").unlink()
    with pytest.raises(ImageError, match=r"^[^\n]*broken\.png: [^\n]*$"):
        decode_once([folder], [Size.square(8)], tmp_path / "cache", quiet(), "decoding")


def test_more_photos_than_are_decoded_at_once(folder, tmp_path, monkeypatch):
    whole = decode_once([folder], [Size.square(8)], tmp_path / "cache", quiet(), "decoding")
    monkeypatch.setattr(threads, "_AHEAD", 2)
    parts = decode_once([folder], [Size.square(8)], tmp_path / "parts", quiet(), "decoding")
    assert parts.file(Size.square(8)).read_bytes() == whole.file(Size.square(8)).read_bytes()
    assert parts.sha256 == whole.sha256


def test_a_damaged_index_of_the_cache_is_made_anew(folder, tmp_path):
    made = decode_once([folder], [Size.square(8)], tmp_path / "cache", quiet(), "decoding")
    index = tmp_path / "cache" / "index.json"
    whole = index.read_bytes()
    for content in (b"", whole[:20], b"[3]", b"\xff", b"{}"):
        index.write_bytes(content)
        assert decode_once([folder], [Size.square(8)], tmp_path / "cache", quiet(), "decoding") == made
        assert index.read_bytes() == whole


def test_a_full_disk_is_told_and_nothing_is_kept(folder, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(DiskFull, match=r"cache: .*free some space and run again"):
            decode_once([folder], [Size.square(256)], tmp_path / "cache", quiet(), "decoding")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_rows_are_the_same_on_the_device_and_on_disk(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    np.save(tmp_path / "rows.npy", pixels)
    file, shape = tmp_path / "rows.npy", pixels.shape
    resident, mapped = (Rows(file, shape, np.uint8, "", torch.device("cpu"), here) for here in (True, False))
    assert len(resident) == len(mapped) == 5
    assert torch.equal(resident.gather([3, 0, 3]), mapped.gather([3, 0, 3]))
    assert np.array_equal(to_image(resident.gather([3, 0])).numpy(), images.to_input(pixels[[3, 0]]))


def test_the_stream_is_a_function_of_key_and_step():
    stream = [row for step in range(6) for row in stream_rows(7, (3,), step, 4)]
    assert Counter(stream[:7]) == Counter(stream[7:14]) == Counter(range(7))  # epoch by epoch
    assert stream[:7] != stream[7:14]
    assert stream_rows(7, (3,), 4, 4) == stream[16:20]
    assert stream_rows(7, (4,), 0, 7) != stream[:7]
    assert stream_rows(7, (3, 1), 0, 7) != stream[:7]
    assert Counter(stream_rows(2, (0,), 1, 6)) == {0: 3, 1: 3}  # a batch of several epochs
