"""Masks among pictures are refused, however they are called; pictures that only look or sound like masks are not."""

import shutil

import numpy as np
import pytest
from drawn_folders import HEIGHT, WIDTH, problem, run, write_image
from PIL import Image

from pipelines.preparation.lookalikes import masks_beside


@pytest.fixture
def unmasked(plain):
    """The plain folder, without its masks."""
    shutil.rmtree(plain / "masks")
    return plain


def write_noisy_mask(path, values=(0, 255), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.full((HEIGHT, WIDTH), values[0], dtype=np.uint8)
    mask[4:12, 4:15] = values[-1]
    mask[4:8, 4:8] = values[len(values) // 2]
    Image.fromarray(mask).save(path, **options)


NAMES = [
    "000_label.bmp",
    "000_mask.png",
    "000_gt.tif",
    "000-GT.png",
    "mask_000.png",
    "000Mask.png",
    "000_ground_truth.png",
]


@pytest.mark.parametrize("name", NAMES)
def test_files_called_like_masks(unmasked, name):
    write_noisy_mask(unmasked / "abnormal" / name, values=(0, 1, 2, 3))  # not of two values: the name tells
    message = problem(unmasked)
    assert (
        f"1 file called like masks, beside their images: abnormal/{name}; move them into masks (<stem>_mask" in message
    )


@pytest.mark.parametrize("place", ["normal", "abnormal", "abnormal/dent"])
def test_black_labels_of_good_parts_are_no_good_parts(unmasked, place):
    Image.new("L", (WIDTH, HEIGHT)).save(unmasked / place / "000_label.bmp")
    assert f"beside their images: {place}/000_label.bmp" in problem(unmasked)


@pytest.mark.parametrize("values", [(0, 255), (0, 1), (255, 0), (40, 200)])
@pytest.mark.parametrize("name", ["000.bmp", "m17.png", "dent/x.tif"])
def test_files_of_two_values(unmasked, name, values):
    write_noisy_mask(unmasked / "abnormal" / name, values)
    message = problem(unmasked)
    assert f"1 picture of black and white only, as masks are: abnormal/{name}; move masks into masks" in message


def test_a_mask_saved_with_loss_beside_its_image(unmasked):
    write_noisy_mask(unmasked / "abnormal/000.jpg", quality=75)
    assert "1 picture of black and white only, as masks are: abnormal/000.jpg" in problem(unmasked)


def test_masks_in_the_mvtec_layout(mvtec):
    write_noisy_mask(mvtec / "test/bent/000_label.png")
    assert "move them into ground_truth (<stem>_mask.png), or remove them" in problem(mvtec)
    (mvtec / "test/bent/000_label.png").rename(mvtec / "test/bent/m.png")
    assert "move masks into ground_truth (<stem>_mask.png), or remove them" in problem(mvtec)


def test_silhouettes_are_pictures_where_all_are(unmasked):
    for path in [*unmasked.glob("normal/*.png"), *unmasked.glob("abnormal/*.png")]:
        picture = np.random.default_rng(int(path.stem) + 50 * (path.parent.name == "normal")).random((HEIGHT, WIDTH))
        Image.fromarray(picture > 0.5).save(path)
    assert run(unmasked).warnings == ()


def test_flat_and_overexposed_pictures_are_no_masks(unmasked):
    Image.new("RGB", (WIDTH, HEIGHT), (200, 0, 0)).save(unmasked / "abnormal/flat.png")
    exposed = np.full((HEIGHT, WIDTH), 255, dtype=np.uint8)
    exposed[3:9, 3:9] = np.arange(36).reshape(6, 6) // 4
    Image.fromarray(exposed).save(unmasked / "abnormal/exposed.png")
    assert run(unmasked).counts["test_anomalous"] == 5


def test_names_that_only_sound_like_masks():
    assert (
        masks_beside(["a/mask_1.png", "a/mask_2.png", "a/gt.png", "a/unmasked_1.png", "b/1.png", "a/2_labelling.png"])
        == []
    )


def test_the_same_stem_in_two_formats_is_fine(unmasked):
    write_image(unmasked / "abnormal/000.jpg", 700)
    assert run(unmasked).counts["test_anomalous"] == 4
