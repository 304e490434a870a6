import pytest
import timm
import torch
from pydantic import ValidationError

from anomaly_models.base import ModelError
from anomaly_models.common.backbones import Backbone, BackboneConfig


def config(name: str = "test_resnet", weights: str = "package", layers: object = (1, 2)) -> BackboneConfig:
    return BackboneConfig.model_validate({"name": name, "weights": weights, "layers": layers})


@pytest.fixture
def backbone() -> Backbone:
    torch.manual_seed(0)
    return Backbone(config())


def test_wide_resnet_has_the_papers_maps_and_parameters() -> None:
    with torch.device("meta"):
        backbone = Backbone(config("wide_resnet50_2.tv_in1k", layers=[2, 3]))
        maps = backbone(torch.zeros(1, 3, 224, 224))
    assert [tuple(level.shape[1:]) for level in maps] == [(512, 28, 28), (1024, 14, 14)]
    assert (backbone.channels, backbone.reductions) == ((512, 1024), (8, 16))
    assert sum(parameter.numel() for parameter in backbone.parameters()) == 24_862_528


def test_normalises_with_the_statistics_of_its_weights(backbone: Backbone) -> None:
    assert backbone.mean.flatten().tolist() == [0.5, 0.5, 0.5]
    image = torch.rand(2, 3, 64, 64)
    expected = backbone.pyramid((image - 0.5) / 0.5)
    assert all(torch.equal(a, b) for a, b in zip(backbone(image), expected, strict=True))
    imagenet = Backbone(config("resnet18.tv_in1k"))
    torch.testing.assert_close(imagenet.mean.flatten(), torch.tensor([0.485, 0.456, 0.406]))
    torch.testing.assert_close(imagenet.std.flatten(), torch.tensor([0.229, 0.224, 0.225]))


def test_is_frozen_and_ignores_train(backbone: Backbone) -> None:
    backbone.train()
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    backbone(torch.rand(4, 3, 64, 64))
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())


def test_normalisation_is_not_part_of_the_state(backbone: Backbone) -> None:
    assert not {"mean", "std"} & set(backbone.state_dict())


def test_keeps_no_stage_that_is_not_needed() -> None:
    names = dict(Backbone(config("resnet18.tv_in1k", layers=(1, 2))).pyramid.named_children())
    assert "layer2" in names
    assert "layer3" not in names


@torch.no_grad()
@pytest.mark.parametrize("name", ["efficientnet_lite0", "mobilenetv3_small_050"])
@pytest.mark.parametrize("layers", [(1, 2), (0, 3)])
def test_efficientnets_are_cut_without_a_change(name: str, layers: tuple[int, ...]) -> None:
    backbone = Backbone(config(name, layers=layers))
    whole = timm.create_model(name, features_only=True, out_indices=layers).eval()
    state = whole.state_dict()
    own = backbone.pyramid.state_dict()
    assert len(own) < len(state)
    backbone.pyramid.load_state_dict({key: state[key] for key in own})
    image = torch.rand(1, 3, 64, 64)
    expected = whole((image - backbone.mean) / backbone.std)
    assert all(torch.equal(a, b) for a, b in zip(backbone(image), expected, strict=True))


def test_takes_the_list_that_yaml_gives() -> None:
    assert config(layers=[1, 2]).layers == (1, 2)
    assert BackboneConfig.model_validate(config().model_dump(mode="json")) == config()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"name": "resnett18"}, "no model 'resnett18'; did you mean resnet18"),
        ({"name": "resnet18.tv_in2k"}, "no weights 'resnet18.tv_in2k'; it has resnet18.a1_in1k"),
        ({"name": "resnet18", "weights": "timm"}, "pinned tag in name, found 'resnet18'; take one of resnet18.a1_in1k"),
        ({"layers": [2, 1]}, r"increasing order, found \[2, 1\]"),
        ({"layers": []}, "one or more indices"),
        ({"layers": ["1", "2"]}, "valid integer"),
        ({"layers": [-1, 2]}, "greater than or equal to 0"),
    ],
)
def test_refuses(values: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        BackboneConfig.model_validate({"name": "test_resnet", "weights": "package", "layers": [1, 2]} | values)


@pytest.mark.parametrize(
    ("name", "layers", "said"),
    [
        ("resnet18", [2, 9], r"no features for layers \[2, 9\]"),
        ("test_vit", [0, 1], r"strides \[16, 16\]; a pyramid whose stride grows"),
        ("swin_tiny_patch4_window7_224", [0, 1], "channels-last"),
    ],
)
def test_refuses_networks_without_such_maps(name: str, layers: list[int], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        Backbone(config(name, layers=layers))


def test_near_misses_are_models_of_timm() -> None:
    assert timm.is_model("test_resnet")  # the tiny network these tests use
