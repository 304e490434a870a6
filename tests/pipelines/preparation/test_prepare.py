"""Sound folders become arrays, splits and an index; every way of being broken is told, and all of them at once."""

import hashlib
import json
import resource
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from pipelines.data.index import IndexedImage, PreparedIndex
from pipelines.errors import DatasetError, ImageError, StageError
from pipelines.files import DiskFull
from pipelines.pictures import images
from pipelines.preparation.config import AnomalousTrainConfig, PrepareConfig
from pipelines.preparation.prepare import prepare

CONFIG = PrepareConfig(
    image_sizes=[16, 8],
    white_level=65535,
    holdout=0.2,
    test_normal=0.2,
    anomalous_train=AnomalousTrainConfig(count=0, protocol="spread"),
    surfaces=[],
    seed=0,
)
WIDTH, HEIGHT = 30, 20
INSPECTION = next(
    (root for root in (parent / "shared/data/inspection" for parent in Path(__file__).parents[3:5]) if root.is_dir()),
    None,
)


def write_image(path, seed, width=WIDTH, height=HEIGHT):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)


def write_mask(path, box=(4, 4, 12, 12), width=WIDTH, height=HEIGHT):
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = Image.new("1", (width, height))
    mask.paste(1, box)
    mask.save(path)


@pytest.fixture
def mvtec(tmp_path):
    """10 training images; 2 good, 2 cracked and 1 bent to test on."""
    root = tmp_path / "nut"
    for number in range(10):
        write_image(root / f"train/good/{number:03}.png", number)
    for number in range(2):
        write_image(root / f"test/good/{number:03}.png", 100 + number)
        write_image(root / f"test/crack/{number:03}.jpg", 200 + number)
        write_mask(root / f"ground_truth/crack/{number:03}_mask.png")
    write_image(root / "test/bent/000.png", 300)
    write_mask(root / "ground_truth/bent/000.png")
    for name in ("license.txt", "train/good/readme.txt", "train/good/.DS_Store", "test/crack/Thumbs.db"):
        (root / name).write_text("not an image")
    return root


@pytest.fixture
def plain(tmp_path):
    """10 normal images, 3 abnormal of which one in a folder of its defect type."""
    root = tmp_path / "part"
    for number in range(10):
        write_image(root / f"normal/{number:03}.png", number)
    for number in range(2):
        write_image(root / f"abnormal/{number:03}.png", 200 + number)
        write_mask(root / f"masks/{number:03}.png")
    write_image(root / "abnormal/dent/000.bmp", 300)
    write_mask(root / "masks/dent/000_mask.png")
    return root


def run(root, config=CONFIG, destination=None):
    return prepare(
        root, root.name, config, destination or root.parent / "prepared" / root.name, lambda done, total: None
    )


def problem(root, config=CONFIG, kind=DatasetError):
    destination = root.parent / "prepared" / root.name
    with pytest.raises(kind) as caught:
        run(root, config)
    assert type(caught.value) is kind
    assert not destination.exists()
    assert not any(destination.parent.glob(".*")), "a temporary folder was left behind"
    return str(caught.value)


def paths_of(index, split):
    return [image.path for image in index.images if image.split == split]


# Sound folders


def test_mvtec_layout(mvtec):
    progress = []
    folder = mvtec.parent / "prepared/nut"
    index = prepare(mvtec, "nut", CONFIG, folder, lambda done, total: progress.append((done, total)))
    assert index.layout == "mvtec"
    assert index.category == "nut"
    assert index.has_masks
    assert index.warnings == ()
    assert index.counts == {"train": 8, "holdout": 2, "anomalous_train": 0, "test_normal": 2, "test_anomalous": 3}
    assert progress == [(done, 15) for done in range(1, 16)]
    assert {path.name for path in folder.iterdir()} == {
        "index.json", "images_16.npy", "images_8.npy", "masks_16.npy", "masks_8.npy"
    }  # fmt: skip
    assert sorted(paths_of(index, "train") + paths_of(index, "holdout")) == [
        f"train/good/{n:03}.png" for n in range(10)
    ]
    assert index.images[10:] == (
        IndexedImage("test/bent/000.png", "test", True, "bent", WIDTH, HEIGHT, "ground_truth/bent/000.png", 0),
        IndexedImage("test/crack/000.jpg", "test", True, "crack", WIDTH, HEIGHT, "ground_truth/crack/000_mask.png", 1),
        IndexedImage("test/crack/001.jpg", "test", True, "crack", WIDTH, HEIGHT, "ground_truth/crack/001_mask.png", 2),
        IndexedImage("test/good/000.png", "test", False, "good", WIDTH, HEIGHT, None, None),
        IndexedImage("test/good/001.png", "test", False, "good", WIDTH, HEIGHT, None, None),
    )


