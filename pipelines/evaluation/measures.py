"""The figures by which models are compared."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure by which models are compared."""

    key: str
    title: str
    higher_is_better: bool = True
    oracle: bool = False  # its threshold is chosen on the test images

    @property
    def heading(self) -> str:
        return f"{self.title} (oracle)" if self.oracle else self.title


METRICS = (
    Metric("image_auroc", "Image AUROC"),
    Metric("image_ap", "Image AP"),
    Metric("image_f1_max", "Image F1-max", oracle=True),
    Metric("recall", "Defects found"),
    Metric("false_alarms", "False alarms", higher_is_better=False),
    Metric("pixel_auroc", "Pixel AUROC"),
    Metric("pixel_ap", "Pixel AP"),
    Metric("pixel_f1", "Pixel F1"),
    Metric("pixel_f1_max", "Pixel F1-max", oracle=True),
    Metric("aupro_30", "AUPRO 0.3"),
    Metric("aupro_05", "AUPRO 0.05"),
    Metric("spro_05", "sPRO 0.05"),
)


PROMISED = "false_alarms_promised"  # of further good parts, by the held-out ones; no figure to compare models by
PIXEL_METRICS = tuple(metric.key for metric in METRICS if metric.key.startswith(("pixel", "aupro", "spro")))
# A category has the one or the other, as it was published: what an average of one leaves out.
REGION_METRICS = (frozenset({"aupro_30", "aupro_05"}), frozenset({"spro_05"}))
# Where ten columns must do; of AUPRO and sPRO, a category has the one or the other.
TEN = tuple(metric.key for metric in METRICS if metric.key != "aupro_05")
METRIC_BY_KEY = {metric.key: metric for metric in METRICS}
