"""Defects drawn into pictures of normal parts, batched on their device, from an explicit generator.

The strategy of DRAEM (Zavrtanik et al., ICCV 2021) as DiffusionAD (Zhang et al., arXiv 2303.08730) runs it: a region
cut from Perlin noise, within the part, is filled with another surface or with the picture itself, its strips shuffled;
the appearance of either is changed first, and the picture shines through.

Deliberately different:
- The authors' foregrounds come from a salient-object network. Here they are what differs from the colours of the
  picture's border, cleaned up; for surfaces, whose set of foregrounds was never published, all of the picture or a
  rectangle.
- A picture is labelled anomalous only if its mask is not empty. Without a region after `NUM_TRIES` it stays normal.
"""

from dataclasses import dataclass
from typing import Annotated, Self

import torch
from einops import rearrange, repeat
from pydantic import Field, NonNegativeInt, model_validator
from torch import Tensor

from anomaly_models.common.appearance import change_appearance, rotate, to_bytes
from anomaly_models.common.randomness import generator_on
from anomaly_models.common.settings import Settings

TRIES = (1, 7, 14, 28)  # noises drawn at once for the masks that are still empty; nearly all are done after the first
NUM_TRIES = sum(TRIES)
NUM_STRIPS = 8  # per side
WHOLE_SURFACE = 0.5  # probability that all of a surface may bear a defect, and not a rectangle of it only
SMALLEST_SHARE = 0.25  # of the picture that such a rectangle covers


class SynthesisConfig(Settings):
    """DiffusionAD: 0.5, 0.5, 0.2, 0.8, 0.5, 5."""

    probability: Annotated[float, Field(ge=0, le=1)]  # that a picture gets a defect
    self_augmentation: Annotated[float, Field(ge=0, le=1)]  # probability for objects; the others are textured
    blend_low: Annotated[float, Field(ge=0, lt=1)]  # the picture's share inside a defect is uniform between these
    blend_high: Annotated[float, Field(ge=0, lt=1)]
    perlin_threshold: Annotated[float, Field(gt=0, lt=1)]  # of the noise, which lies within -1 and 1
    perlin_max_exponent: NonNegativeInt  # noise has 2 ** 0 to 2 ** this cells per side; 5 at 256 px is 8 px each

    @model_validator(mode="after")
    def _blend_ascends(self) -> Self:
        if self.blend_low > self.blend_high:
            raise ValueError(f"blend_low must be at most blend_high; found {self.blend_low} and {self.blend_high}")
        return self


@dataclass(frozen=True, slots=True)
class Synthesised:
    image: Tensor  # (B, 3, H, W); bit for bit the original's pixels where the mask is 0
    mask: Tensor  # (B, 1, H, W), as soft as the foreground
    label: Tensor  # (B,) bool, True where the mask is not empty


def synthesise(
    image: Tensor,
    texture: Tensor | None,
    foreground: Tensor | None,
    settings: SynthesisConfig,
    generator: torch.Generator,
) -> Synthesised:
    """Draw a defect into some of the images (B, 3, H, W) in [0, 1], H and W at least 32.

    Args:
        image: normal parts.
        texture: other surfaces, of the same shape; None: every defect is made of its own picture.
        foreground: (B, 1, H, W), 1 on the part; None: the picture is a surface that fills it, and no part of it is
            taken for its defects if there are textures.
        settings: what to draw.
        generator: on any device; the source of all randomness.
    """
    generator = generator_on(image.device, generator)
    batch, _, height, width = image.shape
    chosen = torch.rand(batch, generator=generator, device=image.device) < settings.probability
    mask = image.new_zeros(batch, 1, height, width)
    rows = chosen.nonzero().flatten()
    if len(rows) == 0:
        return Synthesised(image, mask, chosen)
    normal = image[rows]
    if foreground is None:
        region = random_rectangles(len(rows), height, width, image.device, generator)
    else:
        region = foreground[rows]
    mask[rows] = anomaly_masks(region, settings, generator)
    own_share = settings.self_augmentation if foreground is not None else 0.0
    source = sources(normal, None if texture is None else texture[rows], own_share, generator)
    unit = torch.rand(len(rows), 1, 1, 1, generator=generator, device=image.device)
    blend = settings.blend_low + (settings.blend_high - settings.blend_low) * unit
    corrupted = image.clone()
    corrupted[rows] = torch.lerp(normal, source, mask[rows] * (1 - blend))
    return Synthesised(corrupted, mask, mask.flatten(1).any(dim=1))


# --- where: masks ----------------------------------------------------------------------------------------------------


