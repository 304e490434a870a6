"""Solar cells from a package: the published one where it is installed, else a stand-in with drawn pictures."""

import hashlib
import importlib.util
import io
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from pipelines.errors import DatasetError
from pipelines.sources import solar_cells
from pipelines.sources.download import DownloadParams, download
from pipelines.sources.solar_cells import PACKAGE, SolarCellsConfig, place_cells

FOLDERS = ("train/good", "test/good", "test/defective")
# of each type: good ones, defective ones, and what is neither
COUNTS = {"0.0": 6, "1.0": 3, "0.3333333333333333": 2, "0.6666666666666666": 1}
CONFIG = {"train": 3, "test_good": 2, "test_defective": 2, "seed": 0}


def place(root: Path, **changes: int) -> dict[str, list[str]]:
    """The names in each folder that is made."""
    place_cells(root, SolarCellsConfig.model_validate(CONFIG | changes), lambda done, total: None)
    return {
        f"{kind}/{folder}": sorted(path.name for path in (root / kind / folder).iterdir())
        for kind in ("mono", "poly")
        for folder in FOLDERS
    }


def digest_of(data: Path) -> str:
    labels = (data / "labels.csv").read_bytes()
    images = [(data / line.split()[0]).read_bytes() for line in labels.decode().splitlines()]
    return hashlib.sha256(b"".join([labels, *images])).hexdigest()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data of a package of the published form, found before one that is installed; importing it would fail."""
    folder = tmp_path / "site" / PACKAGE
    (folder / "data" / "images").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('not to be imported')")
    rng, lines = np.random.default_rng(0), []
    for kind in ("mono", "poly"):
        for probability, count in COUNTS.items():
            for _ in range(count):
                path = f"images/cell{len(lines) + 1:04}.png"
                Image.fromarray(rng.integers(0, 255, (8, 8), np.uint8)).save(folder / "data" / path)
                lines.append(f"{path}  {probability:20} {kind}\n")
    (folder / "data" / "labels.csv").write_text("".join(lines))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(solar_cells, "_SHA256", digest_of(folder / "data"))
    return folder / "data"


def test_each_type_gets_a_category_of_good_and_defective_cells(package: Path, tmp_path: Path) -> None:
    placed = place(tmp_path / "elpv")
    probabilities = dict(line.split()[:2] for line in (package / "labels.csv").read_text().splitlines())
    types = {line.split()[0]: line.split()[2] for line in (package / "labels.csv").read_text().splitlines()}
    for folder, names in placed.items():
        kind, _, content = folder.split("/")
        assert len(names) == {"train/good": 3, "test/good": 2, "test/defective": 2}[folder.partition("/")[2]]
        for name in names:
            assert probabilities[f"images/{name}"] == ("0.0" if content == "good" else "1.0")
            assert types[f"images/{name}"] == kind
            assert (tmp_path / "elpv" / folder / name).read_bytes() == (package / "images" / name).read_bytes()
    names = [name for folder in placed.values() for name in folder]
    assert len(set(names)) == len(names)
    assert PACKAGE not in sys.modules


def test_the_draw_is_the_seeds(package: Path, tmp_path: Path) -> None:
    drawn = place(tmp_path / "a")
    assert place(tmp_path / "b") == drawn
    assert place(tmp_path / "c", seed=1) != drawn
    fewer = place(tmp_path / "d", test_defective=1)
    assert {key: fewer[key] for key in fewer if "good" in key} == {key: drawn[key] for key in drawn if "good" in key}
    assert set(fewer["mono/test/defective"]) < set(drawn["mono/test/defective"])


def test_all_that_there_are_can_be_taken(package: Path, tmp_path: Path) -> None:
    placed = place(tmp_path / "elpv", train=5, test_good=1, test_defective=3)
    assert Counter(map(len, placed.values())) == {5: 2, 1: 2, 3: 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": 5}, "train + test_good is 7, but there are 6 good mono cells; lower it"),
        ({"test_defective": 4}, "test_defective is 4, but there are 3 defective mono cells; lower it"),
    ],
)
def test_more_than_there_are(package: Path, tmp_path: Path, changes: dict[str, int], message: str) -> None:
    with pytest.raises(DatasetError) as caught:
        place(tmp_path / "elpv", **changes)
    assert str(caught.value) == f"download.elpv: {message}"


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DatasetError) as caught:
        place(tmp_path / "elpv")
    assert str(caught.value) == (
        "elpv: the package elpv_dataset is not installed; run `make solar`, or "
        '`pip install "blemish[solar]"`, which is elpv-dataset==1.0.0.post1'
    )


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("images/cell0003.png", b"other bytes", r"\(SHA-256 of labels and images is \w{64}, expected \w{64}\)"),
        ("images/cell0003.png", None, r"\(.*No such file.*cell0003.png'\)"),
        ("labels.csv", None, r"\(.*No such file.*labels.csv'\)"),
        ("labels.csv", b"images/cell0001.png 0.0\n", r"\(not enough values to unpack"),
        ("labels.csv", b"\xff\n", r"\('utf-8' codec"),
    ],
)
def test_another_package_of_that_name(
    package: Path, tmp_path: Path, file: str, content: bytes | None, words: str
) -> None:
    (package / file).unlink()
    if content is not None:
        (package / file).write_bytes(content)
    with pytest.raises(DatasetError, match=rf"not elpv-dataset==1.0.0.post1 as published {words}") as caught:
        place(tmp_path / "elpv")
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(
        '; run `make solar`, or `pip install "blemish[solar]"`, which is elpv-dataset==1.0.0.post1'
    )


def test_the_verb_names_licence_and_source_and_makes_a_whole_folder(package: Path, tmp_path: Path) -> None:
    printed, data = io.StringIO(), tmp_path / "data"
    params = DownloadParams.model_validate({"elpv": CONFIG})
    download("elpv", params, data, Console(file=printed, width=80))
    assert "CC BY-NC-SA 4.0: not for commercial use. Cite: Deitsch" in printed.getvalue()
    assert "EU PVSEC 2018" in printed.getvalue()
    (package / "images" / "cell0001.png").unlink()
    before = sorted(data.rglob("*"))
    with pytest.raises(DatasetError):
        download("elpv", params, data, Console(file=printed))
    assert sorted(data.rglob("*")) == before


@pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason=f"{PACKAGE} is not installed: `make solar`")
def test_the_published_package(tmp_path: Path) -> None:
    placed = place(tmp_path, train=300, test_good=120, test_defective=180)
    assert [len(placed[f"mono/{folder}"]) for folder in FOLDERS] == [300, 120, 180]
    with Image.open(tmp_path / "poly/train/good" / placed["poly/train/good"][0]) as picture:
        assert (picture.size, picture.mode) == ((300, 300), "L")
    with pytest.raises(DatasetError, match="is 589, but there are 588 good mono cells"):
        place(tmp_path / "more", train=588, test_good=1)
    with pytest.raises(DatasetError, match="is 314, but there are 313 defective mono cells"):
        place(tmp_path / "more", test_defective=314)
