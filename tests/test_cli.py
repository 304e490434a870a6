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
from pipelines.inference.detector import Detector
from pipelines.paths import Project

PREPARE = ("prepare", CATEGORY)
TRAIN, EVALUATE, EXPORT = ((verb, "fapm", CATEGORY) for verb in ("train", "evaluate", "export"))


def one_line(outcome):
    assert outcome.code == 1
    lines = outcome.err.strip().splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


def works(blemish, *verbs):
    for verb in verbs:
        outcome = blemish(*verb)
        assert outcome.code == 0, outcome.err
    return outcome.out


@pytest.fixture
def images(root):
    return root / "images" / CATEGORY


def test_every_verb_on_a_small_project(root, blemish):
    assert "Image AUROC 100.0" in works(blemish, ["check"], PREPARE, TRAIN, EVALUATE)
    exported = works(blemish, EXPORT)
    assert "8 test images, maps within" in exported
    assert "no decision changed" in exported
    assert blemish("report").out == "reports/tests/report.md: written\n"
    params = (root / "params.yaml").read_text(encoding="utf-8")
    (root / "params.yaml").write_text(params.replace("experiment: tests", "experiment: others"), encoding="utf-8")
    assert blemish("report").out == "reports/others/report.md: written\n"  # though the store knows nothing of it yet
    (root / "params.yaml").write_text(params, encoding="utf-8")
    results = works(blemish, ["results"])
    assert "squares" in results
    assert "blemish predict exported/fapm/squares/model.onnx" in results
    assert "Compare runs:        blemish ui\n" in results  # a project of a wheel has no Makefile
    predicted = works(blemish, ["predict", "exported/fapm/squares/model.onnx", f"images/{CATEGORY}/test"])
    assert "8 images scored, " in predicted.splitlines()[-1]
    assert (root / "predictions" / "overlays" / "square" / "000.png").exists()

    damaged_arrays_get_a_line(Project(Path()), blemish)
    damaged_records_get_a_line(Project(Path()).cell("fapm", CATEGORY, 0), blemish)


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


