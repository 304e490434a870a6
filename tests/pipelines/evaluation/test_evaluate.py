import csv

import numpy as np
import pytest
import torch
from conftest import CATEGORY, tiny_params, write_params
from PIL import Image
from sklearn.metrics import roc_auc_score

from anomaly_models import MODELS
from anomaly_models.base import ModelError
from anomaly_models.common.sizes import Size
from pipelines.data.batches import PreparedData
from pipelines.errors import StageError
from pipelines.evaluation import evaluate as module
from pipelines.evaluation import held_out as held_out_parts
from pipelines.evaluation.certainty import intervals_of
from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.outcomes import Evaluation, read_outcome, read_predictions
from pipelines.evaluation.thresholds import threshold_at
from pipelines.files import read_json
from pipelines.pictures.frames import Frame
from pipelines.preparation.prepare import prepare
from pipelines.preview.check import load_checked
from pipelines.training.train import train
from pipelines.training.trained import load_trained

CPU = torch.device("cpu")


def prepare_category(project, params):
    source, folder = project.root / "images" / CATEGORY, project.prepared(CATEGORY)
    prepare(source, CATEGORY, params.prepare, params.views().frames, folder, lambda *_: None)


@pytest.fixture
def trained(project, params, console):
    prepare_category(project, params)
    train("fapm", CATEGORY, params, project, CPU, console)


def evaluated_anew(project, params, console):
    prepare_category(project, params)
    train("fapm", CATEGORY, params, project, CPU, console)
    return evaluate("fapm", CATEGORY, params, project, CPU)


def changed(project, section, **values):
    """The parameters with these in a section, on disk too."""
    content = tiny_params()
    content[section] |= values
    write_params(project.root, content)
    return load_checked(project.params)


def negate(path):
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)


def evaluation(project):
    return read_json(project.cell("fapm", CATEGORY, 0).evaluation)


@pytest.mark.usefixtures("trained")
def test_an_evaluation_is_written_whole(project, params):
    metrics = evaluate("fapm", CATEGORY, params, project, CPU)
    assert metrics["image_auroc"] == 1.0  # bright squares on noise
    assert metrics["pixel_auroc"] > 0.9
    folder = project.cell("fapm", CATEGORY, 0).evaluated
    figures = {"curves.json", "curves.png", "examples.png", "maps.npz", "panels"}
    assert {path.name for path in folder.iterdir()} == figures | {"evaluation.json", "pixels.npz", "predictions.csv"}
    assert len(list(folder.glob("panels/test/*/*.jpg"))) == 8
    flat = read_json(project.cell("fapm", CATEGORY, 0).metrics)
    assert flat["image_auroc"] == metrics["image_auroc"]
    assert flat["recall.square"] == evaluation(project)["defects"]["square"]["recall"]
    with (folder / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "split", "defect", "label", "score", "decision", "group"]
    assert [row["split"] for row in rows] == ["test"] * 8 + ["holdout"] * 3
    assert [row["defect"] for row in rows] == ["good"] * 4 + ["square"] * 4 + ["good"] * 3
    threshold = evaluation(project)["threshold"]
    assert all((float(row["score"]) > threshold["value"]) == (row["decision"] == "defect") for row in rows)
    # the file explains the threshold: it is one of the held-out scores, by its rank
    held_out = sorted(float(row["score"]) for row in rows if row["split"] == "holdout")
    assert threshold["value"] == held_out[threshold["rank"] - 1]


def test_groups_of_good_parts_are_told_apart(project, console, monkeypatch):
    """Twelve parts from 000 on, by their last digit."""
    params = changed(project, "prepare", groups={"pattern": r"([0-9])\.png"}, holdout=0.3)
    cross_fitted = []
    monkeypatch.setattr(held_out_parts, "cross_fit", lambda _, groups, batches: cross_fitted.append(groups) or iter(()))
    evaluated_anew(project, params, console)
    index = {image["path"]: image["group"] for image in read_json(project.prepared(CATEGORY) / "index.json")["images"]}
    rows = read_predictions(project.cell("fapm", CATEGORY, 0).evaluated)
    assert {row.path: row.group for row in rows} == {row.path: index[row.path] for row in rows}
    found = evaluation(project)["groups"]
    held_out = {group["name"] for group in found["groups"] if group["held_out"]}
    assert held_out == {row.group for row in rows if row.split == "holdout"}
    assert cross_fitted == [[row.group for row in rows if row.split == "holdout"]]
    assert not held_out & {group["name"] for group in found["groups"] if group["fitted"]}
    assert sum(group["fitted"] + (group["held_out"] or {"count": 0})["count"] for group in found["groups"]) == 12
    assert sum(group["tested"]["count"] for group in found["groups"] if group["tested"]) == 4
    assert 0 < found["p_value"] <= 1


