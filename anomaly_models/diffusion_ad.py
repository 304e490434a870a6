"""DiffusionAD: a part is noised, denoised in one step, and compared with the result by a segmentation network.

Zhang, Wang, Yang, Wu, Jiang, "DiffusionAD: Norm-guided One-step Denoising Diffusion for Anomaly Detection", IEEE TPAMI
2025, arXiv 2303.08730 (v3 and v4), and the authors' code.

Each normal image gets a synthetic defect with probability 1/2 (`common.synthesis`), is noised at a small and at a big
scale, and denoised at both by one U-Net in one step. The big-scale reconstruction is normal but blurred, the
small-scale one sharp but keeps the defect: their blend is what the image would look like without it. The segmentation
network sees the image beside the blend. Both networks learn together.

Different from the authors' code, deliberately:
- The guidance of the small scale by the big one is in closed form, a convex blend: the same numbers, fewer operations.
- All randomness is a function of (seed, step), and inference uses one stored draw of noise; the authors' augmentation
  library repeats the same few draws in every epoch, and their scores change from run to run.
- Training ends after `steps`, and the last weights, or their moving average, are the model. The authors keep the
  checkpoint that is best on the test set.
- `schedule: cosine` warms both rates up and lets them fall along half a cosine. `paper` holds the U-Net's constant and
  swings the segmentation network's between its value and 0 every 20 steps.
- `big_steps_end` bounds the big scale in training. The paper's 1000 draws steps whose reconstruction is all noise.
- Pictures are resized with antialiasing, as for all models; the authors resize without, which leaves more grain. On
  photos four times as large as their input this is a fifth of the pictures' spread (rms), and up to 0.4 of the range.
- An epoch takes every image once; the authors draw with replacement. Steps are counted, not epochs.
- `reconstruction_weight` adds a term that pulls the blend towards the image before its defect. 0 in the paper.
- Gradients may be clipped, network by network.
- The U-Net may work on a smaller picture (`unet.image_size`), whose reconstruction is enlarged again.
- Narrow networks have fewer groups in their group normalisation: four channels or more in each, as at full width.

The small presets, whose U-Net sees 32 pixels, depart further. `noise_scale: 1`, `predicts: {name: noise}`,
`denoises: normal` and `timesteps: random` are the published way:
- Less noise. The paper's is added at 256 pixels, where at t = 200 it is 0.72 of the signal; averages of 8 x 8 pixels
  leave 0.09 of it. Added after the reduction it stays 0.72, eight times more than the method means, and hides what
  the network should have seen. `noise_scale: unet.image_size / 256` is what the reduction would have left (the shifted
  schedule of Hoogeboom et al., *simple diffusion*, 2023). The weights of the blend stay those of the steps.
- The image is predicted, not the noise, and not from nothing: a Wiener filter learnt from the training images
  (`common.wiener`) says at once most of what a part looks like under that noise, and the U-Net learns the rest, in the
  form of EDM (Karras et al., *Elucidating the design space of diffusion-based generative models*, 2022). So a training
  of minutes is enough, and the reconstruction has the full size. Of parts at any angle the filter knows less.
- The loss asks for the image before its defect, of every image: eq. 9 takes images without a defect only, which are
  one in three where the others are drawn with probability 0.7.
- Training is at the two steps of inference: none is spent on those that are not used.

Cost of scoring one 256 px image, two passes of the U-Net and one of the segmentation (a multiplication and an addition
are 2 FLOP); a training step takes three times as much per image:

    unet.width  unet.image_size  segmentation_width  parameters, M  GFLOP
    128         256              64                  131.7 + 28.4    1202   the paper
    64          256              32                   33.0 +  7.1     304   half the width
    128         128              64                  127.7 + 28.4     371   half the size for the U-Net
    64          128              32                   32.0 +  7.1      96   both
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import accumulate, chain, pairwise
from operator import mul
from typing import Annotated, Literal, NamedTuple, Protocol, Self, cast

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
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.checkpoint import checkpoint

from anomaly_models.base import AnomalyModel, Batch, Config, ModelError, Prediction, Progress, Wants
from anomaly_models.common.randomness import generator_on
from anomaly_models.common.scoring import mean_of_highest, resize_map, size_of, within
from anomaly_models.common.settings import Settings, Sides
from anomaly_models.common.shards import WHOLE, BatchNorm2d, Shard, Share, share_batch_norms
from anomaly_models.common.sizes import Size
from anomaly_models.common.synthesis import SynthesisConfig, Synthesised, synthesise
from anomaly_models.common.wiener import (
    MOST_IMAGES,
    EvenSample,
    Filtered,
    FixedWienerFilter,
    WienerFilter,
    reduced,
)

NUM_STEPS = 1000  # of the diffusion
FIRST_BETA, LAST_BETA = 1e-4, 0.02  # variance of the noise that the first and the last step add
SMALL_STEPS_END = 300  # the small scale is drawn below this step, the big one from it on
FOCAL_WEIGHT = 5.0
FOCAL_GAMMA, FOCAL_ALPHA = 4, 0.5
SEGMENTATION_MULTIPLIERS = (1, 2, 4, 8, 8, 8)  # of the encoder, finest level first
STEPS_PER_HALF_CYCLE = 10  # of the authors' rate of the segmentation network
WARMUP = 0.05  # share of the training steps
NOISE_SEED = 0  # of the noise that inference uses
LEAST_NOISE_SCALE = 1e-3
LEAST_RESIDUAL = 1 / 255  # deviation of what the filter leaves of an image: a grey level, where all images are equal
MAX_GROUPS, MIN_CHANNELS_PER_GROUP = 32, 4

Rate = Callable[[int], float]  # training step to the factor of a learning rate


class UNetConfig(Settings):
    """The paper: the image's size, width 128, multipliers 1 1 2 2 4 4, 2 blocks, attention at 32 16 8, 4 heads."""

    image_size: Sides  # of what is denoised, pixels: the model's image_size, or a power of two less
    width: Annotated[int, Field(gt=0, multiple_of=MIN_CHANNELS_PER_GROUP)]  # channels of the finest level
    multipliers: Annotated[tuple[PositiveInt, ...], Field(strict=False, min_length=1)]  # of the width, level by level
    blocks: PositiveInt  # per level on the way down; one more on the way up
    attention_sizes: Annotated[tuple[PositiveInt, ...], Field(strict=False)]  # longer sides of levels with attention
    heads: PositiveInt  # of each attention
    recomputed_levels: NonNegativeInt  # finest levels computed again for the gradient: slower, and less memory

    @property
    def widths(self) -> list[int]:
        """Channels of the levels, the finest first."""
        return [self.width * multiplier for multiplier in self.multipliers]

    @property
    def embedding(self) -> int:
        """Numbers that a step is embedded in."""
        return 4 * self.width

    @property
    def sides(self) -> list[int]:
        """The longer one of each level, pixels, the finest first."""
        return [max(self.image_size) >> level for level in range(len(self.multipliers))]

    @model_validator(mode="after")
    def _levels_exist(self) -> Self:
        coarsest = 2 ** (len(self.multipliers) - 1)
        if any(side % coarsest for side in self.image_size):
            raise ValueError(
                f"{len(self.multipliers)} multipliers halve the image {len(self.multipliers) - 1} times: image_size "
                f"must be a multiple of {coarsest}, found {self.image_size}"
            )
        unknown = [size for size in self.attention_sizes if size not in self.sides]
        if unknown:
            raise ValueError(f"attention_sizes must be sides of levels, {self.sides}; found {unknown}")
        attending = [self.widths[self.sides.index(size)] for size in self.attention_sizes]
        for channels in [*attending, self.widths[-1]]:  # the middle always attends
            if channels % self.heads:
                raise ValueError(f"heads must divide the {channels} channels of a level; found {self.heads}")
        return self


