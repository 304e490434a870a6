"""Bundles of a model whose scores can be worked out by hand, and pictures for it."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
from bright_model import CARD, SIDE, write_model
from PIL import Image

from pipelines.deployment import bundle as writing
from pipelines.inference import bundle as opened
from pipelines.inference.bundle import Sample
from pipelines.inference.detector import Detector


def png(brightness: int, side: int = SIDE, seed: int = 0) -> bytes:
    """A picture whose score, by `bright_model`, is that of its brightest channel."""
    pixels = np.random.default_rng(seed).integers(0, max(brightness, 1), (side, side, 3), dtype=np.uint8)
    pixels[side // 2, side // 2] = brightness
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def calibration() -> str:
    """Of twenty good parts, of brightness 40 to 59 of 255."""
    rows = [f"{level / 255},{level / 255},{level / 510},0.05,1.5" for level in range(40, 60)]
    return "\n".join(["threshold_score,score,brightness,contrast,sharpness", *rows, ""])


def make(path: Path, run_id: str = "0123", threshold: float = 0.5, expected: float | None = None) -> Path:
    """A bundle of a model whose scores can be worked out by hand."""
    card = replace(CARD, threshold=threshold, run_id=run_id)
    graph = write_model(path.with_suffix(".onnx"), card.to_metadata())
    detector = Detector(graph)
    content = png(200)
    maps, scores = detector(detector.fitted(detector.decode(content, Path("a.png")), "a.png"))
    score = float(scores[0]) if expected is None else expected
    sample = Sample("samples/0.png", "spot", score, detector.card.decision(float(scores[0])))
    about = {"format": opened.FORMAT, "detector": card.to_json()}
    contents = {
        opened.CARD: writing._json(about),
        opened.GRAPH: graph.read_bytes(),
        sample.file: content,
        opened.SAMPLES: writing._json([sample._asdict()]),
        opened.CALIBRATION: calibration().encode(),
        opened.MAPS: writing._arrays({"0": maps[0, 0]}),
    }
    temporary = path.with_suffix(".part")
    writing._write(temporary, contents.items())
    temporary.replace(path)
    graph.unlink()
    return path
