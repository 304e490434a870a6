"""Test sets drawn from known distributions: how often intervals hold the truth, and chance passes for a difference.

`python tests/simulated.py` prints the tables of docs/statistics.md; slow tests hold what they promise.
"""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1])]

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from scipy.stats import norm

from pipelines.evaluation.certainty import Measured, average, compare, compare_all, intervals_of, measure
from pipelines.evaluation.curves import Curve, image_curve
from pipelines.evaluation.groups import exchangeable, leave_one_out
from pipelines.evaluation.outcomes import Outcome, PixelCounts, TestSet
from pipelines.evaluation.succession import Trial, trial
from pipelines.evaluation.thresholds import NUM_FOLDS, threshold_at

Floats = NDArray[np.float64]
Table = dict[str, dict[str, float]]  # row -> column -> percent

SIZES = ((6, 11), (14, 26), (20, 63), (63, 20), (100, 200))  # good and anomalous images
PIXEL_SIZES = SIZES[:4]
AUROCS = (0.85, 0.95, 0.98, 0.99, 0.999)
SHAPES = ("equal", "wide", "narrow", "exponential", "two kinds")  # how defects score beside good parts
PIXEL_SHAPES = ("easy", "middling", "hard", "some invisible", "of all sizes")
_DECISION = 2.0  # a threshold
_TRUTH = 400_000  # images that stand for all


def named(size: tuple[int, int]) -> str:
    return f"{size[0]} + {size[1]}"


# ---- scores of images ----------------------------------------------------------------------------------------------


def draw(
    rng: np.random.Generator, shape: str, auroc: float, size: tuple[int, int], shared: Floats | None = None
) -> Floats:
    """Scores of good images, then of anomalous ones; `shared`, if any, is three quarters of their variance."""
    good, anomalous = size
    noise = rng.normal(size=good + anomalous)
    if shared is not None:
        noise = np.sqrt(0.75) * shared + np.sqrt(0.25) * noise
    if shape == "exponential":
        scale = np.repeat([1.0, auroc / (1 - auroc)], size)
        return -np.log(norm.sf(noise)) * scale
    if shape == "two kinds":  # some defects are invisible, the others cannot be missed
        seen = rng.random(good + anomalous) >= 2 * (1 - auroc)
        return noise + 20.0 * (seen & (np.arange(good + anomalous) >= good))
    width = {"equal": 1.0, "wide": 3.0, "narrow": 1 / 3}[shape]
    place = norm.ppf(auroc) * np.sqrt(1 + width**2)
    return np.where(np.arange(good + anomalous) < good, noise, noise * width + place)


def outcome_of(name: str, scores: Floats, size: tuple[int, int], category: str = "nut") -> Outcome:
    labels = np.repeat([False, True], size)
    images = tuple((f"{place:04}.png", bool(label)) for place, label in enumerate(labels))
    return Outcome(
        name, TestSet(category, images, "", 1, "", None), scores, _DECISION, image_figures(scores, labels), None
    )


def image_figures(scores: Floats, labels: NDArray[np.bool_]) -> dict[str, float]:
    _, curve = image_curve(scores, labels)
    called = scores > _DECISION
    return {
        "image_auroc": float(curve.auroc()),
        "image_ap": float(curve.ap()),
        "image_f1_max": float(curve.f1().max()),
        "recall": float(called[labels].mean()),
        "false_alarms": float(called[~labels].mean()),
    }


# ---- pixels --------------------------------------------------------------------------------------------------------

_SIDE, _BINS = 16, 150
_EDGES = np.linspace(-4, 12, _BINS - 1)[::-1]


def draw_pixels(rng: np.random.Generator, shape: str, size: tuple[int, int]) -> PixelCounts:
    """Images that are brighter or darker as a whole, with one region each where there is a defect."""
    total = sum(size)
    background = rng.normal(size=(total, _SIDE**2)) + 0.5 * rng.normal(size=(total, 1))
    contrast = {"easy": 5.0, "middling": 2.5, "hard": 1.2, "some invisible": 5.0, "of all sizes": 3.0}[shape]
    counts, called = np.zeros((3, total, _BINS)), np.zeros((total, 2), np.int64)
    for row, scores in enumerate(background):
        area = 0
        if row >= size[0]:
            even, odd = int(rng.integers(3, 40)), int(np.clip(rng.lognormal(2, 1), 1, 150))
            area = odd if shape == "of all sizes" else even
            unseen = shape == "some invisible" and rng.random() < 0.15
            scores[:area] += 0 if unseen else rng.normal(contrast, 0.7)
        bins = np.searchsorted(-_EDGES, -scores)
        counts[0, row] = np.bincount(bins[area:], minlength=_BINS)
        counts[1, row] = np.bincount(bins[:area], minlength=_BINS)
        counts[2, row] = counts[1, row] / max(area, 1)
        called[row] = (scores[area:] > _DECISION).sum(), (scores[:area] > _DECISION).sum()
    binned = counts[0].astype(np.int32), counts[1].astype(np.int32), counts[2].astype(np.float32)
    return PixelCounts(*binned, called, np.zeros(total, bool))


