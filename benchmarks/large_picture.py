"""Time and memory of a picture of 12,000 x 9,000 pixels, from its file to a score, tile by tile and with one network.

Run `python benchmarks/large_picture.py`. The exported file is ADFA's of the folder preset, with the settings of a row;
what it has learnt is grain, as the picture is, since neither time nor memory depend on it. Each row is measured in a
process of its own, on one thread, without torch. Peak memory is that of the whole process; the first row opens the
file of the network and no picture, the second reads the picture and no more.
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PICTURE = {"height": 9000, "width": 12000}
MEGAPIXELS = 108
SIDES = (256, 512, 1024)
OVERLAP = 64


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        picture = folder / "picture.jpg"
        print(f"| {PICTURE['width']:,} x {PICTURE['height']:,} pixels | tiles | seconds | peak memory, MB |")
        print("| --- | ---: | ---: | ---: |")
        scored = [("scored", side) for side in SIDES]
        # A process's peak is at least that of the one it was begun by: this one makes nothing itself.
        for what, side in (("make", 0), ("nothing", 256), ("read", 256), *scored, ("drawn", 512)):
            row = [sys.executable, __file__, what, str(folder / f"{side}.onnx"), str(picture)]
            print(subprocess.run(row, check=True, capture_output=True, text=True).stdout, end="", flush=True)


def make(picture: Path) -> None:
    """The picture, and beside it a file for each size of tiles."""
    grain = np.random.default_rng(0).normal(128, 20, (1000, 1000)).clip(0, 255).astype(np.uint8)
    Image.fromarray(np.tile(grain, (9, 12))).convert("RGB").save(picture, quality=90)
    for side in SIDES:
        export(picture.parent / f"{side}.onnx", side, grain)


def export(path: Path, side: int, grain: np.ndarray) -> None:
    import torch
    import yaml

    from anomaly_models import MODELS
    from anomaly_models.base import Batch
    from pipelines.deployment.export import write_graph
    from pipelines.inference.detector import ModelCard
    from pipelines.training.weights import load_pretrained

    preset = Path(__file__).parents[1] / "presets" / "folder.yaml"
    section: dict[str, Any] = yaml.safe_load(preset.read_text(encoding="utf-8"))["models"]["adfa"]
    tiles = {"side": side, "overlap": OVERLAP}
    config = MODELS["adfa"].Config.model_validate(section | {"image_size": PICTURE, "tiles": tiles})
    model = MODELS["adfa"](config.network)
    load_pretrained(model)
    cuts = (grain[:side, :side], np.ascontiguousarray(grain[-side:, -side:]))
    pixels = torch.from_numpy(np.stack([np.resize(cut, (side, side)) for cut in cuts]))
    image = (pixels / 255).unsqueeze(1).expand(-1, 3, -1, -1).contiguous()
    label = torch.zeros(len(image), dtype=torch.bool)
    model.prepare([Batch(image, torch.zeros_like(image[:, :1]), label, row=torch.arange(len(image)))])
    card = ModelCard(
        model="adfa",
        category="grain",
        image_size=config.image_size,
        resize=config.resize,
        fit=config.fit,
        tiles=config.tiles,
        by_tile=False,
        scored_pixels=config.scored_pixels,
        region=None,
        black_level=0,
        white_level=65535,
        above_white="refuse",
        page=None,
        dicom_window="file",
        max_megapixels=MEGAPIXELS,
        threshold=1.0,
        pixel_threshold=1.0,
        false_alarm_rate=0.05,
        groups=None,
        run_id="none",
        data_sha256="none",
        weights=[],
        params={},
    )
    write_graph(model.eval(), path, 18, card)


def measure(what: str, path: Path, picture: Path) -> None:
    """Print the row of one way."""
    from pipelines.inference.detector import Detector
    from pipelines.inference.predict import predict

    started = time.perf_counter()
    number = ""
    if what == "drawn":
        predict(Detector(path), [picture], picture.parent / "results", lambda _result, _total: None)
        name = "scored, restored and drawn (`blemish predict`)"
    else:
        detector = Detector(path, threads=1)
        name = "the file opened"
        if what == "read":
            detector.load(picture)
            name = "read"
        elif what == "scored":
            detector(detector.load(picture))
            card = detector.card
            assert card.tiles is not None
            number, name = f"{card.tiles.side}", "read and scored"
    seconds, peak = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"| {name} | {number} | {seconds:.1f} | {peak:.0f} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["make"]:
        make(Path(sys.argv[3]))
    elif len(sys.argv) > 1:
        measure(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
