"""Visual anomaly detectors: tensors in, tensors out."""

from collections import UserDict
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anomaly_models.base import AnomalyModel


class _Models(UserDict[str, Any]):
    """A model's file, and torch with it, is imported when the model is asked for: to know its name needs neither."""

    def __getitem__(self, name: str) -> "type[AnomalyModel]":
        model: type[AnomalyModel] = resolve_name(self.data[name])
        return model


MODELS = _Models(
    {
        "adfa": "anomaly_models.adfa:ADFA",
        "bgad": "anomaly_models.bgad:BGAD",
        "diffusion_ad": "anomaly_models.diffusion_ad:DiffusionAD",
        "efficient_ad": "anomaly_models.efficient_ad:EfficientAD",
        "fapm": "anomaly_models.fapm:FAPM",
    }
)