def test_plain_layout(plain):
    index = run(plain)
    assert index.layout == "folder"
    assert index.has_masks
    assert index.counts == {"train": 6, "holdout": 2, "anomalous_train": 0, "test_normal": 2, "test_anomalous": 3}
    defects = {image.path: (image.defect, image.mask) for image in index.images if image.label}
    assert defects == {
        "abnormal/000.png": ("abnormal", "masks/000.png"),
        "abnormal/001.png": ("abnormal", "masks/001.png"),
        "abnormal/dent/000.bmp": ("dent", "masks/dent/000_mask.png"),
    }
    normals = [image.path for image in index.images if not image.label]
    assert sorted(normals) == [f"normal/{n:03}.png" for n in range(10)]


def test_normal_images_are_enough(plain):
    shutil.rmtree(plain / "abnormal")
    shutil.rmtree(plain / "masks")
    index = run(plain)
    assert not index.has_masks
    assert index.counts["test_anomalous"] == 0
    assert index.warnings == ("no anomalous image to test on: metrics that need both kinds cannot be computed",)


def test_no_folder_of_masks_means_image_labels_only(mvtec):
    shutil.rmtree(mvtec / "ground_truth")
    index = run(mvtec)
    assert not index.has_masks
    assert all(image.mask is None and image.mask_row is None for image in index.images)
    assert not list((mvtec.parent / "prepared/nut").glob("masks*"))


@pytest.mark.parametrize("size", CONFIG.image_sizes)
def test_arrays_hold_what_images_reads(mvtec, size):
    index = run(mvtec)
    pixels = np.load(mvtec.parent / f"prepared/nut/images_{size}.npy")
    masks = np.load(mvtec.parent / f"prepared/nut/masks_{size}.npy")
    assert pixels.shape == (15, size, size, 3)
    assert pixels.dtype == np.uint8
    assert masks.shape == (3, size, size)
    assert masks.dtype == bool
    for row, image in enumerate(index.images):
        np.testing.assert_array_equal(pixels[row], images.load(mvtec / image.path, size, 65535)[0])
        if image.mask is not None:
            expected = images.resize_mask(images.load_mask(mvtec / image.mask), size)
            np.testing.assert_array_equal(masks[image.mask_row], expected)


def test_the_index_survives_the_disk(mvtec):
    index = run(mvtec)
    assert PreparedIndex.load(mvtec.parent / "prepared/nut") == index


def test_sizes_are_those_of_the_upright_image(mvtec):
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(mvtec / "test/bent/000.png") as image:
        image.save(mvtec / "test/bent/000.png", exif=exif)
    write_mask(mvtec / "ground_truth/bent/000.png", width=HEIGHT, height=WIDTH)
    bent = run(mvtec).images[10]
    assert (bent.width, bent.height) == (HEIGHT, WIDTH)


def test_white_level_reaches_the_images(mvtec):
    deep = np.full((HEIGHT, WIDTH), 4095, dtype=np.uint16)
    Image.fromarray(deep).save(mvtec / "test/good/000.png")
    run(mvtec, CONFIG.model_copy(update={"white_level": 4095}))
    assert (np.load(mvtec.parent / "prepared/nut/images_8.npy")[13] == 255).all()


def test_data_sha256_covers_paths_and_bytes_of_images_and_masks(mvtec):
    first = run(mvtec).data_sha256
    used = sorted(path for path in mvtec.rglob("*") if path.suffix in {".png", ".jpg"})
    digests = {path.relative_to(mvtec).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in used}
    lines = "".join(f"{digests[path]}  {path}\n" for path in sorted(digests))
    assert first == hashlib.sha256(lines.encode()).hexdigest()
    write_mask(mvtec / "ground_truth/bent/000.png", box=(1, 1, 20, 9))
    second = run(mvtec).data_sha256
    (mvtec / "test/good/001.png").rename(mvtec / "test/good/002.png")
    assert len({first, second, run(mvtec).data_sha256}) == 3


# Splits


