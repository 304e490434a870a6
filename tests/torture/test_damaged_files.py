"""Every parser on files that are damaged, or say something else: a refusal comes of it, or a value; no other error.

Each input is a pure function of its number, so that what a failure names can be made again.
"""

import gzip
import hashlib
import io
import json
import shutil
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import numpy as np
import onnx
import pytest
import torch
import yaml
from changed_params import put
from conftest import CATEGORY, tiny_params
from drawn_dicoms import described, saved
from mutations import HOSTILE, damaged, json_said_otherwise, said_otherwise
from PIL import Image
from projects import Made
from rich.console import Console
from safetensors.torch import save_file
from verbs import run

from pipelines.data.index import PreparedIndex
from pipelines.deployment.records import Int8, Latency, Parity
from pipelines.errors import BlemishError
from pipelines.evaluation.outcomes import Evaluation, PixelCounts, read_predictions
from pipelines.inference.detector import Detector
from pipelines.paths import Project
from pipelines.pictures.images import load_mask, load_rgb
from pipelines.pictures.panels import KeptMaps
from pipelines.pictures.reading import Reading
from pipelines.preview.check import load_checked
from pipelines.records import read_array
from pipelines.report.summary import Summary
from pipelines.sources.catalogue import SOURCES
from pipelines.sources.download import ArchiveConfig, acquire
from pipelines.training.checkpoint import Checkpoint
from pipelines.training.trained import RunRecord, load_trained
from pipelines.training.weights import read_state_dict

CPU = torch.device("cpu")
SLOWEST = 20.0  # seconds for one input
READING = Reading(0, 65535, "refuse", page=None, dicom_window="file", max_megapixels=90)


@dataclass(frozen=True)
class Target:
    """A file, how it is changed, and who reads it."""

    path: Path
    change: Callable[[bytes, Random], bytes]
    read: Callable[[Path], object]


def unexpected(target: Target, numbers: Iterable[int]) -> list[str]:
    """What is raised that is no refusal, by its cause; the file is afterwards what it was."""
    content, causes = target.path.read_bytes(), {}
    for number in numbers:
        target.path.write_bytes(target.change(content, Random(number)))
        began = time.monotonic()
        try:
            target.read(target.path)
        except BlemishError as error:
            if "Traceback" in str(error):
                causes.setdefault("a traceback within a message", number)
        except Exception as error:  # the very thing that is looked for
            causes.setdefault(f"{type(error).__name__}: {str(error)[:200]}", number)
        if time.monotonic() - began > SLOWEST:
            causes.setdefault(f"slower than {SLOWEST} s", number)
    target.path.write_bytes(content)
    return [f"{cause} (input {number})" for cause, number in causes.items()]


