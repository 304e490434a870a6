"""Sound folders become arrays and an index; files that are broken are told, all of them at once."""

import hashlib
import json
import os
import resource
import shutil
from dataclasses import asdict

import numpy as np
import pytest
from drawn_folders import CONFIG, FRAMES, HEIGHT, WIDTH, made, problem, run, write_mask
from PIL import Image
from pydantic import ValidationError
from shared_data import shared_folder

from anomaly_models.common.sizes import Size
from pipelines.data.index import PreparedIndex, SeenBy, frames_in
from pipelines.errors import DatasetError, ImageError, StageError
from pipelines.files import DiskFull, read_json
from pipelines.pictures import images
from pipelines.pictures.frames import Frame
from pipelines.preparation.config import PrepareConfig

INSPECTION = shared_folder("inspection")


# Sound folders


@pytest.mark.parametrize(("size", "resize"), [(16, "bilinear"), (8, "bilinear"), (8, "lanczos")])
def test_arrays_hold_what_images_reads(mvtec, size, resize):
    index = run(mvtec)
    pixels = np.load(mvtec.parent / f"prepared/nut/images_{size}_{resize}.npy")
    masks = np.load(mvtec.parent / f"prepared/nut/masks_{size}.npy")
    assert pixels.shape == (15, size, size, 3)
    assert pixels.dtype == np.uint8
    assert masks.shape == (3, size, size)
    assert masks.dtype == bool
    for row, image in enumerate(index.images):
        expected = Frame(Size.square(size), resize, "stretch").fitted(
            images.load_rgb(mvtec / image.path, CONFIG.reading)
        )
        np.testing.assert_array_equal(pixels[row], expected)
        if image.masks:
            expected = images.resize_mask(images.load_mask(mvtec / image.masks[0].path), Size.square(size))
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
    assert (np.load(mvtec.parent / "prepared/nut/images_8_bilinear.npy")[13] == 255).all()


