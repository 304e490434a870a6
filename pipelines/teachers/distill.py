"""EfficientAD's teacher: a patch description network taught by a pretrained backbone on a folder of photos.

Batzner et al., WACV 2024, Algorithm 3: the backbone sees a photo at 512 px and describes each position as PatchCore
does (two stages, 3 x 3 neighbourhoods, adaptive pooling to one number per channel); the network sees it at 256 px and
learns these numbers, each channel brought to mean 0 and variance 1. Adam at one learning rate, mean squared error, no
augmentation but one grey photo in ten.

Deliberate differences: a photo is grey always or never, so that its description is computed once (the paper shows each
image about once, where this is the same); the channel statistics are of at most 10,000 of the photos that are learnt
from; and the pooling, which is linear, is done by one convolution per stage before the maps are resized.

A vision transformer can teach, too. It sees the photo at the multiple of its patch that is nearest to 512 px, and the
maps of its blocks (of 37 x 37 positions for DINOv2) are resized to the network's 64 x 64, as those of stage 3 are.
"""

import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from rich.console import Console
from safetensors.torch import save as serialize
from torch import Tensor, nn
from torch.optim.lr_scheduler import ConstantLR

from anomaly_models.base import ModelError, Progress
from anomaly_models.common.backbones import Backbone, PatchTokens
from anomaly_models.common.imagenet import ImageNetNormalisation, grey
from anomaly_models.common.row_cache import RowCache
from anomaly_models.common.scoring import resize_map, size_of
from anomaly_models.common.sizes import Size
from anomaly_models.common.statistics import MIN_STD, ChannelStatistics
from anomaly_models.efficient_ad import CHANNELS, Precision, Width, convolutions_in, patch_description_network
from pipelines.data.arrays import DEVICE_BYTES, Rows, sent, stream_rows, to_image
from pipelines.errors import WeightsError
from pipelines.files import atomic_folder
from pipelines.lineage import code_of
from pipelines.paths import Project
from pipelines.preparation.photos import PhotoArrays, decode_once
from pipelines.progress import watched
from pipelines.records import Record
from pipelines.sources.download import ArchiveConfig, acquire
from pipelines.teachers.config import DistillConfig, PublishedTeacherConfig
from pipelines.tracking.runs import OpenRun
from pipelines.training.checkpoint import Checkpoint, fingerprint
from pipelines.training.loop import Learner, Schedule, run_steps
from pipelines.training.weights import named_convolutions, pretrained_backbone, read_state_dict
from pipelines.training.work import Work

GREY_PROBABILITY = 0.1
STATISTICS_PHOTOS = 10_000  # for the channels' mean and standard deviation
MAGNIFICATION = 2  # the backbone's image is this much larger than the network's, so that its stride of 8 becomes 4
STRIDE = 8  # of the first stage that describes
STAGE_NUMBERS = 1024  # that a stage's neighbourhood is pooled to, before all stages are pooled together
MEMORY_BYTES = 4 * 2**30  # of descriptions kept; 3 MB per photo at 256 px and 384 channels
TEACHER_FILE = "teacher.safetensors"
TEACHER_RECORD = "run.json"
_PUBLISHED = "efficientad_teachers"  # in SOURCES

_GREY_STREAM = 2  # which photos are grey is apart from their order, drawn by the same seed


class TeacherRecord(Record):
    """How a teacher was made. A published one has no run."""

    run_id: str | None
    model: str
    settings: dict[str, Any]
    seconds: float | None
    made_of: str | None = None  # a hash of the settings, the photos and the code, whichever model it is for


# --- descriptions ----------------------------------------------------------------------------------------------------


