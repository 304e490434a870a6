"""A frozen timm network: always in eval mode, with its own normalisation and its own channel counts.

It is a convolutional pyramid, whose stride grows from layer to layer, or a plain vision transformer, whose blocks all
see the same patches (A. Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021; DeiT; DINOv2; DINOv3). There,
the maps are the tokens of the patches after the network's final norm, as in DINOv2's own `get_intermediate_layers`:
without it they grow with the depth of the block, and a few channels outweigh the rest, in distances and in means alike.
(A network made to average its tokens has its norm behind that: its maps are as the block leaves them.) Hierarchical
transformers with maps like a pyramid's are used as one; those are refused whose maps are channels-last, as Swin's are,
and those that timm has for one size of image only, at any other.

Building one touches neither disk nor network: the weights are random until `pipelines.training.weights.load_pretrained`
puts the ones that `weights` names in. Random features do not detect anomalies, so nothing here falls back on them.
"""

import difflib
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field, NonNegativeInt, field_validator, model_validator
from torch import Tensor, nn

from anomaly_models.base import ModelError
from anomaly_models.common.folding import Folded
from anomaly_models.common.settings import Settings
from anomaly_models.common.sizes import Size

if TYPE_CHECKING:
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

# timm takes seconds to import, so it is where networks are built, and where a name is not one of these, which it has.
OF_PACKAGES = frozenset({"tf_efficientnet_lite0", "tf_efficientnet_lite1", "tf_efficientnet_lite2"})

# Of the pictures that a thread is given at once: what a layer makes of more does not stay in a processor's cache, and
# lies in memory that the system hands out anew each time. 8 pictures of 256 pixels take 0.6 times as long one by one.
_PIXELS = 2**16

_PLAIN_TRANSFORMERS = ("vision_transformer", "deit", "eva")  # timm's modules of them; DINOv3 is among the last


