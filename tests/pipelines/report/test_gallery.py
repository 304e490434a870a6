import base64
import io
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from drawn_cells import picture, write_evaluation, write_prepared
from PIL import Image

from pipelines.errors import StageError
from pipelines.paths import Project
from pipelines.pictures.panels import KeptMaps
from pipelines.report import gallery
from pipelines.report.gallery import LADDER, CategoryGallery, Quality, choose_quality

FINE = Quality(128, 90)


SHARED = [picture("test/cut/0.png", "cut", 3.0, seed=0, size=(80, 40)), picture("test/good/0.png", "good", 1.0, seed=1)]
LAST = picture("test/cut/1.png", "cut", 1.5, seed=2)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """Two models on the same three images, in another order, and one that only the second was tested on."""
    project = Project(tmp_path)
    write_evaluation(project, "a", "nut", SHARED)
    write_evaluation(project, "b", "nut", [LAST, *reversed(SHARED)])
    write_prepared(project, "nut", [*SHARED, LAST])
    return project


def gallery_of(project: Project) -> CategoryGallery:
    return CategoryGallery(project.prepared("nut"), {model: project.cell(model, "nut", 0).evaluated for model in "ab"})


def decoded(uri: str | None) -> np.ndarray:
    head, _, content = uri.partition(";base64,")
    assert head in ("data:image/webp", "data:image/png")
    with Image.open(io.BytesIO(base64.b64decode(content))) as image:
        return np.asarray(image.convert("L")).astype(int)


def test_inputs_and_masks_are_shared_and_each_model_has_its_map(project: Project) -> None:
    found = gallery_of(project)
    assert list(found.images) == ["test/cut/0.png", "test/good/0.png", "test/cut/1.png"]
    assert found.has_masks
    pictures = found.pictures(FINE)
    assert pictures.sizes == [(128, 64), (128, 128), (128, 128)]
    assert [decoded(uri).shape for uri in pictures.inputs] == [(64, 128), (128, 128), (128, 128)]
    assert pictures.truths[1] is None  # nothing is marked on a good part
    for place, prepared in ((0, SHARED[0]), (2, LAST)):
        width, height = pictures.sizes[place]
        # of 64 x 64 pixels: each is doubled, where the original was half as high its rows stay as they are
        mask = np.kron(prepared.truth, np.ones((height // 64, width // 64), dtype=int))
        np.testing.assert_array_equal(decoded(pictures.truths[place]), 255 * mask)
        grey = np.kron(prepared.rgb[..., 0], np.ones((height // 64, width // 64), dtype=int))
        assert abs(decoded(pictures.inputs[place]) - grey).mean() < 6  # interpolated, and WebP
    assert pictures.maps["a"][2] is None
    assert decoded(pictures.maps["b"][2]).shape == (64, 64)


def test_maps_follow_their_images(project: Project) -> None:
    pictures = gallery_of(project).pictures(FINE)
    kept = KeptMaps.load(project.cell("b", "nut", 0).evaluated)
    # the highest value is the score over its threshold; the scale ends at twice the threshold
    for place, row, peak in ((0, 2, 1.5), (1, 1, 0.6), (2, 0, 0.75)):
        levels = decoded(pictures.maps["b"][place])
        assert abs(levels - kept.levels[row]).mean() < 6
        assert levels.max() == pytest.approx(peak / 2 * 255, abs=20)


def test_an_overlay_outlines_what_is_above_the_threshold(project: Project) -> None:
    found = gallery_of(project)
    for path, is_marked in (("test/cut/0.png", True), ("test/good/0.png", False)):
        content = base64.b64decode(found.overlay("a", path, 128).partition(";base64,")[2])
        with Image.open(io.BytesIO(content)) as image:
            assert image.size == ((128, 64) if is_marked else (128, 128))
            red, green, blue = np.asarray(image.convert("RGB")).astype(int).transpose(2, 0, 1)
        assert ((blue + green) / 2 - red > 60).any() == is_marked  # cyan, and nothing else is


def test_without_masks_there_is_no_truth(project: Project) -> None:
    shutil.rmtree(project.prepared("nut"))
    write_prepared(project, "nut", [replace(p, truth=None) for p in (*SHARED, LAST)])
    found = gallery_of(project)
    assert not found.has_masks
    assert found.pictures(FINE).truths == [None] * 3


def test_what_was_not_prepared_is_named(project: Project) -> None:
    folder = project.prepared("nut")
    shutil.rmtree(folder)
    with pytest.raises(StageError, match=r"nut: no prepared images; run `blemish prepare nut`$"):
        gallery_of(project)
    write_prepared(project, "nut", SHARED)
    with pytest.raises(StageError) as caught:
        gallery_of(project)
    assert str(caught.value) == f"{folder}: no test/cut/1.png, on which a model was tested; run `dvc repro`"


def test_a_sample_of_all_is_the_exact_size(project: Project) -> None:
    found = gallery_of(project)
    pictures = found.pictures(FINE)
    texts = [*pictures.inputs, *pictures.truths, *pictures.maps["a"], *pictures.maps["b"]]
    assert found.sample_bytes(100, FINE) == pictures.num_bytes == sum(len(text) for text in texts if text)


def test_pictures_get_smaller_as_there_are_more(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    galleries = [gallery_of(project)]
    assert choose_quality(galleries, num_cells=2) == LADDER[0]
    sizes = [galleries[0].sample_bytes(100, quality) for quality in LADDER]
    assert sizes == sorted(sizes, reverse=True)
    for wanted in LADDER:
        monkeypatch.setattr(gallery, "_MOST", sizes[LADDER.index(wanted)] + 1)
        assert choose_quality(galleries, num_cells=2) == wanted
    monkeypatch.setattr(gallery, "_MOST", 1)
    assert choose_quality(galleries, num_cells=2) == LADDER[-1]
