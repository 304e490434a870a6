"""The acceptance facts of the method: the operator against optimal transport, the rest on a tiny random network."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn_batches import assert_agree, batch_of, rates_of, resume, same_state, seeded, take_steps
from einops import rearrange
from pydantic import ValidationError
from tiny_models import SETTINGS, assert_file_agrees, exported
from torch import Tensor
from torch.nn import functional as F

from anomaly_models import adfa
from anomaly_models.adfa import ADFA, ADFAConfig, Centres, SoftTopKSettings, top_k_weights
from anomaly_models.base import Batch, ModelError, Prediction, Progress
from anomaly_models.common.memory_bank import greedy_coreset
from anomaly_models.common.sizes import Size

SIDE = 64  # maps of 16 x 16 and 8 x 8
GRID = 16
SOFT: dict[str, Any] = SETTINGS["adfa"]["objective"] | {"candidates": None}
PUBLISHED = SOFT | {"eps": 0.1, "normalize": "batch_max"}
HYPERSPHERE: dict[str, Any] = {
    "name": "hypersphere",
    "attracted": 3,
    "repelled": 3,
    "radius": 1e-5,
    "train_radius": True,
    "alpha": 0.1,
    "nu": 1e-3,
}
CORESET: dict[str, Any] = {
    "centres": {"name": "coreset", "number": 40, "per_image": 100},
    "kl_weight": False,
    "gamma_d": 1,
    "start": "whitened",
}
TINY = SETTINGS["adfa"] | {"objective": SOFT, "blur_sigma": 2.0, "epochs": 2}
WIDE_RESNET = {"name": "wide_resnet50_2.tv_in1k", "weights": "timm", "layers": [1, 2, 3], "combine": "separate"}


def config(**changes: Any) -> ADFAConfig:
    return ADFAConfig.model_validate(TINY | changes)


def hypersphere(**changes: Any) -> adfa.HypersphereSettings:
    return adfa.HypersphereSettings.model_validate(HYPERSPHERE | changes)


def uniform(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(*shape, generator=seeded(seed), dtype=dtype)


def images(number: int, seed: int) -> Tensor:
    """One smooth pattern with fresh grain on every image."""
    pattern = F.interpolate(uniform(1, 3, 8, 8, seed=9, dtype=torch.float32), size=SIDE, mode="bicubic")
    return (pattern + 0.1 * torch.randn(number, 3, SIDE, SIDE, generator=seeded(seed))).clamp(0, 1)


def batches(image: Tensor, size: int = 4) -> list[Batch]:
    return [batch_of(part) for part in torch.split(image, size)]


def fitted(train: Tensor, **changes: Any) -> ADFA:
    torch.manual_seed(0)
    model = ADFA(config(**changes))
    model.prepare(batches(train))
    return model.eval()


def terms_of(model: ADFA, image: Tensor, step: int = 0) -> dict[str, Tensor]:
    (terms,) = model.losses(batch_of(image), Progress(step, 10, seeded(step)))
    return terms


def described_by(model: ADFA, image: Tensor) -> Tensor:
    return model.describe(model.backbone(image))


def train_steps(model: ADFA, image: Tensor, steps: int) -> list[dict[str, float]]:
    """Four images at a time; gives the terms of each step."""

    def batch_at(step: int) -> Batch:
        first = 4 * step % len(image)
        return batch_of(image[first : first + 4])

    taken = take_steps(model, model.optimizer(steps), batch_at, range(steps), steps)
    return [{name: term.item() for name, term in terms.items()} for terms in taken]


@pytest.fixture(scope="module")
def train() -> Tensor:
    return images(10, seed=1)


@pytest.fixture(scope="module")
def test() -> Tensor:
    return images(5, seed=2)


@pytest.fixture(scope="module")
def model(train: Tensor) -> ADFA:
    return fitted(train)


# The operator


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@pytest.mark.parametrize("temperature", [1e-4, 1e-3, 0.05, 1.0, 10.0])
@pytest.mark.parametrize("number", [64, 3136])
def test_rows_sum_to_k(number: int, temperature: float, dtype: torch.dtype, tolerance: float) -> None:
    distance = uniform(8, number).to(dtype)
    weights = top_k_weights(distance, 3, torch.tensor(temperature, dtype=dtype), reach=1 / temperature)
    assert (weights.sum(1) - 3).abs().max() < tolerance
    assert ((weights >= 0) & (weights <= 1)).all()


def test_a_smaller_distance_weighs_more_and_an_equal_one_the_same() -> None:
    distance = uniform(4, 50)
    distance[:, 10] = distance[:, 20]
    weights = top_k_weights(distance, 3, torch.tensor(0.05), reach=20)
    order = distance.argsort(1)
    assert (weights.gather(1, order).diff(dim=1) <= 0).all()
    assert torch.equal(weights[:, 10], weights[:, 20])
    shuffled = torch.randperm(50, generator=seeded(0))
    torch.testing.assert_close(top_k_weights(distance[:, shuffled], 3, torch.tensor(0.05), 20), weights[:, shuffled])


def test_rows_of_equal_distances_share_alike() -> None:
    weights = top_k_weights(torch.full((2, 50), 1e4), 3, torch.tensor(1e-30), reach=1e3)
    torch.testing.assert_close(weights, torch.full((2, 50), 3 / 50))


def test_shifting_a_row_or_scaling_it_with_the_temperature_changes_nothing() -> None:
    distance = uniform(4, 50)
    weights = top_k_weights(distance, 3, torch.tensor(0.05), reach=20)
    torch.testing.assert_close(top_k_weights(distance + 7, 3, torch.tensor(0.05), reach=20), weights)
    torch.testing.assert_close(top_k_weights(distance * 1e3, 3, torch.tensor(50.0), reach=20), weights)


def test_limits_of_the_temperature() -> None:
    distance = uniform(4, 50)
    cold = top_k_weights(distance, 3, torch.tensor(1e-7, dtype=torch.float64), reach=1e7)
    nearest = torch.zeros_like(distance).scatter(1, distance.topk(3, largest=False).indices, 1.0)
    torch.testing.assert_close(cold, nearest, rtol=0, atol=1e-10)
    hot = top_k_weights(distance, 3, torch.tensor(1e7), reach=1)
    torch.testing.assert_close(hot, torch.full_like(distance, 3 / 50), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("eps", "mass"), [(0.2, 1.13), (0.1, 1.69), (0.05, 2.20), (0.001, 2.996)])
def test_the_mass_on_the_three_nearest_of_fifty(eps: float, mass: float) -> None:
    """Distances in [0, 1], so that the temperature is eps / 2; the figures are those of a random row."""
    distance = torch.linspace(0, 1, 50, dtype=torch.float64).unsqueeze(0)
    weights = top_k_weights(distance, 3, torch.tensor(eps / 2), reach=2 / eps)
    assert weights[0, :3].sum().item() == pytest.approx(mass, abs=0.03)


def sinkhorn(distance: Tensor, k: int, eps: float) -> Tensor:
    """n times the plan's column of the anchor 0, iterated in the log domain until it no longer changes; (n,)."""
    number = len(distance)
    cost = torch.stack([distance.square(), (distance - 1).square()], dim=1)
    kernel = -cost / cost.max() / eps
    log_mu = torch.full((number,), -math.log(number), dtype=torch.float64)
    log_nu = torch.tensor([k / number, 1 - k / number], dtype=torch.float64).log()
    column = torch.zeros(2, dtype=torch.float64)
    for _ in range(20_000):
        row = log_mu - (kernel + column).logsumexp(1)
        before, column = column, log_nu - (kernel + row.unsqueeze(1)).logsumexp(0)
        if (column - before).abs().max() < 1e-15:
            break
    return number * (kernel[:, 0] + column[0] + row).exp()


