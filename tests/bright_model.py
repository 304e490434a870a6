"""An exported file whose score can be worked out by hand: the brightest channel is its map, the maximum its score."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from anomaly_models.common.sizes import Size
from pipelines.inference.detector import ModelCard

SIDE = 16
CARD = ModelCard(
    model="brightness",
    category="part",
    image_size=Size.square(SIDE),
    resize="bilinear",
    fit="stretch",
    tiles=None,
    by_tile=False,
    scored_pixels=1,
    region=None,
    black_level=0,
    white_level=4095,
    above_white="refuse",
    page=None,
    dicom_window="file",
    max_megapixels=90,
    threshold=float(np.float32(128) / np.float32(255)),
    pixel_threshold=0.5,
    false_alarm_rate=0.05,
    reject_above=0.7,
    review_load=(0.04, 0.01, 0.1),
    groups=None,
    run_id="0123",
    data_sha256="abcd",
    weights=[],
    params={"models": {"brightness": {"image_size": SIDE}}},
)


def write_model(path: Path, metadata: dict[str, str], scale: float = 1.0) -> Path:
    """The brightest channel is the map, its maximum the score."""
    nodes = [
        helper.make_node("Mul", ["image", "scale"], ["scaled"]),
        helper.make_node("ReduceMax", ["scaled", "channel"], ["anomaly_map"], keepdims=1),
        helper.make_node("ReduceMax", ["anomaly_map", "all"], ["score"], keepdims=0),
    ]
    constants = [
        helper.make_tensor("scale", TensorProto.FLOAT, [], [scale]),
        helper.make_tensor("channel", TensorProto.INT64, [1], [1]),
        helper.make_tensor("all", TensorProto.INT64, [3], [1, 2, 3]),
    ]
    graph = helper.make_graph(
        nodes,
        "brightness",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, SIDE, SIDE])],
        [
            helper.make_tensor_value_info("anomaly_map", TensorProto.FLOAT, ["batch", 1, SIDE, SIDE]),
            helper.make_tensor_value_info("score", TensorProto.FLOAT, ["batch"]),
        ],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, metadata)
    onnx.save(model, path)
    return path
