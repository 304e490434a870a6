"""Where the part is, on pictures drawn for it, and Otsu's threshold against brute force."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from anomaly_models.common.foreground import foreground_mask, otsu_threshold


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def disc(height: int, width: int, y: float, x: float, radius: float) -> Tensor:
    rows, columns = torch.arange(height).view(-1, 1), torch.arange(width)
    return (rows - y) ** 2 + (columns - x) ** 2 <= radius**2


def photograph(part: Tensor, background: float, foreground: float, seed: int = 0) -> Tensor:
    """A part (H, W) before a background, with grain; (1, 3, H, W)."""
    grain = 0.02 * torch.randn(3, *part.shape, generator=seeded(seed))
    return (torch.where(part, foreground, background) + grain).clamp(0, 1).unsqueeze(0)


def agrees(found: Tensor, expected: Tensor) -> bool:
    """The same but for pixels within 2 of the outline."""
    mask = found.squeeze().bool().numpy()
    inner = ndimage.binary_erosion(expected.numpy(), iterations=2, border_value=1)
    outer = ndimage.binary_dilation(expected.numpy(), iterations=2)
    return bool((inner <= mask).all() and (mask <= outer).all())


@pytest.mark.parametrize(("background", "foreground"), [(0.1, 0.7), (0.9, 0.4)])
def test_the_border_is_background(background: float, foreground: float) -> None:
    part = disc(128, 96, 60, 50, 30)
    found = foreground_mask(photograph(part, background, foreground))
    assert found.shape == (1, 1, 128, 96)
    assert found.unique().tolist() == [0, 1]
    assert agrees(found, part)


def test_a_part_as_light_as_its_background() -> None:
    """Yellow and grey of the same luminance."""
    part = disc(128, 96, 60, 50, 30)
    yellow, grey = torch.tensor([0.8, 0.75, 0.2]), torch.tensor([0.7023, 0.7023, 0.7023])
    assert torch.dot(yellow - grey, torch.tensor([0.299, 0.587, 0.114])).abs() < 1e-3
    image = torch.where(part.unsqueeze(2), grey, yellow).permute(2, 0, 1).unsqueeze(0)
    grain = 0.02 * torch.randn(1, 3, 128, 96, generator=seeded(0))
    assert agrees(foreground_mask((image + grain).clamp(0, 1)), part)


def test_uneven_light_is_background() -> None:
    """A grey background from black to white, and a part whose colour alone is its own."""
    part = disc(96, 96, 50, 40, 25)
    light = torch.linspace(0.1, 0.9, 96).expand(3, 96, 96)
    brown = torch.tensor([0.6, 0.4, 0.2]).view(3, 1, 1)
    grain = 0.02 * torch.randn(3, 96, 96, generator=seeded(0))
    image = (torch.where(part, brown, light) + grain).clamp(0, 1).unsqueeze(0)
    assert agrees(foreground_mask(image), part)


def test_a_part_with_a_dark_and_a_light_side_is_one() -> None:
    """The dark side differs from the background by a fifth of what the light side does."""
    part = disc(96, 96, 48, 48, 30)
    shades = torch.where(torch.arange(96) < 48, 0.27, 0.95).expand(96, 96)
    grain = 0.02 * torch.randn(3, 96, 96, generator=seeded(0))
    image = (torch.where(part, shades, 0.1) + grain).clamp(0, 1).unsqueeze(0)
    assert agrees(foreground_mask(image), part)


def test_what_nobody_sees_is_no_part() -> None:
    """A disc lighter by half a byte."""
    image = torch.where(disc(96, 96, 48, 48, 30), 0.402, 0.4).expand(1, 3, 96, 96)
    assert torch.all(foreground_mask(image) == 1)


def test_a_surface_is_all_part() -> None:
    """A category that nobody declared to be a surface; no two kinds of pixels in it."""
    fabric = torch.nn.functional.interpolate(torch.rand(2, 3, 12, 12, generator=seeded(0)), (96, 96), mode="bicubic")
    grain = 0.5 + 0.1 * torch.randn(2, 3, 96, 96, generator=seeded(1))
    for surface in (fabric.clamp(0, 1), grain.clamp(0, 1)):
        assert torch.all(foreground_mask(surface) == 1)


def test_holes_are_filled_and_specks_dropped() -> None:
    ring = disc(128, 128, 64, 64, 40) & ~disc(128, 128, 64, 64, 20)
    speck = disc(128, 128, 10, 10, 4)  # 0.3 % of the picture
    second = disc(128, 128, 16, 110, 10)  # 1.9 %
    found = foreground_mask(photograph(ring | speck | second, 0.1, 0.8))
    assert agrees(found, disc(128, 128, 64, 64, 40) | second)
    assert not found[0, 0, :16, :16].any()


def test_a_bar_from_edge_to_edge_is_a_part() -> None:
    bar = torch.zeros(96, 96, dtype=torch.bool)
    bar[30:60] = True
    assert agrees(foreground_mask(photograph(bar, 0.2, 0.9)), bar)


@pytest.mark.parametrize("radius", [6, 0])
def test_no_part_found_is_all_of_the_picture(radius: int) -> None:
    """A disc of 1.2 % of the picture; nothing at all."""
    part = disc(96, 96, 48, 48, radius) if radius else torch.zeros(96, 96, dtype=torch.bool)
    image = photograph(part, 0.2, 0.9) if radius else torch.full((1, 3, 96, 96), 0.4)
    assert torch.all(foreground_mask(image) == 1)


def test_a_part_that_fills_the_picture_is_all_of_it() -> None:
    part = ~disc(96, 96, 0, 0, 3)
    assert torch.all(foreground_mask(photograph(part, 0.1, 0.8)) == 1)


def test_images_alone_have_the_same_foreground_as_together() -> None:
    batch = torch.cat(
        [photograph(disc(64, 64, 30, 30, 8 + 3 * seed), 0.1, 0.5 + 0.1 * seed, seed) for seed in range(5)]
    )
    together = foreground_mask(batch)
    for number in range(5):
        assert torch.equal(foreground_mask(batch[number : number + 1]), together[number : number + 1])


def test_otsu_minimises_the_variance_within() -> None:
    """Brute force over all 255 cuts."""
    generator = np.random.default_rng(0)
    for centre in (60, 120, 200):
        level = (
            np.concatenate([generator.normal(40, 15, 600), generator.normal(centre, 20, 424)]).clip(0, 255).astype(int)
        )
        within = np.full(256, np.inf)
        for cut in range(256):
            low, high = level[level <= cut], level[level > cut]
            if len(low) and len(high):
                within[cut] = len(low) * low.var() + len(high) * high.var()
        best = np.flatnonzero(within <= within.min() * (1 + 1e-9))
        threshold, separability = otsu_threshold(torch.from_numpy(level).view(1, 1, 32, 32).to(torch.uint8))
        assert threshold.item() == pytest.approx(best.mean())
        assert separability.item() == pytest.approx(1 - within.min() / (len(level) * level.var()))


def test_otsu_between_two_values_is_halfway() -> None:
    level = torch.tensor([10] * 6 + [20] * 3, dtype=torch.uint8).view(1, 1, 3, 3)
    threshold, separability = otsu_threshold(level)
    assert threshold.tolist() == [14.5]
    assert separability.tolist() == pytest.approx([1])


def test_a_normal_distribution_is_not_of_two_kinds() -> None:
    """Its halves have their means at -+ sqrt(2 / pi), so that 2 / pi of the variance lies between them."""
    level = (128 + 20 * torch.randn(1, 1, 300, 300, generator=seeded(0))).round().byte()
    threshold, separability = otsu_threshold(level)
    assert threshold.item() == pytest.approx(127.5, abs=2)
    assert separability.item() == pytest.approx(2 / np.pi, abs=0.01)


def test_otsu_of_one_value_separates_nothing() -> None:
    assert otsu_threshold(torch.full((1, 1, 3, 3), 7, dtype=torch.uint8))[1].tolist() == [0]
