"""The int8 file: convolutions alone, a threshold of its own, kept only where it decides as the float32 one does."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny_models
import torch
from conftest import CATEGORY, draw_category, tiny_params, write_params
from rich.console import Console

from anomaly_models import MODELS
from anomaly_models.base import Prediction
from pipelines.deployment import int8 as module
from pipelines.deployment.bundle import bundle
from pipelines.deployment.export import export
from pipelines.deployment.int8 import write_int8
from pipelines.deployment.records import Int8, Latency, OtherDecision
from pipelines.deployment.threshold import threshold
from pipelines.errors import StageError
from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.held_out import score_held_out_images
from pipelines.evaluation.metrics import image_metrics
from pipelines.evaluation.outcomes import Evaluation, read_predictions
from pipelines.inference.bundle import Bundle
from pipelines.inference.detector import Detector
from pipelines.paths import Cell, Project
from pipelines.preparation.prepare import prepare
from pipelines.preview.check import load_checked
from pipelines.settings.params import Params
from pipelines.tracking.runs import cell_run
from pipelines.training.train import train
from pipelines.training.trained import load_trained

CPU = torch.device("cpu")
CELL = ("fapm", CATEGORY)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose only cell is exported, in both precisions, to be copied."""
    root = tmp_path_factory.mktemp("exported")
    draw_category(root / "images" / CATEGORY)
    values = tiny_params()
    values["export"] |= {"precisions": ["float32", "int8"], "max_decisions_changed": 0.25}
    write_params(root, values)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(root)
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        params, project = load_checked(root / "params.yaml"), Project(root)
        source = root / "images" / CATEGORY
        prepare(source, CATEGORY, params.prepare, params.views().frames, project.prepared(CATEGORY), lambda *_: None)
        train(*CELL, params, project, CPU, Console(quiet=True))
        evaluate(*CELL, params, project, CPU)
        export(*CELL, params, project)
    return root


