"""Pictures into frames and back, worked by hand."""

from typing import get_args

import numpy as np
import pytest

from anomaly_models.base import Config
from anomaly_models.common.sizes import Size
from pipelines.pictures import frames
from pipelines.pictures.frames import OUTSIDE, WHOLE, Fit, Frame, Shape, greyed, read_back, written
from pipelines.pictures.images import resize_rgb

WIDE, HIGH = Size(50, 100), Size(100, 50)


def shape(fit: Fit, height: int = 64, width: int = 64) -> Shape:
    return Shape(Size(height, width), fit)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def rows(first: int, end: int) -> slice:
    return slice(first, end)


def test_models_and_pictures_know_the_same_ways() -> None:
    assert get_args(Config.model_fields["fit"].annotation) == get_args(Fit)


@pytest.mark.parametrize(
    ("fit", "original", "seen", "shown"),
    [
        ("stretch", WIDE, WHOLE, WHOLE),
        ("pad", WIDE, WHOLE, (slice(16, 48), slice(0, 64))),
        ("pad", HIGH, WHOLE, (slice(0, 64), slice(16, 48))),
        ("pad", Size(7, 7), WHOLE, (slice(0, 64), slice(0, 64))),
        ("pad", Size(1, 1000), WHOLE, (slice(31, 32), slice(0, 64))),  # a line has a pixel
        ("crop", WIDE, (slice(0, 50), slice(25, 75)), WHOLE),
        ("crop", HIGH, (slice(25, 75), slice(0, 50)), WHOLE),
        ("crop", Size(7, 7), (slice(0, 7), slice(0, 7)), WHOLE),
        ("native", Size(30, 64), WHOLE, (slice(17, 47), slice(0, 64))),
        ("native", Size(7, 1), WHOLE, (slice(28, 35), slice(31, 32))),
    ],
)
def test_where_a_picture_goes(fit: Fit, original: Size, seen: frames.Window, shown: frames.Window) -> None:
    assert shape(fit).place(original) == (seen, shown)


def test_proportions_are_those_of_the_frame() -> None:
    assert shape("crop", 32, 128).place(Size(1000, 1000)).seen == (slice(375, 625), slice(0, 1000))
    assert shape("pad", 32, 128).place(Size(1000, 1000)).shown == (slice(0, 32), slice(48, 80))


def test_a_padded_picture_is_whole_between_grey_borders() -> None:
    picture = noise(50, 100)
    framed = Frame(Size.square(64), "bilinear", "pad").fitted(picture)
    np.testing.assert_array_equal(framed[16:48], resize_rgb(picture, Size(32, 64), "bilinear"))
    assert (framed[:16] == OUTSIDE).all()
    assert (framed[48:] == OUTSIDE).all()
    restored = shape("pad").restored(framed, WIDE, 0)
    assert restored.shape == (32, 64, 3)
    np.testing.assert_array_equal(restored, framed[16:48])


def test_a_picture_in_its_own_scale_keeps_its_pixels() -> None:
    picture = noise(50, 60)
    framed = Frame(Size.square(64), "bilinear", "native").fitted(picture)
    np.testing.assert_array_equal(framed[7:57, 2:62], picture)
    assert (framed[:7] == OUTSIDE).all()
    assert (framed[:, 62:] == OUTSIDE).all()
    np.testing.assert_array_equal(shape("native").restored(framed, Size(50, 60), 0), picture)
    counts = shape("native").region(Size(50, 60), None)
    assert counts is not None
    assert counts.sum() == 50 * 60


@pytest.mark.parametrize("fit", get_args(Fit))
@pytest.mark.parametrize(("original", "held"), [((64, 64), True), ((65, 64), False), ((64, 65), False), ((1, 9), True)])
def test_only_what_is_not_resized_may_be_too_large(fit: Fit, original: tuple[int, int], held: bool) -> None:
    assert shape(fit).holds(Size(*original)) == (held or fit != "native")


def test_a_cropped_picture_fills_the_frame_and_comes_back_to_its_place() -> None:
    picture = noise(50, 100)
    framed = Frame(Size.square(64), "lanczos", "crop").fitted(picture)
    np.testing.assert_array_equal(framed, resize_rgb(picture[:, 25:75], Size.square(64), "lanczos"))
    restored = shape("crop").restored(framed, WIDE, OUTSIDE)
    assert restored.shape == (64, 128, 3)
    np.testing.assert_array_equal(restored[:, 32:96], framed)
    assert (restored[:, :32] == OUTSIDE).all()
    assert (restored[:, 96:] == OUTSIDE).all()


def test_a_stretched_picture_is_what_it_was_before_there_were_frames() -> None:
    picture = noise(50, 100)
    framed = Frame(Size(32, 64), "bilinear", "stretch").fitted(picture)
    np.testing.assert_array_equal(framed, resize_rgb(picture, Size(32, 64), "bilinear"))
    assert shape("stretch").restored(framed, WIDE, 0) is not None
    np.testing.assert_array_equal(shape("stretch").restored(framed, WIDE, 0), framed)


@pytest.mark.parametrize("fit", get_args(Fit))
@pytest.mark.parametrize("original", [WIDE, HIGH, Size(64, 64), Size(301, 97), Size(30, 500)])
def test_a_spot_in_the_middle_comes_back_to_the_middle(fit: Fit, original: Size) -> None:
    if not shape(fit, 64, 96).holds(original):
        original = Size(*(min(side, most) for side, most in zip(original, (64, 96), strict=True)))
    mask = np.zeros(original, dtype=bool)
    middle = tuple(slice(side // 2 - max(1, side // 8), side // 2 + max(1, side // 8)) for side in original)
    mask[middle] = True
    restored = shape(fit, 64, 96).restored(shape(fit, 64, 96).fitted_mask(mask), original, 0)
    where = np.argwhere(restored).mean(axis=0) + 0.5
    np.testing.assert_allclose(where, np.divide(restored.shape, 2), atol=1.5)


def test_what_counts_of_a_frame() -> None:
    assert shape("stretch").region(WIDE, None) is None
    assert shape("crop").region(WIDE, None) is None
    padded = shape("pad").region(WIDE, None)
    assert padded is not None
    expected = np.zeros((64, 64), dtype=bool)
    expected[16:48] = True
    np.testing.assert_array_equal(padded, expected)
    left = np.zeros(WIDE, dtype=bool)
    left[:, :50] = True
    expected[:, 32:] = False
    np.testing.assert_array_equal(shape("pad").region(WIDE, left), expected)
    stretched = shape("stretch").region(WIDE, left)
    assert stretched is not None
    assert stretched[:, :32].all()
    assert not stretched[:, 32:].any()


def test_nothing_outside_of_the_region_of_interest_is_left() -> None:
    picture, inside = noise(50, 100), np.zeros((50, 100), dtype=bool)
    inside[10:20, 30:40] = True
    assert greyed(picture, None) is picture
    shown = greyed(picture, inside)
    np.testing.assert_array_equal(shown[inside], picture[inside])
    assert (shown[~inside] == OUTSIDE).all()
    np.testing.assert_array_equal(read_back(written(inside)), inside)
