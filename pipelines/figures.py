"""Pictures of one evaluated cell: examples as the field lays them out, and the curves behind the numbers."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from pipelines.data import PreparedData
from pipelines.metrics import PixelMetrics
from pipelines.overlays import Pixels, contact_sheet, heat_overlay, outline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pipelines.evaluate import TestImage

matplotlib.use("Agg")

_TILE = 192  # px
_EXAMPLES = 8
_GOOD, _DEFECT, _LINE = "#0072b2", "#d55e00", "#222222"  # Okabe and Ito's blue and vermilion: colour-blind safe


def draw(
    folder: Path,
    results: "Sequence[TestImage]",
    data: PreparedData,
    threshold: float,
    pixel_threshold: float,
    pixels: PixelMetrics | None,
) -> list[str]:
    """Write examples.png and curves.png into `folder`; gives their names."""
    chosen = choose_examples(results)
    tiles = [_panels(result, data, pixel_threshold) for result in chosen]
    Image.fromarray(contact_sheet(tiles)).save(folder / "examples.png")
    _curves(results, threshold, pixels).savefig(folder / "curves.png", dpi=110)
    return ["examples.png", "curves.png"]


def choose_examples(results: "Sequence[TestImage]") -> "list[TestImage]":
    """Defects evenly from the surest hit to the worst miss, then the worst good part.

    A gallery of best hits alone would flatter.
    """
    defects = sorted((r for r in results if r.label), key=lambda r: -r.score)
    good = sorted((r for r in results if not r.label), key=lambda r: -r.score)
    places = np.linspace(0, len(defects) - 1, min(_EXAMPLES - 1, len(defects))).round().astype(int)
    return [defects[i] for i in places] + good[:1]


def _panels(result: "TestImage", data: PreparedData, pixel_threshold: float) -> list[Pixels]:
    """Input, true mask, map over the input, predicted mask."""
    batch = data.batch([result.row])
    rgb = (batch.image[0].permute(1, 2, 0).cpu().numpy() * 255).round().astype(np.uint8)
    mask = batch.mask[0, 0].cpu().numpy() > 0
    predicted = result.anomaly_map > pixel_threshold
    overlay = heat_overlay(rgb, result.anomaly_map, pixel_threshold)
    truth = rgb.copy()
    truth[outline(mask)] = (0, 255, 0)
    return [_tile(rgb), _tile(truth), _tile(overlay), _tile(np.repeat(predicted[..., None] * np.uint8(255), 3, axis=2))]


def _tile(pixels: Pixels) -> Pixels:
    return np.asarray(Image.fromarray(pixels).resize((_TILE, _TILE), Image.Resampling.BILINEAR))


def _curves(results: "Sequence[TestImage]", threshold: float, pixels: PixelMetrics | None) -> Figure:
    figure = Figure(figsize=(12 if pixels else 6, 3.4), layout="constrained")
    axes = figure.subplots(1, 4 if pixels else 2, squeeze=False)[0]
    _histogram(axes[0], results, threshold)
    _image_roc(axes[1], results)
    if pixels:
        _pixel_curves(axes[2], axes[3], pixels)
    return figure


def _histogram(axes: "Axes", results: "Sequence[TestImage]", threshold: float) -> None:
    good = [r.score for r in results if not r.label]
    defect = [r.score for r in results if r.label]
    edges = np.histogram_bin_edges([*good, *defect, threshold], bins=24).tolist()
    axes.hist(good, edges, color=_GOOD, alpha=0.8, label=f"good ({len(good)})")
    # hatched as well as coloured, so that the two stay apart in grey print
    axes.hist(defect, edges, color=_DEFECT, alpha=0.6, hatch="//", label=f"defect ({len(defect)})")
    axes.axvline(threshold, color=_LINE, linestyle="--", label="threshold")
    axes.set(title="Test images", xlabel="score", ylabel="images")
    axes.legend(fontsize=7)


def _image_roc(axes: "Axes", results: "Sequence[TestImage]") -> None:
    labels = np.array([r.label for r in results])
    order = np.argsort([-r.score for r in results], kind="stable")
    scores = np.array([r.score for r in results])[order]
    last = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)  # equal scores make one point
    hits = np.append(0, np.cumsum(labels[order])[last]) / max(labels.sum(), 1)
    alarms = np.append(0, np.cumsum(~labels[order])[last]) / max((~labels).sum(), 1)
    axes.plot(alarms, hits, color=_LINE)
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=0.8, linestyle=":")
    axes.set(title="ROC of images", xlabel="false alarms", ylabel="defects found", xlim=(-0.02, 1), ylim=(0, 1.02))


def _pixel_curves(recall: "Axes", overlap: "Axes", pixels: PixelMetrics) -> None:
    curves = pixels.curves()
    recall.plot(curves.recall[1:], curves.precision[1:], color=_LINE)
    recall.set(title="Precision-recall of pixels", xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    overlap.plot(curves.false_positive_rate, curves.region_overlap, color=_LINE)
    overlap.set(
        title="PRO of pixels", xlabel="false-positive rate", ylabel="region overlap", xlim=(0, 0.3), ylim=(0, 1.02)
    )