class NoisePrediction(Settings):
    """The U-Net predicts the noise, as published."""

    name: Literal["noise"]


class ImagePrediction(Settings):
    """It predicts what is left between the image and the Wiener filter of the training images."""

    name: Literal["image"]
    components: PositiveInt  # principal directions of the training images that the filter knows, at most
    folds: Annotated[int, Field(ge=2)]  # of them; in training an image's filter is that of the other folds


class DiffusionADConfig(Config):
    """The paper: 256 px, batch 16, 3000 epochs of N // 16 steps, 1e-4, 1e-5, paper, 1000, 200, 400, 50, no average.

    It predicts the noise, at scale 1, of normal images, in training at random timesteps.
    """

    unet: UNetConfig
    segmentation_width: PositiveInt  # channels of the finest level; 64 in the paper
    synthesis: SynthesisConfig
    steps: PositiveInt
    learning_rate: PositiveFloat  # of the U-Net
    segmentation_learning_rate: PositiveFloat
    schedule: Literal["cosine", "paper"]
    noise_scale: Annotated[float, Field(ge=LEAST_NOISE_SCALE)]  # factor of all noise; the paper's is 1, at 256 px
    predicts: Annotated[NoisePrediction | ImagePrediction, Field(discriminator="name")]
    denoises: Literal["normal", "all"]  # whose error the U-Net's own loss counts: images without a defect, or all
    timesteps: Literal["random", "inference"]  # of training: of each scale a random one, or the one of inference
    big_steps_end: Annotated[int, Field(gt=SMALL_STEPS_END, le=NUM_STEPS)]  # a random one of the big scale is below it
    reconstruction_weight: NonNegativeFloat
    gradient_clip: PositiveFloat | None  # largest norm of a network's gradient
    ema_decay: Annotated[float, Field(ge=0, lt=1)]  # of the average that the trained model uses; 0: the last weights
    precision: Literal["float32", "bf16"]  # of both networks in training; a trained model always runs in float32
    small_step: Annotated[int, Field(ge=0, lt=SMALL_STEPS_END)]  # of inference
    big_step: Annotated[int, Field(ge=SMALL_STEPS_END, lt=NUM_STEPS)]
    top_pixels: PositiveInt  # the score is their mean; the paper's 50 at 256 px are 12 at 128 px, 3 at 64 px

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        halvings = 2 ** (len(SEGMENTATION_MULTIPLIERS) - 1)
        if any(side % halvings for side in self.image_size):
            raise ModelError(f"image_size must be a multiple of {halvings} for DiffusionAD; found {self.image_size}")
        factor = self.image_size.height // self.unet.image_size.height
        if Size(*(factor * side for side in self.unet.image_size)) != self.image_size or factor & (factor - 1):
            raise ModelError(
                f"unet.image_size must be image_size {self.image_size}, or it halved some times; "
                f"found {self.unet.image_size}"
            )
        if self.top_pixels > self.image_size.area:
            raise ModelError(f"top_pixels must be at most the {self.image_size.area} pixels; found {self.top_pixels}")
        return self

    @property
    def scored_pixels(self) -> int:
        return self.top_pixels

    @property
    def wants(self) -> Wants:
        return Wants(textures=True, foreground=True, synthesis=self.synthesis)


