"""sPRO, worked by hand and against its definition; the F1 of pixels at a threshold that no test image sets."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import CATEGORY, tiny_params, write_params
from made_up import BOTH, put
from PIL import Image

from anomaly_models.common.sizes import Size
from pipelines.evaluation.certainty import average, compare, measure
from pipelines.evaluation.chance import differences
from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.metrics import ExactPixelMetrics, StreamingPixelMetrics
from pipelines.evaluation.outcomes import Evaluation, bin_edges, count_pixels, read_outcome
from pipelines.evaluation.regions import Regions, shrunk
from pipelines.files import read_json
from pipelines.pictures import images
from pipelines.pictures.frames import Shape
from pipelines.preparation.prepare import prepare
from pipelines.preview.check import load_checked
from pipelines.report import markdown
from pipelines.report.summary import summarise
from pipelines.report.terminal import one_line
from pipelines.training.train import train

METRICS = {"exact": ExactPixelMetrics, "streaming": StreamingPixelMetrics}


@pytest.fixture(params=METRICS)
def make(request):
    return METRICS[request.param]


def row_of(*scores):
    return np.array([scores], dtype=np.float32)


def mask_of(length, *places):
    mask = np.zeros((1, length), dtype=bool)
    mask[0, list(places)] = True
    return mask


def curve_of(make, *pictures):
    """The curve of several (map, masks, saturations)."""
    metrics = make()
    metrics.add(Regions.of_defects(masks, saturations).split(scores, "it") for scores, masks, saturations in pictures)
    return metrics.operating_points().curve


def literal_spro(pictures, limit):
    """By the definition: at each threshold the mean of min(found / saturation, 1), over all defects of all images."""
    unions = [np.any(masks, axis=0) for _, masks, _ in pictures]
    rates, overlaps = [0.0], [0.0]
    for threshold in np.unique(np.concatenate([scores.ravel() for scores, _, _ in pictures]))[::-1]:
        called = [scores >= threshold for scores, _, _ in pictures]
        normal = sum((~union).sum() for union in unions)
        rates.append(sum((c & ~union).sum() for c, union in zip(called, unions, strict=True)) / normal)
        found = [
            min((c & mask).sum() / saturation, 1)
            for c, (_, masks, saturations) in zip(called, pictures, strict=True)
            for mask, saturation in zip(masks, saturations, strict=True)
        ]
        overlaps.append(np.mean(found))
    area = 0.0
    for left, right, low, high in zip(rates[:-1], rates[1:], overlaps[:-1], overlaps[1:], strict=True):
        if left < limit and right > left:
            end = min(right, limit)
            area += (end - left) * (low + (low + (high - low) * (end - left) / (right - left))) / 2
    return area / limit


def test_a_part_of_a_defect_counts_as_all(make):
    """Four pixels of which two are enough, and six normal ones between them."""
    scores = row_of(9, 7, 3, 1, 8, 6, 5, 4, 2, 0)
    mask = mask_of(10, 0, 1, 2, 3)
    saturated = curve_of(make, (scores, [mask], [2]))
    # At 9 half of the two is found without a false pixel, at 8 one of six is false, at 7 both are found.
    assert saturated.aupro(0.05) == pytest.approx(0.5)
    assert saturated.aupro(0.3) == pytest.approx((0.5 / 6 + (0.3 - 1 / 6)) / 0.3)
    whole = curve_of(make, (scores, [mask], [4]))
    assert whole.aupro(0.05) == pytest.approx(0.25)
    assert whole.aupro(0.3) == pytest.approx((0.25 / 6 + 0.5 * (0.3 - 1 / 6)) / 0.3)


def test_every_mask_of_an_image_weighs_the_same_wherever_they_overlap(make):
    """The second mask shares a pixel with the first; a third is in another image."""
    scores = row_of(9, 8, 7, 6, 5, 4, 3, 2, 1, 0)
    masks = [mask_of(10, 1, 2, 3), mask_of(10, 3, 6)]
    other = row_of(9.5, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.04, 0.03, 0.02)
    curve = curve_of(make, (scores, masks, [1, 2]), (other, [mask_of(10, 1, 2)], [2]))
    # Of 6 + 8 normal pixels 9.5 and 9 are false. Then 8 fills the first mask, and 6 half of the second; 5 and 4 are
    # false, 3 is the other half, 2 and 1 are false: overlaps of 0, 1/2 and 2/3 over two of fourteen each.
    assert curve.aupro(2 / 14) == pytest.approx(0)
    assert curve.aupro(4 / 14) == pytest.approx((0 + 1 / 2) / 2)
    assert curve.aupro(6 / 14) == pytest.approx((0 + 1 / 2 + 2 / 3) / 3)
    assert curve.mean_overlap[-1] == pytest.approx(1)


def test_equal_scores_are_found_together(make):
    scores = row_of(5, 5, 5, 5, 1, 1, 1, 1)
    curve = curve_of(make, (scores, [mask_of(8, 0, 1, 4)], [2]))
    assert curve.mean_overlap.tolist()[-1] == pytest.approx(1)
    assert curve.aupro(1.0) == pytest.approx(0.5 * 0.4 + 0.6)  # 0 to 1 over two of five, then all of it


@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
def test_spro_by_its_definition(make, limit):
    rng = np.random.default_rng(3)
    pictures = []
    for number in range(5):
        scores = rng.normal(size=(20, 24)).astype(np.float32)
        masks, saturations = [], []
        for _ in range(number):
            top, left = rng.integers(0, 14, size=2)
            mask = np.zeros((20, 24), dtype=bool)
            mask[top : top + 6, left : left + 5] = True
            scores[mask] += 1
            masks.append(mask)
            saturations.append(int(rng.integers(1, 31)))
        pictures.append((scores, masks or [np.zeros((20, 24), dtype=bool)], saturations or [1]))
    own = [(scores, masks, saturations) for scores, masks, saturations in pictures if np.any(masks)]
    good = [picture for picture in pictures if not np.any(picture[1])]
    expected = literal_spro([*own, *[(scores, np.zeros((0, 20, 24), bool), []) for scores, _, _ in good]], limit)
    assert curve_of(make, *pictures).aupro(limit) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("limit", [0.05, 0.3])
def test_where_all_of_a_region_is_asked_for_it_is_aupro(make, limit):
    rng = np.random.default_rng(5)
    saturated, plain = make(), make()
    for _ in range(4):
        scores = rng.normal(size=(16, 16)).astype(np.float32)
        mask = np.zeros((16, 16), dtype=bool)
        mask[3:9, 4:11] = True
        scores[mask] += 1
        saturated.add([Regions.of_defects([mask], [42]).split(scores, "it")])
        plain.add([Regions.of(mask).split(scores, "it")])
    assert saturated.operating_points().curve.aupro(limit) == plain.operating_points().curve.aupro(limit)


def test_outside_the_window_there_is_no_defect():
    masks = [mask_of(10, 0, 1), mask_of(10, 4, 5, 6)]
    window = (slice(None), slice(3, 9))
    regions = Regions.of_defects(masks, [2, 3], window)
    assert regions.count == 1
    cut = Regions.of_defects(masks, [2, 3], (slice(None), slice(5, 10)))
    assert [defect.saturation for defect in cut.defects] == [2]  # no more than what is left of it


def test_a_defect_never_vanishes_when_it_shrinks():
    mask = np.zeros((40, 60), dtype=bool)
    mask[1, 58] = True
    assert not images.resize_mask(mask, Size.square(10)).any()
    assert np.argwhere(shrunk(mask, Shape(Size.square(10), "stretch"))).tolist() == [[0, 9]]


def test_pixels_called_at_the_deployed_threshold():
    """Three of four anomalous pixels above it, one at it, and one normal pixel above it: 2 * 3 / (4 + 3 + 1)."""
    scores = row_of(9, 8, 7, 6, 6.5, 6, 5, 4)
    pixels = [
        Regions.of(mask_of(8, 0, 1, 2, 3)).split(scores, "it"),
        Regions.of(mask_of(8)).split(row_of(*[0] * 8), "it"),
    ]
    metrics = ExactPixelMetrics()
    metrics.add(pixels)
    counts = count_pixels(pixels, bin_edges(metrics.operating_points().curves().threshold), 6.0)
    assert counts.called.tolist() == [[1, 3], [0, 0]]
    assert counts.f1 == pytest.approx(6 / 8)
    assert counts.f1 < metrics.operating_points().result().f1_max == pytest.approx(6 / 7)


# All the way


def as_loco(root):
    """Turn the drawn category into MVTec LOCO's folders, each defect with two masks: its upper and its lower half."""
    category = root / "images" / CATEGORY
    (category / "test/square").rename(category / "test/structural_anomalies")
    held_out = sorted((category / "train/good").iterdir())[:3]
    (category / "validation/good").mkdir(parents=True)
    for path in held_out:
        path.rename(category / "validation/good" / path.name)
    truth = category / "ground_truth"
    for path in sorted((truth / "square").iterdir()):
        folder = truth / "structural_anomalies" / path.name.removesuffix("_mask.png")
        folder.mkdir(parents=True)
        mask = np.asarray(Image.open(path))
        rows = np.arange(len(mask))[:, None]
        middle = int(np.argwhere(mask)[:, 0].mean())
        Image.fromarray(np.where(rows <= middle, mask, 0).astype(np.uint8)).save(folder / "000.png")
        Image.fromarray(np.where((rows > middle) & (mask > 0), 254, 0).astype(np.uint8)).save(folder / "001.png")
    shutil.rmtree(truth / "square")
    entry = {"defect_name": "absolute", "pixel_value": 255, "saturation_threshold": 30, "relative_saturation": False}
    relative = {"defect_name": "relative", "pixel_value": 254, "saturation_threshold": 0.5, "relative_saturation": True}
    (category / "defects_config.json").write_text(json.dumps([entry, relative]))


