"""Every image is on one side, copies with their originals, and enough is left for each split."""

import json
import shutil
from collections import Counter, defaultdict

import pytest
from drawn_folders import CONFIG, paths_of, problem, run, write_image, write_mask
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pipelines.preparation.config import AnomalousTrainConfig, PatternGroups


def test_normal_images_are_enough(plain):
    shutil.rmtree(plain / "abnormal")
    shutil.rmtree(plain / "masks")
    index = run(plain)
    assert not index.has_masks
    assert index.counts["test_anomalous"] == 0
    assert index.warnings == ("no anomalous image to test on: metrics that need both kinds cannot be computed",)


def test_good_parts_to_train_on_are_enough(mvtec):
    shutil.rmtree(mvtec / "test")
    shutil.rmtree(mvtec / "ground_truth")
    index = run(mvtec)
    assert index.rows("test") == []
    assert index.warnings == ("no image to test on: there will be a detector and its threshold, and no figures",)


def test_the_seed_chooses_the_holdout(plain):
    holdouts = {tuple(paths_of(run(plain, CONFIG.model_copy(update={"seed": seed})), "holdout")) for seed in range(5)}
    assert len(holdouts) > 1


def test_splits_are_disjoint_and_complete(plain):
    index = run(plain)
    assert max(Counter(image.path for image in index.images).values()) == 1
    assert len(index.images) == 13
    assert index.rows("train") == list(range(6))
    assert index.rows("holdout") == [6, 7]
    assert index.rows("anomalous_train") == []
    assert index.rows("test") == list(range(8, 13))
    for split in ("train", "holdout", "test"):
        assert paths_of(index, split) == sorted(paths_of(index, split))


def by_folds(seed=0, **changes):
    return CONFIG.model_copy(update={"holdout": "folds", "seed": seed, **changes})


def folds_of(index):
    """Paths by fold."""
    folds = defaultdict(list)
    for image in index.images:
        if image.split == "train":
            folds[image.fold].append(image.path)
    return dict(folds)


def test_folds_hold_nothing_out(mvtec):
    """Ten parts in five folds; no other picture is in one."""
    index = run(mvtec, by_folds())
    assert (index.counts["train"], index.counts["holdout"]) == (10, 0)
    assert sorted(folds_of(index)) == [0, 1, 2, 3, 4]
    assert {len(paths) for paths in folds_of(index).values()} == {2}
    assert {image.fold for image in index.images if image.split != "train"} == {None}
    assert index.by_folds
    assert index.for_thresholds() == index.rows("train")
    held_out = run(mvtec)
    assert not held_out.by_folds
    assert held_out.for_thresholds() == held_out.rows("holdout")
    assert {image.fold for image in held_out.images} == {None}


def test_the_seed_deals_the_folds(mvtec):
    dealt = {tuple(map(tuple, sorted(folds_of(run(mvtec, by_folds(seed))).values()))) for seed in (0, 0, 1, 2)}
    assert len(dealt) == 3


@pytest.mark.parametrize("seed", range(4))
def test_copies_and_groups_are_in_one_fold(mvtec, seed):
    """Of days with 5, 3 and 2 parts, and a copy that joins the last two."""
    days = PatternGroups(pattern="([a-c])_")
    for number in range(10):
        day = "aaaaabbbcc"[number]
        (mvtec / f"train/good/{number:03}.png").rename(mvtec / f"train/good/{day}_{number}.png")
    assert sorted(map(len, folds_of(run(mvtec, by_folds(seed, groups=days))).values())) == [2, 3, 5]
    shutil.copy(mvtec / "train/good/b_5.png", mvtec / "train/good/c_9.png")
    assert sorted(map(len, folds_of(run(mvtec, by_folds(seed, groups=days))).values())) == [5, 5]


def test_in_a_plain_folder_folds_are_of_what_is_not_tested_on(plain):
    index = run(plain, by_folds())
    assert (index.counts["train"], index.counts["test_normal"]) == (8, 2)
    assert sorted(map(len, folds_of(index).values())) == [1, 1, 2, 2, 2]