def test_without_groups_there_is_no_word_of_them(project, params, console):
    evaluated_anew(project, params, console)
    assert evaluation(project)["groups"] is None


@pytest.mark.usefixtures("trained")
def test_an_evaluation_says_how_sure_it_is_and_of_which_images(project, params):
    metrics = evaluate("fapm", CATEGORY, params, project, CPU)
    found = evaluation(project)
    without = {"false_alarms_promised", "threshold", "train_seconds", "train_steps"}
    assert set(found["intervals"]) == set(metrics) - without
    for name, (low, high) in found["intervals"].items():
        assert low <= metrics[name] <= high
    # four good images and four squares, told apart perfectly
    assert found["intervals"]["image_auroc"] == [pytest.approx(0.025 ** (1 / 4)), 1.0]
    assert found["defects"]["square"]["recall_interval"] == [pytest.approx(0.025 ** (1 / 4)), 1.0]
    assert found["data_set"] == "images"
    cell = project.cell("fapm", CATEGORY, 0)
    again = read_outcome(cell.evaluated, Evaluation.load(cell.evaluation, "run it again"), "fapm")
    assert again.test_set.pixels_sha256 == found["pixels_sha256"]
    assert again.pixels.normal.sum() + again.pixels.anomalous.sum() == 8 * 64 * 64
    assert {name: list(ends) for name, ends in intervals_of(again).items()} == found["intervals"]


@pytest.mark.usefixtures("trained")
def test_the_test_images_have_a_hash_of_their_own(project, params, console):
    """A new training image changes the data and not the test; a new test image changes both."""
    evaluate("fapm", CATEGORY, params, project, CPU)
    before = evaluation(project)
    for split, changes in (("train", False), ("test", True)):
        negate(project.root / "images" / CATEGORY / split / "good" / "000.png")
        evaluated_anew(project, params, console)
        assert evaluation(project)["data_sha256"] != before["data_sha256"]
        assert (evaluation(project)["pixels_sha256"] != before["pixels_sha256"]) == changes


def test_recall_at_the_same_rate_for_all():
    """Of 20 good images 5 % is one: the threshold is the second highest good score."""

    def image(score, defect="good"):
        blank = np.zeros((1, 1), np.float32)
        return module.TestImage("", defect, defect != "good", score, blank, blank, None, 1, 1, None)

    results = [image(float(score)) for score in range(20)]
    results += [image(score, "cut") for score in (17.5, 18.0, 18.5, 19.5)]
    threshold = threshold_at(torch.arange(30.0), 0.05)
    assert threshold.value == 29.0
    found = module._defects(results, threshold)
    assert found["cut"].recall == 0.0
    assert found["cut"].recall_at_rate == 0.5  # 18.5 and 19.5 are above 18


@pytest.mark.usefixtures("trained")
def test_the_threshold_does_not_see_the_test_images(project, params, console):
    evaluate("fapm", CATEGORY, params, project, CPU)
    before = evaluation(project)["threshold"]
    for path in (project.root / "images" / CATEGORY / "test").rglob("*.png"):
        negate(path)
    evaluated_anew(project, params, console)
    after = evaluation(project)["threshold"]
    assert after["oracle"] != before["oracle"]
    assert {k: v for k, v in after.items() if k != "oracle"} == {k: v for k, v in before.items() if k != "oracle"}
    assert before["num_images"] == 3
    assert before["attainable"] is False  # 0.2 needs four held-out parts


@pytest.fixture
def sixth_trained(sixth_model, project, console):
    """A model that calibrates, on the three held-out parts."""
    params = load_checked(project.params)
    prepare_category(project, params)
    train(sixth_model, CATEGORY, params, project, CPU, console)
    return params


def held_out_scores(project, model):
    return {
        image.path: image.score
        for image in read_predictions(project.cell(model, CATEGORY, 0).evaluated)
        if image.split == "holdout"
    }