# --- diffusion -------------------------------------------------------------------------------------------------------


@cache
def signal_shares() -> tuple[float, ...]:
    """Abar_t of every step: the share of the variance that is still the image's."""
    growth = (LAST_BETA - FIRST_BETA) / (NUM_STEPS - 1)
    return tuple(accumulate((1 - FIRST_BETA - growth * step for step in range(NUM_STEPS)), mul))


class Scale(NamedTuple):
    """One of the two noise levels, for each image: x_t = signal * x + deviation * noise."""

    step: Tensor  # t, (B,) int64
    signal: Tensor | float  # sqrt(abar_t); a tensor is (B, 1, 1, 1)
    sigma: Tensor | float  # sqrt(1 - abar_t), alike
    noise: Tensor  # (B, 3, H, W), or (1, 3, H, W) for all, of mean 0 and variance 1
    noise_scale: float

    def of(self, share: Share) -> "Scale":
        """Of one process, where all of it is drawn for each image."""
        step, signal, sigma, noise = (
            share.of(drawn) if isinstance(drawn, Tensor) else drawn
            for drawn in (self.step, self.signal, self.sigma, self.noise)
        )
        return Scale(cast(Tensor, step), signal, sigma, cast(Tensor, noise), self.noise_scale)

    @property
    def deviation(self) -> Tensor | float:
        """Of the noise in x_t; the paper's is sigma."""
        return self.sigma * self.noise_scale

    def noised(self, image: Tensor) -> Tensor:
        return self.signal * image + self.deviation * self.noise

    def denoised(self, noisy: Tensor, noise: Tensor) -> Tensor:
        """The image in one step, were `noise` what `noisy` contains; D(x_t, t, e)."""
        return (noisy - self.deviation * noise) / self.signal


class Noisy(Protocol):
    """Images at one scale, as the U-Net sees them, and how to read its answer."""

    @property
    def scale(self) -> Scale: ...

    @property
    def input(self) -> Tensor:
        """(B, 3, h, w)."""

    def image(self, output: Tensor) -> Tensor:
        """The reconstruction (B, 3, H, W) that the U-Net's `output` (B, 3, h, w) stands for."""

    def target(self, clean: Tensor) -> Tensor:
        """The output whose reconstruction, reduced, is `clean` (B, 3, H, W)."""


class NoisyImage(NamedTuple):
    """Noise prediction, as published: x_t as it is; the answer is the noise in it."""

    original: Tensor  # (B, 3, h, w)
    input: Tensor  # x_t
    scale: Scale

    def image(self, output: Tensor) -> Tensor:
        return self.scale.denoised(self.input, output)

    def target(self, clean: Tensor) -> Tensor:
        """The noise and, of an image with a defect, all else that leads from x_t to the image before."""
        defect = self.original - reduced(clean, size_of(self.original))
        return self.scale.noise + self.scale.signal * defect / self.scale.deviation


class PreconditionedImage(NamedTuple):
    """Image prediction: x0 = W(x_t) + c_skip r + c_out F(c_in (x_t - signal * mean), t).

    EDM's form (Karras et al. 2022, Sec. 5), whose c_skip x_t is the Wiener filter of images with one variance in all
    directions. Here the training images' principal directions have their own, and W filters along them; r, the rest of
    x_t across them, has the variance that the filter leaves of images it has not seen (probabilistic PCA).
    """

    input: Tensor  # (B, 3, h, w)
    filtered: Tensor  # (B, 3, H, W), W
    skipped: Tensor  # (B, 3, h, w), c_skip r
    c_out: Tensor  # a scalar, or (B, 1, 1, 1)
    scale: Scale

    def image(self, output: Tensor) -> Tensor:
        return self.filtered + enlarged(self.skipped + self.c_out * output, size_of(self.filtered))

    def target(self, clean: Tensor) -> Tensor:
        return (reduced(clean - self.filtered, size_of(self.input)) - self.skipped) / self.c_out


def noisy_image(image: Tensor, scale: Scale) -> NoisyImage:
    return NoisyImage(image, scale.noised(image), scale)


def preconditioned(filtered: Filtered, scale: Scale, residual: Tensor) -> PreconditionedImage:
    """EDM's factors, were the images' deviation that of what the filter leaves, the scalar `residual`.

    They make the U-Net's targets of variance 1, whatever the scale.
    """
    c_in = (scale.signal * scale.signal * residual.square() + scale.deviation * scale.deviation).rsqrt()
    c_skip, c_out = scale.signal * (residual * c_in) ** 2, scale.deviation * residual * c_in
    return PreconditionedImage(c_in * filtered.centred, filtered.image, c_skip * filtered.across, c_out, scale)


class Denoised(NamedTuple):
    small_output: Tensor  # (B, 3, h, w), of the U-Net
    big_output: Tensor  # alike
    image: Tensor  # (B, 3, H, W), in [-1, 1] as in the authors' code, though images are in [0, 1]


