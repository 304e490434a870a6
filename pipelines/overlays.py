"""Anomaly maps as pictures (numpy and Pillow only, since `predict` runs without torch and matplotlib).

One colour scale per model and category, tied to its pixel threshold: a map at the threshold looks the same on every
image, and a good part does not glow however its own values are spread.
"""

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipelines.errors import ExportError

Pixels = npt.NDArray[np.uint8]
Map = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

# Nine points of matplotlib's "inferno": perceptually even, safe for colour-blind readers, ordered in grey print.
_INFERNO = np.array(
    [
        (0, 0, 4),
        (31, 12, 72),
        (85, 15, 109),
        (136, 34, 106),
        (186, 54, 85),
        (227, 89, 51),
        (249, 140, 10),
        (249, 201, 50),
        (252, 255, 164),
    ]
)
# Map over threshold -> colour: nothing below three quarters of it, so that good parts do not glow; full at twice.
_SCALE = ((0.75, 0.0), (1.0, 0.35), (2.0, 1.0))
_CONTOUR = (0, 255, 255)  # cyan stands out from inferno and from most parts


def relative_to_threshold(anomaly_map: Map, threshold: float) -> Map:
    """The map on the display scale: 0 up to three quarters of the threshold, 1 from twice the threshold on.

    Raises:
        ExportError: the threshold is not positive, so that there is no scale.
    """
    if not threshold > 0:
        raise ExportError(f"pixel threshold {threshold:g} is not positive: the held-out maps are constant; train again")
    ratio, value = zip(*_SCALE, strict=True)
    return np.interp(anomaly_map / threshold, ratio, value).astype(np.float32)


def colour(value: Map) -> Pixels:
    """(H, W) in [0, 1] -> (H, W, 3) inferno."""
    points = np.linspace(0, 1, len(_INFERNO))
    channels = [np.interp(value, points, _INFERNO[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def heat_overlay(rgb: Pixels, anomaly_map: Map, threshold: float) -> Pixels:
    """Blend the coloured map over the picture, and outline what lies above the threshold; both are (H, W)."""
    value = relative_to_threshold(anomaly_map, threshold)
    opacity = np.clip(value * 2, 0, 0.75)[..., None]
    blended = (rgb * (1 - opacity) + colour(value) * opacity).round().astype(np.uint8)
    blended[outline(anomaly_map > threshold)] = _CONTOUR
    return blended


def outline(mask: Mask) -> Mask:
    """The pixels of the mask that touch its outside (4-neighbours); the image's border is no outside."""
    padded = np.pad(mask, 1, mode="edge")
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inside


def resize_map(anomaly_map: Map, width: int, height: int) -> Map:
    """Bilinear, back to an image's own size."""
    resized = Image.fromarray(anomaly_map).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized, dtype=np.float32)


def contact_sheet(rows: list[list[Pixels]], gap: int = 4) -> Pixels:
    """Equal tiles in a grid on white; rows may differ in length."""
    height, width = rows[0][0].shape[:2]
    columns = max(len(row) for row in rows)
    sheet = np.full((len(rows) * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            top, left = i * (height + gap), j * (width + gap)
            sheet[top : top + height, left : left + width] = tile
    return sheet