def test_folds_take_two_parts(mvtec):
    for number in range(2, 10):
        (mvtec / f"train/good/{number:03}.png").unlink()
    assert sorted(folds_of(run(mvtec, by_folds())).values()) == [["train/good/000.png"], ["train/good/001.png"]]


@pytest.mark.parametrize(("share", "held_out"), [(0.01, 1), (0.24, 2), (0.25, 3), (0.99, 9)])  # 0.25 x 10 rounds up
def test_at_least_one_image_on_each_side(mvtec, share, held_out):
    counts = run(mvtec, CONFIG.model_copy(update={"holdout": share})).counts
    assert (counts["train"], counts["holdout"]) == (10 - held_out, held_out)


def asking(count, protocol="spread", **changes):
    """The configuration with real anomalies to learn from."""
    wanted = AnomalousTrainConfig(count=count, protocol=protocol)
    return CONFIG.model_copy(update={"anomalous_train": wanted, **changes})


@pytest.fixture
def defective(tmp_path):
    """4 good training images, 2 good ones to test on, and 10, 6, 4 and 1 anomalies of four types."""
    root = tmp_path / "cable"
    for number in range(4):
        write_image(root / f"train/good/{number}.png", number)
    for number in range(2):
        write_image(root / f"test/good/{number}.png", 10 + number)
    for kind, (name, count) in enumerate({"bent": 10, "cut": 6, "swap": 4, "rare": 1}.items()):
        for number in range(count):
            write_image(root / f"test/{name}/{number}.png", 100 * (kind + 1) + number)
            write_mask(root / f"ground_truth/{name}/{number}_mask.png")
    return root


def types_of(index, split):
    return Counter(index.images[row].defect for row in index.rows(split))


def test_real_anomalies_to_learn_from_are_spread_over_the_types_and_leave_the_test(defective):
    index = run(defective, asking(8))
    taught = types_of(index, "anomalous_train")
    assert taught.total() == index.counts["anomalous_train"] == 8
    assert all(taught[name] >= 2 for name in ("bent", "cut", "swap"))  # 8 // 4 of each type that can spare them
    assert taught["rare"] == 0  # its only image is needed to test on
    tested = types_of(index, "test")
    assert tested == {"good": 2} | {
        name: count - taught[name] for name, count in (("bent", 10), ("cut", 6), ("swap", 4), ("rare", 1))
    }
    assert not set(paths_of(index, "anomalous_train")) & set(paths_of(index, "test"))
    assert all(index.images[row].mask_row is not None for row in index.rows("anomalous_train"))
    assert index.warnings == ()


def test_ten_anomalies_of_eight_types_are_one_of_each_and_two_more(defective):
    """As BGAD's ten of the cables, floor(10 / 8) of each type and the others at random; nobody tests on them."""
    shutil.rmtree(defective / "test/rare")
    shutil.rmtree(defective / "ground_truth/rare")
    for kind in range(5):
        for number in range(4):
            write_image(defective / f"test/{kind}/{number}.png", 1000 + 10 * kind + number)
            write_mask(defective / f"ground_truth/{kind}/{number}_mask.png")
    index = run(defective, asking(10))
    taught = types_of(index, "anomalous_train")
    assert taught.total() == 10
    assert len(taught) == 8
    assert not set(paths_of(index, "anomalous_train")) & set(paths_of(index, "test"))
    assert types_of(index, "test").total() == 2 + 10 + 6 + 4 + 5 * 4 - 10


def test_the_choice_of_anomalies_is_reproducible_and_leaves_the_normal_splits_alone(defective):
    first, again, other = (run(defective, config) for config in (asking(8), asking(8), asking(8, seed=1)))
    assert paths_of(first, "anomalous_train") == paths_of(again, "anomalous_train")
    assert paths_of(first, "anomalous_train") != paths_of(other, "anomalous_train")
    without = run(defective)
    for split in ("train", "holdout"):
        assert paths_of(first, split) == paths_of(without, split)


