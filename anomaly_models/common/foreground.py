"""Where the part is: Otsu's threshold on the distance from the colours of the border."""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from anomaly_models.common.appearance import to_bytes
from anomaly_models.common.scoring import GaussianBlur

BLUR_SIGMA = 1.0  # pixels; against the grain, before a part is told from its background
COLOUR_FLOOR = 0.02  # standard deviation of a colour that any background has
LEAST_DISTANCE = 0.7  # log(1 + 1): nothing within one deviation of the background is a part
LEAST_SEPARABILITY = 0.8  # parts before a background have 0.85 to 0.95, surfaces 0.5 to 0.75
SMALLEST_COMPONENT = 0.01  # of the picture; smaller pieces are no part
FOREGROUND_RANGE = (0.02, 0.98)  # share of the picture, outside of which the part was not found


def foreground_mask(image: Tensor, region: Tensor | None = None) -> Tensor:
    """Where the part is: (B, 1, H, W) of 0 and 1, for images (B, 3, H, W) in [0, 1] of an object before a background.

    The background is what has the colours of the picture's border; the distance from them is cut at its Otsu threshold.
    Holes are filled and small pieces dropped. All of the picture is 1 where the distances are not of two kinds, and
    where hardly anything or nearly everything would be left. Where a region (B, 1, H, W) counts, the picture is that.
    """
    if region is not None:
        pairs = zip(torch.split(image, 1), torch.split(region, 1), strict=True)
        return torch.cat([_within_region(*pair) for pair in pairs])
    outermost = torch.ones(image.shape[-2:], dtype=torch.bool, device=image.device)
    outermost[1:-1, 1:-1] = False
    return _part(image, _distance_from(image, outermost))


def _within_region(image: Tensor, region: Tensor) -> Tensor:
    """Of one image (1, 3, H, W)."""
    inner = -F.max_pool2d(F.pad(-region, [1] * 4), 3, stride=1)  # a border of 0 around: the picture's own edge is one
    outermost = (region > inner)[0, 0]
    return _part(image, _distance_from(image, outermost, region) * region, share_of=float(region.mean())) * region


def _part(image: Tensor, distance: Tensor, share_of: float = 1.0) -> Tensor:
    """Where images differ enough from their borders; the part is to be a share `share_of` the picture."""
    largest = distance.amax(dim=(1, 2, 3), keepdim=True)
    level = to_bytes(255 * distance / largest.clamp(min=LEAST_DISTANCE))
    threshold, separability = otsu_threshold(level)
    part = level > rearrange(threshold, "b -> b 1 1 1")
    cleaned = torch.stack([_cleaned(one) for one in part.squeeze(1).cpu()]).unsqueeze(1).to(image)
    share = cleaned.mean(dim=(1, 2, 3)) / share_of
    least, most = FOREGROUND_RANGE
    distinct = (largest.flatten() >= LEAST_DISTANCE) & (separability >= LEAST_SEPARABILITY)
    found = distinct & (share >= least) & (share <= most)
    return cleaned.where(rearrange(found, "b -> b 1 1 1"), 1.0)


def _distance_from(image: Tensor, outermost: Tensor, region: Tensor | None = None) -> Tensor:
    """How unlike the pixels that are `outermost` (H, W) each is, (B, 1, H, W): log(1 + Mahalanobis distance).

    The colours of the border vary along some directions, mostly with the light, and count little there. The logarithm
    keeps a part's own contrasts from being cut instead of its outline.
    """
    batch, _, height, _ = image.shape
    blurred = GaussianBlur(BLUR_SIGMA).to(image.device)(rearrange(image, "b c h w -> (b c) 1 h w"), region)
    pixels = rearrange(blurred, "(b c) 1 h w -> b c (h w)", b=batch)
    border = pixels[:, :, outermost.flatten()]
    mean = border.mean(dim=2, keepdim=True)
    covariance = (border - mean) @ (border - mean).mT / border.shape[2]
    covariance = covariance + COLOUR_FLOOR**2 * torch.eye(3, device=image.device)
    squared = ((pixels - mean) * torch.linalg.solve(covariance, pixels - mean)).sum(dim=1)
    return rearrange(squared.clamp(min=0).sqrt().log1p(), "b (h w) -> b 1 h w", h=height)


def otsu_threshold(level: Tensor) -> tuple[Tensor, Tensor]:
    """The byte (B,) that parts the bytes (B, 1, H, W) into those up to it and those above, variance between greatest.

    The middle of equally good thresholds, and the variance between over the whole variance (B,): the paper's measure of
    how well the two sides are told apart, 0 for a constant image, 1 for two values, 0.64 for a normal distribution.
    Otsu, "A threshold selection method from gray-level histograms", 1979.
    """
    levels = torch.arange(256, device=level.device, dtype=torch.float64)
    counts = torch.stack([torch.bincount(one.flatten().int(), minlength=256) for one in level]).double()
    shares = counts / counts.sum(dim=1, keepdim=True)
    weight = shares.cumsum(dim=1)  # of those up to each level
    moment = (shares * levels).cumsum(dim=1)
    mean = moment[:, -1:]
    between = (mean * weight - moment).square() / (weight * (1 - weight)).clamp(min=1e-12)
    greatest = between.amax(dim=1, keepdim=True)
    best = between >= greatest * (1 - 1e-9)
    variance = (shares * (levels - mean).square()).sum(dim=1)
    return (levels * best).sum(dim=1) / best.sum(dim=1), greatest.squeeze(1) / variance.clamp(min=1e-12)


def _cleaned(part: Tensor) -> Tensor:
    """The mask (H, W), on the CPU, with its holes filled and its small pieces dropped."""
    from scipy import ndimage  # here, since only pictures of objects need it

    filled = ndimage.binary_fill_holes(part.numpy())
    pieces, _ = ndimage.label(filled)
    sizes = torch.from_numpy(pieces).flatten().bincount()
    large = sizes >= SMALLEST_COMPONENT * part.numel()
    large[0] = False  # the background
    return large[torch.from_numpy(pieces).long()]
