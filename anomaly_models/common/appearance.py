"""Ten operations that change how a picture looks: what a synthetic defect is filled with.

The ten that DRAEM (Zavrtanik et al., ICCV 2021) and DiffusionAD draw three from, batched: every image has parameters of
its own. Pictures are bytes between the operations, as they were where the operations come from (Pillow's ImageOps and
ImageEnhance, whose results are met byte for byte, and imgaug). Deliberately different:
- "Brightness" is the lightness channel of a colour space drawn from six. The luma of YCbCr stands for those of YUV,
  Lab and Luv, so that three formulas are left.
- Hue and saturation are not rounded to bytes in between.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

NUM_DRAWN = 3  # operations per picture
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601
LEVELS = 256
_SMALL = 1e-6  # a divisor in the place of 0, where the numerator is 0 too


@dataclass(frozen=True, slots=True)
class Draws:
    """Random parameters for `number` pictures."""

    number: int
    generator: torch.Generator  # on `device`
    device: torch.device

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Numbers (number, *shape) between `low` and `high`."""
        unit = torch.rand(self.number, *shape, generator=self.generator, device=self.device)
        return low + (high - low) * unit

    def integers(self, low: int, high: int) -> Tensor:
        """Whole numbers (number,) from `low` to `high`, both included."""
        return torch.randint(low, high + 1, (self.number,), generator=self.generator, device=self.device)

    def coin(self) -> Tensor:
        """Booleans (number,), True with probability 0.5."""
        return torch.rand(self.number, generator=self.generator, device=self.device) < 0.5


Operation: TypeAlias = Callable[[Tensor, Draws], Tensor]  # bytes (n, 3, H, W), twice

OPERATIONS: tuple[Operation, ...] = (
    lambda pixels, draw: gamma(pixels, draw.uniform(0.5, 2, 3)),
    lambda pixels, draw: brightness(
        pixels, draw.integers(0, 5), draw.uniform(0.8, 1.2), draw.uniform(-30, 30), draw.coin()
    ),
    lambda pixels, draw: sharpness(pixels, draw.uniform(0, 2)),
    lambda pixels, draw: hue_and_saturation(pixels, draw.uniform(-50, 50), draw.uniform(-50, 50)),
    lambda pixels, draw: solarise(pixels, draw.uniform(32, 128).where(draw.coin(), LEVELS)),
    lambda pixels, draw: posterise(pixels, draw.integers(1, 8)),
    lambda pixels, _draw: invert(pixels),
    lambda pixels, draw: autocontrast(pixels, draw.integers(0, 20)),
    lambda pixels, _draw: equalise(pixels),
    lambda pixels, draw: to_bytes(rotate(pixels.float(), draw.uniform(-45, 45))),
)


