"""Every model on images that are no squares: as high as 64 pixels and twice as wide, or the other way round."""

from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from drawn_batches import assert_agree, batch_of, resume, same_state, seeded, take_steps
from tiny_models import BATCH_SIZE, STEPS, batch_with_squares, build, predict, pretrain
from torch import Tensor

from anomaly_models import MODELS
from anomaly_models.base import AnomalyModel, Batch, ModelError
from anomaly_models.common.sizes import Size

WIDE = {"height": 64, "width": 128}
HIGH = {"height": 128, "width": 64}
# of each model, what makes its smallest settings oblong
CHANGES: dict[str, Any] = {
    "adfa": lambda size: {"image_size": size},
    "bgad": lambda size: {"image_size": size},
    "diffusion_ad": lambda size: {
        "image_size": size,
        "unet": tiny_models.SETTINGS["diffusion_ad"]["unet"] | {"image_size": size, "attention_sizes": [64]},
    },
    "efficient_ad": lambda size: {"image_size": {axis: 2 * side for axis, side in size.items()}},
    "fapm": lambda size: {
        "image_size": size,
        "crop": size,
        "grid": {axis: side // 16 for axis, side in size.items()},
    },
}


def oblong(name: str, size: dict[str, int], seed: int = 0) -> AnomalyModel:
    return build(name, seed, **CHANGES[name](size))


def parts(size: Size, number: int, seed: int) -> Tensor:
    """Grey with fresh grain."""
    return 0.5 + 0.1 * torch.rand(number, 3, *size, generator=seeded(seed))


def batch_at(size: Size, step: int) -> Batch:
    batch = batch_with_squares(partial(parts, size, BATCH_SIZE), step)
    return replace(batch, foreground=torch.ones_like(batch.mask))


@cache
def trained(name: str, height: int) -> AnomalyModel:
    model = oblong(name, WIDE if height == 64 else HIGH)
    size = model.config.image_size
    pretrain(model)
    model.prepare([batch_of(parts(size, BATCH_SIZE, seed)) for seed in range(2)])
    training = model.optimizer(STEPS)
    if training is not None:
        for _ in take_steps(model, training, partial(batch_at, size), range(STEPS), STEPS):
            pass
    model.eval()
    model.calibrate([batch_of(parts(size, BATCH_SIZE, seed)) for seed in (10, 11)])
    return model


each_model = pytest.mark.parametrize("name", MODELS)
either_way = pytest.mark.parametrize("height", [64, 128])


@each_model
@either_way
def test_the_map_is_of_the_images_size(name: str, height: int) -> None:
    model = trained(name, height)
    prediction = predict(model, parts(model.config.image_size, 4, seed=20))
    assert prediction.anomaly_map.shape == (4, 1, *model.config.image_size)
    assert prediction.anomaly_map.isfinite().all()


@each_model
def test_the_exported_file_gives_the_same(name: str, tmp_path: Path) -> None:
    model = trained(name, 64)
    image = parts(model.config.image_size, 4, seed=20)
    detector = tiny_models.exported(model, tmp_path / "model.onnx")
    assert detector.card.image_size == model.config.image_size
    tiny_models.assert_file_agrees(detector, model, image)


@either_way
@pytest.mark.parametrize("name", ["adfa", "bgad", "efficient_ad", "fapm"])  # DiffusionAD's must learn what one is
def test_a_spot_is_found_where_it_lies(name: str, height: int) -> None:
    """Rows and columns are told apart everywhere on the way."""
    model = trained(name, height)
    size = model.config.image_size
    for row, column in ((0.2, 0.75), (0.8, 0.3)):
        image = parts(size, 1, seed=30)
        middle = int(row * size.height), int(column * size.width)
        image[:, :, middle[0] - 8 : middle[0] + 8, middle[1] - 8 : middle[1] + 8] = torch.tensor([1.0, 0, 0]).view(
            3, 1, 1
        )
        change = predict(model, image).anomaly_map - predict(model, parts(size, 1, seed=30)).anomaly_map
        found = divmod(int(change.flatten().argmax()), size.width)
        assert abs(found[0] - middle[0]) <= 16, (found, middle)
        assert abs(found[1] - middle[1]) <= 16, (found, middle)


@each_model
def test_a_resumed_run_ends_with_the_same_bits(name: str) -> None:
    killed = oblong(name, WIDE)
    size = killed.config.image_size
    pretrain(killed)
    killed.prepare([batch_of(parts(size, BATCH_SIZE, seed)) for seed in range(2)])
    if killed.optimizer(STEPS) is None:
        return
    resumed = oblong(name, WIDE, seed=1)
    resume(killed, resumed, partial(batch_at, size), stop=1, total=STEPS)
    resumed.eval()
    resumed.calibrate([batch_of(parts(size, BATCH_SIZE, seed)) for seed in (10, 11)])
    assert same_state(resumed, trained(name, 64))


@each_model
def test_a_saved_model_is_loaded(name: str) -> None:
    model, fresh = trained(name, 128), oblong(name, HIGH, seed=1).eval()
    fresh.load_state_dict(model.state_dict())
    image = parts(model.config.image_size, 2, seed=40)
    assert_agree(predict(fresh, image), predict(model, image), atol=0)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("adfa", {"height": 64, "width": 100}, "a multiple of 8, .* found 100; the nearest are 96 and 104"),
        ("bgad", {"height": 60, "width": 64}, "a multiple of 8, .* found 60; the nearest are 56 and 64"),
        ("diffusion_ad", {"height": 64, "width": 72}, "a multiple of 32 for DiffusionAD; found 72x64"),
        ("efficient_ad", {"height": 96, "width": 160}, "a multiple of 32, at least 128; found 96"),
        ("fapm", {"height": 64, "width": 32}, "crop must be at most image_size, found 64 of 32x64"),
    ],
)
def test_a_size_that_a_model_cannot_take(name: str, changes: dict[str, int], message: str) -> None:
    with pytest.raises((ModelError, ValueError), match=message):
        build(name, image_size=changes)


def test_a_grid_must_divide_both_sides() -> None:
    with pytest.raises(ModelError, match="32 and 16 for crop 128, found 3; take one of 1, 2, 4, 8, 16"):
        build("fapm", image_size=WIDE, crop=WIDE, grid={"height": 4, "width": 3})
