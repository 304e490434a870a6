"""A folder in either layout is listed and its masks are found; what does not fit is told."""

import hashlib
import shutil
import unicodedata

import pytest
from drawn_folders import CONFIG, FRAMES, HEIGHT, WIDTH, masks_of, paths_of, problem, run, write_image, write_mask

from pipelines.preparation.prepare import prepare


def test_mvtec_layout(mvtec):
    progress = []
    folder = mvtec.parent / "prepared/nut"
    index = prepare(mvtec, "nut", CONFIG, FRAMES, folder, lambda done, total: progress.append((done, total))).index
    assert index.layout == "mvtec"
    assert index.category == "nut"
    assert index.has_masks
    assert index.warnings == ()
    assert index.counts == {"train": 8, "holdout": 2, "anomalous_train": 0, "test_normal": 2, "test_anomalous": 3}
    assert progress == [(done, 15) for done in range(1, 16)]
    assert {path.name for path in folder.iterdir()} == {
        "index.json", "images_16_bilinear.npy", "images_8_bilinear.npy", "images_8_lanczos.npy", "masks_16.npy",
        "masks_8.npy", "seen_by",
    }  # fmt: skip
    assert sorted(paths_of(index, "train") + paths_of(index, "holdout")) == [
        f"train/good/{n:03}.png" for n in range(10)
    ]
    found = [
        (i.path, i.split, i.label, i.defect, i.width, i.height, masks_of(i), i.mask_row) for i in index.images[10:]
    ]
    assert found == [
        ("test/bent/000.png", "test", True, "bent", WIDTH, HEIGHT, ["ground_truth/bent/000.png"], 0),
        ("test/crack/000.jpg", "test", True, "crack", WIDTH, HEIGHT, ["ground_truth/crack/000_mask.png"], 1),
        ("test/crack/001.jpg", "test", True, "crack", WIDTH, HEIGHT, ["ground_truth/crack/001_mask.png"], 2),
        ("test/good/000.png", "test", False, "good", WIDTH, HEIGHT, [], None),
        ("test/good/001.png", "test", False, "good", WIDTH, HEIGHT, [], None),
    ]
    digests = [hashlib.sha256((mvtec / image.path).read_bytes()).hexdigest() for image in index.images]
    assert [image.sha256 for image in index.images] == digests
    masked = {mask.path: mask.sha256 for image in index.images for mask in image.masks}
    assert masked == {path: hashlib.sha256((mvtec / path).read_bytes()).hexdigest() for path in masked}
    assert all(mask.saturation is None for image in index.images for mask in image.masks)


def test_plain_layout(plain):
    index = run(plain)
    assert index.layout == "folder"
    assert index.has_masks
    assert index.counts == {"train": 6, "holdout": 2, "anomalous_train": 0, "test_normal": 2, "test_anomalous": 3}
    defects = {image.path: (image.defect, masks_of(image)) for image in index.images if image.label}
    assert defects == {
        "abnormal/000.png": ("abnormal", ["masks/000.png"]),
        "abnormal/001.png": ("abnormal", ["masks/001.png"]),
        "abnormal/dent/000.bmp": ("dent", ["masks/dent/000_mask.png"]),
    }
    normals = [image.path for image in index.images if not image.label]
    assert sorted(normals) == [f"normal/{n:03}.png" for n in range(10)]


def test_no_folder_of_masks_means_image_labels_only(mvtec):
    shutil.rmtree(mvtec / "ground_truth")
    index = run(mvtec)
    assert not index.has_masks
    assert all(image.masks == () and image.mask_row is None for image in index.images)
    assert not list((mvtec.parent / "prepared/nut").glob("masks*"))


def test_unused_files_and_folders_are_told(mvtec):
    (mvtec / "train/good/notes.pdf").touch()
    write_image(mvtec / "train/bad/000.png", 7)
    write_image(mvtec / "validation/good/000.png", 8)
    (mvtec / ".cache").mkdir()
    assert run(mvtec).warnings == (
        "folders that are not used: validation",
        "folders that are not used: train/bad",
        "1 file ignored, of no image type: train/good/notes.pdf (read are .bmp .dcm .dicom .jpeg .jpg .png .tif .tiff "
        ".webp: rename what is one of them, save what is not)",
    )


def test_missing_folder(tmp_path):
    assert problem(tmp_path / "nowhere") == (
        f"{tmp_path / 'nowhere'}: no such folder; put the images there or correct the path in params.yaml"
    )