def anomaly_masks(region: Tensor, settings: SynthesisConfig, generator: torch.Generator) -> Tensor:
    """Thresholded, turned Perlin noise within each region (B, 1, H, W); 0 only if `NUM_TRIES` noises miss it."""
    batch, _, height, width = region.shape
    device = region.device
    exponent = torch.randint(settings.perlin_max_exponent + 1, (batch, 2), generator=generator, device=device)
    mask = torch.zeros_like(region)
    empty = torch.arange(batch, device=device)
    for tries in TRIES:
        noise = perlin_noise(repeat(2 ** exponent[empty], "b d -> (b k) d", k=tries), height, width, generator)
        degrees = 180 * torch.rand(len(noise), generator=generator, device=device) - 90
        inside = rearrange(rotate(noise, degrees) > settings.perlin_threshold, "(b k) 1 h w -> b k h w", k=tries)
        candidates = inside * region[empty]
        usable = candidates.flatten(2).any(dim=2)  # (b, k)
        first = usable.byte().argmax(dim=1)  # argmax gives the first of equals
        mask[empty, 0] = candidates[torch.arange(len(empty), device=device), first]
        empty = empty[~usable.any(dim=1)]
        if len(empty) == 0:
            break
    return mask


def perlin_noise(cells: Tensor, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Gradient noise (B, 1, H, W) within -1 and 1, with `cells` (B, 2) rows and columns of cells; 0 at their corners.

    The quintic fade of one axis does not depend on the other, so interpolation is a product of matrices: the sum over
    the four corners of fade_y fade_x (cos(angle) dy + sin(angle) dx), d being the way from the corner.
    """
    nodes = int(cells.max()) + 1
    angle = 2 * torch.pi * torch.rand(len(cells), nodes, nodes, generator=generator, device=cells.device)
    fade_y, way_y = _interpolation(cells[:, 0], height, nodes)
    fade_x, way_x = _interpolation(cells[:, 1], width, nodes)
    vertical = way_y @ angle.cos() @ fade_x.mT
    horizontal = fade_y @ angle.sin() @ way_x.mT
    return 2**0.5 * rearrange(vertical + horizontal, "b h w -> b 1 h w")


def _interpolation(cells: Tensor, size: int, nodes: int) -> tuple[Tensor, Tensor]:
    """For each of `size` pixels, the weights of the nodes and the same times the way from them, (B, size, nodes)."""
    position = torch.arange(size, device=cells.device) * cells.unsqueeze(1) / size
    way = position.unsqueeze(2) - torch.arange(nodes, device=cells.device)
    near = (1 - way.abs()).clamp(min=0)
    weight = near**3 * (near * (near * 6 - 15) + 10)
    return weight, weight * way


def random_rectangles(number: int, height: int, width: int, device: torch.device, generator: torch.Generator) -> Tensor:
    """Regions (number, 1, H, W): with probability 0.5 all of the picture, else a rectangle of 25 to 100 % of it."""
    whole, share, shape, top, left = torch.rand(5, number, 1, generator=generator, device=device)
    share = (SMALLEST_SHARE + (1 - SMALLEST_SHARE) * share).where(whole >= WHOLE_SURFACE, 1.0)
    rows = share**shape  # of the height, from share to 1; the columns have the rest
    inside_y = _within(top, rows, height)
    inside_x = _within(left, share / rows, width)
    return rearrange(inside_y, "b h -> b 1 h 1").float() * rearrange(inside_x, "b w -> b 1 1 w")


def _within(place: Tensor, share: Tensor, size: int) -> Tensor:
    """Which of `size` pixels lie in an interval of that share; place 0 puts it at the start, 1 at the end."""
    centres = (torch.arange(size, device=place.device) + 0.5) / size
    start = place * (1 - share)
    return (centres >= start) & (centres <= start + share)


# --- what: sources ---------------------------------------------------------------------------------------------------


def sources(image: Tensor, texture: Tensor | None, own_share: float, generator: torch.Generator) -> Tensor:
    """What fills the defects, (B, 3, H, W) in [0, 1]: textures and, with that probability, the images themselves."""
    own = torch.rand(len(image), generator=generator, device=image.device) < own_share
    if texture is None:
        own = torch.ones_like(own)
        texture = image
    chosen = torch.where(rearrange(own, "b -> b 1 1 1"), image, texture)
    changed = change_appearance(to_bytes(255 * chosen), generator)
    rows = own.nonzero().flatten()
    if len(rows) > 0:
        changed[rows] = shuffle_strips(changed[rows], generator)
    return changed.float() / 255


def shuffle_strips(image: Tensor, generator: torch.Generator) -> Tensor:
    """Permute 8 columns, then 8 rows of each picture as a whole; the even columns go before the odd ones.

    Sides that 8 does not divide give strips whose widths differ by one.
    """
    batch, _, height, width = image.shape
    row_keys, column_keys = torch.rand(2, batch, NUM_STRIPS, generator=generator, device=image.device)
    odd = torch.arange(NUM_STRIPS, device=image.device) % 2
    rows = _strip_order(row_keys, height)
    columns = _strip_order(column_keys + odd, width)
    shuffled = image.gather(3, repeat(columns, "b w -> b c h w", c=image.shape[1], h=height))
    return shuffled.gather(2, repeat(rows, "b h -> b c h w", c=image.shape[1], w=width))


def _strip_order(keys: Tensor, size: int) -> Tensor:
    """Places (B, size) that sort strips by their keys (B, strips) and keep the order within a strip."""
    strip = torch.arange(size, device=keys.device) * NUM_STRIPS // size
    return keys[:, strip].argsort(dim=1, stable=True)
