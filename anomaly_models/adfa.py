"""ADFA: patch descriptors learn to lie near the centres of normal ones, as a differentiable top-k measures it.

Y. Huang, G. Liu, Y. Luo, G. Yang, "ADFA: Attention-augmented Differentiable top-k Feature Adaptation for Unsupervised
Medical Anomaly Detection", ICIP 2023, arXiv 2308.15280, and the authors' code. The operator: Y. Xie et al.,
"Differentiable Top-k with Optimal Transport", NeurIPS 2020. The hypersphere objective: S. Lee, S. Lee, B. C. Song,
"CFA: Coupled-hypersphere-based Feature Adaptation for Target-Oriented Anomaly Localization", IEEE Access 2022.

The maps of a frozen backbone, averaged 3 x 3 and joined, pass a trained descriptor: a 1 x 1 convolution that also sees
its coordinates, then a gate per channel. Each position has one centre, the mean of the untrained descriptor over the
normal images. A position is compared with the centres of all positions, of which the k nearest count, softly. Training
and scoring use the same quantity, scaled per image by kappa: how far its descriptors lie from their own centres. Parts
are assumed to be registered: a random crop or a flip would part positions from their centres.

So it is as published, and blind to a part that turns: the mean of such parts at a position is a patch that no part has,
good patches lie as far from it as defective ones, and training only draws all of them together. What parameters offer
against that is not the paper's:
- `centres: coreset` keeps real patches, chosen greedily from those of all normal images as the starting descriptor
  gives them. The memory is then PatchCore's (K. Roth et al., "Towards Total Recall in Industrial Anomaly Detection",
  CVPR 2022). Without centres of their own positions have no kappa.
- `start: identity` or `whitened` is where the convolution starts from, in the place of a random matrix: the joined maps
  themselves, or (covariance + 0.1 x mean variance)^-1/2 of them, both without coordinates. The gate then starts at 0,
  which is a factor of 1.05 for all channels, so that no random number is left in the model. Both keep all channels
  (`gamma_d: 1`, CFA's value).
- `epochs: 0` trains nothing: from such a start training gained nothing worth its time (`benchmarks/settings.md`).

Different from the published code, deliberately:
- The transport problem has two anchors, so its solution is a sigmoid with one unknown per row. That is solved to full
  precision, where 200 Sinkhorn iterations may not converge.
- `normalize: row` measures the softness on the range of a row's distances. The published `batch_max` measures it on the
  largest distance of the batch, which makes the weights nearly equal and scores a function of the batch. It is offered
  for fidelity, with each image measured on its own largest distance after training.
- `candidates` restricts the operator to so many nearest centres and to their range. That is another operator, so it is
  the one of training, use and export alike.
- Centres weight all images alike; there, all batches. The descriptor has no dead parameters.
- Training stops when the descriptor collapses (`least_variance`), which lowers the loss and nothing else prevents. With
  `batch_max` it does happen. With 0 training goes on, as there.
- `input_statistics` is a choice: 0.5 for mean and deviation, as there for two of four data sets, or the backbone's own.
- Images are resized to `image_size` and seen whole; there, resized to 256 and cropped to 224.
- The radius of the hypersphere objective can be trained, as CFA does. Fixed near 0 its repulsion is always 0.
- With that objective the descriptor keeps ADFA's gate, which CFA does not have, and with `kl_weight` the squared
  distances ADFA's factor.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, Literal, Self, TypeAlias

import torch
from einops import rearrange, repeat
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, LRScheduler

from anomaly_models.base import AnomalyModel, Batch, Config, ModelError, Prediction, Progress, places_in
from anomaly_models.common.backbones import Backbone, BackboneConfig, map_sizes
from anomaly_models.common.memory_bank import Part, greedy_coreset
from anomaly_models.common.row_cache import RowCache
from anomaly_models.common.scoring import (
    GaussianBlur,
    blur_radius,
    cells_within,
    highest,
    mean_of_highest,
    resize_map,
    within,
)
from anomaly_models.common.settings import Settings
from anomaly_models.common.shards import WHOLE, Shard
from anomaly_models.common.sizes import Size
from anomaly_models.common.statistics import Moments

GATE_KERNEL = 9  # channels that the gate sees at once; fixed, not the adaptive size of the ECA paper
GATE_WEIGHT = 0.1  # of the gated descriptor, which is added to the descriptor
MIN_SQUARED_SCORE = 1e-12  # under a root
TOP_PIXELS = 100  # of the image score "top100_mean"
WHITENING_FLOOR = 0.1  # of the mean variance of the joined maps, added to the variance in every direction
SAMPLED_VALUES = 2**25  # of patches that a coreset is chosen from, at most: 128 MiB, and 20 s for 1,024 centres

NEWTON_STEPS = 5  # from 1/2 away: errors of at most 0.2, 0.03, 4e-4, 6e-8, 2e-15
MIN_SLOPE = 1e-30  # of a row whose weights are all 0 or 1
MIN_SCALE = 1e-30  # the range of a row and the kappa of an image can be 0

# Distances held at once. On a CPU they should stay in the cache, where each pass over them takes half the time.
CPU_CHUNK = 2**20
GPU_CHUNK = 2**26


class SoftTopKSettings(Settings):
    """The paper's objective: the sum of the k smallest distances, softened by optimal transport."""

    name: Literal["soft_topk"]
    k: PositiveInt
    eps: PositiveFloat  # towards 0 the k nearest count alone, towards infinity all alike
    normalize: Literal["row", "batch_max"]  # what eps is measured on
    candidates: PositiveInt | None  # how many nearest centres a position is compared with; null: all
    sqrt: bool  # of the map's values, as published

    @model_validator(mode="after")
    def _candidates_fit(self) -> Self:
        if self.candidates is not None and self.candidates <= self.k:
            raise ValueError(f"candidates must be more than k = {self.k}, or null; found {self.candidates}")
        if self.candidates is not None and self.normalize == "batch_max":
            raise ValueError("candidates go with normalize: row; with batch_max they must be null")
        return self


