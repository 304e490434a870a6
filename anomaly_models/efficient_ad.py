"""EfficientAD: a student and an autoencoder imitate a patch description network on normal images only.

Batzner, Heckler, Koenig, "EfficientAD: Accurate Visual Anomaly Detection at Millisecond-Level Latencies", WACV 2024,
arXiv 2303.14535v3: Algorithms 1 (training) and 2 (inference), Tables 6 and 7 (networks) and 8 (autoencoder).

Deliberate choices, where the paper leaves room or this differs:
- No network pads its patch descriptions: every description sees exactly 33 x 33 pixels, and the map is 56 x 56 cells
  at 256 px. The combined map is padded back by 4 cells before it is resized; otherwise it would be displaced.
- Quantiles are taken on the raw maps of the held-out normals; the paper resizes the maps first.
- Penalty images are the photos that `penalty` made, ImageNet's in the paper; the teacher is what `distill` made, since
  the authors' was not published.
- The hard-feature loss takes the k largest differences of each image, k such that it equals the paper's quantile form.
- The student's last convolution is two: one half imitates the teacher, the other the autoencoder. In training each
  image passes only the half that its loss uses, which changes no number and saves a quarter of the student's work.
- `overall_weight` is the share of the autoencoder's map in the combined one: 1/2 in the paper, after 70,000 steps. In
  one or two thousand the autoencoder does not learn what it is for (`benchmarks/settings.md`). With 0 there is none,
  neither in training nor in use, and the student has one half. Logical anomalies are its part of the method.
- The last kernel of the encoder is image_size / 32, so that the bottleneck is 64 numbers at any image size. The paper
  works at 256 px only.
"""

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator, model_validator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR

from anomaly_models.base import AnomalyModel, Batch, Config, ModelError, Prediction, Progress, Wants
from anomaly_models.common.imagenet import ImageNetNormalisation, grey
from anomaly_models.common.randomness import generator_on
from anomaly_models.common.scoring import cells_within, highest, resize_map, size_of, within
from anomaly_models.common.shards import Share
from anomaly_models.common.sizes import Size
from anomaly_models.common.statistics import MIN_STD, ChannelStatistics, vectors_of

Width = Literal["tiny", "small", "medium"]
Precision = Literal["float32", "bf16"]

MIN_IMAGE_SIZE = 128  # the decoder's first map, image_size // 64 - 1, must have a cell
BORDER = 4  # cells by which an unpadded description map falls short of image_size / 4, on each side
JITTER = 0.2  # brightness, contrast or saturation is multiplied by a factor in 1 -+ this
GREY_PROBABILITY = 0.3  # of a penalty image
DROPOUT = 0.2  # in the decoder
DECAY_AT = 0.95  # share of the steps after which the learning rate drops to a tenth
# Normal parts spread the quantiles of a map by tens of per cent; constant images by rounding errors only.
MIN_QUANTILE_SPREAD = 1e-3
_HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"


class EfficientADConfig(Config):
    """The paper: 256 px, batch 1, small or medium, 70,000 steps, 1e-4, 1e-5, 0.999, 1, 0.5, 0.9, 0.995, float32."""

    width: Width
    teacher: Annotated[str, Field(min_length=1)]  # safetensors file of the teacher's weights; the pipeline loads it
    steps: PositiveInt
    learning_rate: PositiveFloat
    weight_decay: NonNegativeFloat
    hard_quantile: Annotated[float, Field(ge=0, le=1)]  # p_hard; 0: mean squared error, no mining
    penalty_weight: NonNegativeFloat  # of the loss on out-of-domain images; 0 trains without them
    overall_weight: Annotated[float, Field(ge=0, lt=1)]  # of the overall map in the combined one; 0: no autoencoder
    quantile_low: Annotated[float, Field(gt=0, lt=1)]  # of the held-out normals' map cells: becomes 0
    quantile_high: Annotated[float, Field(gt=0, lt=1)]  # becomes 0.1
    precision: Precision  # of the convolutions in training; a trained model always runs in float32

    @field_validator("image_size")
    @classmethod
    def _autoencoder_fits(cls, image_size: Size) -> Size:
        for side in image_size:
            if side % 32 or side < MIN_IMAGE_SIZE:
                raise ModelError(f"EfficientAD needs a multiple of 32, at least {MIN_IMAGE_SIZE}; found {side}")
        return image_size

    @model_validator(mode="after")
    def _quantiles_ascend(self) -> Self:
        if self.quantile_low >= self.quantile_high:
            raise ModelError(
                f"quantile_low must be below quantile_high; found {self.quantile_low} and {self.quantile_high}"
            )
        return self

    @property
    def wants(self) -> Wants:
        return Wants(teacher=self.teacher, penalty=self.penalty_weight > 0)


