"""What is deep, of several pages or a DICOM goes the whole way, and the proof runs from the original files."""

import json

import imagecodecs
import numpy as np
import pydicom
import pytest
import tifffile
import torch
from conftest import CATEGORY, tiny_params, write_params
from drawn_dicoms import PATIENT, described, named_everywhere, saved
from PIL import Image

from pipelines.deployment.export import export
from pipelines.evaluation.evaluate import evaluate
from pipelines.inference.detector import Detector
from pipelines.inference.predict import predict
from pipelines.preparation.prepare import prepare
from pipelines.preview.check import load_checked
from pipelines.training.train import train

CPU = torch.device("cpu")
BLACK, WHITE = 300, 300 + 255 * 12


def deep_colour(rgb, path):
    """16 bits in a window: the bytes that were drawn are what is to come out."""
    path.with_suffix(".png").write_bytes(imagecodecs.png_encode(rgb.astype(np.uint16) * 12 + BLACK))


def second_page(rgb, path):
    with tifffile.TiffWriter(path.with_suffix(".tif")) as writer:
        writer.write(255 - rgb, photometric="rgb", metadata=None)
        writer.write(rgb.astype(np.uint16) * 12 + BLACK, photometric="rgb", compression="lzw", metadata=None)


def dicom(rgb, path):
    """As a detector's counts, which slope and window turn into the bytes that were drawn."""
    header = {"RescaleSlope": 0.5, "RescaleIntercept": -100, "WindowCenter": 7, "WindowWidth": 9}
    values = rgb[..., 0].astype(np.uint16) * 2 + 200
    path.with_suffix(".dcm").write_bytes(saved(named_everywhere(described(values, bits=12, **header))))


FORMATS = {
    "deep colour": (deep_colour, {"black_level": BLACK, "white_level": WHITE}),
    "second page": (second_page, {"black_level": BLACK, "white_level": WHITE, "page": 1}),
    "dicom": (dicom, {"dicom_window": {"centre": 128, "width": 256}}),
}


@pytest.fixture
def loose(monkeypatch):
    """Lets a test write what no standard allows."""
    monkeypatch.setattr(pydicom.config.settings, "_writing_validation_mode", pydicom.config.IGNORE)
    monkeypatch.setattr(pydicom.config.settings, "reading_validation_mode", pydicom.config.IGNORE)


def converted(folder, write):
    """The pictures of a category in another format; gives what was drawn, by the place of the new file."""
    drawn = {}
    for path in [*folder.glob("train/*/*.png"), *folder.glob("test/*/*.png")]:
        with Image.open(path) as image:
            rgb = np.asarray(image)
        path.unlink()
        write(rgb, path)
        (new,) = path.parent.glob(f"{path.stem}.*")
        drawn[new] = rgb
    return drawn


@pytest.mark.usefixtures("loose")
@pytest.mark.parametrize("kind", FORMATS)
def test_the_proof_runs_from_the_original_files(project, console, kind):
    write, settings = FORMATS[kind]
    drawn = converted(project.root / "images" / CATEGORY, write)
    values = tiny_params()
    values["prepare"] |= settings
    write_params(project.root, values)
    params, folder = load_checked(project.params), project.prepared(CATEGORY)
    index = prepare(
        project.root / "images" / CATEGORY, CATEGORY, params.prepare, params.views().frames, folder, lambda *_: None
    ).index
    assert {name: getattr(index, name) for name in settings} == {
        name: getattr(params.prepare, name) for name in settings
    }
    train("fapm", CATEGORY, params, project, CPU, console)
    evaluate("fapm", CATEGORY, params, project, CPU)
    parity = export("fapm", CATEGORY, params, project)
    assert (parity.num_images, parity.input_levels, parity.decisions_changed) == (8, 0.0, 0)

    model = project.cell("fapm", CATEGORY, 0).onnx
    detector = Detector(model)
    card = detector.card.to_json()
    assert {name: card[name] for name in settings} == settings
    for path, rgb in drawn.items():
        expected = np.repeat(rgb[..., :1], 3, axis=2) if kind == "dicom" else rgb
        np.testing.assert_array_equal(detector.read(path), expected)
    results = predict(detector, [project.root / "images" / CATEGORY / "test"], project.root / "out", lambda *_: None)
    assert [result.error for result in results] == [None] * 8
    if kind == "dicom":
        assert_no_patient_in(project.root)


def assert_no_patient_in(root):
    """But in the files themselves: index, arrays, runs, metadata, figures, CSV, JSON, overlays."""
    written = [path for path in root.rglob("*") if path.is_file() and path.suffix != ".dcm"]
    assert {".json", ".npy", ".onnx", ".csv", ".png", ".db"} <= {path.suffix for path in written}
    assert [path for path in written if PATIENT.encode() in path.read_bytes()] == []
    dicoms = [path for path in root.rglob("*.dcm") if PATIENT.encode() in path.read_bytes()]
    assert {path.relative_to(root).parts[0] for path in dicoms} == {"images"}
    assert PATIENT not in json.dumps([str(path) for path in written])
