"""The metrics against hand cases, scikit-learn and a literal reference, and the acceptance facts of the protocol."""

import math
import statistics
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from torch import Tensor
from torchmetrics.classification import BinaryAUROC, BinaryAveragePrecision

from pipelines.evaluation.histogram import REGION, scores_of
from pipelines.evaluation.metrics import (
    DefectRecall,
    ExactPixelMetrics,
    ImageResult,
    PixelCurves,
    PixelMetrics,
    PixelResult,
    StreamingPixelMetrics,
    confusion_at,
    image_metrics,
    known,
    recall_by_defect_type,
)
from pipelines.evaluation.outcomes import Confusion

IMPLEMENTATIONS = {"exact": ExactPixelMetrics, "streaming": StreamingPixelMetrics}
RANKED = ("auroc", "ap", "f1_max", "aupro_30", "aupro_05")


@pytest.fixture(params=IMPLEMENTATIONS)
def make(request):
    return IMPLEMENTATIONS[request.param]


def measured(metrics: PixelMetrics, anomaly_map: Tensor, mask: Tensor) -> PixelResult:
    metrics.update(anomaly_map, mask)
    return metrics.compute()


def curves_of(metrics: PixelMetrics, anomaly_map: Tensor, mask: Tensor) -> PixelCurves:
    metrics.update(anomaly_map, mask)
    return metrics.operating_points().curves()


def assert_as_scikit_learn(result: PixelResult | ImageResult, target: Any, scores: Any) -> None:
    precision, recall, _ = precision_recall_curve(target, scores)
    assert result.auroc == pytest.approx(roc_auc_score(target, scores), abs=1e-12)
    assert result.ap == pytest.approx(average_precision_score(target, scores), abs=1e-12)
    assert result.f1_max == pytest.approx(np.max(2 * precision * recall / (precision + recall)), abs=1e-12)


