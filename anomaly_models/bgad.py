"""BGAD: normalising flows learn how likely normal features are; a few real anomalies make the boundary explicit.

X. Yao, R. Li, J. Zhang, J. Sun, C. Zhang, "Explicit Boundary Guided Semi-Push-Pull Contrastive Learning for Supervised
Anomaly Detection", CVPR 2023, arXiv 2207.01463.

The feature vectors of a frozen backbone, one conditional flow per level. Phase 1 maximises the likelihood of normal
vectors. In phase 2 the `beta` quantile of normal log-likelihoods is the boundary: normals below it are pulled up to it,
abnormals pushed to `tau` below it; whatever lies on its own side already is left alone. The abnormal vectors come from
real defects and from copies of them, varied and pasted onto normal images (`common.copy_paste`).

A batch without usable anomalies (none in the category, or none with a mask) trains the published variant for normals
only: likelihood, and the pull towards the boundary. An anomaly with an empty mask is left out: where it is abnormal is
not known.

Choices of the published code that a parameter gives back, and what is the better default:
- `features`: as the backbone gives them, or whitened by the mean and covariance of each level's normal vectors. That is
  a first layer of the flow in closed form: training starts from a Gaussian model, at a scale that no longer depends on
  the backbone, and log-likelihoods are those of whitened vectors.
- `boundary`: the quantile of each mini-batch, or a moving average of it per level.
- `masks`: the nearest pixel at the resolution of the features, or the covered share, with what is neither clearly
  abnormal nor clearly normal left out, and a ring of one cell around it.
- `focal`: weights without bounds (the abnormal one has a pole at 0), or clipped to 1 to 20.
- `passes`: mixed, as published: a pass counts real and pasted anomalies too (10 images 5 times, and 50), so that those
  of a small category are not short, and each batch has some in the place of normal images. Or a pass is over the normal
  images, and the anomalies come on top: with otherwise published settings, and 24 normal images beside 8 others, these
  are 88 % of the published steps on average over MVTec AD, 46 % for its smallest category (toothbrush), and phase 1
  takes 3,072 vectors a step for 4,096.
- `normaliser`: log-likelihoods are divided by it before boundary, margin and focal weights. Published is 10, chosen so
  that normals of the authors' raw features lie near -1 (they say so in their issue 17). Whitened normals lie at -1.3
  nats; divided by 10, the weights stand upside down, 13 for an abnormal vector there and 1 for a normal one, where at
  -1 they are 1 and 9. Then the push marks the places of the few training defects, and a good part that happens to be
  bright at one sets the threshold. Or it is what the normals of each level lie at when phase 1 ends, times a factor.
- `steps_per_batch`: as many mini-batches as a level has whole ones, which is none at the coarse levels of small
  batches, or a number per level.
- `resize`: published is Lanczos. It matters: bilinear inputs differ from these by up to 0.20 of the range of grey
  values, and their features by 12 to 36 % of the features' spread.
- `feathered`: 0, as published, leaves a hard seam around every paste.
- `ceiling_quantile`: 1, as published, scales each level by its single most likely vector.

Different from the published code, deliberately:
- A level keeps still while the others learn. Published is one Adam for all levels. Until torch 2.0 it took the missing
  gradients of the idle ones for zeros, and its momentum went on moving them: over the same 210 steps the coarsest level
  of three moved 3.6 times as far, the middle one 1.7 times, the finest 1.1 times. Under torch 2.0 the published code
  does as this one. With which torch its figures were made is not recorded.
- The scale of the map comes from held-out normals, not from the test images. The published maps are the same up to a
  constant if their maxima are given.
- The last weights are the model. Published figures are the best of 25 evaluations on the test set, metric by metric.
- Warm-up and cosine count optimiser steps. The published warm-up starts again in every pass, and overshoots (2.6e-4 for
  2.0e-4 in a pass of 15 batches); the published cosine goes down once in 8 passes, and ends at 9.9e-7 for 2.0e-7.
- Passes are counted to the fraction of a batch; published ones drop their last images, fewer than a batch.
- Every batch of phase 2 has the same number of real and pasted anomalies. Published ones are drawn from a shuffled
  list: of 32 images 6 or 7 are anomalous in the largest category of MVTec AD, 20 in the smallest.
- Mini-batches get equal shares of the abnormal vectors. Where a level has more vectors than its mini-batches take,
  normal ones are left out.
- Terms without a member are 0. There they are undefined, and hidden from the log.
- Image features are computed once. The position code's share of the first layer is computed per row and per column of
  the grid, not per vector.
- Defects are varied and pasted at `image_size`, not at the size of the original, where the same blur and the same grain
  are 3 to 4 times weaker (`common.copy_paste` says what else differs there). Where the part is, `common.foreground`
  says; the published masks of it were made by thresholds.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from anomaly_models.base import AnomalyModel, Batch, Config, ModelError, Prediction, Progress, Wants
from anomaly_models.common.backbones import Backbone, BackboneConfig, map_sizes
from anomaly_models.common.copy_paste import Pasted, paste_defects
from anomaly_models.common.row_cache import RowCache
from anomaly_models.common.scoring import cells_within, highest, size_of, within
from anomaly_models.common.settings import Settings
from anomaly_models.common.shards import WHOLE, Shard
from anomaly_models.common.sizes import Size
from anomaly_models.common.statistics import Moments

NUM_BLOCKS = 8  # per flow
AXIS_CODE = 64  # numbers that say which column, and as many for the row
MAX_WAVELENGTH = 10_000.0  # of the position code
CLAMP = 1.9  # bound of a log-scale; published after 2023 the flow library divides its argument by it, too
WIDENING = 2  # hidden over input width of a coupling's network
DAMPING = 0.1  # of a coupling's network, and of the learnt scales
INITIAL_THETA = 2 * math.log(math.exp(5) - 1)  # makes a scale of 1
FINAL_RATE = 1e-3  # of the learning rate, at the end
WARM_UP_START = 0.1  # of the learning rate, at the start
EASY_NORMAL, EASY_ABNORMAL = -0.2, -1.0  # normalised log-likelihoods from which, or up to which, a weight is 1
MAX_WEIGHT = 20.0
NORMAL_QUANTILE = 0.1  # from below: the log-likelihood that normals are said to lie at
LEAST_NATS = 0.25  # per channel, of what they lie at; a density so narrow, or narrower, has no scale of its own
USUAL_PLACE = (-2.0, -0.3)  # of normals, after the normaliser; the authors chose theirs so that it is about -1
POLE = -1e-3  # normalised log-likelihoods above it are taken for it, in clipped abnormal weights
WHITENING_FLOOR = 1e-3  # of a level's mean variance, added to the variance in every direction


class BatchBoundary(Settings):
    """The boundary is the quantile of the mini-batch at hand, as published."""

    name: Literal["batch"]


class AverageBoundary(Settings):
    """The boundary is a moving average of the mini-batches' quantiles."""

    name: Literal["ema"]
    momentum: Annotated[float, Field(ge=0, lt=1)]  # share of the old value


