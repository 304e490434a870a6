"""A frozen convolutional network as it runs fastest: batch normalisations within convolutions, channels last.

At inference a batch normalisation is one factor and one shift per channel, which the convolution before it can have in
its own weights (B. Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", CVPR 2018, section 3.2). ONNX Runtime does the same to an exported file.
"""

import copy
from collections import Counter
from itertools import chain
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


class Folded:
    """What a frozen network of images computes, within rounding, by a copy of it that follows its weights.

    Not a module: the copy has no place among the weights that are saved, and a copy of a model makes its own.
    """

    def __init__(self) -> None:
        self._of: list[tuple[int, int, int]] = []  # the tensors that it copies: which, where, how often written to
        self._network: nn.Module | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Folded":
        return Folded()

    def of(self, network: nn.Module) -> nn.Module:
        """The copy; made anew when a weight of the network is another one, or has changed."""
        tensors = [
            (id(value), value.data_ptr(), value._version) for value in chain(network.parameters(), network.buffers())
        ]
        if self._network is None or tensors != self._of:
            self._network = folded(network).to(memory_format=torch.channels_last)
            self._of = tensors
        return self._network


class _Tracer(fx.Tracer):
    """Takes convolutions and normalisations for what they are, timm's own kinds of them too."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d | nn.BatchNorm2d) or super().is_leaf_module(m, module_qualified_name)


def folded(network: nn.Module) -> nn.Module:
    """A copy in which convolutions have the batch normalisation behind them, wherever nothing else uses what they give.

    The network is in eval mode. One whose way cannot be traced, since it depends on the image, is copied as it is.
    """
    result = copy.deepcopy(network)
    try:
        graph = _Tracer().trace(result)
    except (fx.proxy.TraceError, TypeError, AttributeError, RuntimeError):  # of a value that is not there yet
        return result
    modules = [node for node in graph.nodes if node.op == "call_module"]
    calls = Counter(node.target for node in modules)
    for node in modules:
        if not node.args:  # all by name
            continue
        before = node.args[0]
        if before not in modules or len(before.users) != 1 or calls[before.target] != 1 or calls[node.target] != 1:
            continue
        convolution, norm = result.get_submodule(before.target), result.get_submodule(node.target)
        if not isinstance(convolution, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d):
            continue
        if _is_known(norm) and not (_is_read(convolution) or _is_read(norm)):
            result.set_submodule(before.target, fuse_conv_bn_eval(convolution, norm))
            result.set_submodule(node.target, nn.Sequential(*norm.children()))
    return result


def _is_known(norm: nn.BatchNorm2d) -> bool:
    """Whether it normalises by the statistics that it has stored, and then does what its parts do: timm's activates."""
    from timm.layers.norm_act import BatchNormAct2d

    return type(norm) in (nn.BatchNorm2d, BatchNormAct2d) and norm.running_mean is not None


def _is_read(module: nn.Module) -> bool:
    """Whether a hook takes what it is given, or gives."""
    return bool(module._forward_hooks or module._forward_pre_hooks)
