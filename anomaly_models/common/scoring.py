"""From distances on a grid of features to a smooth anomaly map at the size of the image, and to its score.

A region (B, 1, H, W), 1 where an image counts and 0 elsewhere, is None where all of it does: then nothing is computed.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from anomaly_models.common.sizes import Size


def resize_map(anomaly_map: Tensor, size: Size) -> Tensor:
    """Resize maps (B, C, h, w) to (B, C, H, W), bilinear with half-pixel centres."""
    return F.interpolate(anomaly_map, size=tuple(size), mode="bilinear", align_corners=False)


def size_of(image: Tensor) -> Size:
    """Of images or maps (..., H, W)."""
    height, width = image.shape[-2:]
    return Size(height, width)


def cells_within(region: Tensor, size: Size) -> Tensor:
    """Which cells of a grid of that size over the images hold any of the region: (B, 1, h, w), 0 or 1."""
    height, width = region.shape[-2:]
    return F.max_pool2d(region, (height // size.height, width // size.width))


def within(anomaly_map: Tensor, region: Tensor | None) -> Tensor:
    """The map, 0 outside the region."""
    return anomaly_map if region is None else anomaly_map * region


def highest(anomaly_map: Tensor, region: Tensor | None) -> Tensor:
    """The largest pixel (B,) of each map (B, 1, H, W) within the region."""
    return _ranked(anomaly_map, region).amax(dim=(1, 2, 3))


def mean_of_highest(anomaly_map: Tensor, pixels: int, region: Tensor | None) -> Tensor:
    """The mean (B,) of so many largest pixels of each map (B, 1, H, W) within the region, or of all if it has fewer."""
    found = rearrange(_ranked(anomaly_map, region), "b 1 h w -> b (h w)").topk(pixels, dim=1, sorted=False).values
    if region is None:
        return found.mean(dim=1)
    counts = found > -torch.inf
    return torch.where(counts, found, 0).sum(dim=1) / counts.sum(dim=1)


def _ranked(anomaly_map: Tensor, region: Tensor | None) -> Tensor:
    """The map, below all numbers outside the region."""
    return anomaly_map if region is None else anomaly_map.masked_fill(region == 0, -torch.inf)


class GaussianBlur(nn.Module):
    """Smooth maps (B, 1, H, W) with a separable Gaussian of `sigma` pixels, cut at 4 sigma.

    Borders are mirrored with the edge pixel repeated, as `scipy.ndimage.gaussian_filter` does by default; torch and
    kornia offer no such padding (their "reflect" leaves the edge pixel out). Sides must be at least `radius` pixels.
    Within a region each pixel is the mean of its neighbours in it; outside the map is 0.
    """

    kernel: Tensor  # (2 * radius + 1,)

    def __init__(self, sigma: float) -> None:
        from kornia.filters import get_gaussian_kernel1d  # slow to import, and `check` needs none of it

        super().__init__()
        self.radius = blur_radius(sigma)
        kernel = get_gaussian_kernel1d(2 * self.radius + 1, sigma).flatten()
        self.register_buffer("kernel", kernel, persistent=False)

    def forward(self, anomaly_map: Tensor, region: Tensor | None = None) -> Tensor:
        if region is None:
            return self._smooth(anomaly_map)
        weight = self._smooth(region).clamp(min=torch.finfo(region.dtype).tiny)  # far outside it is 0
        return self._smooth(anomaly_map * region) / weight * region

    def _smooth(self, anomaly_map: Tensor) -> Tensor:
        rows = F.conv2d(_mirror(anomaly_map, self.radius, dim=2), self.kernel.view(1, 1, -1, 1))
        return F.conv2d(_mirror(rows, self.radius, dim=3), self.kernel.view(1, 1, 1, -1))


def blur_radius(sigma: float) -> int:
    """Pixels on either side of the centre of the kernel; at least 1."""
    return max(1, int(4 * sigma + 0.5))


def _mirror(image: Tensor, radius: int, dim: int) -> Tensor:
    """Add `radius` mirrored pixels at both ends of `dim`."""
    side = image.shape[dim]
    before = image.narrow(dim, 0, radius).flip(dim)
    after = image.narrow(dim, side - radius, radius).flip(dim)
    return torch.cat([before, image, after], dim=dim)
