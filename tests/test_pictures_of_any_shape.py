"""From files to a decision where pictures are of many shapes, or only a region of them is looked at."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from banded import picture_size
from conftest import CATEGORY, tiny_params, write_params
from PIL import Image

from pipelines.data.index import PreparedIndex, frames_in
from pipelines.evaluation.outcomes import Evaluation
from pipelines.inference.detector import Detector
from pipelines.paths import Project

SIZES = ((80, 64), (64, 96), (120, 60), (60, 120))  # (width, height)
STAGES = (
    ("prepare", CATEGORY),
    ("train", "fapm", CATEGORY),
    ("evaluate", "fapm", CATEGORY),
    ("export", "fapm", CATEGORY),
)


def draw(path: Path, size: tuple[int, int], seed: int, square: tuple[int, int] | None = None) -> None:
    """A grey part, with a bright square of 14 pixels at (left, top) where asked, and its mask."""
    width, height = size
    pixels = np.random.default_rng(seed).normal(110, 12, (height, width, 3)).clip(0, 255).astype(np.uint8)
    mask = np.zeros((height, width), np.uint8)
    if square is not None:
        left, top = square
        pixels[top : top + 14, left : left + 14] = 240
        mask[top : top + 14, left : left + 14] = 255
        mask_path = path.parents[2] / "ground_truth" / path.parent.name / f"{path.stem}_mask.png"
        mask_path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(mask_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def draw_all(root: Path, sizes: tuple[tuple[int, int], ...], squares: tuple[tuple[int, int], ...]) -> Path:
    folder = root / "images" / CATEGORY
    for split, kind, number in (("train", "good", 12), ("test", "good", 4), ("test", "square", 4)):
        for index in range(number):
            square = squares[index % len(squares)] if kind == "square" else None
            path = folder / split / kind / f"{index:03}.png"
            draw(path, sizes[index % len(sizes)], seed=100 * len(kind) + index + 50 * (split == "test"), square=square)
    return folder


def changed(root: Path, fit: str, **prepare: Any) -> None:
    values = tiny_params()
    values["models"]["fapm"]["fit"] = fit
    values["prepare"] |= prepare
    write_params(root, values)


def works(blemish: Any, *verbs: Any) -> str:
    for verb in verbs:
        outcome = blemish(*verb)
        assert outcome.code == 0, outcome.err
    return str(outcome.out)


def fails(blemish: Any, *verb: str) -> str:
    outcome = blemish(*verb)
    assert outcome.code == 1
    return str(outcome.err)


def scores(path: Path) -> dict[str, float]:
    """By path in the category's folder."""
    with path.open(encoding="utf-8") as file:
        return {"/".join(Path(row["path"]).parts[-3:]): float(row["score"]) for row in csv.DictReader(file)}


@pytest.mark.parametrize("fit", ["pad", "crop"])
@pytest.mark.parametrize("resolution", ["prepared", "native"])
def test_the_number_you_saw_is_the_one_you_ship(root: Path, blemish: Any, fit: str, resolution: str) -> None:
    folder = draw_all(root, SIZES, ((20, 20), (25, 41), (53, 23), (23, 53)))  # in the middle, where any crop looks
    changed(root, fit)
    values = (root / "params.yaml").read_text()
    (root / "params.yaml").write_text(values.replace("resolution: prepared", f"resolution: {resolution}"))
    works(blemish, ["check"], *STAGES, ["latency", "fapm", CATEGORY], ["report"])
    project = Project(root)
    cell = project.cell("fapm", CATEGORY, 0)
    assert [frame.fit for frame in frames_in(project.prepared(CATEGORY))] == [fit]
    evaluation = Evaluation.load(cell.evaluation, "evaluate")
    assert evaluation.protocol.fit == fit
    assert evaluation.metrics["image_auroc"] == 1
    assert evaluation.metrics["pixel_auroc"] is not None
    assert evaluation.metrics["pixel_auroc"] > 0.9
    works(blemish, ["predict", str(cell.onnx), str(folder / "test")])
    predicted, evaluated = scores(root / "predictions" / "predictions.csv"), scores(cell.predictions)
    assert len(predicted) == 8
    for name, score in predicted.items():
        assert score == pytest.approx(evaluated[name], abs=1e-3 * max(1, abs(score)))
    for index, size in enumerate(SIZES):
        with Image.open(root / "predictions" / "overlays" / "square" / f"{index:03}.png") as overlay:
            assert picture_size(overlay) == size