# --- networks --------------------------------------------------------------------------------------------------------

# Kernels of the convolutions before the last. `tiny` is not in the paper: it is `small` with fewer kernels and
# channels, so that the demo and the tests run in seconds.
KERNELS: dict[Width, tuple[int, ...]] = {"tiny": (32, 64, 64), "small": (128, 256, 256), "medium": (256, 512, 512, 512)}
CHANNELS: dict[Width, int] = {"tiny": 128, "small": 384, "medium": 384}  # of a patch description


def pdn_trunk(width: Width, outputs: int, *, padded: bool) -> "OrderedDict[str, nn.Module]":
    """All layers of a patch description network but the last convolution; only `medium` depends on `outputs`."""
    kernels = KERNELS[width]
    pad = int(padded)
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(3, kernels[0], 4, padding=3 * pad),
        relu1=nn.ReLU(inplace=True),
        pool1=nn.AvgPool2d(2, padding=pad),
        conv2=nn.Conv2d(kernels[0], kernels[1], 4, padding=3 * pad),
        relu2=nn.ReLU(inplace=True),
        pool2=nn.AvgPool2d(2, padding=pad),
    )
    if width != "medium":
        layers["conv3"] = nn.Conv2d(kernels[1], kernels[2], 3, padding=pad)
        layers["relu3"] = nn.ReLU(inplace=True)
        return layers
    layers["conv3"] = nn.Conv2d(kernels[1], kernels[2], 1)
    layers["relu3"] = nn.ReLU(inplace=True)
    layers["conv4"] = nn.Conv2d(kernels[2], kernels[3], 3, padding=pad)
    layers["relu4"] = nn.ReLU(inplace=True)
    layers["conv5"] = nn.Conv2d(kernels[3], outputs, 4)
    layers["relu5"] = nn.ReLU(inplace=True)
    return layers


def pdn_head(width: Width, inputs: int, outputs: int) -> nn.Conv2d:
    """The last convolution of a patch description network; `inputs` matters to `medium` only."""
    return nn.Conv2d(inputs, outputs, 1) if width == "medium" else nn.Conv2d(KERNELS[width][-1], outputs, 4)


def patch_description_network(width: Width, *, padded: bool = False) -> nn.Sequential:
    """The teacher (paper, Tables 6 and 7): (B, 3, H, W), ImageNet-normalised, to (B, C, H / 4 - 8, W / 4 - 8).

    Padded, as when it is distilled, the map is (H / 4, W / 4), and the same weights give the same numbers 4 cells or
    more from the border. The state's keys are those of the published teachers: conv1.weight, conv1.bias, ...
    """
    channels = CHANNELS[width]
    layers = pdn_trunk(width, channels, padded=padded)
    layers["conv6" if width == "medium" else "conv4"] = pdn_head(width, channels, channels)
    return nn.Sequential(layers)


