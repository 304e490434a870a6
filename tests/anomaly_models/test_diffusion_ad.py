"""DiffusionAD against the numbers of its paper and code, and against formulas worked by hand."""

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny_models
import torch
import torch.nn.functional as F
from drawn_batches import (
    batch_of,
    num_parameters,
    patterns,
    perturbed,
    rates_of,
    resume,
    same_state,
    seeded,
    take_steps,
)
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from anomaly_models import diffusion_ad
from anomaly_models.base import Batch, ModelError, Progress
from anomaly_models.common.scoring import mean_of_highest
from anomaly_models.common.sizes import Size
from anomaly_models.common.synthesis import Synthesised
from anomaly_models.diffusion_ad import DiffusionAD, DiffusionADConfig, ResidualBlock, Scale, focal_loss, signal_shares

SIZE = 64
STEPS = 20
HALF = [True, False, True, False]
TINY = tiny_models.SETTINGS["diffusion_ad"]
SMALL_UNET = TINY["unet"] | {"recomputed_levels": 0}
PAPER_UNET = SMALL_UNET | {
    "image_size": 256,
    "width": 128,
    "multipliers": [1, 1, 2, 2, 4, 4],
    "blocks": 2,
    "attention_sizes": [32, 16, 8],
}
PLAIN = {"reconstruction_weight": 0.0, "gradient_clip": None, "ema_decay": 0.0}
SETTINGS = TINY | PLAIN | {"unet": SMALL_UNET, "steps": STEPS}
PREDICTS_IMAGE = {"name": "image", "components": 4, "folds": 3}
# What the small presets do and the paper does not.
DEPARTING = {"noise_scale": 0.125, "predicts": PREDICTS_IMAGE, "denoises": "all", "timesteps": "inference"}
REDUCED_UNET = SMALL_UNET | {"image_size": 32, "attention_sizes": [16]}


def settings(**changes: object) -> DiffusionADConfig:
    return DiffusionADConfig.model_validate({**SETTINGS, **changes})


def small_unet(**changes: object) -> dict[str, object]:
    return {**SMALL_UNET, **changes}


def paper_settings(**changes: object) -> DiffusionADConfig:
    paper = {
        "image_size": 256,
        "resize": "bilinear",
        "fit": "stretch",
        "tiles": None,
        "batch_size": 16,
        "unet": PAPER_UNET,
        "segmentation_width": 64,
    }
    return settings(**paper | changes)


def batch_at(seed: int) -> Batch:
    image = patterns(4, seed)
    return batch_of(image, texture=patterns(4, 1000 + seed), foreground=torch.ones_like(image[:, :1]))


def random_scale(steps: list[int], seed: int, noise_scale: float = 1.0) -> Scale:
    share = torch.tensor(signal_shares(), dtype=torch.float64)[steps].view(-1, 1, 1, 1)
    noise = torch.randn(len(steps), 3, SIZE, SIZE, generator=seeded(seed))
    return Scale(torch.tensor(steps), share.sqrt().float(), (1 - share).sqrt().float(), noise, noise_scale)


def both_scales() -> tuple[Scale, Scale]:
    return random_scale([0, 9, 100, 299], seed=2), random_scale([300, 400, 500, 599], seed=3)


def denoise(unet: nn.Module, image: Tensor, small: Scale, big: Scale) -> diffusion_ad.Denoised:
    """By prediction of the noise."""
    return diffusion_ad.denoise(unet, *(diffusion_ad.noisy_image(image, scale) for scale in (small, big)))


def sample_of(number: int, seed: int, corrupted: list[bool]) -> Synthesised:
    """Images with a soft-edged square where they are corrupted."""
    image, label = patterns(number, seed), torch.tensor(corrupted)
    mask = torch.zeros(number, 1, SIZE, SIZE)
    mask[label, :, 20:40, 20:40] = 0.5
    mask[label, :, 22:38, 22:38] = 1
    return Synthesised(torch.lerp(image, 1 - image, mask), mask, label)


def build(**changes: object) -> DiffusionAD:
    torch.manual_seed(0)
    return DiffusionAD(settings(**changes))


# --- networks


def test_parameters_as_in_the_paper() -> None:
    with torch.device("meta"):
        model = DiffusionAD(paper_settings())
    unet, segmentation = model.networks.unet, model.networks.segmentation
    assert num_parameters(unet) == 131_654_403
    assert num_parameters(unet.input) == 3_584
    assert num_parameters(unet.time) == 328_704
    assert num_parameters(unet.middle) == 11_020_288
    assert num_parameters(unet.output) == 3_715
    assert 1 + len(unet.down) == 18
    assert len(unet.up) == 18
    assert num_parameters(segmentation) == 28_373_569
    assert sum(buffer.numel() for buffer in segmentation.buffers()) == 14_107


@torch.no_grad()
@pytest.mark.parametrize(
    ("width", "side", "segmentation_width", "millions", "gigaflop"),
    [
        (128, 256, 64, (131.7, 28.4), 2 * 563.2 + 76.0),
        (64, 256, 32, (33.0, 7.1), 304),
        (128, 128, 64, (127.7, 28.4), 371),
        (64, 128, 32, (32.0, 7.1), 96),
    ],
)
def test_cost_as_documented(
    width: int, side: int, segmentation_width: int, millions: tuple[float, float], gigaflop: float
) -> None:
    unet = {**PAPER_UNET, "width": width, "image_size": side}
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = DiffusionAD(paper_settings(unet=unet, segmentation_width=segmentation_width)).eval()
        model(torch.rand(1, 3, 256, 256))
    parts = (model.networks.unet, model.networks.segmentation)
    assert [num_parameters(part) / 1e6 for part in parts] == pytest.approx(millions, abs=0.05)
    assert counter.get_total_flops() / 1e9 == pytest.approx(gigaflop, abs=0.5)


def test_parameters_of_the_blocks() -> None:
    with torch.device("meta"):
        blocks = [ResidualBlock(channels, channels, embedding=512) for channels in (128, 256)]
        attention = diffusion_ad.Attention(256, heads=4)
    assert [num_parameters(block) for block in (*blocks, attention)] == [361_344, 1_312_512, 263_680]


def test_skips_of_the_unet_as_in_the_paper() -> None:
    with torch.device("meta"):
        unet = diffusion_ad.UNet(diffusion_ad.UNetConfig.model_validate(PAPER_UNET))
    sizes = []
    for stage in [unet.input, *unet.down]:
        stage.register_forward_hook(lambda _module, _inputs, output: sizes.append(tuple(output.shape[1:3])))
    unet(torch.empty(1, 3, 256, 256, device="meta"), torch.zeros(1, dtype=torch.long, device="meta"))
    expected = "128@256 128@256 128@256 128@128 128@128 128@128 128@64 256@64 256@64 256@32 256@32 256@32 256@16 "
    expected += "512@16 512@16 512@8 512@8 512@8"
    assert sizes == [tuple(map(int, entry.split("@"))) for entry in expected.split()]


def test_the_unet_is_zero_until_it_is_trained() -> None:
    unet = build().networks.unet
    assert (unet(torch.rand(2, 3, SIZE, SIZE), torch.tensor([0, 999])) == 0).all()


