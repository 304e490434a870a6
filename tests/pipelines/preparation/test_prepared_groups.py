"""Good parts that were made together are on one side of every split, whatever tells that they were."""

import shutil
import unicodedata

import pytest
import yaml
from changed_params import changed, problems_of
from drawn_folders import CONFIG, paths_of, problem, run, write_image

from pipelines.preparation.config import FolderGroups, PatternGroups
from pipelines.preview.check import load_checked
from pipelines.settings.params import load_params


def by_folder(level=1, **changes):
    return CONFIG.model_copy(update={"groups": FolderGroups(folder=level), **changes})


def by_pattern(pattern, **changes):
    return CONFIG.model_copy(update={"groups": PatternGroups(pattern=pattern), **changes})


def draw(root, folder, names, first=0):
    for number, name in enumerate(names):
        write_image(root / folder / f"{name}.png", first + number)


@pytest.fixture
def days(tmp_path):
    """Good parts of five days, 4, 3, 2, 2 and 1; to test on, two of a day that is known and one of another."""
    root = tmp_path / "nut"
    for day, count in enumerate((4, 3, 2, 2, 1)):
        draw(root, f"train/good/day{day}", [f"{number}" for number in range(count)], 10 * day)
    draw(root, "test/good/day0", ["8", "9"], 100)
    draw(root, "test/good/day7", ["0"], 110)
    draw(root, "test/crack", ["0"], 120)
    return root


def groups_of(index, split):
    return {image.group for image in index.images if image.split == split}


@pytest.mark.parametrize("seed", range(8))
def test_hold_out_takes_whole_groups(days, seed):
    """A quarter of 12 parts is 3: one day of 3, or one of 2 and that of 1; 4 are too many."""
    index = run(days, by_folder(holdout=0.25, seed=seed))
    assert not groups_of(index, "train") & groups_of(index, "holdout")
    assert groups_of(index, "train") | groups_of(index, "holdout") == {f"day{day}" for day in range(5)}
    assert index.counts["holdout"] == 3
    assert groups_of(index, "holdout") in ({"day1"}, {"day2", "day4"}, {"day3", "day4"})


def test_the_group_of_each_picture_is_known(days):
    index = run(days, by_folder())
    assert {image.path: image.group for image in index.images if image.split == "test"} == {
        "test/crack/0.png": None,
        "test/good/day0/8.png": "day0",
        "test/good/day0/9.png": "day0",
        "test/good/day7/0.png": "day7",
    }
    assert {image.group for image in run(days).images} == {None}


def test_the_smallest_group_where_all_are_larger_than_the_share(days):
    index = run(days, by_folder(holdout=0.01))
    assert groups_of(index, "holdout") == {"day4"}
    assert index.warnings == (
        "all held-out images are of one group (day4): how a threshold does on another cannot be told; raise "
        "prepare.holdout, or make more groups",
    )


@pytest.mark.parametrize("seed", range(4))
def test_in_a_plain_folder_the_test_takes_whole_groups_too(tmp_path, seed):
    root = tmp_path / "bolt"
    for lot in range(6):
        draw(root, "normal", [f"lot{lot}_{number}" for number in range(3)], 10 * lot)
    draw(root, "abnormal", ["lot1_bad", "someday"], 200)
    index = run(root, by_pattern(r"(lot\d)_", holdout=0.3, test_normal=0.4, seed=seed))
    test = {image.group for image in index.images if image.split == "test" and not image.label}
    sides = [groups_of(index, "train"), groups_of(index, "holdout"), test]
    assert [len(side) for side in sides] == [3, 1, 2]  # 0.4 of 18 is 7, whole lots 6; 0.3 of 12 is 4, whole lots 3
    assert set.union(*sides) == {f"lot{lot}" for lot in range(6)}
    assert {image.path: image.group for image in index.images if image.label} == {
        "abnormal/lot1_bad.png": "lot1",
        "abnormal/someday.png": None,
    }


