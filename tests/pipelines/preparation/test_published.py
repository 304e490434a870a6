"""Benchmarks in the folders that they were published in: counts, splits, masks pixel by pixel, and what is told."""

import csv
import hashlib
import json
import re
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from drawn_folders import CONFIG, HEIGHT, WIDTH, draw_mvtec, made, masks_of, paths_of, problem, write_image, write_mask
from PIL import Image

from anomaly_models.common.sizes import Size
from pipelines.data.index import Layout
from pipelines.pictures import images
from pipelines.preparation.published import NEEDED

BOX = (4, 4, 12, 12)  # of `write_mask`: left, top, right, bottom


def draw_images(root, folder, count, suffix=".png", seed=0):
    start = int(hashlib.sha256(f"{folder} {seed}".encode()).hexdigest()[:6], 16)
    for number in range(count):
        write_image(root / folder / f"{number:03}{suffix}", start + number)


def write_values(path, *boxes):
    """A grey mask (H, W): each box (value, left, top, right, bottom)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.zeros((HEIGHT, WIDTH), np.uint8)
    for value, left, top, right, bottom in boxes:
        values[top:bottom, left:right] = value
    Image.fromarray(values).save(path)


def boxed(*boxes):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    for left, top, right, bottom in boxes:
        mask[top:bottom, left:right] = True
    return mask


def named(layout):
    return CONFIG.model_copy(update={"layout": layout})


def prepared_masks(root, index):
    """Image -> its row of the prepared masks."""
    rows = np.load(root.parent / "prepared" / root.name / "masks_16.npy")
    return {image.path: rows[image.mask_row] for image in index.images if image.mask_row is not None}


def assert_marked(found, path, mask):
    assert np.array_equal(found[path], images.resize_mask(mask, Size.square(16))), path
    assert mask.any()


# VisA


def draw_visa(root):
    """Named candle, with 8 images to train on, 2 good and 2 defective ones to test on."""
    draw_images(root, "candle/Data/Images/Normal", 10, ".JPG")
    draw_images(root, "candle/Data/Images/Anomaly", 2, ".JPG")
    rows = []
    for number in range(10):
        split = "test" if number in (3, 7) else "train"
        rows.append(["candle", split, "normal", f"candle/Data/Images/Normal/{number:03}.JPG", ""])
    for number in range(2):
        image, mask = (f"candle/Data/{kind}/{number:03}" for kind in ("Images/Anomaly", "Masks/Anomaly"))
        write_values(root / f"{mask}.png", (1, 2, 2, 8, 8), (5 + number, 20, 10, 28, 18))
        rows.append(["candle", "test", "anomaly", f"{image}.JPG", f"{mask}.png"])
    rows.append(["cashew", "train", "normal", "cashew/Data/Images/Normal/000.JPG", ""])
    write_split(root, rows)
    return root / "candle"


def write_split(root, rows):
    (root / "split_csv").mkdir(exist_ok=True)
    with (root / "split_csv/1cls.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["object", "split", "label", "image", "mask"], *rows])


def split_rows(root):
    with (root / "split_csv/1cls.csv").open(newline="") as file:
        return list(csv.reader(file))[1:]


@pytest.mark.parametrize("layout", ["auto", "visa"])
def test_visa_is_split_by_its_file(tmp_path, layout):
    root = draw_visa(tmp_path)
    result = made(root, named(layout))
    index = result.index
    assert index.layout == "visa"
    assert index.counts == {"train": 6, "holdout": 2, "anomalous_train": 0, "test_normal": 2, "test_anomalous": 2}
    assert index.warnings == ()
    assert result.notes == (("layout visa, as its folders show; prepare.layout names another",) * (layout == "auto"))
    assert paths_of(index, "test") == [
        "Data/Images/Anomaly/000.JPG", "Data/Images/Anomaly/001.JPG", "Data/Images/Normal/003.JPG",
        "Data/Images/Normal/007.JPG",
    ]  # fmt: skip
    assert index.split_sha256 == hashlib.sha256((tmp_path / "split_csv/1cls.csv").read_bytes()).hexdigest()
    found = prepared_masks(root, index)
    assert len(found) == 2
    for path in found:  # any class is a defect
        assert_marked(found, path, boxed((2, 2, 8, 8), (20, 10, 28, 18)))
    assert {image.defect for image in index.images} == {"good", "anomaly"}


def test_visa_masks_with_a_palette(tmp_path):
    root = draw_visa(tmp_path)
    mask = Image.open(root / "Data/Masks/Anomaly/000.png")
    coloured = Image.fromarray(np.asarray(mask), mode="L").convert("P")
    coloured.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0, 0, 0, 128, 128, 0, 128])
    coloured.save(root / "Data/Masks/Anomaly/000.png")
    found = prepared_masks(root, made(root).index)
    assert_marked(found, "Data/Images/Anomaly/000.JPG", boxed((2, 2, 8, 8), (20, 10, 28, 18)))


def test_visa_without_its_split_file(tmp_path):
    root = draw_visa(tmp_path)
    (tmp_path / "split_csv/1cls.csv").unlink()
    assert problem(root) == (
        f"{tmp_path}/split_csv/1cls.csv: no such file, and VisA says in it which image is for what; copy it from the "
        "published archive"
    )


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (["candle", "val", "normal", "candle/Data/Images/Normal/003.JPG", ""], "line 2 says val and normal; expected"),
        (["candle", "train", "anomaly", "candle/Data/Images/Anomaly/000.JPG", ""], "line 2 is an anomaly to train on"),
        (["candle", "test", "normal", "cashew/Data/Images/Normal/003.JPG", ""], "line 2 names cashew/Data"),
        (["candle", "test", "normal", "candle/../x.JPG", ""], "line 2 names candle/../x.JPG; expected candle/Data/..."),
    ],
)
def test_a_row_of_visa_that_says_nothing(tmp_path, row, told):
    root = draw_visa(tmp_path)
    write_split(tmp_path, [row, *split_rows(tmp_path)])
    assert f"{tmp_path}/split_csv/1cls.csv: {told}" in problem(root)


def test_a_split_file_of_another_kind(tmp_path):
    root = draw_visa(tmp_path)
    file = tmp_path / "split_csv/1cls.csv"
    file.write_text("object,split\ncandle,train\n")
    assert problem(root) == f"{file}: no column image, label, mask; copy it from the published archive"
    write_split(tmp_path, [row for row in split_rows(draw_visa(tmp_path).parent) if row[0] != "candle"])
    assert problem(root) == f"{file}: no row of the object candle; call the category as the file does"
    file.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in problem(root)


def test_images_of_visa_that_only_one_side_knows(tmp_path):
    root = draw_visa(tmp_path)
    draw_images(root, "Data/Images/Normal", 12, ".JPG", seed=1)
    assert made(root).index.warnings == (
        "2 images not in split_csv/1cls.csv, not used: Data/Images/Normal/010.JPG, Data/Images/Normal/011.JPG",
    )
    (root / "Data/Images/Normal/004.JPG").unlink()
    message = problem_of(root)
    assert f"{tmp_path}/split_csv/1cls.csv: 1 image of candle not there: Data/Images/Normal/004.JPG" in message


def problem_of(root, config=CONFIG):
    """Where the category had been prepared before."""
    prepared = root.parent / "prepared"
    for path in sorted(prepared.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    return problem(root, config)


def test_a_defect_of_visa_without_a_mask(tmp_path):
    root = draw_visa(tmp_path)
    write_split(
        tmp_path, [[*row[:4], "" if row[3].endswith("Anomaly/001.JPG") else row[4]] for row in split_rows(tmp_path)]
    )
    assert problem(root) == (
        f"category 'candle': {root}: 1 defect image without a mask: Data/Images/Anomaly/001.JPG; "
        "name Data/Masks/Anomaly/<stem>.png for each in split_csv/1cls.csv"
    )


# MVTec LOCO AD

DEFECTS = [
    {"defect_name": "missing", "pixel_value": 255, "saturation_threshold": 40, "relative_saturation": False},
    {"defect_name": "swapped", "pixel_value": 254, "saturation_threshold": 0.55, "relative_saturation": True},
    {"defect_name": "huge", "pixel_value": 253, "saturation_threshold": 9999, "relative_saturation": False},
]


def draw_loco(root):
    draw_images(root, "train/good", 6)
    draw_images(root, "validation/good", 3)
    draw_images(root, "test/good", 2)
    draw_images(root, "test/logical_anomalies", 2)
    draw_images(root, "test/structural_anomalies", 1)
    write_values(root / "ground_truth/logical_anomalies/000/000.png", (255, 2, 2, 12, 8))  # 60 pixels
    write_values(root / "ground_truth/logical_anomalies/000/001.png", (254, 10, 6, 16, 10))  # 24, 4 of them shared
    write_values(root / "ground_truth/logical_anomalies/001/000.png", (254, 0, 0, 3, 3))  # 9
    write_values(root / "ground_truth/structural_anomalies/000/000.png", (253, 5, 5, 10, 10))  # 25
    (root / "defects_config.json").write_text(json.dumps(DEFECTS))
    return root


@pytest.mark.parametrize("layout", ["auto", "loco"])
def test_loco_with_several_masks_of_an_image(tmp_path, layout):
    root = draw_loco(tmp_path / "box")
    result = made(root, named(layout))
    index = result.index
    assert index.layout == "loco"
    assert index.counts == {"train": 6, "holdout": 3, "anomalous_train": 0, "test_normal": 2, "test_anomalous": 3}
    assert paths_of(index, "holdout") == [f"validation/good/{number:03}.png" for number in range(3)]
    assert index.warnings == ()
    assert result.notes[-1] == "validation/good is held out, as published; prepare.holdout is not used"
    masks = {image.path: [(m.path, m.saturation) for m in image.masks] for image in index.images if image.masks}
    truth = "ground_truth/logical_anomalies"
    assert masks == {
        "test/logical_anomalies/000.png": [(f"{truth}/000/000.png", 40), (f"{truth}/000/001.png", 13)],  # 0.55 * 24
        "test/logical_anomalies/001.png": [(f"{truth}/001/000.png", 4)],
        "test/structural_anomalies/000.png": [("ground_truth/structural_anomalies/000/000.png", 25)],  # all there is
    }
    assert index.has_saturations
    found = prepared_masks(root, index)
    assert_marked(found, "test/logical_anomalies/000.png", boxed((2, 2, 12, 8), (10, 6, 16, 10)))
    assert_marked(found, "test/structural_anomalies/000.png", boxed((5, 5, 10, 10)))
    assert {image.defect for image in index.images} == {"good", "logical_anomalies", "structural_anomalies"}


def test_masks_of_loco_that_its_defects_do_not_explain(tmp_path):
    root = draw_loco(tmp_path / "box")
    truth = root / "ground_truth/logical_anomalies/001"
    write_values(truth / "001.png", (7, 0, 0, 3, 3))
    assert f"{truth}/001.png: holds the value 7, which defects_config.json does not know" in problem(root)
    write_values(truth / "001.png", (254, 0, 0, 3, 3), (255, 6, 6, 9, 9))
    assert f"{truth}/001.png: holds the values 254, 255; each mask is one defect of one value" in problem(root)
    write_values(truth / "001.png")
    assert f"{truth}/001.png: the mask is all black" in problem(root)
    (truth / "001.png").unlink()
    (truth / "000.png").unlink()
    assert "1 defect image without a mask: test/logical_anomalies/001.png; add ground_truth/<type>" in problem(root)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"saturation_threshold": 1.5, "relative_saturation": True}, "a relative saturation_threshold is at most 1"),
        ({"saturation_threshold": 0}, "0.saturation_threshold: Input should be greater than 0"),
        ({"pixel_value": 256}, "0.pixel_value: Input should be less than or equal to 255"),
    ],
)
def test_defects_of_loco_out_of_range(tmp_path, change, told):
    root = draw_loco(tmp_path / "box")
    (root / "defects_config.json").write_text(json.dumps([DEFECTS[0] | change]))
    message = problem(root)
    assert message.startswith(f"{root}/defects_config.json: ")
    assert told in message
    assert "\n" not in message


def test_loco_without_its_defects(tmp_path):
    root = draw_loco(tmp_path / "box")
    (root / "defects_config.json").unlink()
    assert problem(root) == (
        f"{root}: its folders look like loco, but there is no defects_config.json; add what is missing, or name "
        "another layout in prepare.layout"
    )
    (root / "defects_config.json").write_text("[")
    assert "defects_config.json: Invalid JSON" in problem(root)


def test_a_held_out_image_that_is_trained_on_too(tmp_path):
    root = draw_loco(tmp_path / "box")
    (root / "validation/good/001.png").write_bytes((root / "train/good/004.png").read_bytes())
    index = made(root).index
    assert index.counts["holdout"] == 2
    assert index.warnings == ("1 image to hold out met in training too, left out: validation/good/001.png",)
    for path in (root / "validation/good").iterdir():
        path.unlink()
    assert "no image to hold out" in problem_of(root)


# MVTec AD 2


def draw_ad2(root):
    draw_images(root, "train/good", 5)
    draw_images(root, "validation/good", 2)
    draw_images(root, "test_public/good", 2)
    draw_images(root, "test_public/bad", 2)
    draw_images(root, "test_private", 2)
    draw_images(root, "test_private_mixed", 2)
    for number in range(2):
        write_mask(root / f"test_public/ground_truth/bad/{number:03}_mask.png")
    return root


@pytest.mark.parametrize("layout", ["auto", "ad2"])
def test_ad2_by_its_public_test(tmp_path, layout):
    root = draw_ad2(tmp_path / "vial")
    result = made(root, named(layout))
    index = result.index
    assert index.layout == "ad2"
    assert index.counts == {"train": 5, "holdout": 2, "anomalous_train": 0, "test_normal": 2, "test_anomalous": 2}
    assert index.warnings == ()
    assert result.notes[-2:] == (
        "test_private and test_private_mixed not used: their labels are not published",
        "validation/good is held out, as published; prepare.holdout is not used",
    )
    assert not index.has_saturations
    assert not any("private" in image.path for image in index.images)
    found = prepared_masks(root, index)
    assert_marked(found, "test_public/bad/001.png", boxed(BOX))
    (root / "test_public/ground_truth/bad/001_mask.png").unlink()
    assert "1 defect image without a mask: test_public/bad/001.png; add test_public/ground_truth" in problem_of(root)


# BTAD, DTD-Synthetic


@pytest.mark.parametrize("layout", ["auto", "btad"])
@pytest.mark.parametrize("suffix", [".png", ".bmp"])
def test_btad(tmp_path, layout, suffix):
    root = tmp_path / "01"
    draw_images(root, "train/ok", 5, ".bmp")
    draw_images(root, "test/ok", 2, ".bmp")
    draw_images(root, "test/ko", 2, ".bmp")
    for number in range(2):
        write_mask(root / f"ground_truth/ko/{number:03}{suffix}")
    result = made(root, named(layout))
    index = result.index
    assert index.layout == "btad"
    assert index.counts == {"train": 4, "holdout": 1, "anomalous_train": 0, "test_normal": 2, "test_anomalous": 2}
    assert index.warnings == ()
    assert_marked(prepared_masks(root, index), "test/ko/000.bmp", boxed(BOX))


@pytest.mark.parametrize(("layout", "told"), [("auto", "mvtec"), ("dtd_synthetic", "dtd_synthetic")])
def test_dtd_synthetic(tmp_path, layout, told):
    root = tmp_path / "Woven_001"
    draw_images(root, "train/good", 5)
    draw_images(root, "test/good", 2)
    draw_images(root, "test/bad", 2)
    for number in range(2):
        write_mask(root / f"ground_truth/bad/{number:03}_mask.png")
    index = made(root, named(layout)).index
    assert index.layout == told
    assert index.counts == {"train": 4, "holdout": 1, "anomalous_train": 0, "test_normal": 2, "test_anomalous": 2}
    assert index.warnings == ()
    assert {image.path: masks_of(image) for image in index.images if image.label} == {
        "test/bad/000.png": ["ground_truth/bad/000_mask.png"],
        "test/bad/001.png": ["ground_truth/bad/001_mask.png"],
    }
    assert_marked(prepared_masks(root, index), "test/bad/000.png", boxed(BOX))


# Magnetic tiles


def draw_mtd(root):
    draw_images(root, "MT_Free/Imgs", 10, ".jpg")
    for number in range(10):
        write_mask(root / f"MT_Free/Imgs/{number:03}.png", box=(0, 0, 0, 0))
    for kind in ("Blowhole", "Crack"):
        draw_images(root, f"MT_{kind}/Imgs", 2, ".jpg")
        for number in range(2):
            write_mask(root / f"MT_{kind}/Imgs/{number:03}.png")
    return root


@pytest.mark.parametrize("layout", ["auto", "mtd"])
def test_magnetic_tiles_with_masks_beside_them(tmp_path, layout):
    root = draw_mtd(tmp_path / "tiles")
    index = made(root, named(layout)).index
    assert index.layout == "mtd"
    assert index.counts == {"train": 6, "holdout": 2, "anomalous_train": 0, "test_normal": 2, "test_anomalous": 4}
    assert index.warnings == ()
    assert {image.path: (image.defect, masks_of(image)) for image in index.images if image.label} == {
        f"MT_{kind}/Imgs/{number:03}.jpg": (kind, [f"MT_{kind}/Imgs/{number:03}.png"])
        for kind in ("Blowhole", "Crack")
        for number in range(2)
    }
    assert not any(image.path.endswith(".png") for image in index.images)
    assert_marked(prepared_masks(root, index), "MT_Crack/Imgs/001.jpg", boxed(BOX))


def test_magnetic_tiles_whose_masks_do_not_fit(tmp_path):
    root = draw_mtd(tmp_path / "tiles")
    write_mask(root / "MT_Free/Imgs/003.png")
    (root / "MT_Crack/Imgs/001.png").unlink()
    message = problem(root)
    assert "1 mask without a defect image: MT_Free/Imgs/003.png; add the images or remove the masks" in message
    assert "1 defect image without a mask: MT_Crack/Imgs/001.jpg; add <stem>.png beside each" in message


# Names that do not fit


@pytest.mark.parametrize(
    ("layout", "lacking"),
    [
        ("folder", "normal"),
        ("visa", "Data/Images/Normal, Data/Images/Anomaly, Data/Masks/Anomaly"),
        ("loco", "validation/good, defects_config.json"),
        ("ad2", "validation/good, test_public/good, test_public/bad and 1 more"),
        ("btad", "train/ok, test/ok, test/ko and 1 more"),
        ("mtd", "MT_Free/Imgs"),
        ("dtd_synthetic", "test/bad, ground_truth/bad"),
    ],
)
def test_a_named_layout_whose_folders_are_not_there(tmp_path, layout, lacking):
    root = draw_mvtec(tmp_path / "nut")
    message = problem(root, named(layout))
    looks = "" if layout in ("btad", "dtd_synthetic") else "; its folders look like mvtec"
    assert message == f"{root}: no {lacking}, which the layout {layout} of prepare.layout has{looks}"


def test_mvtec_where_it_is_not(tmp_path):
    root = draw_mtd(tmp_path / "tiles")
    assert problem(root, named("mvtec")) == (
        f"{root}: no train/good, which the layout mvtec of prepare.layout has; its folders look like mtd"
    )


def test_a_wrong_name_for_folders_that_another_layout_explains(tmp_path):
    root = draw_ad2(tmp_path / "vial")
    index = made(root, named("mvtec")).index
    assert index.layout == "mvtec"
    assert index.warnings[0] == "read in the layout mvtec of prepare.layout, but its folders look like ad2"


def test_folders_that_two_layouts_explain(tmp_path):
    root = draw_ad2(tmp_path / "vial")
    write_image(root / "normal/000.png", 0)
    assert problem(root) == f"{root}: its folders look like ad2 and folder; name one of them in prepare.layout"
    index = made(root, named("ad2")).index
    assert index.layout == "ad2"
    assert index.warnings == ("folders that are not used: normal",)


def test_what_looks_like_a_benchmark_and_lacks_a_part(tmp_path):
    root = draw_ad2(tmp_path / "vial")
    for path in (root / "test_public/ground_truth/bad").iterdir():
        path.unlink()
    (root / "test_public/ground_truth/bad").rmdir()
    assert "look like ad2, but there is no test_public/ground_truth/bad; add what is missing" in problem(root)


def test_a_guess_is_told(tmp_path):
    assert made(draw_mvtec(tmp_path / "nut")).notes == (
        "layout mvtec, as its folders show; prepare.layout names another",
    )
    assert made(draw_mvtec(tmp_path / "nut"), named("mvtec")).notes == ()


def test_the_documentation_has_every_layout():
    text = (Path(__file__).parents[3] / "docs/layouts.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == ["folder", "mvtec", *NEEDED]
    assert set(get_args(Layout)) == {"folder", "mvtec", *NEEDED}
