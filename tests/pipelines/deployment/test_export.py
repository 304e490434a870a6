import json
import shutil

import numpy as np
import onnx
import pytest
import timm
import torch
from conftest import CATEGORY, draw_category, tiny_params, write_params
from PIL import Image
from rich.console import Console

from anomaly_models.common.sizes import Size
from pipelines.deployment import export as module
from pipelines.deployment.export import export
from pipelines.deployment.records import Deviation, Parity
from pipelines.errors import ExportError, StageError
from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.outcomes import Evaluation
from pipelines.inference.detector import Detector
from pipelines.inference.engine import Inputs
from pipelines.paths import Project
from pipelines.pictures import frames
from pipelines.pictures.images import to_input
from pipelines.preparation.prepare import prepare
from pipelines.preview.check import load_checked
from pipelines.training.packaged import packaged
from pipelines.training.train import train
from pipelines.training.trained import RunRecord, load_trained

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A project whose only cell is exported, to be copied."""
    root = tmp_path_factory.mktemp("made")
    draw_category(root / "images" / CATEGORY)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        whole_way(Project(root), CATEGORY, tiny_params(), Console(quiet=True))
    return root


@pytest.fixture
def evaluated(root, made):
    shutil.copytree(made, root, dirs_exist_ok=True, ignore=shutil.ignore_patterns("exported"))


@pytest.fixture
def known_graph(project, made, monkeypatch):
    """The graph is the one that was written of this cell before, which takes the exporter seconds."""
    before = Project(made).cell("fapm", CATEGORY, 0).onnx
    monkeypatch.setattr(module, "write_graph", lambda model, path, opset, card: shutil.copy(before, path))


@pytest.mark.usefixtures("evaluated")
def test_the_file_reproduces_the_model_and_carries_its_proof(project, params):
    told: list[tuple[int, int]] = []
    parity = export("fapm", CATEGORY, params, project, lambda done, total: told.append((done, total)))
    assert (parity.num_images, parity.images) == (8, "test images")
    assert told == [(number, 8) for number in range(1, 9)]
    assert parity.decisions_changed == 0
    cell = project.cell("fapm", CATEGORY, 0)
    assert Parity.load(cell.parity, "export again") == parity
    assert {path.name for path in cell.exported.iterdir()} == {"model.onnx", "parity.json"}  # no external data file
    detector = Detector(cell.onnx)
    evaluation = Evaluation.load(cell.evaluation, "evaluate again")
    assert detector.card.threshold == evaluation.threshold.value
    assert detector.card.pixel_threshold == evaluation.threshold.pixel_value
    assert detector.card.run_id == evaluation.run_id == RunRecord.load(cell.run_record, "train again").run_id
    assert detector.card.params["models"]["fapm"]["grid"] == 2
    assert detector.card.weights == [f"tf_efficientnet_lite0: {packaged('tf_efficientnet_lite0').terms}"]
    # Anyone can read its metadata.
    properties = onnx.load(cell.onnx).metadata_props
    values = {p.key: json.loads(p.value) for p in properties if p.key.startswith("blemish.")}
    assert values["blemish.model"] == "fapm"
    assert values["blemish.image_size"] == 64
    assert values["blemish.resize"] == "bilinear"
    # The same file scores one image and several.
    path = project.root / "images" / CATEGORY / "test" / "square" / "000.png"
    inputs = detector.load(path)
    expected = load_trained(cell, CPU).model(torch.from_numpy(to_input(inputs.pixels)))
    maps, scores = detector(Inputs.together([inputs] * 4))
    np.testing.assert_allclose(maps[3:], expected.anomaly_map.numpy(), atol=1e-4)
    np.testing.assert_allclose(scores, expected.score.repeat(4).numpy(), atol=1e-4)


def shifted(monkeypatch, change):
    """Let the exported graph's maps and scores come out otherwise."""
    call = Detector.__call__
    monkeypatch.setattr(Detector, "__call__", lambda self, image: tuple(change(x) for x in call(self, image)))


