"""Each operation against Pillow, colorsys, scipy or numbers worked by hand, then how they are drawn."""

import colorsys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from drawn_batches import seeded
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage
from torch import Tensor

from anomaly_models.common import appearance
from anomaly_models.common.appearance import Draws, change_appearance, rotate, to_bytes

NAMES = (
    "gamma",
    "brightness",
    "sharpness",
    "hue_and_saturation",
    "solarise",
    "posterise",
    "invert",
    "autocontrast",
    "equalise",
    "rotate",
)


def pictures(number: int, height: int = 48, width: int = 40) -> Tensor:
    """Smooth colours, a narrow range of some, a constant one among them; bytes."""
    small = torch.rand(number, 3, 6, 5, generator=seeded(0))
    image = torch.nn.functional.interpolate(small, (height, width), mode="bicubic").clamp(0, 1)
    image[1] = 0.3 + 0.2 * image[1]
    image[2, 0] = 0.6
    return to_bytes(255 * image)


def as_pillow(picture: Tensor) -> Image.Image:
    return Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())


def from_pillow(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def by_pillow(pixels: Tensor, function: Callable[..., Image.Image], *parameters: Tensor) -> Tensor:
    """`function` on each picture with its own parameters."""
    results = []
    for number, picture in enumerate(pixels):
        own = [parameter[number].item() for parameter in parameters]
        results.append(from_pillow(function(as_pillow(picture), *own)))
    return torch.stack(results)


def patch(*colours: tuple[int, int, int]) -> Tensor:
    """One picture per colour, (B, 3, 1, 1) bytes."""
    return torch.tensor(colours, dtype=torch.uint8).view(-1, 3, 1, 1)


def colours(pixels: Tensor) -> list[list[int]]:
    return pixels.flatten(1).tolist()


# --- as Pillow does, byte for byte


def test_posterise_is_pillows() -> None:
    bits = torch.arange(1, 9)
    assert torch.equal(appearance.posterise(pictures(8), bits), by_pillow(pictures(8), ImageOps.posterize, bits))


def test_solarise_is_pillows() -> None:
    threshold = torch.tensor([32.0, 99.5, 128.0, 256.0])
    expected = by_pillow(pictures(4), ImageOps.solarize, threshold)
    assert torch.equal(appearance.solarise(pictures(4), threshold), expected)
    assert torch.equal(expected[3], pictures(4)[3])


def test_invert_is_pillows() -> None:
    assert torch.equal(appearance.invert(pictures(3)), by_pillow(pictures(3), ImageOps.invert))


def test_autocontrast_is_pillows() -> None:
    cutoff = torch.tensor([0, 20, 7, 1, 20])
    pixels = pictures(5)
    found = appearance.autocontrast(pixels, cutoff)
    assert torch.equal(found, by_pillow(pixels, ImageOps.autocontrast, cutoff))
    assert torch.equal(found[2, 0], pixels[2, 0])  # the constant channel


@pytest.mark.parametrize("side", [8, 40, 96])
def test_equalise_is_pillows(side: int) -> None:
    """8 x 8 pixels are fewer than levels, so that nothing changes; 40 x 40 would overflow a byte."""
    pixels = pictures(5, side, side)
    found = appearance.equalise(pixels)
    assert torch.equal(found, by_pillow(pixels, ImageOps.equalize))
    assert torch.equal(found, pixels) == (side == 8)


def test_sharpness_is_pillows() -> None:
    factor = torch.tensor([0.0, 0.37, 1.0, 1.5, 2.0])
    noisy = to_bytes(pictures(5) + 60 * torch.randn(5, 3, 48, 40, generator=seeded(1)))
    expected = by_pillow(noisy, lambda picture, by: ImageEnhance.Sharpness(picture).enhance(by), factor)
    # Pillow blends in another order of operations, whose rounding may cut one byte lower or higher
    assert (appearance.sharpness(noisy, factor).int() - expected.int()).abs().max() <= 1
    assert torch.equal(appearance.sharpness(noisy, factor)[2], noisy[2])
    for exact in (0, 2, 4):
        assert torch.equal(appearance.sharpness(noisy, factor)[exact], expected[exact])


# --- colour, by hand and by colorsys


def test_gamma_worked_by_hand() -> None:
    exponent = torch.tensor([[2.0, 0.5, 1.0], [0.5, 0.5, 2.0]])
    # 255 (128 / 255)^2 = 64.25; 255 sqrt(64 / 255) = 127.75; 255 (51 / 255)^2 = 10.2
    assert colours(appearance.gamma(patch((128, 64, 200), (0, 255, 51)), exponent)) == [[64, 128, 200], [0, 255, 10]]


def test_luma_moves_all_channels_alike() -> None:
    factor, summand = torch.tensor([1.2, 1.2]), torch.tensor([-10.0, -10.0])
    add_first = torch.tensor([False, True])
    # luma 0.299 * 100 + 0.587 * 150 + 0.114 * 50 = 123.65; 1.2 * 123.65 - 10 = 138.38 is +14.73; 1.2 * (-10) is 2 less
    same, space = patch((100, 150, 50), (100, 150, 50)), torch.tensor([2, 5])
    found = appearance.brightness(same, space, factor, summand, add_first)
    assert colours(found) == [[115, 165, 65], [113, 163, 63]]


def in_space(colour: tuple[int, int, int], name: str, factor: float, summand: float) -> list[float]:
    red, green, blue = (channel / 255 for channel in colour)
    if name == "hls":
        hue, lightness, saturation = colorsys.rgb_to_hls(red, green, blue)
        lightness = min(max(lightness * factor + summand / 255, 0), 1)
        return [255 * channel for channel in colorsys.hls_to_rgb(hue, lightness, saturation)]
    hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
    value = min(max(value * factor + summand / 255, 0), 1)
    return [255 * channel for channel in colorsys.hsv_to_rgb(hue, saturation, value)]


SHADES = [(100, 150, 50), (250, 10, 90), (0, 0, 0), (255, 255, 255), (77, 77, 77), (0, 0, 255), (3, 2, 1), (9, 200, 90)]
EACH = torch.ones(len(SHADES), dtype=torch.long)


@pytest.mark.parametrize(("factor", "summand"), [(1.2, 20.0), (0.8, -30.0), (1.0, 30.0), (1.2, -30.0)])
@pytest.mark.parametrize(("space", "name"), [(0, "hls"), (1, "hsv")])
def test_lightness_and_value_are_colorsys(space: int, name: str, factor: float, summand: float) -> None:
    found = appearance.brightness(patch(*SHADES), EACH * space, EACH * factor, EACH * summand, EACH < 0)
    expected = torch.tensor([in_space(colour, name, factor, summand) for colour in SHADES])
    assert (found.flatten(1) - expected).abs().max() < 0.51


def turned(colour: tuple[int, int, int], hue_shift: float, saturation_shift: float) -> list[float]:
    hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in colour))
    saturation = min(max(saturation + saturation_shift / 255, 0), 1)
    return [255 * channel for channel in colorsys.hsv_to_rgb((hue + hue_shift / 255) % 1, saturation, value)]


