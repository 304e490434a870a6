"""Running mean, standard deviation and covariance per channel."""

import torch
from einops import rearrange
from torch import Tensor

from anomaly_models.base import ModelError

MIN_STD = 1e-6  # of a teacher channel; below it the channel is dead
MIN_VARIANCE = 1e-9  # of vectors, the mean over channels, relative to their squared mean; below it they are constant


def vectors_of(features: Tensor, cells: Tensor | None) -> Tensor:
    """The vectors (N, C) of maps (B, C, h, w): of all cells, or of those that are not 0 in (B, 1, h, w)."""
    rows = rearrange(features, "b c h w -> (b h w) c")
    return rows if cells is None else rows[rearrange(cells, "b 1 h w -> (b h w)") > 0]


class ChannelStatistics:
    """Mean and population standard deviation per channel, batch by batch (Chan et al. 1979), in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(())
        self.squares = torch.zeros(())  # sum of squared deviations from the mean

    def update(self, features: Tensor, cells: Tensor | None = None) -> None:
        """Take in (B, C, H, W), or of it those `cells`, (B, 1, H, W), that are not 0."""
        columns = vectors_of(features, cells).double().T.contiguous()  # (C, N)
        count = columns.shape[1]
        mean = columns.mean(dim=1)
        squares = (columns - mean.unsqueeze(1)).square().sum(dim=1)
        if self.count == 0:
            self.count, self.mean, self.squares = count, mean, squares
            return
        total = self.count + count
        shift = mean - self.mean
        self.mean = self.mean + shift * (count / total)
        self.squares = self.squares + squares + shift.square() * (self.count * count / total)
        self.count = total

    @property
    def std(self) -> Tensor:
        return (self.squares / self.count).sqrt()


class Moments:
    """Sums over the vectors of a level, in float64; they give the linear map that whitens such vectors."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self.count = 0
        self.total = torch.zeros(channels, dtype=torch.float64, device=device)
        self.products = torch.zeros(channels, channels, dtype=torch.float64, device=device)

    def update(self, features: Tensor, cells: Tensor | None = None) -> None:
        """Take in (B, C, h, w), or of it those `cells`, (B, 1, h, w), that are not 0."""
        rows = vectors_of(features, cells).double()
        self.count += len(rows)
        self.total += rows.sum(dim=0)
        self.products += rows.T @ rows

    def whitening(self, floor: float) -> tuple[Tensor, Tensor]:
        """The mean (C,), and (covariance + floor x mean variance)^-1/2, (C, C): symmetric, so that nothing is turned.

        Raises ModelError if all vectors are alike; there must be some.
        """
        mean = self.total / self.count
        variance, direction = torch.linalg.eigh(self.products / self.count - torch.outer(mean, mean))
        if not variance.mean() > MIN_VARIANCE * mean.square().mean():
            raise ModelError("the normal images are constant: all of their features are alike")
        scale = (variance.clamp(min=0) + floor * variance.mean()).rsqrt()
        return mean, (direction * scale) @ direction.T