class Student(nn.Module):
    """The teacher's architecture with twice the outputs, kept as two heads on one trunk; or with one head."""

    def __init__(self, width: Width, *, imitates_autoencoder: bool) -> None:
        super().__init__()
        channels = CHANNELS[width]
        outputs = 2 * channels if imitates_autoencoder else channels
        self.trunk = nn.Sequential(pdn_trunk(width, outputs, padded=False))
        self._is_wide = width != "tiny"
        self.teacher_head = pdn_head(width, outputs, channels)
        self.autoencoder_head = pdn_head(width, outputs, channels) if imitates_autoencoder else None

    @property
    def heads(self) -> list[nn.Conv2d]:
        return [self.teacher_head, *([] if self.autoencoder_head is None else [self.autoencoder_head])]

    def forward(self, image: Tensor) -> list[Tensor]:
        """Imitations of the teacher and, with two heads, of the autoencoder, each (B, C, H / 4 - 8, W / 4 - 8)."""
        patches = self.patches(image)
        return [head(patches) for head in self.heads]

    def patches(self, image: Tensor) -> Tensor:
        """What the heads see.

        `ImageNetNormalisation` lays pictures out channels last; without AVX-512 the gradients of wide convolutions'
        weights take two to three times as long so. The first one stays: its 3 channels make it slow otherwise.
        """
        if self.training and self._is_wide and image.device.type == "cpu" and not _HAS_AVX512:
            return self.trunk[3:](self.trunk[:3](image).contiguous())
        features: Tensor = self.trunk(image)
        return features


