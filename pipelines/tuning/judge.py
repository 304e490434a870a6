"""What a search maximises: how well good parts are told from defects, and the defects from what is around.

    objective = (image AUROC + AUPRO 0.3) / 2,   or the image AUROC alone where a defect has no mask

Both are by rank alone, from 0 to 1: no setting gains by changing the scale of a score. The image AUROC is what the
report ranks models by. Of few pictures it has few values, and it is often 1 for many settings: AUPRO, which has
thousands, tells these apart, and falls where a map finds something else than the defect. A model that calibrates does
so on the good parts that it is judged on, in each trial alike.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from anomaly_models.base import AnomalyModel, Config
from pipelines.data.tiled import whole
from pipelines.errors import TrainingDiverged
from pipelines.evaluation.curves import Bools, Floats, image_curve
from pipelines.evaluation.intervals import Ends, auroc_interval
from pipelines.evaluation.metrics import ExactPixelMetrics, PixelMetrics, StreamingPixelMetrics
from pipelines.tuning.development import Exam

_PRO_LIMIT = 0.3  # of the false-positive rate
_MOST_PIXELS = 3e7  # of which every score is kept; of more, a histogram


@dataclass(frozen=True, slots=True)
class Verdict:
    auroc: float
    aupro: float | None  # None where a defect has no mask
    interval: Ends  # 95 % of the image AUROC, over pictures like these

    @property
    def objective(self) -> float:
        return self.auroc if self.aupro is None else (self.auroc + self.aupro) / 2

    def metrics(self) -> dict[str, float]:
        found = {"image_auroc": self.auroc, "objective": self.objective}
        return found if self.aupro is None else found | {"aupro_30": self.aupro}


@torch.no_grad()
def judge(model: AnomalyModel, config: Config, exam: Exam, device: torch.device) -> Verdict:
    """Score all pictures of the exam with a model that has learnt and is calibrated.

    Raises:
        TrainingDiverged: a score or a map is not finite.
    """
    detects, scores = whole(model.eval(), config), list[Tensor]()
    pixels: PixelMetrics = ExactPixelMetrics() if exam.mask.numel() <= _MOST_PIXELS else StreamingPixelMetrics()
    for image, region in exam.batches(config.batch_size, device):
        prediction = detects(image, region)
        found, maps = prediction.score.cpu(), prediction.anomaly_map.cpu()
        if not bool(found.isfinite().all() and maps.isfinite().all()):
            raise TrainingDiverged("what the trained model says is not finite; lower the learning rate")
        if exam.masked:
            seen = sum(map(len, scores))
            pixels.update(maps, exam.mask[seen : seen + len(maps)])
        scores.append(found)
    aupro = float(pixels.operating_points().curve.aupro(_PRO_LIMIT)) if exam.masked else None
    return verdict(torch.cat(scores).double().numpy(), np.arange(len(exam.image)) >= exam.normals, aupro)


def verdict(scores: Floats, labels: Bools, aupro: float | None) -> Verdict:
    return Verdict(float(image_curve(scores, labels)[1].auroc()), aupro, auroc_interval(scores, labels))
