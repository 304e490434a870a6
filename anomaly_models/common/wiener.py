"""The Wiener filter of a set of pictures: the best linear guess of a picture that is seen reduced and under noise.

Of pictures x with mean mu and covariance C, seen as x_t = s x + noise of variance v, the guess with the least squared
error is mu + s C (s^2 C + v)^-1 (x_t - s mu) (Wiener 1949). With C's principal directions u_i and variances l_i it is
mu + sum_i g_i u_i u_i^T (x_t - s mu), g_i = s l_i / (s^2 l_i + v); here over the first few directions.

The noise lies on reduced pictures, and the statistics are theirs. A direction is a combination of the pictures it was
learnt from, and so is the guess: the same combination of the pictures themselves is the guess at full size, as sharp as
they are.

A picture must not be filtered by statistics that it is part of: they know its defects and its noise. So there is a
filter for each fold as well, learnt from the pictures outside it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from anomaly_models.common.sizes import Size

MOST_IMAGES = 512  # that a filter learns from: 400 MB at 256 pixels, and an eigenproblem of a second
LEAST_SHARE = 1e-12  # of the pictures' sum of squares; a direction with less is rounding
COLUMNS = 2**14  # pixels whose float64 copies are held at once


def reduced(image: Tensor, size: Size) -> Tensor:
    """Pictures (B, C, H, W) as (B, C, h, w) of that size: averages of squares of pixels."""
    factor = image.shape[3] // size.width
    return image if factor == 1 else F.avg_pool2d(image, factor)


class EvenSample:
    """At most `most` of a stream of pictures, evenly spaced over it, on the CPU: memory does not grow with the set."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: list[tuple[Tensor, int | None]] = []
        self._stride = 1
        self.count = 0  # of the stream

    def add(self, images: Tensor, rows: Tensor | None) -> None:
        """Take in pictures (B, ...), and which of their data set they are (B,), if that is known."""
        for place, image in enumerate(images):
            if self.count % self._stride == 0:
                self._kept.append((image.to("cpu", copy=True), None if rows is None else int(rows[place])))
            if len(self._kept) > self._most:
                self._kept, self._stride = self._kept[::2], 2 * self._stride
            self.count += 1

    @property
    def images(self) -> Tensor:
        """Of shape (N, ...), at least one."""
        return torch.stack([image for image, _ in self._kept])

    @property
    def rows(self) -> Tensor | None:
        """Which of the data set they are, (N,); None unless all are known."""
        rows = [row for _, row in self._kept if row is not None]
        return torch.tensor(rows) if len(rows) == len(self._kept) else None


class Filtered(NamedTuple):
    centred: Tensor  # (B, 3, h, w), the noisy picture less s times the mean
    across: Tensor  # (B, 3, h, w), what of it no direction knows
    image: Tensor  # (B, 3, H, W), the guess


