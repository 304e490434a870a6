"""Groups of good parts: a test worked by hand, the spread from leaving each out, and what is said of them."""

import math
from itertools import permutations

import numpy as np
import pytest
from made_up import scored_image
from scipy.stats import kruskal

from pipelines.evaluation.groups import PERMUTATIONS, compare_groups, exchangeable, leave_one_out
from pipelines.evaluation.outcomes import GroupsOutcome, ScoredImage
from pipelines.evaluation.thresholds import folds


def arrays(*groups: list[float]) -> list[np.ndarray]:
    return [np.array(group, dtype=float) for group in groups]


# ---- the test -------------------------------------------------------------------------------------------------------


def test_three_and_three_that_do_not_overlap() -> None:
    """Of the 20 ways to deal 6 ranks to two groups of 3, these two are as far apart: p is 0.1, but for simulation."""
    p = exchangeable(arrays([1, 2, 3], [4, 5, 6]))
    assert p == pytest.approx(0.1, abs=4 * math.sqrt(0.09 / PERMUTATIONS))


def test_all_deals_of_a_small_sample() -> None:
    """With ties, against every permutation and the statistic of another implementation."""
    groups = arrays([1.0, 2.0, 2.0], [2.0, 5.0], [3.0, 7.0])
    scores = np.concatenate(groups)
    observed = kruskal(*groups).statistic
    dealt = [kruskal(d[:3], d[3:5], d[5:]).statistic for d in map(np.array, permutations(scores))]
    exact = float(np.mean([statistic >= observed - 1e-9 for statistic in dealt]))
    assert exchangeable(groups) == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / PERMUTATIONS))


def test_large_samples_agree_with_chi_squared() -> None:
    rng = np.random.default_rng(5)
    groups = [rng.normal(shift, 1, 60) for shift in (0, 0.2, 0.35)]
    assert exchangeable(groups) == pytest.approx(kruskal(*groups).pvalue, abs=0.02)


@pytest.mark.parametrize("groups", [([1.0], [2.0], [9.0]), ([3.0, 3.0], [3.0, 3.0, 3.0])])
def test_nothing_can_be_told(groups: tuple[list[float], ...]) -> None:
    """From a part each, or from scores that are all the same."""
    assert exchangeable(arrays(*groups)) == 1.0


def test_it_gives_the_same_again_and_any_scale_will_do() -> None:
    groups = arrays([1, 5, 3], [2, 8], [9, 4, 7])
    p = exchangeable(groups)
    assert exchangeable(groups) == p
    assert exchangeable([np.exp(group) for group in groups]) == p


def rejected(shift: float, sizes: tuple[int, ...], draws: int) -> float:
    """How often groups of these sizes, of which the first scores higher, are found to differ at 5 %."""
    rng = np.random.default_rng(7)
    found = 0
    for _ in range(draws):
        groups = [rng.exponential(1, size) for size in sizes]
        groups[0] += shift
        found += exchangeable(groups, permutations=199) < 0.05
    return found / draws


@pytest.mark.parametrize("sizes", [(2, 2, 2, 2), (1, 3, 12), (10, 10)])
def test_chance_passes_for_a_difference_in_one_of_twenty(sizes: tuple[int, ...]) -> None:
    assert rejected(0.0, sizes, 600) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 600)


def test_a_group_that_scores_higher_is_found() -> None:
    assert rejected(1.5, (8, 8, 8), 100) > 0.9


# ---- each left out --------------------------------------------------------------------------------------------------


def test_each_group_at_the_threshold_of_the_others() -> None:
    """The threshold that promises 25 % is number 0.75 (n + 1) of n others, and between two numbers half of each."""
    groups = arrays([1, 2], [3, 9, 4], [8])
    # the first beside 3 4 8 9, number 3.75; the second beside 1 2 8, number 3; the third beside 1 2 3 4 9, number 4.5
    assert leave_one_out(groups, 0.25) == [0.0, pytest.approx(1 / 3), 0.5]
    # for 50 %: numbers 2.5, 2 and 3
    assert leave_one_out(groups, 0.5) == [0.0, 1.0, 1.0]
    assert leave_one_out(groups, 0.05) == [0.0, pytest.approx(1 / 3), 0.0]  # of too few, their highest


def test_where_all_are_exchangeable_it_is_what_is_promised() -> None:
    """Also where the others are too few for just that rate: 36 promise 2.7 or 5.4 %, and not 4.1."""
    rng = np.random.default_rng(3)
    found = []
    for _ in range(1500):
        left_out = leave_one_out([rng.exponential(1, 12) for _ in range(4)], 2 / 49)
        assert left_out is not None
        found.append(np.mean(left_out))
    assert abs(np.mean(found) - 2 / 49) < 4 * np.std(found) / math.sqrt(len(found))


def test_a_single_group_has_no_others() -> None:
    assert leave_one_out(arrays([1, 2, 3]), 0.25) is None


