"""Visual anomaly detectors: tensors in, tensors out."""

from anomaly_models.adfa import ADFA
from anomaly_models.base import AnomalyModel
from anomaly_models.bgad import BGAD
from anomaly_models.diffusion_ad import DiffusionAD
from anomaly_models.efficient_ad import EfficientAD
from anomaly_models.fapm import FAPM

MODELS: dict[str, type[AnomalyModel]] = {
    "adfa": ADFA,
    "bgad": BGAD,
    "diffusion_ad": DiffusionAD,
    "efficient_ad": EfficientAD,
    "fapm": FAPM,
}
