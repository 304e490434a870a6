"""BGAD against the equations and numbers of its specification, worked out independently."""

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import tiny_models
import torch
import torch.nn.functional as F
import yaml
from drawn_batches import (
    batch_of,
    num_parameters,
    parts,
    patterns,
    perturbed,
    rates_of,
    resume,
    same_state,
    seeded,
    take_steps,
)
from einops import rearrange
from pydantic import ValidationError
from sklearn.metrics import roc_auc_score
from torch import Tensor

from anomaly_models import bgad
from anomaly_models.base import Batch, ModelError, Progress
from anomaly_models.bgad import BGAD, BGADConfig, ConditionalFlow
from anomaly_models.common.backbones import Backbone, BackboneConfig
from anomaly_models.common.copy_paste import Pasted
from anomaly_models.common.sizes import Size
from pipelines.evaluation.metrics import ExactPixelMetrics

SIZE = 64
MIXED = {"passes": {"name": "mixed", "anomalous": 10}, "batch_size": 6}  # 2 normal images beside 2 + 2 in phase 2
PRESET = Path(__file__).parents[2] / "presets" / "mvtec_ad.yaml"
B6 = {"name": "tf_efficientnet_b6.aa_in1k", "weights": "timm", "layers": [1, 2, 3], "combine": "separate"}
SETTINGS = tiny_models.SETTINGS["bgad"] | {"features": "raw", "epochs": 4, "learning_rate": 2e-4}


def settings(**changes: object) -> BGADConfig:
    return BGADConfig.model_validate({**SETTINGS, **changes})


def model_of(**changes: object) -> BGAD:
    torch.manual_seed(0)
    return BGAD(settings(**changes))


def normals(number: int, seed: int, first_row: int = 0) -> Batch:
    return batch_of(patterns(number, seed), row=torch.arange(first_row, first_row + number))


def with_defects(batch: Batch, number: int = 2) -> Batch:
    """The batch, followed by images of a bright square of 24 pixels."""
    image = patterns(number, seed=77)
    mask = torch.zeros_like(image[:, :1])
    mask[:, :, 16:40, 24:48] = 1
    image = torch.where(mask > 0, 1.0, image)
    assert batch.row is not None
    return Batch(
        torch.cat([batch.image, image]),
        torch.cat([batch.mask, mask]),
        torch.cat([batch.label, torch.ones(number, dtype=torch.bool)]),
        row=torch.cat([batch.row, torch.arange(100, 100 + number)]),
    )


def batch_at(step: int) -> Batch:
    return with_defects(normals(4, seed=step % 2, first_row=4 * (step % 2)))


def progress_at(step: int, total: int = 8) -> Progress:
    return Progress(step, total, seeded(step))


PHASE_1, PHASE_2 = 0, 7  # steps of 8


def flow_of(channels: int, side: int) -> ConditionalFlow:
    torch.manual_seed(0)
    return perturbed(ConditionalFlow(channels, Size.square(side)), size=0.1).double()


def vectors(number: int, channels: int, side: int, *, double: bool = True) -> tuple[Tensor, Tensor]:
    x = torch.randn(number, channels, generator=seeded(1), dtype=torch.float64)
    cell = torch.randint(side**2, (number,), generator=seeded(2))
    return x if double else x.float(), cell


# --- features and position (facts 1 and 2)


def test_truncated_backbone_is_that_of_the_paper() -> None:
    torch.manual_seed(0)
    backbone = Backbone(BackboneConfig.model_validate(B6))
    assert backbone.channels == (40, 72, 200)
    assert backbone.reductions == (4, 8, 16)
    assert num_parameters(backbone) == 7_880_452
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    whole = timm.create_model(backbone.name, pretrained=False, features_only=True, out_indices=(1, 2, 3)).eval()
    assert num_parameters(whole) > 39_000_000
    state = whole.state_dict()
    backbone.pyramid.load_state_dict({name: state[name] for name in backbone.pyramid.state_dict()})
    image = torch.rand(1, 3, 64, 64)
    expected = whole((image - backbone.mean) / backbone.std)
    assert all(torch.equal(a, b) for a, b in zip(backbone(image), expected, strict=True))
    assert backbone.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])


def code_of(side: int) -> Tensor:
    """The position code (128, side, side), from its definition."""
    code = torch.empty(128, side, side, dtype=torch.float64)
    for y in range(side):
        for x in range(side):
            for j in range(32):
                w = 10_000 ** (-2 * j / 64)
                code[2 * j, y, x], code[2 * j + 1, y, x] = math.sin(x * w), math.cos(x * w)
                code[64 + 2 * j, y, x], code[64 + 2 * j + 1, y, x] = math.sin(y * w), math.cos(y * w)
    return code


def test_position_code() -> None:
    code, expected = bgad.axis_code(7).double(), code_of(7)
    torch.testing.assert_close(expected[:64, 3], code.T, rtol=0, atol=1e-6)  # channels 0 to 63: the column
    torch.testing.assert_close(expected[64:, :, 3], code.T, rtol=0, atol=1e-6)  # the others: the row
    torch.testing.assert_close(code.square().sum(dim=1), torch.full((7,), 32.0, dtype=torch.float64))
    assert code[0].tolist() == [0, 1] * 32
    torch.testing.assert_close(code[:, 0], torch.arange(7.0, dtype=torch.float64).sin(), rtol=0, atol=1e-6)
    torch.testing.assert_close(code[:, 1], torch.arange(7.0, dtype=torch.float64).cos(), rtol=0, atol=1e-6)


def test_whitened_features_have_mean_0_and_covariance_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bgad, "WHITENING_FLOOR", 0.0)
    model = model_of(features="whitened", backbone={**SETTINGS["backbone"], "layers": [1]}, steps_per_batch=[1])  # type: ignore[dict-item]
    batches = [normals(4, seed=0), normals(3, seed=1)]
    model.prepare(iter(batches))
    columns = torch.cat([rearrange(model.features(batch.image)[0], "b c h w -> (b h w) c") for batch in batches])
    torch.testing.assert_close(columns.mean(dim=0), torch.zeros(columns.shape[1]), rtol=0, atol=1e-3)
    covariance = columns.T.cov(correction=0)
    torch.testing.assert_close(covariance, torch.eye(len(covariance)), rtol=0, atol=1e-2)
    raw = rearrange(model.backbone(batches[0].image)[0], "b c h w -> (b h w) c")
    matrix = model.whitenings[0].matrix
    torch.testing.assert_close(matrix, matrix.T, rtol=1e-4, atol=1e-4)  # no turn beyond what whitening needs
    found = (raw - model.whitenings[0].mean) @ matrix.T
    torch.testing.assert_close(found, columns[: len(found)], rtol=1e-3, atol=1e-3)


def test_whitening_floor() -> None:
    """Variances 3 and 0, so a floor of a thousandth of 1.5; in the direction without variance it is all there is."""
    moments = bgad.Moments(2, torch.device("cpu"))
    side = math.sqrt(3)
    moments.update(torch.tensor([[side, -side, side, -side], [5.0, 5.0, 5.0, 5.0]]).view(1, 2, 2, 2))
    whitening = bgad.Whitening(2)
    whitening.learn(moments)
    expected = torch.tensor([[1 / math.sqrt(3.0015), 0], [0, 1 / math.sqrt(0.0015)]])
    torch.testing.assert_close(whitening.matrix, expected, rtol=1e-4, atol=1e-4)
    assert whitening.mean.tolist() == pytest.approx([0, 5])