class PatchDescriptions(nn.Module):
    """What the network is to learn: (B, 3, 2H, 2H) in [0, 1] to (B, C, H / 4, H / 4). Nothing in it is learnt.

    Raises:
        WeightsError: the first of a pyramid's layers has another stride than 8.
    """

    def __init__(self, backbone: Backbone, channels: int) -> None:
        super().__init__()
        if backbone.reductions[0] != STRIDE and not isinstance(backbone.pyramid, PatchTokens):
            raise WeightsError(
                f"backbone {backbone.name}: layers {list(backbone.layers)} begin at stride {backbone.reductions[0]}; "
                f"distillation needs {STRIDE} (layers [2, 3] of a ResNet)"
            )
        self.backbone = backbone
        self.pools = nn.ParameterList(pooling_kernels(backbone.channels, channels)).requires_grad_(False)

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        size = size_of(image)
        seen = seen_size(size, self.backbone.reductions[-1])
        image = image if seen == size else resize_map(image, seen)
        maps = self.backbone(image.contiguous(memory_format=torch.channels_last))
        pooled = [F.conv2d(features, kernel, padding=1) for features, kernel in zip(maps, self.pools, strict=True)]
        return torch.stack([resize_map(numbers, size.divided(STRIDE)) for numbers in pooled]).sum(dim=0)


def seen_size(size: Size, stride: int) -> Size:
    """What a photo is resized to: the nearest multiple of the backbone's deepest stride. A pyramid's divides it."""
    return Size(*(round(side / stride) * stride for side in size))


def describing_backbone(config: DistillConfig) -> Backbone:
    """The backbone with its weights, for photos at twice the network's size.

    Raises:
        WeightsError: they are missing or do not fit, or the network has no such layers.
    """
    try:
        with torch.device("meta"):  # the patch must be known before the positions are made
            stride = Backbone(config.backbone).reductions[-1]
    except ModelError as error:
        raise WeightsError(str(error)) from error
    return pretrained_backbone(config.backbone, seen_size(Size.square(MAGNIFICATION * config.image_size), stride))


def pooling_kernels(stage_channels: Sequence[int], channels: int) -> list[Tensor]:
    """One kernel (C, C_l, 3, 3) per stage, whose convolutions add up to PatchCore's pooled neighbourhoods.

    A stage's neighbourhood of C_l * 9 numbers, channel by channel, is pooled to 1,024; the numbers of all stages, one
    stage after the other, are pooled to C. Pooling is linear, so the images of unit vectors are all there is to know.
    """
    kernels = []
    for stage, inputs in enumerate(stage_channels):
        pooled = torch.zeros(inputs * 9, len(stage_channels), STAGE_NUMBERS)
        pooled[:, stage] = F.adaptive_avg_pool1d(torch.eye(inputs * 9), STAGE_NUMBERS)
        weights = F.adaptive_avg_pool1d(rearrange(pooled, "i l n -> i (l n)"), channels)
        kernels.append(rearrange(weights, "(i kh kw) o -> o i kh kw", kh=3, kw=3).contiguous())
    return kernels


@dataclass(frozen=True, slots=True)
class Described:
    """Photos, and what the backbone says about them."""

    image: Tensor  # (B, 3, H, W) in [0, 1]
    description: Tensor  # (B, C, H / 4, W / 4), as the backbone gives them


