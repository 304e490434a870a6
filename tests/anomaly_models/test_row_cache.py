import pytest
import torch
from drawn_batches import seeded
from torch import Tensor

from anomaly_models.common.backbones import Backbone, BackboneConfig
from anomaly_models.common.row_cache import RowCache, by_pixels


class Counting(Backbone):
    """Notes how many images it has seen."""

    seen = 0

    def forward(self, image: Tensor) -> list[Tensor]:
        self.seen += len(image)
        return super().forward(image)


@pytest.fixture
def backbone() -> Counting:
    torch.manual_seed(0)
    return Counting(BackboneConfig(name="test_resnet", weights="package", layers=(1, 2), combine="separate"))


@pytest.fixture
def image() -> Tensor:
    return torch.rand(4, 3, 64, 64, generator=seeded(0))


def test_maps_are_the_backbones_and_do_not_depend_on_what_is_known(backbone: Counting, image: Tensor) -> None:
    cache, rows = RowCache(), torch.tensor([7, 2, 5, 0])
    first = cache(backbone, image, rows)
    for layer, expected in zip(first, backbone(image), strict=True):
        torch.testing.assert_close(layer, expected)
        assert not layer.requires_grad
    for found in (cache(backbone, image, rows), cache(backbone, image, None), RowCache()(backbone, image, rows)):
        assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True))
    one = cache(backbone, image[2:3], rows[2:3])
    assert all(torch.equal(a, b[2:3]) for a, b in zip(one, first, strict=True))


def test_a_row_is_computed_once_and_an_unknown_image_each_time(backbone: Counting, image: Tensor) -> None:
    cache = RowCache()
    cache(backbone, image, torch.tensor([3, 1, 3, 2]))
    assert backbone.seen == 3
    cache(backbone, image[:2], torch.tensor([2, 9]))
    assert backbone.seen == 4
    cache(backbone, image, None)
    assert backbone.seen == 8
    cache.clear()
    cache(backbone, image[:1], torch.tensor([3]))
    assert backbone.seen == 9


def test_what_does_not_fit_is_computed_anew(backbone: Counting, image: Tensor) -> None:
    size = sum(layer[:1].numel() * 4 for layer in backbone(image))
    cache, backbone.seen = RowCache(2 * size), 0
    for expected in (4, 6):  # rows 0 and 1 fit
        cache(backbone, image, torch.arange(4))
        assert backbone.seen == expected


def test_several_at_once_are_computed_together(backbone: Counting, image: Tensor) -> None:
    sizes = []

    def compute(batch: Tensor) -> list[Tensor]:
        sizes.append(len(batch))
        return backbone(batch)

    cache = RowCache()
    cache(compute, image[:1], torch.tensor([8]))
    found = cache(compute, image, torch.tensor([8, 6, 7, 6]), at_once=3)
    assert sizes == [1, 2]
    assert all(torch.equal(layer[1], layer[3]) for layer in found)


def test_a_number_by_pixels_is_that_of_the_same_pixels_alone(image: Tensor) -> None:
    numbers = by_pixels(image)
    assert len(set(numbers.tolist())) == 4
    assert torch.equal(by_pixels(image.to(memory_format=torch.channels_last)), numbers)
    assert torch.equal(by_pixels(image[[2]]), numbers[[2]])
    assert torch.equal(by_pixels(image[..., 1:, 1:]), by_pixels(image[..., 1:, 1:].clone()))
    changed = image.clone()
    changed[0, 2, 63, 63] += 1e-6
    assert (by_pixels(changed) == numbers).tolist() == [False, True, True, True]
