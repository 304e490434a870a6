"""Real defects, varied and pasted onto normal images: copy-paste in the manner of RandAugment (BGAD, CVPR 2023).

A defect is a donor image and its mask. Three of ten operations change its shape and its look; the region is then pasted
onto a host where it lies, if enough of it falls on the part, or moved there piece by piece. All of it works on tensors,
batched, on the images' device, and every random number comes from the generator that is given.

Different from the published code, deliberately:
- The geometric operations are composed into one resampling, in a fixed order; so are the filters.
- The operations that blur are rectangles of 3 to 7 pixels, among them lines, as motion blurs; no median. CLAHE is left
  out of its group.
- What lies beyond the donor's border is never pasted; the published operations mirror it.
- A share of the pastes is feathered, so that a seam is not what gives a defect away.
- A paste that ends empty is dropped.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from anomaly_models.common.randomness import generator_on
from anomaly_models.common.scoring import size_of
from anomaly_models.common.sizes import Size

NUM_OPERATIONS = 3  # of the ten, that each paste draws
# How often an operation that was drawn acts, in the order of the paper's code.
PROBABILITIES = {
    "quarter_turn": 0.5,
    "flip": 0.5,
    "transpose": 0.5,
    "lens": 1.0,
    "noise": 0.2,
    "blur": 0.2,
    "shift_scale_turn": 0.2,
    "distortion": 0.2,
    "tone": 0.3,
    "colour": 0.3,
}
ENOUGH_ON_PART = 2 / 3  # of the defect; with less of it on the part, it is moved
SHIFT, SCALE, TURN = 0.0625, 0.2, math.pi / 4  # of the image; factor 1 -+; radians
LENS, WEAK_LENS = 1.0, 0.05  # largest radial distortion
GRID_STEPS, GRID_STRETCH = 5, 0.3  # intervals per side, and how much each may grow or shrink
PIECES, PIECE_SHIFT = 4, 0.05  # control points per side, and the standard deviation of their shifts, of the image
NOISE = (0.01, 0.05)  # standard deviation, grey values in [0, 1]
BLUR_SIDES = (1, 3, 5, 7)  # pixels; height and width are drawn apart
KERNEL = 7  # side of every filter
FILTER_SHARE = (0.2, 0.5)  # of the sharpened or embossed image
EMBOSS = (0.2, 0.7)  # strength
TONE = 0.2  # brightness is shifted, contrast multiplied by 1, -+ this
HUE, SATURATION, VALUE = 2 * math.pi * 20 / 180, 30 / 255, 20 / 255
FEATHER = 5  # pixels across which a feathered paste fades in


@dataclass(frozen=True, slots=True)
class Pasted:
    """Hosts with a defect; where the mask is 0 they are bit for bit what they were. As many as did not end empty."""

    image: Tensor  # (n, 3, H, W)
    mask: Tensor  # (n, 1, H, W), 0 or 1, none of them empty


def paste_defects(
    donor: Tensor,
    donor_mask: Tensor,
    host: Tensor,
    foreground: Tensor | None,
    feathered: float,
    generator: torch.Generator,
) -> Pasted:
    """Paste the i-th donor's defect onto the i-th host.

    Args:
        donor: (n, 3, H, W) in [0, 1], images with a real defect.
        donor_mask: (n, 1, H, W), above 0.5 on it.
        host: (n, 3, H, W) in [0, 1], normal images.
        foreground: (n, 1, H, W), above 0.5 where the host shows the part; None: everywhere.
        feathered: share of the pastes whose borders fade in.
        generator: on any device; the source of all randomness.
    """
    generator = generator_on(host.device, generator)
    image, mask = vary(donor, donor_mask > 0.5, generator)
    if foreground is not None:
        image, mask = place(image, mask, foreground > 0.5, generator)
    soft = torch.rand(len(host), 1, 1, 1, generator=generator, device=host.device) < feathered
    blended = torch.lerp(host, image, feather(mask))
    pasted = torch.where(mask, torch.where(soft, blended, image), host)
    kept = mask.flatten(1).any(dim=1)
    return Pasted(pasted[kept], mask[kept].float())


def feather(mask: Tensor) -> Tensor:
    """The weight of a paste (n, 1, H, W) in [0, 1]: 0 outside, about a half along the border, 1 along the middle.

    A defect that is thin everywhere keeps its full weight, since it would vanish otherwise.
    """
    covered = F.avg_pool2d(mask.float(), FEATHER, stride=1, padding=FEATHER // 2, count_include_pad=False)
    highest = F.max_pool2d(covered, FEATHER, stride=1, padding=FEATHER // 2)
    return torch.where(mask, covered / highest.clamp(min=torch.finfo(covered.dtype).tiny), 0)


# --- how a defect looks ----------------------------------------------------------------------------------------------


def vary(donor: Tensor, mask: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Change donors (n, 3, H, W) and their masks (n, 1, H, W), bool, by three operations each.

    Geometry changes both, tone and colour the donor alone. `generator` is on their device, here and below.
    """
    active = draw_operations(len(donor), generator)
    grid = warped_grid(active, size_of(donor), generator)
    moved = F.grid_sample(donor, grid, mode="bilinear", padding_mode="border", align_corners=False)
    moved_mask = F.grid_sample(mask.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False) > 0.5
    return recoloured(moved, active, generator), moved_mask


