"""How pictures are cut into tiles, and that what was cut up comes together again without a seam."""

import itertools

import numpy as np
import pytest

from anomaly_models.common.settings import Tiles
from anomaly_models.common.sizes import Size
from pipelines.pictures.overlays import Map
from pipelines.pictures.tiles import Tiling, score_of, tiling

PICTURES = (Size(50, 130), Size(64, 64), Size(200, 71), Size(65, 64))
OVERLAPS = (0, 1, 20, 40, 63)  # with the last, neighbours are a pixel apart


def cut(picture: Size, overlap: int, side: int = 64) -> Tiling:
    found = tiling(picture, Tiles(side=Size.square(side), overlap=overlap))
    assert found is not None
    return found


def noise(picture: Size, seed: int = 0) -> Map:
    return np.random.default_rng(seed).random(picture, dtype=np.float32)


def test_no_tiles_are_none() -> None:
    assert tiling(Size(64, 64), None) is None


@pytest.mark.parametrize(("picture", "overlap"), [*itertools.product(PICTURES, OVERLAPS)])
def test_tiles_are_of_one_size_cover_the_picture_and_overlap(picture: Size, overlap: int) -> None:
    found = cut(picture, overlap)
    covered, whole = np.zeros(picture, dtype=int), np.zeros(picture)
    for window in found:
        assert whole[window].shape == found.tile == (min(64, picture.height), min(64, picture.width))
        covered[window] += 1
    assert covered.min() == 1
    assert len(found) == len(list(found))
    for axis, side in enumerate(found.tile):
        starts = sorted({window[axis].start for window in found})
        assert (starts[0], starts[-1]) == (0, picture[axis] - side)
        assert all(side - (second - first) >= overlap for first, second in itertools.pairwise(starts))


def test_no_more_tiles_than_it_takes() -> None:
    assert len(cut(Size(64, 64), 20)) == 1
    assert len(cut(Size(64, 108), 20)) == 2  # 64 + 44
    assert len(cut(Size(64, 109), 20)) == 3
    assert len(cut(Size(9000, 12000), 64, side=512)) == 20 * 27


@pytest.mark.parametrize(("picture", "overlap"), [*itertools.product(PICTURES, OVERLAPS)])
def test_what_was_cut_up_comes_together_again(picture: Size, overlap: int) -> None:
    """The parts of a map are the map: at every pixel the shares of the tiles add up to one."""
    found, known = cut(picture, overlap), noise(picture)
    np.testing.assert_allclose(found.stitched(lambda _, window: known[window]), known, rtol=1e-5)


def test_a_tile_knows_least_at_its_edge() -> None:
    """What a network sees amiss at the edges of tiles alone hardly reaches the map, but for those of the picture."""
    found = cut(Size(64, 200), 32)

    def look(_number: int, _window: object) -> Map:
        wrong_at_edges = np.zeros((64, 64), dtype=np.float32)
        wrong_at_edges[:, [0, -1]] = 1
        return wrong_at_edges

    stitched = found.stitched(look)
    assert (stitched[:, [0, -1]] == 1).all()
    assert stitched[:, 1:-1].max() < 0.1


def test_two_tiles_share_a_seam_evenly() -> None:
    found = cut(Size(64, 96), 32)
    left, right = found
    assert (left[1].start, right[1].start) == (0, 32)
    stitched = found.stitched(lambda _, window: np.full((64, 64), window[1].start / 32, dtype=np.float32))
    ramp = stitched[10, 32:64]
    np.testing.assert_allclose(np.diff(ramp), 1 / 33, rtol=1e-4)
    np.testing.assert_allclose(ramp + ramp[::-1], 1, rtol=1e-6)


def test_outside_a_region_nothing_is_looked_at_and_nothing_said() -> None:
    found, known = cut(Size(64, 200), 16), noise(Size(64, 200))
    region = np.zeros((64, 200), dtype=bool)
    region[:, :30] = True
    looked_at = []

    def look(_number: int, window: tuple[slice, slice]) -> Map:
        looked_at.append(window[1].start)
        return known[window]

    stitched = found.stitched(look, region)
    assert looked_at == [0]
    np.testing.assert_allclose(stitched, known * region, rtol=1e-6)


@pytest.mark.parametrize("pixels", [1, 12, 300, 10**6])
def test_the_score_is_the_mean_of_the_largest(pixels: int) -> None:
    known = noise(Size(700, 40)) - 2  # of several bands of rows, and below what lies outside
    expected = np.sort(known.ravel().astype(np.float64))[-pixels:].mean()
    assert score_of(known, pixels) == pytest.approx(expected)
    region = np.zeros(known.shape, dtype=bool)
    region[300:] = True
    within = np.sort(known[300:].ravel().astype(np.float64))[-pixels:].mean()
    assert score_of(known * region, pixels, region) == pytest.approx(within)