class NearestMasks(Settings):
    """A cell is what its top left pixel is, as published."""

    name: Literal["nearest"]


class AreaMasks(Settings):
    """A cell is abnormal if enough of it is; others that the defect touches, or that touch these, are left out."""

    name: Literal["area"]
    abnormal: Annotated[float, Field(gt=0, le=1)]  # share that is enough


class NormalPasses(Settings):
    """A pass shows every normal image once; the anomalies of phase 2 are added to its batches."""

    name: Literal["normals"]


class MixedPasses(Settings):
    """A pass of phase 2 shows anomalous images too, as published: it takes longer, and they take places in its batches.

    So a small category has passes nearly as long as a large one's.
    """

    name: Literal["mixed"]
    anomalous: PositiveInt  # images in a pass besides the normal ones, with repetitions; counted if there are none, too


class FixedNormaliser(Settings):
    """The same number for every level, as published: 10, which puts normals of the authors' raw features near -1."""

    name: Literal["fixed"]
    nats: PositiveFloat  # per channel


class QuantileNormaliser(Settings):
    """Of each level, what its normals lie at when phase 1 ends (`NORMAL_QUANTILE`), times a factor."""

    name: Literal["quantile"]
    factor: PositiveFloat  # 1: normals lie near -1, the working point of the authors


class BGADConfig(Config):
    """Published: see `presets/mvtec_ad.yaml`."""

    backbone: BackboneConfig
    features: Literal["raw", "whitened"]
    passes: Annotated[NormalPasses | MixedPasses, Field(discriminator="name")]
    anomalies_per_batch: NonNegativeInt  # real ones, in addition to `batch_size` normal images or in the place of some
    pastes_per_batch: NonNegativeInt  # copies of these on normal images of the batch, likewise
    feathered: Annotated[float, Field(ge=0, le=1)]  # share of the pastes whose borders fade in
    masks: Annotated[NearestMasks | AreaMasks, Field(discriminator="name")]
    epochs: PositiveInt  # passes
    normal_epochs: NonNegativeInt  # phase 1: the first of them
    warm_up_epochs: NonNegativeInt  # the rate grows in the first of them
    learning_rate: PositiveFloat
    vectors_per_step: PositiveInt  # in a mini-batch of one level
    steps_per_batch: Literal["published"] | Annotated[tuple[PositiveInt, ...], Field(strict=False)]  # or per level
    boundary: Annotated[BatchBoundary | AverageBoundary, Field(discriminator="name")]
    beta: Annotated[float, Field(ge=0, lt=1)]  # share of normal vectors below the boundary
    tau: PositiveFloat  # between the boundaries of normals and abnormals, after normalisation
    normaliser: Annotated[FixedNormaliser | QuantileNormaliser, Field(discriminator="name")]  # of log-likelihoods
    focal: Literal["clipped", "published", "none"]
    push_pull_weight: NonNegativeFloat  # lambda
    ceiling_quantile: Annotated[float, Field(gt=0, le=1)]  # of held-out log-likelihoods: a level's anomaly is 0 there

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if max(self.normal_epochs, self.warm_up_epochs) > self.epochs:
            raise ValueError(
                f"normal_epochs ({self.normal_epochs}) and warm_up_epochs ({self.warm_up_epochs}) are the first of "
                f"epochs ({self.epochs}) and cannot exceed it"
            )
        if isinstance(self.normaliser, QuantileNormaliser) and not self.normal_epochs:
            raise ValueError(
                "normaliser is the quantile of phase 1, but normal_epochs is 0: there is no such phase; raise it, or "
                "take the normaliser fixed"
            )
        levels = self.backbone.num_maps
        if self.steps_per_batch != "published" and len(self.steps_per_batch) != levels:
            raise ValueError(
                f"steps_per_batch needs a number for each of the {levels} maps of the backbone, or published; "
                f"found {list(self.steps_per_batch)}"
            )
        if self.pastes_per_batch and not self.anomalies_per_batch:
            raise ValueError(
                f"pastes_per_batch is {self.pastes_per_batch}, but there is nothing to copy: "
                "anomalies_per_batch is 0; raise it, or set both to 0"
            )
        if isinstance(self.passes, MixedPasses):
            self._check_mixture()
        return self

    def _check_mixture(self) -> None:
        if not self.anomalies_per_batch:
            raise ValueError(
                "passes are mixed, but anomalies_per_batch is 0: there is nothing to mix in; raise it, or take normals"
            )
        anomalous = self.anomalies_per_batch + self.pastes_per_batch
        if anomalous >= self.batch_size:
            raise ValueError(
                f"passes are mixed, and batch_size ({self.batch_size}) has no place for a normal image beside "
                f"anomalies_per_batch ({self.anomalies_per_batch}) and pastes_per_batch ({self.pastes_per_batch}); "
                "raise it"
            )

    @property
    def wants(self) -> Wants:
        return Wants(anomalies=self.anomalies_per_batch, foreground=True)


# --- flow ------------------------------------------------------------------------------------------------------------