def prepared_and_trained(project, params, console):
    source = project.root / "images" / CATEGORY
    prepare(source, CATEGORY, params.prepare, params.views().frames, project.prepared(CATEGORY), lambda *_: None)
    train("fapm", CATEGORY, params, project, torch.device("cpu"), console)


@pytest.mark.parametrize("pixel_metrics", ["exact", "streaming"])
@pytest.mark.parametrize("resolution", ["prepared", "native"])
def test_a_category_of_loco_has_spro_in_place_of_aupro(project, console, resolution, pixel_metrics):
    as_loco(project.root)
    content = tiny_params()
    content["evaluate"] |= {"resolution": resolution, "pixel_metrics": pixel_metrics}
    write_params(project.root, content)
    params = load_checked(project.params)
    prepared_and_trained(project, params, console)
    metrics = evaluate("fapm", CATEGORY, params, project, torch.device("cpu"))
    assert 0 < metrics["spro_05"] <= 1
    assert 0 <= metrics["pixel_f1"] <= metrics["pixel_f1_max"]
    assert not metrics.keys() & {"aupro_30", "aupro_05"}
    cell = project.cell("fapm", CATEGORY, 0)
    assert read_json(cell.metrics)["spro_05"] == metrics["spro_05"]
    evaluation = Evaluation.load(cell.evaluation, "again")
    assert set(evaluation.intervals) >= {"spro_05", "pixel_f1"}
    outcome = read_outcome(cell.evaluated, evaluation, "fapm")
    assert outcome.pixels.saturated.sum() == 4
    assert outcome.pixels.regions.sum() == pytest.approx(8, abs=1e-4)  # two defects in each of four images
    found = differences(outcome, read_outcome(cell.evaluated, evaluation, "other"), 20)
    assert found["spro_05"].observed == 0
    assert "aupro_30" not in found
    assert "sPRO 0.05" in one_line(evaluation.metrics)
    assert "AUPRO" not in one_line(evaluation.metrics)