def guided(small: Tensor, big: Tensor, sigma: Tensor | float) -> Tensor:
    """Blend one-step reconstructions, neither of them clamped, by the small scale's `sigma`.

    This is norm-guided denoising (paper, Sec. 3.3) at guidance weight 1: the guide, noised with the small scale's
    predicted noise, shifts that noise by sigma times its distance to x_t; denoised with the shifted noise, x_t gives
    this blend.
    """
    weight = sigma * sigma
    return ((1 - weight) * small + weight * big.clamp(-1, 1)).clamp(-1, 1)


def denoise(unet: "UNet", small: Noisy, big: Noisy) -> Denoised:
    """Reconstruct images that were noised at both scales, with one call of the U-Net."""
    noisy, steps = torch.cat([small.input, big.input]), torch.cat([small.scale.step, big.scale.step])
    outputs = rearrange(unet(noisy, steps).float(), "(s b) c h w -> s b c h w", s=2)
    small_output, big_output = outputs.unbind()
    reconstruction = guided(small.image(small_output), big.image(big_output), sigma=small.scale.sigma)
    return Denoised(small_output, big_output, reconstruction)


def enlarged(image: Tensor, size: Size) -> Tensor:
    """Pictures (B, 3, h, w) as (B, 3, H, W)."""
    return image if size_of(image) == size else resize_map(image, size)


# --- denoising U-Net -------------------------------------------------------------------------------------------------


def channels_last(image: Tensor) -> Tensor:
    """The same, as the networks lay their features out: on one CPU thread a step takes 10 to 30 % less time."""
    return image.contiguous(memory_format=torch.channels_last)


class GroupNorm(nn.GroupNorm):
    """Computed in float32 whatever the precision."""

    def __init__(self, channels: int) -> None:
        super().__init__(math.gcd(MAX_GROUPS, channels // MIN_CHANNELS_PER_GROUP), channels)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type_as(x)


def zeroed(convolution: nn.Conv2d) -> nn.Conv2d:
    """Each residual branch starts as zero, and so does the whole network."""
    for parameter in convolution.parameters():
        nn.init.zeros_(parameter)
    return convolution


class TimeEmbedding(nn.Module):
    """Diffusion steps (N,) to what the residual blocks shift their features by, (N, 4 * width)."""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.register_buffer("frequencies", 10_000 ** (-torch.arange(half) / half), persistent=False)
        self.layers = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))

    def forward(self, step: Tensor) -> Tensor:
        angle = rearrange(step, "n -> n 1").float() * self.frequencies
        return F.silu(self.layers(torch.cat([angle.sin(), angle.cos()], dim=1)))


def _same(x: Tensor) -> Tensor:
    return x


