"""Running mean, standard deviation and covariance per channel."""

import torch
from einops import rearrange
from torch import Tensor

MIN_STD = 1e-6  # of a teacher channel; below it the channel is dead


class ChannelStatistics:
    """Mean and population standard deviation per channel, batch by batch (Chan et al. 1979), in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(())
        self.squares = torch.zeros(())  # sum of squared deviations from the mean

    def update(self, features: Tensor) -> None:
        """Take in (B, C, H, W)."""
        columns = rearrange(features.double(), "b c h w -> c (b h w)")
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
    """Sums over the vectors of a level, in float64."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self.count = 0
        self.total = torch.zeros(channels, dtype=torch.float64, device=device)
        self.products = torch.zeros(channels, channels, dtype=torch.float64, device=device)

    def update(self, features: Tensor) -> None:
        """Take in (B, C, h, w)."""
        rows = rearrange(features.double(), "b c h w -> (b h w) c")
        self.count += len(rows)
        self.total += rows.sum(dim=0)
        self.products += rows.T @ rows
