"""Pictures of one evaluated cell: a strip of panels per test image, a sheet of the telling ones, and the curves."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.evaluation.curves import PRO_LIMITS, Bools, Floats, image_curve
from pipelines.evaluation.metrics import PixelCurves
from pipelines.evaluation.outcomes import TestImage
from pipelines.files import write_json
from pipelines.paths import CURVES_FILE, CURVES_PICTURE, EXAMPLES_FILE
from pipelines.pictures.panels import KeptMaps, Layout, Thresholds, save_strip, sheet, strip

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PER_GROUP = 4  # strips of each kind on the sheet
_SHEET = Layout(160)
_BINS = 24
_CURVE_POINTS = 101  # of a curve kept for the report
_PRO_LIMIT = PRO_LIMITS["aupro_30"]
_GOOD, _DEFECT, _LINE = "#0072b2", "#d55e00", "#222222"  # Okabe and Ito's blue and vermilion: colour-blind safe


def draw(folder: Path, results: Sequence[TestImage], thresholds: Thresholds, pixels: PixelCurves | None) -> list[str]:
    """Write strips, maps, the sheet and the curves into `folder`; gives the names of those worth logging."""
    for result in results:
        save_strip(folder, result, thresholds)
    maps = ((result.anomaly_map, (result.width, result.height)) for result in results)
    KeptMaps.of(maps, thresholds.pixel).save(folder)
    groups = [
        (title, [strip(result, thresholds, _SHEET) for result in chosen])
        for title, chosen in telling(results, thresholds.score)
    ]
    sheet(groups).save(folder / EXAMPLES_FILE, optimize=True)
    if pixels:
        write_json(folder / CURVES_FILE, thinned(pixels))
    _curves(results, thresholds.score, pixels).savefig(folder / CURVES_PICTURE, dpi=110)
    return [EXAMPLES_FILE, CURVES_PICTURE]


def telling(results: Sequence[TestImage], threshold: float) -> list[tuple[str, list[TestImage]]]:
    """The best hits, the worst misses and the worst false alarms, each under a heading that says out of how many.

    Where there is no error, what came closest to one stands in its place: a gallery of best hits alone would flatter.
    """
    defects = sorted((r for r in results if r.label), key=lambda r: -r.score)
    good = sorted((r for r in results if not r.label), key=lambda r: -r.score)
    hits = [r for r in defects if r.score > threshold]
    misses = [r for r in reversed(defects) if r.score <= threshold]
    alarms = [r for r in good if r.score > threshold]
    groups = [(f"Best hits ({len(hits)} of {len(defects)} defects found)", hits[:_PER_GROUP])]
    if misses:
        groups.append((f"Worst misses ({len(misses)} of {len(defects)} defects missed)", misses[:_PER_GROUP]))
    else:
        groups.append(("No defect missed; the weakest hits", hits[_PER_GROUP:][-_PER_GROUP:][::-1]))
    if alarms:
        groups.append((f"Worst false alarms ({len(alarms)} of {len(good)} good parts)", alarms[:_PER_GROUP]))
    else:
        groups.append(("No false alarm; the good parts with the highest scores", good[:_PER_GROUP]))
    return [(title, chosen) for title, chosen in groups if chosen]


def thinned(curves: PixelCurves) -> dict[str, list[list[float]]]:
    """The pixel curves as [x, y] of few points each, for the report: ROC, precision-recall, PRO up to its limit."""
    rates, recalls = np.linspace(0, 1, _CURVE_POINTS), np.linspace(0, 1, _CURVE_POINTS)
    limited = np.linspace(0, _PRO_LIMIT, _CURVE_POINTS)
    rate, recall = curves.false_positive_rate, curves.recall
    if not len(rate):
        return {}
    # Recall from its first point on: before it nothing is called, and precision is a convention.
    drawn = {
        "roc": (rates, np.interp(rates, rate, recall)),
        "precision_recall": (recalls, np.interp(recalls, recall[1:], curves.precision[1:])),
        "pro": (limited, np.interp(limited, rate, curves.region_overlap)),
    }
    return {name: [x.round(4).tolist(), y.round(4).tolist()] for name, (x, y) in drawn.items()}


def _curves(results: Sequence[TestImage], threshold: float, pixels: PixelCurves | None) -> "Figure":
    import matplotlib  # half a second, which only this figure needs
    from matplotlib.figure import Figure

    labels, scores = np.array([r.label for r in results]), np.array([r.score for r in results])
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        rows = 2 if pixels else 1
        figure = Figure(figsize=(10.5, 3.4 * rows), layout="constrained")
        axes = figure.subplots(rows, 3, squeeze=False)
    _histogram(axes[0, 0], labels, scores, threshold)
    _image_curves(axes[0, 1], axes[0, 2], labels, scores, threshold)
    if pixels:
        _pixel_curves(axes[1], pixels)
    return figure


def _histogram(axes: "Axes", labels: Bools, scores: Floats, threshold: float) -> None:
    edges = histogram_edges(scores, threshold).tolist()
    axes.hist(scores[~labels], edges, color=_GOOD, alpha=0.8, label=f"good ({(~labels).sum()})")
    # hatched as well as coloured, so that the two stay apart in grey print
    axes.hist(scores[labels], edges, color=_DEFECT, alpha=0.6, hatch="//", label=f"defect ({labels.sum()})")
    axes.axvline(threshold, color=_LINE, linestyle="--", label="threshold")
    axes.set(title="Scores of test images", xlabel="score", ylabel="images")
    axes.legend(fontsize=8)


def histogram_edges(scores: Floats, threshold: float) -> Floats:
    """Even bins over all scores with an edge at the threshold, so that no bar holds both decisions."""
    low, high = min(float(scores.min()), threshold), max(float(scores.max()), threshold)
    width = (high - low) / _BINS or 1.0
    below, above = math.ceil((threshold - low) / width), math.ceil((high - threshold) / width)
    return threshold + width * np.arange(-max(below, 1), max(above, 1) + 1, dtype=np.float64)


def _image_curves(roc: "Axes", precision_recall: "Axes", labels: Bools, scores: Floats, threshold: float) -> None:
    """With the deployed threshold's place on both."""
    distinct, curve = image_curve(scores, labels)
    place = int((distinct > threshold).sum())  # points above the threshold; 0 is the corner
    rate, recall, precision = curve.false_positive_rate, curve.recall, curve.precision
    _draw_roc(roc, rate, recall, title="ROC of images", xlabel="false alarms", ylabel="defects found")
    _mark_threshold(roc, rate[place], recall[place], "lower right")
    _draw_precision_recall(precision_recall, recall, precision, "Precision-recall of images", "defects found")
    if place:
        _mark_threshold(precision_recall, recall[place], precision[place], "lower left")