class Autoencoder(nn.Module):
    """Paper, Table 8: an image through 64 numbers to the teacher's descriptions of it."""

    def __init__(self, image_size: Size, channels: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 32, 4, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(32, 32, 4, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(32, 64, 4, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(64, 64, 4, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(64, 64, 4, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(64, 64, image_size.divided(32)),
        )
        # Each block adds a row and a column, which is why every other size is one short.
        self.sizes = tuple(
            Size(image_size.height // by - less, image_size.width // by - less)
            for by, less in ((64, 1), (32, 0), (16, 1), (8, 0), (4, 1), (2, 1))
        )
        self.map_size = Size(image_size.height // 4 - 2 * BORDER, image_size.width // 4 - 2 * BORDER)
        self.blocks = nn.ModuleList(nn.Conv2d(64, 64, 4, padding=2) for _ in self.sizes)
        self.output = nn.Sequential(
            nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(64, channels, 3, padding=1)
        )

    def forward(self, image: Tensor, generator: torch.Generator | None = None, share: Share | None = None) -> Tensor:
        """(B, 3, H, W), ImageNet-normalised, to (B, C, H / 4 - 8, W / 4 - 8); with a generator, drops out.

        Of images that are the `share` of one process, the generator draws for those of all.
        """
        features = self.encoder(image)
        for size, convolution in zip(self.sizes, self.blocks, strict=True):
            features = F.relu(convolution(resize_map(features, size)), inplace=True)
            if generator is not None:
                features = features * dropout_mask(features, generator, share)
        return self.output(resize_map(features, self.map_size))


def dropout_mask(features: Tensor, generator: torch.Generator, share: Share | None = None) -> Tensor:
    """0 or 1 / (1 - p). `nn.Dropout` takes no generator, and would make a resumed run differ."""
    keep = 1 - DROPOUT
    if share is None or share.shard.alone:
        return torch.empty_like(features).bernoulli_(keep, generator=generator).div_(keep)
    # Numbers are drawn in the order of memory, so it has to be that of the features.
    last = not features.is_contiguous() and features.is_contiguous(memory_format=torch.channels_last)
    like = features.new_empty(share.number, *features.shape[1:])
    of_all = like.contiguous(memory_format=torch.channels_last) if last else like
    return share.of(of_all.bernoulli_(keep, generator=generator)).div_(keep)


# --- images ----------------------------------------------------------------------------------------------------------


def jitter(image: Tensor, generator: torch.Generator) -> Tensor:
    """Change brightness, contrast or saturation, one per image, as torchvision does; `generator` on its device.

    All three move an image towards or away from something: black, its mean grey, its grey version.
    """
    luminance = grey(image)
    towards = torch.stack([torch.zeros_like(luminance), _image_mean(luminance), luminance])
    choice = torch.randint(len(towards), (len(image),), generator=generator, device=image.device)
    factor = 1 + JITTER * (2 * torch.rand(len(image), generator=generator, device=image.device) - 1)
    reference = towards[choice, torch.arange(len(image), device=image.device)]  # (B, 1, H, W)
    return torch.lerp(reference, image, rearrange(factor, "b -> b 1 1 1")).clamp(0, 1)


def _image_mean(luminance: Tensor) -> Tensor:
    return luminance.mean(dim=(1, 2, 3), keepdim=True).expand_as(luminance)


def randomly_grey(image: Tensor, generator: torch.Generator) -> Tensor:
    """Take the colour from each image with probability 0.3; `generator` on its device."""
    chosen = torch.rand(len(image), 1, 1, 1, generator=generator, device=image.device) < GREY_PROBABILITY
    return torch.where(chosen, grey(image), image)


def convolutions_in(precision: Precision, device: torch.device) -> torch.autocast:
    """Within it, convolutions are in that precision; their weights, and whatever is made float again, stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


# --- losses, statistics and maps -------------------------------------------------------------------------------------


def hard_feature_loss(target: Tensor, output: Tensor, quantile: float) -> Tensor:
    """Mean of the squared differences at or above their `quantile` within each image (Algorithm 1, lines 12 to 15)."""
    difference = rearrange((target - output).square(), "b c h w -> b (c h w)")
    return difference.topk(num_hard(difference.shape[1], quantile), sorted=False).values.mean()


def num_hard(num_elements: int, quantile: float) -> int:
    """How many of so many distinct numbers are at or above their linearly interpolated quantile."""
    return num_elements - math.ceil(quantile * (num_elements - 1))


def quantiles(values: Tensor, levels: tuple[float, float]) -> Tensor:
    """Linearly interpolated quantiles of (N,), as (2,); not every `torch.quantile` takes more than 2**24 numbers."""
    ordered = values.sort().values
    position = torch.tensor(levels, dtype=torch.float64) * (len(values) - 1)
    below = position.floor().long()
    above = position.ceil().long()
    weight = (position - below).to(values)
    return torch.lerp(ordered[below], ordered[above], weight)


def mean_square(left: Tensor, right: Tensor) -> Tensor:
    """(B, C, H, W) twice to (B, 1, H, W): the squared difference, averaged over channels."""
    return (left - right).square().mean(dim=1, keepdim=True)


def described_cells(region: Tensor | None) -> Tensor | None:
    """Which cells of a description map, (B, 1, H / 4 - 8, W / 4 - 8), hold any of the region (B, 1, H, W)."""
    if region is None:
        return None
    return cells_within(region, size_of(region).divided(4))[:, :, BORDER:-BORDER, BORDER:-BORDER]


def to_prediction(cells: Tensor, image_size: Size, region: Tensor | None = None) -> Prediction:
    """The combined map's cells (B, 1, H / 4 - 8, W / 4 - 8), padded with 0 (the level of the lower quantile)."""
    padded = F.pad(within(cells, described_cells(region)), [BORDER] * 4)
    anomaly_map = resize_map(padded, image_size)
    return Prediction(within(anomaly_map, region), highest(anomaly_map, region))


class RawMaps(NamedTuple):
    """Each (B, 1, H / 4 - 8, W / 4 - 8), not yet comparable."""

    local: Tensor  # student against teacher: structural anomalies
    overall: Tensor | None = None  # student against autoencoder: logical anomalies

    def together(self) -> Tensor:
        """(B, M, H / 4 - 8, W / 4 - 8), M = 1 or 2."""
        return self.local if self.overall is None else torch.cat([self.local, self.overall], dim=1)


def map_weights(config: EfficientADConfig, device: torch.device | None = None) -> Tensor:
    """Of the maps in the combined one, (M,) float64; filled on the device, which need not be waited for."""
    weight = config.overall_weight
    shares = [1 - weight, weight] if weight else [1.0]
    return torch.stack([torch.full((), share, dtype=torch.float64, device=device) for share in shares])


def difference_maps(
    description: Tensor,
    autoencoder: nn.Module | None,
    student: Callable[[Tensor], Sequence[Tensor]],
    normalised: Tensor,
) -> RawMaps:
    """The teacher's `description` and the autoencoder's output against the student's imitations of them."""
    imitations = student(normalised)
    return RawMaps(
        local=mean_square(description, imitations[0]),
        overall=None if autoencoder is None else mean_square(autoencoder(normalised), imitations[1]),
    )


# --- the model -------------------------------------------------------------------------------------------------------


class EfficientAD(AnomalyModel):
    """Teacher, student and autoencoder, with the teacher's channel statistics and the maps' quantiles as buffers."""

    Config = EfficientADConfig
    min_holdout = 2
    same_every_step = True
    learns_in_shares = True

    teacher_loaded: Tensor
    channel_mean: Tensor
    channel_std: Tensor
    map_quantiles: Tensor

    def __init__(self, config: EfficientADConfig) -> None:
        super().__init__()
        self.config = config
        channels = CHANNELS[config.width]
        self.normalise = ImageNetNormalisation()
        self.teacher = patch_description_network(config.width).requires_grad_(False)
        with_autoencoder = config.overall_weight > 0
        self.student = Student(config.width, imitates_autoencoder=with_autoencoder)
        self.autoencoder = Autoencoder(config.image_size, channels) if with_autoencoder else None
        self.register_buffer("teacher_loaded", torch.tensor(False))
        self.register_buffer("channel_mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("channel_std", torch.ones(1, channels, 1, 1))
        # Rows: local map, overall map if there is one. Columns: the lower and the higher quantile.
        self.register_buffer("map_quantiles", torch.tensor([[0.0, 1.0]] * (1 + with_autoencoder)))

    def load_teacher(self, state: Mapping[str, Tensor]) -> None:
        """Put in the weights of a distilled or published teacher; raises ModelError if they do not fit."""
        expected = self.teacher.state_dict()
        for name in sorted(expected.keys() | state.keys()):
            found = tuple(state[name].shape) if name in state else "nothing"
            wanted = tuple(expected[name].shape) if name in expected else "nothing"
            if found != wanted:
                raise ModelError(
                    f"the teacher's weights do not fit width {self.config.width}: "
                    f"{name} should be {wanted}, found {found}; name another teacher or width"
                )
        self.teacher.load_state_dict(dict(state))
        self.teacher_loaded.fill_(True)

    @torch.no_grad()
    def prepare(self, normals: Iterable[Batch]) -> None:
        """Learn the teacher's mean and standard deviation per channel; raises ModelError without a teacher."""
        if not self.teacher_loaded:
            raise ModelError("EfficientAD has no teacher: load a distilled or published one before training")
        statistics = ChannelStatistics()
        for batch in normals:
            statistics.update(self.teacher(self.normalise(batch.image)), described_cells(batch.region))
        if statistics.count == 0:
            raise ModelError("EfficientAD found no normal images to learn from")
        if bool((statistics.std < MIN_STD).all()):
            raise ModelError("the normal images are constant: the teacher describes all of them alike")
        self.channel_mean.copy_(rearrange(statistics.mean, "c -> 1 c 1 1"))
        self.channel_std.copy_(rearrange(statistics.std.clamp(min=MIN_STD), "c -> 1 c 1 1"))

    def total_steps(self, num_normals: int) -> int:  # noqa: ARG002
        return self.config.steps

    def optimizer(self, total_steps: int) -> tuple[Optimizer, LRScheduler]:
        """Adam over student and autoencoder; the rate drops to a tenth for the last 5 % of the steps."""
        optimizer = torch.optim.Adam(
            [parameter for parameter in self.parameters() if parameter.requires_grad],
            lr=self.config.learning_rate,
            weight_decay=self.config.weight_decay,
            fused=True,
        )
        return optimizer, MultiStepLR(optimizer, milestones=[int(DECAY_AT * total_steps)], gamma=0.1)

    def losses(self, batch: Batch, progress: Progress) -> Iterator[dict[str, Tensor]]:
        """One step (Algorithm 1): the student on clean and out-of-domain images, both networks on jittered ones.

        Raises ModelError if the penalty has a weight and the batch no penalty images.
        """
        generator = generator_on(batch.image.device, progress.generator)
        share = progress.shard.share_of(len(batch.image))
        terms = {
            "hard_feature": self._hard_feature_loss(share.of(batch.image)),
            **self._penalty(batch.penalty, generator, share),
            **self._autoencoder_losses(batch.image, generator, share),
        }
        yield {name: share.weighed(mean) for name, mean in terms.items()}

    def _hard_feature_loss(self, image: Tensor) -> Tensor:
        normalised = self.normalise(image)
        with self._autocast(image):
            target = self._describe(normalised)
            output = self.student.teacher_head(self.student.patches(normalised))
        return hard_feature_loss(target, output.float(), self.config.hard_quantile)

    def _penalty(self, penalty: Tensor | None, generator: torch.Generator, share: Share) -> dict[str, Tensor]:
        """Keep the student from imitating the teacher on what is not this part."""
        if self.config.penalty_weight == 0:
            return {}
        if penalty is None:
            raise ModelError(
                f"EfficientAD's penalty_weight is {self.config.penalty_weight}, but there are no penalty images: "
                "give a folder of everyday photos, or set the weight to 0"
            )
        normalised = self.normalise(share.of(randomly_grey(penalty, generator)))
        with self._autocast(penalty):
            output = self.student.teacher_head(self.student.patches(normalised))
        return {"penalty": self.config.penalty_weight * output.float().square().mean()}

    def _autoencoder_losses(self, image: Tensor, generator: torch.Generator, share: Share) -> dict[str, Tensor]:
        """Both networks on jittered images; nothing without an autoencoder."""
        if self.autoencoder is None or self.student.autoencoder_head is None:
            return {}
        normalised = self.normalise(share.of(jitter(image, generator)))
        with self._autocast(image):
            target = self._describe(normalised)
            reconstruction = self.autoencoder(normalised, generator, share)
            imitation = self.student.autoencoder_head(self.student.patches(normalised))
        reconstruction = reconstruction.float()
        return {
            "autoencoder": F.mse_loss(reconstruction, target),
            # Not detached: the autoencoder is also drawn towards what the student can predict.
            "student_autoencoder": F.mse_loss(imitation.float(), reconstruction),
        }

    def _autocast(self, image: Tensor) -> torch.autocast:
        return convolutions_in(self.config.precision, image.device)

    @torch.no_grad()
    def _describe(self, normalised: Tensor) -> Tensor:
        """The teacher's descriptions, of mean 0 and variance 1 per channel over the normal images, in float32."""
        return (self.teacher(normalised).float() - self.channel_mean) / self.channel_std

    def raw_maps(self, image: Tensor) -> RawMaps:
        """Maps of images (B, 3, H, W) in [0, 1] before their scales are made comparable."""
        return RawMaps(*self.once_per_image(self._known_maps, image))

    def _known_maps(self, image: Tensor) -> list[Tensor]:
        normalised = self.normalise(image)
        maps = difference_maps(self._describe(normalised), self.autoencoder, self.student, normalised)
        return [known for known in maps if known is not None]

    @torch.no_grad()
    def calibrate(self, holdout: Iterable[Batch]) -> None:
        """Learn the quantiles of the maps over all cells of the held-out normals, exactly.

        Holds the raw maps of every image, 25 kB per image at 256 px. Raises ModelError for fewer than two images,
        or when the quantiles of a map coincide.
        """
        num_images, maps = 0, []  # maps: (N, M)
        for batch in holdout:
            num_images += len(batch.image)
            maps.append(vectors_of(self.raw_maps(batch.image).together(), described_cells(batch.region)).cpu())
        if num_images < self.min_holdout:
            raise ModelError(
                f"EfficientAD needs two or more held-out normal images to calibrate; found {num_images}: "
                "give more good images, or hold out a larger share"
            )
        levels = (self.config.quantile_low, self.config.quantile_high)
        for row, cells in enumerate(torch.cat(maps).unbind(dim=1)):
            low, high = quantiles(cells, levels).unbind()
            if not high - low > MIN_QUANTILE_SPREAD * high.abs():
                raise ModelError(
                    f"the held-out normal images are constant: quantiles {levels[0]} and {levels[1]} of the "
                    f"{RawMaps._fields[row]} map "
                    f"coincide at {high:.4g}; hold out images that show the part"
                )
            self.map_quantiles[row] = torch.stack([low, high])

    def forward(self, image: Tensor, region: Tensor | None = None) -> Prediction:
        """Map (B, 1, H, W) and score (B,), its maximum; 0 is the lower quantile of normal parts, 0.1 the higher."""
        maps = self.raw_maps(image).together()
        low, high = rearrange(self.map_quantiles, "m q -> q 1 m 1 1").unbind()
        normalised = 0.1 * (maps - low) / (high - low)
        weights = rearrange(map_weights(self.config, maps.device).to(maps), "m -> m 1 1")
        return to_prediction((weights * normalised).sum(dim=1, keepdim=True), self.config.image_size, region)

    def exportable(self) -> "FoldedEfficientAD":
        """The same function with fewer operations, for export; a copy, in eval mode."""
        return FoldedEfficientAD(self).eval()


class FoldedEfficientAD(nn.Module):
    """A trained EfficientAD with its statistics folded into weights (exact up to rounding).

    The teacher's normalisation is in its last convolution, the halves of the student's last convolution are one again,
    and the quantiles and weights are a factor per map and an offset. The ImageNet normalisation stays: the autoencoder
    pads its input, where folding would be wrong.
    """

    factors: Tensor
    offset: Tensor

    def __init__(self, model: EfficientAD) -> None:
        super().__init__()
        self.image_size = model.config.image_size
        self.normalise = ImageNetNormalisation()
        self.teacher = copy.deepcopy(model.teacher)
        _normalise_outputs(self.teacher[-1], model.channel_mean.flatten(), model.channel_std.flatten())
        self.student = nn.Sequential(*copy.deepcopy(model.student.trunk), _merged_heads(model.student))
        self.autoencoder = copy.deepcopy(model.autoencoder)
        low, high = model.map_quantiles.double().unbind(dim=1)
        factors = 0.1 * map_weights(model.config) / (high - low)
        self.register_buffer("factors", factors.float())
        self.register_buffer("offset", -(factors * low).sum().float())

    def forward(self, image: Tensor, region: Tensor | None = None) -> Prediction:
        normalised = self.normalise(image)
        maps = difference_maps(self.teacher(normalised), self.autoencoder, self._imitations, normalised)
        combined = self.factors[0] * maps.local + self.offset
        if maps.overall is not None:
            combined = combined + self.factors[1] * maps.overall
        return to_prediction(combined, self.image_size, region)

    def _imitations(self, normalised: Tensor) -> list[Tensor]:
        return list(self.student(normalised).chunk(len(self.factors), dim=1))


def _normalise_outputs(convolution: nn.Module, mean: Tensor, std: Tensor) -> None:
    assert isinstance(convolution, nn.Conv2d)
    assert convolution.bias is not None
    weight = convolution.weight.double() / rearrange(std.double(), "c -> c 1 1 1")
    bias = (convolution.bias.double() - mean.double()) / std.double()
    convolution.load_state_dict({"weight": weight, "bias": bias})


def _merged_heads(student: Student) -> nn.Conv2d:
    states = [head.state_dict() for head in student.heads]
    merged = copy.deepcopy(student.teacher_head)
    merged.out_channels *= len(states)
    merged.weight = nn.Parameter(torch.cat([state["weight"] for state in states]))
    merged.bias = nn.Parameter(torch.cat([state["bias"] for state in states]))
    return merged