def test_borders_never_raise_an_alarm(root: Path, blemish: Any) -> None:
    """The map of a long part is 0 above and below it, and highest where its defect is."""
    folder = draw_all(root, ((120, 60),), ((50, 20),))
    changed(root, "pad")
    works(blemish, *STAGES)
    detector = Detector(Project(root).cell("fapm", CATEGORY, 0).onnx)
    inputs = detector.load(folder / "test/square/000.png")
    assert inputs.region is not None
    anomaly_map, _ = detector(inputs)
    assert (anomaly_map[:, 0][~inputs.region] == 0).all()
    row, column = np.unravel_index(anomaly_map[0, 0].argmax(), anomaly_map.shape[2:])
    assert abs(row - (16 + 27 * 64 / 120)) < 8
    assert abs(column - 57 * 64 / 120) < 8


LEFT = {CATEGORY: {"polygons": [[[0, 0], [39, 0], [39, 63], [0, 63]]]}}


def test_only_the_region_of_interest_counts(root: Path, blemish: Any) -> None:
    folder = draw_all(root, ((80, 64),), ((10, 10), (60, 30)))  # every second defect lies outside
    changed(root, "stretch", regions=LEFT)
    told = blemish("prepare", CATEGORY)
    assert told.code == 0, told.err
    assert "2 masks with fewer regions at 64 pixels" in told.out + told.err
    assert "lies outside of what is seen" in told.out + told.err
    works(blemish, *STAGES[1:], ["report"])
    cell = Project(root).cell("fapm", CATEGORY, 0)
    evaluation = Evaluation.load(cell.evaluation, "evaluate")
    assert evaluation.protocol.region == "the region of interest"
    found = scores(cell.predictions)
    inside, outside = ([found[f"test/square/{index:03}.png"] for index in places] for places in ((0, 2), (1, 3)))
    assert min(inside) > evaluation.threshold.value
    assert max(outside) < min(inside) / 2
    detector = Detector(cell.onnx)
    changed_outside = folder / "test/good/changed.png"
    pixels = np.array(Image.open(folder / "test/good/000.png"))
    pixels[:, 41:] = 255
    Image.fromarray(pixels).save(changed_outside)
    before, after = (detector(detector.load(folder / f"test/good/{name}.png")) for name in ("000", "changed"))
    np.testing.assert_array_equal(before[0], after[0])
    np.testing.assert_array_equal(before[1], after[1])
    draw(root / "elsewhere" / "other.png", (64, 80), seed=1)
    outcome = blemish("predict", str(cell.onnx), str(root / "elsewhere"))
    assert outcome.code == 1
    assert "64 x 80 pixels, but the model's region of interest is of pictures of 80 x 64" in outcome.out + outcome.err


def test_a_region_may_be_a_mask(root: Path, blemish: Any) -> None:
    folder = draw_all(root, ((80, 64),), ((10, 10),))
    marked = np.zeros((64, 80), np.uint8)
    marked[:, :40] = 255
    Image.fromarray(marked).save(folder / "region.png")
    changed(root, "stretch", regions={CATEGORY: {"mask": "region.png"}})
    works(blemish, STAGES[0])
    index = PreparedIndex.load(Project(root).prepared(CATEGORY))
    assert index.of_interest is not None
    np.testing.assert_array_equal(index.of_interest, marked > 0)
    Image.fromarray(np.full((64, 80), 255, np.uint8)).save(folder / "region.png")
    drawn = index.region
    works(blemish, STAGES[0])
    assert PreparedIndex.load(Project(root).prepared(CATEGORY)).region != drawn


def test_regions_that_cannot_be(root: Path, blemish: Any) -> None:
    folder = draw_all(root, ((80, 64),), ((10, 10),))

    def told(region: dict[str, Any], category: str = CATEGORY) -> str:
        changed(root, "stretch", regions={category: region})
        return fails(blemish, "prepare", CATEGORY)

    Image.fromarray(np.full((32, 40), 255, np.uint8)).save(folder / "half.png")
    Image.fromarray(np.zeros((64, 80), np.uint8)).save(folder / "black.png")
    assert "20 pictures of another size than the region of interest, which is of 40 x 32 pixels: " in told(
        {"mask": "half.png"}
    )
    assert "prepare.regions.squares: nothing is left of the pictures" in told({"mask": "black.png"})
    assert "nothing.png: cannot be read" in told({"mask": "nothing.png"})
    assert "the corner [81, 0] (x, y) lies outside of 000.png, which is 80 x 64 pixels" in told(
        {"polygons": [[[0, 0], [81, 0], [0, 9]]]}
    )
    assert "give either `mask` or `polygons`" in told({})
    assert "must lie in the category's own folder" in told({"mask": "../mask.png"})
    assert "'squars' is not among data.categories (did you mean 'squares'?)" in told({"mask": "half.png"}, "squars")