def pixel_figures(pixels: PixelCounts) -> dict[str, float]:
    kinds = pixels.normal, pixels.anomalous, pixels.regions
    curve = Curve.of(*(counts.sum(0, dtype=np.float64) for counts in kinds))
    ranked = {"pixel_auroc": curve.auroc(), "pixel_ap": curve.ap(), "pixel_f1_max": curve.f1().max()}
    figures = ranked | curve.overlaps(saturated=False)
    return {name: float(value) for name, value in figures.items()}


# ---- how often intervals hold the truth ------------------------------------------------------------------------------


def _held(truth: dict[str, float], outcomes: Iterable[Outcome]) -> dict[str, float]:
    """Percent of the outcomes whose interval of a figure holds what it is of all images."""
    found: dict[str, list[bool]] = {}
    for outcome in outcomes:
        for name, (low, high) in intervals_of(outcome).items():
            found.setdefault(name, []).append(low <= truth[name] <= high)
    return {name: 100 * float(np.mean(hits)) for name, hits in found.items()}


def _lower(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    """Of each figure that the other has, the lower percentage."""
    return {name: min(percent, one.get(name, 100.0)) for name, percent in other.items()}


def image_coverage(trials: int = 1000) -> Table:
    """The lowest coverage over all shapes and AUROCs, of each figure."""
    rng = np.random.default_rng(12)
    table: Table = {}
    for size in SIZES:
        worst: dict[str, float] = {}
        for shape in SHAPES:
            for auroc in AUROCS:
                many = _TRUTH // sum(size)
                all_images = (size[0] * many, size[1] * many)
                truth = image_figures(draw(rng, shape, auroc, all_images), np.repeat([False, True], all_images))
                truth["image_auroc"] = auroc
                drawn = (outcome_of("a", draw(rng, shape, auroc, size), size) for _ in range(trials))
                worst = _lower(worst, _held(truth, drawn))
        table[named(size)] = worst
    return table


def pixel_coverage(trials: int = 200) -> Table:
    """The lowest coverage over all shapes, of each figure."""
    rng = np.random.default_rng(12)
    table: Table = {}
    for size in PIXEL_SIZES:
        worst: dict[str, float] = {}
        for shape in PIXEL_SHAPES:
            truth = pixel_figures(draw_pixels(rng, shape, (200 * size[0], 200 * size[1])))

            def drawn(shape: str = shape, size: tuple[int, int] = size) -> Outcome:
                pixels = draw_pixels(rng, shape, size)
                images = tuple((f"{place}.png", place >= size[0]) for place in range(sum(size)))
                test_set = TestSet("nut", images, "", 1, "", None)
                return Outcome("a", test_set, np.zeros(sum(size)), 0.0, pixel_figures(pixels), pixels)

            worst = _lower(worst, _held(truth, (drawn() for _ in range(trials))))
        table[named(size)] = worst
    return table


def average_coverage(trials: int = 500) -> Table:
    """Of the macro average of image AUROC over categories, each with another AUROC."""
    rng = np.random.default_rng(12)
    table: Table = {}
    for size in SIZES[:4]:
        table[named(size)] = {}
        for number in (2, 5, 15):
            hits = 0
            for _ in range(trials):
                aurocs = rng.choice(AUROCS, number)
                cells = [outcome_of("a", draw(rng, "equal", auroc, size), size) for auroc in aurocs]
                low, high = average([measure(cell, 50) for cell in cells]).intervals["image_auroc"]
                hits += low <= aurocs.mean() <= high
            table[named(size)][f"{number} categories"] = 100 * hits / trials
    return table


# ---- how often chance passes for a difference ----------------------------------------------------------------------

Shapes = tuple[str, str]
ALIKE: Shapes = ("equal", "equal")
UNLIKE: Shapes = ("equal", "wide")  # as good by image AUROC, in another way


def _models(
    rng: np.random.Generator, kinds: Iterable[tuple[str, float]], size: tuple[int, int], resamples: int
) -> list[Measured]:
    """Of these shapes and AUROCs, on the same images, whose own difficulty is three quarters of the variance."""
    shared = rng.normal(size=sum(size))
    return [
        measure(outcome_of(f"model {place}", draw(rng, shape, auroc, size, shared), size), resamples)
        for place, (shape, auroc) in enumerate(kinds)
    ]


def false_winners(
    shapes: Shapes = ALIKE, metric: str = "image_auroc", trials: int = 400, resamples: int = 199
) -> Table:
    """How often one of two equally good models is called better."""
    rng = np.random.default_rng(12)
    table: Table = {}
    for size in SIZES:
        table[named(size)] = {}
        for auroc in AUROCS:
            pairs = (_models(rng, [(shape, auroc) for shape in shapes], size, resamples) for _ in range(trials))
            won = [compare(metric, *pair).verdict != "tie" for pair in pairs]
            table[named(size)][f"{100 * auroc:.4g}"] = 100 * float(np.mean(won))
    return table


def false_tables(trials: int = 200, resamples: int = 399) -> Table:
    """How often any of five equally good models is called better than any other."""
    rng = np.random.default_rng(12)
    table: Table = {}
    for size in SIZES[:4]:
        tables = (_models(rng, [("equal", 0.95)] * 5, size, resamples) for _ in range(trials))
        won = [any(pair.verdict != "tie" for pair in compare_all(["image_auroc"], table)) for table in tables]
        table[named(size)] = {"95": 100 * float(np.mean(won))}
    return table


def found_differences(trials: int = 100, resamples: int = 199) -> Table:
    """How often the better one of two models is called better."""
    rng = np.random.default_rng(12)
    table: Table = {}
    for size in SIZES:
        table[named(size)] = {}
        for low, high in ((0.85, 0.95), (0.9, 0.98), (0.95, 0.99), (0.98, 0.999)):
            pairs = (_models(rng, [("equal", low), ("equal", high)], size, resamples) for _ in range(trials))
            won = [compare("image_auroc", *pair).verdict == "b" for pair in pairs]
            table[named(size)][f"{100 * low:.4g} and {100 * high:.4g}"] = 100 * float(np.mean(won))
    return table


# ---- who is refused as champion --------------------------------------------------------------------------------------

FROZEN_SIZES = ((15, 2, 6), (30, 6, 8), (60, 5, 20))  # good parts, types of defect, defects of each
SEEN = {"equal": 1.0, "half as far": 0.5, "blind": 0.0}  # how far from good parts, if 1 is how far by the champion


def heir(
    rng: np.random.Generator, size: tuple[int, int, int], auroc: float, seen: float = 1.0, resamples: int = 199
) -> Trial:
    """A champion of this AUROC is challenged by a model that is as good but for the first type of defect.

    Three quarters of the variance of their scores is the images' own. Thresholds come from the same good parts,
    held out, as many as are tested.
    """
    good, types, each = size
    kinds = [(f"type {number // each}", f"{number % each:02}.png") for number in range(types * each)]
    defects = {f"{kind}/{name}": kind for kind, name in kinds}
    images = (*((f"good/{number:02}.png", False) for number in range(good)), *((path, True) for path in defects))
    shared = rng.normal(size=good + len(images))
    outcomes = []
    for name, of_first in (("old", 1.0), ("new", seen)):
        noise = np.sqrt(0.75) * shared + np.sqrt(0.25) * rng.normal(size=len(shared))
        far = np.repeat([0.0, of_first, 1.0], (good, each, (types - 1) * each)) * norm.ppf(auroc) * np.sqrt(2)
        threshold = threshold_at(torch.from_numpy(noise[:good]), RATE).value
        test_set = TestSet("nut", images, "", 1, "", None)
        outcomes.append(Outcome(name, test_set, noise[good:] + far, threshold, {}, None))
    return trial(*outcomes, defects, "run", resamples)


def refused_successors(trials: int = 1000, resamples: int = 199) -> Table:
    """How often that happens, by how far the challenger sees the first type of defect from good parts."""
    rng = np.random.default_rng(12)
    table: Table = {}
    for size in FROZEN_SIZES:
        for auroc in (0.9, 0.98):
            row = table["{} + {} x {}, AUROC {:.4g}".format(*size, 100 * auroc)] = {}
            for name, seen in SEEN.items():
                tried = (heir(rng, size, auroc, seen, resamples) for _ in range(trials))
                row[name] = 100 * float(np.mean([not one.passed for one in tried]))
    return table


# ---- groups of good parts --------------------------------------------------------------------------------------------

GROUP_SIZES = ((10, 10), (8, 8, 8), (1, 3, 12), (2, 5, 13), (4,) * 6, (2,) * 12, (6,) * 25)
NEW_GROUP_SIZES = ((12,) * 4, (3, 3, 6, 12, 24), (8,) * 10, (6,) * 25)
RATE = 0.05  # of false alarms, asked for


def sizes_named(sizes: tuple[int, ...]) -> str:
    alike = len(set(sizes)) == 1
    return f"{len(sizes)} groups of {sizes[0]}" if alike else f"groups of {', '.join(map(str, sizes))}"


def groups_called_different(trials: int = 1000, permutations: int = 199) -> Table:
    """How often the test of exchangeability between groups warns; the last group's scores are higher by so much."""
    rng = np.random.default_rng(12)
    table: Table = {}
    for sizes in GROUP_SIZES:
        row = table[sizes_named(sizes)] = {}
        for name, shift, step in (("0", 0.0, 0.0), ("0, with ties", 0.0, 1.0), ("1", 1.0, 0.0), ("2", 2.0, 0.0)):
            found = 0
            for _ in range(trials):
                groups = [rng.normal(size=size) + shift * (place == len(sizes) - 1) for place, size in enumerate(sizes)]
                if step:
                    groups = [np.round(group / step) for group in groups]
                found += exchangeable(groups, permutations) < 0.05
            row[name] = 100 * found / trials
    return table


def false_alarms_of_new_groups(trials: int = 1000) -> Table:
    """What happens to a group that set no threshold, and what the groups that did say of it.

    Parts of a group score about its mean, with a standard deviation of 1; the means spread by as much as the row says.
    """
    rng = np.random.default_rng(12)
    table: Table = {}
    for sizes in NEW_GROUP_SIZES:
        for spread in (0.0, 0.5, 1.0, 2.0):
            rates = np.zeros((trials, 5))
            for rate in rates:
                *groups, new = [rng.normal(spread * rng.normal(), 1, size) for size in (*sizes, max(sizes))]
                threshold = threshold_at(torch.from_numpy(np.concatenate(groups)), RATE)
                left_out = leave_one_out(groups, threshold.expected_rate)
                assert left_out is not None
                happens = norm.sf(threshold.value / np.hypot(1, spread))
                beyond = float((new > threshold.value).mean()) > max(left_out)
                rate[:] = threshold.expected_rate, happens, np.mean(left_out), max(left_out), beyond
            means = 100 * rates.mean(axis=0)
            names = ("promised", "new group", "left out, mean", "left out, highest", "new group above it")
            table[f"{sizes_named(sizes)}, spread {spread:g}"] = dict(zip(names, means.tolist(), strict=True))
    return table


def false_alarms_by_folds(trials: int = 400) -> Table:
    """Of a memory whose score is the distance to the nearest of what it learnt, from all parts and their folds.

    Parts are points of a normal distribution, or of Student's t with 3 degrees of freedom; beside it, a quarter held
    out instead.
    """
    rng = np.random.default_rng(0)
    table: Table = {}
    for kind in ("normal", "heavy tails"):
        for dimensions in (2, 8, 32):
            for number in (20, 40, 80):

                def draw_points(count: int, kind: str = kind, dimensions: int = dimensions) -> Floats:
                    points = rng.normal(size=(count, dimensions))
                    return points if kind == "normal" else points * np.sqrt(3 / rng.chisquare(3, size=(count, 1)))

                rates = np.zeros((trials, 4))
                for rate in rates:
                    parts, new = draw_points(number), draw_points(400)
                    fold, scores = np.arange(number) % NUM_FOLDS, np.empty(number)
                    for own in range(NUM_FOLDS):
                        scores[fold == own] = _nearest(parts[fold != own], parts[fold == own])
                    by_folds = threshold_at(torch.from_numpy(scores), RATE)
                    held_out, fitted = parts[: number // 4], parts[number // 4 :]
                    by_share = threshold_at(torch.from_numpy(_nearest(fitted, held_out)), RATE)
                    rate[:2] = by_folds.expected_rate, (_nearest(parts, new) > by_folds.value).mean()
                    rate[2:] = by_share.expected_rate, (_nearest(fitted, new) > by_share.value).mean()
                means = 100 * rates.mean(axis=0)
                names = ("folds promise", "happens", "a quarter promises", "happens then")
                row = f"{number} parts, {kind}, {dimensions} dimensions"
                table[row] = dict(zip(names, means.tolist(), strict=True))
    return table


def _nearest(known: Floats, points: Floats) -> Floats:
    nearest: Floats = cdist(points, known).min(axis=1)
    return nearest


def markdown(title: str, table: Table) -> str:
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    lines = [f"| {title} | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    lines += [f"| {name} | {' | '.join(f'{row[column]:.1f}' for column in columns)} |" for name, row in table.items()]
    return "\n".join(lines)


TABLES: dict[str, Callable[[], Table]] = {
    "image figures": image_coverage,
    "pixel figures": pixel_coverage,
    "averages": average_coverage,
    "two alike": false_winners,
    "two unlike": lambda: false_winners(UNLIKE),
    "two alike, by AP": lambda: false_winners(metric="image_ap"),
    "five alike": false_tables,
    "one better": found_differences,
    "refused": refused_successors,
    "last group higher by": groups_called_different,
    "false alarms of new groups": false_alarms_of_new_groups,
    "false alarms by folds": false_alarms_by_folds,
}

if __name__ == "__main__":
    for title, make in TABLES.items():
        print(markdown(title, make()), end="\n\n", flush=True)