def _halved(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


class ResidualBlock(nn.Module):
    """(N, inputs, H, W) and the embedding (N, E) to (N, outputs, H', W'), resampled on both branches."""

    def __init__(self, inputs: int, outputs: int, embedding: int, resample: Callable[[Tensor], Tensor] = _same) -> None:
        super().__init__()
        self.resample = resample
        self.norm1 = GroupNorm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.shift: nn.Module = nn.Linear(embedding, outputs)
        self.norm2 = GroupNorm(outputs)
        self.conv2 = zeroed(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        features = self.conv1(self.resample(F.silu(self.norm1(x))))
        features = features + self.shift(embedding)[..., None, None]
        return self.skip(self.resample(x)) + self.conv2(F.silu(self.norm2(features)))


class Attention(nn.Module):
    """Self-attention over the positions of a map, added to it."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = GroupNorm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)  # by head, and within a head query, key, value
        self.output = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        parts = rearrange(self.qkv(self.norm(x)), "n (heads p d) h w -> p n heads (h w) d", heads=self.heads, p=3)
        query, key, value = parts.unbind()
        attended = F.scaled_dot_product_attention(query, key, value)
        return x + self.output(rearrange(attended, "n heads (h w) d -> n (heads d) h w", h=x.shape[2]))


class Stage(nn.Module):
    """A residual block, attention where the level has it, and what leads to the next level up if this is the last."""

    def __init__(
        self,
        block: ResidualBlock,
        attention: Attention | None = None,
        upsampling: ResidualBlock | None = None,
        *,
        recomputed: bool = False,
    ) -> None:
        super().__init__()
        self.block = block
        self.attention = attention
        self.upsampling = upsampling
        self.recomputed = recomputed

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        if self.recomputed and torch.is_grad_enabled():
            recomputed: Tensor = checkpoint(self._run, x, embedding, use_reentrant=False, preserve_rng_state=False)
            return recomputed
        return self._run(x, embedding)

    def _run(self, x: Tensor, embedding: Tensor) -> Tensor:
        x = self.block(x, embedding)
        if self.attention is not None:
            x = self.attention(x)
        if self.upsampling is not None:
            x = self.upsampling(x, embedding)
        return x


def _attention(config: UNetConfig, level: int) -> Attention | None:
    if config.sides[level] not in config.attention_sizes:
        return None
    return Attention(config.widths[level], config.heads)


def descent(config: UNetConfig) -> tuple[nn.ModuleList, list[int]]:
    """The stages on the way down, and the channels that each of them, and the first convolution, leaves behind."""
    stages, skips = nn.ModuleList(), [config.width]
    for level, width in enumerate(config.widths):
        recomputed = level < config.recomputed_levels
        for _ in range(config.blocks):
            block = ResidualBlock(skips[-1], width, config.embedding)
            stages.append(Stage(block, _attention(config, level), recomputed=recomputed))
            skips.append(width)
        if level < len(config.widths) - 1:
            halving = ResidualBlock(width, width, config.embedding, _halved)
            stages.append(Stage(halving, recomputed=recomputed))
            skips.append(width)
    return stages, skips


def ascent(config: UNetConfig, skips: list[int]) -> nn.ModuleList:
    """The stages on the way up; each takes what the latest unused stage of the descent has left behind."""
    stages, channels, unused = nn.ModuleList(), skips[-1], list(skips)
    for level, width in reversed(list(enumerate(config.widths))):
        for index in range(config.blocks + 1):
            block = ResidualBlock(channels + unused.pop(), width, config.embedding)
            leaves = index == config.blocks and level > 0
            doubling = ResidualBlock(width, width, config.embedding, _doubled) if leaves else None
            recomputed = level < config.recomputed_levels
            stages.append(Stage(block, _attention(config, level), doubling, recomputed=recomputed))
            channels = width
    return stages


class UNet(nn.Module):
    """What is asked of noisy images: (N, 3, H, W) and their steps (N,) to (N, 3, H, W). Zero until it is trained."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        bottom = config.widths[-1]
        self.time: nn.Module = TimeEmbedding(config.width)
        self.input = nn.Conv2d(3, config.width, 3, padding=1)
        self.down, skips = descent(config)
        self.middle = nn.ModuleList(
            [
                Stage(ResidualBlock(bottom, bottom, config.embedding), Attention(bottom, config.heads)),
                Stage(ResidualBlock(bottom, bottom, config.embedding)),
            ]
        )
        self.up = ascent(config, skips)
        output = zeroed(nn.Conv2d(config.width, 3, 3, padding=1))
        self.output = nn.Sequential(GroupNorm(config.width), nn.SiLU(), output)

    def forward(self, noisy: Tensor, step: Tensor) -> Tensor:
        embedding = self.time(step)
        x = self.input(channels_last(noisy))
        skips = [x]
        for stage in self.down:
            x = stage(x, embedding)
            skips.append(x)
        for stage in self.middle:
            x = stage(x, embedding)
        for stage in self.up:
            x = stage(torch.cat([x, skips.pop()], dim=1), embedding)
        return self.output(x)


# --- segmentation ----------------------------------------------------------------------------------------------------


def normalised_convolution(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1), BatchNorm2d(outputs), nn.ReLU(inplace=True)]


def double_convolution(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(*normalised_convolution(inputs, outputs), *normalised_convolution(outputs, outputs))


class SegmentationNet(nn.Module):
    """Images and their reconstructions (B, 6, H, W) to logits of an anomaly (B, 1, H, W)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = [width * multiplier for multiplier in SEGMENTATION_MULTIPLIERS]
        self.encoder = nn.ModuleList(double_convolution(before, after) for before, after in pairwise([6, *widths]))
        self.enlarging, self.decoder = nn.ModuleList(), nn.ModuleList()
        before = widths[-1]
        skips, afters = reversed(widths[:-1]), [*reversed(widths[:-2]), width]
        for skip, after in zip(skips, afters, strict=True):
            self.enlarging.append(nn.Sequential(*normalised_convolution(before, after)))
            self.decoder.append(double_convolution(after + skip, after))
            before = after
        self.output = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, image: Tensor, reconstruction: Tensor) -> Tensor:
        x = channels_last(torch.cat([image, reconstruction], dim=1))
        skips: list[Tensor] = []
        for level, block in enumerate(self.encoder):
            x = block(F.max_pool2d(x, 2) if level else x)
            skips.append(x)
        skips.pop()
        for enlarging, block in zip(self.enlarging, self.decoder, strict=True):
            doubled = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
            x = block(torch.cat([enlarging(doubled), skips.pop()], dim=1))
        return self.output(x)


# --- losses, learning rates, average ---------------------------------------------------------------------------------


def denoising_loss(target: Tensor, output: Tensor, left_out: Tensor, shard: Shard = WHOLE) -> Tensor:
    """Mean squared error of the U-Net (B, 3, H, W) over the images that are not `left_out` (B,); 0 if all are.

    The paper's eq. 9 leaves out those with a defect: what a defect looks like under noise is not to be learnt.
    """
    counted = (~left_out).float()
    errors = (target - output).square().mean(dim=(1, 2, 3))
    return (errors * counted).sum() / shard.total(counted.sum()).clamp(min=1)


def focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Lin et al. 2017, with gamma 4 and the same alpha, 1/2, for both classes; targets (B, 1, H, W) may be soft."""
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (FOCAL_ALPHA * (-torch.expm1(-entropy)) ** FOCAL_GAMMA * entropy).mean()


def reconstruction_loss(reconstruction: Tensor, image: Tensor, corrupted: Tensor, shard: Shard = WHOLE) -> Tensor:
    """Mean absolute difference to the images before their defects, over those that are `corrupted`; 0 if none is."""
    errors = (reconstruction - image).abs().mean(dim=(1, 2, 3))
    return (errors * corrupted).sum() / shard.total(corrupted.sum()).clamp(min=1)


def constant(step: int) -> float:  # noqa: ARG001
    return 1.0


def swinging(step: int) -> float:
    """The authors' cosine schedule, stepped every iteration: from 1 to 0 and back in 20 steps."""
    return (1 + math.cos(math.pi * step / STEPS_PER_HALF_CYCLE)) / 2


def warm_up_and_fall(total_steps: int) -> Rate:
    """Rise linearly over the first twentieth of the steps, times half a cosine over all of them."""
    warmup = max(1, round(WARMUP * total_steps))

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * (1 + math.cos(math.pi * step / total_steps)) / 2

    return rate


def clip_gradients(max_norm: float) -> Callable[[Optimizer, object, object], None]:
    """What an optimiser does before its step: scale down the gradient of each parameter group that is too long."""

    def clip(optimizer: Optimizer, args: object, kwargs: object) -> None:  # noqa: ARG001
        for group in optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], max_norm)

    return clip