@pytest.mark.parametrize("eps", [0.05, 0.1, 0.2])
@pytest.mark.parametrize("scale", [0.2, 1.0, 30.0])
def test_equals_converged_sinkhorn(scale: float, eps: float) -> None:
    distance = scale * uniform(50, seed=3)
    temperature = eps / 2 * max(distance.max() ** 2, (distance - 1).abs().max() ** 2)
    weights = top_k_weights(distance.unsqueeze(0), 3, temperature.view(1, 1), reach=4 / eps)
    torch.testing.assert_close(weights[0], sinkhorn(distance, 3, eps), rtol=0, atol=1e-10)


def test_gradient_is_that_of_central_differences() -> None:
    distance = uniform(3, 20, seed=4).requires_grad_()
    temperature = torch.tensor([[0.05], [0.2], [1.0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: adfa.soft_topk(s, 3, temperature, 20), distance, atol=1e-7)
    upstream = uniform(3, 20, seed=5)
    (gradient,) = torch.autograd.grad((adfa.soft_topk(distance, 3, temperature, 20) * upstream).sum(), distance)
    assert (gradient != 0).all()
    assert gradient.sum(1).abs().max() < 1e-12


def test_the_loss_attracts_the_near_and_repels_the_far() -> None:
    distance = uniform(1, 60).sort(dim=1).values.requires_grad_()
    (adfa.soft_topk(distance, 3, torch.tensor(0.05), 20) * distance).sum().backward()
    assert distance.grad is not None
    assert distance.grad.sum().item() == pytest.approx(3)
    assert distance.grad[0, 0] > 0
    assert (distance.grad[0, 5:] < 0).all()  # 55 of 60, from the 6th nearest on


@pytest.mark.parametrize(
    ("spread", "largest", "nearest_three", "mean"),
    [
        (1, 0.0189, 0.056, 0.048),
        (10, 0.0022, 0.0066, 3.41),
        (100, 0.00106, 0.0032, 48.3),
        (1000, 0.00097, 0.0029, 499),
    ],
)
def test_published_normalisation_is_nearly_a_mean(
    spread: float, largest: float, nearest_three: float, mean: float
) -> None:
    """Of all distances, half of the spread, and not of the three nearest."""
    distance = torch.linspace(0, spread, 3136, dtype=torch.float64)
    centres = Centres(distance.sqrt().unsqueeze(1))  # their squared distances from 0
    softness = adfa.published_softness(0.1, torch.zeros(3136, 1).double(), centres, torch.ones(1), together=True)
    weights = top_k_weights(distance.unsqueeze(0), 3, softness.view(1, 1), reach=40)[0]
    assert weights.max().item() == pytest.approx(largest, rel=0.02)
    assert weights[:3].sum().item() == pytest.approx(nearest_three, rel=0.02)
    assert ((weights * distance).sum() / 3).item() == pytest.approx(mean, rel=0.05)


@pytest.mark.parametrize(("temperature", "left_out"), [(0.05, 2.0), (0.01, 0.4), (0.003, 0.005)])
def test_candidates_are_another_operator(temperature: float, left_out: float) -> None:
    distance = torch.linspace(0, 1, 3136, dtype=torch.float64).unsqueeze(0)
    weights = top_k_weights(distance, 3, torch.tensor(temperature), reach=1 / temperature)
    assert weights[0, 64:].sum().item() == pytest.approx(left_out, rel=0.05, abs=0.002)


# Descriptor


def test_inputs_of_half_mean_and_deviation() -> None:
    """(x - 0.5) / 0.5 for the backbone of half is what (x' - mean) / std is for the other, x' being made for that."""
    torch.manual_seed(0)
    backbone = {"name": "resnet18.tv_in1k", "weights": "timm", "layers": [1, 2], "combine": "separate"}
    own, half = (ADFA(config(backbone=backbone, input_statistics=name)) for name in ("backbone", "half"))
    half.load_state_dict(own.state_dict())
    image = images(2, seed=1)
    same_input = (image - 0.5) / 0.5 * own.backbone.std + own.backbone.mean
    for found, expected in zip(half.backbone(image), own.backbone(same_input), strict=True):
        torch.testing.assert_close(found, expected)
    assert not half.backbone(image)[0].allclose(own.backbone(image)[0], atol=1e-3)


@pytest.mark.parametrize(("gamma_d", "channels", "parameters"), [(4, 448, 804_169), (1, 1792, 3_216_649)])
def test_descriptor_of_the_paper(gamma_d: int, channels: int, parameters: int) -> None:
    with torch.device("meta"):
        model = ADFA(config(image_size=224, backbone=WIDE_RESNET, gamma_d=gamma_d))
        features = model.features(model.backbone(torch.zeros(2, 3, 224, 224, device="meta")))
        described = model.descriptor(features)
    assert features.shape == (2, 1792, 56, 56)
    assert described.shape == (2, channels, 56, 56)
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == parameters


def test_features_are_averaged_then_enlarged_then_joined(model: ADFA, test: Tensor) -> None:
    fine, coarse = model.backbone(test)
    features = model.features([fine, coarse])
    assert features.shape == (5, fine.shape[1] + coarse.shape[1], GRID, GRID)
    torch.testing.assert_close(features[:, : fine.shape[1], 0, 0], fine[..., :2, :2].sum((2, 3)) / 9)
    torch.testing.assert_close(features[:, : fine.shape[1], 5, 7], fine[..., 4:7, 6:9].mean((2, 3)))
    averaged = [coarse[..., row - 1 : row + 2, 1:4].mean((2, 3)) for row in (2, 3)]
    # Row 5 of the fine grid lies a quarter of a coarse row below row 2, column 4 a quarter of one left of column 2.
    left = [coarse[..., row - 1 : row + 2, 0:3].mean((2, 3)) for row in (2, 3)]
    rows = [0.75 * a + 0.25 * b for a, b in zip(averaged, left, strict=True)]
    torch.testing.assert_close(features[:, fine.shape[1] :, 5, 4], 0.75 * rows[0] + 0.25 * rows[1])


def test_coordinates_run_from_minus_one_to_one_along_rows_and_columns() -> None:
    descriptor = adfa.Descriptor(1, 2, Size.square(5))
    with torch.no_grad():
        descriptor.convolution.weight.copy_(torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]).view(2, 3, 1, 1))
        descriptor.convolution.bias.zero_()
        descriptor.gate.weight.zero_()
        row, column = descriptor(torch.rand(1, 1, 5, 5))[0] / 1.05
    axis = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0])
    torch.testing.assert_close(row, axis.view(5, 1).expand(5, 5))
    torch.testing.assert_close(column, axis.expand(5, 5))


