"""What drawn parts are made of: a surface, noise and shapes, the defects that materials share, grounds to lie on.

Positions and lengths are in frame units: the grid spans [-1, 1] in both directions, y downwards.
"""

import functools
import math
import zlib
from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Array = NDArray[np.floating]  # float32 in fact: twice as fast as float64, and more than enough for eight bits
Rng = np.random.Generator

GOOD = "good"
SUPERSAMPLING = 2  # pixels that are drawn for each of the picture's, along either axis


def generator(key: tuple[int, ...], purpose: str) -> Rng:
    """What one kind of chance is drawn from; CRC-32, since Python's own string hash differs between processes."""
    return np.random.default_rng(np.random.SeedSequence((*key, zlib.crc32(purpose.encode()))))


@dataclass(frozen=True, slots=True)
class Defect:
    """What is wrong with a part; `GOOD` is the kind of a part with nothing wrong."""

    kind: str
    severity: float  # 0 (close to normal variation) to 1 (obvious)
    key: tuple[int, ...]

    def rng(self, purpose: str) -> Rng:
        """A generator of its own for each purpose: no choice shifts another's, nor any of the part's."""
        return generator(self.key, purpose)

    def between(self, subtle: float, obvious: float) -> float:
        return subtle + (obvious - subtle) * self.severity


@dataclass(slots=True)
class Surface:
    """A material under the camera, on the supersampled grid (N, N)."""

    albedo: Array  # (3, N, N), in [0, 1]
    height: Array  # (N, N), frame units, towards the camera
    gloss: Array  # (N, N), strength of the lamp's reflection
    sheen: Array  # (N, N), light added by reflections that the height does not explain


# Building blocks


def grid(side: int, rows: int | None = None) -> tuple[Array, Array]:
    """Coordinates x and y (rows, side) of the pixel centres, in [-1, 1]: of a square, or of its middle rows alone."""
    axis = ((np.arange(side, dtype=np.float32) + 0.5) * (2 / side) - 1).astype(np.float32)
    x, y = np.meshgrid(axis, axis[middle(side, rows or side)])
    return x, y


def middle(side: int, number: int) -> slice:
    """The middle rows or columns of a square."""
    start = (side - number) // 2
    return slice(start, start + number)


def posed_grid(rng: Rng, side: int, shift: float, degrees: float) -> tuple[Array, Array]:
    """The part's own coordinates, when it lies up to `shift` and `degrees` (uniform) away from its place."""
    dx, dy = rng.uniform(-shift, shift, 2)
    angle = math.radians(rng.uniform(-degrees, degrees))
    return rotated(*grid(side), dx, dy, angle)


def rotated(x: Array, y: Array, dx: float, dy: float, angle: float) -> tuple[Array, Array]:
    """Coordinates in a frame whose origin is (dx, dy) and whose x axis is turned by `angle`, radians."""
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    x, y = x - np.float32(dx), y - np.float32(dy)
    return cos * x + sin * y, cos * y - sin * x


def smooth_noise(rng: Rng, side: int, rows: int, columns: int) -> Array:
    """Noise (side, side) of about unit variance, with `rows` by `columns` bumps over the picture."""
    values = rng.standard_normal((rows, columns), dtype=np.float32)
    return np.asarray(Image.fromarray(values).resize((side, side), Image.Resampling.BICUBIC))


def fractal_noise(rng: Rng, side: int, cells: int, octaves: int) -> Array:
    """Noise (side, side) with detail on `octaves` scales, each twice as fine and half as strong as the one before."""
    layers = (smooth_noise(rng, side, cells << k, cells << k) * np.float32(0.5**k) for k in range(octaves))
    return functools.reduce(np.add, layers)


def smoothstep(low: float, high: float, value: Array) -> Array:
    """0 below `low`, 1 above `high`, a cubic between; `low` > `high` falls instead."""
    t = np.clip((value - np.float32(low)) / np.float32(high - low), 0, 1)
    return t * t * (3 - 2 * t)


def bump(x: Array, y: Array, centre: tuple[float, float], radius: float) -> Array:
    """A Gaussian hill of height 1; `radius` is its standard deviation."""
    squared = (x - np.float32(centre[0])) ** 2 + (y - np.float32(centre[1])) ** 2
    return np.exp(squared * np.float32(-0.5 / radius**2))


