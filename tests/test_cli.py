"""Each error as a person sees it: one clear line and a non-zero exit."""

import json
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from conftest import CATEGORY, tiny_params, write_params
from PIL import Image

from pipelines.errors import WeightsError
from pipelines.files import DiskFull
from pipelines.paths import Project


def one_line(outcome):
    assert outcome.code == 1
    lines = outcome.err.strip().splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


@pytest.fixture
def images(root):
    return root / "images" / CATEGORY


def test_every_verb_on_a_small_project(root, blemish):
    for verb in (["check"], ["prepare", CATEGORY], ["train", "fapm", CATEGORY], ["evaluate", "fapm", CATEGORY]):
        outcome = blemish(*verb)
        assert outcome.code == 0, outcome.err
    assert "Image AUROC 100.0" in outcome.out
    outcome = blemish("export", "fapm", CATEGORY)
    assert outcome.code == 0, outcome.err
    assert "8 test images, maps within" in outcome.out
    assert "no decision changed" in outcome.out
    assert blemish("report").out == "reports/report.md: written\n"
    outcome = blemish("results")
    assert "squares" in outcome.out
    assert "blemish predict exported/fapm/squares/model.onnx" in outcome.out
    outcome = blemish("predict", "exported/fapm/squares/model.onnx", f"images/{CATEGORY}/test")
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("8 images scored, ")
    assert (root / "predictions" / "overlays" / "square" / "000.png").exists()

    damaged_records_get_a_line(Project(Path()).cell("fapm", CATEGORY), blemish)