def change_appearance(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Apply three different operations to each picture of (B, 3, H, W), bytes, in random order.

    An operation runs on the pictures that drew it only.
    """
    keys = torch.rand(len(pixels), len(OPERATIONS), generator=generator, device=pixels.device)
    drawn: Sequence[Sequence[int]] = rearrange(keys.argsort(dim=1)[:, :NUM_DRAWN], "b turn -> turn b").tolist()
    changed = pixels.clone()
    for choices in drawn:
        for number, operation in enumerate(OPERATIONS):
            rows = [row for row, choice in enumerate(choices) if choice == number]
            if rows:
                changed[rows] = operation(changed[rows], Draws(len(rows), generator, pixels.device))
    return changed


def to_bytes(values: Tensor) -> Tensor:
    """Numbers on the scale of 0 to 255, rounded to bytes."""
    return values.round().clamp(0, LEVELS - 1).to(torch.uint8)


def rotate(image: Tensor, degrees: Tensor) -> Tensor:
    """Turn images (B, C, H, W) about their centres by (B,) degrees, anticlockwise; bilinear, 0 where nothing was."""
    height, width = image.shape[-2:]
    angle = torch.deg2rad(degrees)
    cosine, sine, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    # affine_grid counts half widths and half heights, in which a turn of an oblong is no turn
    rows = [cosine, -sine * height / width, zero, sine * width / height, cosine, zero]
    grid = F.affine_grid(rearrange(rows, "(i j) b -> b i j", i=2), list(image.shape), align_corners=False)
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


# --- the operations, with their parameters; all take and give bytes (B, 3, H, W) -------------------------------------


def gamma(pixels: Tensor, exponent: Tensor) -> Tensor:
    """Raise each channel, on the scale of 0 to 1, to the power of its `exponent` (B, 3)."""
    levels = torch.linspace(0, 1, LEVELS, device=pixels.device)
    return _look_up(pixels, to_bytes(255 * levels ** rearrange(exponent, "b c -> b c 1")))


def brightness(pixels: Tensor, space: Tensor, factor: Tensor, summand: Tensor, add_first: Tensor) -> Tensor:
    """Multiply a lightness channel by `factor` and add `summand`, in the order that `add_first` says; all (B,).

    Space 0 is the lightness of HLS, space 1 the value of HSV, 2 to 5 are the luma of YCbCr. Hue and saturation, or the
    colour difference for the luma, stay as they are.
    """
    rgb, space = pixels.float(), _per_image(space)
    lowest, highest = _extremes(rgb)
    luma = torch.einsum("bchw,c->bhw", rgb, rgb.new_tensor(LUMA)).unsqueeze(1)
    level = torch.where(space == 0, (lowest + highest) / 2, torch.where(space == 1, highest, luma))
    factor, summand = _per_image(factor), _per_image(summand)
    changed = (level * factor + summand * torch.where(_per_image(add_first), factor, 1)).clamp(0, 255)

    def room(lightness: Tensor) -> Tensor:
        """How far a colour of this lightness and full saturation lies from grey, up to a factor."""
        in_hls = torch.minimum(lightness, 255 - lightness)
        return torch.where(space == 0, in_hls, torch.where(space == 1, lightness, 1)).clamp(min=_SMALL)

    return to_bytes(changed + (rgb - level) * (room(changed) / room(level)))


def sharpness(pixels: Tensor, factor: Tensor) -> Tensor:
    """0 smooths, 1 changes nothing, 2 sharpens (B,); the outermost pixels stay as they are."""
    rgb = pixels.float()
    height, width = rgb.shape[-2:]
    inner = rgb[:, :, 1:-1, 1:-1]
    columns = rgb[:, :, : height - 2] + rgb[:, :, 1:-1] + rgb[:, :, 2:]
    box = columns[..., : width - 2] + columns[..., 1:-1] + columns[..., 2:]
    smooth = ((box + 4 * inner) / 13).round()  # weight 5 in the centre, 1 around it; never halfway between two bytes
    sharpened = pixels.clone()
    blended = smooth + _per_image(factor) * (inner - smooth)
    sharpened[:, :, 1:-1, 1:-1] = blended.clamp(0, 255).to(torch.uint8)  # cut, not rounded, as Pillow does
    return sharpened


def hue_and_saturation(pixels: Tensor, hue: Tensor, saturation: Tensor) -> Tensor:
    """Add to both (B,), in HSV; 255 is the full circle of hues, and the full saturation."""
    rgb = pixels.float()
    lowest, value = _extremes(rgb)
    chroma = value - lowest
    red, green, blue = rgb.chunk(3, dim=1)
    divisor = chroma.clamp(min=1)  # chroma is whole
    sector = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    saturated = (chroma / value.clamp(min=1) + _per_image(saturation) / 255).clamp(0, 1)
    turns = rgb.new_tensor([5, 3, 1]).view(1, 3, 1, 1)  # sixths of a circle at which red, green and blue are lowest
    position = (turns + sector + _per_image(hue) * 6 / 255).remainder(6)
    shade = torch.minimum(position, 4 - position).clamp(0, 1)
    return to_bytes(value * (1 - saturated * shade))


def solarise(pixels: Tensor, threshold: Tensor) -> Tensor:
    """Invert what is not below the `threshold` (B,)."""
    return torch.where(pixels >= _per_image(threshold), 255 - pixels, pixels)


def posterise(pixels: Tensor, bits: Tensor) -> Tensor:
    """Keep the highest `bits` (B,) of each byte."""
    return pixels & _per_image(256 - 2 ** (8 - bits)).to(torch.uint8)


def invert(pixels: Tensor) -> Tensor:
    return 255 - pixels


def autocontrast(pixels: Tensor, cutoff: Tensor) -> Tensor:
    """Stretch each channel so that all but its `cutoff` (B,) per cent lightest and darkest pixels fill the range."""
    counts = _histogram(pixels)
    total = counts.sum(dim=2, keepdim=True)
    cut = total * rearrange(cutoff, "b -> b 1 1") // 100
    low = (counts.cumsum(dim=2) <= cut).sum(dim=2, keepdim=True)
    high = 255 - (counts.flip(2).cumsum(dim=2) <= cut).sum(dim=2, keepdim=True)
    levels = torch.arange(LEVELS, device=pixels.device)
    # In float64 and divided by a tensor (a number would be multiplied by the reciprocal), since the results are cut:
    # a whole number must not fall below itself.
    scale = levels[-1].double() / (high - low).clamp(min=1)
    stretched = (levels * scale - low * scale).clamp(0, 255).long()
    return _look_up(pixels, torch.where(high > low, stretched, levels).to(torch.uint8))


def equalise(pixels: Tensor) -> Tensor:
    """Flatten the histogram of each channel."""
    counts = _histogram(pixels)
    levels = torch.arange(LEVELS, device=pixels.device)
    last = torch.where(counts > 0, levels, 0).amax(dim=2, keepdim=True)
    step = (counts.sum(dim=2, keepdim=True) - counts.gather(2, last)) // 255
    below = counts.cumsum(dim=2) - counts
    flattened = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    return _look_up(pixels, torch.where(step > 0, flattened, levels).to(torch.uint8))


def _histogram(pixels: Tensor) -> Tensor:
    """How often each byte occurs in each channel, (B, 3, 256)."""
    batch, channels = pixels.shape[:2]
    start = LEVELS * torch.arange(batch * channels, device=pixels.device)
    placed = pixels.long() + start.view(batch, channels, 1, 1)
    return torch.bincount(placed.flatten(), minlength=LEVELS * len(start)).view(batch, channels, LEVELS)


def _look_up(pixels: Tensor, table: Tensor) -> Tensor:
    """Replace each byte by its entry in the table (B, 3, 256) of its channel."""
    index = rearrange(pixels.long(), "b c h w -> b c (h w)")
    return table.gather(2, index).view_as(pixels)


def _extremes(rgb: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest of red, green and blue, (B, 1, H, W) each."""
    red, green, blue = rgb.chunk(3, dim=1)
    return torch.minimum(torch.minimum(red, green), blue), torch.maximum(torch.maximum(red, green), blue)


def _per_image(parameter: Tensor) -> Tensor:
    return rearrange(parameter, "b -> b 1 1 1")
