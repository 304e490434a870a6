"""A folder in either layout is listed and its masks are found; what does not fit is told."""

import shutil

import pytest
from drawn_folders import CONFIG, HEIGHT, WIDTH, paths_of, problem, run, write_image, write_mask

from pipelines.data.index import IndexedImage
from pipelines.preparation.prepare import prepare


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


def test_no_folder_of_masks_means_image_labels_only(mvtec):
    shutil.rmtree(mvtec / "ground_truth")
    index = run(mvtec)
    assert not index.has_masks
    assert all(image.mask is None and image.mask_row is None for image in index.images)
    assert not list((mvtec.parent / "prepared/nut").glob("masks*"))


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


def test_a_name_that_is_not_unicode(mvtec):
    try:
        (mvtec / "train/good/gr\udcfcn.png").touch()
    except (OSError, UnicodeEncodeError):
        pytest.skip("this file system takes UTF-8 names only")
    assert r"'train/good/gr\udcfcn.png' is not UTF-8; rename it" in problem(mvtec)
