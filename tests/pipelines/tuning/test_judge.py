"""The objective, on numbers worked by hand."""

import numpy as np
import pytest
import torch
from conftest import MEAN_COLOUR, MeanColour
from torch import nn

from anomaly_models.base import Prediction
from pipelines.errors import TrainingDiverged
from pipelines.tuning.development import Exam
from pipelines.tuning.judge import judge, verdict

CPU = torch.device("cpu")
CONFIG = MeanColour.Config.model_validate(MEAN_COLOUR)


class Told(nn.Module):
    """Its map is the red channel, and its score the largest of it."""

    def forward(self, image, region=None):
        anomaly_map = image[:, :1] if region is None else image[:, :1] * region
        return Prediction(anomaly_map, anomaly_map.amax(dim=(1, 2, 3)))


def exam_with(red, mask, normals, region=None):
    image = torch.zeros(len(red), 3, 4, 4, dtype=torch.uint8)
    image[:, 0] = torch.tensor(red, dtype=torch.uint8)
    masks = torch.tensor(mask, dtype=torch.bool)[:, None]
    return Exam(image, masks, region, normals, bool(masks[normals:].flatten(1).any(dim=1).all()))


def pictures():
    """Two good parts that peak at 10 and 30, two defects at 20 and 40; of these the corner pixel is the defect."""
    red, mask = np.zeros((4, 4, 4)), np.zeros((4, 4, 4))
    for place, peak in enumerate((10, 30, 20, 40)):
        red[place, 0, 0] = peak
    mask[2:, 0, 0] = 1
    return red, mask


def test_the_mean_of_both_areas():
    found = judge(Told(), CONFIG, exam_with(*pictures(), normals=2), CPU)
    assert found.auroc == 3 / 4  # of four pairs, 20 is not above 30
    # Of 62 normal pixels one scores above 20: PRO is 1/2 up to that rate, from there on 1.
    assert found.aupro == pytest.approx(1 - 1 / 2 * (1 / 62) / 0.3)
    assert found.objective == (found.auroc + found.aupro) / 2
    assert found.metrics() == {"image_auroc": found.auroc, "aupro_30": found.aupro, "objective": found.objective}


def test_without_a_mask_of_every_defect_the_image_auroc_alone():
    red, mask = pictures()
    mask[3] = 0
    found = judge(Told(), CONFIG, exam_with(red, mask, normals=2), CPU)
    assert (found.aupro, found.objective) == (None, 3 / 4)
    assert "aupro_30" not in found.metrics()


def test_what_lies_outside_of_the_region_does_not_count():
    region = torch.ones(4, 1, 4, 4)
    region[1, 0, 0, 0] = 0  # of the good part that peaked at 30
    found = judge(Told(), CONFIG, exam_with(*pictures(), normals=2, region=region), CPU)
    assert found.auroc == 1.0


def test_the_scale_of_a_score_changes_nothing():
    scores, labels = np.array([1.0, 3.0, 2.0, 4.0]), np.array([False, False, True, True])
    assert verdict(scores, labels, 0.5) == verdict(np.exp(scores), labels, 0.5)


def test_scores_that_are_not_finite():
    class Broken(Told):
        def forward(self, image, region=None):
            anomaly_map, score = super().forward(image, region)
            return Prediction(anomaly_map, score / 0 - score / 0)

    with pytest.raises(TrainingDiverged, match="not finite; lower the learning rate"):
        judge(Broken(), CONFIG, exam_with(*pictures(), normals=2), CPU)


def test_many_pixels_are_counted_in_bins(monkeypatch):
    monkeypatch.setattr("pipelines.tuning.judge._MOST_PIXELS", 1)
    found = judge(Told(), CONFIG, exam_with(*pictures(), normals=2), CPU)
    assert found.aupro == pytest.approx(1 - 1 / 2 * (1 / 62) / 0.3)