@pytest.mark.parametrize(("hue", "saturation"), [(0.0, 0.0), (50.0, 0.0), (-50.0, 20.0), (10.0, -50.0), (-3.0, 50.0)])
def test_hue_and_saturation_are_colorsys(hue: float, saturation: float) -> None:
    found = appearance.hue_and_saturation(patch(*SHADES), EACH * hue, EACH * saturation)
    expected = torch.tensor([turned(colour, hue, saturation) for colour in SHADES])
    assert (found.flatten(1) - expected).abs().max() < 0.51


def test_a_third_of_the_circle_turns_red_into_green() -> None:
    turned = appearance.hue_and_saturation(patch((200, 20, 20)), torch.tensor([85.0]), torch.zeros(1))
    assert colours(turned) == [[20, 200, 20]]


# --- rotation


def test_quarter_turn_is_exact() -> None:
    image = torch.rand(2, 3, 20, 20, generator=seeded(0))
    found = rotate(image, torch.tensor([90.0, -90.0]))
    torch.testing.assert_close(found[0], image[0].rot90(1, (1, 2)), rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1], image[1].rot90(-1, (1, 2)), rtol=0, atol=1e-5)


def test_no_turn_changes_nothing() -> None:
    pixels = pictures(3).float()
    torch.testing.assert_close(rotate(pixels, torch.zeros(3)), pixels, rtol=0, atol=1e-3)