class BackboneConfig(Settings):
    """Which network, with which weights, read at which depths."""

    name: str  # timm model with its pinned tag, e.g. "wide_resnet50_2.tv_in1k"
    weights: Annotated[str, Field(min_length=1)]  # "package" (of the index), "timm" (the hub), or the path of a file
    layers: Annotated[tuple[NonNegativeInt, ...], Field(strict=False)]  # timm's out_indices; of a transformer, blocks
    combine: Literal["separate", "mean"]  # a map for each layer, or their mean: of a transformer's, which are alike

    @field_validator("name")
    @classmethod
    def _known_to_timm(cls, name: str) -> str:
        if name in OF_PACKAGES:
            return name
        import timm

        architecture, _, tag = name.partition(".")
        if not timm.is_model(architecture):
            close = difflib.get_close_matches(architecture, timm.list_models(), n=3)
            raise ValueError(f"timm has no model {architecture!r}{_did_you_mean(close)}")
        tags = timm.list_pretrained(f"{architecture}.*")
        if tag and name not in tags:
            raise ValueError(f"timm has no weights {name!r}; it has {', '.join(tags) or 'none of this model'}")
        return name

    @field_validator("layers")
    @classmethod
    def _increasing(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if not layers or not _grow(layers):
            raise ValueError(f"must be one or more indices in increasing order, found {list(layers)}")
        return layers

    @model_validator(mode="after")
    def _tag_is_pinned(self) -> "BackboneConfig":
        if self.weights == "timm" and "." not in self.name:
            import timm

            tags = ", ".join(timm.list_pretrained(f"{self.name}.*"))
            raise ValueError(f"weights: timm needs a pinned tag in name, found {self.name!r}; take one of {tags}")
        return self

    @model_validator(mode="after")
    def _alike_where_averaged(self) -> "BackboneConfig":
        if self.combine == "mean" and not is_plain_transformer(self.name):
            raise ValueError(
                f"combine: mean is for the blocks of a plain vision transformer, and the layers of {self.name} differ "
                "in stride and channels; set combine: separate"
            )
        return self

    @property
    def num_maps(self) -> int:
        return 1 if self.combine == "mean" else len(self.layers)


def _grow(numbers: tuple[int, ...]) -> bool:
    return all(before < after for before, after in pairwise(numbers))


def _did_you_mean(close: list[str]) -> str:
    return f"; did you mean {', '.join(close)}?" if close else ""


class Backbone(nn.Module):
    """Maps (B, 3, H, W) in [0, 1] to one feature map (B, C_l, H / R_l, W / R_l) per layer, or to their mean alone.

    `channels` and `reductions` give C_l and R_l. `weights` is the word of the configuration, for whoever loads them.
    A convolutional network takes images of any size, a transformer those of `image_size` only, a multiple of its patch
    that its positions are made for; None is the size that it was trained at.

    Maps that `may_round` otherwise than timm's (some 1e-6 of them) take about half the time. That is for what takes no
    step: steps make of a rounding another network, the figures of which differ as those of another seed.

    Raises:
        ModelError: the network has no such layers, is neither a pyramid of growing stride nor a plain vision
            transformer, or is made for another size of image.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: BackboneConfig, image_size: Size | None = None, *, may_round: bool = False) -> None:
        from timm.models import get_pretrained_cfg

        super().__init__()
        self.name, self.weights, self.layers = config.name, config.weights, config.layers
        self.averages = config.combine == "mean"
        transformer = is_plain_transformer(config.name)
        self.pyramid = (_build_tokens if transformer else _build_pyramid)(config, image_size)
        channels, reductions = _channels_and_strides(config, self.pyramid)
        self.channels, self.reductions = channels[: config.num_maps], reductions[: config.num_maps]
        statistics = get_pretrained_cfg(config.name)
        assert statistics is not None, "the configuration admits known models only"
        self.register_buffer("mean", torch.tensor(statistics.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(statistics.std).view(3, 1, 1), persistent=False)
        # A transformer has no batch normalisation.
        self._folded = Folded() if may_round and not transformer else None
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> "Backbone":  # noqa: ARG002
        """Stay in eval mode whatever is asked: batch statistics would change the features."""
        super().train(False)
        return self

    def forward(self, image: Tensor) -> list[Tensor]:
        maps = self._maps((image - self.mean) / self.std)
        return [torch.stack(maps).mean(dim=0)] if self.averages else maps

    def _maps(self, normalised: Tensor) -> list[Tensor]:
        """Who compiles or exports a network folds it by itself."""
        if self._folded is None or torch.compiler.is_compiling():
            maps: list[Tensor] = self.pyramid(normalised)
            return maps
        network = self._folded.of(self.pyramid)
        at_once = len(normalised)
        if normalised.device.type == "cpu":
            height, width = normalised.shape[2:]
            at_once = max(1, _PIXELS * torch.get_num_threads() // (height * width))
        parts = [network(images) for images in torch.split(normalised, at_once)]
        return [torch.cat(found).contiguous() for found in zip(*parts, strict=True)]


class PatchTokens(nn.Module):
    """A plain vision transformer up to the last of some blocks, and the maps of its patches after each of these.

    The class token and the registers take part in the network and not in the maps.
    """

    def __init__(self, network: "VisionTransformer | Eva", blocks: tuple[int, ...]) -> None:
        """Cuts the network. Raises AssertionError if it has no such blocks."""
        super().__init__()
        self.blocks = network.prune_intermediate_layers(list(blocks))
        self.model = network

    @property
    def stride(self) -> int:
        return max(self.model.patch_embed.patch_size)

    def forward(self, image: Tensor) -> list[Tensor]:
        """(B, 3, H, W), normalised, to one (B, C, H / stride, W / stride) per block."""
        maps = self.model.forward_intermediates(image, indices=self.blocks, norm=True, intermediates_only=True)
        assert isinstance(maps, list)
        return maps


def is_plain_transformer(name: str) -> bool:
    """Whether a timm model is a vision transformer whose blocks all see the same patches."""
    from timm.models import is_model_in_modules

    return is_model_in_modules(name.partition(".")[0], _PLAIN_TRANSFORMERS)


def _build_tokens(config: BackboneConfig, image_size: Size | None) -> PatchTokens:
    import timm
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    # With `dynamic_img_size`, positions would be resampled for every image, and in the exported file.
    network = timm.create_model(config.name, pretrained=False, img_size=image_size, dynamic_img_size=False)
    assert isinstance(network, VisionTransformer | Eva)
    depth = len(network.blocks)
    if config.layers[-1] >= depth:
        raise ModelError(f"backbone {config.name}: it has blocks 0 to {depth - 1}, found layers {list(config.layers)}")
    return PatchTokens(network, config.layers)


def _channels_and_strides(config: BackboneConfig, pyramid: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Per layer; ModelError if those of a convolutional network do not grow."""
    from timm.models import FeatureInfo

    if isinstance(pyramid, PatchTokens):
        return (pyramid.model.embed_dim,) * len(config.layers), (pyramid.stride,) * len(config.layers)
    information = pyramid.feature_info
    assert isinstance(information, FeatureInfo)
    strides = tuple(information.reduction())
    if not _grow(strides):
        raise ModelError(
            f"backbone {config.name}: layers {list(config.layers)} have strides {list(strides)}; a pyramid whose "
            "stride grows from layer to layer is needed, e.g. resnet18.tv_in1k, or a plain vision transformer, e.g. "
            "vit_small_patch14_dinov2.lvd142m"
        )
    return tuple(information.channels()), strides


def _build_pyramid(config: BackboneConfig, image_size: Size | None) -> nn.Module:
    import timm

    _require_its_size(config.name, image_size)
    try:
        pyramid = timm.create_model(config.name, pretrained=False, features_only=True, out_indices=config.layers)
    except (IndexError, AssertionError, RuntimeError, AttributeError) as error:  # timm's ways to refuse, one per family
        raise ModelError(
            f"backbone {config.name}: timm gives no features for layers {list(config.layers)} ({error}); "
            "convolutional networks have layers 0 to 4, of strides 2 to 32"
        ) from error
    if str(getattr(pyramid, "output_fmt", "NCHW")).endswith("NHWC"):
        raise ModelError(f"backbone {config.name}: its maps are channels-last; take a convolutional network")
    _drop_later_stages(pyramid)
    return pyramid


def map_sizes(backbone: Backbone, image_size: Size, setting: str) -> tuple[Size, ...]:
    """Sizes of a backbone's maps of images of `image_size`; `setting` names what sets it.

    Raises:
        ModelError: a side is not a multiple of the stride of the deepest layer.
    """
    deepest = backbone.reductions[-1]
    for side in image_size:
        if side % deepest:
            below = side // deepest * deepest
            raise ModelError(
                f"{setting} must be a multiple of {deepest}, the stride of the deepest layer of {backbone.name}, found "
                f"{side}; the nearest are {below} and {below + deepest}"
            )
    return tuple(image_size.divided(reduction) for reduction in backbone.reductions)


def _require_its_size(name: str, image_size: Size | None) -> None:
    from timm.models import get_pretrained_cfg

    pretrained = get_pretrained_cfg(name)
    if pretrained is None or not pretrained.fixed_input_size or image_size in (None, pretrained.input_size[1:]):
        return
    raise ModelError(
        f"backbone {name}: it takes images of {pretrained.input_size[-1]} pixels only, found {image_size}; take that "
        "size, or a convolutional network or plain vision transformer"
    )


def _drop_later_stages(pyramid: nn.Module) -> None:
    """Keep no stage beyond the last that is asked for: timm drops them itself, except in the EfficientNet family."""
    from timm.models.efficientnet import EfficientNetFeatures
    from timm.models.mobilenetv3 import MobileNetV3Features

    if isinstance(pyramid, EfficientNetFeatures | MobileNetV3Features):
        pyramid.blocks = pyramid.blocks[: max(pyramid.feature_info.get("stage"))]