def damaged_records_get_a_line(cell, blemish):
    """Here, since the cell has been through all stages."""
    cell.latency.parent.mkdir(parents=True)
    cell.latency.write_text(json.dumps({"hardware": "a machine"}))
    readers = {cell.run_record: ("train", "evaluate", "export"), cell.evaluation: ("evaluate", "export", "report")}
    readers |= {cell.predictions: ("evaluate", "report"), cell.latency: ("latency", "report")}
    for path, (remedy, *verbs) in readers.items():
        whole = path.read_text()
        foreign = whole.replace("run_id", "id", 1).replace(",label,", ",class,", 1)
        for damaged, verb in product(("", whole[: len(whole) // 2].rpartition(",")[0], foreign), verbs):
            path.write_text(damaged)
            line = one_line(blemish(verb) if verb == "report" else blemish(verb, cell.model, cell.category))
            assert line.startswith(f"{path}: damaged, or by another version of Blemish ("), line
            assert f"; run {cell.verb(remedy)}" in line
        path.write_text(whole)
    cell.run_record.write_text(cell.run_record.read_text().replace('"grid"', '"rows"'))
    line = one_line(blemish("evaluate", cell.model, cell.category))
    assert line == (
        f"{cell.run_record}: damaged, or by another version of Blemish (grid: Field required); "
        f"run {cell.verb('train')} again"
    )


def test_good_parts_alone_make_a_detector(root, blemish, images):
    """The plain folder of someone who has no defect yet: no accuracy, but a threshold and a file that decides."""
    good = sorted((images / "train" / "good").iterdir()) + sorted((images / "test" / "good").iterdir())
    (root / "mine" / CATEGORY / "normal").mkdir(parents=True)
    for number, path in enumerate(good):
        shutil.copy(path, root / "mine" / CATEGORY / "normal" / f"{number}.png")
    values = tiny_params()
    values["data"]["root"] = "mine"
    write_params(root, values)
    for verb in (["prepare", CATEGORY], ["train", "fapm", CATEGORY], ["evaluate", "fapm", CATEGORY]):
        outcome = blemish(*verb)
        assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("Image AUROC -, Defects found -, False alarms ")
    assert blemish("export", "fapm", CATEGORY).code == 0
    assert blemish("report").code == 0
    assert "squares" in blemish("results").out
    outcome = blemish("predict", "exported/fapm/squares/model.onnx", f"images/{CATEGORY}/test/square")
    assert outcome.out.startswith("4 images scored, 4 with a defect")


def test_a_bad_image_among_good_ones(root, blemish, images):
    for verb in (["prepare", CATEGORY], ["train", "fapm", CATEGORY], ["evaluate", "fapm", CATEGORY]):
        assert blemish(*verb).code == 0
    assert blemish("export", "fapm", CATEGORY).code == 0
    folder = root / "line"
    folder.mkdir()
    shutil.copy(images / "test" / "good" / "000.png", folder / "a.png")
    (folder / "b.png").write_text("not a picture")
    outcome = blemish("predict", "exported/fapm/squares/model.onnx", "line")
    assert outcome.out.startswith("1 images scored, ")
    assert "line/b.png" in one_line(outcome)


def test_all_problems_of_the_params_at_once(root, blemish):
    values = tiny_params()
    values["models"]["fapm"]["gird"] = values["models"]["fapm"].pop("grid")
    values["train"]["seed"] = "zero"
    values["evaluate"]["false_alarm_rate"] = 2.0
    values["data"]["categories"] = ["Nut", "nut"]
    write_params(root, values)
    outcome = blemish("check")
    assert outcome.code == 1
    assert outcome.err.startswith("error: params.yaml: 5 problems\n")
    for expected in (
        "data.categories = ['Nut', 'nut']: 'Nut' and 'nut' are the same folder where case is ignored: rename one",
        "train.seed = 'zero': Input should be a valid integer",
        "evaluate.false_alarm_rate = 2.0: Input should be less than 1",
        "models.fapm.grid: missing",
        "models.fapm.gird = 2: unknown key (did you mean 'grid'?)",
    ):
        assert expected in outcome.err


def test_unknown_model_category_and_source(root, blemish):
    assert one_line(blemish("train", "padim", CATEGORY)) == "model 'padim' is not in params.yaml, which lists: fapm"
    assert one_line(blemish("prepare", "nut")).startswith("category 'nut' is not in params.yaml")
    assert "mvtec" in one_line(blemish("download", "mvtec"))


def test_no_params_file(root, blemish):
    (root / "params.yaml").unlink()
    assert "no such file; run in the project's folder, or put a preset in place" in one_line(blemish("check"))


def empty(folder):
    shutil.rmtree(folder / "train" / "good")
    (folder / "train" / "good").mkdir()


def only_one(folder):
    for path in sorted((folder / "train" / "good").iterdir())[1:]:
        path.unlink()


def mask_of_another_size(folder):
    Image.new("L", (10, 10), 255).save(folder / "ground_truth" / "square" / "000_mask.png")


def black_mask(folder):
    Image.new("L", (80, 64), 0).save(folder / "ground_truth" / "square" / "000_mask.png")


def mask_without_image(folder):
    (folder / "test" / "square" / "000.png").unlink()


def image_without_mask(folder):
    (folder / "ground_truth" / "square" / "000_mask.png").unlink()


def truncated(folder):
    path = folder / "train" / "good" / "000.png"
    path.write_bytes(path.read_bytes()[:2000])


def zero_bytes(folder):
    (folder / "train" / "good" / "000.png").write_bytes(b"")


def text(folder):
    (folder / "train" / "good" / "000.png").write_text("hello")


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (shutil.rmtree, "images/squares"),
        (empty, "train/good"),
        (only_one, "train/good"),
        (mask_of_another_size, "000_mask.png"),
        (black_mask, "000_mask.png"),
        (mask_without_image, "000_mask.png"),
        (image_without_mask, "test/square/000.png"),
        (truncated, "train/good/000.png"),
        (zero_bytes, "train/good/000.png"),
        (text, "train/good/000.png"),
    ],
)
def test_a_folder_that_cannot_be_used(root, blemish, images, spoil, named):
    spoil(images)
    assert named in one_line(blemish("prepare", CATEGORY))
    assert not (root / "data" / "prepared" / CATEGORY).exists()
    assert not list((root / "data").glob("**/.*")) if (root / "data").exists() else True


def test_weights_that_do_not_fit(root, blemish):
    values = tiny_params()
    values["models"]["fapm"]["backbone"]["name"] = "resnet34.tv_in1k"
    write_params(root, values)
    assert blemish("prepare", CATEGORY).code == 0
    assert "resnet34" in one_line(blemish("train", "fapm", CATEGORY))
    values["models"]["fapm"]["backbone"]["weights"] = "nowhere.safetensors"
    write_params(root, values)
    assert "nowhere.safetensors" in one_line(blemish("train", "fapm", CATEGORY))
    assert not (root / "models").exists()


def test_hub_unreachable(root, blemish, monkeypatch):
    def unreachable(model):
        raise WeightsError("weights of resnet18.tv_in1k: hub unreachable")

    monkeypatch.setattr("pipelines.training.inputs.load_pretrained", unreachable)
    assert blemish("prepare", CATEGORY).code == 0
    assert one_line(blemish("train", "fapm", CATEGORY)) == "weights of resnet18.tv_in1k: hub unreachable"


def test_disk_full_while_saving(root, blemish, monkeypatch):
    assert blemish("prepare", CATEGORY).code == 0

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipelines.training.trained.serialize", full)
    message = one_line(blemish("train", "fapm", CATEGORY))
    assert message.startswith("models/fapm/squares: No space left on device")
    assert DiskFull.__name__ not in message
    assert not list((root / "models" / "fapm").iterdir())


def test_a_grid_that_does_not_fit(root, blemish):
    values = tiny_params()
    values["models"]["fapm"]["grid"] = 3
    write_params(root, values)
    assert blemish("prepare", CATEGORY).code == 0
    message = one_line(blemish("train", "fapm", CATEGORY))
    assert message.startswith("fapm on squares: ")
    assert "grid" in message


def test_an_onnx_file_that_is_not_ours(root, blemish):
    (root / "model.onnx").write_bytes(b"nonsense")
    assert one_line(blemish("predict", "model.onnx", "images")).startswith("model.onnx: not an ONNX model")
    assert one_line(blemish("predict", "other.onnx", "images")).startswith("other.onnx: no such file")


def test_an_unknown_device(root, blemish):
    assert one_line(blemish("train", "fapm", CATEGORY, "--device", "gpu")).startswith("device 'gpu': unknown")


def test_presets(root, blemish):
    (root / "params.yaml").write_text("mine: 1\n", encoding="utf-8")
    assert "edits that are not committed" in one_line(blemish("preset", "demo"))
    assert blemish("preset", "demo", "--force").out == "params.yaml: preset demo\n"
    assert blemish("preset", "folder").code == 0
    assert "there are: demo, folder, mvtec_ad" in one_line(blemish("preset", "mvtec"))


def test_sixteen_bit_palette_rgba_and_turned_images_are_read(root, blemish, images):
    folder = images / "train" / "good"
    deep = np.full((64, 80), 30000, np.uint16)
    Image.fromarray(deep).save(folder / "deep.png")
    Image.open(folder / "000.png").quantize(16).save(folder / "palette.png")
    Image.open(folder / "001.png").convert("RGBA").save(folder / "alpha.png")
    turned = Image.open(folder / "002.png")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(folder / "turned.jpg", exif=exif)
    outcome = blemish("prepare", CATEGORY)
    assert outcome.code == 0, outcome.err
    assert "train 12, holdout 4" in outcome.out