def test_turn_of_an_oblong_is_scipys() -> None:
    image = torch.rand(1, 1, 40, 72, generator=seeded(0))
    found = rotate(image, torch.tensor([30.0]))[0, 0]
    angle = np.deg2rad(30)
    matrix = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])  # output (y, x) to input
    centre = np.array([19.5, 35.5])
    expected = ndimage.affine_transform(
        image[0, 0].numpy(), matrix, centre - matrix @ centre, order=1, mode="constant", cval=0.0, prefilter=False
    )
    inside = ndimage.affine_transform(np.ones((40, 72)), matrix, centre - matrix @ centre, order=0, cval=0.0) > 0
    interior = torch.from_numpy(ndimage.binary_erosion(inside, iterations=2, border_value=1))
    assert interior.float().mean() > 0.5
    torch.testing.assert_close(found[interior], torch.from_numpy(expected)[interior], rtol=0, atol=1e-4)
    assert found[0, 0] == found[-1, -1] == 0


# --- which, and in what order


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Operations that write down which pictures (told by their first byte) they ran on, and change nothing."""
    log: list[list[str]] = [[] for _ in range(256)]

    def recording(name: str) -> appearance.Operation:
        def run(pixels: Tensor, draw: Draws) -> Tensor:
            assert draw.number == len(pixels)
            for picture in pixels:
                log[int(picture.flatten()[0])].append(name)
            return pixels

        return run

    monkeypatch.setattr(appearance, "OPERATIONS", tuple(recording(name) for name in NAMES))
    return log


def test_three_distinct_operations_in_every_order(recorded: list[list[str]]) -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    for seed in range(8):
        change_appearance(pixels, seeded(seed))
    draws = [tuple(names[start : start + 3]) for names in recorded for start in range(0, len(names), 3)]
    assert len(draws) == 256 * 8
    assert all(len(set(draw)) == 3 for draw in draws)
    assert len(set(draws)) > 650  # of 720 ordered choices; 2048 draws leave 42 out on average
    for turn in range(3):
        counts = [sum(draw[turn] == name for draw in draws) for name in NAMES]
        assert min(counts) > 150  # 205 expected, with a deviation of 14
        assert max(counts) < 260


def test_parameters_are_drawn_within_their_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, tuple[Tensor, ...]] = {}

    def note(name: str) -> Callable[..., Tensor]:
        def run(pixels: Tensor, *parameters: Tensor) -> Tensor:
            seen[name] = parameters
            return pixels

        return run

    for name in NAMES:
        monkeypatch.setattr(appearance, name, note(name))
    pixels = torch.zeros(4000, 3, 1, 1, dtype=torch.uint8)
    for operation in appearance.OPERATIONS:
        operation(pixels, Draws(4000, seeded(0), pixels.device))

    def spans(values: Tensor, low: float, high: float) -> None:
        slack = (high - low) / 100
        assert low <= values.min() <= low + slack
        assert high - slack <= values.max() <= high
        assert values.float().mean().item() == pytest.approx((low + high) / 2, abs=3 * slack)

    spans(*seen["gamma"], 0.5, 2)
    assert seen["gamma"][0].shape == (4000, 3)
    space, factor, summand, add_first = seen["brightness"]
    assert space.unique().tolist() == [0, 1, 2, 3, 4, 5]
    spans(factor, 0.8, 1.2)
    spans(summand, -30, 30)
    assert add_first.float().mean().item() == pytest.approx(0.5, abs=0.03)
    spans(*seen["sharpness"], 0, 2)
    for shift in seen["hue_and_saturation"]:
        spans(shift, -50, 50)
    (threshold,) = seen["solarise"]
    assert (threshold == 256).float().mean().item() == pytest.approx(0.5, abs=0.03)
    spans(threshold[threshold < 256], 32, 128)
    assert seen["posterise"][0].unique().tolist() == list(range(1, 9))
    assert seen["autocontrast"][0].unique().tolist() == list(range(21))
    spans(*seen["rotate"], -45, 45)


def test_changes_are_a_function_of_the_generator() -> None:
    pixels = pictures(16)
    before = pixels.clone()
    first = change_appearance(pixels, seeded(0))
    torch.manual_seed(99)
    assert torch.equal(change_appearance(pixels, seeded(0)), first)
    assert not torch.equal(change_appearance(pixels, seeded(1)), first)
    assert torch.equal(pixels, before)
    assert first.dtype == torch.uint8
