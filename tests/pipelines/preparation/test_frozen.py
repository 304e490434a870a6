"""Once pictures were learnt, the test is what it was, and what comes later is on one side for good."""

import json
import re
import shutil

import numpy as np
import pytest
from drawn_folders import CONFIG, paths_of, problem, run, write_image, write_mask
from test_learn import NEXT_DAY, draw_line, taught
from test_published import draw_loco
from test_splits import asking, by_folds, rewritten

from pipelines.errors import DatasetError, ImageError, StageError
from pipelines.preparation.config import FolderGroups, PatternGroups

ONE_GOOD, ONE_OF_EACH = [("000.png", "good")], [("000.png", "good"), ("001.png", "scratch")]


def changed(**changes):
    return CONFIG.model_copy(update=changes)


def sides(index):
    """Path -> where it is."""
    return {image.path: (image.split, image.fold) for image in index.images}


def refused(root, config=CONFIG, kind=DatasetError):
    """What `prepare` tells, as of a category that is not prepared."""
    shutil.rmtree(root.parent / "prepared", ignore_errors=True)
    return problem(root, config, kind).replace(f"{root.parent}/", "")


def resaved(path, target):
    """The same pixels in another file."""
    rewritten(path, "dated.png")
    copy = path.with_name(f"{path.stem}_dated.png")
    assert copy.read_bytes() != path.read_bytes()
    target.parent.mkdir(parents=True, exist_ok=True)
    copy.rename(target)


@pytest.fixture(autouse=True)
def line(tmp_path):
    return draw_line(tmp_path / "line")


@pytest.fixture
def loco(tmp_path):
    return draw_loco(tmp_path / "box")


# ---- what was there -------------------------------------------------------------------------------------------------


CHANGES = [
    {"seed": 1}, {"holdout": 0.6}, {"test_normal": 0.6}, {"anomalous_train": asking(2).anomalous_train},
    {"anomalous_train": asking(1, "one_type").anomalous_train}, {"groups": PatternGroups(pattern="(.).png")},
]  # fmt: skip


@pytest.mark.parametrize("changes", CHANGES)
@pytest.mark.parametrize("name", ["mvtec", "plain", "loco"])
def test_every_picture_of_before_stays_where_it_was_whatever_is_asked_for_now(request, name, changes):
    root = request.getfixturevalue(name)
    before, otherwise = run(root), run(root, changed(**changes))
    run(root)
    taught(root, *ONE_OF_EACH)
    index = run(root, changed(**changes))
    assert sides(before).items() <= sides(index).items()
    assert set(paths_of(index, "test")) == set(paths_of(before, "test"))
    assert index.test_sha256 == before.test_sha256
    assert len(index.images) == len(before.images) + 2
    if name == "plain" and "groups" not in changes and changes != CHANGES[4]:
        assert sides(otherwise) != sides(before), "else this tells nothing"


def test_defects_that_were_learnt_from_are_learnt_from_still(plain):
    before = run(plain, asking(1))
    (learner,) = paths_of(before, "anomalous_train")
    taught(plain, *ONE_OF_EACH, config=asking(1))
    index = run(plain)
    assert paths_of(index, "anomalous_train") == [learner]
    assert index.test_sha256 == before.test_sha256
    shutil.rmtree(plain / "masks")
    assert "1 defect to learn from since 20" in (message := refused(plain))
    assert "and no masks that marks them; put it back, or remove part/learnt, and the test is drawn anew" in message


def test_the_index_tells_since_when_and_of_which_split(mvtec):
    assert (run(mvtec).frozen, run(mvtec).split_sha256) == (None, None)
    assert "known" not in run(mvtec).counts
    taught(mvtec, *ONE_OF_EACH)
    first = run(mvtec)
    assert first.frozen == json.loads((mvtec / "learnt/split.json").read_text())["since"]
    assert first.counts["known"] == 1
    taught(mvtec, ("002.png", "good"))
    second = run(mvtec)
    assert (second.frozen, second.split_sha256) == (first.frozen, first.split_sha256)
    assert second.data_sha256 != first.data_sha256


def test_the_same_files_give_the_same_bytes(mvtec, tmp_path):
    taught(mvtec, *ONE_OF_EACH)
    shutil.copytree(mvtec, tmp_path / "elsewhere/nut")
    for root in (mvtec, tmp_path / "elsewhere/nut"):
        run(root)
    first, second = (folder / "prepared/nut" for folder in (tmp_path, tmp_path / "elsewhere"))
    names = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len(names) >= 5
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