def random_case(seed: int, num_images: int = 6, side: int = 48, kind: str = "lognormal") -> tuple[Tensor, Tensor]:
    """Maps (B, 1, H, W) that see the regions only in part; a third of the images are good."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=(num_images, side, side)), sigma=(0, 2, 2))
    mask = smooth > np.quantile(smooth, 0.93)
    mask[::3] = False
    scores = rng.normal(size=mask.shape) + 1.2 * mask
    if kind == "lognormal":
        scores = np.exp(scores)
    if kind == "ties":
        scores = np.round(scores)
    return torch.from_numpy(scores).float()[:, None], torch.from_numpy(mask)[:, None]


def reference_aupro(anomaly_map: Tensor, mask: Tensor, limit: float) -> float:
    """The pseudo-code of the protocol, word by word."""
    weights, num_regions = [], 0
    for image in mask.squeeze(1).numpy():
        labels, num_labels = ndimage.label(image, np.ones((3, 3)))
        num_regions += num_labels
        sizes = np.bincount(labels.ravel()).astype(float)
        weights.append(np.where(labels > 0, 1 / sizes[labels], 0))
    scores, w = anomaly_map.numpy().ravel().astype(np.float64), np.concatenate(weights).ravel()
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)
    fpr = np.append(0, np.cumsum((w == 0)[order])[last] / (w == 0).sum())
    pro = np.append(0, np.cumsum(w[order])[last] / num_regions)
    kept = fpr <= limit
    at_limit = np.interp(limit, fpr, pro)
    return float(np.trapezoid(np.append(pro[kept], at_limit), np.append(fpr[kept], limit)) / limit)


# ---- hand cases --------------------------------------------------------------------------------------------------


def test_aupro_on_a_four_by_four_mask(make):
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]])[None]
    scores = torch.tensor([[9.0, 5.0, 0, 0], [7.0, 0, 0, 0], [0, 6.0, 4.0, 0], [0, 0, 0, 8.0]])[None]
    result = measured(make(), scores, mask)
    # 13 normal pixels, three of them above 0, and two regions. Strictest first: half of the first region, the second
    # region (PRO 0.75); a false alarm (1/13) and another (2/13); the rest of the first region (PRO 1); false alarm.
    assert result.aupro_30 == pytest.approx((0.75 * 2 / 13 + 1.0 * (0.3 - 2 / 13)) / 0.3)
    assert result.aupro_05 == pytest.approx(0.75)
    assert result.auroc == pytest.approx((2 + 11 / 13) / 3)
    assert result.ap == pytest.approx((1 + 1 + 3 / 5) / 3)
    assert result.f1_max == pytest.approx(2 * 2 / (2 * 2 + 0 + 1))
    assert (result.num_images, result.num_regions) == (1, 2)
    assert (result.num_normal_pixels, result.num_anomalous_pixels) == (13, 3)


def test_pixels_that_touch_at_a_corner_are_one_region(make):
    mask = torch.zeros(1, 4, 4)
    mask[0, 1, 1] = mask[0, 2, 2] = 1
    assert measured(make(), torch.zeros(1, 4, 4), mask).num_regions == 1


def test_regions_of_different_images_are_different(make):
    assert measured(make(), torch.zeros(3, 4, 4), torch.ones(3, 4, 4).triu()).num_regions == 3


def test_every_region_weighs_the_same(make):
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 0:20, 0:50] = 1  # 1000 pixels, fully found
    mask[..., 60, 0:10] = 1  # 10 pixels, fully missed
    scores = torch.zeros(1, 1, 64, 64)
    scores[..., 0:20, 0:50] = 1
    curves = curves_of(make(), scores, mask)
    strict = int(np.flatnonzero(curves.recall > 0)[0])
    assert curves.region_overlap[strict] == pytest.approx(0.5)
    assert curves.recall[strict] == pytest.approx(1000 / 1010)
    assert curves.false_positive_rate[strict] == 0


def test_a_ring_with_an_unfound_hole_does_not_exceed_one(make):
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    radius = torch.hypot(y - 16, x - 16)
    ring = ((radius > 5) & (radius < 10))[None]
    result = measured(make(), ring.float(), ring)
    assert result.num_regions == 1
    assert result.aupro_30 == 1
    assert measured(make(), (radius < 10).float()[None], ring).aupro_30 < 1


# ---- anchors -----------------------------------------------------------------------------------------------------


def many_regions(num_images: int = 10, side: int = 256) -> Tensor:
    mask = torch.zeros(num_images, 1, side, side)
    for top in range(8, side - 16, 40):
        for left in range(8, side - 16, 40):
            mask[..., top : top + 3 + top % 9, left : left + 4 + left % 7] = 1
    return mask


def test_anchors_of_aupro(make):
    mask = many_regions()
    assert measured(make(), mask, mask).aupro_30 == 1
    assert measured(make(), -mask, mask).aupro_30 == 0
    assert measured(make(), torch.full_like(mask, 7.0), mask).aupro_30 == pytest.approx(0.15)
    assert measured(make(), torch.full_like(mask, -7.0), mask).aupro_05 == pytest.approx(0.025)
    uniform = torch.rand(mask.shape, generator=torch.Generator().manual_seed(0))
    assert measured(make(), uniform, mask).aupro_30 == pytest.approx(0.15, abs=0.01)


@pytest.mark.parametrize("kind", ["normal", "lognormal", "ties"])
@pytest.mark.parametrize("limit", [0.3, 0.05])
def test_exact_aupro_equals_the_reference(kind, limit):
    scores, mask = random_case(seed=1, kind=kind)
    result = measured(ExactPixelMetrics(), scores, mask)
    value = {0.3: result.aupro_30, 0.05: result.aupro_05}[limit]
    assert value == pytest.approx(reference_aupro(scores, mask, limit), abs=1e-12)


@pytest.mark.parametrize("kind", ["normal", "lognormal", "ties"])
def test_exact_pixel_metrics_equal_scikit_learn(kind):
    scores, mask = random_case(seed=2, kind=kind)
    result = measured(ExactPixelMetrics(), scores, mask)
    assert_as_scikit_learn(result, mask.flatten().numpy(), scores.flatten().numpy())


def test_image_metrics_equal_scikit_learn_and_torchmetrics():
    rng = np.random.default_rng(3)
    labels = rng.random(167) < 0.8
    scores = (rng.normal(size=167) + labels).astype(np.float32)
    result = image_metrics(torch.from_numpy(scores), torch.from_numpy(labels))
    assert_as_scikit_learn(result, labels, scores)
    both = torch.from_numpy(scores), torch.from_numpy(labels).long()
    assert result.auroc == pytest.approx(float(BinaryAUROC(normalization=None)(*both)), abs=1e-6)
    assert result.ap == pytest.approx(float(BinaryAveragePrecision(normalization=None)(*both)), abs=1e-6)
    assert (result.num_normal, result.num_anomalous) == (int((~labels).sum()), int(labels.sum()))


# ---- invariance --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "transform",
    [
        lambda scores: scores.double().exp().float(),
        lambda scores: scores**3,
        lambda scores: scores.unique(return_inverse=True)[1].float(),
        lambda scores: 98 + scores,
        lambda scores: 1e-20 * scores,
    ],
    ids=["exp", "cube", "rank", "near-98", "tiny"],
)
def test_increasing_transforms_change_nothing(transform):
    scores, mask = random_case(seed=4, kind="normal")
    scores = scores.mul(64).round().div(64)  # distinct scores must stay distinct in float32
    before, after = (measured(ExactPixelMetrics(), s, mask) for s in (scores, transform(scores)))
    for name in RANKED:
        assert getattr(before, name) == getattr(after, name)
    labels, image_scores = torch.arange(100) % 3 == 0, scores.flatten()[:100]
    before, after = (image_metrics(s, labels) for s in (image_scores, transform(image_scores)))
    assert (before.auroc, before.ap, before.f1_max) == (after.auroc, after.ap, after.f1_max)


def test_scores_near_98_are_not_saturated_by_a_sigmoid(make):
    scores, labels = torch.tensor([98.0, 98.1, 98.2, 98.3]), torch.tensor([0, 0, 1, 1])
    result = image_metrics(scores, labels)
    assert (result.auroc, result.ap, result.f1_max) == (1, 1, 1)
    assert measured(make(), scores.reshape(1, 2, 2), labels.reshape(1, 2, 2)).auroc == 1


def test_batches_of_different_scale_are_not_mixed_up(make):
    """One batch within [0, 1] and one outside: the case that the default of torchmetrics gets wrong."""
    metrics = make()
    metrics.update(torch.tensor([[[0.9, 0.2]]]), torch.tensor([[[1, 0]]]))
    metrics.update(torch.tensor([[[3.0, 2.0]]]), torch.tensor([[[1, 0]]]))
    assert metrics.compute().auroc == 0.75


@pytest.mark.parametrize("sizes", [[6], [1] * 6, [4, 2], [1, 3, 2]])
def test_batching_changes_nothing(make, sizes):
    scores, mask = random_case(seed=5)
    whole, split = make(), make()
    whole.update(scores, mask)
    for part_scores, part_mask in zip(scores.split(sizes), mask.split(sizes), strict=True):
        split.update(part_scores, part_mask)
    assert split.compute() == whole.compute()
    if isinstance(whole, StreamingPixelMetrics):
        for name in ("normal", "anomalous", "overlap"):
            assert torch.equal(getattr(split, name), getattr(whole, name))


def test_two_metrics_merged_equal_one(make):
    scores, mask = random_case(seed=6)
    whole, first, second = make(), make(), make()
    whole.update(scores, mask)
    first.update(scores[:2], mask[:2])
    second.update(scores[2:], mask[2:])
    first.compute()  # what was computed before the merge must not come back after it
    first.merge_state(second)
    merged, expected = first.compute(), whole.compute()
    assert merged[5:] == expected[5:]
    assert [getattr(merged, name) for name in RANKED] == pytest.approx([getattr(expected, name) for name in RANKED])
    if isinstance(first, StreamingPixelMetrics):
        assert torch.equal(first.normal, whole.normal)
        assert torch.equal(first.anomalous, whole.anomalous)
        assert torch.equal(first.overlap, whole.overlap)


def test_shapes_and_dtypes_of_the_input_do_not_matter(make):
    scores, mask = random_case(seed=7)
    expected = measured(make(), scores, mask)
    assert measured(make(), scores[:, 0], mask[:, 0]) == expected
    assert measured(make(), scores.double(), mask.float()) == expected
    assert measured(make(), scores, mask.to(torch.uint8) * 255) == expected
    assert measured(make(), scores.requires_grad_(), mask) == expected


def test_updates_in_and_out_of_inference_mode_mix(make):
    scores, mask = random_case(seed=17)
    metrics = make()
    with torch.inference_mode():
        metrics.update(scores[:3], mask[:3])
    metrics.update(scores[3:], mask[3:])
    assert metrics.compute() == measured(make(), scores, mask)


def test_good_images_change_the_false_positive_rate_and_not_the_overlap(make):
    scores, mask = random_case(seed=8, kind="ties")
    defective = mask.flatten(1).any(dim=1)
    with_good, without = make(), make()
    a, b = curves_of(with_good, scores, mask), curves_of(without, scores[defective], mask[defective])
    assert a.region_overlap[1:-1].tolist() == pytest.approx(b.region_overlap[-len(a.region_overlap) + 1 : -1].tolist())
    first, second = with_good.compute(), without.compute()
    assert first.num_regions == second.num_regions
    assert first.num_normal_pixels > second.num_normal_pixels
    assert first.aupro_30 != second.aupro_30


# ---- what is refused, and what is NaN ----------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_cannot_be_ranked_name_their_image(make, bad):
    metrics = make()
    metrics.update(torch.zeros(3, 1, 4, 4), torch.ones(3, 1, 4, 4).triu())
    before = metrics.compute()
    maps = torch.zeros(4, 1, 4, 4)
    maps[2, 0, 1, 1] = bad
    with pytest.raises(ValueError, match="anomaly map of image 5 "):
        metrics.update(maps, torch.zeros(4, 1, 4, 4))
    assert metrics.compute() == before
    with pytest.raises(ValueError, match="score of image 1 "):
        image_metrics(torch.tensor([0.0, bad, 1.0]), torch.tensor([0, 1, 1]))


def test_shapes_that_do_not_fit_are_refused(make):
    with pytest.raises(ValueError, match="differ in shape"):
        make().update(torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 5))
    with pytest.raises(ValueError, match=r"found \(2, 3, 4, 4\)"):
        make().update(torch.zeros(2, 3, 4, 4), torch.zeros(2, 1, 4, 4))
    with pytest.raises(ValueError, match=r"both \(N,\), found \(2,\) and \(3,\)"):
        image_metrics(torch.zeros(2), torch.zeros(3))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_one_class_only_is_nan(make, value):
    result = measured(make(), torch.rand(2, 4, 4), torch.full((2, 4, 4), value))
    assert all(math.isnan(getattr(result, name)) for name in (*RANKED, "oracle_threshold"))
    assert result.num_regions == 2 * value
    image = image_metrics(torch.rand(5), torch.full((5,), value))
    assert all(math.isnan(value) for value in (image.auroc, image.ap, image.f1_max, image.oracle_threshold))
    assert (image.num_normal, image.num_anomalous) == ((5, 0), (0, 5))[int(value)]
    assert all(len(curve) == 0 for curve in curves_of(make(), torch.rand(2, 4, 4), torch.full((2, 4, 4), value)))


def test_nothing_at_all_is_nan(make):
    result = measured(make(), torch.rand(0, 1, 4, 4), torch.zeros(0, 1, 4, 4))
    assert math.isnan(result.auroc)
    assert result.num_images == 0


# ---- oracle thresholds and curves --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["normal", "lognormal", "ties"])
def test_the_oracle_threshold_reaches_f1_max(make, kind):
    scores, mask = random_case(seed=9, kind=kind)
    result = measured(make(), scores, mask)
    assert confusion_at(scores.flatten(), mask.flatten(), result.oracle_threshold).f1 == pytest.approx(result.f1_max)
    image_scores, labels = scores.flatten()[:150], torch.arange(150) % 4 == 0
    image = image_metrics(image_scores, labels)
    assert confusion_at(image_scores, labels, image.oracle_threshold).f1 == image.f1_max


def test_equal_scores_of_all_images_tell_nothing():
    result = image_metrics(torch.full((5,), 2.0), torch.tensor([0, 1, 0, 1, 1]))
    assert (result.auroc, result.ap) == (0.5, 0.6)
    assert result.f1_max == 2 * 3 / (2 * 3 + 2)
    assert 2.0 > result.oracle_threshold == pytest.approx(2.0)


def test_a_score_of_minus_zero_is_zero(make):
    scores, mask = torch.tensor([[[-0.0, 0.0, 0.0, -1.0]]]), torch.tensor([[[1, 1, 0, 0]]])
    result = measured(make(), scores, mask)
    assert result.auroc == pytest.approx(0.75)
    assert result.f1_max == pytest.approx(0.8)
    assert confusion_at(scores.flatten(), mask.flatten(), result.oracle_threshold).f1 == pytest.approx(0.8)


def test_curves_are_monotone_whole_and_true_to_their_thresholds(make):
    scores, mask = random_case(seed=10, num_images=12)
    metrics = make()
    curves = curves_of(metrics, scores, mask)
    assert len({len(curve) for curve in curves}) == 1
    assert len(curves.recall) <= 2000
    for rate in (curves.false_positive_rate, curves.recall, curves.region_overlap):
        assert (rate[0], rate[-1]) == (0, 1)
        assert (np.diff(rate) >= 0).all()
    assert (np.diff(curves.threshold) < 0).all()
    middle = len(curves.recall) // 2
    counts = confusion_at(scores.flatten(), mask.flatten(), float(curves.threshold[middle]))
    assert curves.recall[middle] == pytest.approx(counts.true_positives / int(mask.sum()))
    assert curves.false_positive_rate[middle] == pytest.approx(counts.false_positives / int((~mask).sum()))
    area = np.trapezoid(curves.recall, curves.false_positive_rate)
    assert area == pytest.approx(metrics.compute().auroc, abs=1e-3)


# ---- streaming against exact -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["normal", "lognormal"])
def test_twenty_bits_are_within_a_hundred_thousandth(kind):
    scores, mask = random_case(seed=12, num_images=12, side=256, kind=kind)
    exact = measured(ExactPixelMetrics(), scores, mask)
    binned = measured(StreamingPixelMetrics(), scores, mask)
    for name in ("auroc", "aupro_30", "aupro_05"):
        assert getattr(binned, name) == pytest.approx(getattr(exact, name), abs=1e-5)
    for name in ("ap", "f1_max"):
        assert getattr(binned, name) == pytest.approx(getattr(exact, name), abs=1e-3)


def any_floats(seed: int, number: int) -> Tensor:
    """Of any size up to 1e38, from their bits."""
    patterns = np.random.default_rng(seed).integers(0, 2**32, number, dtype=np.uint32)
    scores = torch.from_numpy(patterns.view(np.float32).copy())
    return torch.where(scores.abs() < 1e38, scores, 1.0)


BANDS = [
    *((offset, 1e-4) for offset in (98.0, -98.0, 1.0, -1.0, 0.0, 1e-3)),
    *((offset, 1e-6) for offset in (98.0, 0.5, -0.5)),
    *((offset, 1.0) for offset in (98.0, -1e6, 1e7)),
    (98.0, 0.05),
    (1.0, 1e-2),
    (2.0, 1e-3),  # on both sides of a power of two
]


def assert_close_to_exact(exact: PixelResult, binned: PixelResult) -> None:
    for name in ("auroc", "aupro_30", "aupro_05"):
        assert getattr(binned, name) == pytest.approx(getattr(exact, name), abs=3e-6)
    for name in ("ap", "f1_max"):
        assert getattr(binned, name) == pytest.approx(getattr(exact, name), abs=1e-4)


@pytest.mark.parametrize(("offset", "width"), BANDS)
def test_a_narrow_band_is_as_good_as_a_wide_one(offset, width):
    scores, mask = random_case(seed=18, num_images=12, kind="normal")
    scores = (offset + width * scores.double() / 5).float()
    assert_close_to_exact(measured(ExactPixelMetrics(), scores, mask), measured(StreamingPixelMetrics(), scores, mask))


@pytest.mark.parametrize("where", ["zeros", "anywhere in [0, 1]", "of any size up to 1"])
@pytest.mark.parametrize("band", [98.0, -98.0])
def test_a_narrow_band_keeps_its_bins_whatever_else_there_is(where, band):
    scores, mask = random_case(seed=19, num_images=12, side=96, kind="normal")
    scores = (band + 1e-4 * scores.double()).float()
    others = {
        "zeros": torch.zeros(scores[:6].numel()),
        "anywhere in [0, 1]": torch.rand(scores[:6].numel(), generator=torch.Generator().manual_seed(0)),
        "of any size up to 1": torch.rand(scores[:6].numel(), generator=torch.Generator().manual_seed(0)) ** 8,
    }
    scores[:6] = others[where].reshape(scores[:6].shape)
    exact, binned = (measured(make(), scores, mask) for make in (ExactPixelMetrics, StreamingPixelMetrics))
    assert_close_to_exact(exact, binned)


@pytest.mark.parametrize("bits", [10, 14, 20])
@pytest.mark.parametrize("seed", range(3))
def test_neither_order_nor_merging_moves_a_bin(bits, seed):
    """Bands, wide scores and any floats, image by image, backwards, and in merged parts."""
    scores, mask = random_case(seed, num_images=8, side=64)
    scores[2] = (98 + 1e-4 * scores[2].double()).float()
    scores[3] = -1e-5 * scores[3]
    scores[4:6] = any_floats(seed, scores[4:6].numel()).reshape(scores[4:6].shape)
    whole, backwards, *parts = (StreamingPixelMetrics(bits) for _ in range(5))
    whole.update(scores, mask)
    for place in reversed(range(8)):
        backwards.update(scores[[place]], mask[[place]])
    for part, places in zip(parts, ([2, 5], [0, 7, 3], [1, 4, 6]), strict=True):
        part.update(scores[places], mask[places])
    merged = parts[2]
    merged.merge_state(parts[0])
    merged.merge_state(parts[1])
    assert len(whole.keys) <= 2**bits
    for name, expected in whole.metric_state.items():
        assert torch.equal(backwards.metric_state[name], expected), name
        assert torch.equal(merged.metric_state[name], expected), name
    assert merged.compute() == backwards.compute() == whole.compute()
    assert int(whole.normal.sum() + whole.anomalous.sum()) == scores.numel()


def test_a_bin_never_holds_scores_of_other_leading_bits():
    scores = any_floats(7, 2**18).reshape(1, 512, 512)
    streaming = StreamingPixelMetrics(bits=14)
    streaming.update(scores, torch.zeros_like(scores))
    positive = scores[scores > 0].numpy().view(np.int32) >> 18
    edges = scores_of(streaming.keys.numpy())
    assert set(positive.tolist()) == set((edges[edges >= 0].view(np.int32) >> 18).tolist())


def test_large_and_small_regions_weigh_one_in_the_streaming_metrics():
    mask = torch.zeros(1, 1024, 1024)
    mask[0, :700, :1001], mask[0, 1000:1003, 5:12] = 1, 1
    streaming = StreamingPixelMetrics()
    streaming.update(torch.rand(mask.shape, generator=torch.Generator().manual_seed(0)), mask)
    assert int(streaming.overlap.sum()) / REGION == pytest.approx(2, abs=1e-7)


def test_the_streaming_state_does_not_grow():
    streaming = StreamingPixelMetrics(bits=16)

    def state_bytes() -> int:
        return sum(state.nbytes for state in streaming.metric_state.values())

    most = 4 * 8 * 2**16 + 2 * 8 * 2**12 + 2 * 8  # counts and their keys, the range of each page, two numbers
    sizes = []
    for seed in range(6):
        streaming.update(any_floats(seed, 2**18).reshape(1, 512, 512), random_case(seed, 1, side=512)[1])
        sizes.append(state_bytes())
    assert most / 2 < max(sizes) <= most
    assert sizes[-1] <= sizes[2]  # full: coarser, if anything


@pytest.mark.parametrize("bits", [9, 25])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(ValueError, match=f"10 to 24 bits of each score, found {bits}"):
        StreamingPixelMetrics(bits=bits)


def test_reset_starts_over(make):
    metrics = make()
    metrics.update(*random_case(seed=13))
    metrics.reset()
    assert measured(metrics, *random_case(seed=14)) == measured(make(), *random_case(seed=14))


def test_state_dict_round_trip():
    scores, mask = random_case(seed=15)
    saved, loaded = StreamingPixelMetrics(bits=16), StreamingPixelMetrics(bits=16)
    saved.update(scores[:3], mask[:3])
    assert saved.state_dict() == {}  # as in all of torchmetrics: nothing is saved unless asked for
    saved.persistent(True)
    loaded.persistent(True)
    loaded.load_state_dict(saved.state_dict())
    for metrics in (saved, loaded):
        metrics.update(scores[3:], mask[3:])
    assert loaded.compute() == saved.compute()
    assert loaded.compute().num_images == 6


# ---- decisions ---------------------------------------------------------------------------------------------------


def test_decisions_are_strict():
    scores, labels = torch.tensor([1.0, 2.0, 2.0, 3.0, 0.5]), torch.tensor([0, 0, 1, 1, 0])
    counts = confusion_at(scores, labels, 2.0)
    assert counts == Confusion(true_positives=1, false_positives=0, true_negatives=3, false_negatives=1)
    assert counts.f1 == pytest.approx(2 / 3)
    assert math.isnan(confusion_at(scores[:2], labels[:2], 2.0).f1)


def test_recall_by_defect_type():
    scores = torch.tensor([0.1, 0.9, 0.8, 0.2, 0.7])
    labels = torch.tensor([0, 0, 1, 1, 1])
    recall = recall_by_defect_type(scores, labels, ["good", "good", "scratch", "scratch", "dent"], 0.5)
    assert recall == {"dent": DefectRecall(1, 1.0), "scratch": DefectRecall(2, 0.5)}
    assert list(recall) == ["dent", "scratch"]
    with pytest.raises(ValueError, match="5 scores but 2 defect types"):
        recall_by_defect_type(scores, labels, ["good", "dent"], 0.5)


# ---- over categories, and JSON -----------------------------------------------------------------------------------


def test_the_macro_average_is_not_the_pooled_value():
    scores, mask = random_case(seed=16)
    pooled, per_category = ExactPixelMetrics(), {}
    for name, shift in {"a": 0.0, "b": 1000.0}.items():  # categories on different scales
        pooled.update(scores + shift, mask)
        per_category[name] = measured(ExactPixelMetrics(), scores + shift, mask).aupro_30
    macro = statistics.mean(per_category.values())
    assert macro - pooled.compute().aupro_30 > 0.1


def test_what_is_not_known_is_none_for_json(make):
    assert known(measured(make(), torch.rand(2, 4, 4), torch.zeros(2, 4, 4)).auroc) is None
    assert known(image_metrics(torch.tensor([0.0, 1.0]), torch.tensor([0, 1])).auroc) == 1


@pytest.mark.slow
def test_both_agree_on_eleven_million_pixels():
    """As many as the largest category of MVTec AD has at 256 px."""
    exact, streaming = ExactPixelMetrics(), StreamingPixelMetrics()
    for seed in range(7):
        scores, mask = random_case(seed, num_images=24, side=256)
        exact.update(scores, mask)
        streaming.update(scores, mask)
    a, b = exact.compute(), streaming.compute()
    assert a.auroc == pytest.approx(b.auroc, abs=1e-6)
    assert a.aupro_30 == pytest.approx(b.aupro_30, abs=1e-5)