class DescribedPhotos:
    """A stream of photos at the network's size, described at twice that; remembered while there is room.

    A description is a function of its photo alone, remembered or not: on the CPU it is computed photo by photo, and it
    is rounded to half precision always.
    """

    def __init__(self, photos: PhotoArrays, side: int, descriptions: PatchDescriptions, seed: int) -> None:
        self.device = descriptions.pools[0].device
        sizes = (Size.square(side), Size.square(MAGNIFICATION * side))
        resident = sum(math.prod(photos.shape(size)) for size in sizes) <= DEVICE_BYTES
        self._small, self._large = (
            Rows(photos.file(size), photos.shape(size), np.uint8, photos.remedy, self.device, resident)
            for size in sizes
        )
        self._describe = descriptions
        self._is_grey = np.random.default_rng([seed, _GREY_STREAM]).random(len(self._small)) < GREY_PROBABILITY
        self._cache = RowCache(MEMORY_BYTES)

    def __len__(self) -> int:
        return len(self._small)

    def training_batch(self, seed: int, step: int, batch_size: int) -> Described:
        rows = stream_rows(len(self), (seed,), step, batch_size)
        return Described(self._images(self._small, rows), self.descriptions(rows))

    def descriptions(self, rows: Sequence[int]) -> Tensor:
        wanted = torch.tensor(rows)
        at_once = 1 if self.device.type == "cpu" else len(rows)
        (description,) = self._cache(self._described, wanted, wanted, at_once)
        return description.float()

    def _described(self, rows: Tensor) -> list[Tensor]:
        return [self._describe(self._images(self._large, rows.tolist())).half()]

    def _images(self, pixels: Rows, rows: Sequence[int]) -> Tensor:
        image = to_image(pixels.gather(rows))
        is_grey = sent(torch.from_numpy(self._is_grey[list(rows)]), self.device)
        return torch.where(rearrange(is_grey, "b -> b 1 1 1"), grey(image), image)


# --- learning --------------------------------------------------------------------------------------------------------


class Distillation(nn.Module):
    """The padded network, with the mean and standard deviation of what it is to learn, per channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, width: Width, precision: Precision) -> None:
        super().__init__()
        self.precision: Precision = precision
        self.normalise = ImageNetNormalisation()
        self.network = patch_description_network(width, padded=True)
        self.register_buffer("mean", torch.zeros(1, CHANNELS[width], 1, 1))
        self.register_buffer("std", torch.ones(1, CHANNELS[width], 1, 1))

    def learn_statistics(self, photos: DescribedPhotos, batch_size: int, console: Console) -> None:
        """From at most 10,000 photos, evenly from all; refuses a backbone that says the same of all of them."""
        number = min(STATISTICS_PHOTOS, len(photos))
        rows = [place * len(photos) // number for place in range(number)]
        statistics = ChannelStatistics()
        for start in watched(range(0, number, batch_size), console, "describing photos"):
            statistics.update(photos.descriptions(rows[start : start + batch_size]))
        self.mean.copy_(rearrange(statistics.mean, "c -> 1 c 1 1"))
        self.std.copy_(rearrange(statistics.std.clamp(min=MIN_STD), "c -> 1 c 1 1"))

    def losses(self, batch: Described, progress: Progress) -> Iterator[dict[str, Tensor]]:  # noqa: ARG002
        target = (batch.description - self.mean) / self.std
        with convolutions_in(self.precision, batch.image.device):
            description = self.network(self.normalise(batch.image))
        yield {"distillation": F.mse_loss(description.float(), target)}


def distill(
    model_name: str,
    config: DistillConfig,
    folder: Path,
    experiment: str,
    project: Project,
    device: torch.device,
    console: Console,
) -> None:
    """Make the teacher of `model_name` from the photos in `folder`: its weights, settings and the MLflow run's id.

    A run that was killed goes on from its last checkpoint and, on the CPU, ends with the same bits.

    Raises:
        DatasetError: the folder of photos is missing, empty, or holds a file that cannot be read.
        StageError: another process is making this teacher.
        WeightsError: the backbone's weights are missing or do not fit.
        TrainingDiverged: the loss is not finite.
    """
    tags = {"model": model_name, "stage": "distill"}
    work = Work(f"teacher of {model_name}", f"distill-{model_name}", project.work("distill", model_name), tags)
    with work.locked():
        sizes = (Size.square(config.image_size), Size.square(MAGNIFICATION * config.image_size))
        photos = decode_once([folder], sizes, work.folder / "photos", console, "decoding photos")
        settings = {
            "distill": {model_name: config.model_dump()},
            "data": {"photos": photos.num_photos, "sha256": photos.sha256},
        }
        code = code_of("pipelines/teachers/distill.py")
        made_of = fingerprint({"config": config.model_dump(), "data": photos.sha256, "device": device.type}, code)
        if taken := _taken_over(model_name, made_of, project):
            console.print(f"distill {model_name}: the same as {taken}'s teacher, taken over", highlight=False)
            shutil.rmtree(work.folder)
            return
        with work.tracked(settings, code, device, project.root, experiment) as (checkpoint, run):
            module = _fit(config, photos, device, checkpoint, run, console)
            with atomic_folder(project.input_of(model_name, "teacher")) as output:
                state = {name: value.detach().cpu().contiguous() for name, value in module.network.state_dict().items()}
                (output / TEACHER_FILE).write_bytes(serialize(state))
                seconds = round(checkpoint.seconds, 3)
                record = TeacherRecord(
                    run_id=run.run_id, model=model_name, settings=settings, seconds=seconds, made_of=made_of
                )
                record.save(output / TEACHER_RECORD)
            run.metrics({"train_seconds": checkpoint.seconds})
            run.output(project.input_of(model_name, "teacher") / TEACHER_FILE, "teacher")


def _taken_over(model_name: str, made_of: str, project: Project) -> str | None:
    """Copy the teacher of another model that was made of the same; gives the other's name, None where there is none."""
    own = project.input_of(model_name, "teacher")
    for found in sorted(project.inputs(model_name).parent.glob(f"*/{own.name}/{TEACHER_RECORD}")):
        if found.parent == own or not found.stat().st_size:  # empty where the model is not in `models`
            continue
        record = TeacherRecord.load(found, f"delete {found.parent}")
        weights = found.with_name(TEACHER_FILE)
        if record.made_of == made_of and weights.is_file():
            with atomic_folder(own) as output:
                shutil.copy(weights, output / TEACHER_FILE)
                record.save(output / TEACHER_RECORD)
            return record.model
    return None


