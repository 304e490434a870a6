from collections.abc import Mapping
from dataclasses import replace
from pathlib import PurePosixPath

import numpy as np
import pytest
from simulated import SEEN, refused_successors
from sklearn.metrics import roc_auc_score

from anomaly_models.common.sizes import Size
from pipelines.evaluation.outcomes import Outcome, TestSet
from pipelines.evaluation.succession import Succession, Trial, Worse, trial
from pipelines.numbers import p_value

Scores = dict[str, float]  # by path
THRESHOLD = 5.0


def scores_of(kind: str, number: int, lowest: float) -> Scores:
    return {f"test/{kind}/{place:02}.png": lowest + place / 100 for place in range(number)}


GOOD = scores_of("good", 30, 0.0)
CUT = scores_of("cut", 12, 6.0)
HOLE = scores_of("hole", 24, 7.0)
CHAMPION = GOOD | CUT | HOLE  # it is right about all of them
SEVEN_CUTS = [f"test/cut/{place:02}.png" for place in (0, 1, 3, 4, 6, 9, 11)]
ONE_MISSED = {"figure": "recall", "defect": "cut", "before": 1.0, "now": 0.4, "p": 0.01, "num_images": 10}


def outcome(name: str, scores: Mapping[str, float], threshold: float = THRESHOLD) -> Outcome:
    images = tuple(sorted((path, "/good/" not in path) for path in scores))
    test_set = TestSet("nut", images, "files", Size.square(256), "pixels", None)
    return Outcome(name, test_set, np.array([scores[path] for path, _ in images]), threshold, {}, None)


def challenged(champion: Outcome, challenger: Outcome) -> Trial:
    paths = {path for one in (champion, challenger) for path, label in one.test_set.images if label}
    return trial(champion, challenger, {path: PurePosixPath(path).parent.name for path in paths}, "0123456789", 999)


def tried(new: Mapping[str, float], old: Mapping[str, float] = CHAMPION, threshold: float = THRESHOLD) -> Trial:
    return challenged(outcome("old", old, threshold), outcome("new", new, threshold))


def found(one: Trial) -> list[tuple[str, str | None]]:
    return [(worse.figure, worse.defect) for worse in one.worse]


def test_worse_on_one_type_is_refused_though_better_overall() -> None:
    """Of the holes, the champion takes all for good parts; of the cuts, the challenger seven."""
    old, new = CHAMPION | scores_of("hole", 24, 0.02), CHAMPION | dict.fromkeys(SEVEN_CUTS, 0.155)
    overall = challenged(outcome("new", new), outcome("old", old))
    assert ("image_auroc", None) in found(overall)
    refused = tried(new, old)
    assert not refused.passed
    assert found(refused) == [("recall", "cut"), ("image_auroc", "cut")]
    missed = refused.worse[0]
    assert (missed.before, missed.now, missed.num_images) == (1.0, pytest.approx(5 / 12), 12)
    assert missed.p == pytest.approx(1 / 2**7, abs=0.006)  # none of the seven exchanged
    assert missed.changed_sides == tuple(SEVEN_CUTS)
    assert missed.text == (
        f"Defects found on cut 41.7 instead of 100.0 (12 images, p = {missed.p:.2g}): no longer found: "
        f"{', '.join(SEVEN_CUTS[:5])} and 2 more"
    )
    first, second = refused.sentences
    assert first == f"new of run 01234567 is refused: {missed.text}."
    assert second.startswith("new of run 01234567 is refused: Image AUROC on cut ")
    assert second.endswith(f": now decided wrongly: {', '.join(SEVEN_CUTS[:5])} and 2 more.")


def test_more_false_alarms_are_refused_by_the_names_of_the_good_parts() -> None:
    rejected = [f"test/good/{place:02}.png" for place in (2, 3, 5, 7, 11, 13, 17, 19)]
    refused = tried(CHAMPION | dict.fromkeys(rejected, 5.5))  # all defects still score higher
    (worse,) = refused.worse
    assert (worse.figure, worse.defect, worse.before, worse.now) == ("false_alarms", None, 0.0, pytest.approx(8 / 30))
    assert worse.changed_sides == tuple(rejected)
    assert worse.text.startswith("False alarms 26.7 instead of 0.0 (30 images, p = ")
    assert worse.text.endswith(f"): now rejected: {', '.join(rejected[:5])} and 3 more")


def test_fewer_false_alarms_are_not_held_against_a_model() -> None:
    worse = CHAMPION | dict.fromkeys(list(GOOD)[:8], 5.5)
    assert tried(CHAMPION, worse).passed