def test_its_mean_is_what_a_new_group_may_expect() -> None:
    """Of 4 groups, on average over draws of them, it is the share of a new group above the threshold of 3."""
    rng = np.random.default_rng(3)
    differences = []
    for _ in range(1000):
        *groups, new = [rng.normal(rng.normal(0, 1), 1, rng.integers(2, 12)) for _ in range(5)]
        left_out, as_new = leave_one_out(groups, 0.1), leave_one_out([*groups[1:], new], 0.1)
        assert left_out is not None
        assert as_new is not None
        differences.append(np.mean(left_out) - as_new[-1])
    assert abs(np.mean(differences)) < 4 * np.std(differences) / math.sqrt(len(differences))


# ---- what is said ---------------------------------------------------------------------------------------------------


def image(
    group: str | None, score: float, split: str = "holdout", label: bool = False, threshold: float = 5.0
) -> ScoredImage:
    defect = "cut" if label else "good"
    return scored_image(f"{split}/{group}/{score}", defect, label, score, split, threshold=threshold, group=group)


def outcome() -> GroupsOutcome:
    held_out = [image("mon", score) for score in (1, 2, 6)] + [image("tue", score) for score in (3, 4)]
    tested = [image("mon", 1, "test"), image("wed", 7, "test"), image("wed", 9, "test"), image("wed", 2, "test")]
    others = [image(None, 8, "test"), image("tue", 9, "test", label=True), image("sun", 9, "test", label=True)]
    found = compare_groups([*held_out, *tested, *others], {"fri": 9, "mon": 0}, 0.25)
    assert found is not None
    return found


def test_good_parts_are_counted_by_their_group() -> None:
    """Defects are not, whose groups say nothing of false alarms."""
    of_group = {group.name: group for group in outcome().groups}
    assert list(of_group) == ["fri", "mon", "tue", "wed", None]
    assert (of_group["fri"].fitted, of_group["fri"].held_out, of_group["fri"].tested) == (9, None, None)
    monday = of_group["mon"]
    assert monday.held_out is not None
    assert (monday.held_out.count, monday.held_out.false_alarms, monday.held_out.mean_score) == (3, 1, 3.0)
    assert monday.left_out == pytest.approx(1 / 3)  # 6 is above 4, the highest of Tuesday
    assert of_group["tue"].left_out == 0.0
    assert of_group["tue"].tested is None
    tested = of_group["wed"].tested
    assert tested is not None
    assert (tested.count, tested.false_alarms, tested.mean_score) == (3, 2, 6.0)
    assert outcome().left_out == (0.0, pytest.approx(1 / 6), pytest.approx(1 / 3))


def test_the_worst_group_comes_first() -> None:
    assert [group.name for group in outcome().worst_first()] == [None, "wed", "mon", "tue", "fri"]
    assert outcome().table()[:3] == [
        ["of no group", "0", "-", "-", "-", "-", "1", "1", "8"],
        ["wed", "0", "-", "-", "-", "-", "3", "2", "6"],
        ["mon", "0", "3", "1", "3", "33.3", "1", "0", "1"],
    ]


def test_a_long_table_is_cut() -> None:
    images = [image(f"lot{number:02}", score) for number in range(20) for score in (1, number)]
    found = compare_groups(images, {}, 0.1)
    assert found is not None
    assert len(found.table()) == 13
    assert found.table()[-1][:2] == ["and 8 more", ""]


def test_groups_that_cannot_be_told_apart() -> None:
    assert not outcome().differ
    text = outcome().text
    assert text.startswith("the 2 groups of held-out good parts cannot be told apart by their scores (p = ")
    assert text.endswith(
        "; at the threshold of the others, 0.0 to 33.3 % of a group are false alarms, 16.7 % on average; 2 groups "
        "promise a new one 33.3 % at best"
    )


def test_groups_that_differ() -> None:
    images = [image(day, 10 * place + score) for place, day in enumerate(("mon", "tue")) for score in range(9)]
    found = compare_groups(images, {}, 0.25)
    assert found is not None
    assert found.differ
    assert found.text == (
        "the 2 groups of held-out good parts score differently, so that the promised false-alarm rate does not hold "
        "for a new group (p < 0.001); at the threshold of the others, 0.0 to 100.0 % of a group are false alarms, "
        "50.0 % on average; 2 groups promise a new one 33.3 % at best"
    )


def test_one_group_shows_nothing() -> None:
    found = compare_groups([image("mon", score) for score in range(9)], {"tue": 20}, 0.25)
    assert found is not None
    assert (found.p_value, found.left_out, found.differ) == (None, None, False)
    assert found.text == "all held-out good parts are of one group (mon): whether another scores alike is not known"


def test_no_groups_no_word() -> None:
    assert compare_groups([image(None, 1), image(None, 2, "test")], {}, 0.25) is None


# ---- folds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([None] * 7, [[0, 5], [1, 6], [2], [3], [4]]),
        (["a", "b", "a", "c", "b"], [[0, 2], [1, 4], [3]]),
        (list("abcdefa"), [[0, 5, 6], [1], [2], [3], [4]]),
        (["a", "a", "a"], [[0], [1], [2]]),  # one group: each by itself
        ([], []),
    ],
)
def test_folds_of_whole_groups(groups: list[str | None], expected: list[list[int]]) -> None:
    assert folds(groups) == expected
