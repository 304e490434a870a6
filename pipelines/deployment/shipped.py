"""A cell's exported and deployed files, opened; and what stands beside the int8 one."""

from pathlib import Path

from pipelines.deployment.records import Int8
from pipelines.errors import StageError
from pipelines.inference.card import Precision
from pipelines.inference.detector import Detector
from pipelines.paths import Cell


def exported(cell: Cell, precision: Precision = "float32") -> Detector:
    """Raise StageError where there is none, with the reason if the int8 file was not kept."""
    if not cell.onnx.is_file():
        raise StageError(f"{cell.title} is not exported: no {cell.onnx}; run {cell.verb('export')} first")
    if precision == "float32":
        return Detector(cell.onnx)
    if cell.int8.is_file():
        return Detector(cell.int8)
    if cell.int8_proof.is_file():
        raise StageError(f"{cell.title} has no int8 file: {int8_proof(cell).refused}")
    raise StageError(
        f"{cell.title} has no int8 file; add int8 to `export.precisions` and run {cell.verb('export')} again"
    )


def shipped(cell: Cell, precision: Precision = "float32") -> Detector:
    """The file that is in use, which is the exported one unless a person chose a threshold for the same training."""
    found, place = exported(cell, precision), deployed(cell, precision)
    chosen = Detector(place) if place.is_file() else None
    return chosen if chosen is not None and chosen.card.run_id == found.card.run_id else found


def deployed(cell: Cell, precision: Precision) -> Path:
    """Where it lies, if it does."""
    return cell.deployed if precision == "float32" else cell.deployed_int8


def int8_proof(cell: Cell) -> Int8:
    return Int8.load(cell.int8_proof, f"run {cell.verb('export')} again")
