"""Pretrained weights are an input of training: from a package, from a file, or from the hub; never random.

Building a model leaves its backbones random. `load_pretrained` fills every one of them or raises, so that a network
that has learnt nothing cannot stand in for one that has.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import requests
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from anomaly_models.base import AnomalyModel, ModelError
from anomaly_models.common.backbones import Backbone, BackboneConfig, PatchTokens
from anomaly_models.common.sizes import Size
from pipelines.errors import WeightsError
from pipelines.memory import out_of_memory
from pipelines.training.packaged import packaged, state_file, timm_names

if TYPE_CHECKING:
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

_REMEDY = "give a local file (weights: PATH), or take tf_efficientnet_lite0 with weights: package"
_HUB_PATIENCE = (4, 10)  # seconds to connect and to answer; the hub's own client keeps trying for the better part of 60
_SHOWN = 3  # problems listed in a message


def load_pretrained(model: nn.Module) -> None:
    """Fill every `Backbone` inside `model` with the weights that it names.

    Raises:
        WeightsError: they are missing, unreachable, unreadable, or made for another architecture.
    """
    for module in model.modules():
        if isinstance(module, Backbone):
            _load(module)


def pretrained_backbone(config: BackboneConfig, image_size: Size | None = None) -> Backbone:
    """The backbone of a configuration with its weights, outside of any model; a transformer's is for one size of image.

    Raises:
        WeightsError: as `load_pretrained`, or the network has no such layers.
    """
    try:
        backbone = Backbone(config, image_size)
    except ModelError as error:
        raise WeightsError(str(error)) from error
    _load(backbone)
    return backbone


def terms_of(model: nn.Module) -> list[str]:
    """Of each `Backbone` inside `model`: what it is, where its weights are from, and their licence where known."""
    return [_terms(module) for module in model.modules() if isinstance(module, Backbone)]


def _terms(backbone: Backbone) -> str:
    from timm.models import get_pretrained_cfg  # here, since timm takes seconds, and two methods have no backbone

    match backbone.weights:
        case "package":
            return f"{backbone.name}: {packaged(backbone.name).terms}"
        case "timm":
            pretrained = get_pretrained_cfg(backbone.name)
            licence = pretrained.license if pretrained is not None else None
            return f"{backbone.name}: weights of the hub, {licence or 'licence unknown'}"
        case path:
            return f"{backbone.name}: weights of the file {path}"


def load_teacher_into(model: AnomalyModel, path: Path, remedy: str) -> None:
    """Put in the teacher of the file: one that `distill` made, or a published one.

    Raises:
        WeightsError: there is no such file, or it is no state dict (the message then ends in `remedy`), or it holds
            another network.
    """
    if not path.is_file():
        raise WeightsError(f"teacher {path}: no such file; {remedy}")
    try:
        model.load_teacher(named_convolutions(read_state_dict(path)))
    except ModelError as error:
        raise WeightsError(f"teacher {path}: {error}") from error
    except WeightsError as error:
        raise WeightsError(f"teacher: {error}; {remedy}") from error


def named_convolutions(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """conv1.weight, conv1.bias, ..., also for a teacher saved as a plain sequence: 0.weight, 0.bias, 3.weight, ..."""
    names = {key: re.fullmatch(r"(\d+)\.(weight|bias)", key) for key in state}
    matches = [match for match in names.values() if match]
    if len(matches) < len(names):
        return dict(state)
    order = sorted({int(match[1]) for match in matches})
    return {f"conv{order.index(int(match[1])) + 1}.{match[2]}": state[match[0]] for match in matches}


def _load(backbone: Backbone) -> None:
    match backbone.weights:
        case "package":
            source = packaged(backbone.name)
            _fit(backbone, timm_names(read_state_dict(state_file(source)), source), source.package)
        case "timm":
            _fit(backbone, _read_from_hub(backbone), f"{backbone.name} of the hub")
        case path:
            _fit(backbone, read_state_dict(Path(path)), path)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read names and tensors from a safetensors file, or from any other by torch, without running code from it.

    Raises:
        WeightsError: there is no such file, or it holds something else.
    """
    if not path.is_file():
        raise WeightsError(
            f"weights {path}: no such file; give a state dict (.safetensors, .pth), or say package or timm"
        )
    try:
        content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # bytes that are no checkpoint make torch's unpickler fail in any way there is
        if out_of_memory(error):
            raise
        raise WeightsError(f"weights {path}: not a readable state dict ({_reason(error)})") from error
    if not _is_state_dict(content):
        found = f"a mapping of {list(content)[:_SHOWN]}" if isinstance(content, Mapping) else type(content).__name__
        raise WeightsError(f"weights {path}: not a state dict (names and tensors), found {found}")
    return dict(content)