def blot(rng: Rng, x: Array, y: Array, centre: tuple[float, float], radius: float, ragged: float) -> Array:
    """About 1 in the middle of an irregular spot, 0 on its outline, negative outside."""
    squash = math.exp(rng.uniform(-0.35, 0.35))
    u, v = rotated(x, y, *centre, rng.uniform(0, math.pi))
    cells = int(np.clip(1.6 / radius, 6, x.shape[0] // 12))
    outline = fractal_noise(rng, x.shape[0], cells, 3)
    distance = np.hypot(u * np.float32(squash), v / np.float32(squash)) / np.float32(radius)
    return 1 - distance + np.float32(ragged) * outline


def mix(albedo: Array, colour: Array, amount: Array) -> Array:
    return albedo + (colour - albedo) * amount


def colour(*rgb: float) -> Array:
    """One colour (3, 1, 1), ready to be spread over a surface."""
    return np.array(rgb, dtype=np.float32).reshape(3, 1, 1)


def batch_variation(rng: Rng, tint: float, lightness: float) -> Array:
    """How far one part's colour (3, 1, 1) is from the usual; both arguments are standard deviations."""
    return colour(*rng.normal(0, tint, 3)) + np.float32(rng.normal(0, lightness))


@functools.lru_cache(maxsize=8)
def lettering(text: str, columns: int, rows: int) -> Array:
    """The text's ink (rows, columns) in [0, 1], filling the strip."""
    font = ImageFont.load_default(size=128)
    left, top, right, bottom = font.getbbox(text)
    strip = Image.new("L", (math.ceil(right - left), math.ceil(bottom - top)))
    ImageDraw.Draw(strip).text((-left, -top), text, fill=255, font=font)
    ink = np.asarray(strip.resize((columns, rows), Image.Resampling.LANCZOS), dtype=np.float32) / 255
    ink.flags.writeable = False  # shared by all callers
    return ink


def printed(ink: Array, u: Array, v: Array) -> Array:
    """The strip `ink` laid over u, v in [0, 1] (columns, rows); nothing outside."""
    rows, columns = ink.shape
    inside = (u >= 0) & (u < 1) & (v >= 0) & (v < 1)
    row, column = (np.clip(v, 0, 0.9999) * rows).astype(np.intp), (np.clip(u, 0, 0.9999) * columns).astype(np.intp)
    return np.where(inside, ink[row, column], np.float32(0))


def anywhere(rng: Rng, reach: float) -> tuple[float, float]:
    """A point of the square [-reach, reach]."""
    x, y = rng.uniform(-reach, reach, 2)
    return float(x), float(y)


def rounded_box(x: Array, y: Array, half: tuple[float, float], corner: float) -> Array:
    """Distance to the outline of a rounded rectangle, positive inside."""
    dx = np.abs(x) - np.float32(half[0] - corner)
    dy = np.abs(y) - np.float32(half[1] - corner)
    outside = np.hypot(np.maximum(dx, 0), np.maximum(dy, 0))
    return np.float32(corner) - outside - np.minimum(np.maximum(dx, dy), 0)


# Defects that several materials share


def scratch(surface: Surface, x: Array, y: Array, defect: Defect, centre: tuple[float, float], bright: float) -> None:
    """Score the surface: a groove with a raised lip, its fresh material `bright` times as light."""
    rng = defect.rng("shape")
    half_length = rng.uniform(0.12, 0.22) + defect.between(0.0, 0.35)
    u, v = rotated(x, y, *centre, rng.uniform(0, math.pi))
    u = u / np.float32(half_length)
    wobble = rng.normal(0, 0.06) * u * u + rng.normal(0, 0.03) * u**3 + rng.normal(0, 0.004) * np.sin(9 * u)
    across = (v - wobble.astype(np.float32)) / np.float32(defect.between(0.006, 0.015))
    along = smoothstep(1.0, 0.6, np.abs(u)) * np.clip(1 + 0.5 * smooth_noise(rng, x.shape[0], 24, 24), 0.15, 1.5)
    groove = np.exp(-across * across) * along
    lip = np.exp(-((across - np.float32(1.6)) ** 2)) * along
    depth = np.float32(defect.between(0.2, 1.4))
    surface.height = surface.height + np.float32(0.007) * depth * (np.float32(0.5) * lip - groove)
    surface.albedo = surface.albedo * (1 + np.float32(bright - 1) * depth * np.minimum(groove + lip * 0.4, 1))
    surface.gloss = surface.gloss * (1 - np.float32(0.5) * depth * np.minimum(groove, 1))


def stain(surface: Surface, x: Array, y: Array, defect: Defect, centre: tuple[float, float], tint: Array) -> None:
    """Soak the surface: what is left of its colour is `tint`, most of all along the rim where it dried."""
    rng = defect.rng("shape")
    field = blot(rng, x, y, centre, rng.uniform(0.14, 0.22) + defect.between(0, 0.14), 0.26)
    soft = rng.uniform(0.12, 0.5)
    wet = smoothstep(0.0, soft, field)
    rim = wet * smoothstep(0.3 + soft, 0.12, field)
    amount = np.float32(defect.between(0.1, 0.9)) * (np.float32(0.75) * wet + np.float32(0.25) * rim)
    surface.albedo = surface.albedo * (1 + (tint - 1) * amount)
    surface.gloss = surface.gloss * (1 - np.float32(0.4) * amount)


def misprint(ink: Array, glyphs: int, defect: Defect) -> Array:
    """The strip printed wrongly: a glyph missing, displaced, smeared, or part of the line struck twice."""
    rng = defect.rng("shape")
    ink = ink.copy()
    width = ink.shape[1] // glyphs
    start = int(rng.integers(0, glyphs - 1)) * width
    span = slice(start, start + width * (1 + round(defect.between(0, 3))))
    part = ink[:, span]
    fault = rng.integers(4)
    if fault == 0:
        ink[:, span] = part * np.float32(defect.between(0.6, 0.0))
    elif fault == 1:
        ink[:, span] = np.roll(part, round(defect.between(0.12, 0.4) * ink.shape[0]), axis=0)
    elif fault == 2:
        smear = scipy.ndimage.uniform_filter1d(part, round(defect.between(0.25, 1.5) * width), axis=1)
        ink[:, span] = np.float32(0.35) * part + np.float32(0.65) * smear
    else:
        ghost = np.roll(part, round(defect.between(0.15, 0.5) * width), axis=1)
        ink[:, span] = np.maximum(part, np.float32(defect.between(0.5, 1.0)) * ghost)
    return ink


# Grounds, and a part on them


def table(rng: Rng, side: int) -> Surface:
    """A matt blue-grey inspection table."""
    x, _ = grid(side)
    grain = rng.standard_normal((side, side), dtype=np.float32)
    tone = 0.25 + 0.012 * grain + 0.012 * fractal_noise(rng, side, 4, 3)
    albedo = tone * (colour(0.82, 0.98, 1.2) + batch_variation(rng, 0.015, 0.02))
    return Surface(albedo, np.float32(0.0006) * grain, np.full_like(x, 0.03), np.zeros_like(x))


def belt(rng: Rng, side: int) -> Surface:
    """A dark rubber conveyor belt with a fine diamond weave and some dust."""
    x, y = grid(side)
    slide = np.float32(rng.uniform(0, 2 * math.pi))
    weave = np.sin(np.float32(62) * (x + y) + slide) * np.sin(np.float32(62) * (x - y))
    grit = rng.standard_normal((side, side), dtype=np.float32)
    dust = np.maximum(smooth_noise(rng, side, side // 4, side // 4) - 2.4, 0)
    dust = dust + 0.3 * np.maximum(fractal_noise(rng, side, 3, 3), 0)
    tone = 0.155 + 0.02 * weave + 0.012 * grit + 0.035 * dust
    albedo = tone * (colour(0.88, 1.04, 1.0) + batch_variation(rng, 0.015, 0.02))
    return Surface(albedo, np.float32(0.002) * weave, np.full_like(x, 0.05), np.zeros_like(x))


def lay(ground: Surface, part: Surface, edge: Array, rng: Rng) -> Surface:
    """Put the part on the ground: its soft shadow falls down and to the right, away from the lamp."""
    side = edge.shape[0]
    pixel = 2 / side
    cover = smoothstep(-pixel, pixel, edge)
    coarse = np.asarray(Image.fromarray(cover).resize((side // 4, side // 4), Image.Resampling.BOX))
    offset = rng.uniform(0.03, 0.045) * side / 8
    soft = scipy.ndimage.shift(
        scipy.ndimage.gaussian_filter(coarse, 0.011 * side / 4), (offset, offset), order=1, mode="nearest"
    )
    shadow = np.asarray(Image.fromarray(soft.astype(np.float32)).resize((side, side), Image.Resampling.BILINEAR))
    ground_light = 1 - np.float32(0.62) * np.clip(shadow, 0, 1)
    albedo = mix(ground.albedo * ground_light, part.albedo, cover)
    return Surface(
        albedo.astype(np.float32),
        ground.height + (part.height - ground.height) * cover,
        ground.gloss + (part.gloss - ground.gloss) * cover,
        part.sheen * cover,
    )