def test_copies_join_their_groups(tmp_path):
    """a and b hold the same picture, b and c another: the three stay together, and d is all there is to hold out."""
    root = tmp_path / "nut"
    for place, group in enumerate("abcd"):
        draw(root, "train/good", [f"{group}_{number}" for number in range(2)], 10 * place)
    shutil.copy(root / "train/good/a_0.png", root / "train/good/b_9.png")
    shutil.copy(root / "train/good/b_1.png", root / "train/good/c_9.png")
    for seed in range(4):
        index = run(root, by_pattern("good/(.)_", holdout=0.2, seed=seed))
        assert groups_of(index, "holdout") == {"d"}
        assert groups_of(index, "train") == {"a", "b", "c"}


# What the seeds drew before there were groups: 10 pictures, of which one has a copy.
WITHOUT = {
    0: (["003", "copy"], ["004", "006"]),
    1: (["000", "001"], ["004", "008"]),
    2: (["006", "008"], ["000", "002"]),
    3: (["000", "004"], ["006", "009"]),
}


@pytest.mark.parametrize("seed", WITHOUT)
def test_without_groups_the_splits_are_what_they_were(tmp_path, seed):
    root = tmp_path / "bolt"
    draw(root, "normal", [f"{number:03}" for number in range(10)])
    shutil.copy(root / "normal/003.png", root / "normal/copy.png")
    holdout, test = WITHOUT[seed]
    index = run(root, CONFIG.model_copy(update={"seed": seed}))
    assert paths_of(index, "holdout") == [f"normal/{name}.png" for name in holdout]
    assert paths_of(index, "test") == [f"normal/{name}.png" for name in test]
    one_each = run(root, by_pattern("normal/0*(.+?).png", seed=seed))  # a group each joins nothing but the copies
    assert paths_of(one_each, "holdout") == paths_of(index, "holdout")


def test_a_level_of_folders(tmp_path):
    """The camera, on whichever day."""
    root = tmp_path / "nut"
    for place, (day, camera) in enumerate((day, camera) for day in ("mon", "tue") for camera in ("left", "right")):
        draw(root, f"train/good/{day}/{camera}", ["0", "1"], 10 * place)
    assert "prepare.groups.folder = 3 finds a group for none of the 8 images" in problem(root, by_folder(3))
    index = run(root, by_folder(2, holdout=0.5))
    assert sorted(map(len, (groups_of(index, "train"), groups_of(index, "holdout")))) == [1, 1]
    assert index.counts["train"] == index.counts["holdout"] == 4


def test_names_whose_accents_are_put_together_otherwise_are_one_group(tmp_path):
    root = tmp_path / "nut"
    for place, form in enumerate(("NFC", "NFD")):
        draw(root, "train/good/" + unicodedata.normalize(form, "März"), ["0", "1"], 10 * place)
    draw(root, "train/good/Mai", ["0"], 90)
    assert {image.group for image in run(root, by_folder()).images} == {"März", "Mai"}


@pytest.mark.parametrize(
    ("pattern", "path", "group"),
    [
        (r"_(lot\d+)_", "train/good/a_lot12_3.png", "lot12"),
        (r"(a|b)_(?P<day>\d{8})", "normal/a_20240305.png", "20240305"),  # the named one, wherever it stands
        (r"(a|b)_(\d{8})", "normal/a_20240305.png", "a"),  # or else the first
        (r"good/([^/]+)/", "train/good/mon/1.png", "mon"),
        (r"_(x)?1", "normal/_1.png", None),  # captured nothing
        (r"_(x*)1", "normal/_1.png", None),  # nor here
        (r"^(lot)", "train/lot/1.png", None),
    ],
)
def test_what_a_pattern_captures(pattern, path, group):
    assert PatternGroups(pattern=pattern).search(path) == group


# ---- what cannot be -------------------------------------------------------------------------------------------------


def test_a_pattern_that_matches_no_file(days):
    assert problem(days, by_pattern(r"lot(\d+)")) == (
        f"category 'nut': {days}: prepare.groups.pattern = 'lot(\\\\d+)' finds a group for none of the 12 images of "
        "train/good: train/good/day0/0.png, train/good/day0/1.png, train/good/day0/2.png and 9 more; correct it, "
        "rename or move the images, or set prepare.groups: null"
    )