def _reason(error: Exception) -> str:
    first_sentence = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
    return f"{type(error).__name__}: {first_sentence}"


def _is_state_dict(content: object) -> bool:
    return (
        isinstance(content, Mapping)
        and len(content) > 0
        and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items())
    )


def _read_from_hub(backbone: Backbone) -> dict[str, Tensor]:
    import timm

    path = _hub_file(backbone.name)
    try:
        if isinstance(backbone.pyramid, PatchTokens):
            return load_file(path)  # as it is: timm would bring its positions to the grid that they were trained at
        pretrained = timm.create_model(
            backbone.name,
            pretrained=True,
            pretrained_cfg_overlay={"file": str(path)},
            features_only=True,
            out_indices=backbone.layers,
        )
    except (RuntimeError, SafetensorError, OSError, KeyError) as error:
        raise WeightsError(f"weights of {backbone.name}: {path} does not load ({_reason(error)}); delete it") from error
    return pretrained.state_dict()


def _hub_file(name: str) -> Path:
    """The weights of a timm model in the hub's local cache, downloaded if they are not there."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    from timm.models import get_pretrained_cfg

    pretrained = get_pretrained_cfg(name)
    repository = pretrained.hf_hub_id if pretrained is not None else None
    if repository is None:
        raise WeightsError(f"weights of {name}: timm knows no place on the hub for them; {_REMEDY}")
    try:
        return Path(hf_hub_download(repository, constants.SAFETENSORS_SINGLE_FILE, local_files_only=True))
    except LocalEntryNotFoundError:
        _require_hub(f"{constants.ENDPOINT}/{repository}/resolve/main/{constants.SAFETENSORS_SINGLE_FILE}", name)
    try:
        return Path(hf_hub_download(repository, constants.SAFETENSORS_SINGLE_FILE))
    except Exception as error:  # the client raises its own errors and those of whichever HTTP library it uses
        raise WeightsError(f"weights of {name}: the download failed ({_reason(error)}); {_REMEDY}") from error


def _require_hub(url: str, name: str) -> None:
    """Ask for the file once, because the hub's client takes most of a minute to give up."""
    try:
        status = requests.head(url, timeout=_HUB_PATIENCE).status_code
    except requests.RequestException as error:
        raise WeightsError(f"weights of {name}: the hub is unreachable ({url}); {_REMEDY}") from error
    if status >= requests.codes.bad_request:
        raise WeightsError(f"weights of {name}: the hub answers {status} for {url}; {_REMEDY}")


def _fit(backbone: Backbone, state: Mapping[str, Tensor], source: str) -> None:
    """Copy what the backbone needs out of `state`, which may hold more: deeper stages, a classifier."""
    wanted = backbone.pyramid.state_dict()
    if isinstance(backbone.pyramid, PatchTokens):
        state = _as_timm_has_it(backbone, backbone.pyramid.model, state, source)
    found = {_flat(key): value for key, value in state.items()}
    problems = []
    for key, own in wanted.items():
        value = found.get(_flat(key))
        if value is None and key.endswith("num_batches_tracked"):
            continue  # old checkpoints lack this counter, and eval mode does not read it
        if value is None:
            problems.append(f"{key}: expected {tuple(own.shape)}, found none")
        elif value.shape != own.shape:
            problems.append(f"{key}: expected {tuple(own.shape)}, found {tuple(value.shape)}")
        else:
            wanted[key] = value.to(own.dtype)
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise WeightsError(f"{source} do not fit {backbone.name}: {'; '.join(problems[:_SHOWN])}{more}")
    backbone.pyramid.load_state_dict(wanted)


def _as_timm_has_it(
    backbone: Backbone, network: "VisionTransformer | Eva", state: Mapping[str, Tensor], source: str
) -> Mapping[str, Tensor]:
    """Names as in timm for a transformer in its authors' spelling, and its positions resampled to the network's grid.

    The resampling is timm's, bicubic and antialiased. DINOv2's own differs: it is not antialiased for the networks
    without registers, whose grid it enlarges by a tenth of a patch.
    """
    from timm.models import eva, vision_transformer

    try:
        if isinstance(network, vision_transformer.VisionTransformer):
            return vision_transformer.checkpoint_filter_fn(dict(state), network)
        return eva.checkpoint_filter_fn(dict(state), network)
    except (RuntimeError, KeyError, ValueError, IndexError) as error:  # a spelling that it takes for another one
        raise WeightsError(f"{source} do not fit {backbone.name}: {_reason(error)}") from error


def _flat(key: str) -> str:
    """One spelling for `stages.0.x`, which timm's feature pyramids call `stages_0.x` or `model.stages.0.x`."""
    return key.removeprefix("model.").replace(".", "_")