@torch.no_grad()
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_the_gate_by_hand(scale: float) -> None:
    """Of zeros, it adds a twentieth to each channel."""
    descriptor = adfa.Descriptor(6, 12, Size.square(5))
    descriptor.gate.weight *= scale
    features = uniform(2, 6, 5, 5, dtype=torch.float32)
    plain = descriptor.convolution(torch.cat([features, descriptor.coordinates.expand(2, -1, -1, -1)], dim=1))
    kernel = descriptor.gate.weight.flatten().tolist()
    for image in plain:
        mean, maximum = image.flatten(1).mean(1).tolist(), image.flatten(1).amax(1).tolist()
        for channel in range(12):
            seen = [other for other in range(channel - 4, channel + 5) if 0 <= other < 12]
            logit = sum(kernel[other - channel + 4] * (mean[other] + maximum[other]) for other in seen)
            factor = 1 + 0.1 / (1 + math.exp(-logit))
            assert (factor == 1.05) == (scale == 0)
            image[channel] *= factor
    torch.testing.assert_close(descriptor(features), plain)


# Centres


@pytest.mark.parametrize(("size", "positions"), [(224, 3136), (256, 4096)])
def test_as_many_centres_as_positions(size: int, positions: int) -> None:
    with torch.device("meta"):
        model = ADFA(config(image_size=size, backbone=WIDE_RESNET, gamma_d=4))
    assert model.centres.shape == (positions, 448)
    optimizer, _ = model.optimizer(10)
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in model.descriptor.parameters()}  # neither centres nor backbone