def test_a_worse_auroc_is_found_where_no_decision_is_another() -> None:
    """Both find nothing at their thresholds."""
    cuts = scores_of("cut", 12, 0.155)
    refused = tried(CHAMPION | cuts, threshold=100.0)
    of_cuts, of_all = refused.worse
    assert found(refused) == [("image_auroc", "cut"), ("image_auroc", None)]
    share = roc_auc_score([False] * 30 + [True] * 12, [*GOOD.values(), *cuts.values()])
    assert (of_cuts.before, of_cuts.now) == (1.0, pytest.approx(share))
    told = f"{100 * share:.1f} instead of 100.0 (12 images, {p_value(of_cuts.p)})"
    assert of_cuts.text == f"Image AUROC on cut {told}: no decision is another"
    assert (of_all.num_images, of_all.changed_sides) == (66, ())


def test_what_is_worse_on_all_types_is_told_of_each_and_of_all() -> None:
    refused = tried(CHAMPION | scores_of("cut", 12, 0.05) | scores_of("hole", 24, 0.05))
    of_types = [(figure, defect) for defect in ("cut", "hole") for figure in ("recall", "image_auroc")]
    assert found(refused) == [*of_types, ("image_auroc", None)]
    assert refused.worse[-1].num_images == 66


def test_one_type_alone_is_not_told_twice() -> None:
    rejected = list(GOOD)[:8]
    refused = tried(GOOD | scores_of("cut", 12, 0.05) | dict.fromkeys(rejected, 5.5), GOOD | CUT)
    assert found(refused) == [("recall", "cut"), ("image_auroc", "cut"), ("false_alarms", None)]
    assert [worse.changed_sides for worse in refused.worse] == [tuple(CUT), (*CUT, *rejected), tuple(rejected)]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (CHAMPION, CHAMPION),
        (CHAMPION | scores_of("cut", 12, 0.05), CHAMPION),
        (CHAMPION, {path: 3 * score for path, score in CHAMPION.items()} | {"test/cut/00.png": 0.1}),  # one is chance
    ],
    ids=["equal", "better", "one missed"],
)
def test_who_is_not_found_worse_passes(old: Scores, new: Scores) -> None:
    found = tried(new, old)
    assert found.passed
    assert (found.model, found.run_id, found.worse, found.refused) == ("new", "0123456789", (), None)


def test_four_parts_that_are_missed_may_be_chance_and_five_may_not() -> None:
    """Of four decisions that differ, all are against the challenger in one of sixteen cases."""
    for number, passes in ((4, True), (5, False)):
        old = scores_of("cut", number, 6.0)  # without good parts there is no AUROC
        assert tried(dict.fromkeys(old, 0.1), old).passed is passes


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"images": tuple(sorted([("test/good/new.png", False), *((path, True) for path in (CUT | HOLE))]))},
            "66 and 37 test images of nut",
        ),
        (
            {"files_sha256": "others", "pixels_sha256": "others"},
            "the test files of nut changed between the two evaluations",
        ),
        ({"category": "bolt"}, "nut and bolt are two categories"),
    ],
    ids=["other images", "other files", "another category"],
)
def test_what_was_tested_on_something_else_is_refused(change: dict[str, object], reason: str) -> None:
    new = outcome("new", CHAMPION)
    refused = challenged(outcome("old", CHAMPION), replace(new, test_set=replace(new.test_set, **change)))
    assert (refused.passed, refused.refused, refused.worse) == (False, reason, ())
    assert refused.sentences == [f"new of run 01234567 is refused: {reason}."]


def test_one_other_image_is_refused_by_its_name() -> None:
    renamed = {path.replace("good/00", "good/new"): score for path, score in CHAMPION.items()}
    refused = tried(renamed)
    assert refused.refused is not None
    assert refused.refused.startswith("the test images of nut are not the same: test/good/00.png is in one of the two")


@pytest.mark.parametrize("learns", ["the challenger", "the champion"])
def test_a_model_that_learns_from_defects_is_compared_on_what_both_were_tested_on(learns: str) -> None:
    """Of twelve cuts, one of the two was tested on six."""
    fewer = {path: score for path, score in CHAMPION.items() if "/cut/" not in path or path < "test/cut/06.png"}
    blind = {path: 0.1 if "/cut/" in path else score for path, score in CHAMPION.items()}
    if learns == "the challenger":
        old, new = CHAMPION, {path: blind[path] for path in fewer}
    else:
        old, new = fewer, blind
    refused = tried(new, old)
    assert refused.refused is None
    missed = refused.worse[0]
    assert (missed.figure, missed.defect, missed.num_images) == ("recall", "cut", 6)
    assert missed.changed_sides == tuple(f"test/cut/{place:02}.png" for place in range(6))


