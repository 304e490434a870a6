"""The exported file -> a second one that computes convolutions in 8-bit integers, kept only if it decides as well.

Convolutions alone, each with the ReLU or ReLU6 that follows it: where 8 bits had to hold what these cut off, too few
are left for the rest (FAPM on the demo's gears: AUROC 76 for 98). All else stays float32, as it was exported: the
distances to a memory above all, of which 8 bits leave nothing. What the layers' values span is found on good parts
that training saw, so that neither a held-out part nor a test image has a say in it.

The scores are others then, and so are the thresholds: they are set anew on the held-out parts, by this very file.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnxruntime
import torch
from einops import rearrange
from numpy.typing import NDArray
from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor

from anomaly_models.base import Prediction
from pipelines.data.batches import Images, PreparedData
from pipelines.data.tiled import Detects, learnt_from, whole
from pipelines.deployment.records import Int8, OtherDecision
from pipelines.errors import ExportError, StageError
from pipelines.evaluation.groups import compare_groups, fitted_by_group
from pipelines.evaluation.held_out import (
    ThresholdFrom,
    predicted,
    score_held_out,
    score_held_out_images,
    score_known_defects,
    thresholds,
)
from pipelines.evaluation.measures import PROMISED
from pipelines.evaluation.metrics import confusion_at, image_metrics, known
from pipelines.evaluation.outcomes import Evaluation, HeldOutImage, ScoredImage, Threshold, read_predictions
from pipelines.evaluation.review import review
from pipelines.inference.detector import Detector, ModelCard
from pipelines.inference.engine import Inputs
from pipelines.numbers import percent
from pipelines.paths import Cell
from pipelines.settings.params import Params
from pipelines.training.trained import Trained

Feed = dict[str, NDArray[np.generic]]  # what a graph takes, by the names of its inputs

_MAX_AUROC_LOSS = 0.005  # of the image AUROC: what a category of a hundred test images can hardly tell from chance
_CALIBRATING = 64  # pictures, or tiles: with as many, scores are nearer to those of float32 than with fewer
_ACTIVATIONS = ("Clip", "Relu")  # which become the end of the range that an integer stands for


def export_int8(
    float32: Path,
    folder: Path,
    cell: Cell,
    trained: Trained,
    data: PreparedData,
    evaluation: Evaluation,
    params: Params,
) -> Int8:
    """Write the int8 file of the float32 one into `folder`, unless it decides too differently; and why, beside it.

    Raises:
        StageError: nothing was held out of training, or the cell is not as it was evaluated.
        ExportError: there is nothing to compute in integers, or what comes of it is no number.
    """
    index = data.index
    if index.by_folds:
        raise StageError(
            f"{index.category}: prepared with `holdout: folds`, and the threshold of an int8 file is set on good parts "
            f"that it has not learnt from; run `blemish prepare {index.category}` and train again, or export float32 "
            "alone"
        )
    if evaluation.index_sha256 != data.version.index_sha256:
        raise StageError(f"{cell.title}: evaluated on other images than there are; run {cell.verb('evaluate')} again")
    path, card = folder / cell.int8.name, Detector(float32).card
    learnt = learnt_from(data, trained.config)
    calibrating = _evenly(learnt.rows("train"))
    write_int8(float32, path, _feeds(learnt, calibrating, card), replace(card, precision="int8"))
    detects = _as_model(Detector(path))

    images = read_predictions(cell.evaluated, f"run {cell.verb('evaluate')} again")
    rows = {image.path: row for row, image in enumerate(index.images)}
    tested = [image for image in images if image.split == "test"]
    held_out, threshold_from = _held_out(detects, trained, data)
    at, pixel_value = thresholds(held_out, threshold_from, params.evaluate.false_alarm_rate)
    scores = [_finite(predicted(detects, data.batch([rows[image.path]]))[1], image.path) for image in tested]
    known_defects = score_known_defects(
        detects, data, [rows[image.path] for image in tested], learns=trained.learns_from_defects
    )
    by_int8 = [
        image.model_copy(update={"score": score, "decision": "defect" if score > at.value else "good"})
        for image, score in zip(images, [*scores, *(part.score for part in held_out)], strict=True)
    ]
    metrics, oracle = _metrics(by_int8[: len(tested)], at.value, at.expected_rate)
    float32_auroc = evaluation.metrics["image_auroc"]
    others = [
        OtherDecision(image=own.path, float32=image.score, int8=own.score, decision=own.decision)
        for image, own in zip(tested, by_int8, strict=False)
        if own.decision != image.decision
    ]
    allowed = params.export.max_decisions_changed
    found = Int8(
        refused=_refusal(metrics["image_auroc"], float32_auroc, others, len(tested), allowed),
        float32_auroc=float32_auroc,
        max_auroc_loss=_MAX_AUROC_LOSS,
        metrics=metrics,
        float32_threshold=evaluation.threshold.value,
        threshold=Threshold(**dict(at), pixel_value=pixel_value, oracle=oracle),
        review=review(
            [part.score for part in held_out],
            at,
            known_defects,
            reject_rate=params.evaluate.reject_rate,
            review_rate=params.evaluate.review_rate,
        ),
        groups=compare_groups(by_int8, fitted_by_group(index), at.expected_rate),
        images=tuple(by_int8),
        others=tuple(others),
        max_decisions_changed=allowed,
        num_calibrating=len(calibrating),
        megabytes=round(path.stat().st_size / 1e6, 2),
        float32_megabytes=round(float32.stat().st_size / 1e6, 2),
        onnxruntime=onnxruntime.__version__,
    )
    if found.refused is None:
        _write_card(path, _card(card, found))
    else:
        path.unlink()
    found.save(folder / cell.int8_proof.name)
    return found


def _refusal(
    auroc: float | None, float32_auroc: float | None, others: Sequence[OtherDecision], num_tested: int, allowed: float
) -> str | None:
    """Why a file is not kept; None if it is."""
    if auroc is None or float32_auroc is None:
        return "there are no test images, good and defective, that show whether it still finds defects"
    if float32_auroc - auroc > _MAX_AUROC_LOSS + 1e-9:  # of 98 and 97.5 the difference is a little more than that
        return (
            f"its image AUROC is {percent(auroc)}, in float32 {percent(float32_auroc)}, and it may lose "
            f"{percent(_MAX_AUROC_LOSS)}"
        )
    if len(others) > allowed * num_tested:
        return (
            f"it changes {len(others)} of {num_tested} decisions, of {others[0].image} first, which is more than "
            f"{100 * allowed:g} % (`export.max_decisions_changed`); its image AUROC is {percent(auroc)}, in float32 "
            f"{percent(float32_auroc)}"
        )
    return None


def write_int8(float32: Path, path: Path, feeds: Iterable[Feed], card: ModelCard) -> None:
    """Write the graph of `float32` with convolutions of 8-bit integers; `feeds` show it what it will see.

    The same feeds give the same bytes.

    Raises:
        ExportError: it has no convolution.
    """
    proto = onnx.load(float32)
    convolutions = [node for node in proto.graph.node if node.op_type == "Conv"]
    filters = [node.name for node in convolutions if _is_filter(node, proto.graph)]
    if len(filters) == len(convolutions):
        raise ExportError(f"{card.model}: no convolution in its graph to compute in int8; export float32 alone")
    with TemporaryDirectory() as folder:
        shaped = Path(folder, "shaped.onnx")
        quant_pre_process(float32, shaped, skip_symbolic_shape=True, skip_optimization=True)
        quantize_static(
            shaped,
            path,
            _Calibration(feeds),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", *_ACTIVATIONS],
            nodes_to_exclude=filters,
            per_channel=True,
            # Not of both signs: activations go into the range of an integer only so, and processors multiply it faster.
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    _write_card(path, card)


def _is_filter(node: onnx.NodeProto, graph: onnx.GraphProto) -> bool:
    """Whether a convolution has one channel on either side, as the blur of the anomaly map has.

    That is no layer of a network: it is fast as it is, and its input, the map, is what a decision is made of.
    """
    shapes = {weight.name: tuple(weight.dims) for weight in graph.initializer}
    return shapes.get(node.input[1], (1, 1))[:2] == (1, 1)  # one without a shape is computed, and no layer's weight


def _write_card(path: Path, card: ModelCard) -> None:
    """Put a card into the file, in the place of whatever is there."""
    proto = onnx.load(path)
    onnx.helper.set_model_props(proto, card.to_metadata())
    onnx.save(proto, path)


def _card(card: ModelCard, found: Int8) -> ModelCard:
    return replace(
        card,
        precision="int8",
        threshold=found.threshold.value,
        pixel_threshold=found.threshold.pixel_value,
        false_alarm_rate=found.threshold.expected_rate,
        reject_above=found.review.reject_above,
        review_load=found.review.load_ends,
        groups=found.groups.text if found.groups else None,
    )


class _Calibration:
    """As onnxruntime asks for it."""

    def __init__(self, feeds: Iterable[Feed]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> Feed | None:
        return next(self._feeds, None)


def _evenly(rows: Sequence[int]) -> list[int]:
    """Of good parts that training saw, or tiles of them, as many as a graph is shown."""
    number = min(_CALIBRATING, len(rows))
    return [rows[place * len(rows) // number] for place in range(number)]


def _feeds(learnt: Images, rows: Iterable[int], card: ModelCard) -> Iterator[Feed]:
    """One by one: all together may be larger than the memory."""
    wanted = {"image", *(["region"] if card.takes_region else []), *(["tile"] if card.by_tile else [])}
    for row in rows:
        batch = learnt.batch([row])
        inputs = {"image": batch.image, "region": batch.region, "tile": batch.tile}
        yield {name: tensor.numpy() for name, tensor in inputs.items() if name in wanted and tensor is not None}


def _as_model(detector: Detector) -> Detects:
    """An exported file, asked as a model is: pictures as tensors, which were bytes."""

    def detects(image: Tensor, region: Tensor | None) -> Prediction:
        pixels = rearrange((image * 255).round().byte(), "b c h w -> b h w c").numpy()
        counts = None if region is None else region[:, 0].numpy() > 0
        anomaly_map, score = detector(Inputs(pixels, counts))
        return Prediction(torch.from_numpy(anomaly_map), torch.from_numpy(score))

    return detects


def _held_out(detects: Detects, trained: Trained, data: PreparedData) -> tuple[list[HeldOutImage], ThresholdFrom]:
    """The held-out parts by the int8 file, and where a threshold on them comes from.

    A model that calibrates on these parts scores them lower than others, whatever its precision. `evaluate` takes the
    higher score by another calibration; no file holds that one, so what it adds in float32 is added here, too.
    """
    higher, threshold_from = score_held_out_images(trained, data)
    own = [score_held_out(detects, data, row) for row in data.index.for_thresholds()]
    if threshold_from is ThresholdFrom.CROSS_FITTED:
        model = whole(trained.model, trained.config)
        rows = zip(data.index.for_thresholds(), own, higher, strict=True)
        own = [_raised(part, score_held_out(model, data, row), high) for row, part, high in rows]
    for part in own:
        _finite(part.score, part.path)
    return own, threshold_from


def _raised(part: HeldOutImage, low: HeldOutImage, high: HeldOutImage) -> HeldOutImage:
    """By as much as it is from `low` to `high`."""
    return replace(part, score=part.score + (high.score - low.score), peak=part.peak + (high.peak - low.peak))


def _finite(score: float, image: str) -> float:
    if not np.isfinite(score):
        raise ExportError(f"in int8, the score of {image} is {score}; export float32 alone")
    return score


def _metrics(
    tested: Sequence[ScoredImage], threshold: float, promised: float
) -> tuple[dict[str, float | int | None], float | None]:
    """Figures of the test images as `evaluate` names them, and the threshold that they would have chosen."""
    scores = torch.tensor([image.score for image in tested], dtype=torch.float32)
    labels = torch.tensor([image.label for image in tested], dtype=torch.bool)
    found, counts = image_metrics(scores, labels), confusion_at(scores, labels, threshold)
    figures = {
        **found.figures,
        "recall": counts.true_positives / found.num_anomalous if found.num_anomalous else None,
        "false_alarms": counts.false_positives / found.num_normal if found.num_normal else None,
        PROMISED: promised,
        "threshold": threshold,
    }
    return {name: known(value) for name, value in figures.items()}, known(found.oracle_threshold)