def draw_operations(number: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Which of the ten operations act on each of `number` donors, (number,) bool each: of three that were drawn."""
    keys = torch.rand(number, len(PROBABILITIES), generator=generator, device=generator.device)
    rank = keys.argsort(dim=1).argsort(dim=1)
    probability = torch.tensor(list(PROBABILITIES.values()), device=generator.device)
    acts = torch.rand(number, len(PROBABILITIES), generator=generator, device=generator.device) < probability
    active = (rank < NUM_OPERATIONS) & acts
    return dict(zip(PROBABILITIES, active.unbind(dim=1), strict=True))


def warped_grid(active: dict[str, Tensor], size: Size, generator: torch.Generator) -> Tensor:
    """Where each pixel of the changed donor is read, (n, H, W, 2), as `grid_sample` counts: x, y from -1 to 1."""
    number = len(active["flip"])
    matrix = _affine_maps(active, generator)
    # affine_grid counts half widths and half heights, in which a turn of an oblong is no turn
    aspect = size.width / size.height
    matrix = matrix * matrix.new_tensor([[1, 1 / aspect, 1], [aspect, 1, 1]])
    grid = F.affine_grid(matrix, [number, 1, *size], align_corners=False)
    grid = _through_lens(grid, _signed(LENS, number, generator) * active["lens"])
    # One of lens, grid and pieces, three times in seven, once and three times.
    kind = torch.randint(7, (number,), generator=generator, device=generator.device)
    grid = _through_lens(grid, _signed(WEAK_LENS, number, generator) * (active["distortion"] & (kind < 3)))
    grid = torch.where(_each(active["distortion"] & (kind == 3)), _stretched(grid, generator), grid)
    return torch.where(_each(active["distortion"] & (kind > 3)), _in_pieces(grid, generator), grid)


def _affine_maps(active: dict[str, Tensor], generator: torch.Generator) -> Tensor:
    """Quarter turns, flips, transposition, and shift with scale and turn, as (n, 2, 3)."""
    number, device = len(active["flip"]), generator.device
    identity = repeat(torch.eye(2, device=device), "i j -> n i j", n=number)
    quarters = torch.randint(4, (number,), generator=generator, device=device)
    signs = torch.tensor([[-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]], device=device)
    flips = signs[torch.randint(3, (number,), generator=generator, device=device)].diag_embed()
    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]], device=device)
    turn = _turns(_signed(TURN, number, generator)) / rearrange(1 + _signed(SCALE, number, generator), "n -> n 1 1")
    shift = 2 * torch.stack([_signed(SHIFT, number, generator) for _ in range(2)], dim=1)  # the image is 2 wide
    matrix = torch.where(_each(active["quarter_turn"], 3), _turns(quarters * math.pi / 2), identity)
    matrix = matrix @ torch.where(_each(active["flip"], 3), flips, identity)
    matrix = matrix @ torch.where(_each(active["transpose"], 3), swap, identity)
    matrix = matrix @ torch.where(_each(active["shift_scale_turn"], 3), turn, identity)
    shift = torch.where(active["shift_scale_turn"].unsqueeze(1), shift, 0)
    return torch.cat([matrix, shift.unsqueeze(2)], dim=2)


def _turns(angle: Tensor) -> Tensor:
    cosine, sine = angle.cos(), angle.sin()
    return rearrange([cosine, -sine, sine, cosine], "(i j) n -> n i j", i=2)


def _through_lens(grid: Tensor, strength: Tensor) -> Tensor:
    """Radial distortion with both of its coefficients equal; r is 1/2 in the middle of each border."""
    squared = grid.square().sum(dim=3, keepdim=True) / 4
    return grid * (1 + _each(strength) * (squared + squared.square()))


def _stretched(grid: Tensor, generator: torch.Generator) -> Tensor:
    """Grow or shrink each fifth of either axis by a factor of its own; the borders stay."""
    shape = (len(grid), 2, GRID_STEPS)
    steps = 1 + GRID_STRETCH * (2 * torch.rand(shape, generator=generator, device=grid.device) - 1)
    nodes = F.pad(steps.cumsum(dim=2) / steps.sum(dim=2, keepdim=True), (1, 0)) * 2 - 1  # (n, 2, steps + 1)
    place = (grid.clamp(-1, 1) + 1) / 2 * GRID_STEPS
    below = place.long().clamp(max=GRID_STEPS - 1)
    flat = rearrange(below, "n h w xy -> n xy (h w)")
    start, end = nodes.gather(2, flat), nodes.gather(2, flat + 1)
    stretched = torch.lerp(start, end, rearrange(place - below, "n h w xy -> n xy (h w)"))
    return rearrange(stretched, "n xy (h w) -> n h w xy", h=grid.shape[1])


def _in_pieces(grid: Tensor, generator: torch.Generator) -> Tensor:
    """Shift 4 x 4 control points at random, and what is between them with them."""
    shape = (len(grid), 2, PIECES, PIECES)
    shifts = 2 * PIECE_SHIFT * torch.randn(shape, generator=generator, device=grid.device)
    between = F.interpolate(shifts, size=grid.shape[1:3], mode="bilinear", align_corners=True)
    return grid + rearrange(between, "n xy h w -> n h w xy")


def recoloured(image: Tensor, active: dict[str, Tensor], generator: torch.Generator) -> Tensor:
    """Noise, filters, brightness and contrast, hue, saturation and value, where they are active."""
    from kornia.color import hsv_to_rgb, rgb_to_hsv  # slow to import, and `check` needs none of it

    number = len(image)
    sigma = _between(*NOISE, number, generator)
    noise = torch.randn(image.shape, generator=generator, device=image.device)
    image = image + _each(sigma * active["noise"]) * noise
    kind = torch.randint(3, (number,), generator=generator, device=image.device)  # of tone
    image = _filtered(image, _blurs(active["blur"], generator))
    image = _filtered(image, _reliefs(active["tone"] & (kind == 0), active["tone"] & (kind == 1), generator))
    toned = active["tone"] & (kind == 2)
    contrast, brightness = (_each(_signed(TONE, number, generator) * toned) for _ in range(2))
    image = (image * (1 + contrast) + brightness).clamp(0, 1)
    shifts = [_signed(most, number, generator) for most in (HUE, SATURATION, VALUE)]
    hue, saturation, value = (_each(shift) for shift in shifts)
    hsv = rgb_to_hsv(image)
    changed = torch.cat([hsv[:, :1] + hue, (hsv[:, 1:] + torch.cat([saturation, value], dim=1)).clamp(0, 1)], dim=1)
    changed[:, 0].remainder_(2 * math.pi)
    return torch.where(_each(active["colour"]), hsv_to_rgb(changed), image)


def _blurs(active: Tensor, generator: torch.Generator) -> Tensor:
    """Rectangles of weight 1 about the centre, (n, 7, 7); the centre alone where not active."""
    sides = torch.tensor(BLUR_SIDES, device=active.device)
    drawn = torch.randint(len(sides), (2, len(active)), generator=generator, device=active.device)
    height, width = torch.where(active, sides[drawn], 1)
    distance = (torch.arange(KERNEL, device=active.device) - KERNEL // 2).abs()
    rows, columns = (2 * distance < side.unsqueeze(1) for side in (height, width))
    box = rearrange(rows, "n h -> n h 1") * rearrange(columns, "n w -> n 1 w").float()
    return box / box.sum(dim=(1, 2), keepdim=True)


def _reliefs(sharpened: Tensor, embossed: Tensor, generator: torch.Generator) -> Tensor:
    """Filters (n, 7, 7) that sharpen, emboss or leave an image as it is."""
    number = len(sharpened)
    share = rearrange(_between(*FILTER_SHARE, number, generator), "n -> n 1 1")
    strength = rearrange(_between(*EMBOSS, number, generator), "n -> n 1 1")
    unit = sharpened.new_zeros(3, 3, dtype=torch.float32)
    unit[1, 1] = 1
    edges = unit.new_tensor([[0, -1, 0], [-1, 5, -1], [0, -1, 0]])
    slope = unit.new_tensor([[-1, -1, 0], [-1, 0, 1], [0, 1, 1]])
    diagonal = unit.new_tensor([[-1, 0, 0], [0, 1, 0], [0, 0, 1]])
    kernel = torch.where(rearrange(embossed, "n -> n 1 1"), diagonal + strength * slope, edges)
    changes = rearrange(sharpened | embossed, "n -> n 1 1")
    margin = (KERNEL - 3) // 2
    return F.pad(torch.where(changes, torch.lerp(unit.expand(number, 3, 3), kernel, share), unit), [margin] * 4)


def _filtered(image: Tensor, kernel: Tensor) -> Tensor:
    """Correlate each image with a kernel (n, 7, 7) of its own; the border is continued."""
    padded = F.pad(image, [KERNEL // 2] * 4, mode="replicate")
    together = rearrange(padded, "n c h w -> 1 (n c) h w")
    weight = repeat(kernel, "n h w -> (n c) 1 h w", c=image.shape[1])
    filtered = F.conv2d(together, weight, groups=len(weight))
    return rearrange(filtered, "1 (n c) h w -> n c h w", n=len(image))


def _between(low: float, high: float, number: int, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(number, generator=generator, device=generator.device)


def _signed(most: float, number: int, generator: torch.Generator) -> Tensor:
    """Numbers (number,) between -most and most."""
    return _between(-most, most, number, generator)


def _each(values: Tensor, dimensions: int = 4) -> Tensor:
    """One value per image, (n,), to be broadcast over the rest."""
    return values.view(-1, *[1] * (dimensions - 1))


# --- where it lies ---------------------------------------------------------------------------------------------------


def place(image: Tensor, mask: Tensor, foreground: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Leave a defect where it is if more than two thirds of it lie on the part, else move its pieces onto the part.

    Takes images (n, 3, H, W), and masks and foregrounds (n, 1, H, W), bool; gives images and masks of the same shapes.
    """
    on_part = (mask & foreground).sum(dim=(1, 2, 3)) > ENOUGH_ON_PART * mask.sum(dim=(1, 2, 3))
    placed_image, placed_mask = image.clone(), mask.clone()
    for row in (~on_part).nonzero().flatten().tolist():
        moved = move_pieces(image[row], mask[row, 0], foreground[row, 0], generator)
        placed_image[row], placed_mask[row, 0] = moved
    return placed_image, placed_mask


def move_pieces(image: Tensor, mask: Tensor, foreground: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Move every connected piece of a defect so that its centre lies at a random place on the part.

    The place keeps a margin to the border of the image, half as wide as the largest piece. What still falls off the
    image is lost. Without any such place, or without a defect, all stays as it is.

    Args:
        image: (3, H, W).
        mask: (H, W) bool.
        foreground: (H, W) bool.
        generator: on their device.
    """
    pieces = [piece.nonzero() for piece in connected_pieces(mask)]
    if not pieces:
        return image, mask
    largest = torch.stack([piece.amax(dim=0) - piece.amin(dim=0) + 1 for piece in pieces]).amax(dim=0)
    top, left = ((largest + 1) // 2).tolist()
    height, width = mask.shape
    inner = foreground[top : height - top, left : width - left].nonzero()
    if len(inner) == 0:
        return image, mask
    moved_image, moved_mask = image.clone(), torch.zeros_like(mask)
    for piece in pieces:
        chosen = int(torch.randint(len(inner), (), generator=generator, device=mask.device))
        centre = inner[chosen] + inner.new_tensor([top, left])
        goal = piece + (centre - piece.float().mean(dim=0).round()).long()
        inside = ((goal >= 0) & (goal < goal.new_tensor([height, width]))).all(dim=1)
        (y, x), (from_y, from_x) = goal[inside].unbind(dim=1), piece[inside].unbind(dim=1)
        moved_mask[y, x] = True
        moved_image[:, y, x] = image[:, from_y, from_x]
    return moved_image, moved_mask


def connected_pieces(mask: Tensor) -> list[Tensor]:
    """The 8-connected pieces of a mask (H, W), bool, as masks of their own."""
    names = torch.arange(1.0, mask.numel() + 1, device=mask.device).view(1, 1, *mask.shape) * mask
    while True:  # the largest name of a piece spreads through all of it
        spread = F.max_pool2d(names, 3, stride=1, padding=1) * mask
        if torch.equal(spread, names):
            return [names[0, 0] == name for name in torch.unique(names).tolist() if name > 0]
        names = spread
