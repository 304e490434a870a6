from typing import Any

import pytest
import timm
import torch
from drawn_batches import perturbed, seeded
from einops import rearrange
from pydantic import ValidationError
from torch import Tensor

from anomaly_models.base import ModelError
from anomaly_models.common.backbones import Backbone, BackboneConfig, PatchTokens
from anomaly_models.common.sizes import Size


def config(
    name: str = "test_resnet", weights: str = "package", layers: object = (1, 2), combine: str = "separate"
) -> BackboneConfig:
    return BackboneConfig.model_validate({"name": name, "weights": weights, "layers": layers, "combine": combine})


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
    for name in ("resnet18.tv_in1k", "vit_small_patch14_reg4_dinov2.lvd142m"):
        imagenet = Backbone(config(name), Size.square(224))
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
        ({"combine": "mean"}, "the layers of test_resnet differ in stride and channels; set combine: separate"),
    ],
)
def test_refuses(values: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        BackboneConfig.model_validate(config().model_dump(mode="json") | values)


@pytest.mark.parametrize(
    ("name", "layers", "said"),
    [
        ("resnet18", [2, 9], r"no features for layers \[2, 9\]"),
        ("xcit_nano_12_p16_224", [0, 1], r"strides \[16, 16\]; a pyramid whose stride grows .* or a plain vision"),
        ("swin_tiny_patch4_window7_224", [0, 1], "channels-last"),
        ("test_vit", [0, 6], r"has blocks 0 to 5, found layers \[0, 6\]"),
        ("vit_small_patch16_dinov3", [12], r"has blocks 0 to 11, found layers \[12\]"),
    ],
)
def test_refuses_networks_without_such_maps(name: str, layers: list[int], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        Backbone(config(name, layers=layers))


@pytest.mark.parametrize("name", ["hiera_tiny_224", "beit_base_patch16_224"])
def test_refuses_sizes_that_a_network_is_not_made_for(name: str) -> None:
    with pytest.raises(ModelError, match=f"{name}: it takes images of 224 pixels only, found 256; take that size"):
        Backbone(config(name, layers=[0]), Size.square(256))


@torch.no_grad()
@pytest.mark.parametrize(("name", "side"), [("pvt_v2_b0", 64), ("hiera_tiny_224", 224)])
def test_takes_hierarchical_transformers_with_maps_like_a_pyramids(name: str, side: int) -> None:
    with torch.device("meta"):
        backbone = Backbone(config(name, layers=[0, 1]), Size.square(side))
        maps = backbone(torch.zeros(1, 3, side, side))
    assert backbone.reductions == (4, 8)
    expected = [(channels, side // stride) for channels, stride in zip(backbone.channels, (4, 8), strict=True)]
    assert [(level.shape[1], level.shape[3]) for level in maps] == expected


# Plain vision transformers: with a class token, with a register and no class token, with four registers and absolute
# positions, and with four registers and rotary positions.
TRANSFORMERS = {
    "test_vit": 48,
    "test_vit2": 48,
    "deit_tiny_distilled_patch16_224": 48,
    "vit_small_patch14_reg4_dinov2": 42,
    "vit_small_patch16_dinov3": 48,
}


def whole_transformer(name: str, side: int) -> Any:
    torch.manual_seed(0)
    network = timm.create_model(name, img_size=side, dynamic_img_size=False).eval().double()
    return perturbed(network)


def cut(name: str, side: int, layers: tuple[int, ...], combine: str = "separate") -> tuple[Backbone, Any]:
    """A backbone, and the whole network that it has the weights of."""
    backbone, whole = (
        Backbone(config(name, layers=layers, combine=combine), Size.square(side)).double(),
        whole_transformer(name, side),
    )
    assert isinstance(backbone.pyramid, PatchTokens)
    backbone.pyramid.model.load_state_dict(whole.state_dict(), strict=False)
    return backbone, whole


@torch.no_grad()
@pytest.mark.parametrize(("name", "side"), TRANSFORMERS.items())
def test_maps_are_the_tokens_of_the_whole_network(name: str, side: int) -> None:
    """After the first block and the last of it, taken out of it by hooks; what is no patch is left out."""
    depth = len(timm.create_model(name).blocks)
    backbone, whole = cut(name, side, (0, depth - 1))
    tokens: list[Tensor] = []
    for block in (whole.blocks[0], whole.blocks[-1]):
        block.register_forward_hook(lambda _module, _inputs, output: tokens.append(output))
    image = torch.rand(2, 3, side, side, dtype=torch.float64, generator=seeded(0))
    last = whole.forward_features((image - backbone.mean) / backbone.std)
    first, maps = whole.norm(tokens[0]), backbone(image)
    for features, expected in zip(maps, (first, last), strict=True):
        patches = expected[:, whole.num_prefix_tokens :]
        assert patches.shape[1] == 9
        torch.testing.assert_close(features, rearrange(patches, "b (h w) c -> b c h w", h=3))
    assert backbone.channels == (maps[0].shape[1],) * 2
    assert backbone.reductions == (side // 3,) * 2


@torch.no_grad()
def test_the_final_norm_makes_blocks_alike() -> None:
    backbone, _ = cut("test_vit", 48, (0, 5))
    assert isinstance(backbone.pyramid, PatchTokens)
    backbone.pyramid.model.norm.reset_parameters()
    for features in backbone(torch.rand(2, 3, 48, 48, dtype=torch.float64)):
        variance, mean = torch.var_mean(features, dim=1, correction=0)
        torch.testing.assert_close(mean, torch.zeros_like(mean))
        torch.testing.assert_close(variance, torch.ones_like(variance), rtol=1e-4, atol=0)


@torch.no_grad()
def test_the_mean_of_blocks_is_one_map() -> None:
    separate, _ = cut("test_vit", 48, (1, 3, 4))
    mean, _ = cut("test_vit", 48, (1, 3, 4), "mean")
    image = torch.rand(2, 3, 48, 48, dtype=torch.float64)
    first, second, third = separate(image)
    (features,) = mean(image)
    torch.testing.assert_close(features, (first + second + third) / 3)
    assert (mean.channels, mean.reductions) == ((64,), (16,))
    assert config("test_vit", layers=(1, 3, 4), combine="mean").num_maps == 1


def test_keeps_no_block_and_no_head_that_is_not_needed() -> None:
    tokens = Backbone(config("test_vit3", layers=(1, 2)), Size.square(48)).pyramid
    assert isinstance(tokens, PatchTokens)
    assert len(tokens.model.blocks) == 3
    assert not [name for name in tokens.state_dict() if "head" in name or "pool" in name or "fc_norm" in name]


def test_a_transformer_without_a_size_is_for_that_of_its_weights() -> None:
    with torch.device("meta"):
        backbone = Backbone(config("vit_small_patch14_dinov2.lvd142m", layers=[0]))
        (features,) = backbone(torch.zeros(1, 3, 518, 518))
    assert features.shape == (1, 384, 37, 37)


def test_near_misses_are_models_of_timm() -> None:
    assert timm.is_model("test_resnet")  # the tiny network these tests use