def test_at_least_half_of_each_type_is_kept_for_the_test(defective):
    index = run(defective, asking(100))
    assert types_of(index, "anomalous_train") == {"bent": 5, "cut": 3, "swap": 2}
    assert index.warnings == (
        "10 of 21 anomalies to learn from, where prepare.anomalous_train.count asks for 100: at least half of each "
        "type is kept for the test of a model that does",
    )


def test_copies_of_an_anomaly_stay_on_one_side(defective):
    for number in range(1, 6):
        shutil.copy(defective / "test/cut/0.png", defective / f"test/cut/{number}.png")
    index = run(defective, asking(12))
    assert types_of(index, "anomalous_train")["cut"] == 0
    assert types_of(index, "test")["cut"] == 6


@pytest.mark.parametrize("protocol", ["spread", "one_type"])
def test_without_masks_all_anomalies_stay_in_the_test(defective, protocol):
    """Nobody could learn from them."""
    shutil.rmtree(defective / "ground_truth")
    index = run(defective, asking(8, protocol))
    assert types_of(index, "test") == {"good": 2, "bent": 10, "cut": 6, "swap": 4, "rare": 1}
    assert index.rows("anomalous_train", "withheld") == []
    assert index.warnings == ()


def test_one_type_to_learn_from_and_the_others_to_test_on(defective):
    index = run(defective, asking(3, "one_type"))
    ((name, count),) = types_of(index, "anomalous_train").items()
    whole = {"bent": 10, "cut": 6, "swap": 4, "rare": 1}
    assert count == min(3, whole[name])
    others = {other: number for other, number in whole.items() if other != name}
    assert types_of(index, "test") == {"good": 2} | others
    assert index.warnings == (
        f"{count} anomal{'y' if count == 1 else 'ies'} of type {name} to learn from, {whole[name] - count} more of it "
        "withheld from the test of a model that does: one_type tests on the other types",
    )
    assert types_of(index, "withheld") == Counter({name: whole[name] - count})
    assert types_of(index, "test") + types_of(index, "withheld") + types_of(index, "anomalous_train") == Counter(
        whole | {"good": 2}
    )
    chosen = {tuple(types_of(run(defective, asking(3, "one_type", seed=seed)), "anomalous_train")) for seed in range(9)}
    assert len(chosen) > 1


def test_of_one_type_nothing_is_learnt_where_there_is_no_other_to_test_on(plain):
    """It says so and stays usable: not every model learns from defects."""
    for path in [*(plain / "abnormal").iterdir(), *(plain / "masks").iterdir()]:
        if path.is_dir():
            shutil.rmtree(path)
    index = run(plain, asking(1, "one_type"))
    assert index.apart() == []
    assert types_of(index, "test")["abnormal"] == 2
    (warning,) = index.warnings
    start = "no anomaly to learn from: one type of defect (abnormal), but prepare.anomalous_train.protocol is one_type"
    assert warning == f"{start}, which tests on the other types; take spread"


def test_smallest_categories(mvtec, plain):
    for number in range(2, 10):
        (mvtec / f"train/good/{number:03}.png").unlink()
    for number in range(3, 10):
        (plain / f"normal/{number:03}.png").unlink()
    assert run(mvtec).counts | {"test_normal": 1} == {
        "train": 1,
        "holdout": 1,
        "anomalous_train": 0,
        "test_normal": 1,
        "test_anomalous": 3,
    }
    assert run(plain).counts == {"train": 1, "holdout": 1, "anomalous_train": 0, "test_normal": 1, "test_anomalous": 3}


@pytest.mark.parametrize("seed", range(8))
def test_copies_stay_on_one_side(plain, seed):
    for number in range(3):
        for copy in range(2):
            shutil.copy(plain / f"normal/{number:03}.png", plain / f"normal/copy_{number}_{copy}.png")
    index = run(plain, CONFIG.model_copy(update={"seed": seed}))
    splits = {}
    for image in index.images:
        splits.setdefault((plain / image.path).read_bytes(), set()).add(image.split)
    assert all(len(sides) == 1 for sides in splits.values())
    assert sum(index.counts.values()) == 19
    assert index.counts["test_normal"] == 3
    assert index.counts["holdout"] == 3


