"""A frozen timm feature pyramid: always in eval mode, with its own normalisation and its own channel counts.

Building one touches neither disk nor network: the weights are random until `pipelines.training.weights.load_pretrained`
puts the ones that `weights` names in. Random features do not detect anomalies, so nothing here falls back on them.
"""

import difflib
from itertools import pairwise
from typing import Annotated

import timm
import torch
from pydantic import Field, NonNegativeInt, field_validator, model_validator
from timm.models import FeatureInfo, get_pretrained_cfg
from timm.models.efficientnet import EfficientNetFeatures
from timm.models.mobilenetv3 import MobileNetV3Features
from torch import Tensor, nn

from anomaly_models.base import ModelError
from anomaly_models.common.settings import Settings


class BackboneConfig(Settings):
    """Which network, with which weights, read at which depths."""

    name: str  # timm model with its pinned tag, e.g. "wide_resnet50_2.tv_in1k"
    weights: Annotated[
        str, Field(min_length=1)
    ]  # "package" (of the index), "timm" (the hub), or the path of a state dict
    layers: Annotated[tuple[NonNegativeInt, ...], Field(strict=False)]  # timm's out_indices

    @field_validator("name")
    @classmethod
    def _known_to_timm(cls, name: str) -> str:
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
            tags = ", ".join(timm.list_pretrained(f"{self.name}.*"))
            raise ValueError(f"weights: timm needs a pinned tag in name, found {self.name!r}; take one of {tags}")
        return self


def _grow(numbers: tuple[int, ...]) -> bool:
    return all(before < after for before, after in pairwise(numbers))


def _did_you_mean(close: list[str]) -> str:
    return f"; did you mean {', '.join(close)}?" if close else ""


class Backbone(nn.Module):
    """Maps (B, 3, H, W) in [0, 1] to one feature map (B, C_l, H / R_l, W / R_l) per layer.

    `channels` and `reductions` give C_l and R_l. `weights` is the word of the configuration, for whoever loads them.

    Raises:
        ModelError: the network has no such layers, or is not a convolutional pyramid of growing stride.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.name, self.weights, self.layers = config.name, config.weights, config.layers
        self.pyramid = _build_pyramid(config)
        information = self.pyramid.feature_info
        assert isinstance(information, FeatureInfo)
        self.channels: tuple[int, ...] = tuple(information.channels())
        self.reductions: tuple[int, ...] = tuple(information.reduction())
        if not _grow(self.reductions):
            raise ModelError(
                f"backbone {config.name}: layers {list(config.layers)} have strides {list(self.reductions)}; "
                "a pyramid whose stride grows from layer to layer is needed, e.g. resnet18.tv_in1k"
            )
        statistics = get_pretrained_cfg(config.name)
        assert statistics is not None, "the configuration admits known models only"
        self.register_buffer("mean", torch.tensor(statistics.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(statistics.std).view(3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> "Backbone":  # noqa: ARG002
        """Stay in eval mode whatever is asked: batch statistics would change the features."""
        super().train(False)
        return self

    def forward(self, image: Tensor) -> list[Tensor]:
        maps: list[Tensor] = self.pyramid((image - self.mean) / self.std)
        return maps


def _build_pyramid(config: BackboneConfig) -> nn.Module:
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


def _drop_later_stages(pyramid: nn.Module) -> None:
    """Keep no stage beyond the last that is asked for: timm drops them itself, except in the EfficientNet family."""
    if isinstance(pyramid, EfficientNetFeatures | MobileNetV3Features):
        pyramid.blocks = pyramid.blocks[: max(pyramid.feature_info.get("stage"))]