def axis_code(side: int) -> Tensor:
    """Sines and cosines, in turn, of each index of an axis times 32 frequencies, (side, 64)."""
    frequency = MAX_WAVELENGTH ** (-torch.arange(0, AXIS_CODE, 2, dtype=torch.float64) / AXIS_CODE)
    angle = torch.arange(side, dtype=torch.float64).unsqueeze(1) * frequency
    return rearrange([angle.sin(), angle.cos()], "wave index j -> index (j wave)").float()


def random_rotation(channels: int) -> Tensor:
    """A rotation (C, C) drawn uniformly from SO(C)."""
    orthogonal, triangular = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))
    orthogonal = orthogonal * triangular.diagonal().sign()  # makes the draw uniform
    turned = orthogonal[:, :1] * torch.linalg.det(orthogonal).sign()
    return torch.cat([turned, orthogonal[:, 1:]], dim=1).float()


@dataclass(frozen=True, slots=True)
class Position:
    """Where in the grid of a level each of N vectors lies, and the code of either axis."""

    row: Tensor  # (N,)
    column: Tensor  # (N,)
    code: Tensor  # (longer side, 64)


class CouplingBlock(nn.Module):
    """One half of the channels moves as the other half and the position say; then scale, offset, a fixed rotation."""

    rotation: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        inputs = channels // 2 + 2 * AXIS_CODE
        self.expand = nn.Linear(inputs, WIDENING * inputs)
        self.contract = nn.Linear(WIDENING * inputs, channels)
        self.theta = nn.Parameter(torch.full((channels,), INITIAL_THETA))
        self.offset = nn.Parameter(torch.zeros(channels))
        self.register_buffer("rotation", random_rotation(channels))

    @property
    def scale(self) -> Tensor:
        return DAMPING * F.softplus(self.theta, beta=0.5)

    def expand_by_input(self) -> tuple[Tensor, Tensor, Tensor]:
        """The first layer's weights for the kept half, for the column's code and for the row's."""
        # One cut, not slices: the gradient of each slice would be as large as the weights, and most of it 0.
        kept = self.expand.in_features - 2 * AXIS_CODE
        of_kept, of_column, of_row = torch.split(self.expand.weight, [kept, AXIS_CODE, AXIS_CODE], dim=1)
        return of_kept, of_column, of_row

    def forward(self, x: Tensor, position: Position) -> tuple[Tensor, Tensor]:
        """Vectors (N, C) and the logarithm of the determinant, (N,)."""
        kept, moved = x.chunk(2, dim=1)
        of_kept, of_column, of_row = self.expand_by_input()
        hidden = F.linear(kept, of_kept)
        hidden = hidden + F.embedding(position.column, F.linear(position.code, of_column, self.expand.bias))
        hidden = hidden + F.embedding(position.row, F.linear(position.code, of_row))
        log_scale, shift = (DAMPING * self.contract(F.relu(hidden, inplace=True))).chunk(2, dim=1)
        log_scale = CLAMP * log_scale.tanh()
        scale = self.scale
        u = torch.cat([kept, moved * log_scale.exp() + shift], dim=1)
        return F.linear(scale * u + self.offset, self.rotation), log_scale.sum(dim=1) + scale.log().sum()