def test_what_calibrates_a_model_does_not_set_its_threshold(project, sixth_model, sixth_trained):
    """The sixth model's scale is the largest distance: the held-out parts score 1 at most where they set it."""
    cell = project.cell(sixth_model, CATEGORY, 0)
    weights = cell.weights.read_bytes()
    evaluate(sixth_model, CATEGORY, sixth_trained, project, CPU)
    assert cell.weights.read_bytes() == weights
    found = read_json(cell.evaluation)
    assert found["protocol"]["threshold_from"] == "held-out good parts, cross-fitted"
    trained = load_trained(cell, CPU)
    data = PreparedData(project.prepared(CATEGORY), Frame(Size.square(64), "bilinear", "stretch"), CPU)
    batches = [data.batch([row]) for row in data.rows("holdout")]
    deployed = [float(trained.model(batch.image).score) for batch in batches]
    assert max(deployed) == pytest.approx(1)
    expected = []
    for batch, own in zip(batches, deployed, strict=True):
        trained.model.calibrate([other for other in batches if other is not batch])
        expected.append(max(own, float(trained.model(batch.image).score)))
    assert list(held_out_scores(project, sixth_model).values()) == pytest.approx(expected)
    assert max(expected) > 1.0001
    assert found["threshold"]["value"] == pytest.approx(max(expected))
    assert found["threshold"]["pixel_value"] == found["threshold"]["value"]  # this model's score is its map's peak
    again = evaluate(sixth_model, CATEGORY, sixth_trained, project, CPU)
    assert again["threshold"] == found["threshold"]["value"]


def test_a_held_out_part_passes_the_networks_once(project, sixth_model, sixth_trained, monkeypatch):
    """Whoever scores it, and however many calibrate on it."""
    passed = []
    method = MODELS[sixth_model]._distances
    monkeypatch.setattr(MODELS[sixth_model], "_distances", lambda *given: passed.append(given[1]) or method(*given))
    evaluate(sixth_model, CATEGORY, sixth_trained, project, CPU)
    counts = read_json(project.cell(sixth_model, CATEGORY, 0).evaluation)["counts"]
    assert sum(map(len, passed)) == counts["holdout"] + counts["test_normal"] + counts["test_anomalous"]


def test_too_few_held_out_parts_to_cross_fit_promise_nothing(project, sixth_model, sixth_trained, monkeypatch):
    monkeypatch.setattr(MODELS[sixth_model], "min_holdout", 3)
    assert threshold_at(torch.rand(3), 0.5).attainable
    params = load_checked(project.params)
    params = params.model_copy(update={"evaluate": params.evaluate.model_copy(update={"false_alarm_rate": 0.5})})
    evaluate(sixth_model, CATEGORY, params, project, CPU)
    found = read_json(project.cell(sixth_model, CATEGORY, 0).evaluation)
    assert found["protocol"]["threshold_from"] == "held-out good parts, too few to cross-fit what they calibrate"
    assert found["threshold"]["attainable"] is False
    assert found["threshold"]["num_images_needed"] == 4
    assert max(held_out_scores(project, sixth_model).values()) == pytest.approx(1)


@pytest.mark.usefixtures("trained")
def test_where_all_good_parts_are_learnt_from_each_is_scored_by_a_model_of_the_others(project, console):
    params = changed(project, "prepare", holdout="folds")
    evaluated_anew(project, params, console)
    found = evaluation(project)
    assert (found["counts"]["train"], found["counts"]["holdout"]) == (12, 0)
    assert (found["threshold"]["num_images"], found["threshold"]["expected_rate"]) == (12, pytest.approx(2 / 13))
    assert found["protocol"]["threshold_from"] == "good parts, each scored by a model of the other folds"
    trained = load_trained(project.cell("fapm", CATEGORY, 0), CPU)
    data = trained.data(project, CPU)
    rows = data.rows("train")
    others = [row for row in rows if data.index.images[row].fold != 0]
    first = next(row for row in rows if data.index.images[row].fold == 0)
    own = float(trained.model(data.batch([first]).image).score)
    trained.model.prepare([data.batch(others)])
    score = float(trained.model(data.batch([first]).image).score)
    scores = {row.path: row.score for row in read_predictions(project.cell("fapm", CATEGORY, 0).evaluated)}
    assert scores[data.index.images[first].path] == pytest.approx(score, rel=1e-4)
    assert own < 0.9 * score  # it is in the memory of the model that ships


@pytest.mark.parametrize("step", ["prepare", "check_scores"])
def test_folds_that_leave_too_little_to_learn_from(project, console, monkeypatch, step):
    params = changed(project, "prepare", holdout="folds")
    prepare_category(project, params)
    train("fapm", CATEGORY, params, project, CPU, console)

    def refuses(model, batches):
        raise ModelError(f"{len([row for batch in batches for row in batch.row])} parts are too few")

    monkeypatch.setattr(MODELS["fapm"], step, refuses)
    number = {"prepare": 9, "check_scores": 3}[step]  # of twelve, in folds of three, three, two, two and two
    with pytest.raises(StageError, match=f"^fapm on {CATEGORY}, without a fold: {number} parts are too few"):
        evaluate("fapm", CATEGORY, params, project, CPU)