class Networks(nn.Module):
    """All that is trained."""

    def __init__(self, config: DiffusionADConfig) -> None:
        super().__init__()
        self.unet = UNet(config.unet)
        self.segmentation = SegmentationNet(config.segmentation_width)


def untrained_copy(networks: Networks) -> Networks:
    """A copy whose parameters are buffers: part of the model's state, and nothing that an optimiser may move."""
    copied = copy.deepcopy(networks)
    for module in copied.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.detach())
    return copied


@torch.no_grad()
def average(averaged: Networks, networks: Networks, decay: float) -> None:
    """Move `averaged` towards `networks`, the batch normalisation's statistics included."""
    own: list[Tensor] = []
    values: list[Tensor] = []
    for module, source in zip(averaged.modules(), networks.modules(), strict=True):
        for name, value in chain(source._parameters.items(), source._buffers.items()):
            held = module._buffers[name]
            if value is None or held is None or name in source._non_persistent_buffers_set:
                continue
            if value.is_floating_point():
                own.append(held)
                values.append(value)
            else:
                held.copy_(value)
    torch._foreach_lerp_(own, values, 1 - decay)


# --- image prediction ------------------------------------------------------------------------------------------------


class Preconditioner(nn.Module):
    """The Wiener filter of the training images, and how far from an image that it has not seen its guess is."""

    residual: Tensor  # scalar, root mean square at the small scale of inference

    def __init__(self, image_size: Size, seen: Size) -> None:
        super().__init__()
        self.filter = WienerFilter(image_size, seen)
        self.register_buffer("residual", torch.ones(()))

    def fit(self, normals: Iterable[Batch], settings: ImagePrediction, signal: float, deviation: float) -> None:
        """Learn from normal images; `signal` and `deviation` are those of the scale that `residual` is taken at.

        Raises:
            ModelError: there is no image.
        """
        images, rows = spread(normals)
        self.filter.fit(images, rows, settings.components, settings.folds)
        squared = self.filter.squared_error(images, rows, signal, deviation)
        self.residual.copy_(squared.sqrt().clamp(min=LEAST_RESIDUAL))

    def forward(self, image: Tensor, scale: Scale, row: Tensor | None = None) -> PreconditionedImage:
        """Images (B, 3, h, w) at one scale; with their `row` in the data set, by the filter they are no part of."""
        which = None if row is None else self.filter.filters_of(row)
        filtered: Filtered = self.filter(scale.noised(image), scale.signal, scale.deviation, which)
        return preconditioned(filtered, scale, self.residual)


def spread(normals: Iterable[Batch]) -> tuple[Tensor, Tensor | None]:
    """At most `MOST_IMAGES` of the images (N, 3, H, W), evenly spaced, and their rows. Raises ModelError if none is."""
    sample = EvenSample(MOST_IMAGES)
    for batch in normals:
        sample.add(batch.image, batch.row)
    if sample.count == 0:
        raise ModelError("DiffusionAD has no normal image to learn from")
    return sample.images, sample.rows


class FoldedPreconditioner(nn.Module):
    """The same for the two fixed scales of inference: all that does not depend on the image is stored."""

    residual: Tensor

    def __init__(self, preconditioner: Preconditioner, scales: tuple[Scale, Scale]) -> None:
        super().__init__()
        levels = [(float(scale.signal), float(scale.deviation), scale.noise) for scale in scales]
        self.filter = FixedWienerFilter(preconditioner.filter, levels)
        self.register_buffer("residual", preconditioner.residual.clone())

    def forward(self, image: Tensor, scales: tuple[Scale, Scale]) -> list[PreconditionedImage]:
        guesses = zip(self.filter(image), scales, strict=True)
        return [preconditioned(filtered, scale, self.residual) for filtered, scale in guesses]


# --- inference -------------------------------------------------------------------------------------------------------


def segment(network: SegmentationNet, image: Tensor, reconstruction: Tensor) -> Tensor:
    """Logits (B, 1, H, W) from an image and its reconstruction, which may be smaller."""
    return network(image, enlarged(reconstruction, size_of(image))).float()


def fixed_scales(config: DiffusionADConfig, noise: Tensor, batch: int) -> tuple[Scale, Scale]:
    """The small and the big scale of inference, with `noise` (2, 1, 3, h, w) that is the same for all images."""

    def scale(step: int, noise: Tensor) -> Scale:
        share = signal_shares()[step]
        steps = torch.full((batch,), step, dtype=torch.long, device=noise.device)
        return Scale(steps, math.sqrt(share), math.sqrt(1 - share), noise, config.noise_scale)

    return scale(config.small_step, noise[0]), scale(config.big_step, noise[1])


