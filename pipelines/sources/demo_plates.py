"""Two parts of sheet steel: an L-shaped bracket that lies at any angle, and a ruler on a long and narrow picture.

Both are lists of shapes in the part's own coordinates; what is printed or punched into them turns with the part, while
lamp and camera stay where they are.
"""

import functools
import math

import numpy as np
import scipy
from PIL import Image, ImageDraw, ImageFont

from pipelines.sources.demo_surfaces import (
    Array,
    Defect,
    Rng,
    Surface,
    batch_variation,
    belt,
    colour,
    fractal_noise,
    grid,
    lay,
    lettering,
    misprint,
    posed_grid,
    printed,
    rotated,
    rounded_box,
    scratch,
    smooth_noise,
    smoothstep,
    stain,
    table,
)

# Bracket: punched from cold-rolled steel, on the gear's conveyor belt

BRACKET_TEXT = "R 40"
LEG_WIDTH = 0.56
LEG_LENGTH = 1.28
FILLET = 0.13  # radius, between the legs
OPENINGS = [  # x, y, half the length of the straight part (along x), radius
    (-0.36, -0.44, 0.0, 0.105),
    (-0.36, -0.13, 0.0, 0.06),
    (-0.34, 0.34, 0.0, 0.14),
    (0.2, 0.25, 0.17, 0.065),
    (0.52, 0.5, 0.0, 0.045),  # a notch in the cut corner
]


def draw_bracket(rng: Rng, side: int, defect: Defect) -> Surface:
    dx, dy = rng.uniform(-0.05, 0.05, 2)
    angle = rng.uniform(0, 2 * math.pi)
    x, y = rotated(*grid(side), dx, dy, angle)
    ground = belt(rng, side)
    lift = np.zeros_like(x)
    if defect.kind == "bent_edge":
        x, y, lift = _bend(x, y, defect)
    edge, punched = _bracket_edge(x, y, defect)
    ink = lettering(BRACKET_TEXT, 400, 120)
    if defect.kind == "misprint":
        ink = misprint(ink, len(BRACKET_TEXT), defect)
    stamp = printed(ink, x / np.float32(0.4) + 0.2, (y - np.float32(0.4)) / np.float32(0.15))
    surface = _rolled_steel(rng, side, (x, y, edge), stamp, angle)
    bead = smoothstep(0.055, 0.015, np.hypot(x + np.float32(0.55), np.maximum(np.abs(y + np.float32(0.1)) - 0.38, 0)))
    surface.height = surface.height + np.float32(0.02) * bead + lift - np.float32(0.04) * punched
    spot = _on_leg(defect.rng("place"))
    if defect.kind == "scratch":
        scratch(surface, x, y, defect, spot, bright=2.0)
    if defect.kind == "stain":
        stain(surface, x, y, defect, spot, colour(0.62, 0.38, 0.22))
    return lay(ground, surface, edge, rng)


def _bracket_edge(x: Array, y: Array, defect: Defect) -> tuple[Array, Array]:
    """About the distance to the nearest edge, positive on the steel; and the dish, in [0, 1], of a failed punch."""
    corner = LEG_LENGTH / 2
    centre = corner - LEG_WIDTH / 2
    upright = rounded_box(x + np.float32(centre), y, (LEG_WIDTH / 2, corner), 0.07)
    foot = rounded_box(x, y - np.float32(centre), (corner, LEG_WIDTH / 2), 0.07)
    edge = np.maximum(upright, foot)
    u, v = x + np.float32(corner - LEG_WIDTH), np.float32(corner - LEG_WIDTH) - y  # from where the legs meet
    fillet = np.hypot(u - np.float32(FILLET), v - np.float32(FILLET)) - np.float32(FILLET)
    near = (np.abs(u) < FILLET) & (np.abs(v) < FILLET)
    edge = np.where(near, np.maximum(edge, fillet), edge)
    chamfer = (np.float32(0.98) - x - y * np.float32(0.9)) * np.float32(0.74)
    edge = np.minimum(edge, chamfer)
    punched = np.zeros_like(x)
    bad = int(defect.rng("opening").integers(len(OPENINGS)))
    for index, (cx, cy, straight, radius) in enumerate(OPENINGS):
        outside = np.hypot(np.maximum(np.abs(x - np.float32(cx)) - np.float32(straight), 0), y - np.float32(cy))
        if defect.kind == "missing_part" and index == bad:
            punched = smoothstep(radius + 0.01, 0.3 * radius, outside)
            outside = outside + np.float32(defect.between(0.5, 1.3) * radius)
        edge = np.minimum(edge, outside - np.float32(radius))
    return edge, punched