def put_mixed(project):
    """Two models on a category with AUPRO, and on one that has sPRO in its place."""
    for model, auroc in (("a", 0.98), ("b", 0.75)):
        put(project, model, "nut", auroc=auroc)
        folder = project.cell(model, "my bolt", 0).evaluated
        found = put(project, model, "my bolt", auroc=auroc, seed=1)
        spro = found.metrics["aupro_05"]
        metrics = {name: value for name, value in found.metrics.items() if not name.startswith("aupro")}
        found.model_copy(update={"metrics": metrics | {"spro_05": spro}}).save(folder / "evaluation.json")
        with np.load(folder / "pixels.npz") as arrays:
            content = dict(arrays)
        np.savez(folder / "pixels.npz", **content | {"saturated": content["anomalous"].any(axis=1)})


def test_averages_are_over_the_categories_that_have_the_metric(project):
    put_mixed(project)
    summary = summarise(BOTH, project)
    rows = summary.rows
    for model in "ab":
        mean = rows[model, "average"].metrics
        assert mean["aupro_30"] == rows[model, "nut"].metrics["aupro_30"]
        assert mean["spro_05"] == rows[model, "my bolt"].metrics["spro_05"]
        both = [rows[model, category].metrics["pixel_auroc"] for category in ("nut", "my bolt")]
        assert mean["pixel_auroc"] == pytest.approx(sum(both) / 2)
    compared = {(found.metric, found.category): found for found in summary.comparisons}
    assert compared["spro_05", "average"].num_images == compared["spro_05", "my bolt"].num_images == 40
    assert compared["spro_05", "average"].difference == compared["spro_05", "my bolt"].difference
    assert compared["aupro_30", "average"].verdict != "refused"
    assert compared["pixel_auroc", "average"].num_images == 80
    lines = markdown.leaderboard_table(summary).splitlines()
    place = lines[0].split(" | ").index("sPRO 0.05")
    shown = [line.split(" | ")[place] for line in lines[2:5]]
    assert shown[0] == "-"
    assert shown[2] == f"**{shown[1]}**"
    assert "sPRO 0.05" in markdown.headlines(summary)[0]


def test_a_category_without_masks_still_leaves_no_average(project):
    put(project, "a", "nut")
    put(project, "a", "my bolt", masks=False)
    cells = [
        measure(read_outcome(folder, Evaluation.load(folder / "evaluation.json", "again"), "a"), 20)
        for folder in (project.cell("a", "nut", 0).evaluated, project.cell("a", "my bolt", 0).evaluated)
    ]
    row = average(cells)
    assert not row.values.keys() & {"aupro_30", "spro_05", "pixel_f1"}
    assert compare("aupro_30", row, row).verdict == "refused"
