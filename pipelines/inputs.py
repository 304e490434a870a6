"""What the training of some models reads besides a category: EfficientAD's teacher and penalty images."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from anomaly_models.base import AnomalyModel, Batch, Config
from anomaly_models.efficient_ad import EfficientAD, EfficientADConfig
from pipelines.arrays import BatchSource
from pipelines.errors import WeightsError
from pipelines.paths import Project
from pipelines.penalty import PenaltyImages, WithPenalty
from pipelines.weights import load_pretrained, load_teacher_into


@dataclass(frozen=True, slots=True)
class Inputs:
    """Where they are, and a hash of each: another teacher makes another model."""

    model_name: str
    teacher: Path | None
    penalty: PenaltyImages | None
    version: dict[str, str]

    def load_into(self, model: AnomalyModel) -> None:
        """Fill the pretrained parts of a fresh model.

        Raises:
            WeightsError: weights are missing, unreachable or do not fit.
        """
        load_pretrained(model)
        if self.teacher is not None:
            assert isinstance(model, EfficientAD)
            load_teacher_into(model, self.teacher, _remedy(self.model_name))

    def added_to(self, batches: BatchSource[Batch]) -> BatchSource[Batch]:
        """The training batches, with penalty images where the model wants them."""
        return batches if self.penalty is None else WithPenalty(batches, self.penalty)


def find_inputs(model_name: str, config: Config, project: Project, device: torch.device) -> Inputs:
    """Look for what `config` names.

    Raises:
        WeightsError: the teacher's file is not there.
        StageError: the penalty images are not there, or of another size.
    """
    if not isinstance(config, EfficientADConfig):
        return Inputs(model_name, None, None, {})
    teacher = project.root / config.teacher
    if not teacher.is_file():
        raise WeightsError(f"teacher {teacher}: no such file; {_remedy(model_name)}")
    version = {"teacher_sha256": hashlib.sha256(teacher.read_bytes()).hexdigest()}
    penalty = None
    if config.penalty_weight > 0:
        penalty = PenaltyImages(project.penalty(model_name), config.image_size, device)
        version["penalty_sha256"] = penalty.sha256
    return Inputs(model_name, teacher, penalty, version)


def _remedy(model_name: str) -> str:
    return f"run `blemish distill {model_name}`, or correct models.{model_name}.teacher"
