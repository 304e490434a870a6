"""Which image is fitted, held out, learnt from as a defect, or tested on; pictures of the same pixels stay together.

So do good parts of one group (`prepare.groups`). Defects have groups, too, which steer nothing.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.data.index import GOOD, Split
from pipelines.numbers import counted
from pipelines.preparation.config import PrepareConfig
from pipelines.preparation.listing import Findings, Listing, Masks, some

NUM_FOLDS = 5  # of `prepare.holdout: folds`; each costs a training on the others
_ANOMALY_STREAM = 1  # apart from the draws of normal images, which the same seed orders


@dataclass(frozen=True, slots=True)
class Item:
    """An image on its way into the arrays."""

    path: str
    split: Split
    defect: str
    mask: Masks | None
    fold: int | None = None


def split(
    source: Path,
    listing: Listing,
    masks: Mapping[str, Masks],
    digests: Mapping[str, str],
    groups: Mapping[str, str],
    config: PrepareConfig,
    findings: Findings,
) -> list[Item]:
    """Give every image its split, in the order of the index.

    Pictures of the same pixels stay together (`digests`), whatever else is in their files, another date or another
    format: an image that was fitted tells nothing when it is met again as held out. So do good parts of one of the
    `groups`, and all that either of the two joins.
    """
    rng = np.random.default_rng(config.seed)
    units = together(sorted(listing.training), digests, groups)
    needed = 1 if listing.holdout is not None else 3 if listing.takes_test_normal else 2
    test_normal, holdout, folds = listing.test_normal, list[str](), dict[str, int]()
    if len(units) < needed:
        findings.problem(_too_few(source, listing, digests, groups, needed))
    else:
        if listing.takes_test_normal:
            drawn, units = _draw(units, config.test_normal, reserve=2, rng=rng)
            test_normal = _flatten(drawn)
        if listing.holdout is not None:
            holdout = _published_holdout(source, listing.holdout, _flatten(units), digests, findings)
        elif config.holdout == "folds":
            folds = _deal(units, rng)
        else:
            drawn, units = _draw(units, config.holdout, reserve=1, rng=rng)
            holdout = _flatten(drawn)
    train = _flatten(units)
    warn_groups(holdout or list(folds), test_normal, groups, findings)
    taught, withheld, tested = _draw_anomalies(listing.anomalous, masks, digests, config, findings)
    if holdout or folds:
        warn_test([*train, *holdout, *taught], test_normal, tested, listing, digests, findings)
    return [
        *(Item(path, "train", GOOD, None, folds.get(path)) for path in sorted(train)),
        *(Item(path, "holdout", GOOD, None) for path in sorted(holdout)),
        *(Item(path, "anomalous_train", listing.anomalous[path], masks.get(path)) for path in sorted(taught)),
        *(Item(path, "withheld", listing.anomalous[path], masks.get(path)) for path in sorted(withheld)),
        *(
            Item(path, "test", listing.anomalous.get(path, GOOD), masks.get(path))
            for path in sorted([*test_normal, *tested])
        ),
    ]


def _published_holdout(
    source: Path, holdout: list[str], training: list[str], digests: Mapping[str, str], findings: Findings
) -> list[str]:
    """As it was published; one that was met in training would promise too much, and is left out."""
    met = {digests[path] for path in training}
    if repeated := [path for path in holdout if digests[path] in met]:
        findings.warnings.append(
            f"{counted(len(repeated), 'image')} to hold out met in training too, left out: {some(repeated)}"
        )
    kept = [path for path in holdout if digests[path] not in met]
    if not kept:
        findings.problem(f"{source}: no image to hold out; put good ones, other than those of training, there")
    return kept


def _draw_anomalies(
    anomalous: Mapping[str, str],
    masks: Mapping[str, Masks],
    digests: Mapping[str, str],
    config: PrepareConfig,
    findings: Findings,
) -> tuple[list[str], list[str], list[str]]:
    """Share the anomalies out: to learn from, withheld, and to test on. The same pixels stay together.

    Without masks all are to test on: nobody learns from a defect of which it is not known where it is.
    """
    by_type: defaultdict[str, list[str]] = defaultdict(list)
    for path in sorted(anomalous):
        by_type[anomalous[path]].append(path)
    count = config.anomalous_train.count
    if count == 0 or not masks:
        return [], [], list(anomalous)
    # A stream of its own: the normal images' splits are the same whatever is asked for here.
    rng = np.random.default_rng([config.seed, _ANOMALY_STREAM])
    types = {name: _shuffled(together(paths, digests, {}), rng) for name, paths in sorted(by_type.items())}
    if config.anomalous_train.protocol == "one_type":
        return _draw_one_type(types, count, rng, findings)
    taken = _spread(types, count, rng)
    if len(taken) < count:
        findings.warnings.append(
            f"{len(taken)} of {counted(len(anomalous), 'anomaly', 'anomalies')} to learn from, where "
            f"prepare.anomalous_train.count asks for {count}: at least half of each type is kept for the test "
            "of a model that does"
        )
    return taken, [], [path for path in anomalous if path not in taken]


def _spread(types: Mapping[str, list[list[str]]], count: int, rng: np.random.Generator) -> list[str]:
    """`count` // T images of each of the T types and the rest from all that is left, at most half of each type."""
    room = {name: sum(map(len, groups)) // 2 for name, groups in types.items()}
    taken: list[str] = []
    left: list[tuple[str, list[str]]] = []
    for name, groups in types.items():
        share = min(count // len(types), room[name])
        for group in groups:
            if len(group) <= share:
                taken += group
                share -= len(group)
                room[name] -= len(group)
            else:
                left.append((name, group))
    for index in rng.permutation(len(left)):
        name, group = left[index]
        if len(group) <= min(room[name], count - len(taken)):
            taken += group
            room[name] -= len(group)
    return taken


def _draw_one_type(
    types: Mapping[str, list[list[str]]], count: int, rng: np.random.Generator, findings: Findings
) -> tuple[list[str], list[str], list[str]]:
    if len(types) < 2:
        findings.warnings.append(
            f"no anomaly to learn from: one type of defect ({some(types)}), but prepare.anomalous_train.protocol is "
            "one_type, which tests on the other types; take spread"
        )
        return [], [], [path for groups in types.values() for path in _flatten(groups)]
    chosen = list(types)[rng.integers(len(types))]
    taken: list[str] = []
    for group in types[chosen]:
        if len(taken) + len(group) <= count:
            taken += group
    withheld = [path for path in _flatten(types[chosen]) if path not in taken]
    findings.warnings.append(
        f"{counted(len(taken), 'anomaly', 'anomalies')} of type {chosen} to learn from, {len(withheld)} more of it "
        "withheld from the test of a model that does: one_type tests on the other types"
    )
    return taken, withheld, [path for name, groups in types.items() if name != chosen for path in _flatten(groups)]


def _shuffled(groups: list[list[str]], rng: np.random.Generator) -> list[list[str]]:
    return [groups[index] for index in rng.permutation(len(groups))]


def together(paths: list[str], digests: Mapping[str, str], groups: Mapping[str, str]) -> list[list[str]]:
    """Sorted paths by what has to stay together: pictures of the same pixels, or group, and all that these join."""
    leaders = {path: path for path in paths}

    def leader(path: str) -> str:
        while leaders[path] != path:
            path = leaders[path]
        return path

    for key in (digests, groups):
        alike: defaultdict[str, list[str]] = defaultdict(list)
        for path in paths:
            if path in key:
                alike[key[path]].append(path)
        for several in alike.values():
            joined = {leader(path) for path in several}
            leaders.update(dict.fromkeys(joined, min(joined)))
    units: defaultdict[str, list[str]] = defaultdict(list)
    for path in paths:
        units[leader(path)].append(path)
    return list(units.values())


def _draw(
    groups: list[list[str]], share: float, reserve: int, rng: np.random.Generator
) -> tuple[list[list[str]], list[list[str]]]:
    """Draw groups until they hold `share` of the images, rounded half up, and return (drawn, left).

    At least one is drawn and at least `reserve` are left. A group that would make too many images is passed over; where
    each would, the smallest is drawn.
    """
    wanted = number_drawn(sum(map(len, groups)), share, reserve)
    order = [int(position) for position in rng.permutation(len(groups))]
    chosen: set[int] = set()
    for position in order:
        if len(chosen) < len(groups) - reserve and len(groups[position]) <= wanted:
            chosen.add(position)
            wanted -= len(groups[position])
    if not chosen:
        chosen = {min(order, key=lambda position: len(groups[position]))}
    rest = [group for position, group in enumerate(groups) if position not in chosen]
    return [groups[position] for position in sorted(chosen)], rest


def number_drawn(num_images: int, share: float, reserve: int) -> int:
    """How many of so many images are drawn where all are groups of their own."""
    return min(max(math.floor(share * num_images + 0.5), 1), num_images - reserve)


def _deal(units: list[list[str]], rng: np.random.Generator) -> dict[str, int]:
    """The fold of each image: units go round in an order that is drawn, the largest first, to the smallest fold."""
    num_folds = min(NUM_FOLDS, len(units))
    sizes = [0] * num_folds
    folds: dict[str, int] = {}
    for unit in sorted((units[place] for place in rng.permutation(len(units))), key=len, reverse=True):
        fold = sizes.index(min(sizes))
        sizes[fold] += len(unit)
        folds |= dict.fromkeys(unit, fold)
    return folds


def _flatten(groups: list[list[str]]) -> list[str]:
    return [path for group in groups for path in group]


def _too_few(source: Path, listing: Listing, digests: Mapping[str, str], groups: Mapping[str, str], needed: int) -> str:
    purpose = {1: "to fit", 2: "to fit and to hold out", 3: "to fit, to hold out and to test"}[needed]
    if not listing.training:
        return (
            f"{source}: {listing.training_folder} holds no image; put at least {needed} normal images there, {purpose}"
        )
    contents = len(together(sorted(listing.training), digests, {}))
    if contents >= needed:
        names = sorted({groups[path] for path in listing.training if path in groups})
        joined = ", which pictures of the same pixels join" if len(names) >= needed else ""
        return (
            f"{source}: the images of {listing.training_folder} are of {counted(len(names), 'group')} by "
            f"prepare.groups ({some(names)}){joined}; {purpose} takes at least {needed} that stay whole: group them "
            "otherwise, or set prepare.groups: null"
        )
    number = counted(contents, "image")
    return f"{source}: {listing.training_folder} holds {number} of different content; {purpose} takes at least {needed}"


def warn_groups(holdout: list[str], test_normal: list[str], groups: Mapping[str, str], findings: Findings) -> None:
    if not groups:
        return
    held_out = sorted({groups[path] for path in holdout if path in groups})
    if len(held_out) == 1:
        findings.warnings.append(
            f"all held-out images are of one group ({held_out[0]}): how a threshold does on another cannot be told; "
            "raise prepare.holdout, or make more groups"
        )
    if alone := [path for path in test_normal if path not in groups]:
        findings.warnings.append(f"{counted(len(alone), 'normal test image')} of no group: {some(alone)}")


def warn_test(
    training: list[str],
    test_normal: list[str],
    tested: list[str],
    listing: Listing,
    digests: Mapping[str, str],
    findings: Findings,
) -> None:
    seen = {digests[path]: path for path in training}
    test = sorted([*test_normal, *tested])
    if repeated := [f"{path} = {seen[digests[path]]}" for path in test if digests[path] in seen]:
        findings.warnings.append(f"{counted(len(repeated), 'test image')} met in training too: {some(repeated)}")
    if not test_normal and not listing.anomalous:
        findings.warnings.append("no image to test on: there will be a detector and its threshold, and no figures")
    elif not test_normal:
        findings.warnings.append("no normal image to test on: metrics that need both kinds cannot be computed")
    elif not listing.anomalous:
        findings.warnings.append("no anomalous image to test on: metrics that need both kinds cannot be computed")