def test_pictures_that_match_nothing_while_others_do(days):
    draw(days, "train/good", ["alone"], 500)
    assert problem(days, by_folder()) == (
        f"category 'nut': {days}: prepare.groups.folder = 1 finds no group for 1 of the 13 images of train/good: "
        "train/good/alone.png; correct it, rename or move the images, or set prepare.groups: null"
    )


def test_one_group_leaves_nothing_to_hold_out(days):
    assert problem(days, by_pattern("(day)")) == (
        f"category 'nut': {days}: the images of train/good are of 1 group by prepare.groups (day); to fit and to hold "
        "out takes at least 2 that stay whole: group them otherwise, or set prepare.groups: null"
    )


def test_groups_that_copies_join_leave_nothing_to_hold_out(tmp_path):
    root = tmp_path / "nut"
    for group in "ab":
        draw(root, f"train/good/{group}", ["0", "1"])
    assert (
        "the images of train/good are of 2 groups by prepare.groups (a, b), which pictures of the same pixels join; to "
        "fit and to hold out takes at least 2 that stay whole"
    ) in problem(root, by_folder())


def test_two_groups_are_too_few_for_three_splits(plain):
    message = problem(plain, by_pattern("normal/00([0-4]?)"))
    assert "finds no group for 5 of the 10 images of normal: normal/005.png, normal/006.png" in message
    assert (
        "of 2 groups by prepare.groups (0, 1); to fit, to hold out and to test takes at least 3 that stay whole"
    ) in problem(two_groups(plain), by_folder())


def two_groups(plain):
    for number in range(10):
        (plain / f"normal/{number % 2}").mkdir(exist_ok=True)
        (plain / f"normal/{number:03}.png").rename(plain / f"normal/{number % 2}/{number:03}.png")
    return plain


def test_a_test_image_of_no_group_is_a_warning(days):
    draw(days, "test/good", ["loose"], 600)
    assert "1 normal test image of no group: test/good/loose.png" in run(days, by_folder(holdout=0.5)).warnings


# ---- in params.yaml -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "line"),
    [
        ({"folder": 0}, "prepare.groups.folder = 0: Input should be greater than 0"),
        ({"pattern": "lot"}, "prepare.groups.pattern = 'lot': captures nothing: put what tells the group in "
         "parentheses, as in '_(lot[0-9]+)_'"),
        ({"pattern": "(lot"}, "prepare.groups.pattern = '(lot': not a regular expression: missing ), unterminated "
         "subpattern at position 0"),
        ({"pattern": "(?P<day>.)(?P<lot>.)"}, "prepare.groups.pattern = '(?P<day>.)(?P<lot>.)': names 2 groups (day, "
         "lot): name one"),
        ({"folder": 1, "pattern": "(a)"}, "prepare.groups: Input should be null, or {folder: LEVEL}, or {pattern: "
         "'REGULAR EXPRESSION'}"),
        ({"level": 1}, "prepare.groups: Input should be null, or {folder: LEVEL}, or {pattern: 'REGULAR EXPRESSION'}"),
        ("folder", "prepare.groups = 'folder': Input should be null, or {folder: LEVEL}, or {pattern: 'REGULAR "
         "EXPRESSION'}"),
    ],
)  # fmt: skip
def test_groups_that_cannot_be_meant(tmp_path, groups, line):
    for load in (load_params, load_checked):
        assert problems_of(load, tmp_path, {"prepare.groups": groups}) == [line]


@pytest.mark.parametrize("groups", [None, {"folder": 2}, {"pattern": r"(?P<day>\d{8})_"}])
def test_groups_come_back_as_they_were_written(tmp_path, groups):
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(changed({"prepare.groups": groups})), encoding="utf-8")
    prepare = load_checked(path).prepare
    assert prepare.model_dump()["groups"] == groups
    assert type(prepare).model_validate_json(prepare.model_dump_json()) == prepare