def test_centres_weight_all_images_alike(train: Tensor) -> None:
    model = fitted(train)  # batches of 4, 4 and 2
    expected = torch.stack([described_by(model, image.unsqueeze(0))[0] for image in train]).mean(0)
    torch.testing.assert_close(model.centres, expected)
    assert model.centres.shape == fitted(train[:3]).centres.shape


def test_training_moves_neither_centres_nor_backbone(train: Tensor) -> None:
    model = fitted(train)
    centres = model.centres.clone()
    backbone = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    descriptor = [parameter.detach().clone() for parameter in model.descriptor.parameters()]
    train_steps(model, train, steps=3)
    assert torch.equal(model.centres, centres)
    assert all(torch.equal(value, backbone[name]) for name, value in model.backbone.state_dict().items())
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    moved = zip(descriptor, model.descriptor.parameters(), strict=True)
    assert not any(torch.equal(before, after) for before, after in moved)


def test_one_image_is_its_own_memory(train: Tensor) -> None:
    model = fitted(train[:1])
    described = described_by(model, train[:1])
    torch.testing.assert_close(model.centres, described[0])
    own = Centres(model.centres)(described[0], None).diagonal()
    assert own.max() < 1e-5
    assert model.kappa(described).item() == pytest.approx(0, abs=1e-4)


def test_squared_distances_far_from_the_origin() -> None:
    rows, centres = uniform(20, 6, dtype=torch.float32) + 100, uniform(30, 6, seed=1, dtype=torch.float32) + 100
    expected = torch.cdist(rows.double(), centres.double()).square()
    torch.testing.assert_close(Centres(centres)(rows, None).double(), expected, rtol=0, atol=1e-4)
    assert (Centres(rows)(rows, None) >= 0).all()


# Centres: a coreset


def sampled(model: ADFA, image: Tensor, per_image: int) -> Tensor:
    """Descriptors of so many patches of each image, at the places that `prepare` takes them from."""
    places = seeded(0)
    described = [described_by(model, part.unsqueeze(0))[0] for part in image]
    return torch.cat([rows[torch.randperm(len(rows), generator=places)[:per_image]] for rows in described])


@torch.no_grad()
@pytest.mark.parametrize("start", ["random", "identity", "whitened"])
def test_a_coreset_holds_the_patches_that_the_greedy_choice_takes(train: Tensor, start: str) -> None:
    """One by one, as the starting descriptor gives them."""
    model = fitted(train, **CORESET | {"start": start})
    patches = sampled(model, train, 100)
    indices, radii = greedy_coreset(patches, 40)
    assert radii[-1] > 0
    torch.testing.assert_close(model.centres, patches[indices])
    assert not model.centres.requires_grad