# ---- what is learnt -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mvtec", "plain", "loco"])
def test_new_good_parts_are_shared_out_by_the_share_and_never_change_sides(request, name, line):
    root = request.getfixturevalue(name)
    draw_line(line, range(200))
    of_before, seen = sides(run(root)), {}
    for batch in (range(80), range(80, 100), range(100, 200)):
        taught(root, *((f"{number:03}.png", "good") for number in batch))
        index = run(root)
        found = {path: side for path, side in sides(index).items() if path.startswith("learnt/")}
        assert len(found) == batch.stop
        assert seen.items() <= found.items()
        assert of_before.items() <= sides(index).items()
        seen = found
    held_out = list(seen.values()).count(("holdout", None))
    assert set(seen.values()) == {("train", None), ("holdout", None)}
    assert 20 <= held_out <= 60  # 200 x 0.2, and 3.5 standard deviations to each side
    more = {path for path, side in sides(run(root, changed(holdout=0.5))).items() if side[0] == "holdout"}
    assert 75 <= len(more & seen.keys()) <= 125
    assert {path for path, side in seen.items() if side[0] == "holdout"} <= more


@pytest.mark.parametrize("name", ["mvtec", "plain"])
def test_copies_that_come_later_join_theirs_which_do_not_move(request, name, line):
    root = request.getfixturevalue(name)
    draw_line(line, range(40))
    taught(root, *((f"{number:03}.png", "good") for number in range(40)))
    before = sides(run(root))
    for number in range(40):
        resaved(line / f"{number:03}.png", line / f"again/{number:03}.png")
    taught(root, *((f"again/{number:03}.png", "good", NEXT_DAY) for number in range(40)))
    after = sides(run(root))
    assert before.items() <= after.items()
    originals = [f"learnt/good/2026-11-28/{number:03}.png" for number in range(40)]
    assert [after[path.replace("28", "29")] for path in originals] == [before[path] for path in originals]


@pytest.mark.parametrize("name", ["mvtec", "plain"])
def test_with_folds_each_good_part_gets_one_and_keeps_it(request, name, line):
    root = request.getfixturevalue(name)
    draw_line(line, range(100))
    before = sides(run(root, by_folds()))
    taught(root, *((f"{number:03}.png", "good") for number in range(50)), config=by_folds())
    first = sides(run(root, by_folds()))
    taught(root, *((f"{number:03}.png", "good") for number in range(50, 100)), config=by_folds())
    index = run(root, by_folds(seed=1))
    assert before.items() <= first.items() <= sides(index).items()
    assert index.by_folds
    folds = [image.fold for image in index.images if image.path.startswith("learnt/")]
    assert len(folds) == 100
    assert {image.split for image in index.images if image.path.startswith("learnt/")} == {"train"}
    assert min(np.bincount(folds, minlength=5)) >= 8


@pytest.mark.parametrize(
    ("groups", "name"),
    [
        (FolderGroups(folder=1), "train/good/{lot}/{number}.png"),
        (PatternGroups(pattern=r"(lot\d+)_"), "train/good/{lot}_{number}.png"),
    ],
)
def test_what_is_of_one_day_or_group_stays_on_one_side(tmp_path, line, groups, name):
    """By a pattern, later parts of a lot join those of before; what shows no lot is of its day."""
    root, config = tmp_path / "nut", changed(groups=groups, holdout=0.5)
    for number in range(12):
        write_image(root / name.format(lot=f"lot{number % 4}", number=number), number)
    write_image(root / "test/crack/0.png", 100)
    before = run(root, config)
    draw_line(line, range(60))
    rows = [(f"{n:03}.png", "good", f"2026-11-{10 + n % 10}T12:00") for n in range(40)]
    for n in range(40, 60):
        (line / f"{n:03}.png").rename(line / f"lot{n % 7}_{n}.png")
        rows.append((f"lot{n % 7}_{n}.png", "good", f"2026-11-{10 + n % 10}T12:00"))
    taught(root, *rows[:30], config=config)
    first = run(root, config)
    taught(root, *rows[30:], config=config)
    index = run(root, config)
    assert sides(before).items() <= sides(first).items() <= sides(index).items()
    of_group = {}
    for image in index.images:
        if not image.label:
            of_group.setdefault(image.group, set()).add(image.split)
    by_lot = isinstance(groups, PatternGroups)
    days, lots = {f"learnt 2026-11-{10 + day}" for day in range(10)}, {f"lot{lot}" for lot in range(7 if by_lot else 4)}
    assert of_group.keys() == days | lots
    assert all(len(splits) == 1 for splits in of_group.values())
    assert {split for group in days for split in of_group[group]} == {"train", "holdout"}


