import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from drawn_cells import READING, picture, write_evaluation, write_prepared
from PIL import Image

from pipelines.files import file_sha256
from pipelines.paths import Project
from pipelines.report.gallery import CategoryGallery
from pipelines.report.large import LargePictures, Originals, write_large

SMALL = 32  # px: what `prepare` kept, 64, is more
WIDE, SQUARE = picture("test/cut/a b.png", "cut", 3.0, size=(2048, 512)), picture("test/good/0.png", "good", 1.0)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = Project(tmp_path)
    hashes = {}
    for part, grey in ((WIDE, 200), (SQUARE, 100)):
        file = tmp_path / "parts" / "nut" / part.path
        file.parent.mkdir(parents=True)
        Image.new("RGB", (part.width, part.height), (grey,) * 3).save(file)
        hashes[part.path] = file_sha256(file)
    write_prepared(project, "nut", [WIDE, SQUARE], hashes)
    write_evaluation(project, "fapm", "nut", [WIDE, SQUARE])
    return project


def write(project: Project, smaller: int = SMALL, originals: Originals | None = None) -> LargePictures:
    gallery = CategoryGallery(project.prepared("nut"), {"fapm": project.cell("fapm", "nut", 0).evaluated})
    originals = originals or Originals(project.root / "parts", READING)
    return write_large(gallery, originals, project.root / "new", project.report("parts"), smaller)


def pixels(project: Project, address: str | None) -> np.ndarray:
    with Image.open(project.root / "new" / str(address).replace("%20", " ")) as image:
        return np.asarray(image).astype(int)


def test_one_picture_is_kept_of_each_original_with_1024_pixels_at_most(project: Project) -> None:
    found = write(project)
    assert found.pictures == ["pictures/nut/test/cut/a%20b.png.webp", "pictures/nut/test/good/0.png.webp"]
    assert found.originals == ["../../parts/nut/test/cut/a%20b.png", "../../parts/nut/test/good/0.png"]
    wide, square = (pixels(project, address) for address in found.pictures)
    assert (wide.shape, square.shape) == ((256, 1024, 3), (64, 64, 3))
    assert (abs(wide - 200).max(), abs(square - 100).max()) <= (3, 3)


def test_nothing_is_kept_where_the_small_picture_has_as_many_pixels(project: Project) -> None:
    found = write(project, smaller=64)
    assert found.pictures == ["pictures/nut/test/cut/a%20b.png.webp", None]
    assert found.originals[1] == "../../parts/nut/test/good/0.png"


def test_what_was_prepared_stands_in_for_an_original_that_is_gone_or_another(project: Project) -> None:
    (project.root / "parts" / "nut" / WIDE.path).unlink()
    Image.new("RGB", (64, 64)).save(project.root / "parts" / "nut" / SQUARE.path)
    found = write(project)
    assert found.originals == [None, None]
    wide, square = (pixels(project, address) for address in found.pictures)
    assert (wide.shape, square.shape) == ((16, 64, 3), (64, 64, 3))  # not enlarged
    assert abs(square - SQUARE.rgb).mean() < 6
    assert write(project, smaller=64).pictures == [None, None]


def test_an_original_that_is_refused_by_now_is_shown_as_it_was_prepared(project: Project) -> None:
    rules = replace(READING, max_megapixels=1)
    found = write(project, originals=Originals(project.root / "parts", rules))
    assert pixels(project, found.pictures[0]).shape == (16, 64, 3)
    assert found.originals[0] == "../../parts/nut/test/cut/a%20b.png"


def test_the_originals_may_lie_outside_of_the_project(
    project: Project, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.move(project.root / "parts", elsewhere / "parts")
    (address, _) = write(project, originals=Originals(elsewhere / "parts", READING)).originals
    assert (
        project.report("parts") / str(address).replace("%20", " ")
    ).resolve() == elsewhere / "parts" / "nut" / WIDE.path
