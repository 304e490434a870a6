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
_BAND = 512  # rows
FULL = 2.0  # map over threshold from which on the scale is full
# Map over threshold -> place among the colours, and how much of the picture they cover: nothing below nine tenths of
# the threshold, so that good parts do not glow.
_PLACE = ((0.0, 0.0), (1.0, 0.35), (FULL, 1.0))
_COVER = ((0.9, 0.0), (1.0, 0.5), (FULL, 0.75))
CONTOUR = (0, 255, 255)  # cyan stands out from inferno and from most parts


def relative_to_threshold(anomaly_map: Map, threshold: float) -> Map:
    """The map over the threshold, which is what every picture of it shows.

    Raises:
        ExportError: the threshold is not positive, so that there is no scale.
    """
    if not threshold > 0:
        raise ExportError(f"pixel threshold {threshold:g} is not positive: the held-out maps are constant; train again")
    return anomaly_map / np.float32(threshold)


def colour(value: Map) -> Pixels:
    """(H, W) in [0, 1] -> (H, W, 3) inferno."""
    points = np.linspace(0, 1, len(_INFERNO))
    channels = [np.interp(value, points, _INFERNO[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def coloured_map(anomaly_map: Map, threshold: float) -> Pixels:
    """(H, W) -> (H, W, 3): black at 0, violet at the threshold, light yellow from twice of it on."""
    return colour(_interpolated(relative_to_threshold(anomaly_map, threshold), _PLACE))


def opacity(anomaly_map: Map, threshold: float) -> Map:
    """How much of a picture the map's colours hide, in [0, 1]."""
    return _interpolated(relative_to_threshold(anomaly_map, threshold), _COVER)


def heat_overlay(rgb: Pixels, anomaly_map: Map, threshold: float) -> Pixels:
    """Blend the coloured map over the picture, and outline what lies above the threshold; both are (H, W)."""
    blended, above = np.empty_like(rgb), anomaly_map > threshold
    for top in range(0, len(rgb), _BAND):  # what is computed of a band takes ten times the memory of its pixels
        rows, first = slice(top, top + _BAND), max(0, top - 1)
        share = opacity(anomaly_map[rows], threshold)[..., None]
        coloured = rgb[rows] * (1 - share) + coloured_map(anomaly_map[rows], threshold) * share
        blended[rows] = coloured.round().astype(np.uint8)
        edge = outline(above[first : top + _BAND + 1])  # with a row more on either side
        blended[rows][edge[top - first :][:_BAND]] = CONTOUR
    return blended


def _interpolated(ratio: Map, points: tuple[tuple[float, float], ...]) -> Map:
    ratios, values = zip(*points, strict=True)
    return np.interp(ratio, ratios, values).astype(np.float32)


def outline(mask: Mask) -> Mask:
    """The pixels of the mask that touch its outside (4-neighbours); the image's border is no outside."""
    padded = np.pad(mask, 1, mode="edge")
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inside


def resize_map(anomaly_map: Map, width: int, height: int) -> Map:
    """Bilinear, back to an image's own size."""
    if anomaly_map.shape == (height, width):
        return anomaly_map
    resized = Image.fromarray(anomaly_map).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized, dtype=np.float32)