def _bend(x: Array, y: Array, defect: Defect) -> tuple[Array, Array, Array]:
    """Bend the end of one leg up: beyond the crease it is foreshortened, and slopes towards or away from the lamp."""
    rng = defect.rng("shape")
    outwards = rng.choice([0.0, -math.pi / 2]) + rng.uniform(-0.45, 0.45)
    u, v = rotated(x, y, 0, 0, outwards)
    beyond = np.maximum(u - np.float32(defect.between(0.52, 0.3)), 0)
    pull = np.float32(defect.between(0.08, 0.4)) * beyond
    rise = np.float32(defect.between(0.2, 0.9)) * rng.choice([-1, 1])
    x, y = rotated(u + pull, v, 0, 0, -outwards)
    return x, y, (rise * beyond).astype(np.float32)


def _on_leg(rng: Rng) -> tuple[float, float]:
    """A point of the steel: along the upright or the foot."""
    along, across = rng.uniform(-0.5, 0.5), rng.uniform(-0.15, 0.15)
    upright = rng.random() < 0.5
    return (-0.36 + across, along) if upright else (along, 0.36 + across)


def _rolled_steel(rng: Rng, side: int, place: tuple[Array, Array, Array], stamp: Array, angle: float) -> Surface:
    """Rolling marks along x: their reflection is broad across them, so the plate's brightness turns with it."""
    x, y, edge = place
    marks = scipy.ndimage.gaussian_filter1d(rng.standard_normal(2048).astype(np.float32), 2.0)
    waver = np.float32(0.004) * smooth_noise(rng, side, 4, 4)
    marks = marks[np.clip((y + waver + 1) * 1024, 0, 2047).astype(np.intp)]
    fine = rng.standard_normal((side, side), dtype=np.float32)
    cloud = fractal_noise(rng, side, 3, 4)
    across = math.sin(angle - math.radians(225)) ** 2  # 1 where the marks lie across the lamp's light
    shine = np.float32(0.06 + 0.1 * across) * (1 + 0.2 * marks + 0.1 * cloud)
    sheen = shine * smoothstep(0.008, 0.025, edge) * (1 - 0.5 * stamp)
    tone = (0.4 + 0.018 * marks + 0.014 * cloud + 0.01 * fine) * (1 - 0.3 * stamp)
    tone = tone * (1 - 0.25 * smoothstep(0.02, 0.0, edge))
    batch = colour(1.0, 1.0, 0.98) + batch_variation(rng, 0.01, 0.025)
    height = np.float32(0.026) * smoothstep(0.0, 0.03, edge) + np.float32(0.0004) * marks - np.float32(0.007) * stamp
    gloss = np.full_like(x, 0.22)
    return Surface((tone * batch).astype(np.float32), height.astype(np.float32), gloss, sheen.astype(np.float32))


# Ruler: etched spring steel on the inspection table; the camera sees the middle 0.4 of the frame's width

RULER_HALF = (0.29, 0.93)
RULER_TEXT = "BLM 18/8 INOX"
DIVISIONS = 9  # numbered, each of ten ticks
RULER_ZOOM = 1.6  # how much smaller scratches and stains are than on parts that fill the frame


def draw_ruler(rng: Rng, side: int, defect: Defect) -> Surface:
    x, y = posed_grid(rng, side, shift=0.018, degrees=0.7)
    ground = table(rng, side)
    dent = np.zeros_like(x)
    if defect.kind == "bent_edge":
        x, dent = _dent(x, y, defect)
    hole = np.hypot(x, y + np.float32(0.82)) - np.float32(0.055)
    edge = np.minimum(rounded_box(x, y, RULER_HALF, 0.04), hole)
    ink = _scale()
    if defect.kind == "misprint":
        ink = _misetch(ink, defect)
    etched = printed(ink, x / np.float32(2 * RULER_HALF[0]) + 0.5, y / np.float32(2 * RULER_HALF[1]) + 0.5)
    surface = _satin_steel(rng, side, (x, y, edge), etched)
    surface.height = surface.height + dent
    across, along = defect.rng("place").uniform((-0.2, -0.8), (0.2, 0.8)) * RULER_ZOOM
    fine = x * np.float32(RULER_ZOOM), y * np.float32(RULER_ZOOM)
    if defect.kind == "scratch":
        scratch(surface, *fine, defect, (across, along), bright=1.35)
    if defect.kind == "stain":
        stain(surface, *fine, defect, (across, along), colour(0.62, 0.55, 0.5))
    return lay(ground, surface, edge, rng)


