"""Visual anomaly detectors: tensors in, tensors out."""

from anomaly_models.base import AnomalyModel
from anomaly_models.fapm import FAPM

MODELS: dict[str, type[AnomalyModel]] = {"fapm": FAPM}