def test_the_same_files_give_the_same_bytes(mvtec, tmp_path):
    run(mvtec, destination=tmp_path / "a/nut")
    shutil.copytree(mvtec, tmp_path / "elsewhere/nut")
    run(tmp_path / "elsewhere/nut", destination=tmp_path / "b/nut")
    for path in (tmp_path / "a/nut").iterdir():
        assert path.read_bytes() == (tmp_path / "b/nut" / path.name).read_bytes(), path.name


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
        "type is kept for the test",
    )


def test_copies_of_an_anomaly_stay_on_one_side(defective):
    for number in range(1, 6):
        shutil.copy(defective / "test/cut/0.png", defective / f"test/cut/{number}.png")
    index = run(defective, asking(12))
    assert types_of(index, "anomalous_train")["cut"] == 0
    assert types_of(index, "test")["cut"] == 6


def test_one_type_to_learn_from_and_the_others_to_test_on(defective):
    index = run(defective, asking(3, "one_type"))
    ((name, count),) = types_of(index, "anomalous_train").items()
    whole = {"bent": 10, "cut": 6, "swap": 4, "rare": 1}
    assert count == min(3, whole[name])
    others = {other: number for other, number in whole.items() if other != name}
    assert types_of(index, "test") == {"good": 2} | others
    assert index.warnings == (
        f"{count} anomal{'y' if count == 1 else 'ies'} of type {name} to learn from, {whole[name] - count} more of it "
        "in no split: one_type tests on the other types",
    )
    chosen = {tuple(types_of(run(defective, asking(3, "one_type", seed=seed)), "anomalous_train")) for seed in range(9)}
    assert len(chosen) > 1


def test_one_type_needs_another_to_test_on(plain):
    shutil.rmtree(plain / "masks")
    for path in (plain / "abnormal").iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    with pytest.raises(DatasetError, match=r"one type of defect \(abnormal\), but .*one_type.*; take spread"):
        run(plain, asking(1, "one_type"))


def test_a_category_may_fill_the_image(plain):
    assert not run(plain).surface
    assert run(plain, CONFIG.model_copy(update={"surfaces": ["other", "part"]})).surface


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


# Warnings


def test_unused_files_and_folders_are_told(mvtec):
    (mvtec / "train/good/notes.pdf").touch()
    write_image(mvtec / "train/bad/000.png", 7)
    write_image(mvtec / "validation/good/000.png", 8)
    (mvtec / ".cache").mkdir()
    assert run(mvtec).warnings == (
        "folders that are not used: validation",
        "folders that are not used: train/bad",
        "1 file ignored, of no image type: train/good/notes.pdf",
    )


def test_a_region_lost_by_resizing_is_a_warning(mvtec):
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[5:15, 5:15] = True
    mask[2, 29] = True
    Image.fromarray(mask).save(mvtec / "ground_truth/bent/000.png")
    warning = "1 mask with fewer regions at {} pixels: ground_truth/bent/000.png (2 regions became 1)"
    assert run(mvtec).warnings == (warning.format(8), warning.format(16))


def test_a_mask_never_comes_out_empty(mvtec):
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[0, 0] = mask[19, 29] = True
    assert not images.resize_mask(mask, 8).any()
    Image.fromarray(mask).save(mvtec / "ground_truth/bent/000.png")
    warnings = run(mvtec).warnings
    assert warnings[0].endswith("8 pixels: ground_truth/bent/000.png (vanished, kept at the centroid)")
    rows, columns = np.load(mvtec.parent / "prepared/nut/masks_8.npy")[0].nonzero()
    assert (rows.tolist(), columns.tolist()) == ([0, 7], [0, 7])


# Broken folders


def test_missing_folder(tmp_path):
    assert problem(tmp_path / "nowhere") == (
        f"{tmp_path / 'nowhere'}: no such folder; put the images there or correct the path in params.yaml"
    )


def test_neither_layout(tmp_path):
    root = tmp_path / "nut"
    root.mkdir()
    expected = "expected train/good and test/ (as in MVTec AD), or normal/"
    assert problem(root) == f"{root}: is empty; {expected}"
    write_image(root / "images/a.png", 0)
    write_image(root / "b.png", 0)
    assert problem(root) == f"{root}: holds b.png, images/; {expected}"


def test_both_layouts(mvtec):
    write_image(mvtec / "normal/000.png", 0)
    assert "holds both train/good and normal" in problem(mvtec)


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


