"""From files to a decision where a model sees a picture tile by tile."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from conftest import CATEGORY, FAPM, tiny_params, write_params
from drawn_batches import batch_of, seeded
from PIL import Image
from test_pictures_of_any_shape import STAGES, draw_all, fails, scores, works

from anomaly_models import MODELS
from anomaly_models.base import Config
from anomaly_models.common.settings import Size
from pipelines.data.batches import PreparedData, frame_of
from pipelines.data.tiled import TiledData, learnt_from, whole
from pipelines.evaluation.outcomes import Evaluation
from pipelines.inference.detector import Detector, Inputs
from pipelines.paths import Project
from pipelines.pictures.tiles import tiling
from pipelines.preview.check import load_checked

CPU = torch.device("cpu")
LONG = (224, 96)  # (width, height) of the pictures
PICTURE = {"height": 96, "width": 224}
TILES = {"side": 64, "overlap": 16}  # 2 x 5 of them
SEAM = (60, 40)  # left, top of a defect where four tiles meet


def section(name: str) -> dict[str, Any]:
    """Of each model its smallest settings, that a category can be trained with where its backbone has weights."""
    found = dict(FAPM if name == "fapm" else tiny_models.SETTINGS[name])
    if name in ("adfa", "bgad"):
        found["backbone"] = FAPM["backbone"]
    if name == "efficient_ad":
        size, tiles = {"height": 160, "width": 256}, {"side": 128, "overlap": 32}
    else:
        size, tiles = PICTURE, TILES
    return found | {"image_size": size, "tiles": tiles}


def configured(name: str) -> Config:
    found: Config = MODELS[name].Config.model_validate(section(name))
    return found


def cut_up(root: Path, name: str = "fapm", **prepare: Any) -> None:
    values = tiny_params()
    values["models"] = {name: section(name)}
    values["prepare"] |= prepare
    write_params(root, values)


def stages(name: str) -> list[list[str]]:
    return [[name if word == "fapm" else word for word in stage] for stage in STAGES]


@pytest.fixture
def pictures(root: Path) -> Path:
    return draw_all(root, (LONG,), (SEAM, (10, 10), (200, 70), (120, 40)))


@pytest.mark.parametrize("name", ["adfa", "bgad", "fapm"])
def test_the_number_you_saw_is_the_one_you_ship(root: Path, blemish: Any, pictures: Path, name: str) -> None:
    """The parity gate starts from the files; a defect on a seam is found as any other."""
    cut_up(root, name)
    works(blemish, ["check"], *stages(name), ["latency", name, CATEGORY])
    cell = Project(root).cell(name, CATEGORY)
    evaluation = Evaluation.load(cell.evaluation, "evaluate")
    assert evaluation.protocol.image_size == Size(**PICTURE)
    assert evaluation.metrics["image_auroc"] == 1
    assert (evaluation.metrics["pixel_auroc"] or 0) > 0.9
    assert json.loads(cell.parity.read_text())["num_images"] == evaluation.counts.num_tested
    works(blemish, ["predict", str(cell.onnx), str(pictures / "test")], ["report"])
    predicted, evaluated = scores(root / "predictions" / "predictions.csv"), scores(cell.predictions)
    for path, score in evaluated.items():
        if path.startswith("test"):
            assert predicted[path] == pytest.approx(score, abs=1e-3 * max(1, abs(score)))
    with Image.open(root / "predictions" / "overlays" / "square" / "000.png") as overlay:
        assert overlay.size == LONG


def test_the_map_is_highest_on_the_defect_and_the_same_in_any_batch(root: Path, blemish: Any, pictures: Path) -> None:
    cut_up(root)
    works(blemish, *STAGES)
    detector = Detector(Project(root).cell("fapm", CATEGORY).onnx)
    assert detector.card.input_size == Size(64, 64)
    inputs = [detector.load(pictures / f"test/square/{number:03}.png") for number in range(4)]
    maps, found = detector(Inputs.together(inputs))
    assert maps.shape == (4, 1, 96, 224)
    for number, (left, top) in enumerate((SEAM, (10, 10), (200, 70), (120, 40))):
        alone = detector(inputs[number])
        np.testing.assert_array_equal(maps[number : number + 1], alone[0])
        np.testing.assert_array_equal(found[number : number + 1], alone[1])
        assert found[number] == maps[number].max()
        row, column = np.unravel_index(maps[number, 0].argmax(), (96, 224))
        assert abs(row - top - 7) < 10
        assert abs(column - left - 7) < 10


def test_of_a_constant_picture_the_map_shows_no_seam(root: Path, blemish: Any, pictures: Path) -> None:
    """Its tiles are alike, and so are their maps; from one to the next it goes over without a step."""
    cut_up(root)
    works(blemish, *STAGES)
    detector = Detector(Project(root).cell("fapm", CATEGORY).onnx)
    anomaly_map = detector(Inputs(np.full((1, 96, 224, 3), 110, np.uint8), None))[0][0, 0]
    tile = detector.graph(np.full((1, 3, 64, 64), np.float32(110) / np.float32(255)), None)[0][0, 0]
    steepest = max(np.abs(np.diff(tile, axis=axis)).max() for axis in (0, 1))
    for axis in (0, 1):
        assert np.abs(np.diff(anomaly_map, axis=axis)).max() <= steepest + (tile.max() - tile.min()) / 16
    assert tile.min() - 1e-5 <= anomaly_map.min() <= anomaly_map.max() <= tile.max() + 1e-5


def test_a_picture_that_is_smaller_than_a_tile_is_one(root: Path, blemish: Any) -> None:
    """And is what it would be without tiles."""
    draw_all(root, ((80, 64),), ((20, 20),))
    found = []
    for tiles in (None, {"side": 100, "overlap": 10}):
        values = tiny_params()
        values["models"] = {"adfa": section("adfa") | {"image_size": 64, "tiles": tiles}}
        write_params(root, values)
        works(blemish, *stages("adfa"))
        found.append(scores(Project(root).cell("adfa", CATEGORY).predictions))
    assert found[1] == pytest.approx(found[0])


def prepared(root: Path, blemish: Any, **prepare: Any) -> tuple[PreparedData, TiledData, Config]:
    cut_up(root, **prepare)
    works(blemish, STAGES[0])
    config = load_checked(root / "params.yaml").model_config_of("fapm")
    data = PreparedData(Project(root).prepared(CATEGORY), frame_of(config), CPU)
    tiles = learnt_from(data, config)
    assert isinstance(tiles, TiledData)
    return data, tiles, config


@pytest.mark.usefixtures("pictures")
def test_training_sees_the_tiles_of_the_good_parts_and_the_marked_ones_of_defects(root: Path, blemish: Any) -> None:
    data, tiles, config = prepared(root, blemish, anomalous_train={"count": 2, "protocol": "spread"})
    cut = tiling(config.image_size, config.tiles)
    assert cut is not None
    windows = list(cut)
    assert len(windows) == 2 * 5
    assert len(tiles.rows("train")) == 10 * len(data.rows("train"))
    batch = tiles.batch(tiles.rows("train")[7:12])
    for place, tile in enumerate(tiles.rows("train")[7:12]):
        image = data.batch([tile // 10]).image[0]
        torch.testing.assert_close(batch.image[place], image[:, *windows[tile % 10]], rtol=0, atol=0)
    taught = tiles.rows("anomalous_train")
    assert 2 <= len(taught) <= 8
    shown = tiles.batch(taught)
    assert shown.label.all()
    assert (shown.mask.amax(dim=(1, 2, 3)) == 1).all()
    assert shown.row is not None
    assert shown.row.tolist() == taught
    of_image = data.batch(data.rows("anomalous_train")).mask > 0
    marked = sum(bool(mask[..., *window].any()) for mask in of_image for window in windows)
    assert marked == len(taught)
    again = tiles.training_batch(0, 3, 5)
    assert torch.equal(again.image, tiles.training_batch(0, 3, 5).image)


@pytest.mark.usefixtures("pictures")
def test_where_nothing_of_a_tile_counts_nothing_is_learnt_from_it(root: Path, blemish: Any) -> None:
    left = {CATEGORY: {"polygons": [[[0, 0], [39, 0], [39, 95], [0, 95]]]}}
    data, tiles, _ = prepared(root, blemish, regions=left)
    assert len(tiles.rows("train")) == 2 * len(data.rows("train"))  # the first column of tiles
    region = tiles.batch(tiles.rows("train")[:2]).region
    assert region is not None
    assert region.shape == (2, 1, 64, 64)
    assert region[..., :40].all()
    assert not region[..., 40:].any()
    works(blemish, *STAGES[1:])
    cell = Project(root).cell("fapm", CATEGORY)
    detector = Detector(cell.onnx)
    anomaly_map, _ = detector(detector.load(root / "images" / CATEGORY / "test/square/001.png"))
    assert (anomaly_map[..., 40:] == 0).all()
    row, column = np.unravel_index(anomaly_map[0, 0].argmax(), (96, 224))
    assert abs(row - 17) < 10
    assert abs(column - 17) < 10


@pytest.mark.parametrize("name", MODELS)
def test_the_score_is_that_of_the_whole_map(name: str) -> None:
    config = configured(name)
    torch.manual_seed(0)
    model = MODELS[name](config.network)
    tiny_models.pretrain(model)
    size = config.network.image_size
    model.prepare([batch_of(torch.rand(4, 3, *size, generator=seeded(seed))) for seed in range(2)])
    model.eval()
    image = torch.rand(2, 3, *config.image_size, generator=seeded(9))
    prediction = whole(model, config)(image, None)
    assert prediction.anomaly_map.shape == (2, 1, *config.image_size)
    highest = prediction.anomaly_map.flatten(1).topk(config.scored_pixels).values.mean(dim=1)
    torch.testing.assert_close(prediction.score, highest)


def problem(root: Path, blemish: Any, name: str, **changes: Any) -> str:
    values = tiny_params()
    values["models"] = {name: section(name) | changes}
    write_params(root, values)
    return fails(blemish, "check")


def test_tiles_that_cannot_be(root: Path, blemish: Any) -> None:
    assert "overlap 64 is not below side 64: tiles would not advance; lower it" in problem(
        root, blemish, "fapm", tiles={"side": 64, "overlap": 64}
    )
    assert "models.fapm.tiles.overlap = -1: " in problem(root, blemish, "fapm", tiles={"side": 64, "overlap": -1})
    assert "set image_score: max" in problem(root, blemish, "fapm", image_score="released")
    assert "crop must be 64, found 32" in problem(root, blemish, "fapm", crop=32)
    assert "image_size" in problem(root, blemish, "efficient_ad", tiles={"side": 64, "overlap": 8})


def test_what_a_model_reads_is_of_the_size_of_a_tile(root: Path, blemish: Any) -> None:
    values = tiny_params()
    values["models"] = {"diffusion_ad": section("diffusion_ad")}
    values["textures"] = {"diffusion_ad": {"image_size": 96, "limit": 5}}
    write_params(root, values)
    told = fails(blemish, "check")
    assert "textures.diffusion_ad.image_size = 96: models.diffusion_ad.tiles is 64" in told


@pytest.mark.parametrize("name", MODELS)
def test_settings_with_tiles_survive_a_file(name: str) -> None:
    """As `run.json` keeps them."""
    config = configured(name)
    assert MODELS[name].Config.model_validate(config.model_dump()) == config
    assert config.network.tiles is None
    assert config.network.image_size == Size.square(section(name)["tiles"]["side"])
    assert config.image_size == Size(**section(name)["image_size"])


@pytest.mark.usefixtures("pictures")
def test_what_it_would_cost_counts_tiles(root: Path, blemish: Any) -> None:
    cut_up(root)
    works(blemish, STAGES[0])
    told = works(blemish, ["train", "--dry-run", "fapm", CATEGORY])
    assert f"fapm on {CATEGORY}, 64 pixels" in told
    assert "one pass over 90 normal tiles" in told  # 9 pictures of 10
