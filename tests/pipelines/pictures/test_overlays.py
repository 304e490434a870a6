import numpy as np
import pytest

from pipelines.errors import ExportError
from pipelines.pictures import overlays

CYAN = [0, 255, 255]


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_the_scale_is_tied_to_the_threshold() -> None:
    ratio = np.array([[-1.0, 0.0, 0.9, 0.95, 1.0, 1.5, 2.0, 5.0]], dtype=np.float32)
    for threshold in (1e-3, 1.0, 40.0):
        anomaly_map = ratio * np.float32(threshold)
        relative = overlays.relative_to_threshold(anomaly_map, threshold)
        assert relative.dtype == np.float32
        np.testing.assert_allclose(relative, ratio, rtol=1e-6)
        covered = overlays.opacity(anomaly_map, threshold)
        np.testing.assert_allclose(covered, [[0, 0, 0, 0.25, 0.5, 0.625, 0.75, 0.75]], atol=1e-5)
        # at 0.35 of the way at the threshold, in even steps on either side of it
        places = np.array([[0, 0, 0.315, 0.3325, 0.35, 0.675, 1, 1]], dtype=np.float32)
        difference = overlays.coloured_map(anomaly_map, threshold).astype(int) - overlays.colour(places)
        assert abs(difference).max() <= 1  # rounding


def test_good_parts_stay_dark_and_defects_are_brighter_than_anything_below_the_threshold() -> None:
    levels = overlays.coloured_map(np.linspace(0, 2, 41, dtype=np.float32)[None], 1.0)[0]
    luma = levels @ np.array([0.2126, 0.7152, 0.0722])
    assert luma[:21].max() < 70  # of 255: up to the threshold
    assert (np.diff(luma) > 0).all()


@pytest.mark.parametrize("threshold", [0.0, -1.0, float("nan")])
def test_without_a_positive_threshold_there_is_no_scale(threshold: float) -> None:
    with pytest.raises(ExportError, match=rf"^pixel threshold {threshold:g} is not positive: .*; train again$"):
        overlays.relative_to_threshold(np.ones((2, 2), dtype=np.float32), threshold)


def test_colours_run_from_black_to_light_yellow_and_get_brighter() -> None:
    colours = overlays.colour(np.linspace(0, 1, 33, dtype=np.float32)[None])
    assert colours.shape == (1, 33, 3)
    assert colours.dtype == np.uint8
    assert colours[0, 0].tolist() == [0, 0, 4]
    assert colours[0, -1].tolist() == [252, 255, 164]
    luma = colours[0] @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(luma) > 0).all()


@pytest.mark.parametrize("level", [-3.0, 0.0, 0.5, 0.8999])
def test_a_good_part_does_not_glow(level: float) -> None:
    rgb = picture(20, 30)
    before = rgb.copy()
    overlay = overlays.heat_overlay(rgb, np.full((20, 30), level * 8, dtype=np.float32), 8.0)
    np.testing.assert_array_equal(overlay, rgb)
    np.testing.assert_array_equal(rgb, before)


def test_a_defect_is_coloured_and_outlined() -> None:
    rgb = np.full((9, 9, 3), 200, dtype=np.uint8)
    anomaly_map = np.zeros((9, 9), dtype=np.float32)
    anomaly_map[2:7, 2:7] = 20.0
    overlay = overlays.heat_overlay(rgb, anomaly_map, 10.0)
    assert overlay.dtype == np.uint8
    ring = np.zeros((9, 9), dtype=bool)
    ring[2:7, 2:7] = True
    ring[3:6, 3:6] = False
    np.testing.assert_array_equal((overlay == CYAN).all(axis=2), ring)
    assert overlay[4, 4].tolist() == [round(0.25 * 200 + 0.75 * c) for c in (252, 255, 164)]
    assert overlay[0, 0].tolist() == [200, 200, 200]


def test_the_threshold_itself_is_not_above_it() -> None:
    anomaly_map = np.full((4, 4), 10.0, dtype=np.float32)
    anomaly_map[1, 1] = np.nextafter(np.float32(10), np.float32(11))
    overlay = overlays.heat_overlay(np.zeros((4, 4, 3), dtype=np.uint8), anomaly_map, 10.0)
    assert np.argwhere((overlay == CYAN).all(axis=2)).tolist() == [[1, 1]]


def test_the_border_of_the_image_is_no_outside() -> None:
    assert not overlays.outline(np.ones((5, 5), dtype=bool)).any()
    assert not overlays.outline(np.zeros((5, 5), dtype=bool)).any()
    half = np.zeros((4, 5), dtype=bool)
    half[:, :3] = True
    expected = np.zeros((4, 5), dtype=bool)
    expected[:, 2] = True
    np.testing.assert_array_equal(overlays.outline(half), expected)


def test_a_single_pixel_is_its_own_outline() -> None:
    mask = np.zeros((3, 3), dtype=bool)
    mask[1, 1] = True
    np.testing.assert_array_equal(overlays.outline(mask), mask)


def test_maps_go_back_to_the_size_of_the_image() -> None:
    anomaly_map = np.tile(np.arange(8, dtype=np.float32), (8, 1))
    resized = overlays.resize_map(anomaly_map, width=16, height=4)
    assert resized.shape == (4, 16)
    assert resized.dtype == np.float32
    np.testing.assert_allclose(resized[:, 1:-1], np.tile(np.arange(0.25, 7, 0.5), (4, 1)), atol=1e-6)
    np.testing.assert_array_equal(overlays.resize_map(anomaly_map, width=8, height=8), anomaly_map)


def test_bands_of_rows_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large picture is drawn in bands, to need less memory; outlines go on from one to the next."""
    random = np.random.default_rng(0)
    rgb = random.integers(0, 256, (64, 48, 3), dtype=np.uint8)
    smooth = np.kron(random.random((8, 6), dtype=np.float32), np.ones((8, 8), dtype=np.float32)) * 2
    whole = overlays.heat_overlay(rgb, smooth, 1.0)
    for rows in (1, 7, 8, 63):
        monkeypatch.setattr(overlays, "_BAND", rows)
        np.testing.assert_array_equal(overlays.heat_overlay(rgb, smooth, 1.0), whole)
