"""A weld seam on a line camera: a picture seven times as wide as it is high, with faults of a few pixels.

Two brushed steel sheets are joined along the picture by a bead whose ripples lie where the torch happened to be,
between bands of annealing colours. A pore, a crack and a drop of spatter measure some three thousandths of the width:
6 pixels at 2,000.
"""

import math

import numpy as np
from PIL import Image

from pipelines.sources.demo_surfaces import (
    GOOD,
    SUPERSAMPLING,
    Array,
    Defect,
    Rng,
    Surface,
    batch_variation,
    colour,
    grid,
    mix,
    rotated,
    smoothstep,
)

WELD_HEIGHT = 0.15  # of a picture of width 1
BEAD_HALF = 0.036  # frame units, half its width
RIPPLE = 0.021  # frame units from one to the next
FAULT = 0.003  # frame units, radius of a fault
LEAST_FAULT = 1.4  # pixels, its radius in a small picture


def draw_weld(rng: Rng, side: int, defect: Defect) -> Surface:
    x, y = grid(side, SUPERSAMPLING * round(WELD_HEIGHT * side / SUPERSAMPLING))
    wander = _along(rng, x, 9) * np.float32(0.0035) + np.float32(rng.uniform(-0.012, 0.012))
    across = (y - wander) / np.float32(BEAD_HALF * (1 + 0.05 * _along(rng, x, 14)))
    inside = smoothstep(1.0, 0.93, np.abs(across))
    surface = _sheets(rng, x, y, across)
    _lay_bead(rng, surface, x, across, inside)
    if defect.kind != GOOD:
        _fault(surface, x, y, wander, defect, max(FAULT, 2 * SUPERSAMPLING * LEAST_FAULT / side))
    return surface


def _along(rng: Rng, x: Array, bumps: int) -> Array:
    """Noise of about unit variance that changes along the seam alone."""
    values = rng.standard_normal((1, bumps), dtype=np.float32)
    row = np.asarray(Image.fromarray(values).resize((x.shape[1], 1), Image.Resampling.BICUBIC))
    return np.broadcast_to(row, x.shape)


def _noise(rng: Rng, x: Array, rows: int, columns: int) -> Array:
    """Noise of about unit variance, with `rows` by `columns` bumps over the picture."""
    values = rng.standard_normal((rows, columns), dtype=np.float32)
    return np.asarray(Image.fromarray(values).resize((x.shape[1], x.shape[0]), Image.Resampling.BICUBIC))


def _sheets(rng: Rng, x: Array, y: Array, across: Array) -> Surface:
    """Brushed along the seam, a little brighter on one side, with straw and blue bands beside the bead."""
    streaks = _noise(rng, x, 150, 40)
    tone = 0.46 + 0.022 * streaks + 0.012 * _noise(rng, x, 6, 40) + 0.02 * np.sign(y) * np.float32(rng.normal(0, 1))
    albedo: Array = tone * (colour(0.99, 1.0, 1.01) + batch_variation(rng, 0.008, 0.02))
    away = np.abs(across) + 0.12 * _along(rng, x, 60)
    straw, blue = np.exp(-(((away - 1.55) / 0.28) ** 2)), np.exp(-(((away - 1.2) / 0.16) ** 2))
    albedo = mix(albedo, albedo * colour(1.12, 0.93, 0.66), np.float32(0.8) * straw)
    albedo = mix(albedo, albedo * colour(0.62, 0.72, 1.02), np.float32(0.8) * blue)
    height = np.float32(0.0004) * streaks
    gloss, sheen = np.full_like(x, 0.16), np.float32(0.03) * (1 + np.float32(0.2) * streaks)
    return Surface(albedo.astype(np.float32), height.astype(np.float32), gloss, sheen.astype(np.float32))


def _lay_bead(rng: Rng, surface: Surface, x: Array, across: Array, inside: Array) -> None:
    """The solidified pool: a ridge with crescents, convex the way the torch went."""
    pace = np.cumsum(1 + 0.1 * _along(rng, x, 90), axis=1) * np.float32(2 / x.shape[1])
    phase = (pace - np.float32(0.55 * BEAD_HALF) * across * across) / np.float32(RIPPLE) + np.float32(rng.uniform())
    crest = np.cos(np.float32(2 * math.pi) * phase)
    ridge = np.sqrt(np.clip(1 - across * across, 0, 1))
    rise = np.float32(0.011) * ridge + np.float32(0.0011) * crest * ridge + np.float32(0.0003) * _noise(rng, x, 60, 400)
    skin = 0.4 + 0.05 * crest + 0.02 * _noise(rng, x, 20, 130)
    metal = skin * (colour(0.98, 0.99, 1.02) + batch_variation(rng, 0.008, 0.015))
    surface.albedo = mix(surface.albedo, metal, inside).astype(np.float32)
    surface.height = mix(surface.height, rise, inside).astype(np.float32)
    surface.gloss = surface.gloss + np.float32(0.12) * inside
    surface.sheen = surface.sheen * (1 - np.float32(0.6) * inside)


def _fault(surface: Surface, x: Array, y: Array, wander: Array, defect: Defect, radius: float) -> None:
    """Pore and crack lie on the bead, spatter beside it."""
    place, shape = defect.rng("place"), defect.rng("shape")
    at = float(place.uniform(-0.95, 0.95))
    middle = float(wander[0, round((at + 1) / 2 * (x.shape[1] - 1))])
    if defect.kind == "stain":
        side = place.choice([-1.0, 1.0]) * place.uniform(1.5, 2.9) * BEAD_HALF
        drop = _spot(shape, x, y, (at, middle + side), radius * defect.between(0.9, 1.25))
        surface.albedo = mix(surface.albedo, colour(0.2, 0.19, 0.19), np.float32(defect.between(0.7, 1.0)) * drop)
        surface.height = surface.height + np.float32(0.6 * radius) * drop
        return
    centre = at, middle + float(place.uniform(-0.6, 0.6)) * BEAD_HALF
    if defect.kind == "hole":
        pit = _spot(shape, x, y, centre, radius * defect.between(0.9, 1.25))
    else:
        u, v = rotated(x, y, *centre, float(shape.uniform(0, math.pi)))
        bend = np.float32(shape.normal(0, 0.25) / radius) * u * u
        pit = np.exp(-(((v - bend) / np.float32(0.35 * radius)) ** 2))
        pit = pit * smoothstep(1.0, 0.7, np.abs(u) / np.float32(radius * defect.between(1.2, 1.8)))
    surface.albedo = mix(surface.albedo, colour(0.07, 0.06, 0.06), np.float32(defect.between(0.75, 1.0)) * pit)
    surface.height = surface.height - np.float32(0.8 * radius) * pit
    surface.gloss = surface.gloss * (1 - pit)
    surface.sheen = surface.sheen * (1 - pit)


def _spot(rng: Rng, x: Array, y: Array, centre: tuple[float, float], radius: float) -> Array:
    """1 within a round spot that is squashed a little, 0 outside."""
    u, v = rotated(x, y, *centre, float(rng.uniform(0, math.pi)))
    squash = np.float32(math.exp(rng.uniform(-0.2, 0.2)))
    return smoothstep(1.0, 0.75, np.hypot(u * squash, v / squash) / np.float32(radius))
