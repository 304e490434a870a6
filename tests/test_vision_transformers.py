"""What the models that have a backbone promise holds for one whose maps are the blocks of a vision transformer."""

from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from drawn_batches import assert_agree, batch_of, resume, same_state, take_steps
from tiny_models import STEPS, build, normals, predict, random_images, training_batch
from torch import Tensor

from anomaly_models.base import AnomalyModel, ModelError, Prediction
from anomaly_models.fapm import FAPM

VIT = {"name": "test_vit", "weights": "package", "layers": [1, 3, 5], "combine": "separate"}  # 4 x 4 patches each
MEAN = VIT | {"combine": "mean"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "fapm": ("fapm", {"backbone": VIT, "grid": 2}),
    "fapm of the mean": ("fapm", {"backbone": MEAN, "grid": 1, "image_score": "max"}),
    "adfa": ("adfa", {"backbone": VIT}),
    "bgad": ("bgad", {"backbone": VIT, "vectors_per_step": 16, "steps_per_batch": [2, 1, 1]}),
}


def built(case: str, seed: int = 0) -> AnomalyModel:
    name, changes = CASES[case]
    return build(name, seed, **changes)


@cache
def trained(case: str) -> AnomalyModel:
    name, model = CASES[case][0], built(case)
    model.train()
    model.prepare(normals(name, seed=0))
    training = model.optimizer(STEPS)
    if training is not None:
        list(take_steps(model, training, partial(training_batch, name), range(STEPS), STEPS))
    model.eval()
    model.calibrate(normals(name, seed=10))
    return model


each_case = pytest.mark.parametrize("case", CASES)


@each_case
def test_an_image_alone_scores_as_in_a_batch(case: str) -> None:
    model, image = trained(case), random_images(CASES[case][0], 3, seed=2)
    together = predict(model, image)
    assert together.anomaly_map.shape == (3, 1, 64, 64)
    assert len(set(together.score.tolist())) == 3
    for index in range(3):
        expected = Prediction(*(value[index : index + 1] for value in together))
        assert_agree(predict(model, image[index : index + 1]), expected, atol=1e-5)


@each_case
def test_state_dict_is_the_whole_model(case: str, tmp_path: Path) -> None:
    model, image = trained(case), random_images(CASES[case][0], 2, seed=4)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    fresh = built(case, seed=1).eval()
    fresh.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert_agree(predict(fresh, image), predict(model, image), atol=0)


@pytest.mark.parametrize("case", ["adfa", "bgad"])
def test_a_resumed_run_ends_with_the_same_bits(case: str) -> None:
    name, killed, resumed = CASES[case][0], built(case), built(case, seed=1)
    killed.prepare(normals(name, seed=0))
    resume(killed, resumed, partial(training_batch, name), stop=1, total=STEPS)
    resumed.eval()
    resumed.calibrate(normals(name, seed=10))
    assert same_state(resumed, trained(case))


@each_case
def test_the_exported_file_gives_the_same_at_any_batch_size(case: str, tmp_path: Path) -> None:
    model = trained(case)
    detector = tiny_models.exported(model, tmp_path / "model.onnx")
    tiny_models.assert_file_agrees(detector, model, random_images(CASES[case][0], 4, seed=7))


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"])
def test_registers_and_rotary_positions_are_exported(name: str, tmp_path: Path) -> None:
    backbone = MEAN | {"name": name, "layers": [0, 1]}
    side = {"vit_small_patch14_reg4_dinov2": 56, "vit_small_patch16_dinov3": 64}[name]
    model = build("fapm", backbone=backbone, grid=1, image_size=side, crop=side, image_score="max").eval()
    images = random_images("fapm", 12, seed=0)[:, :, :side, :side]
    model.prepare(iter([batch_of(images[:8])]))
    detector = tiny_models.exported(model, tmp_path / "model.onnx")
    tiny_models.assert_file_agrees(detector, model, images[8:])


def test_distances_to_the_memories_of_equal_maps_are_added() -> None:
    """Position by position, whatever the coarse layout is: no map is coarse."""
    model = trained("fapm")
    assert isinstance(model, FAPM)
    assert model.sizes == ((4, 4),) * 3
    maps = model.features(random_images("fapm", 2, seed=8))
    total = torch.zeros(2, 4, 4)
    for bank, features in zip(model.banks, maps, strict=True):
        nearest = bank(model.by_patch(features), 1)  # (4 patches, 2 images * 4 positions, 1)
        total += laid_out(nearest)
    torch.testing.assert_close(model.distances(maps)[:, 0], total)


def laid_out(nearest: Tensor) -> Tensor:
    """Positions of a 2 x 2 grid of patches of 2 x 2 positions, put where they lie."""
    laid = torch.zeros(2, 4, 4)
    for patch in range(4):
        top, left = 2 * (patch // 2), 2 * (patch % 2)
        laid[:, top : top + 2, left : left + 2] = nearest[patch, :, 0].reshape(2, 2, 2)
    return laid


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        (
            "fapm",
            {"crop": 60},
            "FAPM's crop must be a multiple of 16, .* found 60; the nearest are 48 and 64",
        ),
        ("adfa", {"image_size": 60}, "image_size must be a multiple of 16, .* found 60; the nearest are 48 and 64"),
        (
            "bgad",
            {"image_size": 60, "steps_per_batch": "published", "vectors_per_step": 16},
            "BGAD's image_size must be a multiple of 16, .* found 60; the nearest are 48 and 64",
        ),
    ],
)
def test_sizes_between_patches_are_refused(name: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=f"^{said}$"):
        build(name, backbone=VIT, **changes)
