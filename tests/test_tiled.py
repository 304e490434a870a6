"""From files to a decision where a model sees a picture tile by tile."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from banded import picture_size
from conftest import CATEGORY, FAPM, tiny_params, write_params
from drawn_batches import assert_agree, batch_of, seeded
from PIL import Image
from test_pictures_of_any_shape import SIZES, STAGES, draw, draw_all, fails, scores, works

from anomaly_models import MODELS
from anomaly_models.base import AnomalyModel, Batch, Config
from anomaly_models.common.sizes import Size
from pipelines.data.batches import PreparedData, frame_of
from pipelines.data.tiled import TiledData, learnt_from, whole
from pipelines.deployment.export import write_graph
from pipelines.deployment.records import Int8
from pipelines.evaluation.outcomes import Evaluation
from pipelines.inference.detector import Detector
from pipelines.inference.engine import Inputs
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
    if name == "adfa":
        found |= {"epochs": 0, "centres": {"name": "coreset", "number": 64, "per_image": 500}, "kl_weight": False}
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


@pytest.mark.parametrize("name", ["adfa", pytest.param("bgad", marks=pytest.mark.slow), "fapm"])
def test_the_number_you_saw_is_the_one_you_ship(root: Path, blemish: Any, pictures: Path, name: str) -> None:
    """The parity gate starts from the files; a defect on a seam is found as any other."""
    cut_up(root, name)
    works(blemish, ["check"], *stages(name), ["latency", name, CATEGORY])
    cell = Project(root).cell(name, CATEGORY, 0)
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
        assert picture_size(overlay) == LONG
    if name == "fapm":
        assert_highest_on_the_defects(Detector(cell.onnx), pictures)


def test_an_int8_file_is_shown_tiles_with_their_numbers_and_regions(root: Path, blemish: Any, pictures: Path) -> None:
    values = tiny_params()
    values["models"] = {"fapm": section("fapm") | {"fit": "pad"}}
    values["export"] |= {"precisions": ["float32", "int8"], "max_decisions_changed": 0.5}
    write_params(root, values)
    works(blemish, *STAGES)
    cell = Project(root).cell("fapm", CATEGORY, 0)
    found, detector = Int8.load(cell.int8_proof, "export"), Detector(cell.int8)
    assert found.refused is None
    assert found.num_calibrating == 64  # tiles, of ten for each good part
    assert (detector.card.by_tile, detector.card.takes_region) == (True, True)
    for image in found.images:
        _, (score,) = detector(detector.load(pictures / image.path))
        assert score == pytest.approx(image.score, rel=1e-6)


def test_pictures_of_many_sizes_are_cut_up_at_their_own_scale(root: Path, blemish: Any) -> None:
    """Nothing is resized: pixels, masks and maps are those of the originals, whatever surrounds them."""
    folder = draw_all(root, SIZES, ((20, 20), (25, 41), (53, 23), (23, 53)))
    values = tiny_params()
    values["models"] = {"fapm": section("fapm") | {"image_size": 120, "fit": "native", "grid": 1}}
    write_params(root, values)
    works(blemish, ["check"], *STAGES, ["report"])
    cell = Project(root).cell("fapm", CATEGORY, 0)
    evaluation = Evaluation.load(cell.evaluation, "evaluate")
    assert evaluation.metrics["image_auroc"] == 1
    assert (evaluation.metrics["pixel_auroc"] or 0) > 0.9
    works(blemish, ["predict", str(cell.onnx), str(folder / "test")])
    predicted, evaluated = scores(root / "predictions" / "predictions.csv"), scores(cell.predictions)
    for path, score in predicted.items():
        assert score == pytest.approx(evaluated[path], abs=1e-3 * max(1, abs(score)))
    for index, size in enumerate(SIZES):
        with Image.open(root / "predictions" / "overlays" / "square" / f"{index:03}.png") as overlay:
            assert picture_size(overlay) == size
    detector = Detector(cell.onnx)
    inputs = detector.load(folder / "test/good/000.png")
    with Image.open(folder / "test/good/000.png") as picture:
        assert inputs.region is not None
        np.testing.assert_array_equal(
            inputs.pixels[inputs.region].reshape(64, 80, 3), np.asarray(picture.convert("RGB"))
        )
    draw(folder.parent / "elsewhere" / "other.png", (121, 64), seed=1)
    told = fails(blemish, "predict", str(cell.onnx), str(folder.parent / "elsewhere"))
    assert "121 x 64 pixels, but its model does not resize and takes up to 120 x 120" in told


def test_a_picture_that_is_not_resized_must_go_into_the_frame(root: Path, blemish: Any) -> None:
    draw_all(root, SIZES, ((20, 20),))
    values = tiny_params()
    values["models"]["fapm"] |= {"fit": "native"}
    write_params(root, values)
    told = fails(blemish, "prepare", CATEGORY)
    assert "20 pictures larger than image_size 64, which `fit: native` does not resize to: train/good/000.png" in told
    assert "set image_size: {height: 120, width: 120}" in told


def assert_highest_on_the_defects(detector: Detector, pictures: Path) -> None:
    """And the same in any batch."""
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
    values = tiny_params()
    values["models"] = {"fapm": section("fapm") | {"grid": 1}}  # one memory for all of them
    write_params(root, values)
    works(blemish, *STAGES)
    detector = Detector(Project(root).cell("fapm", CATEGORY, 0).onnx)
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
        works(blemish, *stages("adfa")[:-1])
        found.append(scores(Project(root).cell("adfa", CATEGORY, 0).predictions))
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
    cell = Project(root).cell("fapm", CATEGORY, 0)
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
    number = 6 if config.network.places == 1 else config.network.places
    batch = batch_of(torch.rand(number, 3, *size, generator=seeded(0)))
    model.prepare([replace(batch, tile=torch.arange(number))] * 2)
    model.eval()
    image = torch.rand(2, 3, *config.image_size, generator=seeded(9))
    prediction = whole(model, config)(image, None)
    assert prediction.anomaly_map.shape == (2, 1, *config.image_size)
    highest = prediction.anomaly_map.flatten(1).topk(config.scored_pixels).values.mean(dim=1)
    torch.testing.assert_close(prediction.score, highest)


POSITIONS = {"centres": {"name": "positions"}, "epochs": 0, "kl_weight": True}


def lit(rows: int, seed: int) -> torch.Tensor:
    """Pictures whose right half is bright, as those of a part that lies still."""
    image = 0.3 + 0.05 * torch.rand(rows, 3, 64, 128, generator=seeded(seed))
    image[..., 64:] += 0.4
    return image


def in_tiles(image: torch.Tensor, region: torch.Tensor | None = None) -> Batch:
    """Both halves of each, in turn, as one batch."""
    halves = torch.cat([torch.stack([one[..., :64], one[..., 64:]]) for one in image])
    regions = None if region is None else torch.cat([torch.stack([one[..., :64], one[..., 64:]]) for one in region])
    return replace(batch_of(halves), tile=torch.arange(2).repeat(len(image)), region=regions)


def two_tiles(name: str, **changes: Any) -> tuple[AnomalyModel, Config]:
    """A model of two tiles side by side, which has learnt from four pictures."""
    size = {"image_size": {"height": 64, "width": 128}, "tiles": {"side": 64, "overlap": 0}}
    settings = tiny_models.SETTINGS[name] | {"image_score": "max"} | size | changes
    config = MODELS[name].Config.model_validate(settings)
    torch.manual_seed(0)
    model = MODELS[name](config.network)
    model.prepare([in_tiles(lit(3, seed=1)), in_tiles(lit(1, seed=2))])
    return model.eval(), config


@pytest.mark.parametrize(("name", "changes"), [("fapm", {}), ("adfa", POSITIONS)])
def test_where_places_matter_each_tile_has_its_own_memory(name: str, changes: dict[str, Any]) -> None:
    """A tile at its place is what was learnt there; the same tile elsewhere is not, unless all share one memory."""
    model, config = two_tiles(name, **changes)
    assert config.network.places == 2
    left = lit(2, seed=3)[..., :64]
    here, there = (model.forward_at(left, None, torch.tensor([place])) for place in (0, 1))
    assert (there.score > 2 * here.score).all()
    alone = model.forward_at(left[:1], None, torch.tensor([1]))
    torch.testing.assert_close(alone.score, there.score[:1])
    picture = lit(1, seed=4)
    swapped = torch.cat([picture[..., 64:], picture[..., :64]], dim=3)
    detects = whole(model, config)
    assert float(detects(swapped, None).score) > 2 * float(detects(picture, None).score)


def test_one_memory_for_all_tiles() -> None:
    """FAPM with one patch, and ADFA with centres wherever they lie, ask nothing of where a tile is."""
    for name, changes in (
        ("fapm", {"grid": 1}),
        ("adfa", {"centres": {"name": "coreset", "number": 40, "per_image": 200}}),
    ):
        model, config = two_tiles(name, **({"kl_weight": False, "epochs": 0} if name == "adfa" else {}), **changes)
        assert config.network.places == 1
        left = lit(2, seed=3)[..., :64]
        here, there = (model.forward_at(left, None, torch.tensor([place])) for place in (0, 1))
        torch.testing.assert_close(here.score, there.score, rtol=0, atol=0)


def test_what_a_tile_knows_is_what_a_model_of_it_alone_would() -> None:
    """FAPM's memories, patch by patch."""
    model, _ = two_tiles("fapm", far_rule={"name": "all"})
    torch.manual_seed(0)
    settings = tiny_models.SETTINGS["fapm"] | {"image_score": "max", "far_rule": {"name": "all"}}
    alone = MODELS["fapm"](MODELS["fapm"].Config.model_validate(settings))
    alone.backbone.load_state_dict(model.backbone.state_dict())  # type: ignore[attr-defined, unused-ignore]
    alone.prepare([batch_of(lit(3, seed=1)[..., 64:]), batch_of(lit(1, seed=2)[..., 64:])])
    image = lit(2, seed=5)[..., 64:]
    expected, found = tiny_models.predict(alone.eval(), image), model.forward_at(image, None, torch.tensor([1]))
    torch.testing.assert_close(found.anomaly_map, expected.anomaly_map)