def fetch_published(model_name: str, config: PublishedTeacherConfig, project: Project, console: Console) -> None:
    """Make the teacher of `model_name` from the published archive; its convolutions get our names.

    Raises:
        DownloadError: the archive cannot be had or is not the published one.
        WeightsError: what it holds is no network of this width.
    """
    acquire(_PUBLISHED, ArchiveConfig(archive=config.archive), project.data, console)
    file = project.data / _PUBLISHED / f"pretrained_teacher_{config.width}.pth"
    state = named_convolutions(read_state_dict(file))
    network = patch_description_network(config.width)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise WeightsError(f"teacher {file}: {' '.join(str(error).split())}") from error
    with atomic_folder(project.input_of(model_name, "teacher")) as output:
        (output / TEACHER_FILE).write_bytes(serialize({name: value.contiguous() for name, value in state.items()}))
        settings = {"distill": {model_name: config.model_dump()}}
        TeacherRecord(run_id=None, model=model_name, settings=settings, seconds=None).save(output / TEACHER_RECORD)


def _fit(
    config: DistillConfig,
    photos: PhotoArrays,
    device: torch.device,
    checkpoint: Checkpoint,
    run: OpenRun,
    console: Console,
) -> Distillation:
    torch.manual_seed(config.seed)
    module = Distillation(config.width, config.precision).to(device)
    optimizer = torch.optim.Adam(
        module.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    training = (optimizer, ConstantLR(optimizer, factor=1.0))
    first_step = checkpoint.load(module, training, device)
    descriptions = PatchDescriptions(describing_backbone(config), CHANNELS[config.width]).to(device)
    stream = DescribedPhotos(photos, config.image_size, descriptions, config.seed)
    if first_step is None:
        module.learn_statistics(stream, config.batch_size, console)
        checkpoint.save(0, module, training)
        first_step = 0
    else:
        console.print(f"goes on at step {first_step} of {config.steps}, where it was killed", highlight=False)
    schedule = Schedule(config.seed, config.batch_size, first_step, config.steps)
    learner = Learner(module, module.losses, training, same_every_step=True)
    run_steps(learner, stream, schedule, checkpoint, run, console)
    return module
