"""Every model on images of which a part does not count: borders, or what is outside of a region of interest."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import tiny_models
import torch
from drawn_batches import assert_agree, parts, take_steps
from tiny_models import BATCH_SIZE, STEPS, batch_with_squares, build, pretrain
from torch import Tensor

from anomaly_models import MODELS
from anomaly_models.adfa import ADFA
from anomaly_models.base import AnomalyModel, Batch, Prediction
from anomaly_models.common.foreground import foreground_mask
from anomaly_models.common.scoring import GaussianBlur, cells_within, highest, mean_of_highest
from anomaly_models.common.sizes import Size
from anomaly_models.fapm import FAPM

CORNER = torch.tensor([0.0, 1.0, 0.0]).view(3, 1, 1)


def side_of(name: str) -> int:
    return int(tiny_models.SETTINGS[name]["image_size"])


def region(side: int, number: int) -> Tensor:
    """The upper left three quarters of each side."""
    result = torch.zeros(number, 1, side, side)
    result[:, :, : 3 * side // 4, : 3 * side // 4] = 1
    return result


def counted(image: Tensor) -> Tensor:
    """As the pipeline gives them: grey where nothing counts."""
    return torch.where(region(image.shape[-1], len(image)) > 0, image, 128 / 255)


def batch_at(name: str, step: int) -> Batch:
    side = side_of(name)
    batch = batch_with_squares(lambda seed: counted(parts(BATCH_SIZE, seed, side)), step)
    return replace(batch, region=region(side, BATCH_SIZE))


def normals(name: str, seeds: tuple[int, ...]) -> list[Batch]:
    side = side_of(name)
    images = [counted(parts(BATCH_SIZE, seed, side)) for seed in seeds]
    return [
        Batch(image, torch.zeros_like(image[:, :1]), torch.zeros(len(image), dtype=torch.bool), region=region(side, 4))
        for image in images
    ]


@cache
def trained(name: str) -> AnomalyModel:
    model = build(name)
    pretrain(model)
    model.prepare(normals(name, (0, 1)))
    training = model.optimizer(STEPS)
    if training is not None:
        for _ in take_steps(model, training, lambda step: batch_at(name, step), range(STEPS), STEPS):
            pass
    model.eval()
    model.calibrate(normals(name, (10, 11)))
    return model


@torch.no_grad()
def predict(model: AnomalyModel, image: Tensor, region: Tensor | None) -> Prediction:
    prediction: Prediction = model(image, region)
    return prediction


each_model = pytest.mark.parametrize("name", MODELS)


@each_model
def test_a_region_of_everything_changes_nothing(name: str) -> None:
    model, image = trained(name), parts(4, 20, side_of(name))
    found = predict(model, image, torch.ones_like(image[:, :1]))
    assert_agree(found, predict(model, image, None), atol=1e-5, rtol=1e-5)


@each_model
def test_outside_the_map_is_0_and_the_score_is_of_what_counts(name: str) -> None:
    model, side = trained(name), side_of(name)
    image = counted(parts(4, 20, side))
    found = predict(model, image, region(side, 4))
    assert found.anomaly_map.isfinite().all()
    assert (found.anomaly_map[region(side, 4) == 0] == 0).all()
    assert found.score.isfinite().all()
    everything = predict(model, image, None)
    assert (found.score <= everything.score + 1e-5).all()


@each_model
def test_the_exported_file_takes_a_region(name: str, tmp_path: Path) -> None:
    model, side = trained(name), side_of(name)
    detector = tiny_models.exported(model, tmp_path / "model.onnx", fit="pad")
    tiny_models.assert_file_agrees(detector, model, counted(parts(4, 20, side)), region=region(side, 4))


@pytest.mark.parametrize("name", ["adfa", "bgad", "efficient_ad", "fapm"])  # DiffusionAD's must learn what one is
def test_a_spot_outside_is_no_defect(name: str) -> None:
    """Where the picture would not be grey, as at the line it is: the same spot inside is one."""
    model, side = trained(name), side_of(name)
    scores = []
    for place in (None, side - side // 8, side // 4):
        image = counted(parts(1, 30, side))
        if place is not None:
            image[:, :, place : place + side // 8, place : place + side // 8] = CORNER
        scores.append(float(predict(model, image, region(side, 1)).score))
    nothing, outside, inside = scores
    assert inside - nothing > 2 * abs(outside - nothing), scores


def test_fapm_remembers_no_cell_outside() -> None:
    model = trained("fapm")
    assert isinstance(model, FAPM)
    grey = torch.full((1, 3, 64, 64), 128 / 255)
    with torch.no_grad():
        patches = [model.by_patch(features) for features in model.features(grey)]
    for bank, queries in zip(model.banks, patches, strict=True):
        assert float(bank(queries, 1)[-1].min()) > 0  # the last patch lies outside: there is no grey in its bank


def test_adfa_chooses_no_centre_outside() -> None:
    coreset = {"name": "coreset", "number": 32, "per_image": 64}
    model = build("adfa", centres=coreset, kl_weight=False, epochs=0)
    assert isinstance(model, ADFA)
    model.eval()
    model.prepare(normals("adfa", (0, 1)))
    with torch.no_grad():
        grey = model.describe(model.backbone(torch.full((1, 3, 64, 64), 128 / 255)))[0]
    assert float(torch.cdist(grey[-1:], model.centres).min()) > 0.1 * float(model.centres.std())


def test_cells_that_hold_any_of_a_region() -> None:
    marked = torch.zeros(1, 1, 8, 8)
    marked[0, 0, 0, 7] = marked[0, 0, 5, 2] = 1
    assert cells_within(marked, Size(2, 4))[0, 0].tolist() == [[0, 0, 0, 1], [0, 1, 0, 0]]


def test_scores_of_a_region() -> None:
    anomaly_map = torch.arange(16.0).view(1, 1, 4, 4)
    first_row = torch.zeros(1, 1, 4, 4)
    first_row[..., 0, :] = 1
    assert float(highest(anomaly_map, first_row)) == 3
    assert float(mean_of_highest(anomaly_map, 2, first_row)) == 2.5
    assert float(mean_of_highest(anomaly_map, 10, first_row)) == 1.5  # all four
    assert float(highest(-anomaly_map - 1, first_row)) == -1  # what is outside is no 0
    assert float(highest(anomaly_map, None)) == 15


def test_a_blur_takes_nothing_from_outside() -> None:
    inside = torch.zeros(1, 1, 32, 32)
    inside[..., :16] = 1
    anomaly_map = torch.where(inside > 0, 2.0, 1000.0)
    smooth = GaussianBlur(2.0)(anomaly_map, inside)
    torch.testing.assert_close(smooth[..., :16], torch.full((1, 1, 32, 16), 2.0))
    assert (smooth[..., 16:] == 0).all()


def test_the_part_is_told_from_the_border_of_the_region() -> None:
    """A padded picture: the borders' grey is no background, and the part is not found in them."""
    image = torch.full((1, 3, 64, 64), 128 / 255)
    image[:, :, 16:48] = 0.9 + 0.02 * torch.rand(1, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    image[:, :, 24:40, 20:44] = 0.2
    band = torch.zeros(1, 1, 64, 64)
    band[:, :, 16:48] = 1
    found = foreground_mask(image, band)
    expected = torch.zeros(1, 1, 64, 64)
    expected[:, :, 24:40, 20:44] = 1
    assert (found != expected).float().mean() < 0.03
    assert (found[band == 0] == 0).all()
