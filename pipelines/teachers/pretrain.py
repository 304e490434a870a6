"""The embedded backbone: a small timm network taught the feature maps of a larger one on folders of photos.

No label is used. The student's maps, each through a projection of its own (1 x 1), regress the teacher's: smooth L1
plus one minus cosine, on the teacher's channels brought to mean 0 and variance 1 and clipped at 5. Random square crops,
mirrored half of the time, one in five grey; AdamW, with a linear warm-up and a cosine to zero. What is kept is the
student alone, in half precision.

Done once by whoever maintains the embedded weights, with settings in a file of its own; no stage of the pipeline.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Self

import numpy as np
import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)
from rich.console import Console
from safetensors.torch import save as serialize
from timm.models import FeatureInfo
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from anomaly_models.base import Progress
from anomaly_models.common.backbones import Backbone, BackboneConfig, is_plain_transformer
from anomaly_models.common.imagenet import IMAGENET_MEAN, IMAGENET_STD, ImageNetNormalisation, grey
from anomaly_models.common.settings import Settings
from anomaly_models.common.statistics import MIN_STD, ChannelStatistics
from pipelines.data.arrays import DEVICE_BYTES, Rows, stream_rows, to_image
from pipelines.errors import WeightsError
from pipelines.files import atomic_file
from pipelines.lineage import code_of
from pipelines.paths import Project
from pipelines.preparation.photos import PhotoArrays, decode_once
from pipelines.progress import watched
from pipelines.settings.problems import problems_in, read_yaml, refusal
from pipelines.tracking.runs import OpenRun
from pipelines.training.checkpoint import Checkpoint
from pipelines.training.loop import Learner, Schedule, run_steps
from pipelines.training.weights import pretrained_backbone
from pipelines.training.work import Work

EXPERIMENT = "pretrain"
LAYERS = (1, 2, 3)  # of the student: the stem and three stages
GREY_PROBABILITY = 0.2
CLIP = 5.0  # standard deviations; a teacher's few huge activations would rule the loss
STATISTICS_BATCHES = 32  # for the teacher's channels

_CROP_STREAM = 3  # apart from the photos' order, drawn by the same seed
_STATISTICS_SEED = 4  # added to the seed: other crops than the first that are learnt from


class PretrainConfig(Settings):
    """A whole file of settings, for one set of weights."""

    student: str  # timm model; the package's embedded weights are those of a resnet18
    teacher: BackboneConfig  # three layers, of the same strides as the student's: 4, 8 and 16
    photos: Annotated[list[str], Field(min_length=1)]  # folders, searched to the bottom; relative to the project
    image_size: PositiveInt  # of the photos that are cropped from
    crop: PositiveInt  # of what the networks see
    min_crop: PositiveInt  # smallest part of a photo that becomes a crop; the largest is all of it
    batch_size: PositiveInt
    steps: PositiveInt
    learning_rate: PositiveFloat
    weight_decay: NonNegativeFloat
    warmup_steps: NonNegativeInt
    seed: NonNegativeInt

    @model_validator(mode="after")
    def _fits(self) -> Self:
        BackboneConfig(name=self.student, weights="none yet", layers=LAYERS, combine="separate")
        if is_plain_transformer(self.student):
            raise ValueError(f"student {self.student} is a vision transformer; take a convolutional network")
        if self.min_crop > self.image_size:
            raise ValueError(f"min_crop {self.min_crop} is larger than image_size {self.image_size}")
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} leave nothing of {self.steps} steps")
        return self


def load_config(path: Path) -> PretrainConfig:
    """Read and validate the file.

    Raises:
        ParamsError: one message with every problem, each with its dotted path and the value found.
    """
    raw = read_yaml(path)
    try:
        return PretrainConfig.model_validate(raw)
    except ValidationError as error:
        raise refusal(path, problems_in(error, "", PretrainConfig, raw)) from None


# --- crops -----------------------------------------------------------------------------------------------------------


class Crops:
    """A stream of (B, 3, crop, crop) in [0, 1]: random squares of photos, resized, some mirrored, some grey."""

    def __init__(self, photos: PhotoArrays, config: PretrainConfig, device: torch.device) -> None:
        self.device = device
        self._config = config
        file, shape = photos.file(config.image_size), photos.shape(config.image_size)
        self._photos = Rows(file, shape, np.uint8, photos.remedy, device, resident=math.prod(shape) <= DEVICE_BYTES)

    def training_batch(self, seed: int, step: int, batch_size: int) -> Tensor:
        rows = stream_rows(len(self._photos), (seed,), step, batch_size)
        rng = np.random.default_rng([seed, _CROP_STREAM, step])
        crops = torch.cat([self._crop(pixels, rng) for pixels in self._photos.gather(rows)])
        is_grey = torch.from_numpy(rng.random(batch_size) < GREY_PROBABILITY).to(self.device)
        return torch.where(rearrange(is_grey, "b -> b 1 1 1"), grey(crops), crops)

    def _crop(self, pixels: Tensor, rng: np.random.Generator) -> Tensor:
        whole = self._config.image_size
        side = int(rng.integers(self._config.min_crop, whole, endpoint=True))
        top, left = rng.integers(0, whole - side, size=2, endpoint=True).tolist()
        image = to_image(pixels[None, top : top + side, left : left + side])
        if rng.random() < 0.5:
            image = image.flip(-1)
        size = (self._config.crop, self._config.crop)
        return F.interpolate(image, size, mode="bilinear", antialias=True, align_corners=False)


# --- learning --------------------------------------------------------------------------------------------------------


class Pretraining(nn.Module):
    """The student and what is needed to teach it; the frozen teacher itself is no part of its state.

    Raises:
        WeightsError: the teacher's maps are not of the student's strides.
    """

    def __init__(self, config: PretrainConfig, teacher: Backbone) -> None:
        super().__init__()
        self.normalise = ImageNetNormalisation()
        self.student = timm.create_model(config.student, pretrained=False, features_only=True, out_indices=LAYERS)
        information = self.student.feature_info
        assert isinstance(information, FeatureInfo)
        strides = tuple(information.reduction())
        if teacher.reductions != strides:
            raise WeightsError(
                f"teacher {teacher.name}: layers {list(teacher.layers)} have strides {list(teacher.reductions)}, "
                f"those of {config.student} {list(strides)}; name the layers of the same strides"
            )
        pairs = list(zip(information.channels(), teacher.channels, strict=True))
        self.projections = nn.ModuleList(nn.Conv2d(own, taught, 1) for own, taught in pairs)
        self.means = nn.ParameterList(torch.zeros(1, taught, 1, 1) for _, taught in pairs).requires_grad_(False)
        self.stds = nn.ParameterList(torch.ones(1, taught, 1, 1) for _, taught in pairs).requires_grad_(False)

    @torch.no_grad()
    def learn_statistics(self, teacher: Backbone, crops: Iterable[Tensor]) -> None:
        """Mean and standard deviation of the teacher's channels."""
        statistics = [ChannelStatistics() for _ in self.means]
        for images in crops:
            for level, features in zip(statistics, teacher(images), strict=True):
                level.update(features)
        for level, mean, std in zip(statistics, self.means, self.stds, strict=True):
            mean.copy_(rearrange(level.mean, "c -> 1 c 1 1"))
            std.copy_(rearrange(level.std.clamp(min=MIN_STD), "c -> 1 c 1 1"))

    def level_losses(self, image: Tensor, taught: Sequence[Tensor]) -> dict[str, Tensor]:
        """One term per map, for crops (B, 3, H, W) and the teacher's maps of them."""
        losses = {}
        own = self.student(self.normalise(image))
        levels = zip(own, taught, self.projections, self.means, self.stds, strict=True)
        for number, (features, target, projection, mean, std) in enumerate(levels, start=1):
            wanted = ((target - mean) / std).clamp(-CLIP, CLIP)
            projected = projection(features)
            away = 1 - F.cosine_similarity(projected, wanted, dim=1).mean()
            losses[f"layer{number}"] = F.smooth_l1_loss(projected, wanted) + away
        return losses


