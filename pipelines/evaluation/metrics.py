"""How good a detector is: by image, by pixel and by region, and the threshold that needs no anomaly.

Source: the protocol of MVTec AD (Bergmann et al., IJCV 129, 2021): everything is computed per category over the pooled
test images, good ones included, and categories are averaged with equal weight. AUPRO follows the reference evaluation:
8-connected regions of equal weight, one sort of all scores, equal scores merged.

Two implementations of the pixel metrics lead to the same curve, whose figures are in `curves`. `ExactPixelMetrics`
keeps and sorts all scores; `StreamingPixelMetrics` keeps a histogram whose bins follow the scores (`histogram`).

Deliberate differences from common code: scores are never passed through a sigmoid, rescaled or clipped (torchmetrics
does the first by default, batch by batch); a metric that needs a class which is absent is NaN, not 0 or 1; a threshold
taken from the test labels is called the oracle threshold. There is one decision rule: anomalous if score > threshold.
"""

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from pipelines.evaluation.curves import PRO_LIMITS, Curve, Floats, image_curve, last_of_equals
from pipelines.evaluation.histogram import REGION, Counts, Histogram, Ranges, scores_of
from pipelines.evaluation.outcomes import Confusion
from pipelines.evaluation.regions import Pixels, Regions

_NAN = float("nan")
_PIXELS_AT_ONCE = 2**20
_CURVE_POINTS = 2000  # enough for a figure; an exact curve may have millions


# ---- by image ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ImageResult:
    """NaN throughout when only one class is present."""

    auroc: float
    ap: float  # the step function, not the trapezoid
    f1_max: float  # an oracle number: its threshold comes from the labels it is judged by
    oracle_threshold: float  # just below a score, as a float32, which is what models give
    num_normal: int
    num_anomalous: int

    @property
    def figures(self) -> dict[str, float]:
        """As an evaluation names them."""
        return {"image_auroc": self.auroc, "image_ap": self.ap, "image_f1_max": self.f1_max}


@dataclass(frozen=True, slots=True)
class DefectRecall:
    """How many images of one defect type are called anomalous."""

    num_images: int
    recall: float


def image_metrics(scores: Tensor, labels: Tensor) -> ImageResult:
    """Judge image scores (N,), any real scale, by labels (N,), anomalous where not 0.

    Raises:
        ValueError: the shapes differ, or a score is NaN or infinite.
    """
    scores, labels = checked_image_scores(scores, labels)
    distinct, curve = image_curve(scores.numpy(), labels.numpy())
    f1_max, oracle_threshold = _f1_max(curve, _from_zero(_just_below(distinct.astype(np.float32)), np.inf))
    return ImageResult(
        auroc=float(curve.auroc()),
        ap=float(curve.ap()),
        f1_max=f1_max,
        oracle_threshold=oracle_threshold,
        num_normal=int((~labels).sum()),
        num_anomalous=int(labels.sum()),
    )