def rewritten(path, name):
    """The same pixels in another file, of another kind for each name."""
    with Image.open(path) as image:
        if name == "turned.png":
            exif = Image.Exif()
            exif[0x0112] = 6
            image.transpose(Image.Transpose.ROTATE_90).save(path.with_name(f"{path.stem}_{name}"), exif=exif)
        elif name == "dated.png":
            info = PngInfo()
            info.add_text("DateTime", "2024:01:02")
            image.save(path.with_name(f"{path.stem}_{name}"), pnginfo=info)
        else:
            image.save(path.with_name(f"{path.stem}_{name}"))


@pytest.mark.parametrize("seed", range(4))
def test_the_same_pixels_in_other_files_stay_on_one_side(plain, seed):
    for number in range(4):
        for name in ("turned.png", "dated.png", "other.bmp", "other.tif"):
            rewritten(plain / f"normal/{number:03}.png", name)
    index = run(plain, CONFIG.model_copy(update={"seed": seed}))
    splits = {}
    for image in index.images:
        splits.setdefault(image.path[:10], set()).add(image.split)
    assert all(len(sides) == 1 for sides in splits.values())
    assert min(index.counts["train"], index.counts["holdout"], index.counts["test_normal"]) >= 1


@pytest.mark.parametrize("name", ["turned.png", "dated.png", "other.bmp"])
def test_a_test_image_of_the_same_pixels_as_a_training_image_is_a_warning(mvtec, name):
    rewritten(mvtec / "train/good/004.png", name)
    (mvtec / f"train/good/004_{name}").rename(mvtec / f"test/good/004_{name}")
    assert run(mvtec).warnings == (f"1 test image met in training too: test/good/004_{name} = train/good/004.png",)


def test_a_defect_that_is_learnt_from_and_tested_under_another_type_is_a_warning(defective):
    for number in range(6):
        shutil.copy(defective / f"test/bent/{number}.png", defective / f"test/cut/{number}.png")
    (warning,) = run(defective, asking(100)).warnings[1:]
    assert "met in training too: test/" in warning


@pytest.mark.parametrize("seed", range(8))
def test_many_copies_of_one_image_leave_room_for_every_split(plain, seed):
    for number in range(3, 10):
        shutil.copy(plain / "normal/000.png", plain / f"normal/{number:03}.png")
    counts = run(plain, CONFIG.model_copy(update={"seed": seed})).counts
    assert min(counts["train"], counts["holdout"], counts["test_normal"]) >= 1


def test_a_test_image_met_in_training_is_a_warning(mvtec):
    shutil.copy(mvtec / "train/good/004.png", mvtec / "test/good/000.png")
    warning = "1 test image met in training too: test/good/000.png = train/good/004.png"
    assert run(mvtec).warnings == (warning,)
    assert json.loads((mvtec.parent / "prepared/nut/index.json").read_text())["warnings"] == [warning]


def test_no_training_image(mvtec, plain):
    for root, folder in ((mvtec, "train/good"), (plain, "normal")):
        for path in (root / folder).glob("*.png"):
            path.unlink()
    assert problem(mvtec) == (
        f"category 'nut': {mvtec}: train/good holds no image; "
        "put at least 2 normal images there, to fit and to hold out"
    )
    assert "normal holds no image; put at least 3 normal images there, to fit, to hold out and to test" in problem(
        plain
    )


def test_a_single_training_image(mvtec):
    for number in range(1, 10):
        (mvtec / f"train/good/{number:03}.png").unlink()
    message = "train/good holds 1 image of different content; to fit and to hold out takes at least 2"
    assert message in problem(mvtec)
    shutil.copy(mvtec / "train/good/000.png", mvtec / "train/good/001.png")  # a copy is no second image
    assert message in problem(mvtec)


def test_two_normal_images_are_too_few_for_three_splits(plain):
    for number in range(2, 10):
        (plain / f"normal/{number:03}.png").unlink()
    assert "normal holds 2 images of different content; to fit, to hold out and to test takes at least 3" in problem(
        plain
    )