class WienerFilter(nn.Module):
    """A filter of all pictures and, while training lasts, one for each fold of those outside it.

    How many there are, and of how many directions, is known once they are learnt; a filter takes the saved shapes when
    it is loaded.
    """

    mean: Tensor  # (1 + F, 3, H, W), F folds; the first is that of all
    directions: Tensor  # (1 + F, K, 3, H, W), most variance first, of length 1 when reduced; 0 where there are fewer
    reduced_directions: Tensor  # (1 + F, K, 3, h, w); not part of the state, since they follow
    variances: Tensor  # (1 + F, K, 1, 1), along the reduced directions
    rows: Tensor  # (N,) int64, of the pictures that have a fold; number i of them is in fold i modulo F

    def __init__(self, image_size: Size, reduced_size: Size) -> None:
        super().__init__()
        self.reduced_size = reduced_size
        self.register_buffer("mean", torch.zeros(1, 3, *image_size))
        self.register_buffer("directions", torch.zeros(1, 1, 3, *image_size))
        self.register_buffer("variances", torch.zeros(1, 1, 1, 1))
        self.register_buffer("rows", torch.zeros(0, dtype=torch.long))
        self.register_buffer("reduced_directions", None, persistent=False)
        self._reduce_directions()

    def fit(self, images: Tensor, rows: Tensor | None, components: int, folds: int) -> None:
        """Learn from pictures (N, 3, H, W) on the CPU, in float64; without `rows` (N,), or of one, there are no folds.

        There are at most `components` directions, and fewer than pictures.
        """
        number = len(images)
        everyone = torch.arange(number)
        folds = 0 if rows is None or number == 1 else min(folds, number)
        outside = [everyone[everyone % folds != fold] for fold in range(folds)]
        products = gram(reduced(images, self.reduced_size))
        directions = min(components, max(1, number - 1))
        found = [principal(products, members, directions) for members in (everyone, *outside)]
        combinations = combined(images, torch.cat([weights for weights, _ in found]))
        filters = rearrange(combinations, "(f k) c h w -> f k c h w", f=1 + folds)
        device = self.mean.device
        self.mean, self.directions = filters[:, 0].to(device), filters[:, 1:].to(device)
        self.variances = torch.stack([variances for _, variances in found])[..., None, None].float().to(device)
        self.rows = (everyone[:0] if rows is None or folds == 0 else rows).to(device)
        self._reduce_directions()

    def forget_folds(self) -> None:
        """Keep the filter of all pictures alone."""
        self.mean, self.directions = self.mean[:1].clone(), self.directions[:1].clone()
        self.variances, self.rows = self.variances[:1].clone(), self.rows[:0].clone()
        self._reduce_directions()

    def filters_of(self, rows: Tensor) -> Tensor:
        """For each row (B,) of the data set the filter that it is no part of: its fold's, or if it has none all's."""
        rows = rows.to(self.rows.device)
        if len(self.rows) == 0:
            return torch.zeros_like(rows)
        matches = rows.unsqueeze(1) == self.rows
        fold = matches.int().argmax(dim=1) % (len(self.mean) - 1)
        return torch.where(matches.any(dim=1), 1 + fold, 0)

    def forward(
        self, noisy: Tensor, signal: Tensor | float, sigma: Tensor | float, which: Tensor | None = None
    ) -> Filtered:
        """The guess from `noisy` (B, 3, h, w) = signal * reduced picture + noise of deviation `sigma`, which is not 0.

        `signal` and `sigma` are numbers or (B, 1, 1, 1); `which` (B,) is from `filters_of`, None for all's.
        """
        # Half precision would cost every digit of a small difference to the mean.
        with torch.autocast(noisy.device.type, enabled=False):
            which = torch.zeros(1, dtype=torch.long, device=noisy.device) if which is None else which
            mean, reduced_directions = self.mean[which], self.reduced_directions[which]
            centred = noisy - signal * reduced(mean, self.reduced_size)
            along = coordinates(centred, reduced_directions)
            across = centred - combination(along, reduced_directions)
            weights = along * gains(self.variances[which], signal, sigma)
            return Filtered(centred, across, mean + combination(weights, self.directions[which]))

    def squared_error(self, images: Tensor, rows: Tensor | None, signal: float, sigma: float) -> Tensor:
        """Expected over the noise, of the reduced guess of pictures (N, 3, H, W), per pixel and channel; a scalar.

        Each picture has its own fold's filter, if there are folds: the error is that of pictures never seen.
        """
        which = self.filters_of(torch.full((len(images),), -1) if rows is None else rows)
        errors = []
        for image, index in zip(images.to(self.mean.device), torch.split(which, 1), strict=True):
            centred = reduced(image - self.mean[index], self.reduced_size)
            along = coordinates(centred, self.reduced_directions[index])
            gain = gains(self.variances[index], signal, sigma)
            left = along - signal * gain * along  # of the picture, along the directions; across them all of it is
            error = centred.square().sum() - along.square().sum() + left.square().sum()
            errors.append((error + (sigma * gain).square().sum()) / centred.numel())
        return torch.stack(errors).mean()

    def _reduce_directions(self) -> None:
        channels = rearrange(self.directions, "f k c h w -> f (k c) h w")
        self.reduced_directions = rearrange(reduced(channels, self.reduced_size), "f (k c) h w -> f k c h w", c=3)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, learnt in (("mean", 1), ("directions", 2), ("variances", 2), ("rows", 1)):  # sizes, of the first axes
            saved, own = state_dict.get(f"{prefix}{name}"), getattr(self, name)
            if saved is not None and saved.ndim == own.ndim and saved.shape[learnt:] == own.shape[learnt:]:
                setattr(self, name, own.new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._reduce_directions()


class FixedWienerFilter(nn.Module):
    """A filter of all pictures at fixed levels, with the same noise always: what no picture changes is stored."""

    reduced_directions: Tensor  # (1, K, 3, h, w)
    directions: Tensor  # (1, K, 3, H, W)
    mean: Tensor  # (1, 3, H, W)
    gains: Tensor  # (L, 1, K, 1, 1), of the L levels
    centred: Tensor  # (L, 1, 3, h, w), for a black picture
    along: Tensor  # (L, 1, K, 1, 1), alike, its coordinates

    def __init__(self, learnt: WienerFilter, levels: Sequence[tuple[float, float, Tensor]]) -> None:
        """A level is the factor of the picture, that of the noise, and the noise (1, 3, h, w)."""
        super().__init__()
        self.signals = [signal for signal, _, _ in levels]
        self.register_buffer("reduced_directions", learnt.reduced_directions[:1].clone())
        self.register_buffer("directions", learnt.directions[:1].clone())
        self.register_buffer("mean", learnt.mean[:1].clone())
        factors = [gains(learnt.variances[:1], signal, sigma) for signal, sigma, _ in levels]
        self.register_buffer("gains", torch.stack(factors))
        centred = [learnt(sigma * noise, signal, sigma).centred for signal, sigma, noise in levels]
        self.register_buffer("centred", torch.stack(centred))
        self.register_buffer("along", torch.stack([coordinates(part, self.reduced_directions) for part in centred]))

    def forward(self, image: Tensor) -> list[Filtered]:
        """The guess from reduced pictures (B, 3, h, w) under the noise, level by level."""
        own = coordinates(image, self.reduced_directions)
        guesses = []
        for signal, gain, black, base in zip(self.signals, self.gains, self.centred, self.along, strict=True):
            centred, along = signal * image + black, signal * own + base
            across = centred - combination(along, self.reduced_directions)
            guesses.append(Filtered(centred, across, self.mean + combination(along * gain, self.directions)))
        return guesses


def coordinates(image: Tensor, directions: Tensor) -> Tensor:
    """Of pictures (B, 3, h, w) along directions (B or 1, K, 3, h, w); (B, K, 1, 1)."""
    return torch.einsum("bchw,bkchw->bk", image, directions)[..., None, None]


def combination(weights: Tensor, directions: Tensor) -> Tensor:
    """The sum (B, 3, H, W) of directions (B or 1, K, 3, H, W) with their weights (B, K, 1, 1)."""
    return torch.einsum("bkxy,bkchw->bchw", weights, directions)


def gains(variances: Tensor, signal: Tensor | float, sigma: Tensor | float) -> Tensor:
    """What each direction's share of the noisy picture is multiplied by, to give the picture's."""
    return signal * variances / (signal * signal * variances + sigma * sigma)


def gram(images: Tensor) -> Tensor:
    """Scalar products of pictures (N, ...) with one another, (N, N), in float64."""
    chunks = (chunk.double() for chunk in torch.split(images.flatten(1), COLUMNS, dim=1))
    return torch.stack([chunk @ chunk.mT for chunk in chunks]).sum(dim=0)


def principal(products: Tensor, members: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """Mean and principal directions of some pictures, as combinations of all.

    Args:
        products: of all N pictures with one another, (N, N).
        members: numbers of those that count, at least one.
        components: directions wanted; where they have fewer, the rest is 0 and of variance 0.

    Returns:
        The pictures' weights (1 + components, N), the mean's first, and the directions' variances (components,).
    """
    own = products[members][:, members]
    centred = own - own.mean(dim=0) - own.mean(dim=1, keepdim=True) + own.mean()
    values, vectors = torch.linalg.eigh(centred)
    values, vectors = values.flip(0)[:components], vectors.mT.flip(0)[:components]
    real = values > LEAST_SHARE * own.diagonal().sum()
    weights = torch.where(real[:, None], vectors * signs(vectors) / values.abs().sqrt()[:, None], 0)
    combinations = products.new_zeros(1 + components, len(products))
    variances = products.new_zeros(components)
    combinations[0, members] = 1 / len(members)
    combinations[1 : 1 + len(weights), members] = weights
    variances[: len(values)] = torch.where(real, values / len(members), 0)
    return combinations, variances


def signs(vectors: Tensor) -> Tensor:
    """For each row the sign (K, 1) of the first entry that is at least half as large as its largest.

    Eigenvectors come with either sign, as the machine's library likes.
    """
    sizes = vectors.abs()
    first = (sizes >= sizes.amax(dim=1, keepdim=True) / 2).int().argmax(dim=1, keepdim=True)
    return vectors.gather(1, first).sign()


def combined(images: Tensor, weights: Tensor) -> Tensor:
    """Sums of pictures (N, ...) with each row's weights (M, N), summed in float64; (M, ...) in float32."""
    chunks = torch.split(images.flatten(1), COLUMNS, dim=1)
    return torch.cat([(weights @ chunk.double()).float() for chunk in chunks], dim=1).view(-1, *images.shape[1:])
