"""The embedded data set: what lies where, what its masks promise, and that a seed fixes every byte."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from pipelines.sources.demo_data import (
    CATEGORIES,
    TEXTURE_CLASSES,
    DemoConfig,
    DemoTexturesConfig,
    draw_demo,
    draw_textures,
)
from pipelines.sources.demo_scenes import DEFECTS, HEIGHTS, WIDTHS, photograph
from pipelines.sources.demo_surfaces import GOOD

SIDE = 64
CONFIG = DemoConfig(categories=list(CATEGORIES), image_size=SIDE, train=2, test_good=1, test_defect=1, seed=7)
TEXTURES = DemoTexturesConfig(image_size=SIDE, per_class=2, seed=7)
DEFECT_TYPES = {"scratch", "hole", "stain", "missing_part", "misprint", "bent_edge"}
PAIRS = [(category, kind) for category in CATEGORIES for kind in DEFECTS[category]]
# green on the diagonal of a good part; area, mean row and mean column of the mask of one with the last defect, pixels
DRAWN: dict[str, tuple[list[int], tuple[int, float, float]]] = {
    "blister": ([61, 166, 222, 192, 122, 174, 223, 146], (119, 44.6, 12.8)),
    "bracket": ([39, 41, 45, 42, 88, 129, 40, 44], (111, 23.8, 34.0)),
    "fabric": ([127, 151, 86, 130, 161, 151, 114, 132], (104, 16.3, 33.4)),
    "gear": ([39, 41, 191, 159, 44, 147, 151, 44], (30, 24.6, 18.8)),
    "ruler": ([67, 174, 174, 66], (24, 12.7, 13.0)),
    "weld": ([143, 126], (14, 1.5, 37.3)),
    "wood": ([134, 127, 165, 157, 160, 150, 123, 133], (109, 17.6, 31.7)),
}


def ignore_progress(done: int, total: int) -> None:
    pass


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def shape_of(category: str, side: int) -> tuple[int, int]:
    return (round(HEIGHTS.get(category, 1) * side), round(WIDTHS.get(category, 1) * side))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def drawn(root: Path, config: DemoConfig) -> dict[str, bytes]:
    root.mkdir()
    draw_demo(root, config, ignore_progress)
    return contents(root)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo") / "demo"
    drawn(root, CONFIG)
    return root


def test_layout_is_mvtecs(demo: Path) -> None:
    expected = set()
    for category in CATEGORIES:
        expected |= {f"{category}/train/good/{index:03d}.png" for index in range(2)}
        expected.add(f"{category}/test/good/000.png")
        for kind in DEFECTS[category]:
            expected |= {f"{category}/test/{kind}/000.png", f"{category}/ground_truth/{kind}/000_mask.png"}
    assert set(contents(demo)) == expected


def test_every_category_has_several_defects_and_all_types_are_used() -> None:
    assert len(CATEGORIES) >= 4
    assert all(len(kinds) >= 3 and GOOD not in kinds for kinds in DEFECTS.values())
    assert set(itertools.chain.from_iterable(DEFECTS.values())) == DEFECT_TYPES


def test_images_are_rgb_of_the_side_asked_for_and_masks_are_black_and_white(demo: Path) -> None:
    for path in demo.rglob("*.png"):
        values, shape = pixels(path), shape_of(path.relative_to(demo).parts[0], SIDE)
        assert values.dtype == np.uint8
        if path.stem.endswith("_mask"):
            assert values.shape == shape
            assert set(np.unique(values)) == {0, 255}
        else:
            assert values.shape == (*shape, 3)


def test_a_seed_fixes_every_byte_and_more_images_leave_the_earlier_ones_alone(demo: Path, tmp_path: Path) -> None:
    more = CONFIG.model_copy(update={"train": 3, "test_good": 2, "test_defect": 2})
    first, longer = contents(demo), drawn(tmp_path / "longer", more)
    assert {name: longer[name] for name in first} == first


def test_a_category_asked_for_alone_is_the_same_without_the_others(demo: Path, tmp_path: Path) -> None:
    fewer = drawn(tmp_path / "fewer", CONFIG.model_copy(update={"categories": ["gear"]}))
    assert fewer == {name: data for name, data in contents(demo).items() if name.startswith("gear/")}


def test_another_seed_gives_other_images(demo: Path, tmp_path: Path) -> None:
    first, other = contents(demo), drawn(tmp_path / "other", CONFIG.model_copy(update={"seed": 8}))
    assert first.keys() == other.keys()
    assert not [name for name in first if first[name] == other[name]]


def test_no_two_images_are_the_same(demo: Path) -> None:
    images = [data for name, data in contents(demo).items() if not name.endswith("_mask.png")]
    assert len(set(images)) == len(images)


@pytest.mark.parametrize("category", CATEGORIES)
def test_normal_parts_vary_but_belong_together(category: str) -> None:
    parts = [photograph(category, GOOD, (1, index), SIDE) for index in range(3)]
    assert not any(part.mask.any() for part in parts)
    for one, other in itertools.combinations(parts, 2):
        difference = np.abs(one.image.astype(float) - other.image)
        assert difference.mean() > 1  # more than grain alone
        assert np.abs(one.image.mean((0, 1)) - other.image.mean((0, 1))).max() < 40


@pytest.mark.parametrize(("category", "kind"), PAIRS)
def test_a_mask_is_where_the_defect_changed_the_part(category: str, kind: str) -> None:
    for index in range(3):
        photo = photograph(category, kind, (3, index), SIDE)
        difference = np.abs(photo.image.astype(float) - photo.clean).max(axis=-1)
        assert 3 <= photo.mask.sum() < 0.5 * photo.mask.size
        assert difference[photo.mask].mean() > 3
        assert difference[~photo.mask].mean() < 0.5


@pytest.mark.parametrize("category", CATEGORIES)
def test_the_clean_picture_of_a_defective_part_is_that_of_a_good_one(category: str) -> None:
    good = photograph(category, GOOD, (5,), SIDE)
    for kind in DEFECTS[category]:
        assert np.array_equal(photograph(category, kind, (5,), SIDE).clean, good.image)


def test_severity_varies_from_subtle_to_obvious() -> None:
    photos = [photograph("wood", "stain", (11, index), SIDE) for index in range(12)]
    strength = [np.abs(photo.image.astype(float) - photo.clean)[photo.mask].mean() for photo in photos]
    assert max(strength) > 2.5 * min(strength)


@pytest.mark.parametrize("category", CATEGORIES)
def test_an_odd_side_is_drawn_too(category: str) -> None:
    photo = photograph(category, DEFECTS[category][0], (2,), 75)
    assert photo.image.shape == (*shape_of(category, 75), 3)
    assert photo.mask.shape == shape_of(category, 75)


def test_a_ruler_is_high_a_weld_wide_and_the_other_parts_are_square(demo: Path) -> None:
    heights_and_widths = {category: pixels(demo / category / "train/good/000.png").shape[:2] for category in CATEGORIES}
    assert heights_and_widths.pop("ruler") == (64, 26)
    assert heights_and_widths.pop("weld") == (10, 64)
    assert set(heights_and_widths.values()) == {(64, 64)}


@pytest.mark.parametrize("kind", DEFECTS["weld"])
def test_what_is_wrong_with_a_weld_measures_a_few_pixels(kind: str) -> None:
    photo = photograph("weld", kind, (9,), 2000)
    assert photo.image.shape == (300, 2000, 3)
    rows, columns = np.nonzero(photo.mask)
    assert 15 <= photo.mask.sum() <= 110
    assert max(np.ptp(rows), np.ptp(columns)) <= 14


@pytest.mark.parametrize("kind", [GOOD, "scratch"])
def test_brackets_lie_at_any_angle_with_and_without_a_defect(kind: str) -> None:
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    angles = []
    for index in range(24):
        steel = photograph("bracket", kind, (6, index), 64).clean.mean(axis=-1) > 80
        angles.append(np.degrees(np.arctan2(y[steel].mean(), x[steel].mean())))  # where the legs of the L meet
    assert (np.histogram(angles, bins=6, range=(-180, 180))[0] > 0).all()


@pytest.mark.parametrize("category", CATEGORIES)
def test_the_pictures_are_those_that_were_drawn_before(category: str) -> None:
    """Within what another processor may round otherwise."""
    diagonal, (area, row, column) = DRAWN[category]
    good = photograph(category, GOOD, (8,), SIDE)
    assert good.image.diagonal()[1, ::8].astype(int).tolist() == pytest.approx(diagonal, abs=1)
    mask = photograph(category, DEFECTS[category][-1], (8,), SIDE).mask
    assert mask.sum() == pytest.approx(area, abs=3)
    assert np.argwhere(mask).mean(axis=0).tolist() == pytest.approx([row, column], abs=0.5)


def test_textures_are_in_dtds_layout_and_a_seed_fixes_every_byte(tmp_path: Path) -> None:
    roots = [tmp_path / name for name in ("one", "again", "longer", "other")]
    longer = TEXTURES.model_copy(update={"per_class": 3})
    other = TEXTURES.model_copy(update={"seed": 8})
    for root, config in zip(roots, (TEXTURES, TEXTURES, longer, other), strict=True):
        root.mkdir()
        draw_textures(root, config, ignore_progress)
    one, again, more, another = (contents(root) for root in roots)
    assert len(TEXTURE_CLASSES) >= 12
    assert set(one) == {f"images/{name}/{name}_{index:04d}.jpg" for name in TEXTURE_CLASSES for index in range(2)}
    assert one == again
    assert {name: more[name] for name in one} == one
    assert len(set(one.values())) == len(one)
    assert not [name for name in one if one[name] == another[name]]
    assert all(pixels(roots[0] / name).shape == (SIDE, SIDE, 3) for name in one)


def test_progress_counts_every_image(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    draw_textures(tmp_path, TEXTURES, lambda done, total: calls.append((done, total)))
    total = 2 * len(TEXTURE_CLASSES)
    assert calls == [(done, total) for done in range(1, total + 1)]


OF_PARTS = [("image_size", 63), ("image_size", 128.0), ("train", 0), ("test_good", 0), ("test_defect", 0)]
OF_PARTS += [("seed", -1), ("seed", "1"), ("colour", "red"), ("categories", []), ("categories", ["gaer"])]
OF_TEXTURES = [("image_size", 32), ("per_class", 0), ("seed", -1), ("train", 1)]


@pytest.mark.parametrize(
    ("config", "name", "value"),
    [*((CONFIG, *change) for change in OF_PARTS), *((TEXTURES, *change) for change in OF_TEXTURES)],
)
def test_configs_refuse(config: DemoConfig | DemoTexturesConfig, name: str, value: object) -> None:
    with pytest.raises(ValidationError, match=name):
        type(config).model_validate(config.model_dump() | {name: value})


@pytest.mark.parametrize("config", [CONFIG, TEXTURES])
def test_configs_have_no_defaults(config: DemoConfig | DemoTexturesConfig) -> None:
    for name in type(config).model_fields:
        values = config.model_dump()
        del values[name]
        with pytest.raises(ValidationError, match=name):
            type(config).model_validate(values)
