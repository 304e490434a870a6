"""The whole way of a category with nothing to test on, with one kind of part to test on, and with one part of each."""

import json
import re
import shutil
from pathlib import Path

import onnx
import pytest
from browser import browse, chromium
from conftest import CATEGORY, FAPM, draw_category, tiny_params, write_params
from mlflow import MlflowClient
from tiny_models import SETTINGS

from pipelines.data.index import GOOD

NOTHING = "no image to test on, hence no figure: there is a detector, and its threshold from held-out parts"
MODELS = ("fapm", "adfa")


def through(blemish, *verbs, models=MODELS):
    """Run the verbs of every cell; gives what each printed."""
    said = {}
    once = {"check": (), "report": (), "prepare": (CATEGORY,)}
    for verb in verbs:
        for model in models[:1] if verb in once else models:
            arguments = once.get(verb, (model, CATEGORY))
            outcome = blemish(verb, *arguments)
            assert outcome.code == 0, outcome.err
            said[verb, model] = outcome.out + (outcome.err if verb == "prepare" else "")
    return said


def two_models(root):
    values = tiny_params()
    values["models"]["adfa"] = SETTINGS["adfa"] | {"backbone": FAPM["backbone"]}
    write_params(root, values)


@pytest.fixture
def untested(root: Path) -> Path:
    """MVTec AD's layout with `train/good` alone."""
    for folder in ("test", "ground_truth"):
        shutil.rmtree(root / "images" / CATEGORY / folder)
    two_models(root)
    return root


def test_the_whole_way_with_nothing_held_out(untested, blemish):
    """Twelve good parts and no other picture: all are learnt from, and all set the threshold."""
    root, values = untested, tiny_params()
    values["prepare"]["holdout"] = "folds"
    write_params(root, values)
    verbs = ("check", "prepare", "train", "evaluate", "export", "latency", "report")
    said = through(blemish, *verbs, models=("fapm",))
    assert "12 good parts, maps within" in said["export", "fapm"]
    of_cell = {name: root / f"{name}/fapm/{CATEGORY}" for name in ("exported", "latency")}
    of_cell["evaluations"] = root / f"evaluations/fapm/{CATEGORY}/seed0"
    record = json.loads((of_cell["evaluations"] / "evaluation.json").read_text())
    assert record["threshold"]["num_images"] == 12
    assert json.loads((of_cell["exported"] / "parity.json").read_text())["images"] == "good parts"
    assert json.loads(of_cell["latency"].with_suffix(".json").read_text())["images"] == "good parts"
    page = (root / "reports/tests/report.html").read_text(encoding="utf-8")
    assert "was set on 12 good parts, each scored by a model of the other folds, for" in page


def test_the_whole_way_without_a_test_image(untested, blemish):
    root = untested
    said = through(blemish, "check", "prepare", "train", "evaluate", "export", "latency", "report")
    warning = "warning: no image to test on: there will be a detector and its threshold, and no figures"
    assert warning in said["prepare", "fapm"]

    record = json.loads((root / f"evaluations/fapm/{CATEGORY}/seed0/evaluation.json").read_text())
    threshold = record["threshold"]["value"]
    assert said["evaluate", "fapm"] == f"{NOTHING}, {threshold:.4g}\n"
    assert record["threshold"]["num_images"] == 3
    assert record["threshold"]["oracle"] is None
    assert {name for name, value in record["metrics"].items() if value is not None} == {
        "false_alarms_promised",
        "threshold",
        "train_seconds",
        "train_steps",
    }
    assert record["intervals"] == record["defects"] == {}
    files = {path.name for path in (root / f"evaluations/fapm/{CATEGORY}/seed0").iterdir()}
    assert files == {"evaluation.json", "predictions.csv"}  # no figure of nothing

    parity = json.loads((root / f"exported/fapm/{CATEGORY}/parity.json").read_text())
    assert (parity["num_images"], parity["images"]) == (3, "held-out good parts")
    assert "3 held-out good parts, maps within" in said["export", "fapm"]
    latency = json.loads((root / f"latency/fapm/{CATEGORY}.json").read_text())
    assert (latency["num_images"], latency["images"]) == (3, "held-out good parts")

    compared = blemish("compare")
    assert compared.code == 0, compared.err
    assert "cannot be compared by Image AUROC" in compared.out
    for by in ("category", "defect"):
        assert blemish("compare", "--by", by).code == 0
    results = blemish("results")
    assert results.code == 0, results.err
    assert f"{CATEGORY}: {NOTHING}." in " ".join(results.out.split())
    assert "Defects found:" not in results.out
    animated = blemish("gif", "fapm", CATEGORY)
    assert (animated.code, animated.err) == (1, f"error: fapm on {CATEGORY}: {NOTHING}; nothing to animate\n")

    scored = blemish("predict", f"exported/fapm/{CATEGORY}/model.onnx", f"images/{CATEGORY}/train/good", "-o", "out")
    assert scored.code == 0, scored.err
    assert "12 images scored" in scored.out
    properties = {p.key: p.value for p in onnx.load(root / f"exported/fapm/{CATEGORY}/model.onnx").metadata_props}
    assert json.loads(properties["blemish.threshold"]) == threshold

    tells_what_there_is(root)
    is_tracked(root, threshold)
    if chromium():
        is_a_page_without_broken_pictures(root)