def test_what_one_was_not_tested_on_is_not_held_against_the_other() -> None:
    fewer = {path: score for path, score in CHAMPION.items() if "/cut/" not in path or path < "test/cut/06.png"}
    old = CHAMPION | {path: 0.1 for path in CHAMPION if "/hole/" in path}
    blind_elsewhere = CHAMPION | dict.fromkeys(CHAMPION.keys() - fewer.keys(), 0.1)
    assert tried(fewer, old).passed
    assert tried(blind_elsewhere, {path: CHAMPION[path] for path in fewer}).passed
    assert not tried(blind_elsewhere).passed


def test_good_parts_alone_are_compared_by_false_alarms() -> None:
    assert tried(GOOD, GOOD).passed
    refused = tried(GOOD | dict.fromkeys(list(GOOD)[:8], 5.5), GOOD)
    assert found(refused) == [("false_alarms", None)]


def test_defects_alone_are_compared_by_what_is_found() -> None:
    assert tried(CUT, CUT).passed
    assert found(tried(CUT | dict.fromkeys(SEVEN_CUTS, 0.1), CUT)) == [("recall", "cut")]


def test_without_a_test_nobody_is_found_worse() -> None:
    assert tried({}, {}).passed


@pytest.mark.parametrize(
    ("number", "told"), [(1, "a0"), (5, "a0, a1, a2, a3, a4"), (6, "a0, a1, a2, a3, a4 and 1 more")]
)
def test_five_parts_are_named(number: int, told: str) -> None:
    worse = Worse(**ONE_MISSED, changed_sides=tuple(f"a{place}" for place in range(number)))
    assert worse.text == f"Defects found on cut 40.0 instead of 100.0 (10 images, p = 0.01): no longer found: {told}"


WORSE = Trial(model="best", run_id="b" * 32, worse=(Worse(**ONE_MISSED, changed_sides=("a.png",)),))
PASSED = Trial(model="second", run_id="c" * 32)


def succession(*trials: Trial) -> Succession:
    return Succession(model="old", run_id="a" * 32, since="2026-11-28T10:00:00+00:00", trials=trials)


def test_who_is_among_the_best_stays() -> None:
    found = succession()
    assert (found.successor, found.reigns) == (None, "old")
    assert found.sentences("nut") == ["Champion of nut: old of run aaaaaaaa, as before."]


def test_the_first_that_is_not_worse_becomes_champion() -> None:
    found = succession(WORSE, PASSED, Trial(model="third", run_id="d" * 32))
    assert (found.successor, found.reigns) == (PASSED, "second")
    assert found.sentences("nut") == [
        "Champion of nut: second of run cccccccc, not found worse than old of run aaaaaaaa on any type of defect of "
        "the test that is frozen since 2026-11-28."
    ]


def test_a_champion_that_stays_says_who_was_refused_and_how_to_overrule_it() -> None:
    found = succession(WORSE, Trial(model="second", run_id="c" * 32, refused="it is not exported"))
    assert (found.successor, found.reigns) == (None, "old")
    assert found.sentences("my bolt") == [
        "Champion of my bolt: still old of run aaaaaaaa. Its bundle: blemish bundle champion 'my bolt'",
        "best of run bbbbbbbb is refused: Defects found on cut 40.0 instead of 100.0 (10 images, p = 0.01): no longer "
        "found: a.png.",
        "second of run cccccccc is refused: it is not exported.",
        "To have the best of this report all the same, remove the alias 'champion' on MLflow's page of the registered "
        "model, and run: blemish report",
    ]


def test_it_is_kept_in_a_report() -> None:
    found = succession(WORSE, PASSED)
    assert Succession.model_validate_json(found.model_dump_json()) == found


def test_needless_refusals_are_rare_and_a_blind_challenger_is_refused() -> None:
    """Less than docs/statistics.md has; `test_simulations` holds that."""
    table = refused_successors(trials=25, resamples=99)
    for row in table.values():
        assert row.keys() == SEEN.keys()
        assert row["equal"] <= 32
        assert row["equal"] <= row["half as far"] <= row["blind"]
        assert row["blind"] >= 75
    assert np.mean([row["equal"] for row in table.values()]) <= 15
