"""Real anomalies follow the normal images of each batch; foregrounds are found once per image."""

import shutil

import pytest
import torch
from conftest import CATEGORY, tiny_params, write_params

from anomaly_models.base import Batch
from anomaly_models.common.sizes import Size
from pipelines.data import streams as foregrounds
from pipelines.data.batches import PreparedData
from pipelines.data.streams import WithAnomalies, WithForeground, WithPhotos, anomalies_warning
from pipelines.pictures.frames import Frame

CPU = torch.device("cpu")


def prepared(root, blemish, count=0, surfaces=()):
    values = tiny_params()
    values["prepare"] |= {"anomalous_train": {"count": count, "protocol": "spread"}, "surfaces": list(surfaces)}
    write_params(root, values)
    assert blemish("prepare", CATEGORY).code == 0
    return PreparedData(root / "data/prepared" / CATEGORY, Frame(Size.square(64), "bilinear", "stretch"), CPU)


def test_anomalies_follow_the_normal_images(root, blemish):
    data = prepared(root, blemish, count=2)
    batches = WithAnomalies(data, 3)
    rows = set()
    for step in range(4):
        batch = batches.training_batch(0, step, 4)
        assert batch.image.shape == (7, 3, 64, 64)
        assert batch.label.tolist() == [False] * 4 + [True] * 3
        assert torch.equal(batch.image[:4], data.training_batch(0, step, 4).image)
        assert (batch.mask.flatten(1).sum(1) > 0).tolist() == batch.label.tolist()
        again = data.batch(batch.row.tolist())
        assert torch.equal(again.image, batch.image)
        assert torch.equal(again.mask, batch.mask)
        rows |= set(batch.row[4:].tolist())
        same = batches.training_batch(0, step, 4)
        assert torch.equal(same.row, batch.row)
    assert rows == set(data.rows("anomalous_train"))
    assert anomalies_warning(data) is None


def test_without_anomalies_a_batch_is_as_it_was(root, blemish):
    data = prepared(root, blemish)
    batch = WithAnomalies(data, 3).training_batch(0, 0, 4)
    assert not batch.label.any()
    assert anomalies_warning(data) == (
        f"{CATEGORY}: no real anomalies to learn from (prepare.anomalous_train.count is 0, or too few defects)"
    )


def test_anomalies_without_masks_are_left_out_and_all_tested_on(root, blemish):
    shutil.rmtree(root / "images" / CATEGORY / "ground_truth")
    data = prepared(root, blemish, count=2)
    assert not data.index.rows("anomalous_train", "withheld")
    assert sum(data.index.images[row].label for row in data.rows("test")) == data.index.counts["test_anomalous"] > 0
    assert not WithAnomalies(data, 3).training_batch(0, 0, 4).label.any()
    assert "have no masks" in anomalies_warning(data)


class Counted:
    device = CPU

    def training_batch(self, seed, step, batch_size):
        image = torch.arange(step, step + batch_size).view(-1, 1, 1, 1).expand(-1, 3, 8, 8) / 100
        rows = torch.arange(step, step + batch_size)
        return Batch(image, torch.zeros_like(image[:, :1]), torch.zeros(batch_size, dtype=torch.bool), row=rows)


def test_a_foreground_is_found_once_per_image(monkeypatch):
    asked = []

    def mask_of(image):
        asked.append(round(float(image.mean()) * 100))
        return (torch.arange(8).view(1, 1, 8, 1) < asked[-1]).float().expand(1, 1, 8, 8)

    monkeypatch.setattr(foregrounds, "foreground_mask", mask_of)
    batches = WithForeground(Counted())
    for step in (0, 1, 2):
        foreground = batches.training_batch(0, step, 4).foreground
        assert foreground.shape == (4, 1, 8, 8)
        assert foreground.flatten(1).sum(1).tolist() == [8 * row for row in range(step, step + 4)]
    assert asked == [0, 1, 2, 3, 4, 5]


class OneMore(Counted):
    """As with an anomaly."""

    def training_batch(self, seed, step, batch_size):
        return super().training_batch(seed, step, batch_size + 1)


class Photos:
    """Those of a set are told by their number."""

    def __init__(self, number):
        self.number = number

    def images(self, seed, step, batch_size):
        return torch.full((batch_size, 3, 8, 8), self.number + seed + step / 10)


@pytest.mark.parametrize(("penalty", "textures"), [(True, False), (False, True), (True, True), (False, False)])
def test_a_batch_gets_as_many_photos_as_it_has_images(penalty, textures):
    sets = {"penalty": Photos(10) if penalty else None, "texture": Photos(20) if textures else None}
    source = WithPhotos(OneMore(), sets["penalty"], sets["texture"])
    batch = source.training_batch(2, 5, 3)
    assert source.device == CPU
    assert torch.equal(batch.image, Counted().training_batch(2, 5, 4).image)
    for name, photos in sets.items():
        found = getattr(batch, name)
        assert found is None if photos is None else torch.equal(found, photos.images(2, 5, 4))


@pytest.mark.parametrize("surface", [True, False])
def test_the_index_says_whether_a_part_stands_out(root, blemish, surface):
    assert prepared(root, blemish, surfaces=[CATEGORY] * surface).index.surface == surface


def test_a_surface_must_be_a_category(root, blemish):
    values = tiny_params()
    values["prepare"]["surfaces"] = ["squars"]
    write_params(root, values)
    assert "prepare.surfaces: 'squars' is not among data.categories (did you mean 'squares'?)" in blemish("check").err