def _pixel_curves(axes: "NDArray[np.object_]", curves: PixelCurves) -> None:
    roc, precision_recall, overlap = axes
    rate = "false-positive rate"
    _draw_roc(roc, curves.false_positive_rate, curves.recall, title="ROC of pixels", xlabel=rate, ylabel="recall")
    _draw_precision_recall(precision_recall, curves.recall, curves.precision, "Precision-recall of pixels", "recall")
    overlap.plot(curves.false_positive_rate, curves.region_overlap, color=_LINE)
    overlap.set(title="PRO of pixels", xlabel=rate, ylabel="region overlap", xlim=(0, _PRO_LIMIT), ylim=(0, 1.02))


def _draw_roc(axes: "Axes", rate: Floats, recall: Floats, **names: str) -> None:
    axes.plot(rate, recall, color=_LINE)
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=0.8, linestyle=":")
    axes.set(xlim=(-0.02, 1), ylim=(0, 1.02), **names)


def _draw_precision_recall(axes: "Axes", recall: Floats, precision: Floats, title: str, xlabel: str) -> None:
    axes.plot(recall[1:], precision[1:], color=_LINE)
    axes.set(title=title, xlabel=xlabel, ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.02))


def _mark_threshold(axes: "Axes", x: float, y: float, corner: Literal["lower left", "lower right"]) -> None:
    axes.plot(x, y, "o", color=_DEFECT, label="threshold", clip_on=False)
    axes.legend(fontsize=8, loc=corner)
