"""Make the two sets of `settings.md`: one that settings are chosen on, and one that they are reported on.

    python benchmarks/development.py INSPECTION_ROOT OUTPUT [--medical ROOT]

Choices are made on OUTPUT/development alone; what OUTPUT/reporting shows must never change a setting. Both are roots in
MVTec AD's layout. INSPECTION_ROOT holds `cookie`, `hazelnut_toy` and `magnetic_tile` in that layout, the root of
--medical holds `breast_ultrasound`.

development  gear, fabric, bracket and ruler, drawn from a seed that no preset uses; cookie; half of the magnetic tiles
reporting    hazelnut_toy; the other half of the tiles; breast_ultrasound

A magnetic tile was photographed up to seven times in a row (Huang et al., *Surface defect saliency of magnetic tile*),
and a file's name says when: `exp<N>_num_<counter>.jpg`, N for the light. Where N rises from one picture to the next,
the counter rises by at most 300 (in 99 of 100 cases); where it starts again, which is another tile, mostly by more. So
all pictures are put in order and cut into clusters wherever more than 300 lies between two. A cluster, which may be a
few tiles in quick succession, goes to one side whole: its training images, test images and masks. The largest go first,
and each where it brings the halves of train good, test good and every type of defect closer together.
"""

import argparse
import itertools
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console

from pipelines.errors import BlemishError, DatasetError
from pipelines.files import atomic_folder
from pipelines.progress import counting
from pipelines.sources.demo_data import DemoConfig, draw_demo

SEED = 100
DRAWN_SIDE = {"gear": 256, "fabric": 256, "bracket": 256, "ruler": 640}  # pixels; of a ruler 256 x 640
TRAIN, TEST_GOOD, TEST_DEFECT = 60, 30, 12  # the last of each defect type

TILES = "magnetic_tile"
SERIES_GAP = 300  # of the counter in the tiles' names
TILE_NAME = re.compile(r"exp\d+_num_(\d+)\.jpg")


def make_sets(inspection: Path, medical: Path | None, output: Path, console: Console) -> None:
    """Write OUTPUT/development and OUTPUT/reporting: both or, if anything fails, neither.

    Raises:
        DatasetError: a category is missing, a tile has another name than the split goes by, or `output` is in use.
    """
    whole = {"development": [inspection / "cookie"], "reporting": [inspection / "hazelnut_toy"]}
    if medical is not None:
        whole["reporting"].append(medical / "breast_ultrasound")
    for category in (*itertools.chain.from_iterable(whole.values()), inspection / TILES):
        if not (category / "train" / "good").is_dir():
            raise DatasetError(f"{category}: no folder train/good; give the root that holds this category")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise DatasetError(f"{output}: not an empty folder; name a new one")
    sides = halves(clusters(tile_pictures(inspection / TILES)))
    with atomic_folder(output.resolve()) as new:
        for (name, categories), pictures in zip(whole.items(), sides, strict=True):
            for category in categories:
                copy(category, [path for path in category.rglob("*") if path.is_file()], new / name / category.name)
            tiles = inspection / TILES
            copy(tiles, [tiles / path for path in pictures] + masks_of(tiles, pictures), new / name / TILES)
        draw(new / "development", console)


def draw(root: Path, console: Console) -> None:
    for category, side in DRAWN_SIDE.items():
        config = DemoConfig(
            categories=[category],
            image_size=side,
            train=TRAIN,
            test_good=TEST_GOOD,
            test_defect=TEST_DEFECT,
            seed=SEED,
        )
        with counting(console, category) as on_progress:
            draw_demo(root, config, on_progress)


def tile_pictures(tiles: Path) -> list[Path]:
    """All pictures of the tiles, relative to `tiles`: split/kind/name."""
    return sorted(path.relative_to(tiles) for split in ("train", "test") for path in (tiles / split).glob("*/*.jpg"))


def clusters(pictures: Iterable[Path]) -> list[list[Path]]:
    """The pictures in the order they were taken in, cut where more than SERIES_GAP lies between two."""
    in_time = sorted(pictures, key=lambda path: (taken(path), path))
    starts = [late for early, late in itertools.pairwise(in_time) if taken(late) - taken(early) > SERIES_GAP]
    cuts = [0, *(in_time.index(path) for path in starts), len(in_time)]
    return [in_time[start:end] for start, end in itertools.pairwise(cuts)]


def taken(picture: Path) -> int:
    named = TILE_NAME.fullmatch(picture.name)
    if named is None:
        raise DatasetError(f"{picture}: not named exp<N>_num_<counter>.jpg, which the split goes by")
    return int(named[1])


def halves(groups: list[list[Path]]) -> tuple[list[Path], list[Path]]:
    """Share out whole groups, largest first, so that both sides get about as much of every folder."""
    total = Counter(picture.parent for group in groups for picture in group)
    sides: tuple[list[Path], list[Path]] = ([], [])
    surplus = dict.fromkeys(total, 0.0)  # of the first side, in shares of each folder
    for group in sorted(groups, key=len, reverse=True):
        shares = {folder: count / total[folder] for folder, count in Counter(path.parent for path in group).items()}
        first = sum(surplus[folder] * share for folder, share in shares.items()) <= 0
        sides[0 if first else 1].extend(group)
        for folder, share in shares.items():
            surplus[folder] += share if first else -share
    return sides


def masks_of(tiles: Path, pictures: Iterable[Path]) -> list[Path]:
    named = (tiles / "ground_truth" / path.parent.name / f"{path.stem}_mask.png" for path in pictures)
    return [path for path in named if path.exists()]


def copy(source: Path, files: Iterable[Path], target: Path) -> None:
    """Contents only: where the source may not be written to, the copy may."""
    for path in files:
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inspection", type=Path, metavar="INSPECTION_ROOT")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="a folder that is empty or not yet there")
    parser.add_argument("--medical", type=Path, metavar="ROOT", help="adds breast_ultrasound to the reporting set")
    arguments = parser.parse_args()
    try:
        make_sets(arguments.inspection, arguments.medical, arguments.output, Console(stderr=True))
    except BlemishError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