def detect(
    networks: Networks, small: Noisy, big: Noisy, image: Tensor, top_pixels: int, region: Tensor | None
) -> Prediction:
    """Score images (B, 3, H, W), given how the U-Net sees them at both scales."""
    denoised = denoise(networks.unet, small, big)
    anomaly_map = segment(networks.segmentation, image, denoised.image).sigmoid()
    return Prediction(within(anomaly_map, region), mean_of_highest(anomaly_map, top_pixels, region))


class StoredShift(nn.Module):
    """In the place of a residual block's own shift, which at fixed steps does not depend on the image."""

    shift: Tensor  # (2, C), of the small and of the big scale

    def __init__(self, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("shift", shift)

    def forward(self, embedding: Tensor) -> Tensor:
        # Not einops: it would fix the size of the batch in the exported graph.
        return self.shift.unsqueeze(1).expand(-1, embedding.shape[0] // 2, -1).flatten(0, 1)


class FoldedDiffusionAD(nn.Module):
    """A trained DiffusionAD with its constants folded (exact up to rounding).

    The U-Net has a stored shift per block in the place of the embedding of the steps, the segmentation's convolutions
    hold their batch normalisation, and the filter, if there is one, knows its noise and its reduced directions.
    """

    noise: Tensor

    def __init__(self, model: "DiffusionAD") -> None:
        super().__init__()
        self.config = model.config
        self.networks = copy.deepcopy(model.deployed).eval()
        steps = torch.tensor([model.config.small_step, model.config.big_step], device=model.noise.device)
        fix_steps(self.networks.unet, steps)
        fold_batch_norms(self.networks.segmentation)
        self.register_buffer("noise", model.noise.clone())
        self.preconditioner = None
        if model.preconditioner is not None:
            self.preconditioner = FoldedPreconditioner(
                model.preconditioner, fixed_scales(self.config, model.noise, batch=1)
            )

    def forward(self, image: Tensor, region: Tensor | None = None) -> Prediction:
        seen = reduced(image, self.config.unet.image_size)
        scales = fixed_scales(self.config, self.noise, image.shape[0])
        small, big = (
            [noisy_image(seen, scale) for scale in scales]
            if self.preconditioner is None
            else self.preconditioner(seen, scales)
        )
        return detect(self.networks, small, big, image, self.config.top_pixels, region)


@torch.no_grad()
def fix_steps(unet: UNet, steps: Tensor) -> None:
    """Store what the residual blocks make of two steps (2,); from then on the first half of a batch is at the first."""
    embedding = unet.time(steps)
    for block in unet.modules():
        if isinstance(block, ResidualBlock):
            block.shift = StoredShift(block.shift(embedding))
    unet.time = nn.Identity()


def fold_batch_norms(network: SegmentationNet) -> None:
    """Put the batch normalisations, in eval mode, into the convolutions before them."""
    for layers in network.modules():
        if not isinstance(layers, nn.Sequential):
            continue
        for index, (before, after) in enumerate(pairwise(list(layers))):
            if isinstance(before, nn.Conv2d) and isinstance(after, BatchNorm2d):
                layers[index], layers[index + 1] = fuse_conv_bn_eval(before, after), nn.Identity()


# --- the model -------------------------------------------------------------------------------------------------------


class DiffusionAD(AnomalyModel):
    """The two networks, the moving average of their states, the filter if either there is, and inference's noise."""

    Config = DiffusionADConfig
    learns_in_shares = True

    noise: Tensor
    signal_shares: Tensor

    def __init__(self, config: DiffusionADConfig) -> None:
        super().__init__()
        self.config = config
        self.networks = Networks(config)
        self.averaged = untrained_copy(self.networks) if config.ema_decay > 0 else None
        seen = config.unet.image_size
        predicts_image = config.predicts.name == "image"
        self.preconditioner = Preconditioner(config.image_size, seen) if predicts_image else None
        noise = torch.randn(2, 1, 3, *seen, generator=torch.Generator().manual_seed(NOISE_SEED), device="cpu")
        self.register_buffer("noise", noise.to(torch.get_default_device()))  # of the small and of the big scale
        shares = torch.tensor(signal_shares(), dtype=torch.float64)
        self.register_buffer("signal_shares", shares, persistent=False)

    @property
    def deployed(self) -> Networks:
        """What scores images: the average if there is one."""
        return self.networks if self.averaged is None else self.averaged

    @torch.no_grad()
    def prepare(self, normals: Iterable[Batch]) -> None:
        """Learn the filter, if there is one. Raises ModelError without images."""
        if self.preconditioner is None or self.config.predicts.name == "noise":
            return
        small, _ = fixed_scales(self.config, self.noise, batch=1)
        self.preconditioner.fit(normals, self.config.predicts, float(small.signal), float(small.deviation))

    def total_steps(self, num_normals: int) -> int:  # noqa: ARG002
        return self.config.steps

    def optimizer(self, total_steps: int) -> tuple[Optimizer, LRScheduler]:
        """Adam, with a rate for each network that changes as `schedule` says."""
        optimizer = torch.optim.Adam(
            [
                {"params": list(self.networks.unet.parameters()), "lr": self.config.learning_rate},
                {"params": list(self.networks.segmentation.parameters()), "lr": self.config.segmentation_learning_rate},
            ],
            fused=True,
        )
        if self.config.gradient_clip is not None:
            optimizer.register_step_pre_hook(clip_gradients(self.config.gradient_clip))
        falling = warm_up_and_fall(total_steps)
        rates: list[Rate] = [constant, swinging] if self.config.schedule == "paper" else [falling, falling]
        return optimizer, LambdaLR(optimizer, rates)

    def losses(self, batch: Batch, progress: Progress) -> Iterator[dict[str, Tensor]]:
        """One step: synthetic defects, reconstruction at two scales, segmentation."""
        generator = generator_on(batch.image.device, progress.generator)
        sample = synthesise(batch.image, batch.texture, batch.part, self.config.synthesis, generator)
        small, big = self._scales(batch.image, generator)
        share = progress.shard.share_of(len(batch.image))
        share_batch_norms(self.networks.segmentation, progress.shard)
        own = Synthesised(share.of(sample.image), share.of(sample.mask), share.of(sample.label))
        row = None if batch.row is None else share.of(batch.row)
        yield self.terms(share.of(batch.image), own, small.of(share), big.of(share), row=row, share=share)
        if self.averaged is not None:
            warmup = (1 + progress.step) / (10 + progress.step)  # the first steps' weights are soon forgotten
            average(self.averaged, self.networks, min(self.config.ema_decay, warmup))

    def terms(
        self,
        normal: Tensor,
        sample: Synthesised,
        small: Scale,
        big: Scale,
        row: Tensor | None = None,
        share: Share | None = None,
    ) -> dict[str, Tensor]:
        """The terms of the loss for `normal` images, what was made of them, and the noise at both scales.

        Gradients of the segmentation's terms reach the U-Net through the reconstruction of every image; those of its
        own loss come from images without a defect only, or from all as `denoises` says. Of images that are the `share`
        of one process, so are the terms.
        """
        share = WHOLE.share_of(len(normal)) if share is None else share
        with torch.autocast(normal.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            noisy_small, noisy_big = self._noisy(sample.image, (small, big), row)
            denoised = denoise(self.networks.unet, noisy_small, noisy_big)
            logits = segment(self.networks.segmentation, sample.image, denoised.image)
        left_out = sample.label if self.config.denoises == "normal" else torch.zeros_like(sample.label)
        terms = {
            self.config.predicts.name: denoising_loss(
                noisy_small.target(normal), denoised.small_output, left_out, share.shard
            )
            + denoising_loss(noisy_big.target(normal), denoised.big_output, left_out, share.shard),
            "focal": share.weighed(FOCAL_WEIGHT * focal_loss(logits, sample.mask)),
            "smooth_l1": share.weighed(F.smooth_l1_loss(logits.sigmoid(), sample.mask)),
        }
        if self.config.reconstruction_weight > 0:
            before = reduced(normal, size_of(denoised.image))
            loss = reconstruction_loss(denoised.image, before, sample.label, share.shard)
            terms["reconstruction"] = self.config.reconstruction_weight * loss
        return terms

    def _noisy(self, image: Tensor, scales: tuple[Scale, Scale], row: Tensor | None = None) -> Sequence[Noisy]:
        """Images (B, 3, H, W) as the U-Net sees them at the two scales, reduced once for both."""
        seen = reduced(image, self.config.unet.image_size)
        if self.preconditioner is None:
            return [noisy_image(seen, scale) for scale in scales]
        return [cast(PreconditionedImage, self.preconditioner(seen, scale, row)) for scale in scales]

    def _scales(self, image: Tensor, generator: torch.Generator) -> tuple[Scale, Scale]:
        """The small and the big scale of a training step."""
        if self.config.timesteps == "random":
            return (
                self._random_scale(image, 0, SMALL_STEPS_END, generator),
                self._random_scale(image, SMALL_STEPS_END, self.config.big_steps_end, generator),
            )
        small, big = self.config.small_step, self.config.big_step
        return (
            self._random_scale(image, small, small + 1, generator),
            self._random_scale(image, big, big + 1, generator),
        )

    def _random_scale(self, image: Tensor, first: int, end: int, generator: torch.Generator) -> Scale:
        """For each image a step from `first` up to but not including `end`, and noise at the size of the U-Net."""
        step = torch.randint(first, end, (len(image),), generator=generator, device=image.device)
        share = rearrange(self.signal_shares[step], "b -> b 1 1 1")
        noise = torch.randn(len(image), *self.noise.shape[2:], generator=generator, device=image.device)
        return Scale(step, share.sqrt().float(), (1 - share).sqrt().float(), noise, self.config.noise_scale)

    def train(self, mode: bool = True) -> "DiffusionAD":
        """In eval mode training is over, and the filters of the folds, which nothing else needs, are forgotten."""
        if not mode and self.preconditioner is not None:
            self.preconditioner.filter.forget_folds()
        super().train(mode)
        return self

    def forward(self, image: Tensor, region: Tensor | None = None) -> Prediction:
        """Map (B, 1, H, W), the probability of a defect, and score (B,), the mean of its `top_pixels` highest."""
        small, big = self._noisy(image, fixed_scales(self.config, self.noise, image.shape[0]))
        return detect(self.deployed, small, big, image, self.config.top_pixels, region)

    def exportable(self) -> "FoldedDiffusionAD":
        """The same function with fewer operations, for export; a copy, in eval mode."""
        return FoldedDiffusionAD(self).eval()