def test_neither_layout(tmp_path):
    root = tmp_path / "nut"
    root.mkdir()
    expected = "expected train/good and test/ (as in MVTec AD), or normal/, or another layout of docs/layouts.md"
    assert problem(root) == f"{root}: is empty; {expected}"
    write_image(root / "b.png", 0)
    assert problem(root) == (
        f"{root}: 1 picture in the folder itself, which does not say what is good: move good parts into normal/, and "
        "defective ones, if there are any, into abnormal/"
    )
    write_image(root / "images/a.png", 0)
    assert problem(root) == f"{root}: holds b.png, images/; {expected}"


def test_both_layouts(mvtec):
    write_image(mvtec / "normal/000.png", 0)
    assert "holds both train/good and normal" in problem(mvtec)


@pytest.mark.parametrize(("good", "bad"), [("OK", "NG"), ("gut", "Ausschuss"), ("Good parts", "abnormal")])
def test_a_plain_folder_may_be_called_as_people_call_it(plain, good, bad):
    before = run(plain)
    (plain / "normal").rename(plain / good)
    (plain / "abnormal").rename(plain / bad)
    index = run(plain)
    assert index.layout == "folder"
    assert index.counts == before.counts
    assert masks_of(next(image for image in index.images if image.path == f"{bad}/dent/000.bmp"))
    told = f"{good}, {bad}" if bad != "abnormal" else good
    assert f"{told}: taken for good or defective parts by their names" in index.warnings
    write_image(plain / "fail/000.png", 0)
    if bad == "abnormal":
        assert "folders that are not used: fail" in run(plain).warnings
    else:
        shutil.rmtree(plain.parent / "prepared")
        assert f"holds {bad} and fail; keep one of them, or call one abnormal" in problem(plain)


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


def test_ambiguous_stems(mvtec):
    write_image(mvtec / "test/crack/000.png", 400)
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


def test_misplaced_images(mvtec):
    write_image(mvtec / "test/000.png", 0)
    assert "images directly in test (test/000.png); move each into test/<defect>" in problem(mvtec)


def test_a_folder_per_camera(mvtec, plain):
    for camera in ("left", "right"):
        for number, place in enumerate(["train/good", "test/good", "test/crack"]):
            write_image(mvtec / place / camera / "new/000.png", 500 + 10 * number + (camera == "left"))
        write_mask(mvtec / f"ground_truth/crack/{camera}/new/000_mask.png")
        write_image(plain / f"normal/{camera}/000.png", 500 + (camera == "left"))
    index = run(mvtec)
    assert index.counts == {"train": 10, "holdout": 2, "anomalous_train": 0, "test_normal": 4, "test_anomalous": 5}
    assert index.warnings == ()
    masks = {
        image.path: (image.defect, masks_of(image)) for image in index.images if "/left/" in image.path and image.label
    }
    assert masks == {"test/crack/left/new/000.png": ("crack", ["ground_truth/crack/left/new/000_mask.png"])}
    assert {f"normal/{camera}/000.png" for camera in ("left", "right")} < {image.path for image in run(plain).images}


def test_a_folder_that_contradicts_the_one_it_is_in(mvtec, plain):
    for place in ("train/good/NG", "test/crack/ok", "test/crack/masks"):
        write_image(mvtec / place / "000.png", 0)
    write_image(plain / "normal/defects/000.png", 0)
    message = problem(mvtec)
    for place in ("train/good/NG", "test/crack/ok", "test/crack/masks"):
        assert f"{mvtec}: {place} contradicts the folder that it is in; move its images where they belong" in message
    assert "normal/defects contradicts" in problem(plain)


def test_a_link_that_goes_round(mvtec):
    (mvtec / "train/good/again").symlink_to(mvtec / "train/good")
    assert "train/good/again is a link to a folder that it is in; remove it" in problem(mvtec)


GOOD_NAMES = [
    "Good",
    "OK",
    "ok_parts",
    "normal",
    "i.O.",
    "IO",
    "gut",
    "Pass",
    "passed",
    "non_defective",
    "NonDefective",
]


@pytest.mark.parametrize("name", [*GOOD_NAMES, "Defect-free", "good2", "GOOD IMAGES"])
def test_good_parts_by_another_name(mvtec, plain, name):
    (mvtec / "test/good").rename(mvtec / "test" / name)
    index = run(mvtec)
    assert index.counts["test_normal"] == 2
    assert {image.defect for image in index.images if image.path.startswith(f"test/{name}/")} == {"good"}
    told = () if name == "Good" else (f"counted as good parts, by their names: test/{name}",)
    assert index.warnings == told
    write_image(plain / "abnormal" / name / "000.png", 0)
    write_mask(plain / "masks" / name / "000.png")
    assert f"abnormal/{name} is a defect type called {name!r}; move its images into normal" in problem(plain)


