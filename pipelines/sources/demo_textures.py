"""Drawn stand-ins for the Describable Textures Dataset (Cimpoi et al., "Describing Textures in the Wild", CVPR 2014).

Each class is a scalar pattern in about [0, 1] on the picture's grid; `draw_texture` turns it into a picture with a
random palette, relief lighting and grain. Colour, scale and direction vary strongly within a class, as in DTD.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.sources.demo_surfaces import Array, Rng, fractal_noise, grid, rotated, smooth_noise, smoothstep


def _coordinates(rng: Rng, side: int, warp: float) -> tuple[Array, Array]:
    """Coordinates in [-1, 1], turned by a random angle and bent by smooth noise of strength `warp`."""
    x, y = rotated(*grid(side), rng.uniform(-1, 1), rng.uniform(-1, 1), rng.uniform(0, 2 * math.pi))
    bend = np.float32(warp * rng.uniform(0.2, 1))
    return x + bend * smooth_noise(rng, side, 5, 5), y + bend * smooth_noise(rng, side, 5, 5)


def _wave(phase: Array) -> Array:
    return np.float32(0.5) + np.float32(0.5) * np.sin(np.float32(2 * math.pi) * phase)


def _cells(rng: Rng, side: int, count: int) -> tuple[Array, Array]:
    """Distances (side, side) to the nearest and the second nearest of `count` scattered points, drawn at half size."""
    half = max(side // 2, 2)
    x, y = grid(half)
    first, second = np.full((2, half, half), np.inf, dtype=np.float32)
    for px, py in rng.uniform(-1.1, 1.1, (count, 2)).astype(np.float32):
        distance = np.hypot(x - px, y - py)
        second = np.minimum(second, np.maximum(first, distance))
        first = np.minimum(first, distance)
    resized = (np.asarray(Image.fromarray(d).resize((side, side), Image.Resampling.BICUBIC)) for d in (first, second))
    nearest, next_nearest = resized
    return nearest, next_nearest


def _banded(rng: Rng, side: int) -> Array:
    x, _ = _coordinates(rng, side, 0.03)
    levels = rng.random(64).astype(np.float32)
    return levels[np.floor(x * np.float32(rng.uniform(3, 9))).astype(np.intp) % 64]


def _blotchy(rng: Rng, side: int) -> Array:
    return smoothstep(-0.4, 0.5, fractal_noise(rng, side, int(rng.integers(3, 8)), 4))


def _bubbly(rng: Rng, side: int) -> Array:
    nearest, following = _cells(rng, side, int(rng.integers(30, 90)))
    radius = np.clip((following + nearest) / 2, 1e-3, None)
    return np.sqrt(np.maximum(1 - (nearest / radius) ** 2, 0)) ** np.float32(rng.uniform(0.5, 1.5))


def _chequered(rng: Rng, side: int) -> Array:
    x, y = _coordinates(rng, side, 0.04)
    pitch = np.float32(rng.uniform(2, 8))
    return smoothstep(-0.08, 0.08, np.sin(math.pi * pitch * x) * np.sin(math.pi * pitch * y))


def _cracked(rng: Rng, side: int) -> Array:
    nearest, following = _cells(rng, side, int(rng.integers(15, 60)))
    ragged = np.float32(0.012) * fractal_noise(rng, side, 16, 3)
    plates = np.float32(0.75) + np.float32(0.15) * fractal_noise(rng, side, 8, 3)
    return smoothstep(0.0, rng.uniform(0.02, 0.06), following - nearest + ragged) * plates


def _dotted(rng: Rng, side: int) -> Array:
    x, y = _coordinates(rng, side, 0.04)
    pitch, radius = np.float32(rng.uniform(3, 9)), rng.uniform(0.18, 0.42)
    row = np.floor(pitch * y)
    u = pitch * x + np.float32(0.5) * (row % 2)
    return smoothstep(radius + 0.06, radius - 0.06, np.hypot(u - np.floor(u) - 0.5, pitch * y - row - 0.5))


def _fibrous(rng: Rng, side: int) -> Array:
    x, y = _coordinates(rng, side, 0.15)
    strands = smooth_noise(rng, side, 2, side // 4) + smooth_noise(rng, side, 4, side // 2)
    return _wave(np.float32(rng.uniform(2, 12)) * x + np.float32(0.4) * np.sin(3 * y) + np.float32(0.25) * strands)


def _grid(rng: Rng, side: int) -> Array:
    x, y = _coordinates(rng, side, 0.03)
    pitch, width = np.float32(rng.uniform(3, 9)), rng.uniform(0.06, 0.2)
    u, v = np.abs((pitch * x) % 1 - 0.5), np.abs((pitch * y) % 1 - 0.5)
    return smoothstep(width, width + 0.06, np.minimum(u, v))


def _honeycombed(rng: Rng, side: int) -> Array:
    x, y = _coordinates(rng, side, 0.03)
    wave = np.float32(math.pi * rng.uniform(3, 8))
    hexagons = sum(np.cos(wave * (math.cos(a) * x + math.sin(a) * y)) for a in (0.0, 2 * math.pi / 3, 4 * math.pi / 3))
    return smoothstep(-1.5, rng.uniform(-0.6, 1.5), np.asarray(hexagons, dtype=np.float32))


def _marbled(rng: Rng, side: int) -> Array:
    x, _ = _coordinates(rng, side, 0.3)
    turbulence = np.float32(rng.uniform(0.2, 0.6)) * fractal_noise(rng, side, 4, 5)
    return np.abs(np.sin(np.float32(rng.uniform(2, 6)) * x + 3 * turbulence)) ** np.float32(0.6)


def _scaly(rng: Rng, side: int) -> Array:
    x, y = _coordinates(rng, side, 0.03)
    pitch = np.float32(rng.uniform(3, 8))
    pattern = np.zeros_like(x)
    for lap in (1, 0):  # the row above lies on the row below
        row = np.floor(pitch * y) - lap
        u = pitch * x + np.float32(0.5) * (row % 2)
        radius = np.hypot(u - np.floor(u) - 0.5, (pitch * y - row) * np.float32(0.62))
        pattern = np.where(radius < 0.62, smoothstep(0.64, 0.1, radius), pattern)
    return pattern


def _sprinkled(rng: Rng, side: int) -> Array:
    nearest, _ = _cells(rng, side, int(rng.integers(80, 160)))
    size = rng.uniform(0.02, 0.07)
    return smoothstep(size, size * 0.6, nearest + np.float32(0.01) * smooth_noise(rng, side, 30, 30))


def _striped(rng: Rng, side: int) -> Array:
    x, _ = _coordinates(rng, side, 0.06)
    sharp = rng.uniform(0.05, 0.4)
    return smoothstep(0.5 - sharp, 0.5 + sharp, _wave(np.float32(rng.uniform(2, 12)) * x))


def _swirly(rng: Rng, side: int) -> Array:
    x, y = grid(side)
    for _ in range(3):
        cx, cy = rng.uniform(-0.8, 0.8, 2).astype(np.float32)
        angle = np.float32(rng.uniform(-9, 9)) * np.exp(-3 * np.hypot(x - cx, y - cy))
        u, v = x - cx, y - cy
        x, y = cx + u * np.cos(angle) - v * np.sin(angle), cy + u * np.sin(angle) + v * np.cos(angle)
    return _wave(np.float32(rng.uniform(2, 6)) * x)


def _veined(rng: Rng, side: int) -> Array:
    ridges = np.abs(fractal_noise(rng, side, int(rng.integers(3, 7)), 4))
    return smoothstep(0.0, rng.uniform(0.15, 0.5), ridges)


def _woven(rng: Rng, side: int) -> Array:
    x, y = _coordinates(rng, side, 0.05)
    pitch = np.float32(rng.uniform(4, 12))
    u, v = pitch * x, pitch * y
    over = (np.floor(u) + np.floor(v)) % 2 == 0
    return np.where(over, np.sin(math.pi * (u % 1)), np.float32(0.8) * np.sin(math.pi * (v % 1)))


def _zigzagged(rng: Rng, side: int) -> Array:
    x, y = _coordinates(rng, side, 0.03)
    pitch = np.float32(rng.uniform(2, 6))
    tooth = np.abs((pitch * x) % 1 - 0.5) * np.float32(rng.uniform(0.6, 1.6))
    return smoothstep(0.38, 0.62, _wave(pitch * y * np.float32(0.8) + tooth))


_DRAWN: tuple[Callable[[Rng, int], Array], ...]
_DRAWN = (_banded, _blotchy, _bubbly, _chequered, _cracked, _dotted, _fibrous, _grid, _honeycombed)
_DRAWN += (_marbled, _scaly, _sprinkled, _striped, _swirly, _veined, _woven, _zigzagged)
TEXTURES = {draw.__name__.removeprefix("_"): draw for draw in _DRAWN}


def draw_texture(name: str, key: tuple[int, ...], image_size: int) -> NDArray[np.uint8]:
    """A picture (S, S, 3) of the texture class `name`, all random choices from `key`."""
    rng = np.random.default_rng(np.random.SeedSequence(key))
    pattern = np.clip(TEXTURES[name](rng, image_size), 0, 1).astype(np.float32)
    if rng.random() < 0.5:
        pattern = 1 - pattern
    mottle = fractal_noise(rng, image_size, int(rng.integers(3, 20)), 4)
    tone = pattern + np.float32(rng.uniform(0.02, 0.15)) * mottle
    rgb = _paint(_palette(rng), tone)
    relief = pattern + np.float32(rng.uniform(0, 0.2)) * mottle
    slope_y, slope_x = np.gradient(relief, np.float32(256 / image_size))
    light = 1 + np.float32(rng.uniform(0, 2.5)) * (slope_x + slope_y)
    x, y = grid(image_size)
    light = light * (1 + np.float32(rng.normal(0, 0.1)) * x + np.float32(rng.normal(0, 0.1)) * y)
    grain = np.float32(rng.uniform(0.005, 0.04)) * rng.standard_normal(pattern.shape, dtype=np.float32)
    picture = rgb * np.clip(light, 0.35, 1.7)[..., None] + grain[..., None]
    return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)


def _palette(rng: Rng) -> Array:
    """Three colours (3, 3), the ends far enough apart in lightness for the pattern to show."""
    low, high = rng.uniform(0.03, 0.4), rng.uniform(0.55, 1.0)
    lightness = np.array([low, rng.uniform(low, high), high])[:, None]
    hue = rng.random(3)[:, None] + np.array([0, 1 / 3, 2 / 3])
    saturation = rng.uniform(0, 0.75, (3, 1))
    return (lightness * (1 - saturation * (0.5 + 0.5 * np.cos(2 * math.pi * hue)))).astype(np.float32)


def _paint(palette: Array, tone: Array) -> Array:
    """Colours (N, N, 3) along the palette, for tones (N, N) from 0 to 1."""
    stops = np.linspace(0, 1, len(palette))
    channels = [np.interp(tone, stops, palette[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).astype(np.float32)