@torch.no_grad()
@pytest.mark.parametrize("size", [32, 64, 96])
def test_one_unet_takes_any_size(size: int) -> None:
    unet = perturbed(build().networks.unet, seed=1)
    image = torch.rand(2, 3, size, size, generator=seeded(2))
    step = torch.tensor([10, 700])
    output = unet(image, step)
    assert output.shape == image.shape
    assert not torch.equal(output, unet(image, step.flip(0)))  # the step matters
    torch.testing.assert_close(unet(image.flip(0), step.flip(0)), output.flip(0))


@pytest.mark.parametrize("size", [32, 96])
def test_segmentation_gives_a_logit_per_pixel(size: int) -> None:
    network = diffusion_ad.SegmentationNet(width=4)
    image = torch.rand(2, 3, size, size, generator=seeded(1))
    assert network(image, image).shape == (2, 1, size, size)


def test_a_residual_block_is_its_skip_until_it_is_trained() -> None:
    image = torch.rand(2, 8, 6, 6, generator=seeded(1))
    embedding = torch.rand(2, 32, generator=seeded(2))
    assert torch.equal(ResidualBlock(8, 8, embedding=32)(image, embedding), image)
    widening = ResidualBlock(8, 12, embedding=32)
    assert torch.equal(widening(image, embedding), widening.skip(image))


def test_a_residual_block_by_hand() -> None:
    block = perturbed(ResidualBlock(8, 12, embedding=32), seed=1)
    x, embedding = torch.randn(2, 8, 6, 6, generator=seeded(2)), torch.randn(2, 32, generator=seeded(3))
    h = F.group_norm(x, 2, block.norm1.weight, block.norm1.bias, eps=1e-5)
    h = F.conv2d(h * torch.sigmoid(h), block.conv1.weight, block.conv1.bias, padding=1)
    h = h + (embedding @ block.shift.weight.T + block.shift.bias)[:, :, None, None]
    h = F.group_norm(h, 1, block.norm2.weight, block.norm2.bias, eps=1e-5)
    h = F.conv2d(h * torch.sigmoid(h), block.conv2.weight, block.conv2.bias, padding=1)
    skip = torch.einsum("oi,nihw->nohw", block.skip.weight[:, :, 0, 0], x) + block.skip.bias[:, None, None]
    torch.testing.assert_close(block(x, embedding), h + skip)


def test_both_branches_of_a_block_are_resampled() -> None:
    unet = build().networks.unet
    halving, doubling = unet.down[1].block, unet.up[1].upsampling
    image = torch.arange(16.0).view(1, 1, 4, 4).expand(1, 8, 4, 4)
    embedding = torch.zeros(1, 32)
    averages = torch.tensor([[2.5, 4.5], [10.5, 12.5]])
    assert torch.equal(halving(image, embedding)[0, 0], averages)
    repeated = image[0, 0].repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(doubling(image.repeat(1, 2, 1, 1), embedding)[0, 0], repeated)
    for block, size in ((halving, 2), (doubling, 8)):
        perturbed(block, seed=1)
        channels = block.conv1.in_channels
        assert block(torch.rand(1, channels, 4, 4), embedding).shape == (1, channels, size, size)


@torch.no_grad()
def test_attention_position_by_position() -> None:
    attention = perturbed(diffusion_ad.Attention(8, heads=2), seed=1, size=0.5)
    image = torch.randn(1, 8, 2, 3, generator=seeded(2))
    columns = attention.qkv(attention.norm(image))[0].flatten(1)  # (24, 6)
    attended = torch.empty(8, 6)
    for head in range(2):
        query, key, value = columns[12 * head : 12 * (head + 1)].split(4)  # 12 channels per head, in this order
        for position in range(6):
            weights = torch.softmax(torch.stack([query[:, position] @ key[:, k] / 2 for k in range(6)]), 0)
            attended[4 * head : 4 * (head + 1), position] = value @ weights
    torch.testing.assert_close(attention(image), image + attention.output(attended.view(1, 8, 2, 3)))


def test_attention_is_the_identity_until_it_is_trained() -> None:
    image = torch.randn(1, 8, 4, 4)
    assert torch.equal(diffusion_ad.Attention(8, heads=2)(image), image)


