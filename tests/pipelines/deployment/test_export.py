import json

import numpy as np
import onnx
import pytest
import torch
from conftest import CATEGORY, tiny_params, write_params
from PIL import Image

from pipelines.deployment import export as module
from pipelines.deployment.export import export
from pipelines.deployment.records import Parity
from pipelines.errors import ExportError, StageError
from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.outcomes import Evaluation
from pipelines.inference.detector import Detector
from pipelines.pictures import images
from pipelines.preparation.prepare import prepare
from pipelines.preview.check import load_checked
from pipelines.training.train import train
from pipelines.training.trained import RunRecord, load_trained

CPU = torch.device("cpu")


@pytest.fixture
def trained(project, params, console):
    prepare(project.root / "images" / CATEGORY, CATEGORY, params.prepare, project.prepared(CATEGORY), lambda *_: None)
    train("fapm", CATEGORY, params, project, CPU, console)


@pytest.fixture
def evaluated(project, params, trained):
    evaluate("fapm", CATEGORY, params, project, CPU)


@pytest.mark.usefixtures("evaluated")
def test_the_file_reproduces_the_model_and_carries_its_proof(project, params):
    parity = export("fapm", CATEGORY, params, project)
    assert (parity.num_images, parity.images) == (8, "test images")
    assert parity.decisions_changed == 0
    cell = project.cell("fapm", CATEGORY)
    assert Parity.load(cell.parity, "export again") == parity
    assert {path.name for path in cell.exported.iterdir()} == {"model.onnx", "parity.json"}  # no external data file
    detector = Detector(cell.onnx)
    evaluation = Evaluation.load(cell.evaluation, "evaluate again")
    assert detector.card.threshold == evaluation.threshold.value
    assert detector.card.pixel_threshold == evaluation.threshold.pixel_value
    assert detector.card.run_id == evaluation.run_id == RunRecord.load(cell.run_record, "train again").run_id
    assert detector.card.params["models"]["fapm"]["grid"] == 2
    # Anyone can read its metadata.
    properties = onnx.load(cell.onnx).metadata_props
    values = {p.key: json.loads(p.value) for p in properties if p.key.startswith("blemish.")}
    assert values["blemish.model"] == "fapm"
    assert values["blemish.image_size"] == 64
    # The same file scores one image and several.
    path = project.root / "images" / CATEGORY / "test" / "square" / "000.png"
    image = detector.load(path)
    expected = load_trained(cell, CPU).model(torch.from_numpy(image))
    maps, scores = detector(np.concatenate([image] * 4))
    np.testing.assert_allclose(maps[3:], expected.anomaly_map.numpy(), atol=1e-4)
    np.testing.assert_allclose(scores, expected.score.repeat(4).numpy(), atol=1e-4)


@pytest.mark.usefixtures("evaluated")
def test_a_graph_that_differs_is_not_kept(project, params, monkeypatch):
    call = Detector.__call__
    monkeypatch.setattr(Detector, "__call__", lambda self, image: tuple(x + 0.01 for x in call(self, image)))
    with pytest.raises(ExportError, match=r"^fapm on squares: .* trained model by 0\.009\d* .* not kept$"):
        export("fapm", CATEGORY, params, project)
    assert not project.cell("fapm", CATEGORY).exported.exists()


@pytest.mark.usefixtures("evaluated")
def test_another_way_to_resize_is_found_out(project, params, monkeypatch):
    """The defect of the best-known framework: antialiasing in training, none in what is shipped."""

    def aliased(rgb, size):
        return np.asarray(Image.fromarray(rgb).resize((size, size), Image.Resampling.NEAREST))

    monkeypatch.setattr(images, "resize_rgb", aliased)
    with pytest.raises(ExportError, match="the file was not kept"):
        export("fapm", CATEGORY, params, project)


@pytest.mark.usefixtures("evaluated")
def test_a_flipped_decision_is_refused_whatever_the_tolerance(project, monkeypatch):
    values = tiny_params()
    values["export"]["tolerance"] = 1e6
    write_params(project.root, values)
    call = Detector.__call__
    monkeypatch.setattr(Detector, "__call__", lambda self, image: tuple(x * 0 for x in call(self, image)))
    confusion = Evaluation.load(project.cell("fapm", CATEGORY).evaluation, "evaluate again").confusion
    called_defects = confusion.true_positives + confusion.false_positives
    with pytest.raises(ExportError, match=f"changes {called_defects} of 8 decisions"):
        export("fapm", CATEGORY, load_checked(project.params), project)
    assert not project.cell("fapm", CATEGORY).exported.exists()


@pytest.mark.usefixtures("evaluated")
def test_what_one_file_cannot_hold_is_told_before_it_is_written(project, params, monkeypatch):
    size = sum(value.nbytes for value in load_trained(project.cell("fapm", CATEGORY), CPU).model.state_dict().values())
    monkeypatch.setattr(module, "_LARGEST", size // 2)
    monkeypatch.setattr(module.onnx, "save", None)  # would fail
    with pytest.raises(ExportError) as refused:
        export("fapm", CATEGORY, params, project)
    assert str(refused.value) == (
        f"fapm on squares: its weights take {size / 2**30:.2f} GiB, and one ONNX file holds at most 2 (protobuf's "
        "limit); lower its coreset_ratio, which its memory grows with, or fit fewer good parts, and train it again"
    )
    assert not project.cell("fapm", CATEGORY).exported.exists()
    monkeypatch.undo()
    assert export("fapm", CATEGORY, params, project).decisions_changed == 0


def test_nan_is_never_within_the_tolerance():
    assert module._difference(np.array([np.nan], np.float32), np.zeros(1, np.float32)) == float("inf")
    found = dict.fromkeys(Parity.model_fields, 0) | {"tolerance": 1e-4, "images": "test images", "onnxruntime": "1.0"}
    with pytest.raises(ExportError):
        Parity(**found | {"max_map_difference": float("inf")}).check("fapm", CATEGORY)


def test_differences_are_absolute_up_to_one_and_relative_above():
    assert module._difference(np.array([0.5, 700.7]), np.array([0.4, 700.0])) == pytest.approx(0.1)
    assert module._difference(np.array([0.5, -707.0]), np.array([0.5, -700.0])) == pytest.approx(0.01)


@pytest.mark.usefixtures("trained")
def test_nothing_evaluated(project, params):
    with pytest.raises(StageError, match=r"run `blemish evaluate fapm squares` first$"):
        export("fapm", CATEGORY, params, project)