class HypersphereSettings(Settings):
    """CFA's objective: the nearest centres are drawn inside a radius, the next ones pushed out of it."""

    name: Literal["hypersphere"]
    attracted: PositiveInt  # K
    repelled: PositiveInt  # J
    radius: PositiveFloat  # at first, or always
    train_radius: bool
    alpha: NonNegativeFloat  # repulsion ends at squared distances of radius² - alpha
    nu: PositiveFloat  # divides both terms


class PositionCentres(Settings):
    """One centre per position, the mean of the normal images there, as published."""

    name: Literal["positions"]


class CoresetCentres(Settings):
    """Patches of the normal images, wherever they lie, as far from one another as can be: PatchCore's memory."""

    name: Literal["coreset"]
    number: PositiveInt
    per_image: PositiveInt  # patches of each image that they are chosen from, at most


class ADFAConfig(Config):
    backbone: BackboneConfig
    input_statistics: Literal["backbone", "half"]  # mean and deviation of inputs: its weights' own, or 0.5 and 0.5
    gamma_d: PositiveInt  # how many times fewer channels a descriptor has than the backbone's maps together
    start: Literal["random", "identity", "whitened"]  # of the descriptor's convolution, before training
    centres: Annotated[PositionCentres | CoresetCentres, Field(discriminator="name")]
    objective: Annotated[SoftTopKSettings | HypersphereSettings, Field(discriminator="name")]
    kl_weight: bool  # scale the squared distances of each image by its kappa
    blur_sigma: NonNegativeFloat  # pixels; 0: none
    image_score: Literal["max", "top100_mean"]  # of the pixels of the map
    epochs: NonNegativeInt  # 0: the starting descriptor is the model's
    least_variance: Annotated[
        float, Field(ge=0, lt=1)
    ]  # of the untrained descriptor's over positions; below, training stops
    learning_rate: PositiveFloat
    weight_decay: NonNegativeFloat

    @property
    def places(self) -> int:
        return self._num_tiles if isinstance(self.centres, PositionCentres) else 1

    def check_for_tiles(self) -> None:
        super().check_for_tiles()
        if isinstance(self.centres, PositionCentres) and self.epochs:
            raise ValueError(
                "with tiles, centres: positions are set for each and not trained: set epochs: 0, or take a coreset"
            )

    @property
    def scored_pixels(self) -> int:
        return 1 if self.image_score == "max" else TOP_PIXELS

    @property
    def learns_at_once(self) -> bool:
        return self.epochs == 0

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.blur_sigma and blur_radius(self.blur_sigma) > min(self.image_size):
            raise ValueError(f"blur_sigma {self.blur_sigma} reaches beyond a map of {self.image_size} pixels; lower it")
        if self.start != "random" and self.gamma_d != 1:
            raise ValueError(
                f"start: {self.start} keeps all channels, so gamma_d must be 1, found {self.gamma_d}; set it to 1, or "
                "take start: random"
            )
        if self.kl_weight and isinstance(self.centres, CoresetCentres):
            raise ValueError(
                "kl_weight compares each position with its own centre, and centres: coreset has none; set it to false, "
                "or take centres: positions"
            )
        return self


