"""What the embedded data set shows: seven kinds of parts as a camera on a line would see them, and how they fail.

A part is drawn as a `Surface` (albedo, height, gloss) on a grid of twice the image's side, lit by a lamp and taken by a
camera (`photograph`): Lambert and specular shading of the height's normals, vignetting, lens blur, sensor grain. A
defect is drawn into the surface, so it catches the light and shifts geometry as the material would. The same part is
drawn without its defect too; the mask is where the two pictures differ.

Positions and lengths are in frame units: the frame spans [-1, 1] in both directions, y downwards; of a long part the
picture is the frame's middle columns or rows. Nothing here touches the disk, and every picture is a pure function of
its arguments.
"""

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import NDArray

from pipelines.sources.demo_plates import draw_bracket, draw_ruler
from pipelines.sources.demo_surfaces import (
    GOOD,
    SUPERSAMPLING,
    Array,
    Defect,
    Rng,
    Surface,
    anywhere,
    batch_variation,
    belt,
    blot,
    bump,
    colour,
    fractal_noise,
    generator,
    grid,
    lay,
    lettering,
    middle,
    misprint,
    mix,
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
from pipelines.sources.demo_weld import WELD_HEIGHT, draw_weld

VISIBLE = 0.018  # smallest difference, of a full scale of 1, that the mask takes in
SMALLEST_AREA = 5e-4  # of the picture; 33 pixels at a side of 256
SMALLEST_AREAS = {"weld": 2.5e-5}  # 15 pixels of 2,000 x 300


@dataclass(frozen=True, slots=True)
class Photo:
    image: NDArray[np.uint8]  # (H, W, 3), a square but for the categories of WIDTHS and HEIGHTS
    clean: NDArray[np.uint8]  # (H, W, 3), the same part, light and grain without the defect
    mask: NDArray[np.bool_]  # (H, W), True where the two differ visibly


# Fabric: plain weave

FABRIC_THREADS = 34  # per picture, each way


def draw_fabric(rng: Rng, side: int, defect: Defect) -> Surface:
    x, y = posed_grid(rng, side, shift=0.06, degrees=2)
    sag = np.float32(0.1)
    u = (x + 1.3) * np.float32(FABRIC_THREADS / 2) + sag * smooth_noise(rng, side, 5, 4)
    v = (y + 1.3) * np.float32(FABRIC_THREADS / 2) + sag * smooth_noise(rng, side, 4, 5)
    centre = anywhere(defect.rng("place"), 0.7)
    warp, weft = _threads(rng, u, v), _threads(rng, v, u)
    if defect.kind == "missing_part":
        warp = _pull_thread(warp, y, centre, defect)
    crimp_u = np.cos(np.float32(math.pi) * (u - 0.5)) * (1 - 2 * (np.floor(v) % 2))
    crimp_v = np.cos(np.float32(math.pi) * (v - 0.5)) * (1 - 2 * (np.floor(u) % 2))
    warp_height = np.where(warp > 0, 0.6 * warp + 0.45 * crimp_v, np.float32(-0.9))
    weft_height = np.where(weft > 0, 0.6 * weft - 0.45 * crimp_u, np.float32(-0.9))
    return _woven(rng, side, (x, y, u, v), (warp_height, weft_height), defect, centre)


def _threads(rng: Rng, across: Array, along: Array) -> Array:
    """The round profile (side, side) of parallel threads in [0, 1], 0 between them; each has its own thickness."""
    number = np.clip(np.floor(across), 0, 63).astype(np.intp)
    thickness = rng.normal(0.93, 0.035, 64).astype(np.float32)
    thick_places = rng.uniform(-0.2, 1.2, 64) * FABRIC_THREADS * 1.3
    slub = (rng.random(64) < 0.1) * rng.uniform(0.05, 0.15, 64)
    distance = (along - thick_places.astype(np.float32)[number]) * np.float32(0.35)
    width = thickness[number] + slub.astype(np.float32)[number] * np.exp(-distance * distance)
    offset = (across - np.floor(across) - 0.5) * 2 / np.clip(width, 0.7, 1.12)
    return np.sqrt(np.maximum(1 - offset * offset, 0))


def _pull_thread(warp: Array, y: Array, centre: tuple[float, float], defect: Defect) -> Array:
    """Take one warp thread out, or thin it, over part of its length."""
    side = warp.shape[0]
    pitch = side / FABRIC_THREADS
    column = round((centre[0] + 1) / 2 * side)
    left = column - round(pitch / 2)
    num_threads = 1 + (defect.severity > 0.6)
    window = np.zeros_like(warp)
    window[:, left : left + round(pitch * num_threads)] = 1
    half_length = np.float32(defect.between(0.2, 0.9))
    window *= smoothstep(1.0, 0.85, np.abs(y - np.float32(centre[1])) / half_length)
    return warp * (1 - window * np.float32(defect.between(0.55, 1.7)))


def _woven(
    rng: Rng,
    side: int,
    place: tuple[Array, Array, Array, Array],
    weave: tuple[Array, Array],
    defect: Defect,
    centre: tuple[float, float],
) -> Surface:
    """Colour, twist and fuzz of the yarn, and the cloth's own defects."""
    x, y, u, v = place
    warp_height, weft_height = weave
    on_top = warp_height > weft_height
    height = np.maximum(warp_height, weft_height)
    twist = np.sin(np.float32(2 * math.pi) * np.where(on_top, 2.2 * u + 1.1 * v, 2.2 * v - 1.1 * u))
    fuzz = rng.standard_normal((side, side), dtype=np.float32)
    batch = batch_variation(rng, 0.005, 0.012)
    shade_u = rng.normal(1, 0.03, 64).astype(np.float32)[np.clip(u, 0, 63).astype(np.intp)]
    shade_v = rng.normal(1, 0.03, 64).astype(np.float32)[np.clip(v, 0, 63).astype(np.intp)]
    yarn = np.where(on_top, colour(0.33, 0.43, 0.56) + batch, colour(0.62, 0.65, 0.66) + batch)
    depth = smoothstep(-1.0, 0.9, height)
    tone = np.where(on_top, shade_u, shade_v) * (1 + 0.05 * twist + 0.05 * fuzz) * (0.35 + 0.65 * depth)
    tone *= 1 + np.float32(0.025) * fractal_noise(rng, side, 3, 2)
    pitch = np.float32(2 / FABRIC_THREADS)
    surface = Surface(yarn * tone, height * pitch * np.float32(0.4), np.full_like(x, 0.03), np.zeros_like(x))
    if defect.kind == "hole":
        _tear(surface, (x, y, u, v), on_top, defect, centre)
    if defect.kind == "stain":
        stain(surface, x, y, defect, centre, colour(0.66, 0.52, 0.36))
    return surface


def _tear(
    surface: Surface,
    place: tuple[Array, Array, Array, Array],
    on_top: NDArray[np.bool_],
    defect: Defect,
    centre: tuple[float, float],
) -> None:
    """A hole in the cloth: every thread breaks at a length of its own, and the table shows through."""
    x, y, u, v = place
    rng = defect.rng("shape")
    fray = rng.uniform(-0.4, 0.4, (2, 64)).astype(np.float32)
    end = np.where(on_top, fray[0][np.clip(u, 0, 63).astype(np.intp)], fray[1][np.clip(v, 0, 63).astype(np.intp)])
    field = blot(rng, x, y, centre, defect.between(0.045, 0.24), 0.12) + end
    gone = smoothstep(0.0, 0.12, field)
    curl = np.exp(-((field + np.float32(0.12)) ** 2) * 60)
    surface.height = (surface.height + np.float32(0.016) * curl) * (1 - gone)
    surface.albedo = mix(surface.albedo, colour(0.1, 0.09, 0.085), gone)
    surface.gloss = surface.gloss * (1 - gone)


# Wood: a planed board


def draw_wood(rng: Rng, side: int, defect: Defect) -> Surface:
    x, y = posed_grid(rng, side, shift=0.1, degrees=3)
    knots = [(*anywhere(rng, 0.95), rng.uniform(0.05, 0.1)) for _ in range(rng.choice(3, p=[0.7, 0.25, 0.05]))]
    late, core = _rings(rng, x, y, knots)
    fibre = smooth_noise(rng, side, max(side // 28, 2), side // 3)
    fine = smooth_noise(rng, side, max(side // 10, 2), side)
    pores = np.maximum(smooth_noise(rng, side, side // 9, side // 2) - 1.5, 0)
    batch = batch_variation(rng, 0.008, 0.02)
    tone = 1 + 0.05 * fibre + 0.035 * fine - 0.16 * np.minimum(pores, 1) + 0.04 * fractal_noise(rng, side, 2, 2)
    albedo = mix(colour(0.8, 0.62, 0.42) + batch, colour(0.58, 0.37, 0.2), late)
    albedo = mix(albedo, colour(0.38, 0.22, 0.12), core) * tone
    height = np.float32(0.0011) * (0.6 * fine + 0.5 * fibre - 2.0 * pores) - np.float32(0.002) * late
    surface = Surface(albedo.astype(np.float32), height, 0.1 + 0.03 * fibre, np.zeros_like(x))
    centre = anywhere(defect.rng("place"), 0.65)
    if defect.kind == "scratch":
        scratch(surface, x, y, defect, centre, bright=1.28)
    if defect.kind == "stain":
        stain(surface, x, y, defect, centre, colour(0.5, 0.45, 0.45))
    if defect.kind == "hole":
        _bore(surface, x, y, defect, centre)
    return surface


def _rings(rng: Rng, x: Array, y: Array, knots: list[tuple[float, float, float]]) -> tuple[Array, Array]:
    """Late wood, and the knots' dark hearts, both (side, side) in [0, 1]: growth rings about a pith below the board."""
    side = x.shape[0]
    wander = np.float32(0.045) * smooth_noise(rng, side, 2, 3)
    pith, depth, slope = rng.uniform(-0.5, 0.5), rng.uniform(0.25, 0.45), rng.uniform(-0.15, 0.15)
    distance = np.hypot(x + wander - np.float32(pith), np.float32(depth) + np.float32(slope) * y)
    heart = np.zeros_like(x)
    for knot_x, knot_y, radius in knots:
        squared = (x - np.float32(knot_x)) ** 2 + ((y - np.float32(knot_y)) * np.float32(0.62)) ** 2
        squared = squared / np.float32(radius**2)
        distance = distance + np.float32(0.16) * np.exp(-0.22 * squared)
        inside = np.exp(-squared * squared)
        heart = np.maximum(heart, inside * (0.72 + 0.25 * np.cos(9 * np.sqrt(squared))))
    year = distance * np.float32(rng.uniform(10, 13)) + np.float32(0.12) * smooth_noise(rng, side, 3, 12)
    year = year + np.float32(0.35) * np.sin(np.float32(1.9) * year + np.float32(rng.uniform(0, 6)))
    season = year - np.floor(year)
    strength = rng.uniform(0.5, 0.65)
    late = smoothstep(0.25, 0.93, season) * smoothstep(1.0, 0.94, season) * np.float32(strength)
    return late, heart


def _bore(surface: Surface, x: Array, y: Array, defect: Defect, centre: tuple[float, float]) -> None:
    """Beetle holes: a few round pits with a splintered rim."""
    rng = defect.rng("shape")
    for _ in range(1 + int(rng.integers(0, 1 + round(defect.between(0, 4))))):
        spot = (centre[0] + rng.normal(0, 0.13), centre[1] + rng.normal(0, 0.13))
        radius = defect.between(0.018, 0.07) * rng.uniform(0.8, 1.25)
        field = blot(rng, x, y, spot, radius, 0.1)
        pit = smoothstep(-0.1, 0.35, field)
        rim = smoothstep(-0.9, -0.1, field) * (1 - pit)
        surface.height = surface.height - np.float32(0.02) * pit
        surface.albedo = surface.albedo * (1 - np.float32(0.86) * pit - np.float32(0.22) * rim)
        surface.gloss = surface.gloss * (1 - pit)


# Gear: turned steel on a conveyor belt

GEAR_TEETH = 16
GEAR_TEXT = "BLM  Z16  M4  C45E"


def draw_gear(rng: Rng, side: int, defect: Defect) -> Surface:
    x, y = posed_grid(rng, side, shift=0.015, degrees=1.2)
    ground = belt(rng, side)
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    which = int(defect.rng("place").integers(GEAR_TEETH))
    lean = np.zeros_like(x)
    if defect.kind == "bent_edge":
        lean = _near_tooth(angle, which, 0.75) * smoothstep(0.68, 0.95, radius)
        angle = angle + lean * np.float32(defect.between(0.03, 0.2) * defect.rng("shape").choice([-1, 1]))
    edge = _gear_edge(radius, angle, x, y)
    if defect.kind == "missing_part":
        edge = np.minimum(edge, _break(x, y, which, defect))
    ink = lettering(GEAR_TEXT, 1600, 64)
    if defect.kind == "misprint":
        ink = misprint(ink, len(GEAR_TEXT), defect)
    turn = (angle / np.float32(2 * math.pi) + 0.75) % 1
    stamp = printed(ink, (turn - 0.08) / 0.84, (np.float32(0.645) - radius) / np.float32(0.125))
    surface = _steel(rng, side, (radius, angle, edge), stamp)
    if defect.kind == "bent_edge":
        tilt = lean * (radius - np.float32(0.7))
        surface.height = surface.height + np.float32(defect.between(0.1, 0.9)) * tilt
        surface.sheen = surface.sheen * (1 - np.float32(defect.between(0.05, 0.5)) * lean)
    if defect.kind == "scratch":
        direction, distance = defect.rng("place").uniform((0, 0.38), (2 * math.pi, 0.7))
        middle = (distance * math.cos(direction), distance * math.sin(direction))
        scratch(surface, x, y, defect, middle, bright=1.7)
    return lay(ground, surface, edge, rng)


def _near_tooth(angle: Array, tooth: int, reach: float) -> Array:
    """1 on the middle of a tooth, 0 from `reach` teeth away."""
    pitch = 2 * math.pi / GEAR_TEETH
    away = (angle - np.float32(tooth * pitch) + np.float32(math.pi)) % np.float32(2 * math.pi) - np.float32(math.pi)
    return smoothstep(reach, 0.3 * reach, np.abs(away) / np.float32(pitch))


def _gear_edge(radius: Array, angle: Array, x: Array, y: Array) -> Array:
    """About the distance to the nearest edge of the blank, positive on the steel."""
    tooth = smoothstep(-0.35, 0.35, np.cos(angle * GEAR_TEETH))
    outer = np.float32(0.745) + np.float32(0.165) * tooth - radius
    bore = radius - np.float32(0.25)
    key = np.maximum(np.abs(x) - np.float32(0.055), np.abs(y + np.float32(0.27)) - np.float32(0.06))
    sixth = (angle + np.float32(math.pi / 6)) % np.float32(math.pi / 3) - np.float32(math.pi / 6)
    windows = np.hypot(radius * np.cos(sixth) - np.float32(0.41), radius * np.sin(sixth)) - np.float32(0.07)
    return np.minimum(np.minimum(outer, bore), np.minimum(key, windows))


def _break(x: Array, y: Array, tooth: int, defect: Defect) -> Array:
    """Distance to where a tooth broke off: a rough line across it, nearer to its root the worse."""
    direction = 2 * math.pi / GEAR_TEETH * tooth
    u, v = rotated(x, y, 0, 0, direction)
    rough = np.float32(0.012) * smooth_noise(defect.rng("shape"), x.shape[0], 40, 40)
    tilt = np.float32(defect.rng("shape").uniform(-0.7, 0.7))
    line = np.float32(defect.between(0.88, 0.745)) + tilt * v + rough - u
    return np.where(np.abs(v) < 0.15, line, np.float32(1))


def _steel(rng: Rng, side: int, shape: tuple[Array, Array, Array], stamp: Array) -> Surface:
    """Face-turned steel: circular tool marks that split the lamp's reflection into two bright fans."""
    radius, angle, edge = shape
    marks = scipy.ndimage.gaussian_filter1d(rng.standard_normal(1024).astype(np.float32), 1.0)
    marks = marks[np.clip(radius * 1024, 0, 1023).astype(np.intp)]
    fan = np.float32(rng.normal(-0.8, 0.06))
    sharp = np.cos(angle - fan) ** 2
    wide = np.cos(angle - fan - np.float32(1.1)) ** 2
    sheen = np.float32(0.34) * sharp**5 + np.float32(0.16) * wide**3
    sheen = sheen * (1 + 0.35 * marks) * smoothstep(0.012, 0.03, edge) * (1 - 0.75 * stamp)
    cloud = fractal_noise(rng, side, 4, 3)
    tone = (0.43 + 0.035 * marks + 0.014 * cloud) * (1 - 0.5 * stamp) * (1 - 0.25 * smoothstep(0.02, 0.0, edge))
    batch = colour(0.97, 1.0, 1.03) + batch_variation(rng, 0.01, 0.02)
    outer, inner = (smoothstep(0.012, 0.0, np.abs(radius - np.float32(r))) for r in (0.69, 0.5))
    height = np.float32(0.03) * smoothstep(0.0, 0.035, edge) + np.float32(0.0007) * marks
    height = height - np.float32(0.008) * stamp - np.float32(0.009) * (outer + inner)
    return Surface(tone * batch, height.astype(np.float32), np.full_like(radius, 0.3), sheen)


# Blister: six tablets under clear film

BLISTER_TEXT = "LOT 4821  EXP 09/29"
TABLETS = [(column, row) for row in (-0.43, 0.43) for column in (-0.56, 0.0, 0.56)]
TABLET_RADIUS = 0.175
POCKET_RADIUS = 0.24


def draw_blister(rng: Rng, side: int, defect: Defect) -> Surface:
    x, y = posed_grid(rng, side, shift=0.02, degrees=1.5)
    ground = table(rng, side)
    lift = np.zeros_like(x)
    if defect.kind == "bent_edge":
        x, y, lift = _fold(x, y, defect)
    edge = rounded_box(x, y, (0.89, 0.8), 0.09)
    ink = lettering(BLISTER_TEXT, 1200, 64)
    if defect.kind == "misprint":
        ink = misprint(ink, len(BLISTER_TEXT), defect)
    ink = printed(ink, (x + np.float32(0.76)) / np.float32(1.52), (y + np.float32(0.07)) / np.float32(0.14))
    surface = _foil(rng, side, x, y, edge, ink)
    bad = int(defect.rng("pocket").integers(len(TABLETS)))
    for index, centre in enumerate(TABLETS):
        _fill_pocket(rng, surface, x, y, centre, defect if index == bad else None)
    surface.height = surface.height + lift
    spot = anywhere(defect.rng("place"), 0.62)
    if defect.kind == "hole":
        _puncture(surface, x, y, defect, spot)
    if defect.kind == "stain":
        near = (TABLETS[bad][0] + 0.15 * spot[0], TABLETS[bad][1] + 0.15 * spot[1])
        stain(surface, x, y, defect, near, colour(0.72, 0.56, 0.36))
    return lay(ground, surface, edge, rng)


def _fold(x: Array, y: Array, defect: Defect) -> tuple[Array, Array, Array]:
    """Bend a corner or an edge up: its coordinates draw inwards, and its height rises beyond the crease."""
    rng = defect.rng("shape")
    direction = math.atan2(rng.choice([-1, 1]) * 0.8, rng.choice([-1, 1]) * 0.89) + rng.uniform(-0.25, 0.25)
    along = x * np.float32(math.cos(direction)) + y * np.float32(math.sin(direction))
    crease = defect.between(1.04, 0.86)
    beyond = np.maximum(along - np.float32(crease), 0)
    pull = np.float32(defect.between(0.25, 0.9)) * beyond
    lift = np.float32(defect.between(0.12, 0.5)) * np.sqrt(beyond * beyond + np.float32(1e-4)) - np.float32(1e-3)
    x = x + pull * np.float32(math.cos(direction))
    y = y + pull * np.float32(math.sin(direction))
    return x, y, np.where(beyond > 0, lift, np.float32(0))


def _foil(rng: Rng, side: int, x: Array, y: Array, edge: Array, ink: Array) -> Surface:
    """Embossed aluminium with dark blue print, slightly wavy, sealed around the rim."""
    knurl = np.sin(np.float32(75) * (x + y)) * np.sin(np.float32(75) * (x - y))
    waves = smooth_noise(rng, side, 5, 5)
    streaks = smooth_noise(rng, side, 4, max(side // 6, 4))
    flat = smoothstep(0.1, 0.115, np.abs(y)) * smoothstep(0.02, 0.04, edge)
    tone = 0.62 + 0.012 * streaks + 0.014 * fractal_noise(rng, side, 3, 3) + 0.025 * knurl * flat
    batch = colour(0.985, 1.0, 1.02) + batch_variation(rng, 0.008, 0.015)
    wear = np.clip(0.86 + 0.06 * fractal_noise(rng, side, 24, 2), 0, 1)
    albedo = mix(tone * batch, colour(0.1, 0.15, 0.38), ink * wear)
    height = np.float32(0.0035) * waves + np.float32(0.0022) * knurl * flat
    height = height + np.float32(0.02) * smoothstep(0, 0.03, edge)
    sheen = np.float32(0.05) * np.maximum(waves, 0)
    return Surface(albedo.astype(np.float32), height, np.full_like(x, 0.32), sheen)


def _fill_pocket(
    rng: Rng, surface: Surface, x: Array, y: Array, centre: tuple[float, float], defect: Defect | None
) -> None:
    """A dome of film with a scored tablet inside; the tablet lies a little differently in each."""
    jitter, turn = rng.normal(0, 0.006, 2), rng.normal(0, 0.2)
    batch = colour(0.93, 0.9, 0.84) + batch_variation(rng, 0.008, 0.008)
    window = _around(centre, x.shape[0])
    albedo, height, gloss, sheen = (
        a[..., *window] for a in (surface.albedo, surface.height, surface.gloss, surface.sheen)
    )
    u, v = rotated(x[window], y[window], *centre, 0)
    pocket = np.float32(POCKET_RADIUS) - np.hypot(u, v)
    s, t = rotated(u, v, jitter[0], jitter[1], turn)
    tablet = np.float32(TABLET_RADIUS) - np.hypot(s, t)
    if defect is not None and defect.kind == "missing_part":
        tablet = _snap(tablet, s, t, defect)
    wall = smoothstep(0.0, 0.05, pocket)
    inside = smoothstep(-0.006, 0.006, tablet)
    crevice = smoothstep(0.07, 0.0, np.abs(tablet)) * (1 - inside) * wall
    albedo *= 1 - np.float32(0.2) * wall - np.float32(0.3) * crevice
    score = smoothstep(0.014, 0.004, np.abs(t)) * smoothstep(0.0, 0.03, tablet)
    albedo += (batch * (1 - np.float32(0.18) * score) - albedo) * inside
    height *= 1 - wall
    height += np.float32(0.035) * wall + np.float32(0.028) * smoothstep(0.0, 0.055, tablet) - np.float32(0.006) * score
    gloss *= 1 - np.float32(0.7) * inside
    gleam = bump(u, v, (-0.12, -0.13), 0.03) + np.float32(0.45) * bump(u, v, (0.14, 0.13), 0.022)
    arc = np.exp(-((pocket - np.float32(0.035)) ** 2) * np.float32(9000)) * smoothstep(0.0, 0.28, -(u + v))
    sheen *= 1 - wall
    sheen += np.float32(0.4) * gleam + np.float32(0.35) * arc


def _around(centre: tuple[float, float], side: int) -> tuple[slice, slice]:
    """The part of the picture that a pocket can reach, wherever the pack lies."""
    reach = POCKET_RADIUS + 0.075
    length = round(reach * side)
    column, row = (slice(start, start + length) for start in (round((c - reach + 1) / 2 * side) for c in centre))
    return row, column


def _snap(tablet: Array, s: Array, t: Array, defect: Defect) -> Array:
    """Break a piece off the tablet, from a chip of its rim to the whole of it."""
    rng = defect.rng("shape")
    direction = rng.uniform(0, 2 * math.pi)
    reach = s * np.float32(math.cos(direction)) + t * np.float32(math.sin(direction))
    rough = np.float32(0.008) * smooth_noise(rng, s.shape[0], 40, 40)
    return np.minimum(tablet, np.float32(defect.between(0.82, -1.1) * TABLET_RADIUS) - reach + rough)


def _puncture(surface: Surface, x: Array, y: Array, defect: Defect, spot: tuple[float, float]) -> None:
    """Pierce the pack: a dark gash with a bright torn rim."""
    field = blot(defect.rng("shape"), x, y, spot, defect.between(0.02, 0.085), 0.3)
    gap = smoothstep(0.0, 0.25, field)
    rim = smoothstep(-0.5, 0.0, field) * (1 - gap)
    surface.albedo = mix(surface.albedo, colour(0.07, 0.07, 0.08), gap).astype(np.float32)
    surface.height = surface.height + np.float32(0.012) * rim - np.float32(0.02) * gap
    surface.gloss = surface.gloss * (1 - gap)
    surface.sheen = surface.sheen * (1 - gap)


SCENES: dict[str, Callable[[Rng, int, Defect], Surface]] = {
    "blister": draw_blister,
    "bracket": draw_bracket,
    "fabric": draw_fabric,
    "gear": draw_gear,
    "ruler": draw_ruler,
    "weld": draw_weld,
    "wood": draw_wood,
}

DEFECTS: dict[str, tuple[str, ...]] = {
    "blister": ("bent_edge", "hole", "misprint", "missing_part", "stain"),
    "bracket": ("bent_edge", "misprint", "missing_part", "scratch", "stain"),
    "fabric": ("hole", "missing_part", "stain"),
    "gear": ("bent_edge", "misprint", "missing_part", "scratch"),
    "ruler": ("bent_edge", "misprint", "scratch", "stain"),
    "weld": ("hole", "scratch", "stain"),
    "wood": ("hole", "scratch", "stain"),
}

# Where a picture is not square, of its longer side. What is drawn of a narrow part is all of the square, of a low one
# the rows that are seen.
WIDTHS: dict[str, float] = {"ruler": 0.4}
HEIGHTS: dict[str, float] = {"weld": WELD_HEIGHT}


# The camera


def photograph(category: str, kind: str, key: tuple[int, ...], image_size: int) -> Photo:
    """Take the picture of one part of `category` with that kind of defect (or `GOOD`), all chance from `key`."""
    severity = generator(key, "severity").uniform() ** 0.75
    clean = _exposure(category, Defect(GOOD, 0.0, key), key, image_size)
    if kind == GOOD:
        picture = _develop(clean, key)
        return Photo(picture, picture, np.zeros(clean.shape[:2], dtype=np.bool_))
    for attempt in itertools.count():  # another defect, and a worse one, if this one can hardly be seen
        defect = Defect(kind, min(severity + 0.2 * attempt, 1.0), (*key, attempt))
        faulty = _exposure(category, defect, key, image_size)
        mask = visible_difference(clean, faulty)
        if mask.mean() >= SMALLEST_AREAS.get(category, SMALLEST_AREA):
            break
    return Photo(_develop(faulty, key), _develop(clean, key), mask)


def _exposure(category: str, defect: Defect, key: tuple[int, ...], image_size: int) -> Array:
    """The light (H, W, 3) on the sensor: the part lit, seen through the lens, with no grain yet."""
    part_rng, camera_rng = generator(key, "part"), generator(key, "camera")
    side = SUPERSAMPLING * image_size
    light = _lit(SCENES[category](part_rng, side, defect), camera_rng)
    steps = range(SUPERSAMPLING)
    light = functools.reduce(np.add, (light[:, i::SUPERSAMPLING, j::SUPERSAMPLING] for i in steps for j in steps))
    seen = middle(image_size, round(WIDTHS.get(category, 1.0) * image_size))
    light, x, y = (values[..., seen] for values in (light, *grid(image_size, light.shape[1])))
    slope_x, slope_y = camera_rng.normal(0, 0.015, 2)
    falloff = 1 + np.float32(slope_x - 0.03) * x + np.float32(slope_y - 0.03) * y - np.float32(0.07) * (x * x + y * y)
    gain = (1 + batch_variation(camera_rng, 0.005, 0.02)) / SUPERSAMPLING**2
    light = light * (falloff * gain)
    blur = camera_rng.uniform(0.4, 0.65) * light.shape[1] / 256
    return np.moveaxis(scipy.ndimage.gaussian_filter(light, (0, blur, blur)), 0, -1)


def _lit(surface: Surface, rng: Rng) -> Array:
    """Lambert and Blinn-Phong shading (3, H, W) under a lamp from the upper left."""
    azimuth, elevation = rng.normal(math.radians(225), 0.06), rng.normal(0.92, 0.03)
    across = math.cos(elevation)
    lamp = np.array([math.cos(azimuth) * across, math.sin(azimuth) * across, math.sin(elevation)])
    halfway = lamp + np.array([0, 0, 1])
    halfway /= np.linalg.norm(halfway)
    spacing = np.float32(2 / surface.height.shape[1])
    slope_y, slope_x = (np.gradient(surface.height, spacing, axis=axis) for axis in (0, 1))
    length = np.sqrt(1 + slope_x * slope_x + slope_y * slope_y)
    facing = _towards(lamp, slope_x, slope_y) / length
    mirror = _towards(halfway, slope_x, slope_y) / length
    diffuse = np.float32(0.4) + np.float32(0.6 / lamp[2]) * facing
    reflection = surface.gloss * mirror**24 + surface.sheen
    return np.maximum(surface.albedo, 0) * diffuse + reflection


def _towards(direction: NDArray[np.float64], slope_x: Array, slope_y: Array) -> Array:
    """Cosine, times the normal's length, between the normals of a height field and a direction; 0 if turned away."""
    x, y, z = direction.astype(np.float32)
    return np.maximum(z - x * slope_x - y * slope_y, 0)


def _develop(light: Array, key: tuple[int, ...]) -> NDArray[np.uint8]:
    """Add the sensor's grain, roll off the highlights, and quantise."""
    rng = generator(key, "grain")
    rolled = np.where(light > 0.8, 0.8 + 0.2 * np.tanh((light - 0.8) / 0.2), light)
    shot = rng.standard_normal(light.shape, dtype=np.float32) * np.sqrt(np.maximum(rolled, 0.02)) * np.float32(0.009)
    luminance = rng.standard_normal(light.shape[:2], dtype=np.float32)[..., None] * np.float32(0.005)
    return (np.clip(rolled + shot + luminance, 0, 1) * 255 + 0.5).astype(np.uint8)


def visible_difference(clean: Array, faulty: Array) -> NDArray[np.bool_]:
    """Where two exposures (H, W, 3) of one part differ visibly, without specks and pinholes, (H, W)."""
    difference = scipy.ndimage.gaussian_filter(np.abs(faulty - clean).max(axis=-1), 0.6)
    seen = difference > max(VISIBLE, 0.12 * float(difference.max()))
    closed = scipy.ndimage.binary_closing(np.pad(seen, 2), iterations=2)[2:-2, 2:-2]
    filled = scipy.ndimage.binary_fill_holes(closed)
    pieces, count = scipy.ndimage.label(filled, structure=np.ones((3, 3)))
    area = np.bincount(pieces.ravel(), minlength=count + 1)
    keep = area >= 0.05 * area[1:].max(initial=0)
    keep[0] = False
    return keep[pieces]