class ConditionalFlow(nn.Module):
    """Maps the feature vectors of one level to a standard normal distribution, each by itself and by its position."""

    code: Tensor

    def __init__(self, channels: int, size: Size) -> None:
        super().__init__()
        self.channels, self.size = channels, size
        self.blocks = nn.ModuleList(CouplingBlock(channels) for _ in range(NUM_BLOCKS))
        self.register_buffer("code", axis_code(max(size)), persistent=False)

    def forward(self, x: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        """Latent vectors (N, C) and log-determinants (N,) of features (N, C), at cells (N,) counted row by row."""
        position = Position(cell // self.size.width, cell % self.size.width, self.code)
        log_determinant = x.new_zeros(x.shape[0])
        for block in self.blocks:
            x, change = block(x, position)
            log_determinant = log_determinant + change
        return x, log_determinant

    def log_likelihood(self, x: Tensor, cell: Tensor) -> Tensor:
        """Per vector and channel, (N,), of features (N, C) at `cell` (N,)."""
        z, log_determinant = self(x, cell)
        return log_density(z.square().sum(dim=1), log_determinant, self.channels)

    def map_of(self, features: Tensor) -> Tensor:
        """Log-likelihoods (B, h, w) of feature maps (B, C, h, w)."""
        cell = torch.arange(self.size.area, device=features.device).expand(features.shape[0], -1)
        flat = self.log_likelihood(rearrange(features, "b c h w -> (b h w) c"), cell.flatten())
        return rearrange(flat, "(b h w) -> b h w", h=self.size.height, w=self.size.width)


def log_density(squared_norm: Tensor, log_determinant: Tensor, channels: int) -> Tensor:
    """The log-likelihood per channel of a vector whose latent has this squared norm."""
    return (log_determinant - squared_norm / 2) / channels - math.log(2 * math.pi) / 2


# --- losses ----------------------------------------------------------------------------------------------------------


def likelihood_cost(log_likelihood: Tensor) -> Tensor:
    """-ln sigmoid of log-likelihoods per channel: their negative far below 0, nothing far above."""
    return F.softplus(-log_likelihood)


def normal_weight(likelihood: Tensor) -> Tensor:
    """The focal weight of normals, given normalised log-likelihoods: 1 above -0.2, growing below."""
    hard = 11.7 * (1 - likelihood.clamp(max=0).exp()).sqrt() * likelihood.abs()
    return torch.where(likelihood > EASY_NORMAL, 1.0, hard)


def abnormal_weight(likelihood: Tensor) -> Tensor:
    """The focal weight of abnormals: 1 up to -1, growing above, without bound about 0."""
    hard = 0.53 * (1 + likelihood.exp()).square() / likelihood.abs()
    return torch.where(likelihood <= EASY_ABNORMAL, 1.0, hard)


def clipped_normal_weight(likelihood: Tensor) -> Tensor:
    return normal_weight(likelihood).clamp(1, MAX_WEIGHT)


def clipped_abnormal_weight(likelihood: Tensor) -> Tensor:
    return abnormal_weight(likelihood.clamp(max=POLE)).clamp(1, MAX_WEIGHT)


Weight = Callable[[Tensor], Tensor]
FOCAL: dict[str, tuple[Weight, Weight]] = {  # of normals and of abnormals
    "clipped": (clipped_normal_weight, clipped_abnormal_weight),
    "published": (normal_weight, abnormal_weight),
    "none": (torch.ones_like, torch.ones_like),
}


def lower_quantile(likelihood: Tensor, share: float) -> Tensor:
    """Of N values (N,), N > 0, the one that floor(share N) others lie below or level with; detached."""
    below = min(int(share * len(likelihood)), len(likelihood) - 1)
    return likelihood.detach().kthvalue(below + 1).values


def mean_over(values: Tensor, members: Tensor, shard: Shard = WHOLE) -> Tensor:
    """The mean of the members' values, 0 if there are none; a process's part of that over the members of all."""
    return torch.where(members, values, 0).sum() / shard.total(members.sum()).clamp(min=1)


def pull_loss(likelihood: Tensor, normal: Tensor, weight: Tensor, boundary: Tensor, shard: Shard = WHOLE) -> Tensor:
    """L_n: how far the normals that are not above the boundary lie below it. `normal` is bool, all are (N,)."""
    return mean_over(weight * (boundary - likelihood), normal & (likelihood <= boundary), shard)


def push_loss(likelihood: Tensor, abnormal: Tensor, weight: Tensor, boundary: Tensor, shard: Shard = WHOLE) -> Tensor:
    """L_a: how far the abnormals that are not below the boundary (b_a) lie above it."""
    return mean_over(weight * (likelihood - boundary), abnormal & (likelihood >= boundary), shard)


NORMAL, ABNORMAL, LEFT_OUT = 0, 1, 2  # what a cell is


def cells_of(mask: Tensor, size: Size, masks: NearestMasks | AreaMasks, region: Tensor | None = None) -> Tensor:
    """NORMAL, ABNORMAL or LEFT_OUT for each cell, (B, h * w), of masks (B, 1, H, W), 0 or 1; LEFT_OUT off a region."""
    kinds = _kinds_of(mask, size, masks)
    if region is not None:
        kinds = torch.where(cells_within(region, size) > 0, kinds, LEFT_OUT)
    return rearrange(kinds, "b 1 h w -> b (h w)")


def _kinds_of(mask: Tensor, size: Size, masks: NearestMasks | AreaMasks) -> Tensor:
    if isinstance(masks, NearestMasks):
        return (F.interpolate(mask, size=tuple(size), mode="nearest") > 0.5).long()
    covered = F.adaptive_avg_pool2d(mask, size)
    abnormal = covered >= masks.abnormal
    near = F.max_pool2d((covered > 0).float(), 3, stride=1, padding=1) > 0
    return torch.where(abnormal, ABNORMAL, torch.where(near, LEFT_OUT, NORMAL))


@dataclass(frozen=True, slots=True)
class Vectors:
    """Feature vectors of one level, of all images of a batch."""

    features: Tensor  # (N, C)
    cell: Tensor  # (N,), counted row by row
    abnormal: Tensor  # (N,) bool

    def take(self, chosen: Tensor) -> "Vectors":
        return Vectors(self.features[chosen], self.cell[chosen], self.abnormal[chosen])


@dataclass(frozen=True, slots=True)
class SharedVectors:
    """Those of one level, of which a process has features of its own images only: all know what all of them are."""

    own: Vectors
    abnormal: Tensor  # (N,) bool, of all vectors
    is_own: Tensor | None  # (N,) bool, which of them are in `own`; None: all

    def take(self, chosen: Tensor) -> Vectors:
        """Of the `chosen` ones, by their places among all, those that are its own."""
        if self.is_own is None:
            return self.own.take(chosen)
        place = self.is_own.cumsum(0) - 1
        return self.own.take(place[chosen[self.is_own[chosen]]])


def mini_batches(abnormal: Tensor, number: int, size: int, generator: torch.Generator) -> list[Tensor]:
    """Share out vectors at random among `number` mini-batches of `size` or fewer; each gets its part of the abnormal.

    Gives indices into `abnormal` (N,), bool. What does not fit into the mini-batches is normal, if it can be.
    """
    order = torch.randperm(len(abnormal), generator=generator, device=generator.device).to(abnormal.device)
    chosen = torch.cat([order[abnormal[order]], order[~abnormal[order]]])[: number * size]
    return [chosen[first::number] for first in range(number)]


def usable_anomalies(batch: Batch) -> Tensor:
    """Which images (B,) are anomalous and say where."""
    return batch.label & batch.mask.flatten(1).any(dim=1)


class Whitening(nn.Module):
    """Makes the mean of normal vectors 0 and their covariance 1; the identity until it has learnt."""

    mean: Tensor
    matrix: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("matrix", torch.eye(channels))

    def learn(self, moments: Moments) -> None:
        """Raises ModelError if there are no vectors, or if they are all alike."""
        if moments.count == 0:
            raise ModelError("BGAD found no normal images to learn from")
        mean, matrix = moments.whitening(WHITENING_FLOOR)
        self.mean.copy_(mean)
        self.matrix.copy_(matrix)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, h, w)."""
        return F.conv2d(features, *self.as_convolution())

    def as_convolution(self) -> tuple[Tensor, Tensor]:
        return rearrange(self.matrix, "out channel -> out channel 1 1"), -self.matrix @ self.mean


# --- model -----------------------------------------------------------------------------------------------------------


class BGAD(AnomalyModel):
    """The map lies between 0 and the number of levels; the score is its maximum."""

    Config = BGADConfig
    min_holdout = 1
    learns_in_shares = True

    boundary: Tensor  # (L,), moving average of b_n
    boundary_known: Tensor  # (L,) bool
    normal_place: Tensor  # (L,), what normals lie at when phase 1 ends: mean of mini-batch quantiles, not normalised
    num_quantiles: Tensor  # (L,) int64, how many
    ceiling: Tensor  # (L,), m_l: log-likelihoods from which on a vector is as normal as can be

    def __init__(self, config: BGADConfig) -> None:
        """Raises ModelError if image size or backbone do not fit."""
        super().__init__()
        self.config = config
        self.backbone = Backbone(config.backbone, config.image_size)
        self.sizes = _map_sizes(config, self.backbone)
        whitening = Whitening if config.features == "whitened" else nn.Identity
        self.whitenings = nn.ModuleList(map(whitening, self.backbone.channels))
        self.flows = nn.ModuleList(map(ConditionalFlow, self.backbone.channels, self.sizes))
        levels = len(self.sizes)
        self.register_buffer("boundary", torch.zeros(levels))
        self.register_buffer("boundary_known", torch.zeros(levels, dtype=torch.bool))
        self.register_buffer("normal_place", torch.zeros(levels))
        self.register_buffer("num_quantiles", torch.zeros(levels, dtype=torch.long))
        self.register_buffer("ceiling", torch.zeros(levels))
        self._cache = RowCache()
        self._check_steps()

    def _check_steps(self) -> None:
        """Raises ModelError if no level learns, or one has no phase 1 to take its normaliser from."""
        size, first, second = self.config.vectors_per_step, *(self.steps_per_batch(phase=phase) for phase in (1, 2))
        if not any(first):
            vectors = self.sizes[0].area * self.config.batch_size
            raise ModelError(
                f"BGAD's vectors_per_step is {size}, more than any level has in a batch ({vectors} at most); lower it, "
                "or name steps_per_batch per level"
            )
        late = [size for size, before, after in zip(self.sizes, first, second, strict=True) if after and not before]
        if late and isinstance(self.config.normaliser, QuantileNormaliser):
            raise ModelError(
                f"BGAD's normaliser is the quantile of phase 1, which has no step for the level of {late[0].width} x "
                f"{late[0].height} vectors (vectors_per_step is {size}); lower it, or name steps_per_batch per level"
            )

    @torch.no_grad()
    def prepare(self, normals: Iterable[Batch]) -> None:
        """Learn the whitening, if there is one. Raises ModelError without images, or if they are all constant."""
        self._cache.clear()
        if self.config.features == "raw":
            return
        device = self.ceiling.device
        sums = [Moments(channels, device) for channels in self.backbone.channels]
        for batch in normals:
            for moments, features in zip(sums, self.backbone(batch.image), strict=True):
                moments.update(features, _cells(batch.region, size_of(features)))
        for whitening, moments in zip(self.whitenings, sums, strict=True):
            assert isinstance(whitening, Whitening)
            whitening.learn(moments)

    def features(self, image: Tensor) -> list[Tensor]:
        """Per level (B, C, h, w), of images (B, 3, H, W) in [0, 1]."""
        return [whiten(level) for whiten, level in zip(self.whitenings, self.backbone(image), strict=True)]

    # The schedule: the loop counts batches, optimiser and schedule count mini-batches.

    def total_steps(self, num_normals: int) -> int:
        images = self.config.epochs * num_normals + self._anomalous_in(self.config.epochs)
        return max(1, math.ceil(images / self.config.batch_size))

    def normal_steps(self, total_steps: int) -> int:
        """How many batches phase 1 takes of so many: one or more, unless there is no such phase."""
        return max(round(self._batches(self.config.normal_epochs, total_steps)), min(self.config.normal_epochs, 1))

    def _ends_phase_1(self, progress: Progress) -> bool:
        """Whether a batch is of the last pass of phase 1."""
        steps = self.normal_steps(progress.total_steps)
        before = round(self._batches(self.config.normal_epochs - 1, progress.total_steps))
        return min(before, steps - 1) <= progress.step < steps

    def _batches(self, epochs: int, total_steps: int) -> float:
        """How many the first so many passes take, of so many that all of them take."""
        size = self.config.batch_size
        of_normals = total_steps - self._anomalous_in(self.config.epochs) / size
        return of_normals * epochs / self.config.epochs + self._anomalous_in(epochs) / size

    def _anomalous_in(self, epochs: int) -> int:
        """Images that the first so many passes have besides the normal ones."""
        passes = self.config.passes
        if isinstance(passes, NormalPasses):
            return 0
        return max(epochs - self.config.normal_epochs, 0) * passes.anomalous

    def steps_per_batch(self, *, phase: Literal[1, 2]) -> tuple[int, ...]:
        """Optimiser steps that each level takes on a batch.

        Published are the whole mini-batches of a full batch, at the coarse levels of small batches none.
        """
        if self.config.steps_per_batch != "published":
            return self.config.steps_per_batch
        images = self.config.batch_size
        if phase == 2 and isinstance(self.config.passes, NormalPasses):
            images += self.config.anomalies_per_batch + self.config.pastes_per_batch
        return tuple(images * size.area // self.config.vectors_per_step for size in self.sizes)

    def optimizer(self, total_steps: int) -> tuple[Optimizer, LRScheduler]:
        """Adam over all flows: one whose level is idle has no gradients, and keeps its state as if by itself."""
        per_batch = sum(self.steps_per_batch(phase=1)), sum(self.steps_per_batch(phase=2))
        normal = self.normal_steps(total_steps)

        def optimiser_steps(batches: float) -> int:
            """How many the first so many batches make."""
            return round(per_batch[0] * min(batches, normal) + per_batch[1] * max(batches - normal, 0))

        warm_up = optimiser_steps(self._batches(self.config.warm_up_epochs, total_steps))
        total = optimiser_steps(total_steps)
        optimizer = torch.optim.Adam(self.flows.parameters(), lr=self.config.learning_rate, fused=True)
        return optimizer, LambdaLR(optimizer, lambda step: rate_factor(step, warm_up, total))

    # Training

    def losses(self, batch: Batch, progress: Progress) -> Iterator[dict[str, Tensor]]:
        """Yield the steps of one level after another: mini-batches of its vectors, in random order."""
        phase: Literal[1, 2] = 1 if progress.step < self.normal_steps(progress.total_steps) else 2
        with torch.no_grad():
            supervised = phase == 2 and bool(usable_anomalies(batch).any())
            shard = progress.shard
            levels = self._vectors(batch, progress) if supervised else self._normal_vectors(batch, shard)
        for level, (vectors, steps) in enumerate(zip(levels, self.steps_per_batch(phase=phase), strict=True)):
            for part in mini_batches(vectors.abnormal, steps, self.config.vectors_per_step, progress.generator):
                chosen = vectors.take(part)
                flow = self.flows[level]
                assert isinstance(flow, ConditionalFlow)
                log_likelihood = flow.log_likelihood(chosen.features, chosen.cell)
                if phase == 2:
                    kinds = chosen.abnormal, vectors.abnormal[part]
                    yield self._terms(level, log_likelihood, kinds, shard, supervised=supervised)
                    continue
                if self._ends_phase_1(progress):
                    self._place_normals(level, shard.gathered(log_likelihood))
                cost = likelihood_cost(log_likelihood)
                yield {"likelihood": cost.mean() if shard.alone else cost.sum() / len(part)}

    @torch.no_grad()
    def _place_normals(self, level: int, log_likelihood: Tensor) -> None:
        """Take a mini-batch of the last pass of phase 1 into the mean of their quantiles."""
        self.num_quantiles[level] += 1
        found = lower_quantile(log_likelihood, NORMAL_QUANTILE)
        self.normal_place[level] += (found - self.normal_place[level]) / self.num_quantiles[level]

    def normaliser(self, level: int) -> Tensor:
        """Nats per channel that make a normalised log-likelihood of 1; after phase 1."""
        settings = self.config.normaliser
        if isinstance(settings, FixedNormaliser):
            return self.normal_place.new_tensor(settings.nats)
        return settings.factor * (-self.normal_place[level]).clamp(min=LEAST_NATS)

    def _terms(
        self, level: int, log_likelihood: Tensor, abnormal: tuple[Tensor, Tensor], shard: Shard, *, supervised: bool
    ) -> dict[str, Tensor]:
        """Those of a mini-batch of phase 2, given its own vectors' log-likelihoods (n,).

        `abnormal`: which of these are, and which of all that the processes have together.
        """
        own, of_all = abnormal
        cost, normal = likelihood_cost(log_likelihood), ~own
        likelihood = log_likelihood / self.normaliser(level)
        weigh_normals, weigh_abnormals = FOCAL[self.config.focal]
        weight = weigh_normals(likelihood.detach())
        terms = {"likelihood": mean_over(weight * cost, normal, shard)}
        if of_all.all() or (supervised and not of_all.any()):
            return terms
        normals = shard.gathered(likelihood[normal])
        boundary = self._boundary(level, normals)
        # Monitored: where it is large, the margin is small beside what normals differ by.
        terms["spread"] = (normals.median() - boundary) / self.config.tau / shard.world
        terms["pull"] = self.config.push_pull_weight * pull_loss(likelihood, normal, weight, boundary, shard)
        if supervised:
            weight = weigh_abnormals(likelihood.detach())
            push = push_loss(likelihood, own, weight, boundary - self.config.tau, shard)
            terms["push"] = self.config.push_pull_weight * push
        return terms

    def _boundary(self, level: int, likelihood: Tensor) -> Tensor:
        """b_n, given the normalised log-likelihoods of a mini-batch's normals."""
        settings = self.config.boundary
        found = lower_quantile(likelihood, self.config.beta)
        if isinstance(settings, BatchBoundary):
            return found
        averaged = torch.lerp(found, self.boundary[level], settings.momentum)
        self.boundary[level] = torch.where(self.boundary_known[level], averaged, found)
        self.boundary_known[level] = True
        return self.boundary[level].clone()

    def _normal_vectors(self, batch: Batch, shard: Shard) -> list[SharedVectors]:
        normal = (~batch.label).nonzero().flatten()
        own = shard.share_of(len(normal))
        features = self._unaugmented_features(batch, own.of(normal))
        mask, region = batch.mask[normal], None if batch.region is None else batch.region[normal]
        kinds = [cells_of(mask, size, self.config.masks, region) for size in self.sizes]
        is_own = own_places(len(normal), shard).to(normal.device)
        return [shared(level, kind, is_own, shard) for level, kind in zip(features, kinds, strict=True)]

    def _vectors(self, batch: Batch, progress: Progress) -> list[SharedVectors]:
        """Of the batch's normals and usable anomalies, and of pastes of these onto those."""
        shard, shown = progress.shard, self._shown(batch).nonzero().flatten()
        features = self._unaugmented_features(batch, shard.share_of(len(shown)).of(shown))
        mask, region = batch.mask[shown], None if batch.region is None else batch.region[shown]
        is_own = own_places(len(shown), shard)
        if self.config.pastes_per_batch:
            pasted, host = self._pastes(batch, progress.generator)
            image = shard.share_of(len(pasted.image)).of(pasted.image)
            features = [torch.cat(pair) for pair in zip(features, self._cell_features(image), strict=True)]
            mask = torch.cat([mask, pasted.mask])
            if batch.region is not None:
                region = torch.cat([batch.region[shown], batch.region[host]])
            is_own = torch.cat([is_own, own_places(len(pasted.image), shard)])
        kinds = [cells_of(mask, size, self.config.masks, region) for size in self.sizes]
        is_own = is_own.to(mask.device)
        return [shared(level, kind, is_own, shard) for level, kind in zip(features, kinds, strict=True)]

    def _shown(self, batch: Batch) -> Tensor:
        """Which images (B,) phase 2 learns from: usable anomalies, and the normal ones that they leave places for."""
        usable, normal = usable_anomalies(batch), ~batch.label
        if isinstance(self.config.passes, MixedPasses):
            places = self.config.batch_size - usable.sum() - self.config.pastes_per_batch
            normal = normal & (normal.cumsum(0) <= places)
        return normal | usable

    def _pastes(self, batch: Batch, generator: torch.Generator) -> tuple[Pasted, Tensor]:
        """Real defects on random normals, at most `pastes_per_batch`, and which image (n,) of the batch each is on."""
        donor = self._draw(usable_anomalies(batch), generator)
        host = self._draw(~batch.label, generator)
        part = None if batch.part is None else batch.part[host]
        pasted = paste_defects(
            batch.image[donor], batch.mask[donor], batch.image[host], part, self.config.feathered, generator
        )
        return pasted, host

    def _draw(self, eligible: Tensor, generator: torch.Generator) -> Tensor:
        """Places in the batch of `pastes_per_batch` eligible images, with replacement."""
        places = eligible.nonzero().flatten()
        shape = (self.config.pastes_per_batch,)
        return places[torch.randint(len(places), shape, generator=generator, device=generator.device).to(places.device)]

    def _unaugmented_features(self, batch: Batch, chosen: Tensor) -> list[Tensor]:
        """Per level (n, cells, C), of the `chosen` images, by their places in the batch."""
        if len(chosen) == 0:
            return self._no_features(batch.image)
        row = None if batch.row is None else batch.row[chosen.to(batch.row.device)]
        return self._cache(self._cell_features, batch.image[chosen], row)

    def _no_features(self, image: Tensor) -> list[Tensor]:
        """Of no image, as a process may have where there are few."""
        levels = zip(self.sizes, self.backbone.channels, strict=True)
        return [image.new_empty(0, size.area, channels) for size, channels in levels]

    def _cell_features(self, image: Tensor) -> list[Tensor]:
        """Per level (B, cells, C), of images (B, 3, H, W)."""
        if len(image) == 0:
            return self._no_features(image)
        return [rearrange(level, "b c h w -> b (h w) c").contiguous() for level in self.features(image)]

    # Use

    @torch.no_grad()
    def calibrate(self, holdout: Iterable[Batch]) -> None:
        """Find the most likely vectors of the held-out normals, per level. Raises ModelError without any."""
        self._cache.clear()
        maps = [
            [_counted(level, batch.region).cpu() for level in self.log_likelihoods(batch.image)] for batch in holdout
        ]
        if not maps:
            raise ModelError("BGAD needs held-out normal images to find the scale of its map; found none")
        for level, values in enumerate(zip(*maps, strict=True)):
            cells = torch.cat(values)
            self.ceiling[level] = cells.kthvalue(math.ceil(self.config.ceiling_quantile * len(cells))).values

    def warnings(self) -> Iterator[str]:
        """Where normals lie is far from where the losses expect them."""
        places = [self.normal_place[level] / self.normaliser(level) for level in range(len(self.sizes))]
        known = [float(place) for place, number in zip(places, self.num_quantiles, strict=True) if number]
        if all(USUAL_PLACE[0] <= place <= USUAL_PLACE[1] for place in known):
            return
        yield (
            f"after phase 1, normal log-likelihoods lie at {', '.join(f'{place:.2g}' for place in known)} of the "
            "normaliser (per layer), where the losses expect about -1 and work from -2 to -0.3: the threshold may miss "
            f"defects that are ranked well; {self._remedy()}"
        )

    def _remedy(self) -> str:
        settings = self.config.normaliser
        if isinstance(settings, FixedNormaliser):
            return "take normaliser: {name: quantile, factor: 1.5}"
        if not USUAL_PLACE[0] <= -1 / settings.factor <= USUAL_PLACE[1]:
            return f"normaliser.factor is {settings.factor:g}; take 0.5 to 3.3"
        return "the normal images differ too little; look at them, or lower normal_epochs"

    def log_likelihoods(self, image: Tensor) -> Sequence[Tensor]:
        """Per level (B, h, w), of images (B, 3, H, W) in [0, 1]."""
        return self.once_per_image(self._log_likelihoods, image)

    def _log_likelihoods(self, image: Tensor) -> list[Tensor]:
        maps = []
        for flow, features in zip(self.flows, self.features(image), strict=True):
            assert isinstance(flow, ConditionalFlow)
            maps.append(flow.map_of(features))
        return maps

    def forward(self, image: Tensor, region: Tensor | None = None) -> Prediction:
        return to_prediction(self.log_likelihoods(image), self.ceiling, self.config.image_size, region)

    def exportable(self) -> "FoldedBGAD":
        """The same function with fewer operations, for export; a copy, in eval mode."""
        return FoldedBGAD(self).eval()


def _map_sizes(config: BGADConfig, backbone: Backbone) -> tuple[Size, ...]:
    """Of the backbone's maps; ModelError unless its strides divide the image and its channels are even."""
    sizes = map_sizes(backbone, config.image_size, "BGAD's image_size")
    if any(channels % 2 for channels in backbone.channels):
        raise ModelError(
            f"BGAD splits channels in halves, but layers {list(backbone.layers)} of {backbone.name} have "
            f"{', '.join(map(str, backbone.channels))}; take others"
        )
    return sizes


def _cells(region: Tensor | None, size: Size) -> Tensor | None:
    """Which cells of a level count, (B, 1, h, w)."""
    return None if region is None else cells_within(region, size)


def _counted(level: Tensor, region: Tensor | None) -> Tensor:
    """The values (N,) of a level (B, h, w) that lie in the region."""
    if region is None:
        return level.flatten()
    return level[cells_within(region, size_of(level)).squeeze(1) > 0]


def rate_factor(step: int, warm_up: int, total: int) -> float:
    """What the learning rate is multiplied by at an optimiser step: linear up to a cosine, then along it."""

    def cosine(at: int) -> float:
        return FINAL_RATE + (1 - FINAL_RATE) * (1 + math.cos(math.pi * min(at / max(total, 1), 1))) / 2

    if step >= warm_up:
        return cosine(step)
    return WARM_UP_START + (cosine(warm_up) - WARM_UP_START) * step / warm_up


def flatten(features: Tensor, kinds: Tensor) -> Vectors:
    """The vectors of one level, given as (B, cells, C) with what each cell is (B, cells), but those left out."""
    kept = kinds != LEFT_OUT
    cell = torch.arange(kinds.shape[1], device=kinds.device).expand_as(kinds)
    return Vectors(features[kept], cell[kept], kinds[kept] == ABNORMAL)


def own_places(number: int, shard: Shard) -> Tensor:
    """Which of so many images, (number,) bool, are in a process's share."""
    return torch.arange(number) % shard.world == shard.rank


def shared(features: Tensor, kinds: Tensor, is_own: Tensor, shard: Shard) -> SharedVectors:
    """The vectors of one level: of all images what each cell is (B, cells), and the features of those that `is_own`."""
    if shard.alone:
        vectors = flatten(features, kinds)
        return SharedVectors(vectors, vectors.abnormal, None)
    kept = kinds != LEFT_OUT
    return SharedVectors(
        own=flatten(features, kinds[is_own]),
        abnormal=kinds[kept] == ABNORMAL,
        is_own=is_own.unsqueeze(1).expand_as(kinds)[kept],
    )


def to_prediction(
    log_likelihoods: Sequence[Tensor], ceiling: Tensor, size: Size, region: Tensor | None = None
) -> Prediction:
    """How far the levels' relative likelihoods (B, h, w), at most 1 each, fall short of their number in sum."""
    total: Tensor | float = 0.0
    for level, log_likelihood in enumerate(log_likelihoods):
        relative = (log_likelihood - ceiling[level]).clamp(max=0).exp().unsqueeze(1)
        if region is not None:  # a cell outside, of which nothing was learnt, says nothing to those beside it
            relative = torch.where(cells_within(region, size_of(relative)) > 0, relative, 1.0)
        total = total + F.interpolate(relative, size=tuple(size), mode="bilinear", align_corners=True)
    anomaly_map = len(log_likelihoods) - total
    assert isinstance(anomaly_map, Tensor)
    return Prediction(within(anomaly_map, region), highest(anomaly_map, region))


# --- export ----------------------------------------------------------------------------------------------------------


class FoldedBlock(nn.Module):
    """A `CouplingBlock` on maps (B, C, h, w): what the position adds is a number per row and one per column."""

    rotation: Tensor
    expand: Tensor
    of_column: Tensor
    of_row: Tensor
    contract: Tensor
    contract_bias: Tensor
    offset: Tensor

    def __init__(self, block: CouplingBlock, code: Tensor, size: Size) -> None:
        super().__init__()
        kept, column, row = block.expand_by_input()
        folded = {
            "expand": rearrange(kept, "hidden half -> hidden half 1 1"),
            "of_column": rearrange(F.linear(code[: size.width], column, block.expand.bias), "x hidden -> 1 hidden 1 x"),
            "of_row": rearrange(F.linear(code[: size.height], row), "y hidden -> 1 hidden y 1"),
            "contract": rearrange(DAMPING * block.contract.weight, "channel hidden -> channel hidden 1 1"),
            "contract_bias": DAMPING * block.contract.bias,
            "rotation": rearrange(block.rotation * block.scale, "out channel -> out channel 1 1"),
            "offset": block.rotation @ block.offset,
        }
        for name, value in folded.items():
            self.register_buffer(name, value.detach().clone())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (B, C, h, w), and the sum of the log-scales without the constant of `scale`, (B, h, w)."""
        kept, moved = x.chunk(2, dim=1)
        hidden = F.relu(F.conv2d(kept, self.expand) + self.of_column + self.of_row)
        log_scale, shift = F.conv2d(hidden, self.contract, self.contract_bias).chunk(2, dim=1)
        log_scale = CLAMP * log_scale.tanh()
        u = torch.cat([kept, moved * log_scale.exp() + shift], dim=1)
        return F.conv2d(u, self.rotation, self.offset), log_scale.sum(dim=1)


class FoldedFlow(nn.Module):
    """A `ConditionalFlow` as convolutions of 1 x 1."""

    log_determinant: Tensor

    def __init__(self, flow: ConditionalFlow) -> None:
        super().__init__()
        blocks = [block for block in flow.blocks if isinstance(block, CouplingBlock)]
        self.channels = flow.channels
        self.blocks = nn.ModuleList(FoldedBlock(block, flow.code, flow.size) for block in blocks)
        constant = torch.stack([block.scale.log().sum() for block in blocks]).sum()
        self.register_buffer("log_determinant", constant.detach())

    def forward(self, x: Tensor) -> Tensor:
        """Log-likelihoods (B, h, w) of feature maps (B, C, h, w)."""
        log_determinant = self.log_determinant
        for block in self.blocks:
            x, change = block(x)
            log_determinant = log_determinant + change
        return log_density(x.square().sum(dim=1), log_determinant, self.channels)


class FoldedBGAD(nn.Module):
    """A trained BGAD whose position codes, scales, offsets and rotations are folded into weights."""

    ceiling: Tensor

    def __init__(self, model: BGAD) -> None:
        super().__init__()
        self.image_size = model.config.image_size
        self.backbone = copy.deepcopy(model.backbone)
        self.whitenings = nn.ModuleList(map(_folded_whitening, model.whitenings))
        self.flows = nn.ModuleList(FoldedFlow(flow) for flow in model.flows if isinstance(flow, ConditionalFlow))
        self.register_buffer("ceiling", model.ceiling.clone())

    def forward(self, image: Tensor, region: Tensor | None = None) -> Prediction:
        levels = zip(self.flows, self.whitenings, self.backbone(image), strict=True)
        log_likelihoods = [flow(whiten(features)) for flow, whiten, features in levels]
        return to_prediction(log_likelihoods, self.ceiling, self.image_size, region)


def _folded_whitening(whitening: nn.Module) -> nn.Module:
    if not isinstance(whitening, Whitening):
        return nn.Identity()
    weight, bias = whitening.as_convolution()
    convolution = nn.Conv2d(weight.shape[1], weight.shape[0], kernel_size=1).to(weight)
    convolution.load_state_dict({"weight": weight, "bias": bias})
    return convolution