# --- the differentiable top-k ----------------------------------------------------------------------------------------


def top_k_weights(distance: Tensor, k: int, temperature: Tensor, reach: float) -> Tensor:
    """How much each of the distances (R, n) belongs to the k smallest of its row: in [0, 1], summing to k.

    Optimal transport of n equal masses to the anchors "selected" (0) and "not selected" (1), which take k / n and
    1 - k / n of them. With two anchors the solution is A_i = sigmoid((tau - s_i) / temperature), where tau makes the
    row sum to k.

    Args:
        distance: the rows.
        k: less than n.
        temperature: (R, 1), positive. Costs (s - y)² divided by c, with entropy of weight eps, make it eps c / 2.
        reach: no row's range exceeds so many temperatures. Known beforehand, it fixes the number of steps, and with it
            the exported graph.
    """
    scaled = (distance - distance.amin(1, keepdim=True)) / temperature
    low = scaled.new_full((1, 1), math.log(k / (distance.shape[1] - k)))  # tau, if all were as small as the smallest
    high = low + scaled.amax(1, keepdim=True)
    for _ in range(max(0, math.ceil(math.log2(reach)))):
        middle = (low + high) / 2
        too_few = torch.sigmoid(middle - scaled).sum(1, keepdim=True) < k
        low, high = torch.where(too_few, middle, low), torch.where(too_few, high, middle)
    # Now tau is at most 1/2 away, from where Newton's method cannot but converge, since |f''| <= f'.
    tau = (low + high) / 2
    for _ in range(NEWTON_STEPS):
        weights = torch.sigmoid(tau - scaled)
        total = weights.sum(1, keepdim=True)
        slope = (total - weights.square().sum(1, keepdim=True)).clamp_min(MIN_SLOPE)
        tau = tau + ((k - total) / slope).clamp(-1, 1)
    return torch.sigmoid(tau - scaled)


class SoftTopK(torch.autograd.Function):
    """`top_k_weights` with its implicit gradient: no step of the solver is recorded.

    With a_i = A_i (1 - A_i) and an upstream gradient G, dL/ds_j = -a_j (G_j - sum G a / sum a) / temperature.
    """

    @staticmethod
    def forward(ctx: Any, distance: Tensor, k: int, temperature: Tensor, reach: float) -> Tensor:
        weights = top_k_weights(distance, k, temperature, reach)
        ctx.save_for_backward(weights, temperature)
        return weights

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        weights, temperature = ctx.saved_tensors
        slope = weights * (1 - weights)
        total = slope.sum(1, keepdim=True).clamp_min(MIN_SLOPE)
        mean = (gradient * slope).sum(1, keepdim=True) / total
        return slope * (mean - gradient) / temperature, None, None, None


def soft_topk(distance: Tensor, k: int, temperature: Tensor, reach: float) -> Tensor:
    """`top_k_weights`, differentiable by the distances; the temperature counts as a constant."""
    weights: Tensor = SoftTopK.apply(distance, k, temperature, reach)
    return weights


# --- descriptors and distances ---------------------------------------------------------------------------------------


