"""Batches hold what `images` reads, and the training stream is a pure function of (seed, step)."""

import shutil
from collections import Counter

import drawn_folders
import numpy as np
import pytest
import torch
from PIL import Image
from simulated_gpu import GPU, Waits, simulated_gpu

from anomaly_models.common.sizes import Size
from pipelines.data import batches as data
from pipelines.data.batches import PreparedData
from pipelines.errors import StageError
from pipelines.files import read_json, write_json
from pipelines.pictures import images
from pipelines.pictures.frames import Frame
from pipelines.preparation.prepare import prepare

SIZE = Size.square(8)
CONFIG = drawn_folders.CONFIG.model_copy(update={"holdout": 0.3})
FRAME = Frame(SIZE, "bilinear", "stretch")
FRAMES = {
    "adfa": FRAME,
    "fapm": FRAME,
    "bgad": Frame(SIZE, "lanczos", "stretch"),
    "diffusion_ad": Frame(Size.square(4), "lanczos", "stretch"),
}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A category of 10 training images (7 to fit, 3 held out), 2 good and 3 anomalous to test on."""
    root = tmp_path_factory.mktemp("data") / "nut"
    rng = np.random.default_rng(0)
    for folder, number in (("train/good", 10), ("test/good", 2), ("test/crack", 3)):
        (root / folder).mkdir(parents=True)
        for index in range(number):
            Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(root / folder / f"{index}.png")
    (root / "ground_truth/crack").mkdir(parents=True)
    for index in range(3):
        mask = np.zeros((12, 16), dtype=bool)
        mask[2:8, 4 * index : 4 * index + 6] = True
        Image.fromarray(mask).save(root / f"ground_truth/crack/{index}_mask.png")
    return root


@pytest.fixture(scope="module")
def folder(source):
    destination = source.parent / "prepared/nut"
    prepare(source, "nut", CONFIG, FRAMES, destination, lambda done, total: None)
    return destination


@pytest.fixture(scope="module")
def prepared(folder):
    return PreparedData(folder, Frame(SIZE, "bilinear", "stretch"), CPU)


@pytest.fixture
def mapped(folder, monkeypatch):
    monkeypatch.setattr(data, "DEVICE_BYTES", 0)
    return PreparedData(folder, Frame(SIZE, "bilinear", "stretch"), CPU)


def positions(prepared, batch):
    """Which rows the images of a batch are."""
    everything = prepared.batch(range(len(prepared.index.images))).image
    return [int((everything == image).flatten(1).all(1).nonzero().item()) for image in batch.image]


def assert_same(first, second):
    assert torch.equal(first.image, second.image)
    assert torch.equal(first.mask, second.mask)
    assert torch.equal(first.label, second.label)


def test_a_batch_holds_what_images_reads(prepared, source):
    rows = [14, 0, 11, 7, 10]
    batch = prepared.batch(rows)
    assert batch.image.shape == (5, 3, *SIZE)
    assert batch.image.dtype == torch.float32
    assert batch.image.is_contiguous()
    assert batch.mask.shape == (5, 1, *SIZE)
    assert batch.mask.dtype == torch.float32
    assert batch.label.dtype == torch.bool
    assert batch.penalty is None
    for place, row in enumerate(rows):
        entry = prepared.index.images[row]
        pixels = FRAME.fitted(images.load_rgb(source / entry.path, CONFIG.reading))
        np.testing.assert_array_equal(batch.image[place].numpy(), images.to_input(pixels[None])[0])
        assert bool(batch.label[place]) == entry.label == ("crack" in entry.path)
        expected = np.zeros(SIZE, dtype=bool)
        if entry.masks:
            expected = images.resize_mask(images.load_mask(source / entry.masks[0].path), SIZE)
        np.testing.assert_array_equal(batch.mask[place, 0].numpy(), expected)


def test_splits_in_index_order(prepared):
    assert prepared.rows("train") == list(range(7))
    assert prepared.rows("holdout") == [7, 8, 9]
    assert prepared.rows("test") == [10, 11, 12, 13, 14]
    assert prepared.rows("anomalous_train") == []
    batches = prepared.batches("test", 2)
    assert len(batches) == 3
    assert [positions(prepared, batch) for batch in batches] == [[10, 11], [12, 13], [14]]
    assert [len(batch.label) for batch in batches] == [2, 2, 1], "a second pass sees the same"
    assert len(prepared.batches("anomalous_train", 2)) == 0


def test_what_models_are_fitted_on_holds_no_anomaly(prepared):
    for split in ("train", "holdout"):
        for batch in prepared.batches(split, 4):
            assert not batch.label.any()
            assert not batch.mask.any()


def test_the_training_stream_is_a_function_of_seed_and_step(prepared, folder):
    forward = [prepared.training_batch(3, step, 4) for step in range(12)]
    resumed = PreparedData(folder, Frame(SIZE, "bilinear", "stretch"), CPU)
    for step in (11, 5, 0, 7):
        assert_same(resumed.training_batch(3, step, 4), forward[step])
    other = [positions(prepared, prepared.training_batch(4, step, 4)) for step in range(12)]
    assert other != [positions(prepared, batch) for batch in forward]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
def test_each_epoch_shows_every_training_image_once(prepared, batch_size):
    stream = [row for step in range(21) for row in positions(prepared, prepared.training_batch(0, step, batch_size))]
    epochs = [stream[start : start + 7] for start in range(0, len(stream), 7)]
    assert len(epochs) == 3 * batch_size
    assert all(sorted(epoch) == prepared.rows("train") for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1, "each epoch has an order of its own"


def test_a_batch_larger_than_the_split_wraps_around(prepared):
    batch = prepared.training_batch(0, 1, 17)
    assert batch.image.shape[0] == 17
    assert set(Counter(positions(prepared, batch)).values()) <= {2, 3}
    singles = [row for step in range(17, 34) for row in positions(prepared, prepared.training_batch(0, step, 1))]
    assert positions(prepared, batch) == singles


def test_memory_mapped_arrays_give_the_same_batches(prepared, mapped):
    assert isinstance(mapped._images._array, np.memmap)
    assert_same(mapped.batch([14, 0, 11]), prepared.batch([14, 0, 11]))
    for step in range(4):
        assert_same(mapped.training_batch(0, step, 5), prepared.training_batch(0, step, 5))
    for first, second in zip(mapped.batches("test", 2), prepared.batches("test", 2), strict=True):
        assert_same(first, second)


def test_native_masks(prepared, source):
    mask = prepared.native_mask(11, source)
    assert mask.shape == (12, 16)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, images.load_mask(source / "ground_truth/crack/1_mask.png"))
    assert prepared.native_mask(0, source).shape == (12, 16)
    assert not prepared.native_mask(0, source).any()


def test_masks_are_zero_where_the_category_has_none(source, tmp_path):
    without = tmp_path / "nut"
    without.mkdir()
    for name in ("train", "test"):
        (without / name).symlink_to(source / name)
    prepare(without, "nut", CONFIG, FRAMES, tmp_path / "prepared/nut", lambda done, total: None)
    prepared = PreparedData(tmp_path / "prepared/nut", Frame(SIZE, "bilinear", "stretch"), CPU)
    batch = prepared.batch(prepared.rows("test"))
    assert batch.label.sum() == 3
    assert not batch.mask.any()


def test_not_prepared(tmp_path):
    with pytest.raises(StageError, match="no prepared images; run `blemish prepare screw`"):
        PreparedData(tmp_path / "screw", Frame(SIZE, "bilinear", "stretch"), CPU)


def test_a_size_that_is_not_prepared(folder):
    found = r"prepared at 4 \(lanczos\), 8 \(bilinear\), 8 \(lanczos\)"
    for size in (256, 4):
        missing = rf"not at {size} \(bilinear\) pixels; run `blemish prepare nut`"
        with pytest.raises(StageError, match=f"{found}, {missing}"):
            PreparedData(folder, Frame(Size.square(size), "bilinear", "stretch"), CPU)


def test_each_filter_has_its_own_images_and_all_the_same_masks(folder):
    bilinear, lanczos = (
        PreparedData(folder, Frame(SIZE, resize, "stretch"), CPU) for resize in ("bilinear", "lanczos")
    )
    rows = bilinear.rows("test")
    assert not torch.equal(bilinear.batch(rows).image, lanczos.batch(rows).image)
    assert torch.equal(bilinear.batch(rows).mask, lanczos.batch(rows).mask)
    assert bilinear.version == lanczos.version


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"images": [{}]}, "images.0.path: Field required"),
        ({"images": 3}, "images: Input should be"),
        ({"layout": "coco"}, "layout: Input should be"),
        ({"counts": None}, "counts: Input should be"),
    ],
)
def test_a_damaged_index(folder, tmp_path, changes, reason):
    (tmp_path / "nut").mkdir()
    path = tmp_path / "nut/index.json"
    write_json(path, read_json(folder / "index.json") | changes)
    with pytest.raises(StageError) as caught:
        PreparedData(tmp_path / "nut", Frame(SIZE, "bilinear", "stretch"), CPU)
    assert str(caught.value).startswith(f"{path}: damaged, or by another version of Blemish ({reason}")
    assert str(caught.value).endswith("); run `blemish prepare nut`")


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"format": 0}, "prepared in format 0"), ({}, r"images_8_bilinear\.npy: missing; run `blemish prepare nut`")],
)
def test_another_format_and_missing_arrays(folder, tmp_path, changes, message):
    shutil.copytree(folder / "seen_by", tmp_path / "nut/seen_by")
    write_json(tmp_path / "nut/index.json", read_json(folder / "index.json") | changes)
    with pytest.raises(StageError, match=message):
        PreparedData(tmp_path / "nut", Frame(SIZE, "bilinear", "stretch"), CPU)


@pytest.mark.parametrize("resident", [True, False])
def test_a_training_batch_waits_for_no_gpu(folder, monkeypatch, resident) -> None:
    if not resident:
        monkeypatch.setattr(data, "DEVICE_BYTES", 0)
    with simulated_gpu(monkeypatch):
        prepared = PreparedData(folder, FRAME, GPU)
        with Waits() as waits:
            batch = prepared.training_batch(seed=0, step=0, batch_size=4)
    assert (batch.image.device, batch.label.device) == (GPU, GPU)
    assert waits.found == {}