def test_a_defect_image_without_mask(mvtec):
    (mvtec / "ground_truth/crack/001_mask.png").unlink()
    assert problem(mvtec) == (
        f"category 'nut': {mvtec}: 1 defect image without a mask: test/crack/001.jpg; "
        "add ground_truth/.../<stem>_mask.png for each, or remove ground_truth altogether"
    )
    shutil.rmtree(mvtec / "ground_truth/crack")
    for number in range(2, 6):
        write_image(mvtec / f"test/crack/{number:03}.jpg", number)
    message = problem(mvtec)
    assert (
        "6 defect images without a mask: test/crack/000.jpg, test/crack/001.jpg, test/crack/002.jpg and 3 more"
        in message
    )


def test_a_mask_without_defect_image(mvtec, plain):
    write_mask(mvtec / "ground_truth/good/000_mask.png")
    write_mask(mvtec / "ground_truth/crack/007_mask.png")
    assert (
        "2 masks without a defect image in test: ground_truth/crack/007_mask.png, ground_truth/good/000_mask.png; "
        "add the images or remove the masks"
    ) in problem(mvtec)
    write_mask(plain / "masks/007.png")
    assert "1 mask without a defect image in abnormal: masks/007.png" in problem(plain)


def test_a_mask_of_another_size(mvtec):
    write_mask(mvtec / "ground_truth/crack/001_mask.png", width=HEIGHT, height=WIDTH)
    assert problem(mvtec) == (
        f"category 'nut': {mvtec}/ground_truth/crack/001_mask.png: the mask is 20 x 30 pixels, its image "
        "test/crack/001.jpg 30 x 20; export it at the size of the image"
    )


def test_a_black_mask(mvtec):
    write_mask(mvtec / "ground_truth/crack/001_mask.png", box=(0, 0, 0, 0))
    assert "001_mask.png: the mask is all black" in problem(mvtec)


def test_ambiguous_stems(mvtec):
    write_image(mvtec / "test/crack/000.png", 0)
    assert problem(mvtec) == (
        f"category 'nut': {mvtec}: ground_truth/crack/000_mask.png fits several images "
        "(test/crack/000.jpg, test/crack/000.png); give them different stems"
    )
    (mvtec / "test/crack/000.png").unlink()
    write_mask(mvtec / "ground_truth/crack/000.png")
    assert (
        "test/crack/000.jpg has several masks (ground_truth/crack/000_mask.png, ground_truth/crack/000.png); keep one"
    ) in problem(mvtec)


def test_the_same_stem_twice_is_fine_without_masks(mvtec):
    shutil.rmtree(mvtec / "ground_truth")
    write_image(mvtec / "test/crack/000.png", 0)
    assert run(mvtec).counts["test_anomalous"] == 4


def test_misplaced_images(mvtec, plain):
    write_image(mvtec / "test/000.png", 0)
    assert "images directly in test (test/000.png); move each into test/<defect>" in problem(mvtec)
    write_image(plain / "normal/monday/000.png", 0)
    assert "folders among the images of normal (normal/monday); move them out" in problem(plain)


def test_a_defect_type_called_good(plain):
    write_image(plain / "abnormal/good/000.png", 0)
    write_mask(plain / "masks/good/000.png")
    assert "abnormal/good is a defect type called 'good'" in problem(plain)


@pytest.mark.parametrize("name", ["train/good/003.png", "test/crack/001.jpg", "ground_truth/crack/001_mask.png"])
def test_truncated_empty_and_text_files(mvtec, name):
    path = mvtec / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert f"category 'nut': {path}: " in problem(mvtec, kind=ImageError)
    path.write_bytes(b"")
    assert f"{path}: the file is empty" in problem(mvtec, kind=ImageError)
    path.write_text("text under an image's name")
    assert f"{path}: not a PNG" in problem(mvtec, kind=ImageError)


def test_an_apple_double_file_is_read_as_what_it_claims_to_be(mvtec):
    (mvtec / "train/good/._000.png").write_bytes(b"\0\5\x16\7")
    assert "._000.png: not a PNG" in problem(mvtec, kind=ImageError)


def test_a_link_to_nowhere(mvtec):
    (mvtec / "train/good/010.png").symlink_to(mvtec / "gone.png")
    assert "010.png: cannot be read" in problem(mvtec, kind=ImageError)


def test_a_value_above_the_white_level(mvtec):
    Image.fromarray(np.full((4, 4), 5000, dtype=np.uint16)).save(mvtec / "train/good/000.png")
    message = problem(mvtec, CONFIG.model_copy(update={"white_level": 4095}), kind=ImageError)
    assert "holds the value 5000, above `prepare.white_level` 4095" in message