@torch.no_grad()
def test_time_embedding_is_made_of_sines_and_cosines() -> None:
    module = diffusion_ad.TimeEmbedding(width=8)
    seen = []
    module.layers.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    module(torch.tensor([0, 437]))
    angles = [437 / 10_000 ** (k / 4) for k in range(4)]
    expected = [[0.0] * 4 + [1.0] * 4, [*map(math.sin, angles), *map(math.cos, angles)]]
    torch.testing.assert_close(seen[0], torch.tensor(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("channels", "groups"), [(128, 32), (512, 32), (1024, 32), (64, 16), (16, 4), (24, 2), (8, 2)])
def test_groups_have_four_channels_or_more(channels: int, groups: int) -> None:
    assert diffusion_ad.GroupNorm(channels).num_groups == groups


def test_group_normalisation_is_computed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("torch.nn.functional.group_norm", lambda x, *_others: seen.append(x.dtype) or x)
    assert diffusion_ad.GroupNorm(8)(torch.rand(1, 8, 4, 4).bfloat16()).dtype == torch.bfloat16
    assert seen == [torch.float32]


def test_recomputing_levels_changes_no_gradient() -> None:
    plain = build(unet=small_unet(multipliers=[1, 1, 2]))
    thrifty = build(unet=small_unet(multipliers=[1, 1, 2], recomputed_levels=2))
    recomputed = [stage.recomputed for stage in [*thrifty.networks.unet.down, *thrifty.networks.unet.up]]
    assert recomputed == [True] * 4 + [False] * 3 + [True] * 4
    for model in (plain, thrifty):
        perturbed(model, seed=1)
        step = Progress(0, STEPS, seeded(0))
        sum(next(model.losses(batch_at(1), step)).values()).backward()
    for (name, expected), found in zip(plain.named_parameters(), thrifty.parameters(), strict=True):
        assert torch.equal(found.grad, expected.grad), name
    for expected, found in zip(plain.buffers(), thrifty.buffers(), strict=True):
        assert torch.equal(found, expected)  # batch statistics are taken once


# --- diffusion


def test_signal_shares_as_in_the_paper() -> None:
    table = {
        0: 0.99990000,
        100: 0.89514159,
        200: 0.65634701,
        299: 0.39641976,
        300: 0.39401112,
        400: 0.19357201,
        500: 0.07779666,
        600: 0.02556749,
        999: 0.00004036,
    }
    shares = np.array(signal_shares())
    assert shares.shape == (1000,)
    assert 0 < shares.min() < shares.max() < 1
    assert (np.diff(shares) < 0).all()
    assert {step: shares[step] for step in table} == pytest.approx(table, abs=1e-8)
    betas = 1 - shares / np.array([1, *shares[:-1]])
    assert betas.sum() == pytest.approx(10.05)


@pytest.mark.parametrize(("step", "tolerance"), [(0, 1e-6), (200, 1e-6), (400, 1e-6), (999, 1e-4)])
def test_one_step_with_the_exact_noise_recovers_the_image(step: int, tolerance: float) -> None:
    image = patterns(2, seed=1)
    scale = random_scale([step, step], seed=2)
    noisy = scale.noised(image)
    share = signal_shares()[step]
    expected = math.sqrt(share) * image + math.sqrt(1 - share) * scale.noise
    torch.testing.assert_close(noisy, expected, atol=1e-6, rtol=0)
    assert (scale.denoised(noisy, scale.noise) - image).abs().max() < tolerance


@pytest.mark.parametrize(("small_step", "big_step"), [(0, 300), (200, 400), (299, 999), (120, 599)])
def test_the_blend_is_norm_guided_denoising(small_step: int, big_step: int) -> None:
    """The authors' four lines: guide, guide noised with the predicted noise, guided noise, one step."""
    image = patterns(3, seed=1)
    small = random_scale([small_step] * 3, seed=2)
    big = random_scale([big_step] * 3, seed=3)
    small_noise, big_noise = (
        scale.noise + 0.3 * torch.randn(image.shape, generator=seeded(4 + index))
        for index, scale in enumerate((small, big))
    )
    noisy_small, noisy_big = small.noised(image), big.noised(image)
    guide = big.denoised(noisy_big, big_noise).clamp(-1, 1)
    noised_guide = small.signal * guide + small.sigma * small_noise
    guided_noise = small_noise - small.sigma * (noised_guide - noisy_small)
    expected = small.denoised(noisy_small, guided_noise).clamp(-1, 1)
    alone = small.denoised(noisy_small, small_noise), big.denoised(noisy_big, big_noise)
    found = diffusion_ad.guided(*alone, small.sigma)
    assert (found - expected).abs().max() < 1e-6


def test_the_blend_at_the_steps_of_inference() -> None:
    sigma = math.sqrt(1 - signal_shares()[200])
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    assert float(diffusion_ad.guided(one, zero, sigma)) == pytest.approx(0.6563, abs=1e-4)
    assert float(diffusion_ad.guided(zero, one, sigma)) == pytest.approx(0.3437, abs=1e-4)


@pytest.mark.parametrize("sigma", [0.0, 0.3, 0.78, 1.0])
def test_the_blend_lies_between_the_reconstructions(sigma: float) -> None:
    small = 2 * torch.randn(2, 3, 8, 8, generator=seeded(1))
    big = 2 * torch.randn(2, 3, 8, 8, generator=seeded(2))
    blend = diffusion_ad.guided(small, big, sigma)
    ends = torch.stack([small.clamp(-1, 1), big.clamp(-1, 1)])
    assert (blend >= ends.amin(0) - 1e-6).all()
    assert (blend <= ends.amax(0) + 1e-6).all()
    if sigma == 0:
        assert torch.equal(blend, ends[0])
    if sigma == 1:
        assert torch.equal(blend, ends[1])


class Oracle(nn.Module):
    """Predicts what it is told, and notes what it sees."""

    def __init__(self, noise: Tensor) -> None:
        super().__init__()
        self.noise = noise
        self.calls: list[tuple[Tensor, Tensor]] = []

    def forward(self, noisy: Tensor, step: Tensor) -> Tensor:
        self.calls.append((noisy, step))
        return self.noise


def test_the_exact_noise_gives_the_image_back_in_one_call() -> None:
    image = patterns(2, seed=1)
    small = random_scale([5, 250], seed=2)
    big = random_scale([300, 550], seed=3)
    oracle = Oracle(torch.cat([small.noise, big.noise]))
    denoised = denoise(oracle, image, small, big)
    torch.testing.assert_close(denoised.image, image, atol=1e-5, rtol=0)
    assert torch.equal(denoised.small_output, small.noise)
    assert torch.equal(denoised.big_output, big.noise)
    ((noisy, step),) = oracle.calls
    assert torch.equal(noisy, torch.cat([small.noised(image), big.noised(image)]))
    assert step.tolist() == [5, 250, 300, 550]


def test_gradients_of_the_reconstruction() -> None:
    image = patterns(1, seed=1)
    small, big = random_scale([200], seed=2), random_scale([400], seed=3)
    noise = torch.cat([small.noise, big.noise]) + 0.4 * torch.randn(2, 3, SIZE, SIZE, generator=seeded(4))
    noise.requires_grad_()
    reconstruction = denoise(Oracle(noise), image, small, big).image
    reconstruction.sum().backward()
    share_small, share_big = signal_shares()[200], signal_shares()[400]
    alive = reconstruction.detach().abs() < 1
    unclamped_guide = big.denoised(big.noised(image), noise.detach()[1:]).abs() < 1
    assert 0.5 < alive.float().mean() < 1
    assert 0.3 < unclamped_guide.float().mean() < 1
    by_small = -share_small * math.sqrt(1 / share_small - 1)
    by_big = -(1 - share_small) * math.sqrt(1 / share_big - 1)
    torch.testing.assert_close(noise.grad[:1], by_small * alive.float())
    torch.testing.assert_close(noise.grad[1:], by_big * (alive & unclamped_guide).float())


# --- noise scale


@pytest.mark.parametrize("step", [0, 200, 999])
def test_all_noise_is_scaled(step: int) -> None:
    image, share = patterns(2, seed=1), signal_shares()[step]
    scale = random_scale([step, step], seed=2, noise_scale=0.125)
    noisy = scale.noised(image)
    expected = math.sqrt(share) * image + 0.125 * math.sqrt(1 - share) * scale.noise
    torch.testing.assert_close(noisy, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(scale.denoised(noisy, scale.noise), image, atol=1e-4, rtol=0)


def test_the_blend_does_not_know_the_noise_scale() -> None:
    """With the exact images of both scales it is theirs, weighted 1 - abar to abar as published."""
    image = patterns(1, seed=1)
    small, big = (random_scale([step], seed=step, noise_scale=0.125) for step in (200, 400))
    shifted = [scale.noise + shift for scale, shift in ((small, 0.5), (big, -0.5))]
    found = denoise(Oracle(torch.cat(shifted)), image, small, big).image
    parts = [scale.denoised(scale.noised(image), noise) for scale, noise in zip((small, big), shifted, strict=True)]
    expected = 0.656347 * parts[0] + 0.343653 * parts[1].clamp(-1, 1)
    torch.testing.assert_close(found, expected.clamp(-1, 1), atol=1e-5, rtol=0)


def test_noise_at_the_paper_s_resolution_is_as_strong_once_reduced() -> None:
    """Averages of 8 x 8 pixels of noise at 256 pixels deviate by an eighth of it."""
    noise = torch.randn(4, 3, 256, 256, generator=seeded(1))
    assert float(diffusion_ad.reduced(noise, Size.square(32)).std()) == pytest.approx(32 / 256, rel=0.02)


# --- image prediction


def learnt(number: int = 7, **changes: object) -> DiffusionAD:
    """Prepared with images that are the rows 0 to `number` of their data set."""
    model = build(**DEPARTING | changes)
    rows = torch.arange(number)
    model.prepare([batch_of(patterns(number, seed=50), row=rows)])
    return model


@pytest.mark.parametrize("unet", [SMALL_UNET, REDUCED_UNET])
def test_image_prediction_by_hand(unet: dict[str, object]) -> None:
    """x0 = W(x_t) + c_skip r + c_out F(c_in (x_t - s mu)), EDM's factors for what the filter leaves of an image."""
    model, image = perturbed(learnt(unet=unet).eval(), seed=1), patterns(2, seed=1)
    assert model.preconditioner is not None
    side, residual = unet["image_size"], float(model.preconditioner.residual)
    seen = diffusion_ad.reduced(image, Size.square(side))
    reconstructions = []
    for index, step in enumerate((200, 400)):
        share = signal_shares()[step]
        signal, deviation = math.sqrt(share), 0.125 * math.sqrt(1 - share)
        noisy = signal * seen + deviation * model.noise[index]
        filtered = model.preconditioner.filter(noisy, signal, deviation)
        mean = diffusion_ad.reduced(patterns(7, seed=50).mean(0, keepdim=True), Size.square(side))
        variance = signal**2 * residual**2 + deviation**2
        output = model.networks.unet((noisy - signal * mean) / variance**0.5, torch.tensor([step, step]))
        correction = signal * residual**2 / variance * filtered.across + deviation * residual / variance**0.5 * output
        reconstructions.append(filtered.image + F.interpolate(correction, size=SIZE, mode="bilinear"))
    small, big = reconstructions
    blend = (0.656347 * small + 0.343653 * big.clamp(-1, 1)).clamp(-1, 1)
    expected = torch.sigmoid(model.networks.segmentation(image, blend))
    torch.testing.assert_close(model(image).anomaly_map, expected, atol=1e-5, rtol=0)


def test_before_training_the_reconstruction_is_linear() -> None:
    """The Wiener filter for the training images' covariance, and the residual's variance in all other directions."""
    model, image = learnt(), patterns(2, seed=1)
    pictures = patterns(7, seed=50).flatten(1).double()
    mean = pictures.mean(0)
    _, values, right = torch.linalg.svd(pictures - mean, full_matrices=False)
    directions, variances = right[:4], values[:4] ** 2 / 7
    residual = float(model.preconditioner.residual)
    for scale in diffusion_ad.fixed_scales(model.config, model.noise, batch=2):
        seen = model.preconditioner(image, scale)
        found = seen.image(model.networks.unet(seen.input, scale.step))
        centred = scale.noised(image).flatten(1).double() - scale.signal * mean
        along = centred @ directions.T
        gains = scale.signal * variances / (scale.signal**2 * variances + scale.deviation**2)
        others = scale.signal * residual**2 / (scale.signal**2 * residual**2 + scale.deviation**2)
        expected = mean + (gains * along) @ directions + others * (centred - along @ directions)
        torch.testing.assert_close(found.flatten(1), expected.float(), atol=1e-4, rtol=0)


def test_the_target_of_image_prediction_is_the_clean_image() -> None:
    model, clean, scale = learnt(), patterns(2, seed=1), random_scale([200, 400], seed=2, noise_scale=0.125)
    seen = model.preconditioner(patterns(2, seed=3), scale)
    torch.testing.assert_close(seen.image(seen.target(clean)), clean, atol=1e-5, rtol=0)


def test_the_target_of_noise_prediction_is_the_image_before_its_defect() -> None:
    sample, clean = sample_of(2, seed=1, corrupted=[True, False]), patterns(2, seed=1)
    seen = diffusion_ad.noisy_image(sample.image, random_scale([200, 400], seed=2))
    target = seen.target(clean)
    torch.testing.assert_close(seen.image(target), clean, atol=1e-5, rtol=0)
    assert torch.equal(target[1], seen.scale.noise[1])  # a normal image's is the noise


def test_targets_of_images_that_the_filter_has_not_seen_are_of_variance_one() -> None:
    model, images, rows = learnt(number=40), patterns(40, seed=50), torch.arange(40)
    for step in (200, 400):
        scale = random_scale([step] * 40, seed=2, noise_scale=0.125)
        seen = model.preconditioner(images, scale, rows)
        assert float(seen.target(images).square().mean().sqrt()) == pytest.approx(1, rel=0.05)
        if step == 200:
            error = float((images - seen.filtered).square().mean().sqrt())
            assert float(model.preconditioner.residual) == pytest.approx(error, rel=0.01)


def test_a_training_image_is_filtered_by_the_other_folds() -> None:
    model, images, rows = learnt(), patterns(7, seed=50)[:3], torch.tensor([0, 1, 9])
    scale = random_scale([200] * 3, seed=2, noise_scale=0.125)
    known, alone = model.preconditioner(images, scale, rows), model.preconditioner(images, scale)
    assert not torch.equal(known.filtered[:2], alone.filtered[:2])
    torch.testing.assert_close(known.filtered[2:], alone.filtered[2:])  # no training image
    outside = [index for index in range(7) if index % 3 != 1]
    other = build(**DEPARTING)
    other.prepare([batch_of(patterns(7, seed=50)[outside])])
    expected = other.preconditioner(images[1:2], Scale(*(part[1:2] for part in scale[:-1]), 0.125)).filtered
    torch.testing.assert_close(known.filtered[1:2], expected, atol=1e-5, rtol=0)


def test_rows_reach_the_filter_of_a_training_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = learnt(), []
    forward = diffusion_ad.Preconditioner.forward

    def note(self: nn.Module, image: Tensor, scale: Scale, row: Tensor | None = None) -> object:
        seen.append(row)
        return forward(self, image, scale, row)

    monkeypatch.setattr(diffusion_ad.Preconditioner, "forward", note)
    rows = torch.tensor([3, 1, 6, 0])
    next(model.losses(replace(batch_at(1), row=rows), Progress(0, STEPS, seeded(0))))
    next(model.losses(batch_at(1), Progress(0, STEPS, seeded(0))))
    assert seen == [rows, rows, None, None]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_few_training_images_are_enough(number: int) -> None:
    model = learnt(number=number, unet=REDUCED_UNET)
    batches = (replace(batch_at(step), row=torch.arange(4) % number) for step in range(3))
    for terms in take_steps(model, model.optimizer(STEPS), lambda _step: next(batches), range(3), STEPS):
        assert all(value.isfinite() for value in terms.values())
    assert model.eval()(patterns(2, seed=1)).anomaly_map.isfinite().all()


def test_constant_training_images_leave_a_grey_level() -> None:
    model = build(**DEPARTING)
    model.prepare([batch_of(torch.full((4, 3, SIZE, SIZE), 0.4), row=torch.arange(4))])
    assert float(model.preconditioner.residual) == pytest.approx(1 / 255)
    assert model.eval()(patterns(2, seed=1)).anomaly_map.isfinite().all()


def test_without_an_image_there_is_nothing_to_learn_a_filter_from() -> None:
    with pytest.raises(ModelError, match="DiffusionAD has no normal image to learn from"):
        build(**DEPARTING).prepare([])
    build().prepare([])  # noise prediction learns nothing beforehand


def test_a_resumed_training_ends_with_the_same_bits() -> None:
    """Of steps that need the filters of the folds, which a run that goes on does not learn again."""

    def batch(step: int) -> Batch:
        return replace(batch_at(step), row=torch.arange(4) + step % 3)

    expected, killed, resumed = learnt(ema_decay=0.9), learnt(ema_decay=0.9), build(**DEPARTING, ema_decay=0.9)
    resume(killed, resumed, batch, stop=2, total=4)
    list(take_steps(expected, expected.optimizer(4), batch, range(4), 4))
    for model in (expected, resumed):
        model.eval()
    assert same_state(expected, resumed)


def test_a_trained_model_has_no_filters_of_folds() -> None:
    model, image = learnt().eval(), patterns(2, seed=1)
    shapes = {name: value.shape for name, value in model.state_dict().items() if name.startswith("preconditioner")}
    assert shapes["preconditioner.filter.directions"] == (1, 4, 3, SIZE, SIZE)
    assert shapes["preconditioner.filter.rows"] == (0,)
    fresh = build(**DEPARTING).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(image).anomaly_map, model(image).anomaly_map)


# --- losses


@pytest.mark.parametrize("target", [0.0, 1.0])
def test_focal_loss_at_one_half(target: float) -> None:
    logits = torch.zeros(2, 1, 4, 4)
    assert float(focal_loss(logits, torch.full_like(logits, target))) == pytest.approx(0.021661, abs=1e-6)


def test_focal_loss_pixel_by_pixel() -> None:
    logits = torch.tensor([[-2.0, 0.3], [1.5, -0.1]]).view(1, 1, 2, 2)
    target = torch.tensor([[0.0, 1.0], [0.25, 1.0]]).view(1, 1, 2, 2)
    total = 0.0
    for logit, y in zip(logits.flatten().tolist(), target.flatten().tolist(), strict=True):
        p = 1 / (1 + math.exp(-logit))
        entropy = -(y * math.log(p) + (1 - y) * math.log(1 - p))
        total += 0.5 * (1 - math.exp(-entropy)) ** 4 * entropy
    assert float(focal_loss(logits, target)) == pytest.approx(total / 4)


def test_focal_loss_vanishes_only_where_the_target_is_met() -> None:
    certain = torch.tensor([-200.0, 200.0]).view(1, 1, 1, 2)
    assert float(focal_loss(certain, certain.sigmoid())) == 0
    assert float(focal_loss(certain, 1 - certain.sigmoid())) == pytest.approx(100)
    soft = torch.full((1, 1, 1, 2), 0.3)
    best = torch.logit(soft)
    assert float(focal_loss(best, soft)) > 0  # the entropy of a soft target remains


def test_the_denoising_loss_counts_images_that_are_not_left_out() -> None:
    noise = torch.zeros(3, 3, 2, 2)
    predicted = torch.tensor([1.0, 10.0, 2.0]).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    loss = diffusion_ad.denoising_loss(noise, predicted, torch.tensor([False, True, False]))
    assert float(loss) == pytest.approx((1 + 4) / 2)
    assert float(diffusion_ad.denoising_loss(noise, predicted, torch.tensor([True, True, True]))) == 0


def test_reconstruction_loss_counts_corrupted_images_only() -> None:
    image = torch.zeros(3, 3, 2, 2)
    reconstruction = torch.tensor([1.0, -0.5, 0.1]).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    loss = diffusion_ad.reconstruction_loss(reconstruction, image, torch.tensor([False, True, True]))
    assert float(loss) == pytest.approx(0.3)
    assert float(diffusion_ad.reconstruction_loss(reconstruction, image, torch.tensor([False] * 3))) == 0


def test_losses_before_the_first_step() -> None:
    """As the authors' networks start: 1 for the noise of each scale, and a segmentation that says one half."""
    model = build(batch_size=8, segmentation_width=16)
    terms = model.terms(
        patterns(8, seed=1),
        sample_of(8, seed=1, corrupted=[True, False] * 4),
        random_scale(list(range(0, 240, 30)), seed=2),
        random_scale(list(range(300, 540, 30)), seed=3),
    )
    assert set(terms) == {"noise", "focal", "smooth_l1"}
    values = {name: float(value.detach()) for name, value in terms.items()}
    assert values["noise"] == pytest.approx(2.005, abs=0.03)
    assert values["focal"] == pytest.approx(0.108, abs=0.05)
    assert values["smooth_l1"] == pytest.approx(0.125, abs=0.04)
    assert sum(values.values()) == pytest.approx(2.23, abs=0.08)


@torch.no_grad()
def test_a_segmentation_that_says_one_half() -> None:
    """As the authors' network nearly does at first."""
    model = build()
    fresh = model.eval()(patterns(4, seed=1)).anomaly_map
    assert 0 < fresh.min() < fresh.max() < 1
    assert float(fresh.mean()) == pytest.approx(0.5, abs=0.1)
    for parameter in model.networks.segmentation.output.parameters():
        parameter.zero_()
    soft = sample_of(4, seed=1, corrupted=HALF)
    terms = model.terms(patterns(4, seed=1), replace(soft, mask=soft.mask.round()), *both_scales())
    assert float(terms["focal"]) == pytest.approx(0.108305, abs=1e-5)
    assert float(terms["smooth_l1"]) == pytest.approx(0.125, abs=1e-6)


def test_terms_are_the_paper_s() -> None:
    """Smooth L1 of differences up to 1 is half their square, and the sum is noise + 5 focal + smooth L1."""
    model = perturbed(build(), seed=1)
    sample = sample_of(4, seed=1, corrupted=HALF)
    small, big = both_scales()
    found = model.terms(sample.image, sample, small, big)
    model = copy.deepcopy(model)
    denoised = denoise(model.networks.unet, sample.image, small, big)
    logits = model.networks.segmentation(sample.image, denoised.image)
    normal = [1, 3]
    noise = sum(
        (predicted - scale.noise)[normal].square().mean()
        for predicted, scale in ((denoised.small_output, small), (denoised.big_output, big))
    )
    torch.testing.assert_close(found["noise"], noise)
    torch.testing.assert_close(found["focal"], 5 * focal_loss(logits, sample.mask))
    torch.testing.assert_close(found["smooth_l1"], ((logits.sigmoid() - sample.mask) ** 2 / 2).mean())


def test_terms_of_image_prediction() -> None:
    """The error of the image before its defect, over c_out; of every image, or of those without a defect."""
    model, rows = perturbed(learnt(unet=REDUCED_UNET), seed=1), torch.arange(4)
    sample, normal = sample_of(4, seed=1, corrupted=HALF), patterns(4, seed=1)
    small, big = ((scale._replace(noise=scale.noise[..., :32, :32])) for scale in both_scales())
    found = copy.deepcopy(model).terms(normal, sample, small, big, rows)
    errors = []
    for scale in (small, big):
        seen = model.preconditioner(diffusion_ad.reduced(sample.image, Size.square(32)), scale, rows)
        output = model.networks.unet(seen.input, scale.step)
        reconstruction = diffusion_ad.reduced(seen.filtered, Size.square(32)) + seen.skipped + seen.c_out * output
        errors.append(
            ((reconstruction - diffusion_ad.reduced(normal, Size.square(32))) / seen.c_out).square().mean(dim=(1, 2, 3))
        )
    torch.testing.assert_close(found["image"], (errors[0] + errors[1]).mean())
    model.config = model.config.model_copy(update={"denoises": "normal"})
    found = model.terms(normal, sample, small, big, rows)
    torch.testing.assert_close(found["image"], (errors[0] + errors[1])[[1, 3]].mean())


def test_a_batch_of_defects_trains_the_unet_through_the_segmentation() -> None:
    model = perturbed(build(), seed=1)
    sample = sample_of(4, seed=1, corrupted=[True] * 4)
    small, big = both_scales()
    terms = model.terms(sample.image, sample, small, big)
    assert float(terms["noise"].detach()) == 0
    torch.stack(list(terms.values())).sum().backward()
    gradients = [parameter.grad for parameter in model.networks.unet.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert all(gradient.any() for gradient in gradients)


def test_the_order_of_a_batch_does_not_matter() -> None:
    model = perturbed(build(reconstruction_weight=1.0), seed=1)
    normal, sample = patterns(4, seed=1), sample_of(4, seed=1, corrupted=HALF)
    small, big = both_scales()
    order = torch.tensor([2, 0, 3, 1])
    expected = model.terms(normal, sample, small, big)
    shuffled = Synthesised(sample.image[order], sample.mask[order], sample.label[order])
    scales = (Scale(*(part[order] for part in scale[:-1]), scale.noise_scale) for scale in (small, big))
    found = model.terms(normal[order], shuffled, *scales)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


def test_the_reconstruction_term_asks_for_the_image_before_the_defect() -> None:
    model = build(reconstruction_weight=0.5)
    model.networks.unet = Oracle(torch.zeros(()))
    normal, sample = patterns(4, seed=1), sample_of(4, seed=1, corrupted=HALF)
    small, big = random_scale([0] * 4, 2), random_scale([300] * 4, 3)
    model.networks.unet.noise = torch.cat([small.noise, big.noise])  # gives back the image with its defect
    terms = model.terms(normal, sample, small, big)
    expected = 0.5 * (sample.image - normal)[sample.label].abs().mean()
    torch.testing.assert_close(terms["reconstruction"], expected, atol=1e-5, rtol=1e-4)


def draws(
    model: DiffusionAD, monkeypatch: pytest.MonkeyPatch, steps: int
) -> Iterator[tuple[Synthesised, Scale, Scale]]:
    """What `losses` draws in each step, without the networks' work."""
    seen: list[tuple[Synthesised, Scale, Scale]] = []
    zero = {"noise": torch.zeros((), requires_grad=True)}
    monkeypatch.setattr(model, "terms", lambda _normal, *drawn, **_: seen.append(drawn) or zero)
    for step in range(steps):
        next(model.losses(batch_at(step), Progress(step, steps, seeded(step))))
    yield from seen


@pytest.mark.parametrize("end", [310, 1000])
def test_scales_are_drawn_below_and_above_the_boundary(end: int, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = list(draws(build(big_steps_end=end), monkeypatch, steps=100))
    small, big = (torch.cat([scales[index].step for scales in drawn]) for index in (1, 2))
    assert 0 <= small.min() < 15
    assert 285 < small.max() < 300
    assert 300 <= big.min() < 300 + 0.05 * (end - 300) + 1
    assert end - 0.05 * (end - 300) - 1 <= big.max() < end
    assert all(len(set(scale.step.tolist())) > 1 for _, scale, _ in drawn)  # of each image its own
    shares = torch.tensor(signal_shares(), dtype=torch.float64)
    for _, *scales in drawn:
        for scale in scales:
            torch.testing.assert_close(scale.signal.flatten() ** 2, shares[scale.step].float())
            torch.testing.assert_close(scale.signal**2 + scale.sigma**2, torch.ones(4, 1, 1, 1))
    noise = torch.stack([scale.noise for _, *scales in drawn for scale in scales])
    assert float(noise.mean()) == pytest.approx(0, abs=0.01)
    assert float(noise.std()) == pytest.approx(1, abs=0.01)


def test_training_may_be_at_the_timesteps_of_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(timesteps="inference", small_step=120, big_step=450, noise_scale=0.5)
    for _, small, big in draws(model, monkeypatch, steps=3):
        assert small.step.tolist() == [120] * 4
        assert big.step.tolist() == [450] * 4
        assert small.noise_scale == big.noise_scale == 0.5
        assert not torch.equal(small.noise, big.noise)


def test_a_step_draws_the_same_whatever_was_drawn_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    first = list(draws(model, monkeypatch, steps=3))
    torch.rand(7)
    again = list(draws(model, monkeypatch, steps=3))
    for (sample, *scales), (other, *other_scales) in zip(first, again, strict=True):
        assert torch.equal(sample.image, other.image)
        for scale, other_scale in zip(scales, other_scales, strict=True):
            assert torch.equal(scale.step, other_scale.step)
            assert torch.equal(scale.noise, other_scale.noise)
    assert not torch.equal(first[0][1].noise, first[1][1].noise)


def test_textures_and_foreground_reach_the_synthesis(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def note(image: Tensor, texture: Tensor, foreground: Tensor, config: object, generator: object) -> Synthesised:
        seen.update(image=image, texture=texture, foreground=foreground, config=config, generator=generator)
        return sample_of(4, seed=0, corrupted=HALF)

    monkeypatch.setattr("anomaly_models.diffusion_ad.synthesise", note)
    model, batch, generator = build(), batch_at(1), seeded(0)
    next(model.losses(batch, Progress(0, STEPS, generator)))
    assert seen["image"] is batch.image
    assert seen["texture"] is batch.texture
    assert seen["foreground"] is batch.foreground
    assert seen["config"] is model.config.synthesis
    assert seen["generator"] is generator


@pytest.mark.parametrize("changes", [{}, DEPARTING])
def test_bf16_is_close_to_float32(changes: dict[str, object]) -> None:
    sample = sample_of(4, seed=1, corrupted=HALF)
    small, big = both_scales()
    terms = {}
    for precision in ("float32", "bf16"):
        model = build(**changes, precision=precision)
        perturbed(model.networks, seed=1)
        terms[precision] = model.terms(sample.image, sample, small, big)
        assert all(value.dtype == torch.float32 for value in terms[precision].values())
    for name, value in terms["float32"].items():
        assert value != terms["bf16"][name]
        torch.testing.assert_close(terms["bf16"][name], value, rtol=0.05, atol=0)


# --- optimisation


def test_the_paper_s_schedule_swings_the_segmentation_rate_every_20_steps() -> None:
    assert [diffusion_ad.swinging(step) for step in (0, 5, 10, 15, 20, 40)] == pytest.approx([1, 0.5, 0, 0.5, 1, 1])
    assert sum(diffusion_ad.swinging(step) for step in range(20)) / 20 == pytest.approx(0.5)
    parameter = nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.Adam([parameter], lr=1e-5)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    expected = []
    for _ in range(30):
        optimizer.step()
        expected.append(optimizer.param_groups[0]["lr"])
        reference.step()
    assert [1e-5 * diffusion_ad.swinging(step) for step in range(30)] == pytest.approx(expected, abs=1e-12)


def test_each_network_has_its_own_rate() -> None:
    model = build(schedule="paper", learning_rate=1e-4, segmentation_learning_rate=1e-5)
    paper = rates_of(model.optimizer(STEPS), STEPS)
    assert [unet for unet, _ in paper] == [1e-4] * STEPS
    swings = [1e-5 * diffusion_ad.swinging(n) for n in range(STEPS)]
    assert [segmentation for _, segmentation in paper] == pytest.approx(swings)
    model = build(schedule="cosine", learning_rate=1e-4, segmentation_learning_rate=1e-5)
    cosine = rates_of(model.optimizer(STEPS), STEPS)
    rate = diffusion_ad.warm_up_and_fall(STEPS)
    assert cosine == [pytest.approx([1e-4 * rate(n), 1e-5 * rate(n)]) for n in range(STEPS)]


def test_the_default_schedule_rises_and_falls() -> None:
    rate = diffusion_ad.warm_up_and_fall(1000)
    assert [rate(0), rate(24), rate(49)] == pytest.approx([1 / 50, 0.5, 1], rel=0.01)
    assert rate(500) == pytest.approx(0.5)
    assert rate(999) == pytest.approx(0, abs=1e-5)
    assert rate(999) > 0
    assert diffusion_ad.warm_up_and_fall(1)(0) == 1


def test_the_optimiser_holds_all_that_is_trained() -> None:
    model = build(ema_decay=0.9)
    optimizer, _ = model.optimizer(STEPS)
    unet, segmentation = optimizer.param_groups
    assert unet["params"] == list(model.networks.unet.parameters())
    assert segmentation["params"] == list(model.networks.segmentation.parameters())
    assert num_parameters(model) == num_parameters(model.networks)
    assert optimizer.defaults["weight_decay"] == 0
    assert optimizer.defaults["betas"] == (0.9, 0.999)


def test_gradients_are_clipped_network_by_network() -> None:
    model = build(gradient_clip=2.0)
    optimizer, _ = model.optimizer(STEPS)
    for network, size in ((model.networks.unet, 100.0), (model.networks.segmentation, 1e-4)):
        for parameter in network.parameters():
            parameter.grad = torch.full_like(parameter, size)
    optimizer.step()
    long = torch.cat([parameter.grad.flatten() for parameter in model.networks.unet.parameters()])
    assert float(long.norm()) == pytest.approx(2, rel=1e-4)
    assert all((parameter.grad == 1e-4).all() for parameter in model.networks.segmentation.parameters())


def test_gradients_are_left_alone_without_a_limit() -> None:
    model = build(gradient_clip=None)
    optimizer, _ = model.optimizer(STEPS)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 100)
    optimizer.step()
    assert all((parameter.grad == 100).all() for parameter in model.parameters())


# --- average


def test_the_average_moves_by_its_decay_statistics_included() -> None:
    networks, averaged = diffusion_ad.Networks(settings()), build(ema_decay=0.9).averaged
    assert averaged is not None
    before = copy.deepcopy(averaged.state_dict())
    networks.segmentation.encoder[0][1].running_mean.fill_(3)
    networks.segmentation.encoder[0][1].num_batches_tracked.fill_(7)
    diffusion_ad.average(averaged, networks, decay=0.75)
    for name, value in networks.state_dict().items():
        expected = 0.75 * before[name] + 0.25 * value if value.is_floating_point() else value
        torch.testing.assert_close(averaged.state_dict()[name], expected, msg=name)


def test_the_average_of_a_constant_is_the_constant() -> None:
    model = build(ema_decay=0.999)
    assert model.averaged is not None
    assert model.averaged.state_dict().keys() == model.networks.state_dict().keys()
    assert same_state(model.networks, model.averaged)


def test_the_average_follows_each_step_and_warms_up() -> None:
    model = build(ema_decay=0.5)
    expected = model.networks.unet.output[2].bias.detach().clone()
    training = model.optimizer(STEPS)
    for step, decay in enumerate([1 / 10, 2 / 11, 3 / 12]):
        list(take_steps(model, training, batch_at, range(step, step + 1), STEPS))
        expected = decay * expected + (1 - decay) * model.networks.unet.output[2].bias.detach()
        torch.testing.assert_close(model.averaged.unet.output[2].bias, expected)
    for _ in model.losses(batch_at(9), Progress(1000, STEPS, seeded(9))):
        pass
    expected = 0.5 * expected + 0.5 * model.networks.unet.output[2].bias.detach()
    torch.testing.assert_close(model.averaged.unet.output[2].bias, expected)


@torch.no_grad()
def test_the_average_is_what_scores_images() -> None:
    image = patterns(2, seed=1)
    plain, averaging = build(ema_decay=0.0).eval(), build(ema_decay=0.9).eval()
    assert plain.averaged is None
    before = averaging(image).anomaly_map
    perturbed(averaging.networks, seed=1)
    assert torch.equal(averaging(image).anomaly_map, before)
    diffusion_ad.average(averaging.averaged, averaging.networks, decay=0.0)
    perturbed(plain.networks, seed=1)
    assert torch.equal(averaging(image).anomaly_map, plain(image).anomaly_map)
    assert not torch.equal(averaging(image).anomaly_map, before)


# --- inference


def trained_randomly(**changes: object) -> DiffusionAD:
    model = perturbed(build(**changes).eval(), seed=1)
    perturbed(model.networks.segmentation.output, seed=2, size=2)
    for part in model.networks.segmentation.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.add_(0.1)
            part.running_var.mul_(0.3)
    if model.averaged is not None:
        diffusion_ad.average(model.averaged, model.networks, decay=0.0)
    model.prepare([batch_of(patterns(7, seed=50), row=torch.arange(7))])
    return model


@torch.no_grad()
def test_inference_by_hand() -> None:
    """Constants of the paper's setting, t = 200 and 400, as worked out from the table."""
    model, image = trained_randomly(), patterns(2, seed=1)
    noisy_small = 0.8101525 * image + 0.5862192 * model.noise[0]
    noisy_big = 0.4399682 * image + 0.8980134 * model.noise[1]
    unet = model.networks.unet
    small = 1.234336 * noisy_small - 0.723591 * unet(noisy_small, torch.tensor([200, 200]))
    big = 2.272892 * noisy_big - 2.041087 * unet(noisy_big, torch.tensor([400, 400]))
    reconstruction = (0.656347 * small + 0.343653 * big.clamp(-1, 1)).clamp(-1, 1)
    expected = torch.sigmoid(model.networks.segmentation(image, reconstruction))
    found = model(image)
    torch.testing.assert_close(found.anomaly_map, expected, atol=1e-5, rtol=0)
    best = expected.flatten(1).sort(dim=1, descending=True).values[:, :50]
    torch.testing.assert_close(found.score, best.mean(dim=1), atol=1e-5, rtol=0)


def test_the_stored_noise_is_always_the_same() -> None:
    torch.manual_seed(1)
    first = DiffusionAD(settings()).noise
    torch.manual_seed(2)
    second = DiffusionAD(settings()).noise
    assert torch.equal(first, second)
    assert first.shape == (2, 1, 3, SIZE, SIZE)
    assert not torch.equal(first[0], first[1])
    assert float(first.mean()) == pytest.approx(0, abs=0.03)
    assert float(first.std()) == pytest.approx(1, abs=0.03)
    assert "noise" in build().state_dict()


def test_building_draws_the_same_weights_with_and_without_an_average() -> None:
    plain, averaging = build(ema_decay=0.0).networks, build(ema_decay=0.9).networks
    for expected, found in zip(plain.parameters(), averaging.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_a_score_is_the_mean_of_the_highest_pixels() -> None:
    anomaly_map = torch.tensor([[0.1, 0.9], [0.5, 0.7]]).view(1, 1, 2, 2)
    assert float(mean_of_highest(anomaly_map, 1, None)) == pytest.approx(0.9)
    assert float(mean_of_highest(anomaly_map, 3, None)) == pytest.approx(0.7)
    assert float(mean_of_highest(anomaly_map, 4, None)) == pytest.approx(0.55)


def test_properties_of_the_score() -> None:
    anomaly_map = torch.rand(3, 1, 16, 16, generator=seeded(1))
    score = mean_of_highest(anomaly_map, 50, None)
    assert torch.equal(mean_of_highest(torch.full((2, 1, 16, 16), 0.25), 50, None), torch.full((2,), 0.25))
    order = torch.randperm(256, generator=seeded(2))
    shuffled = anomaly_map.flatten(2)[..., order].view_as(anomaly_map)
    torch.testing.assert_close(mean_of_highest(shuffled, 50, None), score)
    assert (mean_of_highest(anomaly_map + 0.1 * torch.rand(3, 1, 16, 16, generator=seeded(3)), 50, None) > score).all()
    tied = anomaly_map.clone()
    tied.flatten(1)[:, 10:60] = 2  # a view
    assert torch.equal(mean_of_highest(tied, 50, None), torch.full((3,), 2.0))


@torch.no_grad()
@pytest.mark.parametrize("unet_size", [64, 32, 16])
def test_the_unet_may_see_a_smaller_picture(unet_size: int) -> None:
    model = build(unet=small_unet(image_size=unet_size, attention_sizes=[unet_size // 2])).eval()
    seen = []
    model.networks.unet.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].shape))
    assert model(patterns(3, seed=1)).anomaly_map.shape == (3, 1, SIZE, SIZE)
    assert seen == [(6, 3, unet_size, unet_size)]
    terms = next(model.losses(batch_at(1), Progress(0, STEPS, seeded(0))))
    assert all(value.isfinite() for value in terms.values())


def test_a_smaller_picture_is_made_of_averages() -> None:
    image = torch.arange(16.0).view(1, 1, 4, 4)
    assert torch.equal(diffusion_ad.reduced(image, Size.square(4)), image)
    assert torch.equal(
        diffusion_ad.reduced(image, Size.square(2)), torch.tensor([[2.5, 4.5], [10.5, 12.5]]).view(1, 1, 2, 2)
    )


# --- export


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"ema_decay": 0.9}, DEPARTING, DEPARTING | {"unet": REDUCED_UNET}])
def test_folding_changes_nothing_but_rounding(changes: dict[str, object]) -> None:
    model, image = trained_randomly(**changes), patterns(3, seed=2)
    before, expected = copy.deepcopy(model), model(image)
    assert expected.anomaly_map.std() > 0.01
    found = model.exportable()(image)
    torch.testing.assert_close(found.anomaly_map, expected.anomaly_map, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.score, expected.score, atol=1e-5, rtol=0)
    assert model.state_dict().keys() == before.state_dict().keys()
    assert same_state(before, model)


def test_folding_leaves_no_step_and_no_batch_normalisation() -> None:
    folded = trained_randomly().exportable()
    parts = [type(part).__name__ for part in folded.modules()]
    assert parts.count("StoredShift") == sum(isinstance(part, ResidualBlock) for part in folded.modules()) > 0
    assert not {"Linear", "TimeEmbedding", "BatchNorm2d"} & set(parts)


@pytest.mark.parametrize(("changes", "unet"), [({}, REDUCED_UNET), (DEPARTING, SMALL_UNET)])
def test_exported_graph_agrees_and_holds_no_embedding(
    changes: dict[str, object], unet: dict[str, object], tmp_path: Path
) -> None:
    model = trained_randomly(**changes, unet=unet)
    path = tmp_path / "model.onnx"
    detector = tiny_models.exported(model, path)
    operations = {node.op_type for node in onnx.load(path).graph.node}
    assert not {"Sin", "Cos", "Gemm", "BatchNormalization", "RandomNormal"} & operations
    tiny_models.assert_file_agrees(detector, model, patterns(4, seed=3), atol=1e-5)


# --- settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 80}, "image_size must be a multiple of 32 for DiffusionAD; found 80"),
        (
            {"unet": small_unet(image_size=48, attention_sizes=[])},
            "unet.image_size must be image_size 64, or it halved some times; found 48",
        ),
        ({"unet": small_unet(image_size=128, attention_sizes=[])}, "unet.image_size must be image_size 64"),
        ({"top_pixels": 64 * 64 + 1}, "top_pixels must be at most the 4096 pixels; found 4097"),
        ({"unet": small_unet(multipliers=[1] * 8, attention_sizes=[])}, "must be a multiple of 128, found 64"),
        ({"unet": small_unet(attention_sizes=[16])}, r"sides of levels, \[64, 32\]; found \[16\]"),
        ({"unet": small_unet(heads=3)}, "heads must divide the 16 channels of a level; found 3"),
        ({"unet": small_unet(width=6)}, "multiple of 4"),
        ({"small_step": 300}, "less than 300"),
        ({"big_step": 299}, "greater than or equal to 300"),
        ({"big_steps_end": 300}, "greater than 300"),
        ({"big_steps_end": 1001}, "less than or equal to 1000"),
        ({"noise_scale": 0.0}, "greater than or equal to 0.001"),
        ({"predicts": {"name": "velocity"}}, "'noise', 'image'"),
        ({"predicts": PREDICTS_IMAGE | {"components": 0}}, "greater than 0"),
        ({"predicts": PREDICTS_IMAGE | {"folds": 1}}, "greater than or equal to 2"),
        ({"predicts": {"name": "image"}}, "components"),
        ({"predicts": PREDICTS_IMAGE | {"name": "noise"}}, "components"),
        ({"denoises": "none"}, "'normal' or 'all'"),
        ({"timesteps": "fixed"}, "'random' or 'inference'"),
        ({"schedule": "cyclic"}, "'cosine' or 'paper'"),
        ({"ema_decay": 1.0}, "less than 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        settings(**changes)


def discs(number: int, seed: int) -> Tensor:
    """A bright disc before a dark ground; its place and its brightness vary."""
    generator = seeded(seed)
    centre = SIZE / 2 + 4 * torch.rand(number, 2, 1, 1, generator=generator) - 2
    brightness = 0.5 + 0.1 * torch.rand(number, 1, 1, generator=generator)
    axis = torch.arange(SIZE) + 0.5
    distance = torch.hypot(axis.unsqueeze(1) - centre[:, 0], axis - centre[:, 1])
    grey = 0.2 + brightness * torch.sigmoid(22 - distance)
    return (grey.unsqueeze(1) + 0.02 * torch.randn(number, 3, SIZE, SIZE, generator=generator)).clamp(0, 1)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_a_short_training_finds_defects_of_another_kind(seed: int) -> None:
    """Squares of a surface, after 300 steps on coarse shapes cut from noise."""
    steps = 300
    model = build(
        unet=small_unet(image_size=32, attention_sizes=[]),
        segmentation_width=8,
        synthesis=tiny_models.SYNTHESIS
        | {"probability": 0.7, "perlin_max_exponent": 2, "blend_low": 0.0, "blend_high": 0.3},
        steps=steps,
        segmentation_learning_rate=2e-3,
        gradient_clip=1.0,
        ema_decay=0.9,
    )

    def discs_at(step: int) -> Batch:
        return replace(batch_at(1000 * seed + step), image=discs(4, seed=1000 * seed + step))

    list(take_steps(model, model.optimizer(steps), discs_at, range(steps), steps))
    model.eval()
    normal = discs(16, seed=10_000 + seed)
    square = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    square[24:34, 28:38] = True
    faulty = patterns(16, seed=20_000 + seed).where(square, normal)
    with torch.no_grad():
        expected, found = model(normal), model(faulty)
    assert (found.score.unsqueeze(1) > expected.score).float().mean() > 0.95  # image AUROC
    assert found.anomaly_map[:, :, square].mean() > 2 * found.anomaly_map[:, :, ~square].mean()
