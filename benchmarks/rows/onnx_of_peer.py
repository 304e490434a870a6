"""A peer's network as an ONNX file, run on one thread."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def session(model: Any, picture: Any, graph: Path) -> Callable[[np.ndarray], list[np.ndarray]]:
    """What takes a picture (1, 3, H, W) and gives the map and the score."""
    import onnxruntime
    import torch

    class Outputs(torch.nn.Module):
        """With outputs that a graph can have."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            found = self.model(pixels)
            return found.anomaly_map, found.pred_score

    torch.onnx.export(Outputs().eval(), (picture,), graph, dynamo=True, external_data=False, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    found = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    (name,) = [taken.name for taken in found.get_inputs()]
    return lambda pixels: found.run(None, {name: pixels})