def test_a_name_that_is_not_unicode(mvtec):
    try:
        (mvtec / "train/good/gr\udcfcn.png").touch()
    except (OSError, UnicodeEncodeError):
        pytest.skip("this file system takes UTF-8 names only")
    assert r"'train/good/gr\udcfcn.png' is not UTF-8; rename it" in problem(mvtec)


def test_all_problems_at_once(mvtec):
    for number in range(1, 10):
        (mvtec / f"train/good/{number:03}.png").unlink()
    (mvtec / "train/good/000.png").write_bytes(b"")
    (mvtec / "ground_truth/bent/000.png").unlink()
    write_mask(mvtec / "ground_truth/crack/009_mask.png")
    write_mask(mvtec / "ground_truth/crack/000_mask.png", width=5, height=5)
    write_mask(mvtec / "ground_truth/crack/001_mask.png", box=(0, 0, 0, 0))
    (mvtec / "test/good/001.png").write_text("text")
    lines = problem(mvtec).splitlines()
    assert lines[0] == "category 'nut' has 7 problems:"
    told = ["without a mask", "without a defect image", "1 image of", "is empty", "5 x 5", "all black", "not a PNG"]
    assert all(expected in line for expected, line in zip(told, lines[1:], strict=True))


def test_a_long_list_of_problems_is_cut(mvtec):
    for path in mvtec.glob("train/good/*.png"):
        path.write_bytes(path.name.encode())
    for path in mvtec.glob("test/good/*.png"):
        path.write_bytes(b"")
    lines = problem(mvtec, kind=ImageError).splitlines()
    assert len(lines) == 12
    assert lines[0] == "category 'nut' has 12 problems:"
    assert lines[-1] == "  and 2 more"


def test_a_failure_leaves_the_prepared_folder_as_it_was(mvtec):
    index = run(mvtec)
    (mvtec / "train/good/000.png").write_bytes(b"")
    with pytest.raises(ImageError):
        run(mvtec)
    assert PreparedIndex.load(mvtec.parent / "prepared/nut") == index


def test_a_full_disk_is_told(mvtec):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(DiskFull, match="prepared/nut"):
            run(mvtec, CONFIG.model_copy(update={"image_sizes": [256]}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((mvtec.parent / "prepared").iterdir()) == []


# Settings and the index


@pytest.mark.parametrize(
    "wrong",
    [
        {"image_sizes": []}, {"image_sizes": [0]}, {"image_sizes": [64, 64]}, {"image_sizes": 64}, {"white_level": 0},
        {"white_level": 70000}, {"holdout": 0.0}, {"holdout": 1.0}, {"test_normal": 1.5}, {"seed": -1}, {"seed": "0"},
        {"extra": 1},
    ],
)  # fmt: skip
def test_settings_out_of_range(wrong):
    with pytest.raises(ValidationError):
        PrepareConfig(**CONFIG.model_dump() | wrong)


def test_settings_have_no_defaults():
    with pytest.raises(ValidationError) as caught:
        PrepareConfig()
    assert len(caught.value.errors()) == 7


def test_index_of_a_category_that_is_not_prepared(tmp_path):
    with pytest.raises(StageError, match=r"data/prepared/nut: no prepared images; run `blemish prepare nut`"):
        PreparedIndex.load(tmp_path / "data/prepared/nut")


def test_index_of_another_version(mvtec):
    run(mvtec)
    path = mvtec.parent / "prepared/nut/index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(StageError, match="prepared in format 99, this version reads 2; run `blemish prepare nut`"):
        PreparedIndex.load(path.parent)


# Real images


@pytest.mark.skipif(INSPECTION is None, reason="the folder of shared real data is not here")
@pytest.mark.parametrize(
    ("category", "training", "test_normal", "test_anomalous"), [("hazelnut_toy", 28, 6, 17), ("cookie", 31, 14, 32)]
)
def test_real_categories(tmp_path, category, training, test_normal, test_anomalous):
    config = CONFIG.model_copy(update={"image_sizes": [64]})
    index = prepare(INSPECTION / category, category, config, tmp_path / category, lambda done, total: None)
    assert index.counts["train"] + index.counts["holdout"] == training
    assert index.counts["holdout"] == 6
    assert (index.counts["test_normal"], index.counts["test_anomalous"]) == (test_normal, test_anomalous)
    masks = np.load(tmp_path / category / "masks_64.npy")
    assert masks.any(axis=(1, 2)).all()
    for image in index.images:
        with Image.open(INSPECTION / category / image.path) as opened:
            assert opened.size == (image.width, image.height)
