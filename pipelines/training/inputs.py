"""What the training of some models reads besides normal images of a category: what `Config.wants` says, found."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from anomaly_models.base import AnomalyModel, Batch, Config
from pipelines.data.arrays import BatchSource
from pipelines.data.batches import Images
from pipelines.data.photo_sets import PhotoSet
from pipelines.data.streams import WithAnomalies, WithForeground, WithPhotos, anomalies_warning
from pipelines.errors import WeightsError
from pipelines.paths import Project
from pipelines.training.weights import load_pretrained, load_teacher_into


@dataclass(frozen=True, slots=True)
class Inputs:
    """Where they are, and a hash of each: another teacher makes another model."""

    model_name: str
    config: Config
    teacher: Path | None
    penalty: PhotoSet | None
    textures: PhotoSet | None
    version: dict[str, str]

    def load_into(self, model: AnomalyModel) -> None:
        """Fill the pretrained parts of a fresh model.

        Raises:
            WeightsError: weights are missing, unreachable or do not fit.
        """
        load_pretrained(model)
        if self.teacher is not None:
            load_teacher_into(model, self.teacher, _remedy(self.model_name))

    def added_to(self, data: Images) -> BatchSource[Batch]:
        """The training batches of `data`, with all that the model wants in them."""
        batches: BatchSource[Batch] = data
        wants = self.config.wants
        if wants.anomalies:
            batches = WithAnomalies(data, wants.anomalies)
        if wants.foreground and not data.index.surface:
            batches = WithForeground(batches)
        return WithPhotos(batches, self.penalty, self.textures)

    def warning(self, data: Images) -> str | None:
        """What the model would like to have and `data` does not hold; it learns without."""
        return anomalies_warning(data) if self.config.wants.anomalies else None


def find_inputs(model_name: str, config: Config, project: Project, device: torch.device) -> Inputs:
    """Look for what `config` wants.

    Raises:
        WeightsError: the teacher's file is not there.
        StageError: the penalty images or textures are not there, or of another size.
    """
    teacher = penalty = textures = None
    version = {}
    if config.wants.teacher is not None:
        teacher = project.root / config.wants.teacher
        if not teacher.is_file():
            raise WeightsError(f"teacher {teacher}: no such file; {_remedy(model_name)}")
        version["teacher_sha256"] = hashlib.sha256(teacher.read_bytes()).hexdigest()
    if config.wants.penalty:
        penalty = PhotoSet(project.input_of(model_name, "penalty"), config.network.image_size, device, "penalty")
        version["penalty_sha256"] = penalty.sha256
    if config.wants.textures:
        textures = PhotoSet(project.input_of(model_name, "textures"), config.network.image_size, device, "textures")
        version["textures_sha256"] = textures.sha256
    return Inputs(model_name, config, teacher, penalty, textures, version)


def _remedy(model_name: str) -> str:
    return f"run `blemish distill {model_name}`, or correct models.{model_name}.teacher"