@pytest.fixture
def root(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(exported, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


@pytest.fixture
def cell(project: Project) -> Cell:
    return project.cell(*CELL, 0)


def proof(cell: Cell) -> Int8:
    return Int8.load(cell.int8_proof, "export again")


def test_it_is_kept_with_thresholds_of_its_own(cell: Cell, project: Project) -> None:
    found, evaluation = proof(cell), Evaluation.load(cell.evaluation, "")
    assert found.refused is None
    assert {path.name for path in cell.exported.iterdir()} == {
        "int8.json",
        "model.int8.onnx",
        "model.onnx",
        "parity.json",
    }
    float32, int8 = Detector(cell.onnx), Detector(cell.int8)
    assert (float32.card.precision, int8.card.precision) == ("float32", "int8")
    assert float32.card.threshold == evaluation.threshold.value
    # By hand: of 3 parts held out, at a rate of 0.2, the highest; of the map, the highest of their pixels.
    images = {image.path: image for image in read_predictions(cell.evaluated)}
    said = {path: int8(int8.load(project.root / "images" / CATEGORY / path)) for path in images}
    scores = {path: float(score[0]) for path, (_, score) in said.items()}
    held_out = [path for path, image in images.items() if image.split == "holdout"]
    assert len(held_out) == 3
    assert int8.card.threshold == max(scores[path] for path in held_out) != float32.card.threshold
    assert int8.card.pixel_threshold == max(float(said[path][0].max()) for path in held_out)
    assert int8.card.false_alarm_rate == 0.25
    assert int8.card.review_load == found.review.load_ends
    assert int8.card == replace(
        float32.card,
        precision="int8",
        threshold=found.threshold.value,
        pixel_threshold=found.threshold.pixel_value,
        review_load=found.review.load_ends,
        reject_above=found.review.reject_above,
    )
    # What it is judged by.
    tested = [image for image in images.values() if image.split == "test"]
    by_hand = image_metrics(
        torch.tensor([scores[image.path] for image in tested]), torch.tensor([image.label for image in tested])
    )
    assert (found.metrics["image_auroc"], found.float32_auroc) == (by_hand.auroc, evaluation.metrics["image_auroc"])
    decisions = {image.path: int8.card.decision(scores[image.path]) for image in tested}
    assert [other.image for other in found.others] == [
        image.path for image in tested if decisions[image.path] != image.decision
    ]
    assert {image.path: image.score for image in found.images} == scores
    assert found.num_calibrating == 9  # all that there are
    assert found.megabytes == round(cell.int8.stat().st_size / 1e6, 2) < found.float32_megabytes


def test_the_same_file_gives_the_same_bytes(cell: Cell, project: Project, params: Params, tmp_path: Path) -> None:
    data = load_trained(cell, CPU).data(project, CPU)
    card, again = Detector(cell.int8).card, tmp_path / "again.onnx"
    write_int8(cell.onnx, again, module._feeds(data, module._evenly(data.rows("train")), card), card)
    assert again.read_bytes() == cell.int8.read_bytes()
    said = proof(cell)
    export(*CELL, params, project)
    assert proof(cell) == said


def test_without_it_there_is_the_one_file(cell: Cell, project: Project, params: Params) -> None:
    """And the run, which was told of one before, says nothing of any."""

    def told() -> set[str]:
        with cell_run(cell, params.tracking.experiment, Detector(cell.onnx).card.run_id) as run:
            return {name for name in run.known_tags() if name.startswith("int8.")}

    assert "int8.float32_auroc" in told()
    write(project, precisions=["float32"])
    export(*CELL, load_checked(project.params), project)
    assert {path.name for path in cell.exported.iterdir()} == {"model.onnx", "parity.json"}
    assert told() == set()
    missing = r"^fapm on squares has no int8 file; add int8 to `export\.precisions`"
    with pytest.raises(StageError, match=missing):
        bundle(*CELL, params, project, precision="int8")
    with pytest.raises(StageError, match=missing):
        threshold(*CELL, 2.5, None, "anna", project, precision="int8")


def write(project: Project, **export_values: Any) -> None:
    values = tiny_params()
    values["export"] |= {"precisions": ["float32", "int8"], "max_decisions_changed": 0.25} | export_values
    write_params(project.root, values)


def test_a_lower_auroc_is_refused_and_told(
    cell: Cell, project: Project, params: Params, monkeypatch: pytest.MonkeyPatch, blemish: Any
) -> None:
    """Of weights that are turned round, whose answers mean nothing."""
    whole = module.write_int8

    def wrong(float32: Path, path: Path, *others: Any) -> None:
        whole(float32, path, *others)
        proto = onnx.load(path)
        for weight in proto.graph.initializer:
            if weight.data_type == onnx.TensorProto.INT8 and len(weight.dims) == 4:
                weight.raw_data = np.roll(np.frombuffer(weight.raw_data, np.int8), 7).tobytes()
        onnx.save(proto, path)

    monkeypatch.setattr(module, "write_int8", wrong)
    outcome = blemish("export", *CELL)
    assert outcome.code == 0, outcome.err
    found = proof(cell)
    auroc = 100 * float(found.metrics["image_auroc"] or 0)
    said = f"its image AUROC is {auroc:.1f}, in float32 100.0, and it may lose 0.5"
    assert found.refused == said
    assert outcome.out.splitlines()[-1] == f"fapm on squares: no int8 file: {said}"
    assert (cell.onnx.exists(), cell.int8.exists()) == (True, False)
    assert Detector(cell.onnx).card.precision == "float32"
    with pytest.raises(StageError, match=r"^fapm on squares has no int8 file: its image AUROC is"):
        bundle(*CELL, params, project, precision="int8")


def test_too_many_other_decisions_are_refused(
    cell: Cell, project: Project, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a threshold above all scores nothing is a defect any more, and the AUROC is what it was."""
    whole = module.thresholds

    def high(*args: Any) -> Any:
        at, pixel_value = whole(*args)
        return at.model_copy(update={"value": 1e6}), pixel_value

    monkeypatch.setattr(module, "thresholds", high)
    export(*CELL, params, project)
    found = proof(cell)
    assert {(other.decision, image.decision) for other in found.others for image in found.images} == {("good", "good")}
    assert str(found.refused).startswith(f"it changes {len(found.others)} of 8 decisions, of test/")
    assert "which is more than 25 % (`export.max_decisions_changed`)" in str(found.refused)
    assert not cell.int8.exists()


def test_parts_are_shown_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CALIBRATING", 4)
    assert module._evenly(range(10, 20)) == [10, 12, 15, 17]
    assert module._evenly([3, 5]) == [3, 5]


def refusal(auroc: float | None, float32: float | None, num_others: int) -> str | None:
    other = OtherDecision(image="test/cut/000.png", float32=2.0, int8=1.0, decision="good")
    return module._refusal(auroc, float32, [other] * num_others, 40, 0.05)


def test_what_is_allowed_by_hand() -> None:
    assert refusal(0.975, 0.98, 2) is None  # half a point, and a twentieth of 40
    assert refusal(1.0, 0.5, 0) is None
    assert refusal(0.974, 0.98, 0) == "its image AUROC is 97.4, in float32 98.0, and it may lose 0.5"
    assert refusal(0.98, 0.98, 3) == (
        "it changes 3 of 40 decisions, of test/cut/000.png first, which is more than 5 % "
        "(`export.max_decisions_changed`); its image AUROC is 98.0, in float32 98.0"
    )
    nothing_shows_it = "there are no test images, good and defective, that show whether it still finds defects"
    assert refusal(None, None, 0) == nothing_shows_it
    figures, oracle = module._metrics([], 1.5, 0.25)  # as of a category without test images
    assert (figures["image_auroc"], figures["recall"], figures["threshold"], oracle) == (None, None, 1.5, None)


def test_all_that_takes_an_exported_file_takes_this_one(cell: Cell, project: Project, blemish: Any) -> None:
    card, found = Detector(cell.int8).card, proof(cell)
    outcome = blemish("predict", str(cell.int8), f"images/{CATEGORY}/test", "-o", "predicted")
    assert outcome.code == 0, outcome.err
    assert f"threshold {card.threshold:.4g}" in outcome.out

    outcome = blemish("latency", *CELL)
    measured = Latency.load(cell.latency, "")
    assert measured.int8 is not None
    assert outcome.out.rstrip().endswith(f"; int8: {measured.int8.milliseconds.total.p50:.1f} ms")
    assert measured.metrics()["latency_int8.total.p50"] == measured.int8.milliseconds.total.p50

    outcome = blemish("bundle", *CELL, "--precision", "int8")
    assert outcome.code == 0, outcome.err
    path = project.root / "bundles" / f"fapm-{CATEGORY}-int8.zip"
    packed = Bundle(path)
    assert (packed.card.precision, packed.card.threshold) == ("int8", card.threshold)
    assert packed.about["threshold"]["value"] == card.threshold
    assert packed.about["metrics"]["image_auroc"]["value"] == found.metrics["image_auroc"]
    assert packed.about["latency"]["milliseconds"] == measured.int8.milliseconds.model_dump()
    assert packed.about["int8"]["float32_threshold"] == Detector(cell.onnx).card.threshold
    assert any(found.text in limit for limit in packed.about["limits"])
    assert packed.calibration["threshold_score"] == packed.calibration["score"]
    assert max(packed.calibration["score"]) == card.threshold
    assert blemish("verify", str(path)).code == 0
    assert blemish("bundle", *CELL).code == 0
    assert Bundle(project.root / "bundles" / f"fapm-{CATEGORY}.zip").about["int8"] is None


def test_a_threshold_is_chosen_for_the_int8_file_alone(
    cell: Cell, project: Project, params: Params, blemish: Any
) -> None:
    outcome = blemish("threshold", *CELL, "--precision", "int8", "--because", "a scratch", "--by", "anna", "--", "-1")
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("deployed/fapm/squares/model.int8.onnx: threshold -1 instead of ")
    assert "On the test images: 4 of 4 defects found and 4 of 4 good parts rejected, " in outcome.out
    assert (cell.deployed_int8.is_file(), cell.deployed.exists()) == (True, False)
    card = Detector(cell.deployed_int8).card
    assert (card.precision, card.threshold, card.choices[0].by) == ("int8", -1, "anna")

    made = bundle(*CELL, params, project, precision="int8")
    assert made.is_deployed
    assert Bundle(made.path).card.threshold == -1
    assert not bundle(*CELL, params, project).is_deployed

    shutil.rmtree(cell.exported)
    outcome = blemish("threshold", *CELL, "--precision", "int8", "--", "2.5")
    assert "fapm on squares is not exported: no " in outcome.err


def test_parts_that_the_model_calibrates_on_score_as_much_higher_as_evaluate_found(
    sixth_model: str, project: Project, console: Console
) -> None:
    params = load_checked(project.params)
    source = project.root / "images" / CATEGORY
    prepare(source, CATEGORY, params.prepare, params.views().frames, project.prepared(CATEGORY), lambda *_: None)
    train(sixth_model, CATEGORY, params, project, CPU, console)
    trained = load_trained(project.cell(sixth_model, CATEGORY, 0), CPU)
    data = trained.data(project, CPU)

    def one_more(image: torch.Tensor, region: torch.Tensor | None) -> Prediction:
        found = trained.model(image, region)
        return Prediction(found.anomaly_map + 2, found.score + 1)

    expected, threshold_from = score_held_out_images(trained, data)
    assert threshold_from == "held-out good parts, cross-fitted"
    found, found_from = module._held_out(one_more, trained, data)
    assert found_from == threshold_from
    for own, high in zip(found, expected, strict=True):
        assert (own.path, own.score, own.peak) == (
            high.path,
            pytest.approx(high.score + 1, abs=1e-5),
            pytest.approx(high.peak + 2, abs=1e-5),
        )


def test_what_was_prepared_by_folds_is_refused(project: Project, params: Params, console: Console) -> None:
    """`check` refuses the two together; what lies there may have been prepared before."""
    write(project, precisions=["float32"])
    values = tiny_params()
    values["prepare"]["holdout"] = "folds"
    write_params(project.root, values)
    folds = load_checked(project.params)
    source = project.root / "images" / CATEGORY
    prepare(source, CATEGORY, folds.prepare, folds.views().frames, project.prepared(CATEGORY), lambda *_: None)
    train(*CELL, folds, project, CPU, console)
    evaluate(*CELL, folds, project, CPU)
    with pytest.raises(
        StageError, match=r"^squares: prepared with `holdout: folds`, and the threshold of an int8 file"
    ):
        export(*CELL, params, project)


# ---------------------------------------------------------------------------------------------------------- the graph


def feeds(name: str) -> Iterator[dict[str, np.ndarray]]:
    return ({"image": image[None].numpy()} for image in tiny_models.random_images(name, 4, 0))


@pytest.fixture(params=sorted(MODELS.data))
def graphs(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Each method's graph in float32 and in int8, of its smallest settings."""
    name = request.param
    model = tiny_models.build(name)
    tiny_models.pretrain(model)
    model.prepare(tiny_models.normals(name, 0))
    model.calibrate(tiny_models.normals(name, 10))
    tiny_models.exported(model.eval(), tmp_path / "float32.onnx")
    card = replace(tiny_models.CARD, image_size=model.config.image_size, precision="int8")
    write_int8(tmp_path / "float32.onnx", tmp_path / "int8.onnx", feeds(name), card)
    assert Detector(tmp_path / "int8.onnx").card == card
    return onnx.load(tmp_path / "float32.onnx"), onnx.load(tmp_path / "int8.onnx")


def test_convolutions_alone_are_of_integers(graphs: tuple[onnx.ModelProto, onnx.ModelProto]) -> None:
    float32, int8 = graphs
    given = {node.op_type for node in float32.graph.node}
    assert {node.op_type for node in int8.graph.node} - given == {"QuantizeLinear", "DequantizeLinear"}
    dequantized = {node.output[0]: node for node in int8.graph.node if node.op_type == "DequantizeLinear"}
    convolutions = [node for node in int8.graph.node if node.op_type == "Conv"]
    inside = [node for node in convolutions if node.input[1] in dequantized]
    assert inside
    shapes = {weight.name: tuple(weight.dims) for weight in int8.graph.initializer}
    for node in convolutions:
        if node in inside:
            assert shapes[dequantized[node.input[1]].input[0]][:2] != (1, 1)
            assert node.input[0] in dequantized
        else:  # the blur of a map and the like
            assert shapes[node.input[1]][:2] == (1, 1)
    # What is taken back from integers goes into convolutions, or is what they gave: into whatever took it before.
    weights = {name for node in inside for name in node.input[1:]}
    quantized = {node.output[0]: node.input[0] for node in int8.graph.node if node.op_type == "QuantizeLinear"}
    before = {name: node for node in float32.graph.node for name in node.output}
    of_network = {name for node in inside for name in (node.input[0], *node.output)}
    for name, node in dequantized.items():
        if name not in weights and name not in of_network:
            source = quantized[node.input[0]]
            assert before[source].op_type in {"Conv", "Clip", "Relu"} or source == "image"


def test_a_blur_stays_as_it_is(tmp_path: Path) -> None:
    """FAPM's last two convolutions smooth the map, in float32; all others are the backbone's."""
    model = tiny_models.build("fapm")
    model.prepare(tiny_models.normals("fapm", 0))
    tiny_models.exported(model.eval(), tmp_path / "model.onnx")
    proto = onnx.load(tmp_path / "model.onnx")
    convolutions = [node for node in proto.graph.node if node.op_type == "Conv"]
    filters = [node for node in convolutions if module._is_filter(node, proto.graph)]
    assert filters == convolutions[-2:]
    assert len(convolutions) > 2