def warmup_cosine(step: int, warmup_steps: int, total_steps: int) -> float:
    """Factor of the learning rate: up in a line from 1 / warmup_steps, then half a cosine to zero."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps)))


def pretrain(config: PretrainConfig, output: Path, project: Project, device: torch.device, console: Console) -> None:
    """Write the student's weights to `output`, a safetensors file as the package embeds it.

    A run that was killed goes on from its last checkpoint and, on the CPU, ends with the same bits.

    Raises:
        DatasetError: a folder of photos is missing, empty, or holds a file that cannot be read.
        StageError: another process is writing the same weights.
        WeightsError: the teacher's weights are missing or do not fit, or its strides are others than the student's.
        TrainingDiverged: a loss is not finite.
    """
    folder = project.work("pretrain", output.stem)
    work = Work(str(output), f"pretrain-{output.stem}", folder, {"stage": "pretrain"})
    with work.locked():
        folders = [project.root / folder for folder in config.photos]
        photos = decode_once(folders, [config.image_size], work.folder / "photos", console, "decoding photos")
        settings = {
            "pretrain": config.model_dump(),
            "data": {"photos": photos.num_photos, "sha256": photos.sha256},
        }
        code = code_of("pipelines/teachers/pretrain.py")
        with work.tracked(settings, code, device, project.root, EXPERIMENT) as (checkpoint, run):
            module = _fit(config, photos, device, checkpoint, run, console)
            with atomic_file(output) as temporary:
                temporary.write_bytes(serialize(embeddable(module.student.state_dict()), _metadata(config, photos)))
            run.metrics({"train_seconds": checkpoint.seconds})
            run.file(output, "weights")


def _fit(
    config: PretrainConfig,
    photos: PhotoArrays,
    device: torch.device,
    checkpoint: Checkpoint,
    run: OpenRun,
    console: Console,
) -> Pretraining:
    torch.manual_seed(config.seed)
    teacher = pretrained_backbone(config.teacher).to(device)
    module = Pretraining(config, teacher).to(device)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    scheduler = LambdaLR(optimizer, lambda step: warmup_cosine(step, config.warmup_steps, config.steps))
    training = (optimizer, scheduler)
    crops = Crops(photos, config, device)
    first_step = checkpoint.load(module, training, device)
    if first_step is None:
        steps = watched(range(STATISTICS_BATCHES), console, "learning the teacher's scales")
        seed = config.seed + _STATISTICS_SEED
        module.learn_statistics(teacher, (crops.training_batch(seed, step, config.batch_size) for step in steps))
        checkpoint.save(0, module, training)
        first_step = 0

    def losses(batch: Tensor, progress: Progress) -> Iterator[dict[str, Tensor]]:  # noqa: ARG001
        with torch.no_grad():
            taught = teacher(batch)
        yield module.level_losses(batch, taught)

    schedule = Schedule(config.seed, config.batch_size, first_step, config.steps)
    run_steps(Learner(module, losses, training), crops, schedule, checkpoint, run, console)
    return module


# --- the file --------------------------------------------------------------------------------------------------------


def embeddable(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The student's state in half precision, without the counters that only training reads."""
    learnt = {name: value.detach().cpu() for name, value in state.items() if value.is_floating_point()}
    return {name: value.half().contiguous() for name, value in learnt.items()}


def _metadata(config: PretrainConfig, photos: PhotoArrays) -> dict[str, str]:
    return {
        "architecture": f"timm {config.student}, features_only, out_indices {LAYERS}",
        "mean": " ".join(map(str, IMAGENET_MEAN)),
        "std": " ".join(map(str, IMAGENET_STD)),
        "made": f"feature distillation from {config.teacher.name}, layers {list(config.teacher.layers)}, "
        f"on {photos.num_photos:,} photos, {config.steps:,} steps of {config.batch_size}",
    }