def confusion_at(scores: Tensor, labels: Tensor, threshold: float) -> Confusion:
    """Count the four outcomes of "anomalous if score > threshold" for scores (N,) and labels (N,).

    Raises:
        ValueError: the shapes differ, or a score is NaN or infinite.
    """
    scores, labels = checked_image_scores(scores, labels)
    called = scores > threshold
    return Confusion(
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
    return {name: DefectRecall(len(hits), sum(hits) / len(hits)) for name, hits in sorted(found.items())}


def checked_image_scores(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ValueError(
            f"image scores and labels are both (N,), found {tuple(scores.shape)} and {tuple(labels.shape)}"
        )
    scores = scores.detach().cpu().double()
    bad = (~torch.isfinite(scores)).nonzero()
    if len(bad):
        index = int(bad[0])
        raise ValueError(f"the score of image {index} (counted from 0) is {float(scores[index])}: scores are finite")
    return scores, labels.detach().cpu() != 0


def _f1_max(curve: Curve, threshold: Floats) -> tuple[float, float]:
    """The maximum and the highest threshold (P,) that reaches it."""
    f1 = curve.f1()
    best = int(np.argmax(f1))
    return float(f1[best]), _NAN if math.isnan(f1[best]) else float(threshold[best])


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

    @property
    def figures(self) -> dict[str, float]:
        """As an evaluation names them."""
        return self.ranked | {"aupro_30": self.aupro_30, "aupro_05": self.aupro_05}

    @property
    def ranked(self) -> dict[str, float]:
        """Those that know nothing of regions."""
        return {"pixel_auroc": self.auroc, "pixel_ap": self.ap, "pixel_f1_max": self.f1_max}


class PixelCurves(NamedTuple):
    """ROC, precision-recall and PRO at shared thresholds, strictest first, thinned for drawing; arrays (P,)."""

    threshold: Floats  # the first is infinite: nothing is called anomalous
    false_positive_rate: Floats
    recall: Floats
    precision: Floats
    region_overlap: Floats


@dataclass(frozen=True, slots=True)
class OperatingPoints:
    """A curve over pixels with what it was made of."""

    threshold: Floats  # (P,)
    curve: Curve
    num_images: int
    num_regions: int

    def result(self) -> PixelResult:
        f1_max, oracle_threshold = _f1_max(self.curve, self.threshold)
        return PixelResult(
            auroc=float(self.curve.auroc()),
            ap=float(self.curve.ap()),
            f1_max=f1_max,
            oracle_threshold=oracle_threshold,
            **{name: float(self.curve.aupro(limit)) for name, limit in PRO_LIMITS.items()},
            num_images=self.num_images,
            num_regions=self.num_regions,
            num_normal_pixels=int(self.curve.false_positives[-1]),
            num_anomalous_pixels=int(self.curve.true_positives[-1]),
        )

    def curves(self) -> PixelCurves:
        """At most about `_CURVE_POINTS` points, evenly spaced along the curves; empty when one class is absent."""
        curve = self.curve
        rate, recall, overlap = curve.false_positive_rate, curve.recall, curve.mean_overlap
        if math.isnan(rate[-1]):
            return PixelCurves(*[np.empty(0)] * 5)
        travelled = rate + recall + overlap
        kept = np.unique(np.searchsorted(travelled, np.linspace(0, travelled[-1], _CURVE_POINTS)))
        return PixelCurves(self.threshold[kept], rate[kept], recall[kept], curve.precision[kept], overlap[kept])


class PixelMetrics(Metric):
    """Feed maps and masks in any split, then ask."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    num_regions: Tensor
    num_images: Tensor

    def __init__(self) -> None:
        super().__init__(compute_with_cache=False)  # the cache outlives `merge_state`
        for name in ("num_regions", "num_images"):
            self.add_state(name, default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, anomaly_map: Tensor, mask: Tensor) -> None:
        """Add maps and masks, both (B, 1, H, W) or (B, H, W); a mask is anomalous where not 0.

        Raises:
            ValueError: another shape, or a score that is NaN or infinite; names the image, counted over all updates.
        """
        self.add(_split(anomaly_map, mask, int(self.num_images)))

    def compute(self) -> PixelResult:
        """All metrics of all images so far."""
        return self.operating_points().result()

    @abstractmethod
    def add(self, images: Iterable[Pixels]) -> None:
        """Add images one by one, of any sizes."""

    @abstractmethod
    def operating_points(self) -> OperatingPoints:
        """The curve of all images so far."""


class ExactPixelMetrics(PixelMetrics):
    """Keeps every score: 4 bytes a pixel, about 11 at the peak of `compute`."""

    normal: list[Tensor]  # (pixels outside all regions,) float32
    anomalous: list[Tensor]  # (pixels inside,) float32
    weights: list[Tensor]  # (pixels inside,) float64: what each adds to the overlap of its region

    def __init__(self) -> None:
        super().__init__()
        for name in ("normal", "anomalous", "weights"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def add(self, images: Iterable[Pixels]) -> None:
        for image in images:
            self.normal.append(torch.from_numpy(image.normal).to(self.device))
            self.anomalous.append(torch.from_numpy(image.anomalous).to(self.device))
            self.weights.append(torch.from_numpy(image.weights).to(self.device))
            self.num_regions = self.num_regions + image.num_regions
            self.num_images = self.num_images + 1

    def operating_points(self) -> OperatingPoints:
        parts = _joined(self.normal, np.float32), _joined(self.anomalous, np.float32)
        threshold, curve = _sorted_points(*parts, _joined(self.weights, np.float64))
        return OperatingPoints(threshold, curve, int(self.num_images), int(self.num_regions))


class StreamingPixelMetrics(PixelMetrics):
    """Keeps a histogram of at most 2^bits bins, 32 bytes each, however many pixels go in: 32 MiB at 20 bits.

    The bins follow the scores, so that no range of scores has to be known: see `histogram`. At 20 bits a bin is at most
    1/2048 of its scores wide, and a single score where these are few. Batches, and metrics merged, add up to the same
    bins.
    """

    low: Tensor  # (pages,) int64, as Ranges
    high: Tensor
    keys: Tensor  # (B,) int64, as Counts
    normal: Tensor
    anomalous: Tensor
    overlap: Tensor

    def __init__(self, bits: int = 20) -> None:
        """`bits`: 10 to 24; 16 suffice for watching a training run.

        Raises:
            ValueError: `bits` is out of range.
        """
        super().__init__()
        if not 10 <= bits <= 24:  # fewer would split the exponent; more would no longer be bounded memory
            raise ValueError(f"a streaming histogram keeps 10 to 24 bits of each score, found {bits}")
        self.bits = bits
        for name, reduction, keys in zip(Ranges._fields, ("min", "max"), Ranges.empty(bits), strict=True):
            self.add_state(name, default=torch.from_numpy(keys), dist_reduce_fx=reduction)
        for name in Counts._fields:
            self.add_state(name, default=torch.zeros(0, dtype=torch.int64), dist_reduce_fx="cat")

    def add(self, images: Iterable[Pixels]) -> None:
        histogram = self._histogram()
        for batch in _batches(images):
            histogram.add(batch)
            self.num_regions = self.num_regions + sum(image.num_regions for image in batch)
            self.num_images = self.num_images + len(batch)
        self._keep(histogram)

    def merge_state(self, incoming_state: "dict[str, Any] | Metric") -> None:
        super().merge_state(incoming_state)
        self._keep(self._histogram())

    def operating_points(self) -> OperatingPoints:
        counts = Counts(*(count[::-1] for count in self._histogram().counts()))
        threshold = _from_zero(_just_below(scores_of(counts.keys)), np.inf)
        curve = Curve.of(counts.normal, counts.anomalous, counts.overlap / REGION)
        return OperatingPoints(threshold, curve, int(self.num_images), int(self.num_regions))

    def _histogram(self) -> Histogram:
        ranges, counts = ([getattr(self, name).cpu().numpy() for name in kind._fields] for kind in (Ranges, Counts))
        return Histogram(self.bits, Ranges(*ranges), Counts(*counts))

    def _keep(self, histogram: Histogram) -> None:
        for kept in (histogram.ranges, histogram.counts()):
            for name, value in kept._asdict().items():
                setattr(self, name, torch.from_numpy(value).to(self.device))


def _batches(images: Iterable[Pixels]) -> Iterator[list[Pixels]]:
    """Together as many pixels as make the bins worth laying out."""
    batch: list[Pixels] = []
    for image in images:
        batch.append(image)
        if sum(len(each.normal) + len(each.anomalous) for each in batch) >= _PIXELS_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


def _split(anomaly_map: Tensor, mask: Tensor, num_before: int) -> list[Pixels]:
    """Of each image of a batch; on the CPU, where labelling is."""
    maps, masks = _without_channel(anomaly_map), _without_channel(mask)
    if maps.shape != masks.shape:
        raise ValueError(f"maps and masks differ in shape: {tuple(anomaly_map.shape)} and {tuple(mask.shape)}")
    images = zip(maps.detach().float().cpu().numpy(), (masks != 0).cpu().numpy(), strict=True)
    return [
        Regions.of(inside).split(scores, f"image {number} (counted from 0)")
        for number, (scores, inside) in enumerate(images, num_before)
    ]


def _without_channel(images: Tensor) -> Tensor:
    if images.ndim == 3:
        return images
    if images.ndim != 4 or images.shape[1] != 1:
        raise ValueError(f"maps and masks are (B, 1, H, W) or (B, H, W), found {tuple(images.shape)}")
    return rearrange(images, "b 1 h w -> b h w")


def _joined(parts: list[Tensor] | Tensor, dtype: type) -> NDArray[Any]:
    """A list state, which is one tensor after synchronisation, as one new array."""
    tensors = [parts] if isinstance(parts, Tensor) else parts
    return np.concatenate([np.empty(0, dtype), *(tensor.cpu().numpy() for tensor in tensors)])


def _just_below(scores: Any) -> Floats:
    """The thresholds, for float32 scores, at which exactly these and higher ones are called anomalous."""
    below: Floats = np.nextafter(scores, np.float32(-np.inf)).astype(np.float64)
    return below


def _from_zero(values: NDArray[Any], first: float) -> NDArray[Any]:
    return np.concatenate([np.array([first], dtype=values.dtype), values])


def _sorted_points(
    normal: NDArray[np.float32], anomalous: NDArray[np.float32], weights: Floats
) -> tuple[Floats, Curve]:
    """Thresholds and corners of the exact curve: just above and at each distinct anomalous score, and the end.

    Between corners only normal pixels come in, so that the curve is straight and no metric needs the points; leaving
    them out saves the permutation of all pixels, which is most of the time and memory. `normal` is sorted in place.
    """
    normal.sort()
    order = np.argsort(anomalous)[::-1]
    ranked = anomalous[order]  # descending
    overlap = np.cumsum(weights[order])
    last = last_of_equals(ranked)
    distinct = ranked[last]
    above = len(normal) - np.searchsorted(normal, distinct, side="right")
    at = len(normal) - np.searchsorted(normal, distinct, side="left")
    lowest = np.float32(min([*normal[:1], *ranked[-1:]], default=0))
    curve = Curve(
        false_positives=_corners(0, above, at, len(normal)),
        true_positives=_corners(0, _from_zero(last + 1, 0)[:-1], last + 1, len(ranked)),
        region_overlap=_corners(0, _from_zero(overlap[last], 0)[:-1], overlap[last], overlap[-1] if len(last) else 0),
    )
    return _corners(np.inf, distinct, _just_below(distinct), float(_just_below(lowest))), curve


def _corners(start: float, above: NDArray[Any], at: NDArray[Any], end: float) -> Floats:
    inner = rearrange(np.stack([above, at]), "side score -> (score side)")
    return np.concatenate([[start], inner, [end]]).astype(np.float64)


# ---- into JSON -----------------------------------------------------------------------------------------------------


def known(value: float | None) -> float | None:
    """None for NaN, which JSON does not have."""
    return None if value is None or math.isnan(value) else value
