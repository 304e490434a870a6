"""A trained cell, as `train` left it, read back for the stages that follow."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from pydantic import ValidationError, model_validator
from safetensors.torch import load_file
from safetensors.torch import save as serialize

from anomaly_models import MODELS
from anomaly_models import base as contract
from anomaly_models.base import AnomalyModel
from pipelines.data.batches import DataVersion, PreparedData, frame_of
from pipelines.errors import StageError
from pipelines.files import atomic_folder, file_sha256
from pipelines.paths import Cell, Project
from pipelines.preparation.config import PrepareConfig
from pipelines.records import Record
from pipelines.training.weights import terms_of
from pipelines.unreadable import reading, refusal


class OfTraining(Record):
    """Of section `train`, what one training is made with."""

    seed: int


class RunSettings(Record):
    """All that decides what is trained, but for the code."""

    method: str  # whose code it is; several models of the file may be variants of one
    models: dict[str, dict[str, Any]]  # the hyper-parameters of the one model, under its name
    inputs: dict[str, str]  # hashes of what it learnt from beside normal images
    prepare: PrepareConfig
    train: OfTraining
    data: DataVersion


class RunRecord(Record):
    """How a cell was trained: `run.json`, beside the weights."""

    run_id: str
    model: str
    category: str
    settings: RunSettings
    train_seconds: float
    train_steps: int
    train_images: int
    parameters: int
    state_megabytes: float
    weights_sha256: str  # of their file, in which a flipped bit would be a number like any other

    @model_validator(mode="after")
    def _has_settings(self) -> Self:
        if list(self.settings.models) != [self.model]:
            raise ValueError(f"settings of {', '.join(self.settings.models)} for {self.model}")
        return self

    @property
    def model_settings(self) -> dict[str, Any]:
        """The hyper-parameters, as JSON holds them."""
        return self.settings.models[self.model]

    def metrics(self) -> dict[str, float]:
        """What it took, for MLflow."""
        return self.model_dump(exclude={"run_id", "model", "category", "settings", "weights_sha256"})


@dataclass(frozen=True, slots=True)
class Trained:
    """The model in eval mode, and how it was made."""

    model: AnomalyModel
    run: RunRecord
    config: contract.Config

    def data(self, project: Project, device: torch.device) -> PreparedData:
        """The category's images as this model takes them. Raises StageError if they have changed since."""
        config = self.config
        data = PreparedData(project.prepared(self.run.category), frame_of(config), device)
        self.check_data(data)
        return data

    @property
    def learns_from_defects(self) -> bool:
        """Whether it was trained on real defects, if there were any."""
        return self.config.wants.anomalies > 0

    @property
    def weights(self) -> list[str]:
        """Of each pretrained network inside: what it is, where its weights are from, their licence where known."""
        return terms_of(self.model)

    def check_data(self, data: PreparedData) -> None:
        """Raise StageError if the images or their splits have changed: a test image may have been trained on."""
        if data.version != self.run.settings.data:
            raise StageError(
                f"{data.index.category}: prepared anew since {self.run.model} was trained; "
                f"run `blemish train {self.run.model} {data.index.category}` again"
            )


def load_trained(cell: Cell, device: torch.device) -> Trained:
    """Rebuild the model from its own settings and load its weights; needs no pretrained weights and no network.

    Raises:
        StageError: nothing was trained here, or what was is damaged or of another version.
    """
    if not cell.run_record.exists():
        raise StageError(f"{cell.trained}: no trained model; run {cell.verb('train')} first")
    run = RunRecord.load(cell.run_record, f"run {cell.verb('train')} again")
    try:
        config = MODELS[run.settings.method].Config.model_validate(run.model_settings)
    except ValidationError as error:
        raise refusal(cell.run_record, error, f"run {cell.verb('train')} again") from None
    rebuilt = MODELS[run.settings.method](config.network)
    with reading(cell.weights, f"run {cell.verb('train')} again"):
        if file_sha256(cell.weights) != run.weights_sha256:
            raise ValueError("not the bytes that were written")
        state = load_file(cell.weights)
    try:
        rebuilt.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise StageError(
            f"{cell.trained}: weights of another version of {cell.model} ({reason}); train again"
        ) from None
    return Trained(rebuilt.to(device).eval().requires_grad_(False), run, config)


def build(method: str, config: contract.Config, seed: int) -> AnomalyModel:
    """The model with its random parts drawn from `seed`; pretrained parts are still to be loaded."""
    torch.manual_seed(seed)
    return MODELS[method](config.network)


def weights_of(model: AnomalyModel) -> bytes:
    """All that the model has learnt, as a safetensors file holds it."""
    return serialize({name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()})


def save_trained(weights: bytes, run: RunRecord, cell: Cell) -> None:
    with atomic_folder(cell.trained) as temporary:
        # Through Python's own file: safetensors' file writer hides a full disk behind an error of its own.
        (temporary / cell.weights.name).write_bytes(weights)
        run.save(temporary / cell.run_record.name)