def test_a_window_reaches_the_images_and_the_index(mvtec):
    deep = np.full((HEIGHT, WIDTH), 3000, dtype=np.uint16)
    deep[:, : WIDTH // 2] = 1000
    deep[:, WIDTH // 2] = 1700
    Image.fromarray(deep).save(mvtec / "test/good/000.png")
    window = {"black_level": 1000, "white_level": 2500, "above_white": "clip"}
    index = run(mvtec, CONFIG.model_copy(update=window))
    shown = np.load(mvtec.parent / "prepared/nut/images_8_bilinear.npy")[13]
    assert (shown[:, 0].max(), shown[:, -1].min()) == (0, 255)
    assert (index.black_level, index.white_level, index.above_white) == (1000, 2500, "clip")


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


def test_the_same_files_give_the_same_bytes(mvtec, tmp_path):
    run(mvtec, destination=tmp_path / "a/nut")
    shutil.copytree(mvtec, tmp_path / "elsewhere/nut")
    run(tmp_path / "elsewhere/nut", destination=tmp_path / "b/nut")
    for path in (tmp_path / "a/nut").glob("*.*"):
        assert path.read_bytes() == (tmp_path / "b/nut" / path.name).read_bytes(), path.name


def test_another_models_size_changes_nothing_that_a_model_depends_on(mvtec, tmp_path):
    def files(folder, frames):
        made(mvtec, destination=folder / "nut", frames=frames)
        found = [path for path in (folder / "nut").rglob("*") if path.is_file()]
        return {path.relative_to(folder / "nut").as_posix(): path.read_bytes() for path in found}

    before, after = (
        files(tmp_path / "a", FRAMES),
        files(tmp_path / "b", FRAMES | {"bgad": Frame(Size.square(12), "lanczos", "stretch")}),
    )
    assert before.keys() - after.keys() == {"images_16_bilinear.npy", "masks_16.npy"}
    assert {name for name in before.keys() & after.keys() if before[name] != after[name]} == {"seen_by/bgad.json"}


def test_what_a_model_sees_of_the_arrays(mvtec):
    prepared = made(mvtec)
    folder = mvtec.parent / "prepared/nut"
    sha256 = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.npy")}
    assert prepared.seen["adfa"] == SeenBy(
        Frame(Size.square(8), "lanczos", "stretch"), sha256["images_8_lanczos.npy"], sha256["masks_8.npy"], None
    )
    assert read_json(folder / "seen_by/adfa.json") == asdict(prepared.seen["adfa"]) | {
        "frame": [[8, 8], "lanczos", "stretch"]
    }
    assert list(map(str, frames_in(folder))) == ["8 (bilinear)", "8 (lanczos)", "16 (bilinear)"]
    assert {path.stem for path in (folder / "seen_by").iterdir()} == FRAMES.keys()


def test_a_record_that_is_damaged(mvtec):
    made(mvtec)
    path = mvtec.parent / "prepared/nut/seen_by/fapm.json"
    path.write_text('{"frame": [8]}')
    with pytest.raises(StageError, match=r"seen_by/fapm.json: damaged.*run `blemish prepare nut`"):
        frames_in(path.parents[1])


def test_a_category_may_fill_the_image(plain):
    assert not run(plain).surface
    assert run(plain, CONFIG.model_copy(update={"surfaces": ["other", "part"]})).surface


def test_a_region_lost_by_resizing_is_a_warning(mvtec):
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[5:15, 5:15] = True
    mask[2, 29] = True
    Image.fromarray(mask).save(mvtec / "ground_truth/bent/000.png")
    warning = "1 mask with fewer regions at {} pixels: ground_truth/bent/000.png (2 regions became 1)"
    assert made(mvtec).warnings == [warning.format(8), warning.format(16)]


def test_a_mask_never_comes_out_empty(mvtec):
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[0, 0] = mask[19, 29] = True
    assert not images.resize_mask(mask, Size.square(8)).any()
    Image.fromarray(mask).save(mvtec / "ground_truth/bent/000.png")
    warnings = made(mvtec).warnings
    assert warnings[0].endswith("8 pixels: ground_truth/bent/000.png (vanished, kept at the centroid)")
    rows, columns = np.load(mvtec.parent / "prepared/nut/masks_8.npy")[0].nonzero()
    assert (rows.tolist(), columns.tolist()) == ([0, 7], [0, 7])


def test_masks_that_mark_most_of_the_picture_are_a_warning(mvtec):
    for number in range(2):
        write_mask(mvtec / f"ground_truth/crack/{number:03}_mask.png", box=(0, 3, WIDTH, HEIGHT))
    assert run(mvtec).warnings == (
        "2 masks marking most of the picture: ground_truth/crack/000_mask.png (85%), ground_truth/crack/001_mask.png "
        "(85%); all that is not black counts as defect: if it is the good part that they mark, invert them (black for "
        "good)",
    )


def deep(root, highest, pattern="train/good/*.png"):
    """Make 16-bit grey pictures of the training ones, up to `highest`."""
    for seed, path in enumerate(sorted(root.glob(pattern))):
        values = np.random.default_rng(seed).integers(0, highest, (HEIGHT, WIDTH), dtype=np.uint16)
        values[0, 0] = highest
        Image.fromarray(values).save(path)


@pytest.mark.parametrize(("highest", "level"), [(4095, 4095), (3001, 4095), (255, 255), (16383, 16383)])
def test_few_bits_in_files_of_16_are_a_warning_with_the_value_to_set(mvtec, highest, level):
    deep(mvtec, highest)
    assert run(mvtec).warnings == (
        f"the brightest value in 10 pictures of 16 bits is {highest} of white_level 65535, so that few shades are "
        f"left: set prepare.white_level: {level}",
    )
    assert run(mvtec, CONFIG.model_copy(update={"white_level": level})).warnings == ()


def test_pictures_that_are_all_black_for_their_range_are_refused_with_the_value_to_set(mvtec):
    deep(mvtec, 90)
    assert "holds 1 image of different content" in (message := problem(mvtec))
    assert message.endswith("few shades are left: set prepare.white_level: 255")


def test_few_bits_above_the_black_level_are_a_warning(mvtec):
    deep(mvtec, 4095)
    (warning,) = run(mvtec, CONFIG.model_copy(update={"black_level": 1000})).warnings
    assert warning.endswith("set prepare.white_level: 4095")
    assert run(mvtec, CONFIG.model_copy(update={"black_level": 1000, "white_level": 7190})).warnings == ()


def test_pictures_that_are_all_at_the_black_level_are_refused(mvtec):
    deep(mvtec, 1000)
    message = problem(mvtec, CONFIG.model_copy(update={"black_level": 1000}))
    assert (
        f"{mvtec}: the brightest value in 10 pictures of 16 bits is 1000, not above prepare.black_level 1000: all "
        "are black; lower it"
    ) in message


def test_a_range_that_is_used_is_no_warning(mvtec):
    deep(mvtec, 40000)
    assert run(mvtec).warnings == ()
    deep(mvtec, 1000)
    deep(mvtec, 60000, "test/good/000.png")  # one picture is enough: a dark part may be dark
    assert run(mvtec).warnings == ()


# Broken folders


def test_a_mask_of_another_size(mvtec):
    write_mask(mvtec / "ground_truth/crack/001_mask.png", width=HEIGHT, height=WIDTH)
    assert problem(mvtec) == (
        f"category 'nut': {mvtec}/ground_truth/crack/001_mask.png: the mask is 20 x 30 pixels, its image "
        "test/crack/001.jpg 30 x 20; export it at the size of the image"
    )


def test_a_black_mask(mvtec):
    write_mask(mvtec / "ground_truth/crack/001_mask.png", box=(0, 0, 0, 0))
    assert "001_mask.png: the mask is all black" in problem(mvtec)


@pytest.mark.parametrize("name", ["train/good/003.png", "test/crack/001.jpg", "ground_truth/crack/001_mask.png"])
def test_truncated_empty_and_text_files(mvtec, name):
    path = mvtec / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert f"category 'nut': {path}: " in problem(mvtec, kind=ImageError)
    path.write_bytes(b"")
    assert f"{path}: the file is empty" in problem(mvtec, kind=ImageError)
    path.write_text("text under an image's name")
    assert f"{path}: not a PNG" in problem(mvtec, kind=ImageError)


def test_a_link_to_nowhere(mvtec):
    (mvtec / "train/good/010.png").symlink_to(mvtec / "gone.png")
    assert "010.png: cannot be read" in problem(mvtec, kind=ImageError)


def test_a_pipe_is_refused_and_not_waited_for(mvtec):
    os.mkfifo(mvtec / "train/good/010.png")
    assert "010.png: a folder, pipe or device, not a file; remove it" in problem(mvtec, kind=ImageError)


def test_a_half_written_jpeg(mvtec):
    path = mvtec / "test/crack/001.jpg"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    assert "001.jpg: damaged image (" in problem(mvtec, kind=ImageError)


def test_a_value_above_the_white_level(mvtec):
    Image.fromarray(np.full((4, 4), 5000, dtype=np.uint16)).save(mvtec / "train/good/000.png")
    message = problem(mvtec, CONFIG.model_copy(update={"white_level": 4095}), kind=ImageError)
    assert "holds the value 5000, above `prepare.white_level` 4095" in message


def test_a_picture_and_its_mask_above_the_limit(mvtec):
    """Also a black mask of a good part: it is no orphan, whatever its size, where the limit lets it be read."""
    config = CONFIG.model_copy(update={"max_megapixels": 1})
    Image.new("L", (1200, 1000)).save(mvtec / "test/crack/001.jpg")
    Image.new("L", (1200, 1000), 255).save(mvtec / "ground_truth/crack/001_mask.png")
    (mvtec / "ground_truth/good").mkdir()
    Image.new("L", (1200, 1000)).save(mvtec / "ground_truth/good/000_mask.png")
    message = problem(mvtec, config, kind=DatasetError)
    assert message.count("1,200 x 1,000 pixels are 1.2 megapixels, above `prepare.max_megapixels` 1; set it to 2,") == 2
    run(mvtec, config.model_copy(update={"max_megapixels": 2}))


def turned_picture_and_mask(folder, size, orientation, mask_orientation):
    rng = np.random.default_rng(9)
    for name, turn, picture in (
        ("test/crack/001.jpg", orientation, Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))),
        ("ground_truth/crack/001_mask.png", mask_orientation, None),
    ):
        exif = Image.Exif()
        exif[0x0112] = turn
        shape = size if turn < 5 and orientation < 5 else size[::-1]
        mask = np.zeros(shape, np.uint8)
        mask[: shape[0] // 2] = 255
        (picture or Image.fromarray(mask)).save(folder / name, exif=exif)


@pytest.mark.parametrize(
    ("size", "orientation", "mask_orientation", "is_told"),
    [
        ((16, 16), 6, 1, True),
        ((16, 16), 6, 6, False),
        ((16, 16), 1, 1, False),
        ((12, 16), 3, 1, True),
        ((12, 16), 6, 1, False),  # the mask's shape says that it is upright
    ],
)
def test_pictures_turned_by_exif_whose_masks_are_not(mvtec, size, orientation, mask_orientation, is_told):
    turned_picture_and_mask(mvtec, size, orientation, mask_orientation)
    told = [warning for warning in run(mvtec).warnings if "EXIF" in warning]
    assert told == is_told * [
        "1 picture turned by EXIF, without a mask that is: test/crack/001.jpg; if the masks were drawn on the pictures "
        "as they are stored, turn them too"
    ]


def test_links_to_nothing_that_dvc_would_end_at(mvtec):
    (mvtec / ".#notes.txt").symlink_to("user@host.1234")
    (mvtec / "train" / "good" / "share").symlink_to("/mnt/not-there")
    (mvtec / "train" / "notes").symlink_to(mvtec / "test")
    message = problem(mvtec, kind=DatasetError)
    assert "2 links to nothing: .#notes.txt, train/good/share; remove what DVC cannot follow" in message


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
            made(mvtec, frames={"fapm": Frame(Size.square(256), "bilinear", "stretch")})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((mvtec.parent / "prepared").iterdir()) == []


# Settings and the index


@pytest.mark.parametrize(
    "wrong",
    [
        {"white_level": 0}, {"black_level": -1}, {"black_level": 65535}, {"above_white": "keep"},
        {"page": -1}, {"page": "all"}, {"dicom_window": "soft"}, {"dicom_window": {"centre": 40}},
        {"dicom_window": {"centre": 40, "width": 0.5}}, {"dicom_window": {"centre": float("nan"), "width": 400}},
        {"white_level": 70000}, {"holdout": 0.0}, {"holdout": 1.0}, {"test_normal": 1.5}, {"seed": -1}, {"seed": "0"},
        {"max_megapixels": 0}, {"max_megapixels": 90.5}, {"extra": 1}, {"layout": "mvtech"},
    ],
)  # fmt: skip
def test_settings_out_of_range(wrong):
    with pytest.raises(ValidationError):
        PrepareConfig(**CONFIG.model_dump() | wrong)


@pytest.mark.parametrize("black", [4095, 5000])
def test_black_is_below_white(black):
    levels = {"black_level": black, "white_level": 4095}
    with pytest.raises(ValidationError, match=f"black_level {black} is not below white_level 4095"):
        PrepareConfig(**CONFIG.model_dump() | levels)


def test_settings_have_no_defaults():
    with pytest.raises(ValidationError) as caught:
        PrepareConfig()
    assert len(caught.value.errors()) == 14


def test_index_of_a_category_that_is_not_prepared(tmp_path):
    with pytest.raises(StageError, match=r"data/prepared/nut: no prepared images; run `blemish prepare nut`"):
        PreparedIndex.load(tmp_path / "data/prepared/nut")


def test_index_of_another_version(mvtec):
    run(mvtec)
    path = mvtec.parent / "prepared/nut/index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(StageError, match="prepared in format 99, this version reads 7; run `blemish prepare nut`"):
        PreparedIndex.load(path.parent)


# Real images


@pytest.mark.skipif(INSPECTION is None, reason="the folder of shared real data is not here")
@pytest.mark.parametrize(
    ("category", "training", "test_normal", "test_anomalous"), [("hazelnut_toy", 28, 6, 17), ("cookie", 31, 14, 32)]
)
def test_real_categories(tmp_path, category, training, test_normal, test_anomalous):
    index = made(
        INSPECTION / category, CONFIG, tmp_path / category, {"fapm": Frame(Size.square(64), "bilinear", "stretch")}
    ).index
    assert index.counts["train"] + index.counts["holdout"] == training
    assert index.counts["holdout"] == 6
    assert (index.counts["test_normal"], index.counts["test_anomalous"]) == (test_normal, test_anomalous)
    masks = np.load(tmp_path / category / "masks_64.npy")
    assert masks.any(axis=(1, 2)).all()
    for image in index.images:
        with Image.open(INSPECTION / category / image.path) as opened:
            assert opened.size == (image.width, image.height)
