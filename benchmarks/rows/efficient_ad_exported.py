"""EfficientAD-S at 256 pixels, batch 1: a picture in memory to its map and score."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rows import Contender, Loaded, Row
from benchmarks.rows.onnx_of_peer import session
from benchmarks.rows.project import SIZE, exported_fapm, fapm_project, test_pictures


def make(folder: Path) -> None:
    """Random weights, which take as long, calibrated on photographs; in a file for both rows."""
    import torch

    from benchmarks.bf16_curves import as_tensor, published_settings, training, without_defects
    from pipelines.deployment.export import write_graph
    from pipelines.inference.detector import Detector

    if exported(folder).exists():
        return
    detector = Detector(exported_fapm(folder))
    pictures = as_tensor([detector.load(path).pixels[0] for path in test_pictures(fapm_project(folder))])
    batches = [without_defects(picture, picture) for picture in pictures.split(1)]
    torch.manual_seed(0)
    model, _ = training(published_settings("small", "float32"), batches)
    model.eval()
    model.calibrate(batches)
    exported(folder).parent.mkdir(exist_ok=True)
    half = exported(folder).with_suffix(".half")
    write_graph(model, half, opset=18, card=replace(detector.card, model="efficient_ad"))
    half.rename(exported(folder))


def exported(folder: Path) -> Path:
    return folder.parent / "efficient_ad" / "model.onnx"


def ours(folder: Path) -> Loaded:
    from pipelines.inference.detector import Detector

    detector = Detector(exported(folder), threads=1)
    inputs = detector.load(test_pictures(fapm_project(folder))[0])
    return Loaded({"sides": inputs.pixels.shape[1:3]}, lambda: detector(inputs))


def in_int8(folder: Path) -> Loaded:
    """Whether it decides alike is the gate's business, on a category that a model has learnt."""
    from pipelines.deployment.int8 import write_int8
    from pipelines.inference.detector import Detector
    from pipelines.pictures.images import to_input

    float32, path = exported(folder), folder / "model.int8.onnx"
    detector = Detector(float32)
    pictures = [detector.load(picture) for picture in test_pictures(fapm_project(folder))]
    feeds = ({"image": to_input(picture.pixels)} for picture in pictures)
    write_int8(float32, path, feeds, replace(detector.card, precision="int8"))
    detector = Detector(path, threads=1)
    return Loaded({"sides": pictures[0].pixels.shape[1:3]}, lambda: detector(pictures[0]))


def model_and_picture() -> tuple[Any, Any]:
    """Random weights, which take as long."""
    import torch
    from anomalib.models.image.efficient_ad.torch_model import EfficientAdModel, EfficientAdModelSize

    torch.manual_seed(0)
    model = EfficientAdModel(teacher_out_channels=384, model_size=EfficientAdModelSize.S, padding=False).eval()
    model.mean_std.update({"mean": torch.zeros(1, 384, 1, 1), "std": torch.ones(1, 384, 1, 1)})
    ends = {"qa_st": 0.1, "qb_st": 1.0, "qa_ae": 0.1, "qb_ae": 1.0}
    model.quantiles.update({name: torch.tensor(value) for name, value in ends.items()})
    return model, torch.rand(1, 3, SIZE, SIZE)


def in_torch(_folder: Path) -> Loaded:
    import torch

    model, picture = model_and_picture()

    def act() -> Any:
        with torch.no_grad():
            return model(picture)

    return Loaded({"sides": act().anomaly_map.shape[2:]}, act)


def in_onnx(folder: Path) -> Loaded:
    model, picture = model_and_picture()
    run, pixels = session(model, picture, folder / "efficient_ad.onnx"), picture.numpy()
    return Loaded({"sides": np.shape(run(pixels)[0])[2:]}, lambda: run(pixels))


PEERS = {"anomalib in torch": Contender(in_torch, is_peer=True), "its ONNX": Contender(in_onnx, is_peer=True)}
EQUAL = f"published widths, teacher, student and autoencoder, maps of {SIZE} pixels, one thread"
TARGET = {"anomalib in torch": 3, "its ONNX": 1.3}

ROW = Row(
    title="EfficientAD-S exported, batch 1",
    brief="EfficientAD-S exported",
    contenders={"exported": Contender(ours), **PEERS},
    equal=EQUAL,
    target=TARGET,
    make=make,
    tolerance={"sides": 0},
    missed="Both graphs are the same 38 thousand million multiplications, which the runtime does at the core's peak "
    "(1e11 operations a second with AVX2, 2.3e11 with AVX-512): in float32 nothing is left to gain but by fewer of "
    "them, or smaller ones.",
)

INT8 = Row(
    title="the same with `export.precisions: [float32, int8]`",
    brief="the same in int8",
    contenders={"exported in int8": Contender(in_int8), "our float32": Contender(ours), **PEERS},
    equal=f"{EQUAL}; theirs in float32; random weights, so that no gate has judged it",
    target=TARGET,
    make=make,
    tolerance={"sides": 0},
    missed="A processor without VNNI, the instruction for such products, gains less: with it, int8 was 2.8 times as "
    "fast as our float32, and 4.3 and 2.8 times as fast as anomalib's models.",
)