@pytest.mark.usefixtures("trained")
def test_what_does_not_calibrate_is_scored_once(project, params):
    evaluate("fapm", CATEGORY, params, project, CPU)
    assert evaluation(project)["protocol"]["threshold_from"] == "held-out good parts"


@pytest.mark.usefixtures("trained")
def test_streaming_agrees_with_exact(project, params):
    exact = evaluate("fapm", CATEGORY, params, project, CPU)
    streaming = evaluate("fapm", CATEGORY, changed(project, "evaluate", pixel_metrics="streaming"), project, CPU)
    for name in ("pixel_auroc", "aupro_30"):
        assert streaming[name] == pytest.approx(exact[name], abs=1e-5)
    assert streaming["image_auroc"] == exact["image_auroc"]


@pytest.mark.usefixtures("trained")
def test_native_resolution_brings_the_map_to_the_mask(project, monkeypatch):
    shapes = []
    split = module.Regions.split

    def noted(regions, anomaly_map, name):
        shapes.append((anomaly_map.shape, regions.shape))
        return split(regions, anomaly_map, name)

    monkeypatch.setattr(module.Regions, "split", noted)
    native = evaluate("fapm", CATEGORY, changed(project, "evaluate", resolution="native"), project, CPU)
    assert shapes == [((64, 80), (64, 80))] * 8  # the originals are 80 x 64, the arrays 64 x 64; each is taken once
    assert native["pixel_auroc"] > 0.9
    assert evaluation(project)["protocol"]["mask_resize"] == "none"


@pytest.mark.parametrize(("resolution", "shape"), [("prepared", (32, 32)), ("native", (32, 40))])
def test_pixels_of_the_centre_that_a_model_sees(project, console, monkeypatch, resolution, shape):
    """The border, which FAPM's map is 0 at, counts for nothing; decisions and figures of images do not change."""
    content = tiny_params()
    content["models"]["fapm"] |= {"crop": 32, "blur_sigma": 1.0}
    content["evaluate"] |= {"resolution": resolution}
    write_params(project.root, content)
    whole = evaluated_anew(project, load_checked(project.params), console)
    assert evaluation(project)["protocol"]["compared"] == 64
    threshold = evaluation(project)["threshold"]
    content["evaluate"] |= {"region": "seen"}
    write_params(project.root, content)
    pixels = []
    split = module.Regions.split

    def noted(regions, anomaly_map, name):
        pixels.append(split(regions, anomaly_map, name))
        return pixels[-1]

    monkeypatch.setattr(module.Regions, "split", noted)
    seen = evaluate("fapm", CATEGORY, load_checked(project.params), project, CPU)
    assert [len(p.normal) + len(p.anomalous) for p in pixels] == [shape[0] * shape[1]] * 8
    assert evaluation(project)["protocol"]["compared"] == 32
    assert evaluation(project)["threshold"] == threshold
    assert seen["pixel_auroc"] != whole["pixel_auroc"]
    assert seen["image_auroc"] == whole["image_auroc"]
    scores = np.concatenate([np.concatenate([p.normal, p.anomalous]) for p in pixels])
    labels = np.concatenate([[False] * len(p.normal) + [True] * len(p.anomalous) for p in pixels])
    assert seen["pixel_auroc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-6)


def test_a_category_without_masks_has_image_metrics_only(project, params, console):
    masks = project.root / "images" / CATEGORY / "ground_truth"
    masks.rename(project.root / "elsewhere")
    metrics = evaluated_anew(project, params, console)
    assert metrics["image_auroc"] == 1.0
    assert "pixel_auroc" not in metrics


@pytest.mark.usefixtures("trained")
def test_data_prepared_anew_asks_for_training(project):
    params = changed(project, "prepare", seed=1)  # split otherwise: a held-out part may have been trained on
    prepare_category(project, params)
    message = r"^squares: prepared anew since fapm was trained; run `blemish train fapm squares`"
    with pytest.raises(StageError, match=message):
        evaluate("fapm", CATEGORY, params, project, CPU)


def test_nothing_trained(project, params):
    with pytest.raises(StageError, match=r"no trained model; run `blemish train fapm squares` first$"):
        evaluate("fapm", CATEGORY, params, project, CPU)
