"""What training a cell would take, without training: parameters, FLOPs, memory, steps. Minutes: minutes.py.

Networks are built on torch's meta device: shapes without numbers, so that even the largest answers in seconds.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from anomaly_models import MODELS
from anomaly_models.base import AnomalyModel, Config
from anomaly_models.common.backbones import Backbone
from anomaly_models.common.sizes import Size
from pipelines.data.index import PreparedIndex
from pipelines.paths import Project
from pipelines.pictures.tiles import tiling
from pipelines.settings.params import Params

_ADAM_COPIES = 4  # of every trained number: itself, its gradient and Adam's two moments


@dataclass(frozen=True, slots=True)
class Estimate:
    """For one cell; sizes in bytes."""

    model: str
    category: str
    image_size: Size
    batch_size: int
    parameters: int
    trained_parameters: int
    flops_per_image: int  # one forward pass, 2 per multiply-add; of a gradient-free model the backbone's alone
    state_bytes: int  # weights, gradients and the optimiser's moments
    activation_bytes: int  # of one forward pass that keeps what gradients need, for a batch
    normals: int  # images, or their tiles
    shown: str  # which of the two
    steps: int

    def lines(self) -> list[str]:
        epochs = self.steps * self.batch_size / self.normals
        steps = f"{self.steps:,} of {self.batch_size} ({epochs:,.1f} epochs of {self.normals} normal {self.shown})"
        scope = "" if self.steps else "; the backbone alone, what it is compared with depends on the images"
        return [
            f"{self.model} on {self.category}, {self.image_size} pixels",
            f"parameters   {self.parameters:,}, of which {self.trained_parameters:,} are trained",
            f"FLOPs        {self.flops_per_image / 1e9:,.2f} G per image, forward, 2 per multiply-add{scope}",
            f"memory       {_megabytes(self.state_bytes)} for weights, gradients and optimiser; "
            f"{_megabytes(self.activation_bytes)} for a batch's activations",
            f"steps        {steps if self.steps else f'none: one pass over {self.normals} normal {self.shown}'}",
        ]


def estimate(model_name: str, category: str, params: Params, project: Project) -> Estimate:
    """Look at a cell without training it; the category must be prepared, since its size decides the steps.

    Raises:
        ParamsError: no such model or category in the params file.
        StageError: the category is not prepared.
    """
    params.check_category(category)
    whole = params.model_config_of(model_name)
    config, cut_up = whole.network, tiling(whole.image_size, whole.tiles)
    normals = len(PreparedIndex.load(project.prepared(category)).rows("train")) * (1 if cut_up is None else len(cut_up))
    with torch.device("meta"):
        model = MODELS[params.method_of(model_name)](config)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    weights = _bytes([*model.parameters(), *model.buffers()])
    trained_bytes = _bytes([parameter for parameter in model.parameters() if parameter.requires_grad])
    steps = model.total_steps(normals)
    flops, activations = _forward(*_measurable(model, config, steps))
    return Estimate(
        model=model_name,
        category=category,
        image_size=config.image_size,
        batch_size=config.batch_size,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        trained_parameters=trained,
        flops_per_image=flops,
        state_bytes=weights + (_ADAM_COPIES - 1) * trained_bytes * (steps > 0),
        activation_bytes=activations * config.batch_size,
        normals=normals,
        shown="images" if cut_up is None else "tiles",
        steps=steps,
    )


def _measurable(model: AnomalyModel, config: Config, steps: int) -> tuple[nn.Module, Size]:
    """A network and the size of its images, pixels.

    A gradient-free model has nothing to compare an image with before it has seen any: take its backbone, which sees
    the centre of the image alone.
    """
    backbone = next((part for part in model.modules() if isinstance(part, Backbone)), None)
    if steps or backbone is None:
        return model, config.image_size
    return backbone, config.seen


def _forward(model: nn.Module, image_size: Size) -> tuple[int, int]:
    """FLOPs of one image, and the bytes that its gradients would need."""
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            saved[id(tensor)] = tensor
        return tensor

    image = torch.zeros(1, 3, *image_size, device="meta")
    counter = FlopCounterMode(display=False)
    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(image)
    return counter.get_total_flops(), _bytes(saved.values())


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _megabytes(number: int) -> str:
    return f"{number / 1e6:,.0f} MB"
