"""The folded copy of a backbone: the same maps, no batch normalisation, and never older than the weights."""

import copy

import pytest
import timm
import torch
from tiny_models import build
from torch import nn

from anomaly_models.common.backbones import Backbone, BackboneConfig
from anomaly_models.common.folding import folded

# a residual network; timm's own convolutions and activations within; norms before convolutions; several branches
NETWORKS = {"resnet18": 0, "tf_efficientnet_lite0": 0, "densenet121": 19, "res2net50_26w_4s": 0, "vgg11_bn": 0}


def norms_of(network):
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


def with_statistics(network):
    """As if it had been trained."""
    torch.manual_seed(0)
    for norm in norms_of(network):
        norm.running_mean.normal_(std=0.1)
        norm.running_var.uniform_(0.5, 1.5)
    return network.eval()


def backbone(*, may_round=True):
    config = BackboneConfig(name="tf_efficientnet_lite0", weights="package", layers=[1, 2], combine="separate")
    return with_statistics(Backbone(config, may_round=may_round))


def assert_alike(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() < 3e-5 * other.std()


@torch.no_grad()
@pytest.mark.parametrize(("name", "left"), NETWORKS.items())
def test_the_maps_are_the_same(name, left):
    network = with_statistics(timm.create_model(name, features_only=True, out_indices=(1, 2)))
    copied, image = folded(network), torch.rand(2, 3, 64, 96)
    assert norms_of(network)
    assert len(norms_of(copied)) == left  # those of a sum or of several maps, which no convolution gives
    assert_alike(copied(image), network(image))


@torch.no_grad()
def test_what_a_hook_reads_stays():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    seen = []
    with_statistics(network)[0].register_forward_hook(lambda module, given, found: seen.append(found))
    copied, image = folded(network), torch.rand(1, 3, 16, 16)
    assert [type(module) for module in copied] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d, nn.Sequential]
    assert_alike([copied(image)], [network(image)])
    assert torch.equal(*seen)


@torch.no_grad()
def test_a_convolution_that_is_used_twice_stays():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution, self.first, self.second = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, image):
            return self.second(self.convolution(self.first(self.convolution(image))))

    network, image = with_statistics(Twice()), torch.rand(1, 3, 8, 8)
    assert len(norms_of(folded(network))) == 2
    assert_alike([folded(network)(image)], [network(image)])


@torch.no_grad()
def test_a_way_that_depends_on_the_image_is_left_alone():
    class Choosing(nn.Sequential):
        def forward(self, image):
            return super().forward(image) if image.mean() > 0 else image

    network, image = with_statistics(Choosing(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))), torch.rand(1, 3, 8, 8)
    assert torch.equal(folded(network)(image), network(image))


@torch.no_grad()
def test_a_backbone_follows_its_weights():
    network, image = backbone(), torch.rand(2, 3, 64, 64)
    before = network(image)
    assert_alike(before, network.pyramid((image - network.mean) / network.std))
    other = {name: value * 1.1 if value.is_floating_point() else value for name, value in network.state_dict().items()}
    network.load_state_dict(other)
    loaded = network(image)
    assert_alike(loaded, network.pyramid((image - network.mean) / network.std))
    assert (loaded[0] - before[0]).abs().max() > 1e-3
    norms_of(network)[0].running_mean.add_(1.0)
    assert_alike(network(image), network.pyramid((image - network.mean) / network.std))
    network.double()
    assert network(image.double())[0].dtype == torch.float64


@torch.no_grad()
def test_only_who_may_round_sees_other_bits():
    network, image = backbone(), torch.rand(9, 3, 96, 96)
    expected, faster = network.pyramid((image - network.mean) / network.std), network(image)
    assert not torch.equal(faster[0], expected[0])
    assert_alike(faster, expected)
    plain = backbone(may_round=False)
    plain.load_state_dict(network.state_dict())
    assert all(torch.equal(*maps) for maps in zip(plain(image), expected, strict=True))


def test_what_may_learn_by_steps_may_not():
    may = {name: build(name).backbone._folded is not None for name in ("fapm", "adfa", "bgad")}
    assert may == {"fapm": True, "adfa": False, "bgad": False}


@torch.no_grad()
def test_nothing_more_is_saved_and_copies_are_apart():
    network, image = backbone(), torch.rand(1, 3, 64, 64)
    names = set(network.state_dict())
    before = network(image)
    other = copy.deepcopy(network)
    assert set(network.state_dict()) == names == set(other.state_dict())
    norms_of(other)[0].running_mean.add_(1.0)
    assert all(torch.equal(*maps) for maps in zip(network(image), before, strict=True))
    assert (other(image)[0] - before[0]).abs().max() > 1e-3
    assert all(found.is_contiguous() for found in before)
