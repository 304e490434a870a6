"""An exported file -> what it says of itself, and a detector. Needs onnxruntime and what reads images; never torch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from pydantic import TypeAdapter

from anomaly_models.common.settings import Sides
from pipelines.errors import ExportError
from pipelines.pictures import images

FORMAT = "4"  # of the metadata below


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What an exported file says of itself, in the ONNX metadata under `blemish.<field>`, each value as JSON."""

    model: str
    category: str
    image_size: Sides  # of the input, pixels
    resize: images.Filter  # how pictures come to it
    white_level: int  # 16-bit value shown as white
    max_megapixels: int  # larger pictures are refused
    threshold: float  # a score above it is a defect
    pixel_threshold: float  # likewise for the map
    false_alarm_rate: float  # of good parts, that the held-out ones promise at the threshold; not what was asked for
    groups: (
        str | None
    )  # whether groups of good parts (days, lots, cameras) score alike; None where none were told apart
    run_id: str
    data_sha256: str
    weights: list[str]  # of each pretrained network inside: what it is, its source and licence
    params: dict[str, object]

    def to_json(self) -> dict[str, Any]:
        return dict(_CARD.dump_python(self, mode="json"))

    def to_metadata(self) -> dict[str, str]:
        values = {f"blemish.{name}": json.dumps(value) for name, value in self.to_json().items()}
        return {"blemish.format": FORMAT, **values}


_CARD = TypeAdapter(ModelCard)


class Detector:
    """An exported model, ready to run.

    Raises:
        ExportError: the file is missing, no ONNX model, not exported by Blemish, or by a newer format.
    """

    def __init__(self, path: Path, providers: list[str] | None = None, threads: int | None = None) -> None:
        self._session = open_session(path, providers, threads)
        self.card = _read_card(path, self._session)

    @property
    def provider(self) -> str:
        """What runs the graph, in ONNX Runtime's words."""
        return str(self._session.get_providers()[0])

    def read(self, path: Path) -> NDArray[np.uint8]:
        """A file -> (H, W, 3), by the path that `prepare` took; raises ImageError."""
        return images.load_rgb(path, self.card.white_level, self.card.max_megapixels)

    def load(self, path: Path) -> np.ndarray:
        """A file -> (1, 3, H, W) float32 in [0, 1], by the path that `prepare` took; raises ImageError."""
        card = self.card
        pixels, _ = images.load(path, card.image_size, card.resize, card.white_level, card.max_megapixels)
        return images.to_input(pixels[None])

    def __call__(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(B, 3, H, W) in [0, 1] -> anomaly maps (B, 1, H, W) and scores (B,)."""
        anomaly_map, score = self._session.run(["anomaly_map", "score"], {"image": image})
        return anomaly_map, score


def open_session(
    path: Path, providers: list[str] | None = None, threads: int | None = None
) -> onnxruntime.InferenceSession:
    """Open any ONNX file, by default on the CPU with a thread per core.

    Raises:
        ExportError: the file is missing or onnxruntime cannot read it.
    """
    if not path.is_file():
        raise ExportError(f"{path}: no such file; give the model.onnx that `blemish export` wrote")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: the warnings are about graph clean-up
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers or ["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exceptions share no base class but Exception
        reason = " ".join(str(error).split())[:200]
        raise ExportError(f"{path}: not an ONNX model that onnxruntime can run ({reason})") from None


def _read_card(path: Path, session: onnxruntime.InferenceSession) -> ModelCard:
    metadata = session.get_modelmeta().custom_metadata_map
    if "blemish.format" not in metadata:
        raise ExportError(f"{path}: an ONNX model, but not one that `blemish export` wrote; it has no threshold")
    if metadata["blemish.format"] != FORMAT:
        raise ExportError(
            f"{path}: written in format {metadata['blemish.format']}, this version reads {FORMAT}; export it again"
        )
    fields = ModelCard.__dataclass_fields__
    return _CARD.validate_python({name: json.loads(metadata[f"blemish.{name}"]) for name in fields})