def damaged_arrays_get_a_line(project, blemish):
    cell, prepared = project.cell("fapm", CATEGORY, 0), project.prepared(CATEGORY)
    arrays = [prepared / name for name in ("index.json", "images_64_bilinear.npy", "masks_64.npy")]
    readers = dict.fromkeys(arrays, (f"`blemish prepare {CATEGORY}`", ("train", "evaluate", "report")))
    readers[cell.weights] = cell.verb("train"), ("evaluate", "export")
    readers[cell.pixels] = cell.verb("evaluate"), ("report",)
    readers[cell.evaluated / "maps.npz"] = "evaluate", ("report",)
    readers[cell.curves] = cell.verb("evaluate"), ("report",)
    for path, (remedy, verbs) in readers.items():
        whole = path.read_bytes()
        for damaged, verb in product((b"", whole[: len(whole) // 2], b"[3]", whole[::-1]), verbs):
            path.write_bytes(damaged)
            line = one_line(blemish(verb) if verb == "report" else blemish(verb, cell.model, cell.category))
            assert line.startswith(f"{path}: damaged, or by another version of Blemish ("), line
            assert remedy in line
        path.write_bytes(whole)
    whole = cell.weights.read_bytes()
    flipped = bytearray(whole)
    flipped[-9] ^= 1  # within the last tensor, where any number is a number
    cell.weights.write_bytes(flipped)
    told = f"{cell.weights}: damaged, or by another version of Blemish (not the bytes that were written); run "
    assert one_line(blemish("evaluate", cell.model, cell.category)) == f"{told}{cell.verb('train')} again"
    cell.weights.write_bytes(whole)


def test_good_parts_alone_make_a_detector(root, blemish, images):
    """The plain folder of someone who has no defect yet: no accuracy, but a threshold and a file that decides."""
    good = sorted((images / "train" / "good").iterdir()) + sorted((images / "test" / "good").iterdir())
    (root / "mine" / CATEGORY / "normal").mkdir(parents=True)
    for number, path in enumerate(good):
        shutil.copy(path, root / "mine" / CATEGORY / "normal" / f"{number}.png")
    values = tiny_params()
    values["data"]["root"] = "mine"
    write_params(root, values)
    evaluated = works(blemish, PREPARE, TRAIN, EVALUATE)
    assert evaluated.startswith("Image AUROC -, Defects found -, False alarms ")
    works(blemish, EXPORT, ["report"])
    assert "squares" in blemish("results").out
    outcome = blemish("predict", "exported/fapm/squares/model.onnx", f"images/{CATEGORY}/test/square")
    assert "4 images scored, 4 with a defect" in outcome.out


def test_a_promise_to_one_group_alone_is_told_everywhere(root, blemish):
    """000 to 009 are of group 0, 010 and 011 of group 1: all that is held out is of one."""
    values = tiny_params()
    values["prepare"]["groups"] = {"pattern": "good/0([01])"}
    write_params(root, values)
    told = "all held-out good parts are of one group (1): whether another scores alike is not known"
    assert "warning: all held-out images are of one group (1)" in blemish(*PREPARE).err
    works(blemish, TRAIN)
    assert blemish(*EVALUATE).err == f"warning: fapm on squares: {told}\n"
    works(blemish, EXPORT, ["report"])
    assert Detector(root / "exported/fapm/squares/model.onnx").card.groups == told
    assert f"- fapm on squares: {told}." in (root / "reports/tests/report.md").read_text(encoding="utf-8")


def test_a_bad_image_among_good_ones(root, blemish, images):
    works(blemish, PREPARE, TRAIN, EVALUATE, EXPORT)
    folder = root / "line"
    folder.mkdir()
    shutil.copy(images / "test" / "good" / "000.png", folder / "a.png")
    (folder / "b.png").write_text("not a picture")
    outcome = blemish("predict", "exported/fapm/squares/model.onnx", "line")
    assert "\n1 image scored, " in outcome.out
    assert "line/b.png" in one_line(outcome)


def test_all_problems_of_the_params_at_once(root, blemish):
    values = tiny_params()
    values["models"]["fapm"]["gird"] = values["models"]["fapm"].pop("grid")
    values["train"]["seeds"] = ["zero"]
    values["evaluate"]["false_alarm_rate"] = 2.0
    values["data"]["categories"] = ["Nut", "nut"]
    write_params(root, values)
    outcome = blemish("check")
    assert outcome.code == 1
    assert outcome.err.startswith("error: params.yaml: 5 problems\n")
    for expected in (
        "data.categories = ['Nut', 'nut']: 'Nut' and 'nut' are the same folder where case is ignored: rename one",
        "train.seeds.0 = 'zero': Input should be a valid integer",
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
    assert "no such file; run in the project's folder, begin a project with `blemish init`" in one_line(
        blemish("check")
    )


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def only_one(folder):
    for path in sorted(folder.iterdir())[1:]:
        path.unlink()


GOOD, MASK = "train/good/000.png", "ground_truth/square/000_mask.png"
SPOILED = {
    "no folder": (shutil.rmtree, "images/squares"),
    "no image": (lambda folder: empty(folder / "train/good"), "train/good"),
    "one image": (lambda folder: only_one(folder / "train/good"), "train/good"),
    "mask of another size": (lambda folder: Image.new("L", (10, 10), 255).save(folder / MASK), "000_mask.png"),
    "black mask": (lambda folder: Image.new("L", (80, 64), 0).save(folder / MASK), "000_mask.png"),
    "mask without image": (lambda folder: (folder / "test/square/000.png").unlink(), "000_mask.png"),
    "image without mask": (lambda folder: (folder / MASK).unlink(), "test/square/000.png"),
    "truncated": (lambda folder: (folder / GOOD).write_bytes((folder / GOOD).read_bytes()[:2000]), GOOD),
    "zero bytes": (lambda folder: (folder / GOOD).write_bytes(b""), GOOD),
    "text": (lambda folder: (folder / GOOD).write_text("hello"), GOOD),
}


@pytest.mark.parametrize(("spoil", "named"), SPOILED.values(), ids=SPOILED)
def test_a_folder_that_cannot_be_used(root, blemish, images, spoil, named):
    spoil(images)
    assert named in one_line(blemish(*PREPARE))
    assert not (root / "data" / "prepared" / CATEGORY).exists()
    assert not list((root / "data").glob("**/.*")) if (root / "data").exists() else True


def test_weights_that_do_not_fit(root, blemish):
    values = tiny_params()
    values["models"]["fapm"]["backbone"]["name"] = "resnet34.tv_in1k"
    write_params(root, values)
    works(blemish, PREPARE)
    assert "resnet34" in one_line(blemish(*TRAIN))
    values["models"]["fapm"]["backbone"]["weights"] = "nowhere.safetensors"
    write_params(root, values)
    assert "nowhere.safetensors" in one_line(blemish(*TRAIN))
    assert not (root / "models").exists()


def test_hub_unreachable(root, blemish, monkeypatch):
    def unreachable(model):
        raise WeightsError("weights of resnet18.tv_in1k: hub unreachable")

    monkeypatch.setattr("pipelines.training.inputs.load_pretrained", unreachable)
    works(blemish, PREPARE)
    assert one_line(blemish(*TRAIN)) == "weights of resnet18.tv_in1k: hub unreachable"


def test_disk_full_while_saving(root, blemish, monkeypatch):
    works(blemish, PREPARE)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipelines.training.trained.RunRecord.save", full)
    message = one_line(blemish(*TRAIN))
    assert message.startswith("models/fapm/squares/seed0.trained: No space left on device")
    assert DiskFull.__name__ not in message
    assert not list((root / "models" / "fapm" / "squares").iterdir())


def test_a_grid_that_does_not_fit(root, blemish):
    values = tiny_params()
    values["models"]["fapm"]["grid"] = 3
    write_params(root, values)
    works(blemish, PREPARE)
    message = one_line(blemish(*TRAIN))
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
    assert "there are: demo, dinov2, folder, medical, mvtec_ad, solar" in one_line(blemish("preset", "mvtec"))


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
    assert "train 12, holdout 4" in works(blemish, PREPARE)