@pytest.mark.parametrize("name", ["mvtec", "plain"])
def test_nothing_learnt_is_tested_and_defects_are_known_alone(request, name):
    root = request.getfixturevalue(name)
    config = asking(1)
    before = run(root, config)
    kind = "bent" if name == "mvtec" else "dent"  # which has masks
    taught(root, ("000.png", "good"), ("001.png", "scratch"), ("002.png", kind), config=config)
    index = run(root, config)
    learnt = {row: image for row, image in enumerate(index.images) if image.path.startswith("learnt/")}
    assert sorted((image.defect, image.label) for image in learnt.values()) == sorted(
        [("good", False), ("scratch", True), (kind, True)]
    )
    tested = {*index.tested(defects_apart=False), *index.tested(defects_apart=True), *index.apart()}
    assert not tested & learnt.keys()
    known = index.rows("known")
    assert {learnt[row].defect for row in known} == {"scratch", kind}
    assert all(learnt[row].masks == () and learnt[row].mask_row is None for row in known)
    assert index.has_masks
    assert index.num_masks == before.num_masks == 3
    assert not set(index.for_thresholds()) & set(known)
    assert index.counts == before.counts | {"known": 2} | {
        split: before.counts[split] + paths_of(index, split).count("learnt/good/2026-11-28/000.png")
        for split in ("train", "holdout")
    }


def test_copies_of_what_is_tested_are_left_out(mvtec, line):
    run(mvtec)
    resaved(mvtec / "test/good/001.png", line / "a.png")
    resaved(mvtec / "test/bent/000.png", line / "b.png")
    assert taught(mvtec, ("a.png", "good"), ("b.png", "bent"), ("000.png", "good")).joined == {"good": 2, "bent": 1}
    index = run(mvtec)
    assert [path for path in sides(index) if path.startswith("learnt/")] == ["learnt/good/2026-11-28/000.png"]
    assert index.warnings == (
        "2 pictures left out, for the test has it: learnt/bent/2026-11-28/b.png = test/bent/000.png, "
        "learnt/good/2026-11-28/a.png = test/good/001.png",
    )


@pytest.mark.parametrize("groups", [None, PatternGroups(pattern="(lot.|good/0..)")])
@pytest.mark.parametrize("seed", range(3))
def test_copies_of_what_is_held_out_are_held_out_and_take_no_other_along(mvtec, line, groups, seed):
    config = changed(groups=groups, seed=seed)
    before = run(mvtec, config)
    for name, path in (("a", paths_of(before, "holdout")[0]), ("b", paths_of(before, "train")[0])):
        resaved(mvtec / path, line / f"lot1_{name}.png")
    (line / "000.png").rename(line / "lot1_0.png")
    taught(mvtec, ("lot1_0.png", "good"), config=config)
    (before,) = (side for path, side in sides(run(mvtec, config)).items() if path.endswith("lot1_0.png"))
    taught(mvtec, ("lot1_a.png", "good"), ("lot1_b.png", "good"), config=config)
    index = run(mvtec, config)
    found = {path[-5]: side[0] for path, side in sides(index).items() if "lot1_" in path}
    assert found == {"a": "holdout", "b": "train", "0": before[0]}


# ---- what is done by hand -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "folder"), [("mvtec", "train/good"), ("plain", "normal"), ("loco", "validation/good")]
)
def test_good_parts_put_among_those_of_before_join_by_the_same_rule(request, name, folder):
    root = request.getfixturevalue(name)
    taught(root, *ONE_GOOD)
    before = run(root)
    draw_line(root / folder, range(100, 140))
    index = run(root)
    assert sides(before).items() <= sides(index).items()
    new = sides(index).keys() - sides(before).keys()
    assert len(new) == 40
    splits = [sides(index)[path][0] for path in new]
    assert 2 <= splits.count("holdout") == 40 - splits.count("train") <= 16


def test_good_parts_put_to_the_test_are_left_out(mvtec):
    taught(mvtec, *ONE_GOOD)
    before = run(mvtec)
    write_image(mvtec / "test/good/late.png", 7000)
    index = run(mvtec)
    assert sides(index) == sides(before)
    (warning,) = index.warnings
    told = r"1 picture left out, put to the test since 20..-..-.., when it was frozen: test/good/late\.png"
    assert re.fullmatch(told, warning)


@pytest.mark.parametrize(("name", "folder"), [("mvtec", "test/crack"), ("plain", "abnormal")])
def test_defects_put_to_the_test_are_known(request, name, folder):
    root = request.getfixturevalue(name)
    taught(root, *ONE_GOOD)
    before = run(root)
    write_image(root / folder / "late.png", 7000)
    write_mask(root / ("masks" if name == "plain" else "ground_truth/crack") / "late.png")
    index = run(root)
    assert sides(index) == sides(before) | {f"{folder}/late.png": ("known", None)}
    assert index.test_sha256 == before.test_sha256