@torch.no_grad()
def test_all_images_give_equally_many_patches_of_what_there_is_room_for(
    train: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    channels = fitted(train, **CORESET).centres.shape[1]
    monkeypatch.setattr(adfa, "SAMPLED_VALUES", 10 * 7 * channels + 5)
    model = fitted(train, **CORESET)
    patches = sampled(model, train, 7)
    torch.testing.assert_close(model.centres, patches[greedy_coreset(patches, 40)[0]])
    monkeypatch.setattr(adfa, "SAMPLED_VALUES", 1)  # no room at all: one of each image
    model = fitted(train, **CORESET)
    torch.testing.assert_close(model.centres[:10].sort(0).values, sampled(model, train, 1).sort(0).values)


def test_fewer_patches_than_centres_are_repeated_in_turn(train: Tensor) -> None:
    model = fitted(train[:1], **CORESET | {"centres": {"name": "coreset", "number": 600, "per_image": 1000}})
    assert model.centres.shape[0] == 600
    assert len(model.centres.unique(dim=0)) == GRID**2
    assert torch.equal(model.centres[GRID**2 : 2 * GRID**2], model.centres[: GRID**2])


def test_constant_images_have_a_coreset_of_the_same_shape(test: Tensor) -> None:
    model = fitted(torch.full((4, 3, SIDE, SIDE), 0.5), **CORESET | {"start": "identity"})
    assert model.centres.shape[0] == 40
    assert len(model.centres.unique(dim=0)) < 40
    prediction = model(test)
    assert prediction.anomaly_map.isfinite().all()
    assert (prediction.score > model(torch.full((1, 3, SIDE, SIDE), 0.5)).score).all()


def turning_parts(number: int, seed: int) -> Tensor:
    """A pale bar with one dark end at any angle, on a plain background."""
    generator = seeded(seed)
    axis = torch.linspace(-1, 1, SIDE)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    angle = 2 * math.pi * torch.rand(number, 1, 1, generator=generator)
    along, across = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    body = torch.sigmoid(40 * (0.7 - along.abs())) * torch.sigmoid(40 * (0.25 - across.abs()))
    shade = 0.5 + 0.4 * body * (1 - 2 * torch.sigmoid(40 * (along - 0.35)))
    grain = 0.02 * torch.randn(number, 3, SIDE, SIDE, generator=generator)
    return (shade.unsqueeze(1) + grain).clamp(0, 1)


def holed(image: Tensor) -> Tensor:
    """With a small square of the background's grey in the middle of the part."""
    defective = image.clone()
    defective[..., 29:35, 29:35] = 0.5
    return defective


@torch.no_grad()
@pytest.mark.parametrize(
    ("changes", "least", "most"),
    [
        ({"kl_weight": False}, 0.4, 0.85),
        (CORESET | {"centres": {"name": "coreset", "number": 256, "per_image": 256}}, 0.95, 1.0),
    ],
    ids=["published", "coreset"],
)
def test_defects_of_parts_that_turn(changes: dict[str, Any], least: float, most: float) -> None:
    """Of all pairs of a good and a defective part, the share in which the defective one scores higher."""
    model = fitted(turning_parts(24, seed=1), **changes)
    good, defective = model(turning_parts(30, seed=2)).score, model(holed(turning_parts(30, seed=3))).score
    assert least <= (defective.unsqueeze(1) > good).float().mean() <= most


# Descriptor: its start


@torch.no_grad()
def test_the_identity_starts_as_the_maps_themselves(train: Tensor, test: Tensor) -> None:
    """But for the gate's factor, the same for all."""
    model = fitted(train, **CORESET | {"start": "identity"})
    maps = rearrange(model.features(model.backbone(test)), "b c h w -> b (h w) c")
    torch.testing.assert_close(described_by(model, test), 1.05 * maps)


@torch.no_grad()
def test_a_whitened_start_makes_the_mean_0_and_the_covariance_nearly_1(train: Tensor) -> None:
    """A direction of variance v gets v / (v + 0.1 mean(v)): nothing is turned."""
    model = fitted(train, **CORESET)
    maps = rearrange(model.features(model.backbone(train)), "b c h w -> (b h w) c").double()
    described = rearrange(described_by(model, train), "b t d -> (b t) d").double() / 1.05
    covariance = maps.T.cov(correction=0)
    variance, direction = torch.linalg.eigh(covariance)
    expected = direction @ torch.diag(variance / (variance + 0.1 * variance.mean())) @ direction.T
    torch.testing.assert_close(described.T.cov(correction=0), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(described.mean(0), torch.zeros_like(described[0]), rtol=0, atol=1e-4)
    matrix = model.descriptor.convolution.weight[..., 0, 0]
    torch.testing.assert_close(matrix[:, :-2], matrix[:, :-2].T)
    assert (matrix[:, -2:] == 0).all()


@pytest.mark.parametrize("start", ["identity", "whitened"])
def test_such_a_start_is_a_function_of_backbone_and_images(train: Tensor, start: str) -> None:
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = ADFA(config(**CORESET | {"start": start}))
        if models:
            model.backbone.load_state_dict(models[0].backbone.state_dict())
        model.prepare(batches(train))
        models.append(model)
    assert same_state(*models)


@pytest.mark.parametrize("start", ["random", "identity", "whitened"])
def test_without_epochs_nothing_is_trained(train: Tensor, start: str) -> None:
    model = fitted(train, **CORESET | {"start": start, "epochs": 0})
    assert model.total_steps(len(train)) == 0
    assert model.optimizer(0) is None
    assert not any(parameter.requires_grad for parameter in model.parameters())
    trained = fitted(train, **CORESET | {"start": start})
    assert all(parameter.requires_grad for parameter in trained.descriptor.parameters())
    assert same_state(model, trained)  # before its first step


def test_constant_images_cannot_be_whitened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ADFA, "features", lambda _, maps: torch.full((len(maps[0]), 80, GRID, GRID), 2.0))
    with pytest.raises(ModelError, match="the normal images are constant"):
        fitted(images(4, seed=1), **CORESET)


# Kappa


def test_kappa_by_its_definition() -> None:
    described = torch.randn(2, 5, 7, generator=seeded(0)).double()
    centres = torch.randn(5, 7, generator=seeded(1)).double()
    for image, kappa in zip(described, adfa.kl_factor(described, centres), strict=True):
        expected = 0.0
        for found, wanted in zip(image, centres, strict=True):
            p, q = wanted.exp() / wanted.exp().sum(), found.exp() / found.exp().sum()
            expected += (p * (p / q).log()).sum().item()
        assert kappa.item() == pytest.approx(expected)
        assert kappa > 0


def gradients(model: ADFA, image: Tensor) -> list[Tensor]:
    terms = terms_of(model, image)
    return list(torch.autograd.grad(terms["soft_topk"], list(model.descriptor.parameters())))


def test_kappa_scales_loss_and_gradient_and_has_none_itself(train: Tensor, test: Tensor) -> None:
    weighted, plain = fitted(train), fitted(train, kl_weight=False)
    image = test[:1]
    kappa = weighted.kappa(described_by(weighted, image))
    assert not kappa.requires_grad
    torch.testing.assert_close(terms_of(weighted, image)["soft_topk"], kappa[0] * terms_of(plain, image)["soft_topk"])
    for found, expected in zip(gradients(weighted, image), gradients(plain, image), strict=True):
        torch.testing.assert_close(found, kappa * expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(weighted(image).score, kappa.sqrt() * plain(image).score)


# Loss and scores


@pytest.mark.parametrize("changes", [{}, CORESET], ids=["positions", "coreset"])
@pytest.mark.parametrize("candidates", [None, 20])
def test_loss_and_gradient_are_those_of_the_whole_matrix(
    train: Tensor, test: Tensor, candidates: int | None, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taken in chunks of 5 rows, against all distances at once and a solver that autograd sees through."""
    monkeypatch.setattr(adfa, "CPU_CHUNK", 5 * GRID**2)
    model = fitted(train, **changes, objective=SOFT | {"candidates": candidates}).double()
    image = test[:2].double()
    described = described_by(model, image)
    distance = torch.cdist(described, model.centres.expand(2, -1, -1)).square()
    distance = distance.sort(dim=2).values[..., :candidates]
    low, high = distance[..., :1].detach(), distance[..., -1:].detach()
    weights = differentiable_weights((distance - low) / (high - low), 3, 0.05)
    expected = (model.kappa(described).view(2, 1) * (weights * distance).sum(2)).mean()
    loss = terms_of(model, image)["soft_topk"]
    torch.testing.assert_close(loss, expected)
    parameters = list(model.descriptor.parameters())
    found = torch.autograd.grad(loss, parameters)
    for gradient, wanted in zip(found, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(gradient, wanted)


def differentiable_weights(distance: Tensor, k: int, temperature: float) -> Tensor:
    """sigmoid((tau - s) / temperature), with one Newton step from the solution to give tau its derivative."""
    low, high = torch.full_like(distance[..., :1], -10), torch.full_like(distance[..., :1], 10)
    for _ in range(80):
        middle = (low + high) / 2
        few = torch.sigmoid((middle - distance) / temperature).sum(-1, keepdim=True) < k
        low, high = torch.where(few, middle, low), torch.where(few, high, middle)
    tau = low.detach()
    weights = torch.sigmoid((tau - distance) / temperature)
    slope = (weights * (1 - weights)).sum(-1, keepdim=True).detach() / temperature
    return torch.sigmoid((tau + (k - weights.sum(-1, keepdim=True)) / slope - distance) / temperature)


def test_all_candidates_are_no_restriction(train: Tensor, test: Tensor) -> None:
    everything = fitted(train, objective=SOFT | {"candidates": GRID**2})
    torch.testing.assert_close(everything(test).score, fitted(train)(test).score)


def test_sharp_scores_are_the_root_of_the_three_smallest(train: Tensor, test: Tensor) -> None:
    model = fitted(train, objective=SOFT | {"eps": 1e-6}, blur_sigma=0.0, image_size=SIDE)
    described = described_by(model, test)
    smallest = torch.cdist(described, model.centres.expand(5, -1, -1)).square().topk(3, largest=False).values.sum(2)
    expected = (model.kappa(described).view(5, 1) * smallest).sqrt()
    cells = rearrange(expected, "b (h w) -> b 1 h w", h=GRID)
    enlarged = F.interpolate(cells, size=SIDE, mode="bilinear", align_corners=False)
    torch.testing.assert_close(model(test).anomaly_map, enlarged, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model(test).score, enlarged.amax((1, 2, 3)), rtol=1e-3, atol=1e-4)


def test_without_the_root_maps_are_squared(train: Tensor, test: Tensor) -> None:
    """At the corners, where nothing is interpolated."""
    rooted = fitted(train, blur_sigma=0.0)
    squared = fitted(train, blur_sigma=0.0, objective=SOFT | {"sqrt": False})
    corner = rooted(test).anomaly_map[..., 0, 0]
    torch.testing.assert_close(squared(test).anomaly_map[..., 0, 0], corner.square())


def test_image_scores_by_hand() -> None:
    anomaly_map = torch.arange(400.0).view(1, 1, 20, 20)
    assert adfa.image_score(anomaly_map, "max").tolist() == [399]
    assert adfa.image_score(anomaly_map, "top100_mean").tolist() == [349.5]


@pytest.mark.parametrize("changes", [{}, CORESET], ids=["positions", "coreset"])
@pytest.mark.parametrize("objective", [SOFT, SOFT | {"candidates": 16}, PUBLISHED, HYPERSPHERE])
def test_an_image_scores_by_itself(
    train: Tensor, test: Tensor, objective: dict[str, Any], changes: dict[str, Any]
) -> None:
    model = fitted(train, **changes, objective=objective)
    with_others = torch.cat([test[:1], test[1:].clamp(0.3, 0.5), torch.rand(3, 3, SIDE, SIDE, generator=seeded(0))])
    together = Prediction(*(value[:1] for value in model(with_others)))
    assert_agree(model(test[:1]), together, atol=1e-5, rtol=1e-5)


def test_in_training_only_row_normalisation_is_independent_of_the_batch(train: Tensor, test: Tensor) -> None:
    for objective, independent in ((SOFT, True), (PUBLISHED, False)):
        model = fitted(train, objective=objective)
        settings = model.config.objective
        assert isinstance(settings, SoftTopKSettings)
        described = described_by(model, test)
        described[4] *= 5
        kappa = model.kappa(described)
        alone = model.soft_distances(settings, described[:1], kappa[:1], together=True)[0]
        together = model.soft_distances(settings, described, kappa, together=True)[0]
        assert torch.allclose(alone, together, rtol=1e-5) == independent
        by_itself = model.soft_distances(settings, described, kappa, together=False)[0]
        torch.testing.assert_close(by_itself, alone)


def test_batch_max_is_the_published_operator(train: Tensor, test: Tensor) -> None:
    model = fitted(train, objective=PUBLISHED)
    settings = model.config.objective
    assert isinstance(settings, SoftTopKSettings)
    described = described_by(model, test[:2])
    kappa = model.kappa(described)
    distance = kappa.view(2, 1, 1) * torch.cdist(described, model.centres.expand(2, -1, -1)).square()
    cost = torch.maximum(distance.square(), (distance - 1).square()).max()
    weights = top_k_weights(distance.flatten(0, 1), 3, 0.05 * cost, reach=40).view_as(distance)
    found = model.soft_distances(settings, described, kappa, together=True)
    torch.testing.assert_close(found, (weights * distance).sum(2), rtol=1e-4, atol=1e-6)


# Hypersphere


def test_a_tiny_radius_never_repels() -> None:
    nearest = uniform(100, 6).sort(dim=1).values * torch.logspace(-8, 3, 100).view(-1, 1)
    terms = adfa.hypersphere_terms(nearest, torch.tensor(1e-5), hypersphere())
    assert terms["repulsion"] == 0
    assert terms["attraction"] > 0


def test_hypersphere_terms_by_hand() -> None:
    nearest = torch.tensor([[0.1, 0.3, 0.5, 0.6], [0.2, 0.2, 0.25, 9.0]])
    radius = torch.tensor(0.9, requires_grad=True)  # squared: 0.81
    terms = adfa.hypersphere_terms(nearest, radius, hypersphere(attracted=1, repelled=3, nu=0.5))
    assert terms["attraction"] == 0
    # 0.81 - 0.1 less 0.3, 0.5, 0.6, 0.2, 0.25: 0.41, 0.21, 0.11, 0.51, 0.46
    assert terms["repulsion"].item() == pytest.approx(2 * 1.7 / 6)
    terms["repulsion"].backward()
    assert radius.grad is not None
    assert radius.grad.item() == pytest.approx(2 * 5 * 2 * 0.9 / 6)
    attraction = adfa.hypersphere_terms(nearest, torch.tensor(0.5), hypersphere(attracted=3, repelled=1))["attraction"]
    assert attraction.item() == pytest.approx(1000 * (0.05 + 0.25) / 6)


def test_soft_minimum_by_hand() -> None:
    # Roots 1, 2, 3: the first one's share is e^-1 / (e^-1 + e^-2 + e^-3) = 0.6652.
    assert adfa.soft_minimum(torch.tensor([[1.0, 4.0, 9.0]])).item() == pytest.approx(0.6652, abs=1e-4)


def test_nearest_distances_against_brute_force(train: Tensor, test: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adfa, "CPU_CHUNK", 7 * GRID**2)
    model = fitted(train, objective=HYPERSPHERE, kl_weight=False)
    described = described_by(model, test)
    expected = torch.cdist(described, model.centres.expand(5, -1, -1)).square().sort(dim=2).values[..., :6]
    found = model.nearest(described, torch.ones(5), 6)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    found.sum().backward()
    assert model.descriptor.gate.weight.grad is not None


def test_a_trained_radius_grows_until_it_repels(train: Tensor) -> None:
    model = fitted(train, objective=HYPERSPHERE | {"alpha": 0.0}, learning_rate=0.03)
    history = train_steps(model, train, steps=25)
    assert model.radius > 0.1
    assert history[0]["repulsion"] == 0
    assert history[-1]["repulsion"] > 0


def test_a_fixed_radius_is_no_parameter(train: Tensor) -> None:
    model = fitted(train, objective=HYPERSPHERE | {"train_radius": False})
    history = train_steps(model, train, steps=3)
    assert model.radius.item() == pytest.approx(1e-5)
    assert all(terms["repulsion"] == 0 for terms in history)
    assert "radius" in model.state_dict()
    assert "radius" not in dict(model.named_parameters())


# Learning


@pytest.mark.parametrize("objective", [SOFT, SOFT | {"candidates": 16}, PUBLISHED, HYPERSPHERE])
def test_loss_falls_and_the_descriptor_does_not_collapse(train: Tensor, objective: dict[str, Any]) -> None:
    """Without kappa, which the loss contains and the gradient does not."""
    model = fitted(train, objective=objective, kl_weight=False)
    history = train_steps(model, train, steps=50)
    losses = [terms["attraction" if objective is HYPERSPHERE else "soft_topk"] for terms in history]
    assert sum(losses[-10:]) < 0.97 * sum(losses[:10])
    assert min(terms["variance"] for terms in history) > 0.7


def test_what_is_monitored_takes_no_part_in_the_loss(train: Tensor) -> None:
    terms = terms_of(fitted(train), train)
    assert terms["variance"].item() == pytest.approx(1)
    assert {name for name, term in terms.items() if not term.requires_grad} == {"kappa", "variance"}


def test_a_collapsed_descriptor_stops_training(train: Tensor) -> None:
    model = fitted(train)
    model.descriptor.convolution.weight.data *= 0.4
    assert terms_of(model, train)["variance"].item() == pytest.approx(0.16, abs=0.01)
    model.descriptor.convolution.weight.data *= 0.5
    with pytest.raises(ModelError, match=r"step 7: the descriptor has collapsed, its variance .* is 0.04 of"):
        terms_of(model, train, step=7)


def test_the_published_operator_can_collapse(train: Tensor) -> None:
    model = fitted(train, objective=PUBLISHED)
    with pytest.raises(ModelError, match="the descriptor has collapsed"):
        train_steps(model, train, steps=200)


def test_the_published_training_goes_on_with_a_collapsed_descriptor(train: Tensor) -> None:
    model = fitted(train, objective=PUBLISHED, least_variance=0.0)
    history = train_steps(model, train, steps=200)
    assert history[-1]["variance"] < 0.1


def test_a_trained_model_finds_what_is_not_in_the_pattern(train: Tensor, test: Tensor) -> None:
    model = fitted(train)
    train_steps(model, train, steps=10)
    defective = test[:1].clone()
    defective[..., 20:32, 36:48] = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1)
    prediction, clean = model.eval()(defective), model(test[1:])
    assert prediction.score > clean.score.max()
    row, column = divmod(int(prediction.anomaly_map.argmax()), SIDE)
    assert 16 <= row < 36
    assert 32 <= column < 52


# Schedule and export


def test_an_epoch_is_a_pass_and_the_rate_stays(train: Tensor) -> None:
    model = fitted(train, epochs=7)
    assert model.total_steps(10) == 18  # 70 images, 4 a step
    optimizer, schedule = model.optimizer(18)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["amsgrad"]
    assert rates_of((optimizer, schedule), 18) == [[1e-3]] * 18


@pytest.mark.parametrize("changes", [{}, CORESET], ids=["positions", "coreset"])
def test_resumed_training_ends_with_the_same_bits(train: Tensor, changes: dict[str, Any]) -> None:
    """Resumed in a fresh model, whose cache is empty, from what a checkpoint holds."""

    def batch_at(step: int) -> Batch:
        rows = torch.arange(4 * step, 4 * step + 4) % 10
        return batch_of(train[rows], row=rows)

    whole, resumed = fitted(train, **changes), ADFA(config(**changes))
    list(take_steps(whole, whole.optimizer(6), batch_at, range(6), 6))
    resume(fitted(train, **changes), resumed, batch_at, stop=3, total=6)
    assert same_state(whole, resumed)


@pytest.mark.parametrize("changes", [{}, CORESET | {"epochs": 0}], ids=["positions", "coreset"])
@pytest.mark.parametrize("objective", [SOFT, PUBLISHED, HYPERSPHERE], ids=["all_centres", "published", "hypersphere"])
def test_onnx(train: Tensor, test: Tensor, objective: dict[str, Any], changes: dict[str, Any], tmp_path: Path) -> None:
    """The contract suite covers candidates."""
    model = fitted(train, **changes, objective=objective)
    assert_file_agrees(exported(model, tmp_path / "model.onnx"), model, test)


# Settings


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective": SOFT | {"candidates": 3}}, "candidates must be more than k = 3, or null; found 3"),
        ({"objective": PUBLISHED | {"candidates": 16}}, "candidates go with normalize: row"),
        ({"objective": SOFT | {"eps": 0.0}}, "greater than 0"),
        ({"objective": SOFT | {"normalize": "image"}}, "'row' or 'batch_max'"),
        ({"objective": SOFT | {"nu": 1.0}}, "Extra inputs"),
        ({"objective": HYPERSPHERE | {"attracted": 0}}, "greater than 0"),
        ({"objective": {"name": "ball"}}, "'soft_topk', 'hypersphere'"),
        ({"blur_sigma": 20.0}, "blur_sigma 20.0 reaches beyond a map of 64 pixels"),
        ({"blur_sigma": -1.0}, "greater than or equal to 0"),
        ({"image_score": "mean"}, "'max' or 'top100_mean'"),
        ({"gamma_d": 0}, "greater than 0"),
        ({"input_statistics": "imagenet"}, "'backbone' or 'half'"),
        ({"epochs": -1}, "greater than or equal to 0"),
        ({"centres": {"name": "means"}}, "'positions', 'coreset'"),
        (CORESET | {"centres": {"name": "coreset", "number": 0, "per_image": 1}}, "greater than 0"),
        (CORESET | {"start": "ones"}, "'random', 'identity' or 'whitened'"),
        (
            CORESET | {"kl_weight": True},
            "own centre, and centres: coreset has none; set it to false, or take centres: ",
        ),
        (
            CORESET | {"gamma_d": 4},
            "start: whitened keeps all channels, so gamma_d must be 1, found 4; set it to 1, or",
        ),
        ({"start": "identity"}, "start: identity keeps all channels, so gamma_d must be 1, found 2"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        config(**changes)


def test_settings_survive_json() -> None:
    for objective in (SOFT, HYPERSPHERE):
        settings = config(objective=objective)
        assert ADFAConfig.model_validate(settings.model_dump(mode="json")) == settings


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"image_size": 60},
            "multiple of 8, the stride of the deepest layer of test_resnet, found 60; the nearest are 56",
        ),
        ({"gamma_d": 10_000}, "gamma_d must be at most [0-9]+, the backbone's channels; found 10000"),
        ({"objective": SOFT | {"candidates": 257}}, "candidates ask for 257 centres, and there are 256"),
        ({"objective": SOFT | {"k": 256}}, "k ask for 257 centres, and there are 256"),
        ({"objective": HYPERSPHERE | {"repelled": 254}}, "attracted . repelled ask for 257 centres"),
        (
            CORESET | {"objective": SOFT | {"candidates": 41}},
            "candidates ask for 41 centres, and there are 40, centres.n",
        ),
    ],
)
def test_settings_that_do_not_fit_the_backbone_are_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        ADFA(config(**changes))


def test_no_images_are_refused() -> None:
    with pytest.raises(ModelError, match="no normal image"):
        ADFA(config()).prepare([])