@functools.cache
def _scale() -> Array:
    """The etching (rows, columns) in [0, 1] on the whole ruler: two scales, their numbers, and a line of text."""
    columns, rows = 464, 1488
    plate = Image.new("L", (columns, rows))
    pen = ImageDraw.Draw(plate)
    font = ImageFont.load_default(size=72)
    first, pitch = 0.15 * rows, 0.8 * rows / (10 * DIVISIONS)
    for tick in range(10 * DIVISIONS + 1):
        y = first + tick * pitch
        length = 84 if tick % 10 == 0 else 60 if tick % 5 == 0 else 38
        pen.line((0, y, length, y), fill=255, width=5)
        if tick % 10 == 0:
            pen.text((96, y), str(tick // 10), fill=255, font=font, anchor="lm")
        if tick % 6 == 0:
            pen.line((columns - (90 if tick % 30 == 0 else 48), y, columns, y), fill=255, width=5)
    text = Image.fromarray((lettering(RULER_TEXT, 620, 60) * 255).astype(np.uint8)).rotate(90, expand=True)
    plate.paste(text, (270, 560))
    ink = np.asarray(plate, dtype=np.float32) / 255
    ink.flags.writeable = False  # shared by all callers
    return ink


def _misetch(ink: Array, defect: Defect) -> Array:
    """A stretch of one scale etched wrongly."""
    middle = 250  # right of the numbers, left of the text
    part = slice(0, middle) if defect.rng("place").random() < 0.6 else slice(middle, None)
    ink = ink.copy()
    ink[:, part] = misprint(ink[:, part].T, 2 * DIVISIONS, defect).T
    return ink


def _dent(x: Array, y: Array, defect: Defect) -> tuple[Array, Array]:
    """A blow on one long edge: it gives way inwards, and the steel beside it rises or sinks."""
    rng = defect.rng("shape")
    hit, half = rng.uniform(-0.8, 0.8), rng.uniform(0.05, 0.09) + defect.between(0.0, 0.1)
    flank = float(rng.choice([-1, 1]))
    along = (y - np.float32(hit)) / np.float32(half)
    near = np.exp(-along * along) * smoothstep(0.05, RULER_HALF[0], x * np.float32(flank))
    rise = np.float32(defect.between(0.008, 0.045) * rng.choice([-1, 1]))
    x = x + np.float32(flank * defect.between(0.008, 0.06)) * near
    return x, (rise * near).astype(np.float32)


def _satin_steel(rng: Rng, side: int, place: tuple[Array, Array, Array], etched: Array) -> Surface:
    """Brushed lengthwise, with one soft highlight somewhere along it and black etching."""
    x, y, edge = place
    marks = scipy.ndimage.gaussian_filter1d(rng.standard_normal(1024).astype(np.float32), 0.8)
    marks = marks[np.clip((x + 0.5) * 1024, 0, 1023).astype(np.intp)]
    streaks = smooth_noise(rng, side, 5, side // 2)
    cloud = fractal_noise(rng, side, 3, 3)
    bright = (y - np.float32(rng.normal(-0.1, 0.25))) / np.float32(0.55)
    sheen = (0.04 + 0.15 * np.exp(-bright * bright)) * (1 + 0.2 * marks + 0.12 * streaks) * smoothstep(0, 0.02, edge)
    tone = 0.5 + 0.02 * marks + 0.018 * streaks + 0.012 * cloud
    batch = colour(0.98, 1.0, 1.01) + batch_variation(rng, 0.008, 0.02)
    wear = np.clip(0.88 + 0.05 * fractal_noise(rng, side, 20, 2), 0, 1)
    albedo = tone * batch * (1 - np.float32(0.86) * etched * wear)
    height = np.float32(0.02) * smoothstep(0.0, 0.035, edge) - np.float32(0.002) * etched
    sheen = sheen * (1 - np.float32(0.9) * etched)
    gloss = np.full_like(x, 0.2)
    return Surface(albedo.astype(np.float32), height.astype(np.float32), gloss, sheen.astype(np.float32))