@pytest.mark.parametrize("name", ["not_good", "NOK", "ng", "n.i.O.", "no good", "okra", "abnormal", "label"])
def test_defects_whose_names_are_near(mvtec, name):
    (mvtec / "test/bent").rename(mvtec / "test" / name)
    (mvtec / "ground_truth/bent").rename(mvtec / "ground_truth" / name)
    index = run(mvtec)
    assert index.counts["test_anomalous"] == 3
    assert name in {image.defect for image in index.images}


def test_good_parts_in_two_folders(mvtec, plain):
    write_image(mvtec / "test/normal/000.png", 500)
    write_image(mvtec / "train/OK/000.png", 501)
    index = run(mvtec)
    assert index.counts["test_normal"] == 3
    assert index.counts["train"] + index.counts["holdout"] == 11
    assert index.warnings == ("counted as good parts, by their names: train/OK, test/normal",)
    write_image(plain / "Good/000.png", 500)
    assert "Good beside normal, by its name of good parts too; move its images there" in problem(plain)


def test_layouts_with_capitals(mvtec, plain):
    for root, names in ((mvtec, ["train", "test", "ground_truth"]), (plain, ["normal", "abnormal", "masks"])):
        expected = run(root)
        for name in names:
            (root / name).rename(root / name.upper())
        index = run(root)
        assert index.warnings == ()
        assert index.has_masks
        assert index.counts == expected.counts
    shutil.rmtree(plain.parent / "prepared")
    write_image(plain / "normal/000.png", 0)
    assert "holds NORMAL and normal; keep one of them" in problem(plain)


def test_what_systems_leave_behind_is_no_picture(mvtec):
    expected = run(mvtec)
    for place in ("train/good", "test/crack", "ground_truth/crack"):
        for litter in ("._000.png", "__MACOSX/._000.png", "@eaDir/000.png/SYNOPHOTO_THUMB.jpg", "Thumbs.db"):
            (mvtec / place / litter).parent.mkdir(parents=True, exist_ok=True)
            (mvtec / place / litter).write_bytes(b"\0\5\x16\7")
    (mvtec / "__MACOSX").mkdir()
    assert run(mvtec) == expected


def test_why_there_is_no_image_is_told_with_the_refusal(plain):
    for path in (plain / "normal").iterdir():
        path.rename(path.with_suffix(".jfif"))
    lines = problem(plain).splitlines()
    assert len(lines) == 2
    assert "normal holds no image" in lines[0]
    assert lines[1].startswith("warning: 10 files ignored, of no image type: normal/000.jfif, ")
    assert "(read are .bmp .dcm .dicom .jpeg" in lines[1]


@pytest.mark.parametrize(("images", "masks"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_that_look_the_same_are_the_same(mvtec, images, masks):
    folder = unicodedata.normalize(images, "Prüfung")
    (mvtec / "test/bent").rename(mvtec / "test" / folder)
    (mvtec / "ground_truth/bent").rename(mvtec / "ground_truth" / unicodedata.normalize(masks, "Prüfung"))
    picture, mask = unicodedata.normalize(images, "größe"), unicodedata.normalize(masks, "größe")
    (mvtec / "test" / folder / "000.png").rename(mvtec / "test" / folder / f"{picture}.png")
    place = mvtec / "ground_truth" / unicodedata.normalize(masks, "Prüfung")
    (place / "000.png").rename(place / f"{mask}_mask.png")
    assert run(mvtec).counts["test_anomalous"] == 3


def test_black_masks_of_good_parts_are_no_error(mvtec, plain):
    for number in range(2):
        write_mask(mvtec / f"ground_truth/good/{number:03}_mask.png", box=(0, 0, 0, 0))
        write_mask(plain / f"masks/normal/{number:03}_mask.png", box=(0, 0, 0, 0))
    assert run(mvtec).warnings == ()
    assert run(plain).warnings == ()


def test_a_name_that_is_not_unicode(mvtec):
    try:
        (mvtec / "train/good/gr\udcfcn.png").touch()
    except (OSError, UnicodeEncodeError):
        pytest.skip("this file system takes UTF-8 names only")
    assert r"'train/good/gr\udcfcn.png' is not UTF-8; rename it" in problem(mvtec)
