"""Visual anomaly detectors: tensors in, tensors out."""

from anomaly_models.base import AnomalyModel
from anomaly_models.efficient_ad import EfficientAD
from anomaly_models.fapm import FAPM

MODELS: dict[str, type[AnomalyModel]] = {"efficient_ad": EfficientAD, "fapm": FAPM}