@pytest.mark.parametrize("region", [False, True])
@pytest.mark.parametrize(("name", "changes"), [("fapm", {}), ("adfa", POSITIONS)])
def test_the_exported_file_asks_which_tile_it_sees(
    name: str, changes: dict[str, Any], region: bool, tmp_path: Path
) -> None:
    model, config = two_tiles(name, **changes)
    card = replace(
        tiny_models.CARD,
        image_size=config.image_size,
        tiles=config.tiles,
        by_tile=True,
        fit="pad" if region else "stretch",
    )
    write_graph(model, tmp_path / "model.onnx", 18, card)
    detector = Detector(tmp_path / "model.onnx")
    for number, tile in ((1, 0), (3, 1)):
        image = lit(number, seed=7)[..., 64:]
        counts = torch.ones_like(image[:, :1]) if region else None
        expected = model.forward_at(image, counts, torch.tensor([tile]))
        found = detector.graph(image.numpy(), None if counts is None else counts.numpy(), tile)
        assert_agree(found, expected, 1e-4)
    pixels = (255 * lit(2, seed=8)).round().byte()
    everywhere = np.ones((2, 64, 128), dtype=bool) if region else None
    maps, scores = detector(Inputs(pixels.permute(0, 2, 3, 1).contiguous().numpy(), everywhere))
    seen = whole(model, config)(pixels / 255, torch.ones(2, 1, 64, 128) if region else None)
    assert_agree((maps, scores), seen, 1e-4)


def test_a_tile_in_which_nothing_counts_has_an_empty_memory() -> None:
    """Nobody asks it."""
    config = MODELS["fapm"].Config.model_validate(
        tiny_models.SETTINGS["fapm"]
        | {"image_size": {"height": 64, "width": 128}, "tiles": {"side": 64, "overlap": 0}, "image_score": "max"}
    )
    model = MODELS["fapm"](config.network)
    left = in_tiles(lit(4, seed=1))
    assert left.tile is not None
    model.prepare([replace(batch_of(left.image[left.tile == 0]), tile=left.tile[left.tile == 0])])
    region = torch.zeros(1, 1, 64, 128)
    region[..., :64] = 1
    anomaly_map = whole(model.eval(), config)(lit(1, seed=2), region).anomaly_map
    assert anomaly_map.isfinite().all()
    assert (anomaly_map[..., 64:] == 0).all()


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
    positions = {"centres": {"name": "positions"}, "epochs": 1}
    assert "set epochs: 0, or take a coreset" in problem(root, blemish, "adfa", **positions)
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