INPUTS = {  # of the whole set, 1/SHARE of which CI tries
    **dict.fromkeys(("png", "jpeg", "bmp", "tiff", "webp", "dicom", "mask"), 5000),
    **dict.fromkeys(("params bytes", "params"), 6000),
    **dict.fromkeys(("index bytes", "index"), 4000),
    **dict.fromkeys(("evaluation bytes", "evaluation", "summary bytes", "summary", "predictions"), 3000),
    **dict.fromkeys(("run bytes", "run", "parity bytes", "parity", "latency bytes", "latency", "pixels", "maps"), 2000),
    **dict.fromkeys(("array", "weights", "checkpoint", "tar", "zip", "graph", "card"), 3000),
    "trained": 1000,
}
SHARE = 50


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    root = tmp_path_factory.mktemp("fapm")
    Made(root, "fapm")
    values = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
    put(values, {"export.precisions": ["float32", "int8"]})
    (root / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    assert run(root, "export", "fapm", CATEGORY).code == 0
    project, loose = Project(root), tmp_path_factory.mktemp("loose")
    cell = project.cell("fapm", CATEGORY, 0)
    return {
        **pictures(loose),
        **archives(loose),
        **params(root),
        **records(project),
        "predictions": Target(cell.predictions, damaged, lambda path: read_predictions(path.parent)),
        "pixels": Target(cell.pixels, damaged, lambda path: PixelCounts.load(path, "evaluate again")),
        "maps": Target(cell.evaluated / "maps.npz", damaged, lambda path: KeptMaps.load(path.parent)),
        "array": array(loose),
        "weights": weights(loose),
        "trained": Target(cell.weights, damaged, lambda _: load_trained(cell, CPU)),
        "checkpoint": checkpoint(loose),
        "graph": graph(loose / "graph.onnx", cell.onnx, damaged),
        "card": graph(loose / "card.onnx", cell.onnx, other_card),
    }


def pictures(folder: Path) -> dict[str, Target]:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    found = {}
    for name, suffix, options in (
        ("png", ".png", {}),
        ("jpeg", ".jpg", {}),
        ("bmp", ".bmp", {}),
        ("tiff", ".tif", {"compression": "tiff_adobe_deflate"}),
        ("webp", ".webp", {"lossless": True}),
    ):
        path = folder / f"picture{suffix}"
        Image.fromarray(pixels).save(path, **options)
        found[name] = Target(path, damaged, lambda path: load_rgb(path, READING))
    (folder / "picture.dcm").write_bytes(saved(described(pixels)))
    found["dicom"] = Target(folder / "picture.dcm", damaged, lambda path: load_rgb(path, READING))
    Image.fromarray(pixels[..., 0] > 127).save(folder / "mask.png")
    found["mask"] = Target(folder / "mask.png", damaged, load_mask)
    return found


def archives(folder: Path) -> dict[str, Target]:
    photo = ("dtd/images/banded/banded_0001.jpg", bytes(range(256)) * 4)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as file:
        for name, content in (photo, ("dtd/labels/a.txt", b"labels")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("dtd/images/link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "banded/banded_0001.jpg"
        file.addfile(link)
    (folder / "dtd.tar.gz").write_bytes(packed.getvalue())
    with zipfile.ZipFile(folder / "teachers.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for size in ("small", "medium"):
            file.writestr(f"efficientad_pretrained_weights/pretrained_teacher_{size}.pth", bytes(range(256)))

    def reader(name: str) -> Callable[[Path], None]:
        def read(path: Path) -> None:
            """As if these bytes were the published ones."""
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(SOURCES, name, replace(SOURCES[name], sha256=digest))
                acquire(name, ArchiveConfig(archive=str(path)), folder / "data", Console(file=io.StringIO()))
            shutil.rmtree(folder / "data")

        return read

    def packed_otherwise(content: bytes, random: Random) -> bytes:
        """Half of them within the compression, which else would notice."""
        if random.random() < 0.5:
            return damaged(content, random)
        return gzip.compress(damaged(gzip.decompress(content), random), 1)

    return {
        "tar": Target(folder / "dtd.tar.gz", packed_otherwise, reader("dtd")),
        "zip": Target(folder / "teachers.zip", damaged, reader("efficientad_teachers")),
    }


def params(root: Path) -> dict[str, Target]:
    def otherwise(_: bytes, random: Random) -> bytes:
        return json.dumps(said_otherwise(tiny_params(), random)).encode("utf-8", "surrogatepass")

    return {
        "params bytes": Target(root / "params.yaml", damaged, load_checked),
        "params": Target(root / "params.yaml", otherwise, load_checked),
    }


def records(project: Project) -> dict[str, Target]:
    cell = project.cell("fapm", CATEGORY, 0)
    readers: dict[str, tuple[Path, Callable[[Path], object]]] = {
        "index": (project.prepared(CATEGORY) / "index.json", lambda path: PreparedIndex.load(path.parent)),
        "run": (cell.run_record, lambda path: RunRecord.load(path, "train again")),
        "evaluation": (cell.evaluation, lambda path: Evaluation.load(path, "evaluate again")),
        "parity": (cell.parity, lambda path: Parity.load(path, "export again")),
        "int8": (cell.int8_proof, lambda path: Int8.load(path, "export again")),
        "latency": (cell.latency, lambda path: Latency.load(path, "measure again")),
        "summary": (project.summary("tests"), lambda path: Summary.load(path, "report again")),
    }
    return {
        f"{name}{how}": Target(path, change, read)
        for name, (path, read) in readers.items()
        for how, change in ((" bytes", damaged), ("", json_said_otherwise))
    }


def array(folder: Path) -> Target:
    path, whole = folder / "images.npy", np.zeros((3, 8, 8, 3), np.uint8)
    np.save(path, whole)
    return Target(path, damaged, lambda path: read_array(path, whole.shape, np.uint8, "prepare again", mapped=False))


def weights(folder: Path) -> Target:
    path = folder / "weights.safetensors"
    save_file({"a.weight": torch.zeros(3, 4), "a.bias": torch.zeros(3)}, path)
    return Target(path, damaged, read_state_dict)


def checkpoint(folder: Path) -> Target:
    network = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(network.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    network(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    kept = Checkpoint(folder / "work", "0123456789abcdef")
    kept.points.append(("loss", 0.5, 1, 0.0))
    kept.save(2, network, (optimizer, scheduler))

    def read(path: Path) -> None:
        Checkpoint(folder / "work", "0123456789abcdef").load(network, (optimizer, scheduler), CPU)
        path.with_name(f"{path.name}.damaged").unlink(missing_ok=True)

    return Target(kept.path, damaged, read)


def graph(path: Path, exported: Path, change: Callable[[bytes, Random], bytes]) -> Target:
    """The card of an exported file, in a graph that is read in a millisecond: the map is the image's mean."""
    size = Detector(exported).card.image_size
    tensor = onnx.helper.make_tensor_value_info
    nodes = [
        onnx.helper.make_node("ReduceMean", ["image"], ["anomaly_map"], axes=[1], keepdims=1),
        onnx.helper.make_node("ReduceMax", ["image"], ["score"], axes=[1, 2, 3], keepdims=0),
    ]
    inputs = [tensor("image", onnx.TensorProto.FLOAT, ["batch", 3, *size])]
    outputs = [tensor("anomaly_map", onnx.TensorProto.FLOAT, ["batch", 1, *size])]
    outputs.append(tensor("score", onnx.TensorProto.FLOAT, ["batch"]))
    opset = [onnx.helper.make_opsetid("", 13)]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "tiny", inputs, outputs), opset_imports=opset)
    model.ir_version = 8
    card = {entry.key: entry.value for entry in onnx.load(exported).metadata_props}
    onnx.helper.set_model_props(model, card)
    onnx.save(model, path)
    picture = np.zeros((40, 30, 3), np.uint8)

    def read(path: Path) -> None:
        detector = Detector(path)
        maps, scores = detector(detector.fitted(picture, "a picture"))
        detector.restored(maps[0, 0], picture)
        detector.card.decision(float(scores[0]))

    read(path)
    return Target(path, change, read)


def other_card(content: bytes, random: Random) -> bytes:
    model = onnx.ModelProto.FromString(content)
    for _ in range(random.randint(1, 3)):
        if not model.metadata_props:
            break
        place = random.randrange(len(model.metadata_props))
        entry = model.metadata_props[place]
        match random.randrange(4):
            case 0:
                del model.metadata_props[place]
            case 1:
                entry.value = damaged(entry.value.encode(), random).decode("utf-8", "replace")
            case 2:
                entry.value = random.choice([other.value for other in model.metadata_props])
            case _:
                entry.value = str(random.choice(HOSTILE)).encode("utf-8", "replace").decode()
    return model.SerializeToString()


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.filterwarnings("ignore")  # of numpy, Pillow and pydicom, about the damage
def test_damage_is_refused_or_read(targets: dict[str, Target], name: str, thorough: bool) -> None:
    number = INPUTS[name] if thorough else INPUTS[name] // SHARE
    found = unexpected(targets[name], range(number))
    assert not found, "\n".join(found)
