"""Facts 13 to 18 of the method's specification, and what it leaves to us: sizes, failures."""

from typing import Any

import numpy as np
import pytest
import torch
from drawn_batches import seeded
from numpy.typing import NDArray
from pydantic import ValidationError
from tiny_models import SYNTHESIS
from torch import Tensor

from anomaly_models.common import synthesis
from anomaly_models.common.appearance import rotate
from anomaly_models.common.foreground import foreground_mask
from anomaly_models.common.synthesis import SynthesisConfig, anomaly_masks, perlin_noise, synthesise

CPU = torch.device("cpu")


def settings(**changes: Any) -> SynthesisConfig:
    return SynthesisConfig(**{**SYNTHESIS, **changes})


def images(batch: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Bytes over 255, as training gets them."""
    return torch.randint(256, (batch, 3, height, width), generator=seeded(seed)).float() / 255


# --- Perlin noise (facts 13 to 15)


def classic_noise(angle: NDArray[np.float64], rows: int, columns: int, height: int, width: int) -> NDArray[np.float64]:
    """Pixel by pixel: gradients at the four corners, quintic fade, linear interpolation."""

    def fade(t: float) -> float:
        return 6 * t**5 - 15 * t**4 + 10 * t**3

    noise = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            y, x = i * rows / height, j * columns / width
            top, left = int(y), int(x)
            dot = {
                (a, b): np.cos(angle[top + a, left + b]) * (y - top - a)
                + np.sin(angle[top + a, left + b]) * (x - left - b)
                for a in (0, 1)
                for b in (0, 1)
            }
            upper = dot[0, 0] + fade(x - left) * (dot[0, 1] - dot[0, 0])
            lower = dot[1, 0] + fade(x - left) * (dot[1, 1] - dot[1, 0])
            noise[i, j] = np.sqrt(2) * (upper + fade(y - top) * (lower - upper))
    return noise


@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 27)])
def test_noise_is_the_classic_one(height: int, width: int) -> None:
    cells = torch.tensor([[1, 1], [4, 2], [2, 8]])
    noise = perlin_noise(cells, height, width, seeded(0))
    angle = 2 * np.pi * torch.rand(3, 9, 9, generator=seeded(0)).double().numpy()
    for number, (rows, columns) in enumerate(cells.tolist()):
        expected = classic_noise(angle[number], rows, columns, height, width)
        np.testing.assert_allclose(noise[number, 0], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("cells", [1, 4, 32])
def test_noise_is_zero_at_the_nodes_only(cells: int) -> None:
    noise = perlin_noise(torch.full((6, 2), cells), 256, 256, seeded(0))
    period = 256 // cells
    assert torch.all(noise[..., ::period, ::period] == 0)
    assert (noise == 0).sum() == 6 * cells**2


def test_noise_has_mean_0_deviation_03_and_stays_within_1() -> None:
    cells = 2 ** torch.randint(6, (1000, 2), generator=seeded(1))
    noise = perlin_noise(cells, 128, 128, seeded(0))
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.std().item() == pytest.approx(0.30, abs=0.01)
    assert noise.abs().max() <= 1
    assert (noise > 0.5).float().mean().item() == pytest.approx(0.054, abs=0.004)


@pytest.mark.parametrize("cells", [(1, 1), (4, 4), (32, 32), (1, 32)])
def test_share_above_the_threshold_at_each_scale(cells: tuple[int, int]) -> None:
    noise = perlin_noise(torch.tensor([cells] * 400), 128, 128, seeded(0))
    assert 0.036 < (noise > 0.5).float().mean() < 0.069  # 0.041 to 0.064, and the error of 400 draws


@pytest.fixture
def one_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthesis, "TRIES", (1,))


@pytest.mark.usefixtures("one_try")
def test_coverage_of_turned_masks() -> None:
    whole, generator = torch.ones(100, 1, 256, 256), seeded(0)
    coverage = torch.cat([anomaly_masks(whole, settings(), generator).mean(dim=(1, 2, 3)) for _ in range(15)])
    assert coverage.mean().item() == pytest.approx(0.048, abs=0.003)
    assert coverage.median().item() == pytest.approx(0.046, abs=0.003)
    assert (coverage == 0).float().mean().item() == pytest.approx(0.05, abs=0.017)
    low, high = coverage[coverage > 0].quantile(torch.tensor([0.05, 0.95])).tolist()
    assert low == pytest.approx(0.018, abs=0.005)
    assert high == pytest.approx(0.090, abs=0.013)
    assert 0.3 < coverage.max() < 0.6


@pytest.mark.parametrize(
    ("cells", "expected"),
    [((1, 1), 0.60), ((1, 2), 0.36), ((2, 2), 0.16), ((1, 4), 0.15), ((2, 4), 0.03), ((1, 8), 0.03), ((4, 8), 0.0)],
)
def test_empty_masks_by_lattice(cells: tuple[int, int], expected: float) -> None:
    """Expected: 1,500 draws of a plain numpy generator, turned by `scipy.ndimage.rotate`."""
    noise = perlin_noise(torch.tensor([cells] * 1500), 64, 64, seeded(0))
    degrees = 180 * torch.rand(1500, generator=seeded(1)) - 90
    empty = ~(rotate(noise, degrees) > 0.5).flatten(1).any(dim=1)
    assert empty.float().mean().item() == pytest.approx(expected, abs=0.045 if expected > 0.1 else 0.02)


# --- masks


def test_retries_leave_no_mask_empty() -> None:
    """One cell per image misses with probability 0.58, in 50 tries with 1e-12."""
    masks = anomaly_masks(torch.ones(400, 1, 32, 32), settings(perlin_max_exponent=0), seeded(0))
    assert masks.flatten(1).any(dim=1).all()


def test_as_many_tries_as_published() -> None:
    assert synthesis.NUM_TRIES == 50


@pytest.mark.usefixtures("one_try")
def test_without_retries_masks_stay_empty() -> None:
    masks = anomaly_masks(torch.ones(400, 1, 32, 32), settings(perlin_max_exponent=0), seeded(0))
    assert 0.3 < masks.flatten(1).any(dim=1).float().mean() < 0.55


def test_masks_stay_within_the_region_and_as_soft_as_it_is() -> None:
    region = torch.zeros(64, 1, 64, 64)
    region[:, :, 20:50, 10:60] = 0.25
    masks = anomaly_masks(region, settings(), seeded(0))
    assert masks.unique().tolist() == [0, 0.25]
    assert torch.all(masks[region == 0] == 0)
    assert masks.flatten(1).any(dim=1).all()


def test_lattices_cover_both_axes_up_to_the_exponent(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def noise(cells: Tensor, height: int, width: int, generator: torch.Generator) -> Tensor:
        seen.append(cells)
        return torch.ones(len(cells), 1, height, width)

    monkeypatch.setattr(synthesis, "perlin_noise", noise)
    anomaly_masks(torch.ones(3000, 1, 32, 32), settings(perlin_max_exponent=3), seeded(0))
    pairs, counts = seen[0].unique(dim=0, return_counts=True)
    assert pairs.tolist() == [[rows, columns] for rows in (1, 2, 4, 8) for columns in (1, 2, 4, 8)]
    assert counts.min() > 130  # 187.5 expected, with a deviation of 13


def test_rectangles_cover_a_quarter_or_more() -> None:
    regions = synthesis.random_rectangles(4000, 64, 48, CPU, seeded(0))
    assert regions.shape == (4000, 1, 64, 48)
    coverage = regions.mean(dim=(1, 2, 3))
    whole = coverage == 1
    assert whole.float().mean().item() == pytest.approx(0.5, abs=0.04)  # and a few rectangles that miss no pixel
    assert coverage.min().item() == pytest.approx(0.25, abs=0.03)
    assert coverage[~whole].mean().item() == pytest.approx(0.625, abs=0.02)
    rows, columns = regions.amax(dim=3, keepdim=True), regions.amax(dim=2, keepdim=True)
    assert torch.equal(regions, rows * columns)  # solid
    assert ((rows.flatten(1).diff(dim=1) != 0).sum(dim=1) <= 2).all()  # in one piece
    assert (regions[~whole].amax(dim=0) == 1).all()  # everywhere
    high, wide = rows.mean(dim=(1, 2, 3))[~whole], columns.mean(dim=(1, 2, 3))[~whole]
    assert high.mean().item() == pytest.approx(wide.mean().item(), abs=0.02)  # neither standing nor lying


# --- strips (fact 17)


def coordinates(batch: int, height: int, width: int) -> Tensor:
    """Channel 0 holds each pixel's row, channel 1 its column, channel 2 its image."""
    image, row, column = torch.meshgrid(torch.arange(batch), torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([row, column, image], dim=1)


@pytest.mark.parametrize(("height", "width"), [(256, 256), (64, 40), (100, 45)])
def test_strips_are_permuted_as_a_whole(height: int, width: int) -> None:
    shuffled = synthesis.shuffle_strips(coordinates(16, height, width), seeded(0))
    rows, columns, image = shuffled.unbind(dim=1)
    # separable: one permutation of rows and one of columns per image, and nothing crosses between images
    assert torch.equal(rows, rows[:, :, :1].expand_as(rows))
    assert torch.equal(columns, columns[:, :1].expand_as(columns))
    assert torch.equal(image, coordinates(16, height, width)[:, 2])
    for permuted, size in ((rows[:, :, 0], height), (columns[:, 0], width)):
        assert torch.equal(permuted.sort(dim=1).values, torch.arange(size).expand(16, -1))
        # within a strip the order is kept: at most 8 pieces of consecutive numbers, cut where strips are
        breaks = permuted.diff(dim=1) != 1
        assert (breaks.sum(dim=1) <= 7).all()
        starts = {(number * size + 7) // 8 for number in range(8)}
        assert set(permuted[:, 1:][breaks].tolist()) <= starts


def test_even_columns_come_first_and_rows_in_any_order() -> None:
    shuffled = synthesis.shuffle_strips(coordinates(2000, 64, 64), seeded(0))
    columns = shuffled[:, 1, 0, ::8] // 8
    assert torch.equal(columns[:, :4].sort(dim=1).values, torch.tensor([0, 2, 4, 6]).expand(2000, -1))
    assert torch.equal(columns[:, 4:].sort(dim=1).values, torch.tensor([1, 3, 5, 7]).expand(2000, -1))
    assert len(columns[:, :4].unique(dim=0)) == len(columns[:, 4:].unique(dim=0)) == 24
    rows = shuffled[:, 0, ::8, 0] // 8
    for place in range(8):
        assert rows[:, place].bincount(minlength=8).min() > 190  # 250 expected, with a deviation of 15


def test_images_are_shuffled_differently() -> None:
    shuffled = synthesis.shuffle_strips(coordinates(8, 32, 32), seeded(0))[:, :2]
    assert len(shuffled.unique(dim=0)) == 8


# --- sources


def unchanged(pixels: Tensor, generator: torch.Generator) -> Tensor:
    return pixels


@pytest.fixture
def plain_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fills a defect is the picture or the texture as it is."""
    monkeypatch.setattr(synthesis, "change_appearance", unchanged)
    monkeypatch.setattr(synthesis, "shuffle_strips", unchanged)


@pytest.mark.usefixtures("plain_sources")
@pytest.mark.parametrize(("own_share", "expected"), [(0.0, 0.0), (0.3, 0.3), (1.0, 1.0)])
def test_a_share_of_the_sources_is_the_picture_itself(own_share: float, expected: float) -> None:
    image, texture = images(2000, 4, 4), images(2000, 4, 4, seed=1)
    source = synthesis.sources(image, texture, own_share, seeded(0))
    own = (source == image).flatten(1).all(dim=1)
    assert own.float().mean().item() == pytest.approx(expected, abs=0.03 if 0 < own_share < 1 else 0)
    assert torch.equal(source[~own], texture[~own])


@pytest.mark.usefixtures("plain_sources")
def test_without_textures_every_source_is_the_picture_itself() -> None:
    image = images(50, 4, 4)
    assert torch.equal(synthesis.sources(image, None, 0.0, seeded(0)), image)


def test_only_own_sources_are_shuffled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthesis, "change_appearance", unchanged)
    image, texture = images(40, 32, 32), images(40, 32, 32, seed=1)
    source = synthesis.sources(image, texture, 0.5, seeded(0))
    own = ~(source == texture).flatten(1).all(dim=1)
    assert 5 < own.sum() < 35
    for found, original in zip(source[own], image[own], strict=True):
        assert not torch.equal(found, original)
        assert torch.equal(found.flatten(1).sort(dim=1).values, original.flatten(1).sort(dim=1).values)


# --- composition (facts 16 and 18)


@pytest.mark.parametrize("surface", [True, False])
def test_outside_of_the_mask_nothing_changes_by_a_bit(surface: bool) -> None:
    image, texture = images(32, 64, 64), images(32, 64, 64, seed=1)
    foreground = torch.zeros(32, 1, 64, 64)
    foreground[:, :, 10:50, 10:50] = 0.7
    result = synthesise(image, texture, None if surface else foreground, settings(), seeded(0))
    outside = (result.mask == 0).expand_as(image)
    assert torch.equal(result.image[outside], image[outside])
    assert torch.equal(result.image[~result.label], image[~result.label])
    assert torch.equal(result.label, result.mask.flatten(1).any(dim=1))
    assert 5 < result.label.sum() < 27
    changed = (result.image != image).any(dim=1, keepdim=True)
    assert changed[result.mask > 0].float().mean() > 0.9
    assert result.image.min() >= 0
    assert result.image.max() <= 1
    assert surface or torch.all(result.mask[foreground == 0] == 0)


def test_blend_is_the_papers(monkeypatch: pytest.MonkeyPatch) -> None:
    image, source = images(64, 64, 64), images(64, 64, 64, seed=1)
    monkeypatch.setattr(synthesis, "sources", lambda *_arguments: source)
    foreground = torch.rand(64, 1, 64, 64, generator=seeded(2))
    result = synthesise(image, None, foreground, settings(probability=1.0, blend_low=0.3, blend_high=0.3), seeded(0))
    mask = result.mask
    expected = (1 - mask) * image + mask * (0.7 * source + 0.3 * image)
    torch.testing.assert_close(result.image, expected, rtol=0, atol=1e-6)


def test_blend_lies_between_its_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    image, source = images(400, 32, 32), images(400, 32, 32, seed=1)
    monkeypatch.setattr(synthesis, "sources", lambda *_arguments: source)
    config = settings(probability=1.0, perlin_max_exponent=2)
    result = synthesise(image, None, torch.ones(400, 1, 32, 32), config, seeded(0))
    difference, largest = (result.image - image).abs(), (source - image).abs()
    assert (difference <= 0.8 * largest + 1e-6).all()
    strength = difference.sum(dim=(1, 2, 3)) / (largest * result.mask).sum(dim=(1, 2, 3))  # 1 - beta
    assert 0.2 - 1e-5 < strength.min() < 0.21
    assert 0.79 < strength.max() < 0.8 + 1e-5
    assert strength.mean().item() == pytest.approx(0.5, abs=0.03)


def test_half_of_the_images_are_corrupted() -> None:
    config = settings(perlin_max_exponent=2)
    total = 0
    for seed in range(10):
        image = images(1000, 32, 32, seed)
        total += int(synthesise(image, None, torch.ones(1000, 1, 32, 32), config, seeded(seed)).label.sum())
    assert total / 10_000 == pytest.approx(0.5, abs=0.015)


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_none_or_all(probability: float) -> None:
    image = images(16, 64, 64)
    result = synthesise(image, image.flip(0), None, settings(probability=probability), seeded(0))
    assert result.label.float().mean() == probability
    assert (probability == 1) or torch.equal(result.image, image)


def test_no_label_without_a_mask() -> None:
    """The part is too small for any noise to meet it: the image stays as it is, and normal."""
    image = images(8, 64, 64)
    result = synthesise(image, None, torch.zeros(8, 1, 64, 64), settings(probability=1.0), seeded(0))
    assert not result.label.any()
    assert torch.equal(result.image, image)
    assert not result.mask.any()


@pytest.mark.usefixtures("plain_sources")
def test_surfaces_are_filled_with_textures_only() -> None:
    image, texture = torch.zeros(32, 3, 64, 64), torch.ones(32, 3, 64, 64)
    everything = settings(probability=1.0, self_augmentation=1.0)
    surfaces = synthesise(image, texture, None, everything, seeded(0))
    assert (surfaces.image > 0).flatten(1).any(dim=1).all()
    objects = synthesise(image, texture, torch.ones(32, 1, 64, 64), everything, seeded(0))
    assert not objects.image.any()


# --- sizes, devices, repeatability


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 50), (100, 64)])
@pytest.mark.parametrize("surface", [True, False])
def test_any_size(batch: int, height: int, width: int, surface: bool) -> None:
    image, texture = images(batch, height, width), images(batch, height, width, seed=1)
    foreground = None if surface else torch.ones(batch, 1, height, width)
    result = synthesise(image, texture, foreground, settings(probability=1.0), seeded(0))
    assert result.image.shape == image.shape
    assert result.mask.shape == (batch, 1, height, width)
    assert result.label.shape == (batch,)
    assert result.label.dtype == torch.bool
    assert result.image.dtype == result.mask.dtype == torch.float32
    assert result.image.isfinite().all()


@pytest.mark.parametrize("surface", [True, False])
def test_synthesis_is_a_function_of_the_generator(surface: bool) -> None:
    image, texture, foreground = images(8, 64, 64), images(8, 64, 64, seed=1), torch.ones(8, 1, 64, 64)
    before = [image.clone(), texture.clone(), foreground.clone()]

    def draw(seed: int) -> synthesis.Synthesised:
        return synthesise(image, texture, None if surface else foreground, settings(), seeded(seed))

    first = draw(0)
    torch.manual_seed(99)
    again, other = draw(0), draw(1)
    assert torch.equal(first.image, again.image)
    assert torch.equal(first.mask, again.mask)
    assert torch.equal(first.label, again.label)
    assert not torch.equal(first.mask, other.mask)
    assert all(torch.equal(x, y) for x, y in zip(before, (image, texture, foreground), strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_with_a_generator_of_the_cpu() -> None:
    image, texture = images(8, 64, 64).cuda(), images(8, 64, 64, seed=1).cuda()
    for foreground in (None, foreground_mask(image)):
        first, again = (synthesise(image, texture, foreground, settings(), seeded(0)) for _ in range(2))
        assert first.image.device == image.device
        assert torch.equal(first.image, again.image)
        assert torch.equal(first.image[(first.mask == 0).expand_as(image)], image[(first.mask == 0).expand_as(image)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blend_low": 0.9}, "blend_low must be at most blend_high; found 0.9 and 0.8"),
        ({"probability": 1.5}, "probability"),
        ({"blend_high": 1.0}, "blend_high"),  # defects that cannot be seen
        ({"perlin_threshold": 0.0}, "perlin_threshold"),
        ({"perlin_max_exponent": -1}, "perlin_max_exponent"),
        ({"strips": 8}, "strips"),
    ],
)
def test_settings_are_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        settings(**change)
