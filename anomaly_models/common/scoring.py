"""From distances on a grid of features to a smooth anomaly map at the size of the image."""

import torch
from kornia.filters import get_gaussian_kernel1d
from torch import Tensor, nn
from torch.nn import functional as F

from anomaly_models.common.settings import Size


def resize_map(anomaly_map: Tensor, size: Size) -> Tensor:
    """Resize maps (B, C, h, w) to (B, C, H, W), bilinear with half-pixel centres."""
    return F.interpolate(anomaly_map, size=tuple(size), mode="bilinear", align_corners=False)


def size_of(image: Tensor) -> Size:
    """Of images or maps (..., H, W)."""
    height, width = image.shape[-2:]
    return Size(height, width)


class GaussianBlur(nn.Module):
    """Smooth maps (B, 1, H, W) with a separable Gaussian of `sigma` pixels, cut at 4 sigma.

    Borders are mirrored with the edge pixel repeated, as `scipy.ndimage.gaussian_filter` does by default; torch and
    kornia offer no such padding (their "reflect" leaves the edge pixel out). Sides must be at least `radius` pixels.
    """

    kernel: Tensor  # (2 * radius + 1,)

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.radius = blur_radius(sigma)
        kernel = get_gaussian_kernel1d(2 * self.radius + 1, sigma).flatten()
        self.register_buffer("kernel", kernel, persistent=False)

    def forward(self, anomaly_map: Tensor) -> Tensor:
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