@pytest.mark.usefixtures("evaluated", "known_graph")
def test_a_graph_that_differs_is_not_kept(project, params, monkeypatch):
    shifted(monkeypatch, lambda x: x + 0.05)
    said = (
        r"^fapm on squares: the exported graph differs from the trained model by 0\.05 in the (score|map) of "
        r"test/\w+/\d+\.png \(allowed: 0\.\d+; good parts spread by [\d.]+\) and changes \d of 8 decisions; "
        r"onnxruntime [\d.]+ computes something else: try another `export\.opset`, or raise `export\.max_difference` "
        r"if so little does not matter; the file was not kept$"
    )
    with pytest.raises(ExportError, match=said):
        export("fapm", CATEGORY, params, project)
    assert not project.cell("fapm", CATEGORY, 0).exported.exists()


@pytest.mark.usefixtures("evaluated", "known_graph")
def test_a_graph_that_mixes_the_images_of_a_batch_is_not_kept(project, params, monkeypatch):
    shifted(monkeypatch, lambda x: x + (len(x) - 1))
    with pytest.raises(ExportError, match=r"differs from the trained model by 3 in the result in a batch of test/good"):
        export("fapm", CATEGORY, params, project)


@pytest.mark.usefixtures("evaluated")
def test_a_forward_that_decides_by_the_pixels_is_refused_in_one_line(project, params, monkeypatch):
    load = module.load_trained

    def loaded(*args):
        trained = load(*args)
        whole = trained.model.forward
        trained.model.forward = lambda image: whole(image if image.sum() > 0 else -image)
        return trained

    monkeypatch.setattr(module, "load_trained", loaded)
    with pytest.raises(ExportError, match=r"^fapm: its `forward` cannot be written as a graph \(.+\)$"):
        export("fapm", CATEGORY, params, project)
    assert not project.cell("fapm", CATEGORY, 0).exported.exists()


@pytest.mark.usefixtures("evaluated", "known_graph")
def test_another_way_to_resize_is_found_out(project, params, monkeypatch):
    """The defect of the best-known framework: antialiasing in training, none in what is shipped."""

    def aliased(rgb, size, resize):
        return np.asarray(Image.fromarray(rgb).resize((size.width, size.height), Image.Resampling.NEAREST))

    monkeypatch.setattr(frames, "resize_rgb", aliased)
    said = r"is not read as `prepare` read it \(up to \d+ of 255 levels apart\): .* the file was not kept"
    with pytest.raises(ExportError, match=said):
        export("fapm", CATEGORY, params, project)


@pytest.mark.usefixtures("evaluated", "known_graph")
def test_a_flipped_decision_is_refused_whatever_is_allowed(project, monkeypatch):
    values = tiny_params()
    values["export"]["max_difference"] = 1e6
    write_params(project.root, values)
    shifted(monkeypatch, lambda x: x * 0)
    evaluation = Evaluation.load(project.cell("fapm", CATEGORY, 0).evaluation, "evaluate again")
    called_defects = evaluation.confusion.true_positives + evaluation.confusion.false_positives
    said = rf"changes {called_defects} of 8 decisions, of test/\S+ first, whose score was \S+ and is 0 \(threshold"
    with pytest.raises(ExportError, match=said):
        export("fapm", CATEGORY, load_checked(project.params), project)
    assert not project.cell("fapm", CATEGORY, 0).exported.exists()


