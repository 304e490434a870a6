import base64
import io
from pathlib import Path

import numpy as np
import pytest
from drawn_cells import picture, write_evaluation
from PIL import Image

from pipelines.paths import Project
from pipelines.pictures.panels import MAPS_FILE, KeptMaps
from pipelines.report import gallery
from pipelines.report.gallery import LADDER, CategoryGallery, Quality, choose_quality

FINE = Quality(128, 90)


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Two models on the same three images, in another order, and one that only the second was tested on."""
    project = Project(tmp_path)
    shared = [
        picture("test/cut/0.png", "cut", 3.0, seed=0, size=(80, 40)),
        picture("test/good/0.png", "good", 1.0, seed=1),
    ]
    last = picture("test/cut/1.png", "cut", 1.5, seed=2)
    return {
        "a": write_evaluation(project, "a", "nut", shared),
        "b": write_evaluation(project, "b", "nut", [last, *reversed(shared)]),
    }


def decoded(uri: str | None) -> np.ndarray:
    assert uri is not None
    head, _, content = uri.partition(";base64,")
    assert head in ("data:image/webp", "data:image/png")
    with Image.open(io.BytesIO(base64.b64decode(content))) as image:
        return np.asarray(image.convert("L")).astype(int)


def test_inputs_and_masks_are_shared_and_each_model_has_its_map(folders: dict[str, Path]) -> None:
    found = CategoryGallery(folders)
    assert list(found.images) == ["test/cut/0.png", "test/good/0.png", "test/cut/1.png"]
    assert found.has_masks
    pictures = found.pictures(FINE)
    assert pictures["sizes"] == [(128, 64), (128, 128), (128, 128)]
    assert [decoded(uri).shape for uri in pictures["inputs"]] == [(64, 128), (128, 128), (128, 128)]
    assert pictures["truths"][1] is None  # nothing is marked on a good part
    truth = decoded(pictures["truths"][2])
    assert set(np.unique(truth)) == {0, 255}
    assert (truth > 0).mean() == pytest.approx(1 / 16, abs=0.01)  # a square of a quarter of the side
    assert pictures["maps"]["a"][2] is None
    assert decoded(pictures["maps"]["b"][2]).shape == (64, 64)


def test_maps_follow_their_images(folders: dict[str, Path]) -> None:
    pictures = CategoryGallery(folders).pictures(FINE)
    kept = KeptMaps.load(folders["b"])
    # the highest value is the score over its threshold; the scale ends at twice the threshold
    for place, row, peak in ((0, 2, 1.5), (1, 1, 0.6), (2, 0, 0.75)):
        levels = decoded(pictures["maps"]["b"][place])
        assert abs(levels - kept.levels[row]).mean() < 6
        assert levels.max() == pytest.approx(peak / 2 * 255, abs=20)


def test_without_kept_pictures_there_are_none(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        (folder / MAPS_FILE).unlink()
    found = CategoryGallery(folders)
    assert not found.has_masks
    assert found.pictures(FINE) == {
        "inputs": [None] * 3,
        "truths": [None] * 3,
        "sizes": [None] * 3,
        "maps": {"a": [None] * 3, "b": [None] * 3},
    }
    assert found.sample_bytes(2, FINE) == 0


def test_a_sample_of_all_is_the_exact_size(folders: dict[str, Path]) -> None:
    found = CategoryGallery(folders)
    pictures = found.pictures(FINE)
    texts = [*pictures["inputs"], *pictures["truths"], *pictures["maps"]["a"], *pictures["maps"]["b"]]
    assert found.sample_bytes(100, FINE) == sum(len(text) for text in texts if text)


def test_pictures_get_smaller_as_there_are_more(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    galleries = [CategoryGallery(folders)]
    assert choose_quality(galleries, num_cells=2) == LADDER[0]
    sizes = [galleries[0].sample_bytes(100, quality) for quality in LADDER]
    assert sizes == sorted(sizes, reverse=True)
    for wanted in LADDER:
        monkeypatch.setattr(gallery, "_MOST", sizes[LADDER.index(wanted)] + 1)
        assert choose_quality(galleries, num_cells=2) == wanted
    monkeypatch.setattr(gallery, "_MOST", 1)
    assert choose_quality(galleries, num_cells=2) == LADDER[-1]
