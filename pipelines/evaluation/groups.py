"""Do good parts of different groups (`prepare.groups`: days, lots, cameras) score alike, and what if they do not?

The promise of `threshold_at` is for parts that are exchangeable with the held-out ones. Where groups differ, a part of
a new group is not, and only the groups can be taken as exchangeable with the new one. Two things are said of that.

*A test*: the statistic of Kruskal and Wallis ("Use of ranks in one-criterion variance analysis", JASA 47, 1952) on the
held-out scores, with its p-value from permutations of the scores over the groups, so that it holds for few and small
groups and for ties. It finds that some groups score higher, and hardly that some are spread wider.

*The spread*: each held-out group in turn is left out, a threshold of the same promise set from the others, and the
false alarms of the one left out are counted. If groups are exchangeable, the mean over them is, on average over all
draws of G groups, exactly the false-alarm rate on a new group at the threshold of G - 1 groups, whatever the scores and
sizes. With G groups, no threshold can promise that less than 1 / (G + 1) of a new group's parts exceed it, for the new
group may be the one that exceeds all others (Dunn, Wasserman and Ramdas, "Distribution-free prediction sets for
two-layer hierarchical models", JASA 118, 2023).
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import rankdata

from pipelines.data.index import PreparedIndex
from pipelines.evaluation.curves import Floats
from pipelines.evaluation.outcomes import GroupOutcome, GroupScores, GroupsOutcome, ScoredImage

PERMUTATIONS = 9_999  # of the scores over the groups; p-values are multiples of 1 / 10,000
_AT_ONCE = 1_000_000  # scores permuted in memory
_SEED = 0


def compare_groups(images: Sequence[ScoredImage], fitted: Mapping[str, int], promised: float) -> GroupsOutcome | None:
    """Good parts by their group, those of the test and the held-out ones; None where no group is known.

    `fitted`: how many images of each group the model learnt from; `promised`: the false-alarm rate that is expected at
    the deployed threshold.
    """
    held_out, tested = _by_group(images, "holdout"), _by_group(images, "test")
    known = sorted({*fitted, *held_out, *tested} - {None}, key=str)
    if not known:
        return None
    scores = {name: np.array([image.score for image in group]) for name, group in held_out.items()}
    left_out = leave_one_out(list(scores.values()), promised)
    rates = dict(zip(scores, left_out, strict=True)) if left_out else {}
    names: list[str | None] = [*known, *([None] if None in tested else [])]
    return GroupsOutcome(
        p_value=exchangeable(list(scores.values())) if len(scores) > 1 else None,
        groups=tuple(
            GroupOutcome(
                name=name,
                fitted=0 if name is None else fitted.get(name, 0),
                held_out=_scores(held_out.get(name)),
                left_out=rates.get(name),
                tested=_scores(tested.get(name)),
            )
            for name in names
        ),
    )


def fitted_by_group(index: PreparedIndex) -> dict[str, int]:
    """Of each group, how many good parts were learnt from."""
    groups = [index.images[row].group for row in index.rows("train")]
    return dict(Counter(group for group in groups if group is not None))


def _by_group(images: Sequence[ScoredImage], split: str) -> dict[str | None, list[ScoredImage]]:
    groups: defaultdict[str | None, list[ScoredImage]] = defaultdict(list)
    for image in images:
        if image.split == split and not image.label:
            groups[image.group].append(image)
    return dict(groups)


def _scores(images: Sequence[ScoredImage] | None) -> GroupScores | None:
    if not images:
        return None
    return GroupScores(
        count=len(images),
        false_alarms=sum(image.decision == "defect" for image in images),
        mean_score=float(np.mean([image.score for image in images])),
    )


def exchangeable(groups: Sequence[Floats], permutations: int = PERMUTATIONS) -> float:
    """How often scores that are dealt out to the groups at random differ between these as much as they do, or more.

    It counts the draw at hand, too: under exchangeability it is at most p with a probability of at most p.
    """
    sizes = np.array([len(group) for group in groups])
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    ranks = rankdata(np.concatenate(groups))

    def statistic(dealt: Floats) -> Floats:
        """Of Kruskal and Wallis, (N, scores) -> (N,), but for what no permutation changes."""
        sums: Floats = np.add.reduceat(dealt, starts, axis=1)
        found: Floats = (sums**2 / sizes).sum(axis=1)
        return found

    observed = statistic(ranks[None])[0] * (1 - 1e-12)  # equal ones may be rounded otherwise
    rng = np.random.default_rng(_SEED)
    at_once = max(1, _AT_ONCE // len(ranks))
    as_large = 0
    for start in range(0, permutations, at_once):
        number = min(at_once, permutations - start)
        as_large += int((statistic(rng.permuted(np.tile(ranks, (number, 1)), axis=1)) >= observed).sum())
    return (1 + as_large) / (1 + permutations)


def leave_one_out(groups: Sequence[Floats], promised: float) -> list[float] | None:
    """The share of each group above a threshold of the others' scores that promises this rate; None for one group.

    Fewer scores may promise a rate just below or just above this one: the share is then one between those at the two,
    so that its expectation is what is promised where all scores are exchangeable. If they are too few for that, their
    highest is the threshold.
    """
    if len(groups) < 2:
        return None
    shares = []
    for place, group in enumerate(groups):
        others = np.sort(np.concatenate([other for number, other in enumerate(groups) if number != place]))
        rank = (len(others) + 1) * (1 - promised)  # of the threshold, from 1
        below, above = (
            float((group > others[min(max(k, 1), len(others)) - 1]).mean()) for k in (int(rank), int(rank) + 1)
        )
        shares.append(below + (rank - int(rank)) * (above - below))
    return shares
