"""Held-out good parts -> the thresholds that they support; defects that are known beside them."""

from collections.abc import Sequence
from enum import StrEnum

import torch

from anomaly_models.base import AnomalyModel, Batch, ModelError
from pipelines.data.batches import PreparedData, SplitBatches
from pipelines.data.tiled import Detects, learnt_from, whole
from pipelines.errors import StageError
from pipelines.evaluation.outcomes import HeldOutImage, HoldoutThreshold
from pipelines.evaluation.thresholds import cross_fit, refit, threshold_at
from pipelines.pictures.overlays import Map
from pipelines.training.trained import Trained


class ThresholdFrom(StrEnum):
    """As the record says it."""

    HELD_OUT = "held-out good parts"
    CROSS_FITTED = "held-out good parts, cross-fitted"
    FOLDS = "good parts, each scored by a model of the other folds"
    CALIBRATING = "held-out good parts, too few to cross-fit what they calibrate"


def score_held_out_images(trained: Trained, data: PreparedData) -> tuple[list[HeldOutImage], ThresholdFrom]:
    """The good parts that training has not seen, each by itself, at the higher of its scores.

    Where it has seen all, each by a model that learns from the other folds.

    Raises:
        StageError: the other folds are too few to learn from, or a score of what they have not seen means nothing.
    """
    rows = data.index.for_thresholds()
    batch_size, learnt = trained.config.batch_size, learnt_from(data, trained.config)

    def batches(places: Sequence[int]) -> SplitBatches:
        return SplitBatches(learnt, learnt.rows_of([rows[place] for place in places]), batch_size)

    def scored_by(model: AnomalyModel, place: int) -> HeldOutImage:
        return score_held_out(whole(model, trained.config), data, rows[place])

    if data.index.by_folds:
        fold_of = [fold for row in rows if (fold := data.index.images[row].fold) is not None]
        found: dict[int, HeldOutImage] = {}
        try:
            for of_others, places in refit(trained.model, fold_of, batches):
                of_others.check_scores(batches(places))  # training could not, which had seen all
                found |= {place: scored_by(of_others, place) for place in places}
        except ModelError as error:
            raise StageError(f"{trained.run.model} on {data.index.category}, without a fold: {error}") from error
        return [found[place] for place in range(len(rows))], ThresholdFrom.FOLDS
    with trained.model.remembering():
        deployed = [scored_by(trained.model, place) for place in range(len(rows))]
        models = cross_fit(trained.model, [data.index.images[row].group for row in rows], batches)
        try:
            by_others = {place: scored_by(model, place) for model, places in models for place in places}
        except ModelError:
            return deployed, ThresholdFrom.CALIBRATING
    if not by_others:
        return deployed, ThresholdFrom.HELD_OUT
    return [image.or_higher(by_others[place]) for place, image in enumerate(deployed)], ThresholdFrom.CROSS_FITTED


def score_held_out(model: Detects, data: PreparedData, row: int) -> HeldOutImage:
    """What a model says of a good part."""
    anomaly_map, score = predicted(model, data.batch([row]))
    return HeldOutImage(data.index.images[row].path, score, float(anomaly_map.max()))


def thresholds(
    held_out: Sequence[HeldOutImage], threshold_from: ThresholdFrom, rate: float
) -> tuple[HoldoutThreshold, float]:
    """The thresholds on the score and on the map, from held-out good parts alone.

    The map's is set on each image's largest value: at the same rate a good part shows any marked pixel at all.
    """
    scores, peaks = torch.tensor([image.score for image in held_out]), torch.tensor([image.peak for image in held_out])
    threshold = threshold_at(scores, rate)
    if threshold_from is ThresholdFrom.CALIBRATING:
        needed = max(threshold.num_images_needed, threshold.num_images + 1)
        threshold = threshold.model_copy(update={"attainable": False, "num_images_needed": needed})
    return threshold, threshold_at(peaks, rate).value


def score_known_defects(model: Detects, data: PreparedData, tested: Sequence[int], *, learns: bool) -> list[float]:
    """Scores of the real defects that the model is not tested on, and has not learnt from if it `learns` from any."""
    unseen = data.index.rows("known", "withheld") if learns else [*data.index.rows("known"), *data.index.apart()]
    return [predicted(model, data.batch([row]))[1] for row in sorted(set(unseen) - set(tested))]


def predicted(model: Detects, batch: Batch) -> tuple[Map, float]:
    """Map (H, W) and score of a batch of one image: a larger one may round differently."""
    with torch.no_grad():
        prediction = model(batch.image, batch.region)
    return prediction.anomaly_map[0, 0].cpu().numpy(), float(prediction.score[0])