def test_what_was_tested_and_is_gone_is_a_problem_and_what_was_not_is_none(mvtec):
    taught(mvtec, *ONE_GOOD)
    index = run(mvtec)
    trained = paths_of(index, "train")[0]
    (mvtec / trained).unlink()
    assert run(mvtec).warnings == (f"1 good part of before not there: {trained}",)
    (mvtec / "test/good/000.png").unlink()
    message = refused(mvtec)
    assert "nut: 1 picture of the test not there, which is frozen since 20" in message
    assert ": test/good/000.png; put them back, or remove nut/learnt, and the test is drawn anew" in message
    shutil.rmtree(mvtec / "learnt")
    assert run(mvtec).counts["test_normal"] == 1


def test_too_few_good_parts_of_before(mvtec):
    taught(mvtec, *ONE_GOOD)
    for path in paths_of(run(mvtec), "holdout"):
        (mvtec / path).unlink()
    assert "nut: too few of the good parts of before are there; put some back, or remove nut/learnt" in refused(mvtec)


def test_a_defect_that_is_pixel_by_pixel_among_the_good_parts_is_a_problem(mvtec, line):
    run(mvtec)
    resaved(mvtec / "train/good/002.png", line / "a.png")
    resaved(line / "000.png", line / "b.png")
    taught(mvtec, ("a.png", "scratch"), ("000.png", "good"), ("b.png", "dent"))
    assert refused(mvtec).endswith(
        "nut: 2 defects also among the good parts, pixel by pixel: learnt/dent/2026-11-28/b.png = "
        "learnt/good/2026-11-28/000.png, learnt/scratch/2026-11-28/a.png = train/good/002.png; remove what is wrong"
    )


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [(CONFIG, by_folds(), "'folds', but"), (by_folds(), CONFIG, "0.2, but")],
)
def test_folds_cannot_become_a_share_nor_a_share_folds(mvtec, before, now, told):
    taught(mvtec, *ONE_GOOD, config=before)
    frozen = "a share" if told.startswith("'folds'") else "folds"
    message = refused(mvtec, now)
    assert f"nut: prepare.holdout = {told} the split is frozen since 20" in message
    assert f" with {frozen}; set it back, or remove nut/learnt, and the test is drawn anew" in message


def test_a_published_holdout_is_kept_whatever_share_is_asked_for(loco):
    """Also where it meets a picture of training twice, which is in no split."""
    shutil.copy(loco / "train/good/004.png", loco / "validation/good/001.png")
    before = run(loco)
    taught(loco, *ONE_OF_EACH)
    index = run(loco, by_folds())
    assert sides(before).items() <= sides(index).items()
    assert "validation/good/001.png" not in sides(index)
    assert {image.fold for image in index.images} == {None}


# ---- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mvtec", "plain"])
def test_pictures_where_no_split_is_frozen_are_a_problem(request, name):
    root = request.getfixturevalue(name)
    write_image(root / "learnt/good/0.png", 7000)
    message = refused(root)
    assert f"{root.name}: learnt holds pictures and no split.json, which says what is tested; move them to" in message
    (root / "learnt/good/0.png").unlink()
    assert run(root).warnings == ()


def test_pictures_of_which_no_folder_says_what_they_are_are_a_problem(mvtec):
    taught(mvtec, *ONE_GOOD)
    write_image(mvtec / "learnt/0.png", 7000)
    assert refused(mvtec).endswith(
        "nut: images directly in learnt (0.png); move each into learnt/good or learnt/<defect>"
    )


@pytest.mark.parametrize("content", ["", "[]", "{", '{"format": 2}', None])
def test_a_damaged_split_is_told_in_one_line(mvtec, content):
    taught(mvtec, *ONE_GOOD)
    path = mvtec / "learnt/split.json"
    path.write_text(path.read_text()[:200] if content is None else content)
    message = refused(mvtec, kind=StageError)
    assert message.startswith("nut/learnt/split.json: ")
    assert "put it back as it was, or remove nut/learnt, and the test is drawn anew" in message
    assert "\n" not in message


def test_an_unreadable_picture_is_told_as_any_other(mvtec):
    taught(mvtec, *ONE_GOOD)
    (mvtec / "learnt/good/broken.png").write_bytes(b"no picture")
    message = refused(mvtec, kind=ImageError)
    assert (
        "nut/learnt/good/broken.png: not a PNG, JPEG, BMP, TIFF or WEBP image; save it as one or remove it" in message
    )
    (mvtec / "train/good/001.png").write_bytes(b"")
    assert "nut/train/good/001.png: the file is empty" in (message := refused(mvtec, kind=ImageError))
    assert "nut/learnt/good/broken.png" in message
