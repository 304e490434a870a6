"""How good a detector is: by image, by pixel and by region, and the threshold that needs no anomaly.

Source: the protocol of MVTec AD (Bergmann et al., IJCV 129, 2021): everything is computed per category over the pooled
test images, good ones included, and categories are averaged with equal weight. AUPRO follows the reference evaluation:
8-connected regions of equal weight, one sort of all scores, equal scores merged, the curve from (0, 0) to (1, 1) cut at
the limit by linear interpolation.

Two implementations of the pixel metrics share every formula. `ExactPixelMetrics` keeps and sorts all scores;
`StreamingPixelMetrics` keeps three histograms over the leading bits of the float32 pattern, whose order is that of the
scores, and can say how far from the exact values it may be.

Deliberate differences from common code: scores are never passed through a sigmoid, rescaled or clipped (torchmetrics
does the first by default, batch by batch); a metric that needs a class which is absent is NaN, not 0 or 1; a threshold
taken from the test labels is called the oracle threshold. There is one decision rule: anomalous if score > threshold.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import BinaryAUROC, BinaryAveragePrecision, BinaryPrecisionRecallCurve

_NAN = float("nan")
_EIGHT_CONNECTED = np.ones((3, 3), dtype=np.int8)
_PRO_LIMIT = 0.3
_STRICT_PRO_LIMIT = 0.05
_CURVE_POINTS = 2000  # enough for a figure; an exact curve may have millions
_ROUNDING = 1e-9  # far above what float64 sums lose, far below any bound that matters

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


# ---- by image ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ImageResult:
    """NaN throughout when only one class is present."""

    auroc: float
    ap: float  # the step function, not the trapezoid
    f1_max: float  # an oracle number: its threshold comes from the labels it is judged by
    oracle_threshold: float
    num_normal: int
    num_anomalous: int


@dataclass(frozen=True, slots=True)
class ConfusionCounts:
    """Decisions against labels at one threshold."""

    true_positives: int
    false_positives: int
    true_negatives: int
    false_negatives: int

    @property
    def f1(self) -> float:
        """NaN when nothing is anomalous and nothing is called so."""
        wrong = self.false_positives + self.false_negatives
        found = 2 * self.true_positives
        return found / (found + wrong) if found + wrong else _NAN


@dataclass(frozen=True, slots=True)
class DefectRecall:
    """How many images of one defect type are called anomalous."""

    num_images: int
    num_found: int
    recall: float


def image_metrics(scores: Tensor, labels: Tensor) -> ImageResult:
    """Judge image scores (N,), any real scale, by labels (N,), anomalous where not 0.

    Raises:
        ValueError: the shapes differ, or a score is NaN or infinite.
    """
    scores, labels = checked_image_scores(scores, labels)
    num_anomalous = int(labels.sum())
    num_normal = len(labels) - num_anomalous
    if not num_anomalous or not num_normal:
        return ImageResult(_NAN, _NAN, _NAN, _NAN, num_normal, num_anomalous)
    target = labels.long()
    auroc = BinaryAUROC(normalization=None)
    ap = BinaryAveragePrecision(normalization=None)
    auroc.update(scores, target)
    ap.update(scores, target)
    threshold = _image_oracle_threshold(scores, target)
    return ImageResult(
        auroc=float(auroc.compute()),
        ap=float(ap.compute()),
        f1_max=confusion_at(scores, labels, threshold).f1,
        oracle_threshold=threshold,
        num_normal=num_normal,
        num_anomalous=num_anomalous,
    )


def confusion_at(scores: Tensor, labels: Tensor, threshold: float) -> ConfusionCounts:
    """Count the four outcomes of "anomalous if score > threshold" for scores (N,) and labels (N,).

    Raises:
        ValueError: the shapes differ, or a score is NaN or infinite.
    """
    scores, labels = checked_image_scores(scores, labels)
    called = scores > threshold
    return ConfusionCounts(
        true_positives=int((called & labels).sum()),
        false_positives=int((called & ~labels).sum()),
        true_negatives=int((~called & ~labels).sum()),
        false_negatives=int((~called & labels).sum()),
    )


def recall_by_defect_type(
    scores: Tensor, labels: Tensor, defect_types: Sequence[str], threshold: float
) -> dict[str, DefectRecall]:
    """How many anomalous images of each type score above the threshold, types in alphabetical order.

    Raises:
        ValueError: the lengths differ, or a score is NaN or infinite.
    """
    scores, labels = checked_image_scores(scores, labels)
    if len(defect_types) != len(scores):
        raise ValueError(f"{len(scores)} scores but {len(defect_types)} defect types: give one for each image")
    found: dict[str, list[bool]] = {}
    for is_found, is_anomalous, defect_type in zip(
        (scores > threshold).tolist(), labels.tolist(), defect_types, strict=True
    ):
        if is_anomalous:
            found.setdefault(defect_type, []).append(is_found)
    return {name: DefectRecall(len(hits), sum(hits), sum(hits) / len(hits)) for name, hits in sorted(found.items())}


def checked_image_scores(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ValueError(
            f"image scores and labels are both (N,), found {tuple(scores.shape)} and {tuple(labels.shape)}"
        )
    scores = scores.detach().cpu().float()
    bad = (~torch.isfinite(scores)).nonzero()
    if len(bad):
        index = int(bad[0])
        raise ValueError(f"the score of image {index} (counted from 0) is {float(scores[index])}: scores are finite")
    return scores, labels.detach().cpu() != 0


def _image_oracle_threshold(scores: Tensor, target: Tensor) -> float:
    """The highest of the thresholds that reach F1-max."""
    curve = BinaryPrecisionRecallCurve(normalization=None)
    curve.update(scores, target)
    precision, recall, thresholds = curve.compute()  # thresholds ascend; one fewer than points
    f1 = (2 * precision * recall / (precision + recall))[:-1].nan_to_num(0.0)
    lowest = thresholds[len(f1) - 1 - int(f1.flip(0).argmax())]
    return float(_just_below(lowest.numpy()))


# ---- by pixel and by region --------------------------------------------------------------------------------------


class PixelResult(NamedTuple):
    """NaN throughout when only one class of pixel is present.

    A named tuple, since torchmetrics takes apart what `compute` returns and refuses a frozen dataclass.
    """

    auroc: float
    ap: float  # the step function, not the trapezoid
    f1_max: float  # an oracle number: its threshold comes from the masks it is judged by
    oracle_threshold: float
    aupro_30: float  # area under PRO over FPR, up to FPR 0.3, divided by 0.3
    aupro_05: float
    num_images: int
    num_regions: int
    num_normal_pixels: int
    num_anomalous_pixels: int


class PixelCurves(NamedTuple):
    """ROC, precision-recall and PRO at shared thresholds, strictest first, thinned for drawing; arrays (P,)."""

    threshold: Floats  # the first is infinite: nothing is called anomalous
    false_positive_rate: Floats
    recall: Floats
    precision: Floats
    region_overlap: Floats


class Interval(NamedTuple):
    """Both ends included."""

    low: float
    high: float


class PixelBounds(NamedTuple):
    """Where the exact values are, whatever the order of the scores within each bin."""

    auroc: Interval
    ap: Interval
    f1_max: Interval
    aupro_30: Interval
    aupro_05: Interval


class PixelMetrics(Protocol):
    """Feed maps and masks batch by batch, in any split, then ask."""

    def update(self, anomaly_map: Tensor, mask: Tensor) -> None:
        """Add maps and masks, both (B, 1, H, W) or (B, H, W); a mask is anomalous where not 0.

        Raises:
            ValueError: another shape, or a score that is NaN or infinite; names the image, counted over all updates.
        """

    def compute(self) -> PixelResult:
        """All metrics of all images so far."""

    def curves(self) -> PixelCurves:
        """The curves behind them; empty when only one class of pixel is present."""


class ExactPixelMetrics(Metric):
    """Keeps every score: 8 bytes a pixel, about 30 at the peak of `compute`."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    scores: list[Tensor]  # (pixels,) float32
    region_sizes: list[Tensor]  # (pixels,) int32: pixels of the region a pixel belongs to, 0 outside all regions
    num_regions: Tensor
    num_images: Tensor

    def __init__(self) -> None:
        super().__init__(compute_with_cache=False)  # the cache outlives `merge_state`
        self.add_state("scores", default=[], dist_reduce_fx="cat")
        self.add_state("region_sizes", default=[], dist_reduce_fx="cat")
        self.add_state("num_regions", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("num_images", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, anomaly_map: Tensor, mask: Tensor) -> None:
        """As in `PixelMetrics`."""
        scores, inside = _checked_maps(anomaly_map, mask, int(self.num_images))
        region_sizes, num_regions = _region_sizes(inside)
        self.scores.append(scores.flatten().to(self.device))
        self.region_sizes.append(region_sizes.flatten().to(self.device))
        self.num_regions = self.num_regions + num_regions
        self.num_images = self.num_images + len(scores)

    def compute(self) -> PixelResult:
        """As in `PixelMetrics`."""
        return _result(self._operating_points(), int(self.num_images), int(self.num_regions))

    def curves(self) -> PixelCurves:
        """As in `PixelMetrics`."""
        return _curves(self._operating_points())

    def _operating_points(self) -> "_OperatingPoints":
        return _sorted_points(_joined(self.scores, torch.float32), _joined(self.region_sizes, torch.int32))


class StreamingPixelMetrics(Metric):
    """Keeps three histograms of 2^bits bins, 24 bytes each, however many pixels go in: 24 MiB at 20 bits.

    A bin is a range of float32 patterns, so no range of scores has to be known. At 20 bits a bin is at most 1/2048 of
    its scores wide. Counts are exact: batches, and metrics merged, add up to the same bins.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    normal: Tensor  # (2^bits,) int64, pixels outside all regions
    anomalous: Tensor  # (2^bits,) int64, pixels inside
    overlap: Tensor  # (2^bits,) float64, each inside pixel counts 1 / pixels of its region
    num_regions: Tensor
    num_images: Tensor

    def __init__(self, bits: int = 20) -> None:
        """`bits`: leading bits kept of each score, 10 to 24; 16 suffice for watching a training run.

        Raises:
            ValueError: `bits` is out of range.
        """
        super().__init__(compute_with_cache=False)  # the cache outlives `merge_state`
        if not 10 <= bits <= 24:  # fewer than 9 would split the exponent; more would no longer be bounded memory
            raise ValueError(f"a streaming histogram keeps 10 to 24 bits of each score, found {bits}")
        self.bits = bits
        self.add_state("normal", default=torch.zeros(2**bits, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("anomalous", default=torch.zeros(2**bits, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("overlap", default=torch.zeros(2**bits, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_regions", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("num_images", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, anomaly_map: Tensor, mask: Tensor) -> None:
        """As in `PixelMetrics`."""
        scores, inside = _checked_maps(anomaly_map, mask, int(self.num_images))
        region_sizes, num_regions = _region_sizes(inside)
        bins = _bins(scores, self.bits)
        bins_inside = bins[inside]
        weights = region_sizes[inside].double().reciprocal()
        num_bins = 2**self.bits
        self.normal = self.normal + torch.bincount(bins[~inside], minlength=num_bins).to(self.device)
        self.anomalous = self.anomalous + torch.bincount(bins_inside, minlength=num_bins).to(self.device)
        # Pixel after pixel onto the running sum, so that the rounding does not depend on the batches.
        self.overlap = self.overlap.cpu().index_add(0, bins_inside, weights).to(self.device)
        self.num_regions = self.num_regions + num_regions
        self.num_images = self.num_images + len(scores)

    def compute(self) -> PixelResult:
        """As in `PixelMetrics`."""
        return _result(self._operating_points(), int(self.num_images), int(self.num_regions))

    def curves(self) -> PixelCurves:
        """As in `PixelMetrics`."""
        return _curves(self._operating_points())

    def error_bounds(self) -> PixelBounds:
        """Intervals that hold the exact values for certain; all NaN when only one class of pixel is present."""
        return _bounds(self._operating_points())

    def _operating_points(self) -> "_OperatingPoints":
        normal, anomalous = self.normal.cpu().numpy(), self.anomalous.cpu().numpy()
        occupied = np.flatnonzero(normal + anomalous)[::-1]
        return _OperatingPoints(
            threshold=_from_zero(_just_below(_bin_edges(occupied, self.bits)), np.inf),
            false_positives=_from_zero(np.cumsum(normal[occupied]), 0),
            true_positives=_from_zero(np.cumsum(anomalous[occupied]), 0),
            region_overlap=_from_zero(np.cumsum(self.overlap.cpu().numpy()[occupied]), 0),
        )


def _checked_maps(anomaly_map: Tensor, mask: Tensor, num_before: int) -> tuple[Tensor, Tensor]:
    """Scores (B, H, W) float32 and where they are anomalous (B, H, W) bool, both on the CPU, where labelling is."""
    scores, inside = _without_channel(anomaly_map), _without_channel(mask) != 0
    if scores.shape != inside.shape:
        raise ValueError(f"maps and masks differ in shape: {tuple(anomaly_map.shape)} and {tuple(mask.shape)}")
    scores = scores.detach().float().cpu()
    bad = (~torch.isfinite(scores)).flatten(1).any(dim=1).nonzero()
    if len(bad):
        raise ValueError(
            f"the anomaly map of image {num_before + int(bad[0])} (counted from 0) holds NaN or infinite scores: "
            "they cannot be ranked"
        )
    return scores + 0.0, inside.cpu()  # + 0.0 turns -0.0, equal to 0.0 but of another pattern, into 0.0


def _without_channel(images: Tensor) -> Tensor:
    if images.ndim == 3:
        return images
    if images.ndim != 4 or images.shape[1] != 1:
        raise ValueError(f"maps and masks are (B, 1, H, W) or (B, H, W), found {tuple(images.shape)}")
    return rearrange(images, "b 1 h w -> b h w")


def _region_sizes(inside: Tensor) -> tuple[Tensor, int]:
    """For each pixel the size of its region, 0 outside: (B, H, W) int32; and the number of regions."""
    sizes = np.zeros(inside.shape, dtype=np.int32)
    num_regions = 0
    for size, mask in zip(sizes, inside.numpy(), strict=True):
        if not mask.any():
            continue
        labels, num_labels = ndimage.label(mask, structure=_EIGHT_CONNECTED)
        pixels = np.bincount(labels.ravel()).astype(np.int32)
        pixels[0] = 0  # the background
        size[:] = pixels[labels]
        num_regions += num_labels
    return torch.from_numpy(sizes), num_regions


def _joined(parts: list[Tensor] | Tensor, dtype: torch.dtype) -> NDArray[Any]:
    """A list state, which is one tensor after synchronisation, as one array."""
    tensor = parts if isinstance(parts, Tensor) else torch.cat(parts or [torch.empty(0, dtype=dtype)])
    return tensor.cpu().numpy()


# float32 read as a signed integer is in order but for the negatives, which run backwards: flip their lower 31 bits.
# The map is its own inverse.


def _ordered(pattern: Tensor) -> Tensor:
    ordered: Tensor = pattern ^ ((pattern >> 31) & 0x7FFFFFFF)
    return ordered


def _bins(scores: Tensor, bits: int) -> Tensor:
    return (_ordered(scores.view(torch.int32)) >> (32 - bits)).long() + 2 ** (bits - 1)


def _bin_edges(bins: Integers, bits: int) -> NDArray[np.float32]:
    """The lowest score of each bin."""
    keys = torch.from_numpy((bins - 2 ** (bits - 1)) << (32 - bits)).int()
    edges: NDArray[np.float32] = _ordered(keys).view(torch.float32).numpy()
    return edges


def _just_below(scores: Any) -> Floats:
    """The thresholds, for float32 scores, at which exactly these and higher ones are called anomalous."""
    below: Floats = np.nextafter(scores, np.float32(-np.inf)).astype(np.float64)
    return below


def _from_zero(values: NDArray[Any], first: float) -> NDArray[Any]:
    return np.concatenate([np.array([first], dtype=values.dtype), values])


class _OperatingPoints(NamedTuple):
    """What is called anomalous as the threshold falls; cumulative arrays (P,), from nothing to everything."""

    threshold: Floats
    false_positives: Integers
    true_positives: Integers
    region_overlap: Floats  # summed over regions

    @property
    def one_class_only(self) -> bool:
        return not (self.false_positives[-1] and self.true_positives[-1])


def _sorted_points(scores: NDArray[np.float32], region_sizes: NDArray[np.int32]) -> _OperatingPoints:
    """The corners of the exact curve: just above and at each distinct anomalous score, and the end.

    Between corners only normal pixels come in, so that the curve is straight and no metric needs the points; leaving
    them out saves the permutation of all pixels, which is most of the time and memory.
    """
    inside = region_sizes > 0
    normal = np.sort(scores[~inside])
    order = np.argsort(scores[inside])[::-1]
    ranked = scores[inside][order]  # descending
    overlap = np.cumsum(1.0 / region_sizes[inside][order])
    last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True)) if len(ranked) else order
    distinct = ranked[last]
    above = len(normal) - np.searchsorted(normal, distinct, side="right")
    at = len(normal) - np.searchsorted(normal, distinct, side="left")
    last_threshold = float(_just_below(scores.min())) if len(scores) else _NAN
    return _OperatingPoints(
        threshold=_corners(np.inf, distinct.astype(np.float64), _just_below(distinct), last_threshold),
        false_positives=_corners(0, above, at, len(normal)),
        true_positives=_corners(0, _from_zero(last + 1, 0)[:-1], last + 1, len(ranked)),
        region_overlap=_corners(0.0, _from_zero(overlap[last], 0)[:-1], overlap[last], overlap[-1] if len(last) else 0),
    )


def _corners(start: float, above: NDArray[Any], at: NDArray[Any], end: float) -> NDArray[Any]:
    inner = rearrange(np.stack([above, at]), "side score -> (score side)")
    return np.concatenate([np.array([start], above.dtype), inner, np.array([end], above.dtype)])


def _result(points: _OperatingPoints, num_images: int, num_regions: int) -> PixelResult:
    num_normal, num_anomalous = int(points.false_positives[-1]), int(points.true_positives[-1])
    if points.one_class_only:
        nothing = (_NAN, _NAN, _NAN, _NAN, _NAN, _NAN)
        return PixelResult(*nothing, num_images, num_regions, num_normal, num_anomalous)
    f1_max, oracle_threshold = _f1_max(points)
    return PixelResult(
        auroc=_auroc(points),
        ap=_ap(points),
        f1_max=f1_max,
        oracle_threshold=oracle_threshold,
        aupro_30=_aupro(points, _PRO_LIMIT),
        aupro_05=_aupro(points, _STRICT_PRO_LIMIT),
        num_images=num_images,
        num_regions=num_regions,
        num_normal_pixels=num_normal,
        num_anomalous_pixels=num_anomalous,
    )


def _auroc(points: _OperatingPoints) -> float:
    return float(np.trapezoid(_recall(points), _false_positive_rate(points)))


def _ap(points: _OperatingPoints) -> float:
    return float(np.sum(np.diff(_recall(points)) * _precision(points)[1:]))


def _f1_max(points: _OperatingPoints) -> tuple[float, float]:
    """The maximum and the highest threshold that reaches it."""
    f1 = 2 * points.true_positives / (points.true_positives[-1] + points.true_positives + points.false_positives)
    best = int(np.argmax(f1))
    return float(f1[best]), float(points.threshold[best])


def _aupro(points: _OperatingPoints, limit: float) -> float:
    false_positive_rate, overlap = _false_positive_rate(points), _region_overlap(points)
    num_kept = int(np.searchsorted(false_positive_rate, limit, side="right"))  # the next point lies beyond the limit
    before, after = num_kept - 1, num_kept
    share = (limit - false_positive_rate[before]) / (false_positive_rate[after] - false_positive_rate[before])
    at_limit = overlap[before] + share * (overlap[after] - overlap[before])
    area = np.trapezoid(np.append(overlap[:num_kept], at_limit), np.append(false_positive_rate[:num_kept], limit))
    return float(min(area / limit, 1.0))  # rounding may exceed the 1 of a perfect map


def _recall(points: _OperatingPoints) -> Floats:
    return np.divide(points.true_positives, points.true_positives[-1])


def _false_positive_rate(points: _OperatingPoints) -> Floats:
    return np.divide(points.false_positives, points.false_positives[-1])


def _region_overlap(points: _OperatingPoints) -> Floats:
    return np.divide(points.region_overlap, points.region_overlap[-1])  # the number of regions, up to rounding


def _precision(points: _OperatingPoints) -> Floats:
    """1 where nothing is called anomalous yet, as the curve is drawn everywhere."""
    called = points.true_positives + points.false_positives
    precision = np.ones(len(called))
    np.divide(points.true_positives, called, out=precision, where=called > 0)
    return precision


def _curves(points: _OperatingPoints) -> PixelCurves:
    """At most about `_CURVE_POINTS` points, evenly spaced along the curves; empty when one class is absent."""
    if points.one_class_only:
        return PixelCurves(*[np.empty(0)] * 5)
    curves = PixelCurves(
        threshold=points.threshold,
        false_positive_rate=_false_positive_rate(points),
        recall=_recall(points),
        precision=_precision(points),
        region_overlap=_region_overlap(points),
    )
    travelled = curves.false_positive_rate + curves.recall + curves.region_overlap
    kept = np.searchsorted(travelled, np.linspace(0, travelled[-1], _CURVE_POINTS))
    return PixelCurves(*(curve[np.unique(kept)] for curve in curves))


def _bounds(points: _OperatingPoints) -> PixelBounds:
    if points.one_class_only:
        return PixelBounds(*[Interval(_NAN, _NAN)] * 5)
    auroc_error = float(np.sum(np.diff(_recall(points)) * np.diff(_false_positive_rate(points)))) / 2
    return PixelBounds(
        auroc=_interval(_auroc(points) - auroc_error, _auroc(points) + auroc_error),
        ap=_ap_bounds(points),
        f1_max=_f1_max_bounds(points),
        aupro_30=_aupro_bounds(points, _PRO_LIMIT),
        aupro_05=_aupro_bounds(points, _STRICT_PRO_LIMIT),
    )


def _ap_bounds(points: _OperatingPoints) -> Interval:
    """Each bin's anomalous pixels after all its normal ones, or before them."""
    tp, fp = points.true_positives, points.false_positives
    gain = np.diff(_recall(points))
    worst = (tp[:-1] + 1) / (tp[:-1] + 1 + fp[1:])  # of the first anomalous pixel, if there is one
    best = tp[1:] / np.maximum(tp[1:] + fp[:-1], 1)
    return _interval(float(np.sum(gain * worst)), float(np.sum(gain * best)))


def _f1_max_bounds(points: _OperatingPoints) -> Interval:
    tp, fp = points.true_positives, points.false_positives
    best = 2 * tp[1:] / (tp[-1] + tp[1:] + fp[:-1])  # all anomalous pixels of the bin before its normal ones
    return _interval(_f1_max(points)[0], float(best.max()))


def _aupro_bounds(points: _OperatingPoints, limit: float) -> Interval:
    """The bin that holds the limit counts in full, which covers the interpolation."""
    rate = _false_positive_rate(points)
    boxes = np.diff(rate) * np.diff(_region_overlap(points))
    error = float(np.sum(boxes[rate[:-1] < limit])) / (2 * limit)
    value = _aupro(points, limit)
    return _interval(value - error, value + error)


def _interval(low: float, high: float) -> Interval:
    return Interval(max(low - _ROUNDING, 0.0), min(high + _ROUNDING, 1.0))


# ---- into JSON -----------------------------------------------------------------------------------------------------


def as_json(result: Any) -> Any:
    """Results, however nested in mappings and sequences, as what JSON can hold: fields by name, None for NaN."""
    if isinstance(result, float):
        return None if math.isnan(result) else result
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        return {field.name: as_json(getattr(result, field.name)) for field in dataclasses.fields(result)}
    if isinstance(result, tuple) and hasattr(result, "_asdict"):
        return as_json(result._asdict())
    if isinstance(result, Mapping):
        return {name: as_json(value) for name, value in result.items()}
    if isinstance(result, Iterable) and not isinstance(result, str):
        return [as_json(value) for value in result]
    return result
