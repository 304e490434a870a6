"""A trained cell, as `train` left it, read back for the stages that follow."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialize

from anomaly_models import MODELS
from anomaly_models import base as contract
from anomaly_models.base import AnomalyModel
from pipelines.data.batches import PreparedData
from pipelines.errors import StageError
from pipelines.files import atomic_folder, read_json, write_json


@dataclass(frozen=True, slots=True)
class Trained:
    """The model in eval mode, and what `run.json` says of how it was made."""

    model: AnomalyModel
    run: dict[str, Any]

    @property
    def image_size(self) -> int:
        return int(self.run["settings"]["models"][self.run["model"]]["image_size"])

    @property
    def data_sha256(self) -> str:
        return str(self.run["settings"]["data"]["sha256"])

    def check_data(self, data: PreparedData) -> None:
        """Raise StageError if the images or their splits have changed: a test image may have been trained on."""
        if data.version != self.run["settings"]["data"]:
            raise StageError(
                f"{data.index.category}: prepared anew since {self.run['model']} was trained; "
                f"run `blemish train {self.run['model']} {data.index.category}` again"
            )


def load_trained(folder: Path, device: torch.device) -> Trained:
    """Rebuild the model from its own settings and load its weights; needs no pretrained weights and no network.

    Raises:
        StageError: nothing was trained here, or the weights are not of this version's model.
    """
    if not (folder / "run.json").exists():
        model, category = folder.parts[-2:]
        raise StageError(f"{folder}: no trained model; run `blemish train {model} {category}` first")
    run = read_json(folder / "run.json")
    name = run["model"]
    config = MODELS[name].Config.model_validate(run["settings"]["models"][name])
    rebuilt = MODELS[name](config)
    try:
        rebuilt.load_state_dict(load_file(folder / "model.safetensors"))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise StageError(f"{folder}: weights of another version of {name} ({reason}); train again") from None
    return Trained(rebuilt.to(device).eval().requires_grad_(False), run)


def build(model_name: str, config: contract.Config, seed: int) -> AnomalyModel:
    """The model with its random parts drawn from `seed`; pretrained parts are still to be loaded."""
    torch.manual_seed(seed)
    return MODELS[model_name](config)


def save_trained(model: AnomalyModel, result: dict[str, Any], folder: Path) -> None:
    with atomic_folder(folder) as temporary:
        state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
        # Through Python's own file: safetensors' file writer hides a full disk behind an error of its own.
        (temporary / "model.safetensors").write_bytes(serialize(state))
        write_json(temporary / "run.json", result)
