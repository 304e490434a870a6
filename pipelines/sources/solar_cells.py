"""The data set `elpv`: photovoltaic cells in electroluminescence, from an installed package; no network needed.

The package `elpv-dataset` holds 2,624 cells of 44 modules, mono- and polycrystalline ones (`mono`, `poly`), as grey
pictures of 300 x 300 pixels, and how likely each is defective: 0, 1/3, 2/3 or 1. Good is what has 0, defective what has
1; the 401 cells between are left out. There are no masks. Cells of one module may be on both sides of the split: the
labels do not tell which they are.
"""

import hashlib
import importlib.util
import shutil
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from pydantic import NonNegativeInt, PositiveInt

from anomaly_models.common.settings import Settings
from pipelines.errors import DatasetError
from pipelines.sources.catalogue import Terms

PACKAGE = "elpv_dataset"
RELEASE = "elpv-dataset==1.0.0.post1"
TYPES = ("mono", "poly")
_GOOD, _DEFECTIVE = "0.0", "1.0"  # probabilities of a defect, as the labels write them
TERMS = Terms(
    title="Solar cells (ELPV)",
    licence="CC BY-NC-SA 4.0: not for commercial use",
    citation="Deitsch, Christlein, Berger, Buerhop-Lutz, Maier, Gallwitz, Riess: Automatic classification of defective "
    "photovoltaic module cells in electroluminescence images, Solar Energy 185:455-468, 2019; Deitsch, Buerhop-Lutz, "
    "Sovetkin, Steland, Maier, Gallwitz, Riess: Segmentation of photovoltaic module cells in uncalibrated "
    "electroluminescence images, Machine Vision and Applications 32(4), 2021; Buerhop-Lutz, Deitsch, Maier, Gallwitz, "
    "Berger, Doll, Hauch, Camus, Brabec: A Benchmark for Visual Identification of Defective Solar Cells in "
    "Electroluminescence Imagery, EU PVSEC 2018",
)

# Of labels.csv and then of each image, in its order: who has these bytes, has the published version.
_SHA256 = "78ce8c6eb2b8fb03e9d864c92380dde91c030f2a7ee99f72186a42e27ad20ad0"
_REMEDY = f'run `make solar`, or `pip install "blemish[solar]"`, which is {RELEASE}'


class SolarCellsConfig(Settings):
    """How many cells to draw, of each type."""

    train: PositiveInt  # good ones to learn from
    test_good: PositiveInt
    test_defective: PositiveInt
    seed: NonNegativeInt


def place_cells(root: Path, config: SolarCellsConfig, on_progress: Callable[[int, int], None]) -> None:
    """Copy the cells that the seed draws to `root/<type>`, in MVTec AD's layout without masks, `root` being empty.

    `on_progress` is told (cells copied, cells in all) after each.

    Raises:
        DatasetError: the package is not installed, is not the published one, or holds fewer cells than are wanted.
    """
    folder = _installed()
    cells = _verified_cells(folder)
    copies = [copy for kind in TYPES for copy in _drawn(cells, kind, config)]
    for done, (path, target) in enumerate(copies, start=1):
        (root / target).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / path, root / target / Path(path).name)
        on_progress(done, len(copies))


def _installed() -> Path:
    """The package's folder of data, found without importing it."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise DatasetError(f"elpv: the package {PACKAGE} is not installed; {_REMEDY}")
    return Path(spec.submodule_search_locations[0]) / "data"


def _verified_cells(folder: Path) -> Mapping[tuple[str, str], list[str]]:
    """The images (relative to `folder`) of each type and probability of a defect, the latter as it is written."""
    digest = hashlib.sha256()
    cells: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    try:
        labels = (folder / "labels.csv").read_bytes()
        digest.update(labels)
        for path, probability, kind in map(str.split, labels.decode().splitlines()):
            digest.update((folder / path).read_bytes())
            cells[kind, probability].append(path)
    except (OSError, ValueError) as error:
        raise DatasetError(f"{folder}: not {RELEASE} as published ({error}); {_REMEDY}") from error
    if digest.hexdigest() != _SHA256:
        raise DatasetError(
            f"{folder}: not {RELEASE} as published (SHA-256 of labels and images is {digest.hexdigest()}, expected "
            f"{_SHA256}); {_REMEDY}"
        )
    return cells


def _drawn(
    cells: Mapping[tuple[str, str], list[str]], kind: str, config: SolarCellsConfig
) -> Iterator[tuple[str, str]]:
    """Each cell of one type that is taken, and the folder that it goes to."""
    good = _taken(cells[kind, _GOOD], config.train + config.test_good, "train + test_good", f"good {kind}", config)
    bad = _taken(cells[kind, _DEFECTIVE], config.test_defective, "test_defective", f"defective {kind}", config)
    yield from ((path, f"{kind}/train/good") for path in good[: config.train])
    yield from ((path, f"{kind}/test/good") for path in good[config.train :])
    yield from ((path, f"{kind}/test/defective") for path in bad)


def _taken(paths: list[str], number: int, keys: str, name: str, config: SolarCellsConfig) -> list[str]:
    """So many of the paths, in an order that the seed and `name` draw: no other draw changes with this one's number."""
    if number > len(paths):
        raise DatasetError(f"download.elpv: {keys} is {number}, but there are {len(paths)} {name} cells; lower it")
    rng = np.random.default_rng([config.seed, zlib.crc32(name.encode())])
    return [paths[index] for index in rng.permutation(len(paths))[:number]]
