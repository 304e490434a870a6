"""An exported file -> what it says of itself, checked, and a detector. Needs onnxruntime and pydantic; never torch."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import onnxruntime
from pydantic import FiniteFloat, TypeAdapter

from anomaly_models.common.settings import Sides, Tiles
from pipelines.errors import ArgumentError, ExportError
from pipelines.inference.card import Card
from pipelines.inference.engine import AGAIN, Engine, open_session
from pipelines.pictures.windows import Window
from pipelines.unreadable import reading

FORMAT = "7"  # of the metadata below


@dataclass(frozen=True, slots=True)
class ModelCard(Card):
    """A card in the ONNX metadata, under `blemish.<field>`, each value as JSON: in types that are checked."""

    image_size: Sides
    tiles: Tiles | None
    dicom_window: Window
    threshold: FiniteFloat
    pixel_threshold: FiniteFloat
    reject_above: FiniteFloat | None

    def to_metadata(self) -> dict[str, str]:
        values = {f"blemish.{name}": json.dumps(value) for name, value in self.to_json().items()}
        return {"blemish.format": FORMAT, **values}


_CARD = TypeAdapter(ModelCard)
_FIELDS = tuple(ModelCard.__dataclass_fields__)


class Detector(Engine):
    """An exported model, ready to run.

    Raises:
        ExportError: the file is missing, no ONNX model, not exported by Blemish, or by a newer format.
    """

    card: ModelCard

    def __init__(self, path: Path, providers: list[str] | None = None, threads: int | None = None) -> None:
        session = open_session(path, providers, threads)
        super().__init__(path, session, _read_card(path, session))


def as_threshold(text: str) -> float:
    """What someone typed as a threshold.

    Raises:
        ArgumentError: it is no number, or not a finite one.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ArgumentError(f"threshold '{text}': not a finite number; give one such as 2.5")
    return value


def _read_card(path: Path, session: onnxruntime.InferenceSession) -> ModelCard:
    with reading(path, AGAIN):
        metadata = session.get_modelmeta().custom_metadata_map
    if "blemish.format" not in metadata:
        raise ExportError(f"{path}: an ONNX model, but not one that `blemish export` wrote; it has no threshold")
    if metadata["blemish.format"] != FORMAT:
        raise ExportError(
            f"{path}: written in format {metadata['blemish.format']}, this version reads {FORMAT}; export it again"
        )
    with reading(path, AGAIN):
        found = {name: json.loads(metadata[key]) for name in _FIELDS if (key := f"blemish.{name}") in metadata}
        if missing := [name for name in _FIELDS if name not in found and name != "precision"]:
            raise ValueError(f"no blemish.{missing[0]} in its metadata")
        return _CARD.validate_python(found)
