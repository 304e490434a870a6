"""The two sets that settings are chosen and reported on: no tile is on both sides, and nothing is lost."""

from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console
from shared_data import shared_folder

from benchmarks import development
from benchmarks.development import SERIES_GAP, TILES, clusters, halves, make_sets, taken, tile_pictures
from pipelines.errors import DatasetError

INSPECTION = shared_folder("inspection")
REAL = pytest.mark.skipif(INSPECTION is None, reason="the folder of shared real data is not here")
CONSOLE = Console(quiet=True)


def tile(counter: int, folder: str = "train/good") -> Path:
    return Path(folder, f"exp1_num_{counter}.jpg")


@pytest.fixture
def inspection(tmp_path: Path) -> Path:
    """Empty files in the layout of the three real categories; four series of tiles."""
    root = tmp_path / "inspection"
    names = [f"{category}/train/good/1.jpg" for category in ("cookie", "hazelnut_toy")]
    names += ["cookie/test/anomaly/2.jpg", "cookie/ground_truth/anomaly/2_mask.png"]
    for first in (100, 1000, 2000, 3000):
        names += [f"{TILES}/{tile(first + shot)}" for shot in (0, 20, 40)]
        names.append(f"{TILES}/{tile(first + 300, 'test/crack')}")
        names.append(f"{TILES}/ground_truth/crack/exp1_num_{first + 300}_mask.png")
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def files(root: Path) -> dict[str, str]:
    return {path.relative_to(root).as_posix(): path.read_text() for path in root.rglob("*") if path.is_file()}


def test_pictures_are_cut_into_clusters_where_the_counter_leaps() -> None:
    counters = [1801, 1000, 1300, 1500]
    found = clusters(tile(counter) for counter in counters)
    assert [[taken(path) for path in cluster] for cluster in found] == [[1000, 1300, 1500], [1801]]


def test_a_tile_by_another_name_is_refused() -> None:
    with pytest.raises(DatasetError) as caught:
        clusters([Path("train/good/tile.jpg")])
    remedy = "not named exp<N>_num_<counter>.jpg, which the split goes by"
    assert str(caught.value) == f"train/good/tile.jpg: {remedy}"


def test_halves_share_out_every_folder() -> None:
    groups = [[tile(10 * n, folder)] * 2 for n in range(10) for folder in ("train/good", "test/good", "test/crack")]
    one, other = (Counter(path.parent for path in side) for side in halves(groups))
    assert one == other
    assert one.total() == 30


def test_both_sets_are_roots_in_mvtecs_layout(inspection: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(development, "DRAWN_SIDE", {"gear": 64, "ruler": 80})
    for number in ("TRAIN", "TEST_GOOD", "TEST_DEFECT"):
        monkeypatch.setattr(development, number, 1)
    medical = tmp_path / "medical"
    (medical / "breast_ultrasound/train/good").mkdir(parents=True)
    (medical / "breast_ultrasound/train/good/1.png").write_text("scan")
    output = tmp_path / "sets"
    make_sets(inspection, medical, output, CONSOLE)
    assert {path.name for path in (output / "development").iterdir()} == {"gear", "ruler", "cookie", TILES}
    assert {path.name for path in (output / "reporting").iterdir()} == {"hazelnut_toy", "breast_ultrasound", TILES}
    assert files(output / "reporting/breast_ultrasound") == {"train/good/1.png": "scan"}
    assert files(output / "development/cookie") == files(inspection / "cookie")
    assert len(list((output / "development/ruler").rglob("*_mask.png"))) == 4
    one, other = (files(output / name / TILES) for name in ("development", "reporting"))
    assert not one.keys() & other.keys()
    assert one | other == files(inspection / TILES)
    assert len(one) == len(other) == 10


def test_an_output_in_use_is_refused_and_kept(inspection: Path, tmp_path: Path) -> None:
    output = tmp_path / "sets"
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    with pytest.raises(DatasetError) as caught:
        make_sets(inspection, None, output, CONSOLE)
    assert str(caught.value) == f"{output}: not an empty folder; name a new one"
    assert files(output) == {"mine.txt": "mine"}


def test_a_root_without_the_categories_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as caught:
        make_sets(tmp_path, None, tmp_path / "sets", CONSOLE)
    assert str(caught.value) == f"{tmp_path / 'cookie'}: no folder train/good; give the root that holds this category"


@REAL
def test_no_series_of_real_tiles_is_on_both_sides_and_nothing_is_lost() -> None:
    assert INSPECTION is not None
    pictures = tile_pictures(INSPECTION / TILES)
    sides = halves(clusters(pictures))
    assert sorted(sides[0] + sides[1]) == pictures
    one, other = (sorted(taken(path) for path in side) for side in sides)
    assert min(abs(a - b) for a in one for b in other) > SERIES_GAP


@REAL
def test_every_folder_of_real_tiles_is_halved() -> None:
    assert INSPECTION is not None
    sides = halves(clusters(tile_pictures(INSPECTION / TILES)))
    one, other = (Counter(path.parent.as_posix() for path in side) for side in sides)
    assert one.keys() == other.keys()
    assert all(abs(one[folder] - other[folder]) <= 3 for folder in one)