class Descriptor(nn.Module):
    """A 1 x 1 convolution that sees where it is (CoordConv), and a gate per channel (ECA, on mean and maximum).

    The gate looks at the whole image and scales each channel by a factor between 1 and 1.1.
    """

    coordinates: Tensor  # (1, 2, h, w): row and column, each from -1 to 1

    def __init__(self, in_channels: int, channels: int, size: Size) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(in_channels + 2, channels, kernel_size=1)
        self.gate = nn.Conv1d(1, 1, GATE_KERNEL, padding=GATE_KERNEL // 2, bias=False)
        axes = [torch.linspace(-1, 1, side) for side in size]
        coordinates = torch.stack(torch.meshgrid(*axes, indexing="ij")).unsqueeze(0)
        self.register_buffer("coordinates", coordinates, persistent=False)

    @torch.no_grad()
    def start_from(self, weight: Tensor, bias: Tensor) -> None:
        """Make the convolution these, (D, C) and (D,), blind to coordinates, and the gate the same for all channels."""
        blind = F.pad(weight, (0, 2))
        self.convolution.load_state_dict({"weight": rearrange(blind, "d c -> d c 1 1"), "bias": bias})
        self.gate.weight.zero_()

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, h, w) to (B, D, h, w)."""
        coordinates = self.coordinates.expand(features.shape[0], -1, -1, -1)
        described = self.convolution(torch.cat([features, coordinates], dim=1))
        logit = self._gate(described.mean(dim=(2, 3))) + self._gate(described.amax(dim=(2, 3)))
        return described * (1 + GATE_WEIGHT * rearrange(torch.sigmoid(logit), "b d -> b d 1 1"))

    def _gate(self, values: Tensor) -> Tensor:
        """Convolve (B, D) along the channels."""
        return self.gate(values.unsqueeze(1)).squeeze(1)


class Centres:
    """Vectors (T, D) to measure squared distances from.

    The expansion |p|² + |c|² - 2 p·c makes them matrix products but cancels for vectors far from the origin, so all are
    taken relative to the mean centre.
    """

    def __init__(self, centres: Tensor) -> None:
        self.origin = centres.mean(0)
        self.centred = centres - self.origin
        self.squared_norm = self.centred.square().sum(1)

    def __len__(self) -> int:
        return len(self.centred)

    def __call__(self, rows: Tensor, candidates: int | None) -> Tensor:
        """Squared distances (R, n) of rows (R, D) to all centres, or in any order to the nearest of them."""
        centred = rows - self.origin
        expanded = torch.addmm(self.squared_norm, centred, self.centred.T, alpha=-2)
        if candidates is not None:  # |c|² - 2 p·c ranks as the distance does
            expanded = expanded.topk(candidates, dim=1, largest=False, sorted=False).values
        return (expanded + centred.square().sum(1, keepdim=True)).clamp_min(0)

    def chunks(self, *rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Cut tensors (R, ...) alike into so many rows that their distances are few enough to hold.

        All at once in an exported graph, which has no loops.
        """
        if torch.compiler.is_exporting():
            return iter([rows])
        elements = CPU_CHUNK if self.centred.device.type == "cpu" else GPU_CHUNK
        size = max(1, elements // len(self))
        return zip(*(torch.split(tensor, size) for tensor in rows), strict=True)


class PositionMeans:
    """The centres of `PositionCentres`: all images weigh alike."""

    def __init__(self) -> None:
        self._total = torch.zeros((), dtype=torch.float64)
        self._num_images = 0

    def update(self, described: Tensor, inside: Tensor | None) -> None:  # noqa: ARG002
        """Take in (B, T, D); a position outside the region has a centre too, which nobody asks for."""
        self._total = self._total + described.double().sum(0)
        self._num_images += len(described)

    def centres(self) -> Tensor:
        """(T, D)."""
        return self._total / self._num_images


class PatchCoreset:
    """The centres of `CoresetCentres`.

    Every image gives the same number of patches at random places: `per_image`, or fewer where those of all images
    would exceed `SAMPLED_VALUES`, which bounds memory and time however many there are. The places are a function of the
    images' order alone.
    """

    def __init__(self, settings: CoresetCentres, num_images: int, channels: int) -> None:
        self._number = settings.number
        self._per_image = max(1, min(settings.per_image, SAMPLED_VALUES // channels // num_images))
        self._generator = torch.Generator().manual_seed(0)
        self._sampled: list[Tensor] = []

    def update(self, described: Tensor, inside: Tensor | None) -> None:
        """Take in (B, T, D), or of it what is `inside`, (B, T) bool."""
        for index, image in enumerate(described):
            patches = image if inside is None else image[inside[index]]
            places = torch.randperm(len(patches), generator=self._generator)[: self._per_image]
            self._sampled.append(patches[places.to(image.device)])

    def centres(self) -> Tensor:
        """(number, D); where fewer patches differ, the chosen ones in turn, again and again."""
        patches = torch.cat(self._sampled)
        chosen, radii = greedy_coreset(patches, min(self._number, len(patches)))
        num_distinct = 1 + int(radii[:-1].count_nonzero())
        return patches[chosen[torch.arange(self._number, device=chosen.device) % num_distinct]]


PerRow: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # rows (R, D) and a number for each (R, 1) -> values (R,)


class RowByRow(torch.autograd.Function):
    """A function of rows (R, D), each by itself, with the derivative of each row's value taken in the same pass.

    A chunk's distances are needed for its derivative, D numbers a row, and then forgotten: what waits for the backward
    pass is as large as the rows, and not as their distances to all centres.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, numbers: Tensor, function: PerRow, centres: Centres) -> Tensor:
        values, slopes = [], []
        for chunk, its_numbers in centres.chunks(rows, numbers):
            with torch.enable_grad():
                leaf = chunk.detach().requires_grad_()
                value = function(leaf, its_numbers)
                slopes.append(torch.autograd.grad(value.sum(), leaf)[0])
            values.append(value.detach())
        ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return gradient.unsqueeze(1) * slopes, None, None, None


@torch.no_grad()
def kl_factor(described: Tensor, centres: Tensor) -> Tensor:
    """Kappa (B,), how far the descriptors (B, T, D) of an image lie from their own centres (T, D); no gradient.

    The sum over positions of KL(softmax(C_t) || softmax(phi_t)), softmax over channels.
    """
    expected = centres.log_softmax(dim=1).expand_as(described)
    found = described.log_softmax(dim=2)
    return F.kl_div(found, expected, reduction="none", log_target=True).sum(dim=(1, 2)).clamp_min(0)


# --- objectives ------------------------------------------------------------------------------------------------------


def soft_distance(settings: SoftTopKSettings, centres: Centres) -> PerRow:
    """The function of rows (R, D) and their softness (R, 1): the softly weighted sum of squared distances.

    Softness is the temperature of the top-k; with `normalize: row` it counts in ranges of the row's distances.
    """
    reach = (1 if settings.normalize == "row" else 4) / settings.eps

    def function(rows: Tensor, softness: Tensor) -> Tensor:
        distance = centres(rows, settings.candidates)
        temperature = softness
        if settings.normalize == "row":
            span = (distance.amax(1, keepdim=True) - distance.amin(1, keepdim=True)).detach()
            temperature = softness * span.clamp_min(MIN_SCALE)
        return (soft_topk(distance, settings.k, temperature, reach) * distance).sum(1)

    return function


@torch.no_grad()
def published_softness(
    eps: float, rows: Tensor, centres: Centres, kappa: Tensor, *, together: bool, shard: Shard = WHOLE
) -> Tensor:
    """`batch_max`: the temperature of each image, (B,), in units of distances that kappa (B,) has not scaled.

    eps / 2 times the largest cost (s - y)² of distances s to the anchors y, 0 and 1, of all images `together`, those of
    other processes too, or of each by itself. No range of distances exceeds 4 / eps of it.
    """
    ends = [
        (distance.amin(1), distance.amax(1)) for distance in (centres(chunk, None) for (chunk,) in centres.chunks(rows))
    ]
    smallest, largest = (torch.cat(end) for end in zip(*ends, strict=True))
    smallest = kappa * rearrange(smallest, "(b t) -> b t", b=kappa.shape[0]).amin(1)
    largest = kappa * rearrange(largest, "(b t) -> b t", b=kappa.shape[0]).amax(1)
    if together:
        smallest, largest = shard.lowest(smallest.min()), shard.highest(largest.max())
    return eps / 2 * torch.maximum(largest, 1 - smallest).square() / kappa.clamp_min(MIN_SCALE)


def hypersphere_terms(nearest: Tensor, radius: Tensor, settings: HypersphereSettings) -> dict[str, Tensor]:
    """CFA's attraction and repulsion, of squared distances (..., K + J) in ascending order."""
    attracted, repelled = torch.split(nearest, [settings.attracted, settings.repelled], dim=-1)
    squared_radius = radius.square()
    return {
        "attraction": (attracted - squared_radius).clamp_min(0).mean() / settings.nu,
        "repulsion": (squared_radius - repelled - settings.alpha).clamp_min(0).mean() / settings.nu,
    }


def soft_minimum(nearest: Tensor) -> Tensor:
    """CFA's score (...,) of squared distances (..., K), ascending: the smallest root, times its share in a softmin."""
    root = nearest.clamp_min(MIN_SQUARED_SCORE).sqrt()
    return F.softmin(root, dim=-1)[..., 0] * root[..., 0]


def image_score(anomaly_map: Tensor, kind: Literal["max", "top100_mean"], region: Tensor | None = None) -> Tensor:
    """The largest pixel of each map (B, 1, H, W) within the region, or the mean of its 100 largest: (B,)."""
    return highest(anomaly_map, region) if kind == "max" else mean_of_highest(anomaly_map, TOP_PIXELS, region)


# --- the model -------------------------------------------------------------------------------------------------------


class ADFA(AnomalyModel):
    """Backbone, descriptor, and centres, which `prepare` sets and nothing changes afterwards."""

    Config = ADFAConfig
    learns_in_shares = True

    centres: Tensor  # (n, D); of positions row by row of the grid, n = T; of several tiles one after the other
    untrained_variance: Tensor  # (), of the descriptor over positions, when the centres were set
    radius: Tensor  # (), of the hypersphere objective only

    def __init__(self, config: ADFAConfig) -> None:
        """Raises ModelError if image_size, gamma_d or the objective do not fit the backbone's maps."""
        super().__init__()
        self.config = config
        self.backbone = Backbone(config.backbone, config.image_size)
        if config.input_statistics == "half":
            self.backbone.mean.fill_(0.5)
            self.backbone.std.fill_(0.5)
        self.grid, *_ = map_sizes(self.backbone, config.image_size, "image_size")
        num_centres = self.grid.area if isinstance(config.centres, PositionCentres) else config.centres.number
        _check_neighbours(config, num_centres)
        in_channels = sum(self.backbone.channels)
        channels = in_channels // config.gamma_d
        if channels == 0:
            raise ModelError(f"gamma_d must be at most {in_channels}, the backbone's channels; found {config.gamma_d}")
        self.descriptor = Descriptor(in_channels, channels, self.grid)
        if config.start == "identity":
            self.descriptor.start_from(torch.eye(channels), torch.zeros(channels))
        self.register_buffer("centres", torch.zeros(config.places * num_centres, channels))
        self.register_buffer("untrained_variance", torch.ones(()))
        if isinstance(config.objective, HypersphereSettings):
            self._add_radius(config.objective)
        self.blur = GaussianBlur(config.blur_sigma) if config.blur_sigma else None
        self._cache = RowCache()
        if config.epochs == 0:
            self.requires_grad_(False)

    def _add_radius(self, settings: HypersphereSettings) -> None:
        radius = torch.tensor(settings.radius)
        if settings.train_radius:
            self.radius = nn.Parameter(radius)
        else:
            self.register_buffer("radius", radius)

    @torch.no_grad()
    def prepare(self, normals: Iterable[Batch]) -> None:
        """Set the descriptor's start, where it is a function of the images, and then the centres.

        Both need a pass: the gate, and with it a descriptor, is a function of the whole image. Raises ModelError
        without images, and for a whitened start if all of their features are alike.
        """
        self._cache.clear()
        num_images = sum(len(batch.image) for batch in normals)
        if num_images == 0:
            raise ModelError("ADFA has no normal image to learn from")
        if self.config.start == "whitened":
            self._whiten(normals)
        memories = [self._empty_memory(num_images) for _ in range(self.config.places)]
        variance = torch.zeros_like(self.untrained_variance, dtype=torch.float64)
        for batch in normals:
            described = self.describe(self._training_maps(batch))
            cells = self._cells(batch.region)
            inside = None if cells is None else cells.flatten(1) > 0
            for place, images in places_in(batch, self.config.places):
                memories[place].update(described[images], None if inside is None else inside[images])
            variance += described.double().var(dim=1).mean(dim=1).sum()
        self.centres.copy_(torch.cat([memory.centres().to(self.centres) for memory in memories]))
        self.untrained_variance.copy_(variance / num_images)

    def _whiten(self, normals: Iterable[Batch]) -> None:
        moments = Moments(sum(self.backbone.channels), self.centres.device)
        for batch in normals:
            moments.update(self.features(self._training_maps(batch)), self._cells(batch.region))
        mean, matrix = moments.whitening(WHITENING_FLOOR)
        self.descriptor.start_from(matrix, -matrix @ mean)

    def _empty_memory(self, num_images: int) -> PositionMeans | PatchCoreset:
        match self.config.centres:
            case PositionCentres():
                return PositionMeans()
            case CoresetCentres() as settings:
                return PatchCoreset(settings, num_images, self.centres.shape[1])

    def total_steps(self, num_normals: int) -> int:
        return math.ceil(self.config.epochs * num_normals / self.config.batch_size)

    def optimizer(self, total_steps: int) -> tuple[Optimizer, LRScheduler] | None:
        """AdamW with AMSGrad over the descriptor, and the radius if it is trained, at a constant rate."""
        if self.config.epochs == 0:
            return None
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        rate, decay = self.config.learning_rate, self.config.weight_decay
        optimizer = torch.optim.AdamW(trainable, lr=rate, weight_decay=decay, amsgrad=True)
        return optimizer, ConstantLR(optimizer, factor=1, total_iters=total_steps)

    def losses(self, batch: Batch, progress: Progress) -> Iterator[dict[str, Tensor]]:
        """One step. Monitored only: the mean kappa, and the variance of the descriptor over positions.

        Kappa is in the loss and not in the gradient, so a loss can rise that is being minimised. Raises ModelError when
        the variance has fallen below `least_variance` of the untrained descriptor's.
        """
        shard, share = progress.shard, progress.shard.share_of(len(batch.image))
        described = self.describe(self._training_maps(batch.of(share)))
        part = share.mean(described.detach().var(dim=1)) / self.untrained_variance
        variance = shard.total(part)
        if variance < self.config.least_variance:
            raise ModelError(
                f"step {progress.step}: the descriptor has collapsed, its variance over positions is {variance:.2g} of "
                "the untrained one's; lower learning_rate or epochs, take normalize: row where it is batch_max, or let "
                "it go on by a lower least_variance"
            )
        kappa = self.kappa(described)
        monitored = {"kappa": share.mean(kappa), "variance": part}
        match self.config.objective:
            case SoftTopKSettings() as settings:
                squared_score = self.soft_distances(settings, described, kappa, together=True, shard=shard)
                yield {"soft_topk": share.mean(squared_score), **monitored}
            case HypersphereSettings() as settings:
                nearest = self.nearest(described, kappa, settings.attracted + settings.repelled)
                terms = hypersphere_terms(nearest, self.radius, settings)
                yield {**{name: share.weighed(mean) for name, mean in terms.items()}, **monitored}

    def train(self, mode: bool = True) -> "ADFA":
        """In eval mode training is over, and its maps are forgotten."""
        if not mode:
            self._cache.clear()
        super().train(mode)
        return self

    def forward(self, image: Tensor, region: Tensor | None = None) -> Prediction:
        return self._detect(image, region, None)

    def forward_at(self, image: Tensor, region: Tensor | None, tile: Tensor) -> Prediction:
        places = self.config.places
        return self._detect(image, region, None if places == 1 else Part(tile, places).of(self.centres))

    def _detect(self, image: Tensor, region: Tensor | None, centres: Tensor | None) -> Prediction:
        described = self.describe(self.backbone(image))
        kappa = self.kappa(described, centres)
        match self.config.objective:
            case SoftTopKSettings() as settings:
                cells = self.soft_distances(settings, described, kappa, together=False, vectors=centres)
                cells = cells.clamp_min(MIN_SQUARED_SCORE).sqrt() if settings.sqrt else cells
            case HypersphereSettings() as settings:
                cells = soft_minimum(self.nearest(described, kappa, settings.attracted, centres))
        grid = within(rearrange(cells, "b (h w) -> b 1 h w", h=self.grid.height), self._cells(region))
        anomaly_map = resize_map(grid, self.config.image_size)
        anomaly_map = within(anomaly_map, region) if self.blur is None else self.blur(anomaly_map, region)
        return Prediction(anomaly_map, image_score(anomaly_map, self.config.image_score, region))

    def _cells(self, region: Tensor | None) -> Tensor | None:
        """Which positions count, (B, 1, h, w)."""
        return None if region is None else cells_within(region, self.grid)

    def _training_maps(self, batch: Batch) -> list[Tensor]:
        """The backbone's maps, computed once per training image: nothing is augmented."""
        return self._cache(self.backbone, batch.image, batch.row)

    def describe(self, maps: list[Tensor]) -> Tensor:
        """The descriptors, phi (B, T, D), of the backbone's maps."""
        return rearrange(self.descriptor(self.features(maps)), "b d h w -> b (h w) d")

    def features(self, maps: list[Tensor]) -> Tensor:
        """Maps with each position averaged with its neighbours, joined at the finest resolution: (B, C, h, w)."""
        averaged = [F.avg_pool2d(features, kernel_size=3, stride=1, padding=1) for features in maps]
        return torch.cat([averaged[0], *(resize_map(features, self.grid) for features in averaged[1:])], dim=1)

    def kappa(self, described: Tensor, centres: Tensor | None = None) -> Tensor:
        """What scales the squared distances of each image, (B,): `kl_factor`, or 1.

        Here and below, centres may be those of one tile; None: all.
        """
        if not self.config.kl_weight:
            return described.new_ones(described.shape[0])
        return kl_factor(described, self.centres if centres is None else centres)

    def soft_distances(
        self,
        settings: SoftTopKSettings,
        described: Tensor,
        kappa: Tensor,
        *,
        together: bool,
        vectors: Tensor | None = None,
        shard: Shard = WHOLE,
    ) -> Tensor:
        """The squared scores (B, T): kappa times the softly weighted sum of squared distances to the centres.

        `together`, as in training, the images share one temperature (`batch_max`), and gradients are taken row by row;
        else each image is by itself.
        """
        centres = Centres(self.centres if vectors is None else vectors)
        rows = rearrange(described, "b t d -> (b t) d")
        softness = torch.full_like(kappa, settings.eps)
        if settings.normalize == "batch_max":
            softness = published_softness(settings.eps, rows, centres, kappa, together=together, shard=shard)
        per_row = repeat(softness, "b -> (b t) 1", t=described.shape[1])
        function = soft_distance(settings, centres)
        if together:
            distance = RowByRow.apply(rows, per_row, function, centres)
        else:
            distance = torch.cat([function(*chunk) for chunk in centres.chunks(rows, per_row)])
        return rearrange(kappa, "b -> b 1") * rearrange(distance, "(b t) -> b t", t=described.shape[1])

    def nearest(self, described: Tensor, kappa: Tensor, number: int, vectors: Tensor | None = None) -> Tensor:
        """Kappa times the squared distances (B, T, number) to the nearest centres, ascending."""
        vectors = self.centres if vectors is None else vectors
        centres = Centres(vectors)
        rows = rearrange(described, "b t d -> (b t) d")
        with torch.no_grad():
            found = [
                centres(chunk, None).topk(number, dim=1, largest=False).indices for (chunk,) in centres.chunks(rows)
            ]
        index = rearrange(torch.cat(found), "(b t) n -> b t n", t=described.shape[1])
        difference = rearrange(described, "b t d -> b t 1 d") - vectors[index]
        return rearrange(kappa, "b -> b 1 1") * difference.square().sum(3)


def _check_neighbours(config: ADFAConfig, num_centres: int) -> None:
    """ModelError if a position is to be compared with more centres than there are."""
    match objective := config.objective:
        case SoftTopKSettings(candidates=None):
            name, number = "k", objective.k + 1  # the operator needs something not to select
        case SoftTopKSettings():
            name, number = "candidates", objective.candidates or 0
        case HypersphereSettings():
            name, number = "attracted + repelled", objective.attracted + objective.repelled
    if number > num_centres:
        where = {"positions": "one per position; lower it", "coreset": "centres.number; lower it, or raise the number"}
        raise ModelError(f"{name} ask for {number} centres, and there are {num_centres}, {where[config.centres.name]}")