def tells_what_there_is(root):
    text = (root / "reports/tests/report.md").read_text()
    assert f"{CATEGORY}: {NOTHING}." in text
    assert "![" not in text
    headings = re.findall(r"^## (.*)", text, re.MULTILINE)
    assert headings == ["Thresholds", "Three answers", "Latency"]
    assert "Milliseconds of one image at a time (held-out good parts)" in text
    assert f"{CATEGORY}: {NOTHING}." in (root / "reports/tests/tables.md").read_text()
    assert f"{CATEGORY}: {NOTHING}." in (root / "reports/tests/report.html").read_text()


def is_tracked(root, threshold):
    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    by_name = {run.info.run_name: run for run in runs}
    assert set(by_name) == {f"fapm-{CATEGORY}", f"adfa-{CATEGORY}", "summary"}
    cell = by_name[f"fapm-{CATEGORY}"]
    assert cell.info.status == "FINISHED"
    assert cell.data.metrics["threshold"] == threshold
    assert cell.data.tags["parity.images"] == "held-out good parts"
    assert f"There is {NOTHING}." in cell.data.tags["mlflow.note.content"]
    assert {item.path for item in client.list_artifacts(cell.info.run_id)} >= {"evaluation", "export"}
    assert client.search_registered_models() == []  # nobody is champion


def is_a_page_without_broken_pictures(root):
    with browse(chromium()) as browser:
        browser.open(root / "reports/tests/report.html")
        assert browser.run("document.querySelectorAll('img, canvas:not(#scale)').length") == 0
        assert browser.run("document.querySelector('#overview .verdict').textContent") == f"{CATEGORY}: {NOTHING}."
        browser.run(f"location.hash = '#/{CATEGORY}'")
        browser.wait("document.getElementById('tested').hidden")
        assert browser.run("document.getElementById('untested').hidden") is False
        assert browser.run("document.getElementById('note').textContent").startswith("The deployed threshold")
        assert browser.problems == []


@pytest.mark.parametrize(("good", "defects"), [(0, 4), (3, 0), (1, 1)])
def test_the_whole_way_with_one_kind_of_part_or_one_part_to_test_on(root, blemish, good, defects):
    shutil.rmtree(root / "images" / CATEGORY)
    draw_category(root / "images" / CATEGORY, train=8, good=good, defect=defects)
    said = through(blemish, "prepare", "train", "evaluate", "export", "latency", "report", models=["fapm"])
    record = json.loads((root / f"evaluations/fapm/{CATEGORY}/seed0/evaluation.json").read_text())
    assert (record["metrics"]["image_auroc"] is None) == (not good or not defects)
    assert (record["metrics"]["recall"] is None) == (not defects)
    assert (record["metrics"]["false_alarms"] is None) == (not good)
    assert (record["metrics"].get("pixel_auroc") is None) == (not defects)
    assert f"{good + defects} test images, maps within" in said["export", "fapm"]
    text = (root / "reports/tests/report.md").read_text()
    assert ("## Defect types" in text) == bool(defects)
    assert "## Examples" in text
    assert blemish("results").code == blemish("compare").code == blemish("gif", "fapm", CATEGORY).code == 0
    assert "no image to test on" not in text


def test_a_plain_folder_of_good_parts_alone_tests_its_false_alarms(root, blemish):
    folder = root / "images" / CATEGORY
    (folder / "train" / GOOD).rename(folder / "normal")
    for name in ("train", "test", "ground_truth"):
        shutil.rmtree(folder / name)
    said = through(blemish, "prepare", "train", "evaluate", models=["fapm"])
    assert "false alarms" in said["evaluate", "fapm"].lower()
    assert "no image to test on" not in said["evaluate", "fapm"]


def test_an_untested_category_beside_a_tested_one(root, blemish):
    """The figures of the one stay; there is no average of the two."""
    values = tiny_params()
    values["data"]["categories"] = [CATEGORY, "untested"]
    write_params(root, values)
    shutil.copytree(root / "images" / CATEGORY / "train", root / "images" / "untested" / "train")
    for category in values["data"]["categories"]:
        for verb in ("prepare", "train", "evaluate"):
            outcome = blemish(*([verb, category] if verb == "prepare" else [verb, "fapm", category]))
            assert outcome.code == 0, outcome.err
    for verb in ("report", "results", "compare"):
        assert blemish(verb).code == 0
    text = (root / "reports/tests/report.md").read_text()
    assert f"untested: {NOTHING}." in text
    assert f"{CATEGORY}: {NOTHING}." not in text
    lines = {line.split(" | ")[1]: line for line in text.splitlines() if line.startswith(("| fapm", "| **fapm"))}
    assert " 100.0 " in lines[CATEGORY]