def test_raw_features_are_those_of_the_backbone() -> None:
    model = model_of()
    model.prepare([normals(4, seed=0)])
    image = patterns(2, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.features(image), model.backbone(image), strict=True))


# --- flow (facts 3 to 9)


@pytest.mark.parametrize(("channels", "side", "count"), [(40, 64, 448_512), (72, 32, 623_616), (200, 16, 1_569_792)])
def test_flow_has_the_parameters_of_the_paper(channels: int, side: int, count: int) -> None:
    with torch.device("meta"):
        flow = ConditionalFlow(channels, Size.square(side))
    assert num_parameters(flow) == count
    assert sum(block.rotation.numel() for block in flow.blocks) == 8 * channels**2
    assert set(flow.state_dict()) == {
        f"blocks.{block}.{name}"
        for block in range(8)
        for name in (
            *("theta", "offset", "rotation"),
            *(f"{layer}.{part}" for layer in ("expand", "contract") for part in ("weight", "bias")),
        )
    }


def equations(flow: ConditionalFlow, x: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Section 4 of the specification, line by line."""
    code = code_of(flow.size.width)
    c = torch.stack([code[:, int(i) // flow.size.width, int(i) % flow.size.width] for i in cell])
    log_determinant = torch.zeros(len(x), dtype=x.dtype)
    half = x.shape[1] // 2
    for block in flow.blocks:
        x1, x2 = x[:, :half], x[:, half:]
        hidden = torch.relu(torch.cat([x1, c], dim=1) @ block.expand.weight.T + block.expand.bias)
        a = 0.1 * (hidden @ block.contract.weight.T + block.contract.bias)
        a_s, a_t = a[:, :half], a[:, half:]
        ls = 1.9 * torch.tanh(a_s)
        u = torch.cat([x1, x2 * torch.exp(ls) + a_t], dim=1)
        s = 0.2 * torch.log(1 + torch.exp(block.theta / 2))
        x = (s * u + block.offset) @ block.rotation.T
        log_determinant = log_determinant + ls.sum(dim=1) + torch.log(s).sum()
    return x, log_determinant


def test_flow_is_its_equations() -> None:
    flow = flow_of(10, 5)
    flow.code = bgad.axis_code(5).double()
    x, cell = vectors(50, 10, 5)
    found, expected = flow(x, cell), equations(flow, x, cell)
    # The code is kept in float32, hence not 1e-14.
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-6)
    z, log_determinant = expected
    ell = (-5 * math.log(2 * math.pi) - 0.5 * z.square().sum(dim=1) + log_determinant) / 10
    torch.testing.assert_close(flow.log_likelihood(x, cell), ell, rtol=0, atol=1e-6)


def inverse(flow: ConditionalFlow, z: Tensor, cell: Tensor) -> Tensor:
    code = bgad.axis_code(flow.size.width).to(z)
    c = torch.cat([code[cell % flow.size.width], code[cell // flow.size.width]], dim=1)
    for block in reversed(flow.blocks):
        u = (z @ block.rotation - block.offset) / block.scale
        x1, moved = u.chunk(2, dim=1)
        a_s, a_t = (0.1 * block.contract(torch.relu(block.expand(torch.cat([x1, c], dim=1))))).chunk(2, dim=1)
        z = torch.cat([x1, (moved - a_t) / torch.exp(1.9 * torch.tanh(a_s))], dim=1)
    return z


@pytest.mark.parametrize(("double", "tolerance"), [(True, 1e-6), (False, 1e-4)])
def test_flow_can_be_inverted(double: bool, tolerance: float) -> None:
    torch.manual_seed(0)
    flow = ConditionalFlow(40, Size.square(8))
    flow = flow.double() if double else flow
    x, cell = vectors(100, 40, 8, double=double)
    z, _ = flow(x, cell)
    assert (z - x).abs().max() > 0.1
    assert (inverse(flow, z, cell) - x).abs().max() < tolerance


def test_log_determinant_is_that_of_the_jacobian() -> None:
    flow = flow_of(12, 4)
    x, cell = vectors(5, 12, 4)
    _, log_determinant = flow(x, cell)
    for i in range(5):
        jacobian = torch.autograd.functional.jacobian(lambda v, i=i: flow(v[None], cell[i : i + 1])[0][0], x[i])
        expected = torch.linalg.slogdet(jacobian).logabsdet
        assert abs(log_determinant[i].item() - expected.item()) < 1e-6


@pytest.mark.parametrize("channels", [2, 40, 72])
def test_rotations_are_rotations(channels: int) -> None:
    torch.manual_seed(3)
    for _ in range(4):
        rotation = bgad.random_rotation(channels)
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(channels), rtol=0, atol=1e-5)
        assert torch.linalg.det(rotation.double()).item() == pytest.approx(1, abs=1e-5)


def test_rotations_of_the_plane_are_uniform() -> None:
    torch.manual_seed(0)
    rotations = [bgad.random_rotation(2) for _ in range(2000)]
    angle = torch.stack([torch.atan2(rotation[1, 0], rotation[0, 0]) for rotation in rotations])
    share = torch.histc(angle, bins=8, min=-math.pi, max=math.pi) / 2000
    assert (share - 1 / 8).abs().max() < 4 * math.sqrt(1 / 8 * 7 / 8 / 2000)


@torch.no_grad()
def test_without_the_network_a_flow_is_a_rotation() -> None:
    torch.manual_seed(0)
    flow = ConditionalFlow(16, Size.square(4)).double()
    for block in flow.blocks:
        block.contract.weight.zero_()
        block.contract.bias.zero_()
    x, cell = vectors(20, 16, 4)
    z, log_determinant = flow(x, cell)
    torch.testing.assert_close(z.norm(dim=1), x.norm(dim=1), rtol=1e-5, atol=0)
    assert log_determinant.abs().max() < 1e-4  # 16 channels, 8 scales of 1 in float32


def test_log_scales_are_bounded() -> None:
    torch.manual_seed(0)
    block = bgad.CouplingBlock(8)
    torch.testing.assert_close(block.scale, torch.ones(8), rtol=0, atol=1e-6)
    perturbed(block.contract, size=1000.0)
    x = torch.randn(500, 8, generator=seeded(0))
    zero = torch.zeros(500, dtype=torch.long)
    _, log_determinant = block(x, bgad.Position(zero, zero, bgad.axis_code(1)))
    assert log_determinant.abs().max() <= 1.9 * 4 + 1e-4
    assert log_determinant.abs().max() > 1.9 * 3


@pytest.mark.parametrize(("channels", "side"), [(40, 64), (72, 32), (200, 16)])
def test_likelihood_of_standard_normal_vectors_at_the_start(channels: int, side: int) -> None:
    torch.manual_seed(0)
    flow = ConditionalFlow(channels, Size.square(side))
    x, cell = vectors(2000, channels, side, double=False)
    assert flow.log_likelihood(x, cell).mean().item() == pytest.approx(-1.419, abs=0.03)
    assert (flow(x, cell)[1] / channels).abs().mean() < 0.02


def test_a_vector_does_not_depend_on_the_others() -> None:
    flow = flow_of(10, 6)
    x, cell = vectors(60, 10, 6)
    ell = flow.log_likelihood(x, cell)
    order = torch.randperm(60, generator=seeded(3))
    torch.testing.assert_close(flow.log_likelihood(x[order], cell[order]), ell[order], rtol=0, atol=1e-12)
    for i in range(0, 60, 7):
        torch.testing.assert_close(flow.log_likelihood(x[i : i + 1], cell[i : i + 1])[0], ell[i], rtol=0, atol=1e-12)
    moved = flow.log_likelihood(x, (cell + 1) % 36)
    assert (moved - ell).abs().min() > 1e-9  # but on its position


# --- losses (facts 10 to 13)


def test_likelihood_cost() -> None:
    found = bgad.likelihood_cost(torch.tensor([-20.0, -1.0, 0.0, 5.0]))
    torch.testing.assert_close(found, torch.tensor([20.0, 1.3133, 0.6931, 0.0067]), rtol=0, atol=5e-5)


WEIGHTS = {  # likelihood: normal, abnormal
    -3.0: (34.22, 1),
    -2.0: (21.76, 1),
    -1.0: (9.30, 1),
    -0.8: (6.95, 1.39),
    -0.5: (3.67, 2.74),
    -0.3: (1.79, 5.35),
    -0.2: (1.00, 8.77),
    -0.1: (1, 19.23),
    -0.01: (1, 209.9),
    0.05: (1, 44.6),
}


@pytest.mark.parametrize("likelihood", WEIGHTS)
def test_focal_weights_of_the_table(likelihood: float) -> None:
    normal, abnormal = WEIGHTS[likelihood]
    value = torch.tensor(likelihood)
    assert bgad.normal_weight(value).item() == pytest.approx(normal, abs=6e-3)
    assert bgad.abnormal_weight(value).item() == pytest.approx(abnormal, rel=1e-3, abs=6e-3)
    assert bgad.clipped_normal_weight(value).item() == pytest.approx(min(normal, 20), abs=6e-3)
    expected = 20 if likelihood > 0 else min(abnormal, 20)
    assert bgad.clipped_abnormal_weight(value).item() == pytest.approx(expected, rel=1e-3, abs=6e-3)


def test_focal_weights_grow_with_hardness() -> None:
    hard_normals = torch.linspace(-0.2001, -6, 100)
    assert (bgad.normal_weight(hard_normals).diff() > 0).all()
    hard_abnormals = torch.linspace(-0.999, -1e-4, 100)
    assert (bgad.abnormal_weight(hard_abnormals).diff() > 0).all()
    everything = torch.linspace(-8, 3, 1111)
    for weight in (bgad.normal_weight, bgad.abnormal_weight, bgad.clipped_normal_weight, bgad.clipped_abnormal_weight):
        assert (weight(everything) >= 0).all()
        assert weight(everything).isfinite().all()
    assert bgad.clipped_abnormal_weight(torch.tensor([0.0, 1e-30, 2.0])).tolist() == [20, 20, 20]


def hand_case() -> tuple[Tensor, Tensor]:
    """Normalised log-likelihoods with a gradient, and which are normal."""
    ell = torch.cat([torch.linspace(-5, -1, 1000, dtype=torch.float64), torch.tensor([-9, -6, -5.5, -3])])
    return (ell / 10).requires_grad_(), torch.arange(1004) < 1000


@pytest.mark.parametrize("shift", [0.0, 0.37])
def test_hand_case(shift: float) -> None:
    """A constant changes no loss."""
    likelihood, normal = hand_case()
    likelihood = likelihood + shift
    boundary = bgad.lower_quantile(likelihood[normal], 0.01)
    assert boundary.item() == pytest.approx(-0.495996 + shift, abs=5e-7)
    assert not boundary.requires_grad
    one = torch.ones_like(likelihood)
    pull = bgad.pull_loss(likelihood, normal, one, boundary)
    push = bgad.push_loss(likelihood, ~normal, one, boundary - 0.1)
    assert pull.item() == pytest.approx(0.0020020, abs=5e-8)
    assert push.item() == pytest.approx(0.1709960, abs=5e-7)
    (gradient,) = torch.autograd.grad(pull + push, likelihood)
    assert (gradient[normal] != 0).sum() == 11
    torch.testing.assert_close(gradient[:11] / 10, torch.full((11,), -1 / 110, dtype=torch.float64))  # in terms of ell
    torch.testing.assert_close(gradient[~normal] / 10, torch.tensor([0, 0, 0.05, 0.05], dtype=torch.float64))


def test_losses_vanish_on_the_right_side_only() -> None:
    boundary, one = torch.tensor(-0.5), torch.ones(4)
    everyone, nobody = torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)
    above = torch.tensor([-0.5, -0.4, 0.0, 1.0])
    assert bgad.pull_loss(above, everyone, one, boundary) == 0
    assert bgad.pull_loss(above - 0.01, everyone, one, boundary) > 0
    below = torch.tensor([-0.6, -0.7, -1.0, -9.0])
    assert bgad.push_loss(below, everyone, one, boundary - 0.1) == pytest.approx(0, abs=1e-7)
    assert bgad.push_loss(below + 0.01, everyone, one, boundary - 0.1) > 0
    for loss in (bgad.pull_loss, bgad.push_loss):
        assert loss(above, nobody, one, boundary) == 0  # nobody: finite, and not NaN
        assert loss(above, nobody, one, boundary).isfinite()


def test_beta_of_zero_pulls_nobody() -> None:
    likelihood = torch.randn(100, generator=seeded(0))
    everyone, one = torch.ones(100, dtype=torch.bool), torch.ones(100)
    boundary = bgad.lower_quantile(likelihood, 0.0)
    assert boundary == likelihood.min()
    assert bgad.pull_loss(likelihood, everyone, one, boundary) == 0
    assert bgad.lower_quantile(likelihood, 0.999999).item() == likelihood.max().item()


# --- which vectors


def test_mini_batches_share_out_vectors_and_keep_the_abnormal() -> None:
    abnormal = torch.zeros(1000, dtype=torch.bool)
    abnormal[::50] = True  # 20
    parts = bgad.mini_batches(abnormal, 4, 60, seeded(0))
    together = torch.cat(parts)
    assert [len(part) for part in parts] == [60] * 4
    assert len(set(together.tolist())) == 240
    assert [int(abnormal[part].sum()) for part in parts] == [5] * 4
    again, other = bgad.mini_batches(abnormal, 4, 60, seeded(0)), bgad.mini_batches(abnormal, 4, 60, seeded(1))
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))
    assert not torch.equal(parts[0], other[0])
    everything = bgad.mini_batches(abnormal, 3, 4096, seeded(0))
    assert sorted(torch.cat(everything).tolist()) == list(range(1000))
    assert [len(part) for part in everything] == [334, 333, 333]
    assert bgad.mini_batches(abnormal, 0, 4096, seeded(0)) == []


# --- masks at the resolution of the features


def test_area_masks_leave_out_what_is_unclear() -> None:
    mask = torch.zeros(1, 1, 32, 32)
    mask[:, :, 8:16, 8:14] = 1  # in cells of 4 pixels: all of two, and half of the two to their right
    expected = torch.full((8, 8), bgad.NORMAL)
    expected[1:5, 1:5] = bgad.LEFT_OUT
    expected[2:4, 2:4] = bgad.ABNORMAL
    found = bgad.cells_of(mask, Size.square(8), bgad.AreaMasks(name="area", abnormal=0.5))
    assert torch.equal(found.view(8, 8), expected)
    mask[:, :, :, 13] = 0
    expected[2:4, 3] = expected[1:5, 4] = bgad.LEFT_OUT  # now a quarter: left out, as is the ring around it
    assert torch.equal(
        bgad.cells_of(mask, Size.square(8), bgad.AreaMasks(name="area", abnormal=0.5)).view(8, 8), expected
    )
    expected[2:4, 3] = bgad.ABNORMAL
    assert torch.equal(
        bgad.cells_of(mask, Size.square(8), bgad.AreaMasks(name="area", abnormal=0.25)).view(8, 8), expected
    )


def test_nearest_masks_take_the_top_left_pixel() -> None:
    mask = (torch.rand(2, 1, 32, 32, generator=seeded(0)) > 0.5).float()
    found = bgad.cells_of(mask, Size.square(8), bgad.NearestMasks(name="nearest"))
    assert torch.equal(found.view(2, 8, 8), mask[:, 0, ::4, ::4].long())


# --- scoring (facts 14 and 15)


def some_maps(number: int, seed: int) -> list[Tensor]:
    return [-2 + torch.randn(number, side, side, generator=seeded(seed)).double() for side in (16, 8, 4)]


def region_overlap(anomaly_map: Tensor, truth: Tensor) -> float:
    metrics = ExactPixelMetrics()
    metrics.update(anomaly_map[:, 0], truth[:, 0])
    return metrics.compute().aupro_30


def test_published_map_is_the_same_up_to_a_constant() -> None:
    maps = some_maps(6, seed=0)
    maxima = torch.stack([level.max() for level in maps])
    total = sum(
        F.interpolate((level - most).exp().unsqueeze(1), size=32, mode="bilinear", align_corners=True)
        for level, most in zip(maps, maxima, strict=True)
    )
    assert isinstance(total, Tensor)
    published = total.max() - total
    found = bgad.to_prediction(maps, maxima, Size.square(32))
    difference = found.anomaly_map - published
    assert difference.max() - difference.min() < 1e-5
    truth = F.interpolate(torch.rand(6, 1, 8, 8, generator=seeded(1)), scale_factor=4) > 0.8
    maps = [found.anomaly_map, published]
    areas = [roc_auc_score(truth.flatten(), anomaly_map.flatten()) for anomaly_map in maps]
    assert areas[0] == pytest.approx(areas[1], abs=1e-9)
    overlaps = [region_overlap(anomaly_map, truth) for anomaly_map in maps]
    assert overlaps[0] == pytest.approx(overlaps[1], abs=1e-5)  # measured in float32
    torch.testing.assert_close(found.score, found.anomaly_map.amax(dim=(1, 2, 3)))


def test_map_is_bounded_and_monotonic() -> None:
    maps, ceiling = some_maps(3, seed=0), torch.tensor([-2.0, -2.5, -1.0])
    before = bgad.to_prediction(maps, ceiling, Size.square(32)).anomaly_map
    assert before.min() >= 0
    assert before.max() <= 3
    assert bgad.to_prediction([level + 100 for level in maps], ceiling, Size.square(32)).anomaly_map.abs().max() < 1e-6
    assert (
        3 - bgad.to_prediction([level - 100 for level in maps], ceiling, Size.square(32)).anomaly_map
    ).abs().max() < 1e-6
    for level in range(3):
        lowered = [value.clone() for value in maps]
        lowered[level][1, 2, 3] -= 1
        after = bgad.to_prediction(lowered, ceiling, Size.square(32)).anomaly_map
        assert (after >= before).all()
        assert (after[1] > before[1]).any()
        assert torch.equal(after[[0, 2]], before[[0, 2]])


def trained(model: BGAD, steps: int = 4) -> BGAD:
    model.prepare([normals(4, seed=0), normals(4, seed=1)])
    list(take_steps(model, model.optimizer(steps), batch_at, range(steps), steps))
    return model


@torch.no_grad()
@pytest.mark.parametrize("quantile", [1.0, 0.9])
def test_calibration_finds_the_ceiling_of_each_level(quantile: float) -> None:
    model = model_of(ceiling_quantile=quantile).eval()
    holdout = [normals(3, seed=20), normals(2, seed=21)]
    model.calibrate(iter(holdout))
    for level, ceiling in enumerate(model.ceiling):
        cells = np.concatenate([model.log_likelihoods(batch.image)[level].flatten().numpy() for batch in holdout])
        expected = np.quantile(cells, quantile, method="inverted_cdf")
        assert ceiling.item() == pytest.approx(expected, abs=1e-6)
    prediction = model(holdout[0].image)
    assert prediction.anomaly_map.shape == (3, 1, SIZE, SIZE)
    assert prediction.anomaly_map.min() >= 0
    assert prediction.anomaly_map.max() <= 2


# --- training


def all_terms(model: BGAD, batch: Batch, step: int = PHASE_2) -> list[dict[str, float]]:
    """What a batch yields, without a step taken."""
    return [{name: term.item() for name, term in terms.items()} for terms in model.losses(batch, progress_at(step))]


def test_phase_1_learns_from_normals_only() -> None:
    model = model_of(vectors_per_step=100_000, steps_per_batch=[1, 1])
    alone = all_terms(model, normals(4, seed=1), PHASE_1)
    assert all_terms(model, with_defects(normals(4, seed=1)), PHASE_1) == alone
    expected = [bgad.likelihood_cost(level).mean().item() for level in model.log_likelihoods(normals(4, seed=1).image)]
    assert alone == [{"likelihood": pytest.approx(value, rel=1e-5)} for value in expected]


def test_phase_2_pulls_and_pushes() -> None:
    terms = all_terms(model_of(vectors_per_step=100_000), with_defects(normals(4, seed=1)))
    assert len(terms) == 3
    assert all(set(level) == {"likelihood", "spread", "pull", "push"} for level in terms)


def test_terms_of_a_mini_batch_by_hand() -> None:
    """One level, all vectors at once, weights as published; the vectors are found again independently."""
    model = model_of(
        backbone={**SETTINGS["backbone"], "layers": [2]},  # type: ignore[dict-item]
        steps_per_batch=[1],
        vectors_per_step=100_000,
        pastes_per_batch=0,
        boundary={"name": "batch"},
        masks={"name": "nearest"},
        focal="published",
        beta=0.1,
        push_pull_weight=0.5,
        normaliser={"name": "fixed", "nats": 4.0},
    )
    batch = with_defects(normals(4, seed=1))
    (found,) = all_terms(model, batch)
    with torch.no_grad():
        ell = model.log_likelihoods(batch.image)[0].flatten().double()
    stride = SIZE // model.sizes[0].width
    abnormal = batch.mask[:, 0, ::stride, ::stride].flatten() > 0
    values = ell / 4
    ordered = sorted(values[~abnormal].tolist())
    boundary = ordered[int(0.1 * len(ordered))]
    weight = [1 if v > -0.2 else 11.7 * math.sqrt(1 - math.exp(v)) * abs(v) for v in values[~abnormal].tolist()]
    costs = [w * math.log(1 + math.exp(-e)) for w, e in zip(weight, ell[~abnormal].tolist(), strict=True)]
    pulls = [w * (boundary - v) for w, v in zip(weight, values[~abnormal].tolist(), strict=True) if v <= boundary]
    pushes = [
        (1 if v <= -1 else 0.53 * (1 + math.exp(v)) ** 2 / abs(v)) * (v - boundary + 0.1)
        for v in values[abnormal].tolist()
        if v >= boundary - 0.1
    ]
    assert found["likelihood"] == pytest.approx(sum(costs) / len(costs), rel=1e-4)
    assert found["pull"] == pytest.approx(0.5 * sum(pulls) / len(pulls), rel=1e-3)
    assert found["push"] == pytest.approx(0.5 * sum(pushes) / len(pushes), rel=1e-3)
    assert found["spread"] == pytest.approx((ordered[(len(ordered) - 1) // 2] - boundary) / 0.1, rel=1e-3)


def test_without_anomalies_the_variant_for_normals_is_trained() -> None:
    model = model_of()
    terms = all_terms(model, normals(4, seed=1))
    assert all(set(level) == {"likelihood", "spread", "pull"} for level in terms)
    assert model.boundary_known.all()


def test_an_anomaly_with_an_empty_mask_is_left_out() -> None:
    batch = with_defects(normals(4, seed=1))
    unmasked = Batch(batch.image, torch.zeros_like(batch.mask), batch.label, row=batch.row)
    assert all_terms(model_of(), unmasked) == all_terms(model_of(), normals(4, seed=1))


def test_a_mini_batch_that_shows_no_defect_is_not_pulled() -> None:
    batch = with_defects(normals(4, seed=1))
    batch.mask[:, :, :, :] = 0
    batch.mask[4:, :, 20, 20] = 1  # never half of a cell
    terms = all_terms(model_of(pastes_per_batch=0), batch)
    assert all(set(level) == {"likelihood"} for level in terms)


def test_pastes_become_training_images() -> None:
    model = model_of()
    seen: list[Tensor] = []
    model.backbone.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    batch = with_defects(normals(4, seed=1))
    foreground = torch.zeros_like(batch.mask)
    foreground[:, :, :, :40] = 1
    all_terms(model, Batch(batch.image, batch.mask, batch.label, row=batch.row, foreground=foreground))
    pasted = seen[-1]
    assert [len(image) for image in seen] == [1] * 6 + [2]
    for image in pasted:
        share = [(image == host).all(dim=0).float().mean().item() for host in batch.image]
        assert 0.5 < max(share[:4]) < 1
        assert max(share[4:]) < 0.4


def test_a_batch_whose_pastes_all_end_empty_is_trained_without(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = Pasted(torch.zeros(0, 3, SIZE, SIZE), torch.zeros(0, 1, SIZE, SIZE))
    batch = with_defects(normals(4, seed=1))
    monkeypatch.setattr(bgad, "paste_defects", lambda *_arguments: nothing)
    found = all_terms(model_of(vectors_per_step=100_000, steps_per_batch=[1, 1]), batch)
    expected = all_terms(model_of(vectors_per_step=100_000, steps_per_batch=[1, 1], pastes_per_batch=0), batch)
    assert found == [{name: pytest.approx(value, rel=1e-5) for name, value in terms.items()} for terms in expected]


def test_boundary_is_a_moving_average() -> None:
    model = model_of(boundary={"name": "ema", "momentum": 0.75})
    assert model._boundary(1, torch.tensor([3.0, 1.0, 2.0])) == 1  # the first value is taken as it is
    assert model._boundary(1, torch.tensor([5.0, 9.0])) == pytest.approx(0.75 * 1 + 0.25 * 5)
    assert model._boundary(1, torch.tensor([-2.0])) == pytest.approx(0.75 * 2 - 0.25 * 2)
    assert model.boundary.tolist() == [0, pytest.approx(1.0)]
    assert model.boundary_known.tolist() == [False, True]
    published = model_of(boundary={"name": "batch"})
    assert [published._boundary(0, torch.tensor([value])).item() for value in (1.0, 5.0)] == [1, 5]
    assert not published.boundary_known.any()


QUANTILE = {"name": "quantile", "factor": 2.5}
TEN = {"name": "fixed", "nats": 10.0}
NO_ANOMALIES = {"anomalies_per_batch": 0, "pastes_per_batch": 0}
ONE_LEVEL = {**tiny_models.BACKBONE, "layers": [2]}


def through_phase_1(
    model: BGAD, batches: Callable[[int], Batch], num_normals: int = 8
) -> tuple[BGAD, list[dict[str, Tensor]]]:
    """The model after phase 1, and the terms of its steps."""
    total = model.total_steps(num_normals)
    return model, list(take_steps(model, model.optimizer(total), batches, range(model.normal_steps(total)), total))


def test_the_normaliser_is_what_normals_lie_at_in_the_last_pass_of_phase_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of mini-batch quantiles, worked out from what the flow gave: 10 of 100 values lie below each."""
    model = model_of(normaliser=QUANTILE, normal_epochs=2, vectors_per_step=100)
    seen: dict[int, list[Tensor]] = {0: [], 1: []}
    for level, flow in enumerate(model.flows):
        found, of_level = flow.log_likelihood, seen[level]

        def recorded(x: Tensor, cell: Tensor, found: Any = found, of_level: list[Tensor] = of_level) -> Tensor:
            of_level.append(found(x, cell))
            return of_level[-1]

        monkeypatch.setattr(flow, "log_likelihood", recorded)
    through_phase_1(model, batch_at)  # 4 batches, of which 2 are the second pass; 2 and 1 steps in each
    for level, of_level in seen.items():
        last = of_level[len(of_level) // 2 :]
        expected = np.mean([np.sort(values.detach().numpy())[len(values) // 10] for values in last])
        assert model.normal_place[level].item() == pytest.approx(expected, abs=1e-6)
        assert model.normaliser(level).item() == pytest.approx(2.5 * abs(expected), abs=1e-5)
        assert int(model.num_quantiles[level]) == len(last)
    assert [len(of_level) for of_level in seen.values()] == [8, 4]


@pytest.mark.parametrize("normaliser", [QUANTILE, TEN])
def test_anomalies_do_not_move_the_normaliser(normaliser: dict[str, object]) -> None:
    among = through_phase_1(model_of(normaliser=normaliser), batch_at)[0]
    alone = through_phase_1(model_of(normaliser=normaliser), lambda step: normals(4, step % 2, 4 * (step % 2)))[0]
    assert among.num_quantiles.tolist() == [4, 2]
    assert torch.equal(among.normal_place, alone.normal_place)


def test_the_quantile_is_the_same_method_as_fixed_nats_of_its_value() -> None:
    model, _ = through_phase_1(model_of(normaliser=QUANTILE, backbone=ONE_LEVEL, steps_per_batch=[2]), batch_at)
    nats = model.normaliser(0).item()
    fixed = model_of(normaliser={"name": "fixed", "nats": nats}, backbone=ONE_LEVEL, steps_per_batch=[2])
    fixed.load_state_dict(model.state_dict())
    assert all_terms(model, batch_at(7)) == all_terms(fixed, batch_at(7))


@pytest.mark.parametrize("normaliser", [QUANTILE, TEN])
def test_normals_alone_are_enough_for_the_normaliser(normaliser: dict[str, object]) -> None:
    model = model_of(features="whitened", normaliser=normaliser, **NO_ANOMALIES)
    model.prepare([normals(4, seed=0), normals(4, seed=1)])
    through_phase_1(model, lambda step: normals(4, step % 2, 4 * (step % 2)))
    assert (model.normal_place < -1).all()  # whitened ones lie about -1.4
    assert all(term > -10 for terms in all_terms(model, normals(4, seed=1)) for term in terms.values())


def test_phase_1_has_a_batch_if_it_is_asked_for() -> None:
    model = model_of(normaliser=QUANTILE, epochs=30, normal_epochs=1, batch_size=4)
    assert model.total_steps(1) == 8
    assert model.normal_steps(8) == 1
    through_phase_1(model, batch_at, num_normals=1)
    assert (model.num_quantiles > 0).all()
    assert model_of(normal_epochs=0, normaliser=TEN).normal_steps(8) == 0


@pytest.mark.parametrize("place", [0.0, 3.0, -1e-9])
def test_a_density_without_a_scale_of_its_own_gets_the_least_normaliser(place: float) -> None:
    model = model_of(normaliser=QUANTILE)
    model.normal_place.fill_(place)
    assert model.normaliser(0).item() == pytest.approx(2.5 * bgad.LEAST_NATS)
    assert all(math.isfinite(value) for terms in all_terms(model, batch_at(7)) for value in terms.values())


@pytest.mark.parametrize(
    ("normaliser", "places", "said"),
    [
        ({"name": "fixed", "nats": 4.0}, (-1.4, -2.0), None),
        (TEN, (-12.0, -8.0), None),
        (TEN, (-1.4, -1.6), r"at -0.14, -0.16 of the normaliser .*; take normaliser: {name: quantile, factor: 1.5}"),
        (TEN, (-1.4, -8.0), r"at -0.14, -0.8 of the normaliser"),
        ({"name": "fixed", "nats": 0.5}, (-1.4, -1.6), r"at -2.8, -3.2 of the"),
        (QUANTILE, (-1.4, -90.0), None),
        ({"name": "quantile", "factor": 4.0}, (-1.4, -1.6), r"normaliser.factor is 4; take 0.5 to 3.3"),
        (QUANTILE, (-1.4, 0.5), r"at -0.4, 0.8 of .*; the normal images differ too little; look at them, or lower"),
    ],
)
def test_a_normaliser_that_does_not_fit_is_told(
    normaliser: dict[str, object], places: tuple[float, float], said: str | None
) -> None:
    model = model_of(normaliser=normaliser)
    assert list(model.warnings()) == []  # not known before phase 1, nor ever without one
    model.normal_place.copy_(torch.tensor(places))
    model.num_quantiles.fill_(3)
    warnings = list(model.warnings())
    assert len(warnings) == (said is not None)
    if said is not None:
        assert re.search(said, warnings[0])


def test_features_of_unaugmented_images_are_computed_once() -> None:
    model = model_of(pastes_per_batch=0, boundary={"name": "batch"})
    seen: list[Tensor] = []
    model.backbone.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    batch = with_defects(normals(4, seed=1))
    first = all_terms(model, batch)
    assert [len(image) for image in seen] == [1] * 6
    assert all_terms(model, batch) == first
    assert len(seen) == 6
    model.prepare([])  # other data may follow
    assert all_terms(model, batch) == first
    assert len(seen) == 12
    without_rows = Batch(batch.image, batch.mask, batch.label)
    assert all_terms(model, without_rows) == all_terms(model, without_rows) == first
    assert len(seen) == 24


@pytest.mark.parametrize("stop", [1, 3])
@pytest.mark.parametrize(
    "changes",
    [{"normaliser": TEN}, {"normaliser": QUANTILE}, {**MIXED, "normaliser": QUANTILE}],
    ids=["fixed", "quantile", "mixed"],
)
def test_a_resumed_run_ends_with_the_same_bits(changes: dict[str, object], stop: int) -> None:
    whole, killed = model_of(features="whitened", **changes), model_of(features="whitened", **changes)
    for model in (whole, killed):
        model.prepare([normals(4, seed=0), normals(4, seed=1)])
    total = whole.total_steps(6)
    assert 1 <= whole.normal_steps(total) < total
    list(take_steps(whole, whole.optimizer(total), batch_at, range(total), total))
    torch.manual_seed(99)
    resumed = BGAD(settings(features="whitened", **changes))
    resume(killed, resumed, batch_at, stop=stop, total=total)
    assert same_state(whole, resumed)


def test_idle_levels_keep_their_state_as_with_optimisers_of_their_own() -> None:
    together = model_of()
    apart = copy.deepcopy(together)
    one, _ = together.optimizer(8)
    several = [torch.optim.Adam(flow.parameters(), lr=2e-4, fused=True) for flow in apart.flows]
    for group in one.param_groups:
        group["lr"] = 2e-4
    for step in range(2, 6):
        batch = with_defects(normals(4, seed=step))
        of_both = zip(together.losses(batch, progress_at(step)), apart.losses(batch, progress_at(step)), strict=True)
        for level, both in zip((0, 0, 1), of_both, strict=True):
            for terms, optimizer in zip(both, (one, several[level]), strict=True):
                optimizer.zero_grad()
                torch.stack([term for term in terms.values() if term.requires_grad]).sum().backward()
                optimizer.step()
    assert same_state(together, apart)


# --- schedule (fact 18)


def steps_of(batch_size: int, steps: object) -> tuple[int, ...]:
    """Optimiser steps per level of a phase 2 batch of 256 px, published features."""
    with torch.device("meta"):
        model = BGAD(
            settings(
                image_size=256,
                backbone=B6,
                batch_size=batch_size - 2,
                anomalies_per_batch=1,
                pastes_per_batch=1,
                vectors_per_step=4096,
                steps_per_batch=steps,
            )
        )
    return model.steps_per_batch(phase=2)


def test_published_steps_starve_coarse_levels_and_fixed_ones_do_not() -> None:
    assert steps_of(32, "published") == (32, 8, 2)
    assert steps_of(8, "published") == (8, 2, 0)
    assert steps_of(8, [8, 2, 1]) == (8, 2, 1)


def preset() -> BGADConfig:
    return BGADConfig.model_validate(yaml.safe_load(PRESET.read_text(encoding="utf-8"))["models"]["bgad"])


PUBLISHED_STEPS = {  # normal images: optimiser steps of the released code
    60: 40_656,  # toothbrush
    209: 74_592,  # bottle
    242: 82_992,  # the mean over the categories
    320: 108_192,  # screw
    391: 124_992,  # hazelnut
}


def released_steps(num_normals: int) -> int:
    """8 passes over the normal images and 192 with 100 more, of whole batches of 32, each of 42 mini-batches."""
    return 42 * (8 * (num_normals // 32) + 192 * ((num_normals + 100) // 32))


@pytest.mark.parametrize("num_normals", PUBLISHED_STEPS)
def test_the_preset_takes_the_published_steps_whatever_the_size_of_the_category(num_normals: int) -> None:
    """And those of the part of a batch that ends each pass, which the released code drops."""
    published = PUBLISHED_STEPS[num_normals]
    assert published == released_steps(num_normals)
    with torch.device("meta"):
        model = BGAD(preset())

    def steps(count: int) -> int:
        total = model.total_steps(count)
        normal = model.normal_steps(total)
        per_batch = [sum(model.steps_per_batch(phase=phase)) for phase in (1, 2)]
        return per_batch[0] * normal + per_batch[1] * (total - normal)

    dropped = 8 * (num_normals % 32) / 32 + 192 * ((num_normals + 100) % 32) / 32  # batches
    assert steps(num_normals) == pytest.approx(published + 42 * dropped, abs=42)
    assert 0.93 < steps(num_normals - round(0.1 * num_normals)) / published < 1.04  # without the held-out tenth


def test_both_phases_of_the_preset_learn_from_4096_vectors_a_step() -> None:
    with torch.device("meta"):
        model = BGAD(preset())
    for phase in (1, 2):
        assert model.steps_per_batch(phase=phase) == (32, 8, 2)
    assert [32 * size.area for size in model.sizes] == [32 * 4096, 8 * 4096, 2 * 4096]  # of the 32 images of a batch
    tiny = model_of(**MIXED, vectors_per_step=128, steps_per_batch="published")
    assert tiny.steps_per_batch(phase=1) == tiny.steps_per_batch(phase=2) == (6 * 16**2 // 128, 6 * 8**2 // 128)


def test_phases_and_warm_up_of_mixed_passes() -> None:
    """Of 8 normal images, 6 at a time: 1 pass of 8 images, then 3 of 18."""
    model = model_of(**MIXED, warm_up_epochs=2, vectors_per_step=128, steps_per_batch=[5, 1])
    total = model.total_steps(8)
    assert total == 11  # 62 images
    assert model.normal_steps(total) == 2  # 8 images, and a part of what rounding up gives
    warm_up = 6 * ((total - 5) * 2 / 4 + 10 / 6)  # 26 images: 2 passes of normals, and 10 others
    rates = [rate for rate, *_ in rates_of(model.optimizer(total), 6 * total)]
    assert int(np.argmax(rates)) == pytest.approx(warm_up, abs=1)
    everything = model_of(**MIXED, normal_epochs=4)
    assert everything.total_steps(9) == everything.normal_steps(6) == 6  # 4 passes of 9: nothing is mixed in


def test_anomalies_of_mixed_passes_take_places_of_normal_images() -> None:
    seen: list[Tensor] = []
    model = model_of(**MIXED, boundary={"name": "batch"})
    model.backbone.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    normal, defective = normals(6, seed=1), with_defects(normals(6, seed=1))
    all_terms(model, defective, PHASE_1)
    assert torch.equal(torch.cat(seen), normal.image)  # all places are theirs
    del seen[:]
    model.prepare([])  # forgets features
    all_terms(model, defective)
    shown = torch.cat(seen)
    assert len(shown) == 6
    assert torch.equal(shown[:4], defective.image[[0, 1, 6, 7]])  # and 2 pastes
    del seen[:]
    model.prepare([])
    unmasked = Batch(defective.image, torch.zeros_like(defective.mask), defective.label, row=defective.row)
    assert all_terms(model, unmasked) == all_terms(model, normal)
    assert torch.equal(torch.cat(seen), normal.image)


@pytest.mark.parametrize("steps", ["published", [3, 2]])
@pytest.mark.parametrize("normal_epochs", [0, 1, 3])
def test_schedule_ends_with_the_last_optimiser_step(steps: object, normal_epochs: int) -> None:
    changes = {"steps_per_batch": steps, "normal_epochs": normal_epochs, "epochs": 3, "pastes_per_batch": 0}
    model = model_of(**changes, normaliser=TEN)
    total = model.total_steps(num_normals=6)
    assert total == 5  # 3 epochs of 6 images, 4 at a time
    optimizer, schedule = model.optimizer(total)
    rates = schedule.get_last_lr()[:1]
    for _ in take_steps(model, (optimizer, schedule), lambda step: with_defects(normals(4, seed=step)), range(5), 5):
        rates.append(schedule.get_last_lr()[0])
    phases = [1 if step < round(total * normal_epochs / 3) else 2 for step in range(total)]
    assert len(rates) - 1 == sum(sum(model.steps_per_batch(phase=phase)) for phase in phases)
    assert rates[0] == pytest.approx(0.1 * 2e-4)
    assert rates[-1] == pytest.approx(1e-3 * 2e-4)
    assert max(rates) < 2e-4


def test_rate_warms_up_to_the_cosine_it_then_follows() -> None:
    factors = [bgad.rate_factor(step, 20, 250) for step in range(251)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[250] == pytest.approx(1e-3)
    assert factors[20] == pytest.approx(1e-3 + 0.999 * (1 + math.cos(math.pi * 20 / 250)) / 2)
    assert factors[20] == pytest.approx(1.969 / 2, abs=1e-3)
    assert np.allclose(np.diff(factors[:21]), (factors[20] - 0.1) / 20)
    assert (np.diff(factors[20:]) < 0).all()
    assert factors[120] == pytest.approx(1.06 / 2, abs=2e-2)  # meta-epoch 12 of 25
    assert [bgad.rate_factor(step, 0, 10) for step in (0, 10, 99)] == pytest.approx([1, 1e-3, 1e-3])


def test_training_leaves_the_backbone_alone() -> None:
    model = model_of().train()
    before = copy.deepcopy(model.backbone.state_dict())
    trained(model)
    assert all(torch.equal(before[name], value) for name, value in model.backbone.state_dict().items())
    assert all(parameter.grad is None for parameter in model.backbone.parameters())


# --- export


def test_folded_flow_is_the_same_function() -> None:
    flow = flow_of(40, 8)
    features = torch.randn(3, 40, 8, 8, generator=seeded(0), dtype=torch.float64)
    torch.testing.assert_close(bgad.FoldedFlow(flow)(features), flow.map_of(features), rtol=0, atol=1e-5)
    assert (bgad.FoldedFlow(flow)(features) - flow.map_of(features)).abs().max() < 1e-9


@pytest.mark.parametrize("features", ["raw", "whitened"])
def test_folded_model_is_the_same_function(features: str) -> None:
    model = trained(model_of(features=features))
    perturbed(model.flows, size=0.02)
    model.eval().calibrate([normals(4, seed=30)])
    before, image = copy.deepcopy(model), patterns(3, seed=31)
    expected, found = model(image), model.exportable()(image)
    torch.testing.assert_close(found.anomaly_map, expected.anomaly_map, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.score, expected.score, rtol=0, atol=1e-5)
    assert same_state(model, before)


# --- what users can get wrong


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"epochs": 4, "normal_epochs": 5},
            r"normal_epochs \(5\) and warm_up_epochs \(1\) are the first of epochs \(4\)",
        ),
        (
            {"steps_per_batch": [1, 2, 3]},
            r"a number for each of the 2 maps of the backbone, or published; found \[1,",
        ),
        ({"anomalies_per_batch": 0}, "pastes_per_batch is 2, but there is nothing to copy"),
        (
            {**MIXED, "anomalies_per_batch": 0, "pastes_per_batch": 0},
            "passes are mixed, but anomalies_per_batch is 0: there is nothing to mix in",
        ),
        (
            {**MIXED, "batch_size": 4},
            r"batch_size \(4\) has no place for a normal image beside anomalies_per_batch \(2\) and pastes",
        ),
        ({"passes": {"name": "normals", "anomalous": 100}}, "Extra inputs"),
        ({"passes": {"name": "mixed", "anomalous": 0}}, "greater than 0"),
        ({"beta": 1.0}, "less than 1"),
        ({"normal_epochs": 0}, "normaliser is the quantile of phase 1, but normal_epochs is 0: there is no such phase"),
        ({"normaliser": {"name": "quantile", "factor": 0.0}}, "greater than 0"),
        ({"normaliser": {"name": "fixed", "factor": 1.0}}, "nats"),
        ({"focal": "sometimes"}, "clipped"),
    ],
)
def test_settings_that_do_not_fit(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        settings(**changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"image_size": 72, "backbone": B6 | {"name": "resnet18", "weights": "package", "layers": [2, 3]}},
            r"multiple of 16, the stride .* of resnet18, found 72; the nearest are 64 and 80",
        ),
        (
            {"backbone": {"name": "rexnet_100", "weights": "package", "layers": [1, 2], "combine": "separate"}},
            r"layers \[1, 2\] of rexnet_100 have 38, 61; take",
        ),
        (
            {"vectors_per_step": 100_000, "steps_per_batch": "published"},
            "vectors_per_step is 100000, more than any level has",
        ),
        (
            {"vectors_per_step": 300, "steps_per_batch": "published"},
            r"normaliser is the quantile of phase 1, which has no step for the level of 8 x 8 vectors",
        ),
    ],
)
def test_settings_that_do_not_fit_the_backbone(changes: dict[str, object], said: str) -> None:
    with torch.device("meta"), pytest.raises(ModelError, match=said):
        model_of(**changes)


def test_whitening_needs_images_that_differ() -> None:
    model = model_of(features="whitened")
    with pytest.raises(ModelError, match="BGAD found no normal images"):
        model.prepare([])
    moments = bgad.Moments(4, torch.device("cpu"))
    moments.update(torch.full((2, 4, 3, 3), 0.7))
    with pytest.raises(ModelError, match="the normal images are constant"):
        bgad.Whitening(4).learn(moments)


def test_calibration_needs_images() -> None:
    with pytest.raises(ModelError, match="BGAD needs held-out normal images"):
        model_of().calibrate([])


# --- learning


def stained(image: Tensor, top: int, left: int) -> tuple[Tensor, Tensor]:
    mask = torch.zeros_like(image[:, :1])
    mask[:, :, top : top + 20, left : left + 20] = 1
    return torch.where(mask > 0, image * 0.6, image), mask


def test_a_defect_that_was_never_seen_where_it_is_stands_out() -> None:
    model = model_of(features="whitened", epochs=10, learning_rate=1e-3, steps_per_batch=[2, 2], batch_size=8)
    normal, (defective, stain) = parts(16, seed=1), stained(parts(2, seed=2), 8, 30)
    model.prepare([batch_of(normal)])
    image, mask = torch.cat([normal, defective]), torch.cat([torch.zeros_like(normal[:, :1]), stain])
    total = model.total_steps(16)

    def shown(step: int) -> Batch:
        chosen = torch.cat([torch.arange(8) + 8 * (step % 2), torch.tensor([16, 17])])
        return Batch(image[chosen], mask[chosen], chosen >= 16, row=chosen)

    list(take_steps(model, model.optimizer(total), shown, range(total), total))
    model.eval().calibrate([batch_of(parts(4, seed=3))])
    with torch.no_grad():
        found, clean = model(stained(parts(1, seed=4), 36, 8)[0]), model(parts(6, seed=5))
    assert found.score.item() > clean.score.max().item()
    row, column = divmod(int(found.anomaly_map.argmax()), SIZE)
    assert 32 <= row < 60
    assert 4 <= column < 32


FAINT = (slice(24, 40), slice(24, 40))  # where the defects of training lie, all of them


def at_the_training_defects(normaliser: dict[str, object], *, defects: bool = True) -> float:
    """Of 200 unseen good parts, the share whose map is highest where the training defects were, or 4 pixels from there.

    16 good parts and 4 defects that are hard to see: there is little to push away but their place.
    """
    changes = {"epochs": 10, "learning_rate": 1e-3, "steps_per_batch": [2, 2], "batch_size": 8}
    model = model_of(features="whitened", normaliser=normaliser, **changes)
    normal, defective = parts(16, seed=1), parts(4, seed=2)
    stain = torch.zeros_like(defective[:, :1])
    stain[:, :, *FAINT] = 1
    image = torch.cat([normal, torch.where(stain > 0, 0.9 * defective, defective)])
    mask = torch.cat([torch.zeros_like(normal[:, :1]), stain])
    model.prepare([batch_of(normal)])
    total = model.total_steps(16)

    def shown(step: int) -> Batch:
        chosen = torch.arange(8) + 8 * (step % 2)
        if defects:
            chosen = torch.cat([chosen, 16 + torch.tensor([2 * step, 2 * step + 1]) % 4])
        return Batch(image[chosen], mask[chosen], chosen >= 16, row=chosen)

    list(take_steps(model, model.optimizer(total), shown, range(total), total))
    model.eval().calibrate([batch_of(parts(20, seed=3))])
    near = F.max_pool2d(stain[0], 9, stride=1, padding=4).flatten() > 0
    with torch.no_grad():
        maps = torch.cat([model(parts(50, seed=seed)).anomaly_map.flatten(1) for seed in range(5, 9)])
    return near[maps.argmax(dim=1)].float().mean().item()


def test_good_parts_do_not_look_worst_where_the_training_defects_were() -> None:
    """A normaliser too large for the features makes the push strong and the map a map of those places."""
    without = at_the_training_defects(QUANTILE, defects=False)
    assert at_the_training_defects({"name": "quantile", "factor": 1.5}) < without + 0.25  # 34 % for 22 %
    assert at_the_training_defects(TEN) > without + 0.5  # 100 %