@pytest.mark.usefixtures("evaluated")
def test_what_one_file_cannot_hold_is_told_before_it_is_written(project, params, monkeypatch):
    size = sum(
        value.nbytes for value in load_trained(project.cell("fapm", CATEGORY, 0), CPU).model.state_dict().values()
    )
    monkeypatch.setattr(module, "_LARGEST", size // 2)
    monkeypatch.setattr(module.onnx, "save", None)  # would fail
    with pytest.raises(ExportError) as refused:
        export("fapm", CATEGORY, params, project)
    assert str(refused.value) == (
        f"fapm on squares: its weights take {size / 2**30:.2f} GiB, and one ONNX file holds at most 2 (protobuf's "
        "limit); lower its coreset_ratio or held_images, which its memory grows with, or fit fewer good parts, and "
        "train it again"
    )
    assert not project.cell("fapm", CATEGORY, 0).exported.exists()
    monkeypatch.undo()
    assert export("fapm", CATEGORY, params, project).decisions_changed == 0


def judged(**changes):
    """A parity in which all is well, but for the changes."""
    fine = Deviation(image="test/good/000.png", difference=1e-6, allowed=1e-3, spread=0.1)
    values = {
        "num_images": 8,
        "images": "test images",
        "num_held_out": 3,
        "max_difference": 0.01,
        "score": fine,
        "map": fine,
        "batch": fine,
    }
    values |= {"input_levels": 0.0, "input_image": "test/good/000.png", "threshold": 1.5, "disagreements": ()}
    return Parity(**(values | {"onnxruntime": "1.0"} | changes))


def test_nan_is_never_within_what_is_allowed():
    scale = module._Scale.of(np.array([1.0, 3.0]), np.array([200.0]), 0.01)
    nan = scale.deviation("test/good/000.png", np.array([np.nan], np.float32), np.zeros(1, np.float32))
    assert nan.difference == float("inf")
    for name in ("score", "map", "batch"):
        with pytest.raises(ExportError, match="differs from the trained model by inf"):
            judged(**{name: nan}).check("fapm", CATEGORY)


def test_differences_count_in_spreads_of_good_parts_or_in_what_float32_rounds():
    def scale(*scores, unlike=0.0):
        return module._Scale.of(np.array(scores), np.array([unlike]), 0.01)

    assert scale(1.0, 3.0, unlike=50.0).allowed == pytest.approx(0.01)  # a hundredth of their deviation of 1
    assert scale(2.0, 2.0).allowed == pytest.approx(2e-5)
    assert scale(700.0, 700.0).allowed == pytest.approx(7e-3)
    assert scale(0.0, 0.0, unlike=50.0).allowed == pytest.approx(5e-4)  # at distance 0, from numbers of that size
    assert scale(1.0, 1.0).deviation("a.png", np.array([1.5]), np.array([1.0])).difference == 0.5


def test_a_score_within_rounding_of_the_threshold_may_fall_on_either_side():
    scale = module._Scale.of(np.array([1.5, 1.5, 1.5]), np.array([20.0]), 0.01)

    def decided(shipped, seen):
        return judged(disagreements=tuple(scale.disagreement("test/good/003.png", np.array([shipped]), seen, 1.5)))

    seen = np.array([1.5])
    rounded = decided(1.500001, seen)
    rounded.check("fapm", CATEGORY)
    assert rounded.decisions_changed == 0
    assert "1 of 8 decisions hang on the last digits, of test/good/003.png first" in rounded.at_threshold
    changed = decided(1.6, seen)
    assert changed.decisions_changed == 1
    assert changed.at_threshold is None
    with pytest.raises(ExportError, match=r"changes 1 of 8 .* whose score was 1\.5 and is 1\.6 \(threshold: 1\.5\)"):
        changed.check("fapm", CATEGORY)
    assert decided(1.4, seen).disagreements == ()


@pytest.mark.usefixtures("evaluated")
def test_nothing_evaluated(project, params):
    project.cell("fapm", CATEGORY, 0).evaluation.unlink()
    with pytest.raises(StageError, match=r"run `blemish evaluate fapm squares` first$"):
        export("fapm", CATEGORY, params, project)


# Parts that look alike: the distance to the memory is 0 (a saturated backlight, a black background, constant parts).


def backlit(rng, ground, broken=False):
    """A silhouette in front of an even ground."""
    pixels = np.full((64, 64), float(ground))
    top, left = 20 + rng.integers(-1, 2), 18 + rng.integers(-1, 2)
    pixels[top : top + 24, left : left + 28] = 90 + rng.normal(0, 6, (24, 28))
    if broken:
        pixels[top : top + 8, left + 20 : left + 28] = ground
    return pixels


def constant(rng, ground, broken=False):
    """The same picture each time, but for one pixel."""
    pixels = np.full((64, 64), float(ground))
    pixels[0, 0] += rng.integers(0, 12) if ground else 0
    if broken:
        pixels[20:40, 20:40] = 160
    return pixels


def draw(folder, picture, number, seed, **how):
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for place in range(number):
        grey = picture(rng, **how).clip(0, 255).astype(np.uint8)
        Image.fromarray(grey).convert("RGB").save(folder / f"{place:03}.png")


def whole_way(project, category, values, console):
    write_params(project.root, values)
    params = load_checked(project.params)
    source = project.root / "images" / category
    prepare(source, category, params.prepare, params.views().frames, project.prepared(category), lambda *_: None)
    train("fapm", category, params, project, CPU, console)
    evaluate("fapm", category, params, project, CPU)
    return export("fapm", category, params, project)


def as_published(*categories):
    """With the score that compares neighbours."""
    values = tiny_params()
    values["data"]["categories"] = list(categories)
    values["models"]["fapm"] |= {"image_score": "released", "neighbours": 4, "batch_size": 8}
    return values


def test_parts_at_distance_zero_are_exported(project, console):
    source = project.root / "images"
    looks = {"backlight": (backlit, 255), "black_ground": (backlit, 0), "constant": (constant, 30)}
    for category, (picture, ground) in looks.items():
        draw(source / category / "normal", picture, 14, seed=0, ground=ground)
        draw(source / category / "abnormal", picture, 3, seed=1, ground=ground, broken=True)
        parity = whole_way(project, category, as_published(*looks), console)
        assert parity.decisions_changed == 0
        assert parity.map.excess < 0.5  # of what is allowed; 0.18 at most here


def test_good_test_parts_copied_from_training_are_exported(project, console):
    source = project.root / "images" / CATEGORY
    for name in ("000.png", "001.png", "002.png", "003.png"):
        shutil.copy(source / "train" / "good" / name, source / "test" / "good" / name)
    parity = whole_way(project, CATEGORY, as_published(CATEGORY), console)
    assert parity.decisions_changed == 0
    assert parity.map.excess < 0.1


def test_a_file_takes_pictures_that_are_no_squares_by_the_filter_it_was_trained_on(project, console):
    values = as_published(CATEGORY)
    size = {"height": 64, "width": 128}
    values["models"]["fapm"] |= {"image_size": size, "crop": size, "grid": {"height": 1, "width": 2}}
    values["models"]["fapm"]["resize"] = "lanczos"
    parity = whole_way(project, CATEGORY, values, console)
    assert parity.input_levels == 0
    assert parity.decisions_changed == 0
    detector = Detector(project.cell("fapm", CATEGORY, 0).onnx)
    assert (detector.card.image_size, detector.card.resize) == (Size(height=64, width=128), "lanczos")
    assert detector.card.params["models"]["fapm"]["grid"] == {"height": 1, "width": 2}
    anomaly_map, _ = detector(detector.load(next((project.root / "images" / CATEGORY).glob("test/square/*.png"))))
    assert anomaly_map.shape == (1, 1, 64, 128)


def test_a_convnext_backbone_is_exported(project, console):
    torch.manual_seed(0)
    weights = project.root / "convnext.pth"
    torch.save(timm.create_model("test_convnext", pretrained=False).state_dict(), weights)
    values = as_published(CATEGORY)
    values["models"]["fapm"]["backbone"] |= {"name": "test_convnext", "weights": str(weights), "layers": [1, 2]}
    parity = whole_way(project, CATEGORY, values, console)
    assert parity.decisions_changed == 0
    assert max(parity.score.excess, parity.map.excess, parity.batch.excess) < 0.1
