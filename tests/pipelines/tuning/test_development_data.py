"""What a search may look at, and the defects that it is measured on."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import CATEGORY, draw_category, tiny_params, write_params

from pipelines.data.index import PreparedIndex, frames_in
from pipelines.errors import StageError
from pipelines.paths import Project
from pipelines.pictures.frames import WHOLE
from pipelines.preparation.prepare import prepare
from pipelines.preview.check import load_checked
from pipelines.tuning.development import MOST, Access, Development, exam_of

CPU = torch.device("cpu")
NOTHING = Access(apart=False, learns=False, asked=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Prepared, with 12 good parts to learn from, 4 held out, and 6 real defects of 12."""
    root = tmp_path_factory.mktemp("development")
    draw_category(root / "images" / CATEGORY, train=16, defect=12)
    values = tiny_params()
    values["prepare"]["anomalous_train"]["count"] = 6
    write_params(root, values)
    params, project = load_checked(root / "params.yaml"), Project(root)
    place = project.prepared(CATEGORY)
    prepare(root / "images" / CATEGORY, CATEGORY, params.prepare, params.views().frames, place, lambda *_: None)
    return place


def development(folder, access=NOTHING):
    (frame,) = frames_in(folder)
    return Development(folder, frame, CPU, access)


def test_no_pixel_of_the_test_is_given_out(folder):
    data = development(folder)
    whole = PreparedIndex.load(folder)
    closed = whole.rows("test", "holdout")
    assert len(closed) == 4 + 12 - 6 + 4
    for row in closed:
        with pytest.raises(AssertionError, match="a search does not look at rows"):
            data.batch([*data.index.rows("train"), row])
        with pytest.raises(AssertionError, match="a search does not look at rows"):
            data.cut([row], [WHOLE])
        with pytest.raises(AssertionError, match="a search does not look at rows"):
            data.marks(row, WHOLE)
    learnt, kept = data.index.rows("train"), data.index.rows("holdout")
    assert (len(learnt), len(kept)) == (9, 3)
    assert sorted([*learnt, *kept]) == whole.rows("train")
    assert len(data.batch([*learnt, *kept]).image) == 12


def test_real_defects_are_the_tests_unless_they_are_apart(folder):
    data = development(folder)
    assert data.defects == "synthetic"
    with pytest.raises(AssertionError):
        data.batch(data.index.rows("anomalous_train"))
    # Six are few: unless they are asked for, synthetic ones are drawn.
    assert development(folder, Access(apart=True, learns=False, asked=None)).defects == "synthetic"
    apart = development(folder, Access(apart=True, learns=False, asked="real"))
    assert apart.defects == "real"
    assert len(apart.index.rows("known")) == 6
    assert apart.index.rows("anomalous_train") == []
    exam = exam_of(apart, 0)
    assert (exam.normals, exam.num_defects, exam.masked) == (3, 6, True)
    assert torch.equal(exam.mask[3:].any(dim=(1, 2, 3)), torch.ones(6, dtype=torch.bool))


def test_who_learns_from_defects_is_measured_on_others(folder):
    data = development(folder, Access(apart=True, learns=True, asked="real"))
    learnt, measured = data.index.rows("anomalous_train"), data.index.rows("known")
    assert (len(learnt), len(measured)) == (3, 3)
    assert not set(learnt) & set(measured)
    # Else all six are learnt from.
    own = development(folder, Access(apart=True, learns=True, asked=None))
    assert (own.defects, len(own.index.rows("anomalous_train"))) == ("synthetic", 6)


def test_what_may_be_looked_at_has_a_hash_of_its_own(folder):
    data = development(folder)
    same = development(folder)
    assert data.sha256 == same.sha256
    assert data.sha256 != development(folder, Access(apart=True, learns=False, asked=None)).sha256
    images = list(same.index.images)
    row = same.index.rows("test")[0]
    images[row] = replace(images[row], sha256="another")
    same.index = replace(same.index, images=tuple(images))
    assert data.sha256 == same.sha256  # a test image
    row = same.index.rows("train")[0]
    images[row] = replace(images[row], sha256="another")
    same.index = replace(same.index, images=tuple(images))
    assert data.sha256 != same.sha256


def test_synthetic_defects_are_a_function_of_the_seed(folder):
    data = development(folder)
    exam, again, other = (exam_of(data, seed) for seed in (0, 0, 1))
    assert (exam.normals, exam.num_defects, exam.masked) == (3, MOST, True)
    assert torch.equal(exam.image, again.image)
    assert torch.equal(exam.mask, again.mask)
    assert not torch.equal(exam.image[3:], other.image[3:])
    # Each changes its own part within the mask alone; the good parts are as they were prepared.
    good = exam.image[:3]
    assert torch.equal(good, (255 * data.batch(data.index.rows("holdout")).image).round().byte())
    for place in range(exam.num_defects):
        differs = (exam.image[3 + place] != good[place % 3]).any(dim=0)
        assert differs.any()
        assert not (differs & ~exam.mask[3 + place, 0]).any()


def with_images(monkeypatch, folder, change):
    found = PreparedIndex.load(folder)
    images = tuple(change(row, image) for row, image in enumerate(found.images))
    monkeypatch.setattr(PreparedIndex, "load", lambda _: replace(found, images=images))
    return images


def test_too_few_to_search_with(folder, monkeypatch):
    rows = PreparedIndex.load(folder).rows("train")[:5]
    with_images(
        monkeypatch, folder, lambda row, i: i if i.split != "train" or row in rows else replace(i, split="test")
    )
    with pytest.raises(
        StageError, match=rf"^{CATEGORY}: a search takes 6 good parts to learn from or more, found 5; g"
    ):
        development(folder)


def test_groups_and_copies_stay_together(folder, monkeypatch):
    names = "abcd"
    images = with_images(monkeypatch, folder, lambda row, image: replace(image, group=names[row % 4]))
    data = development(folder)
    kept = {images[row].group for row in data.index.rows("holdout")}
    assert len(kept) == 1
    assert not kept & {images[row].group for row in data.index.rows("train")}
    monkeypatch.undo()
    images = with_images(monkeypatch, folder, lambda row, image: replace(image, sha256=names[row % 4]))
    data = development(folder)
    assert len({images[row].sha256 for row in data.index.rows("holdout")}) == 1
    monkeypatch.undo()
    with_images(monkeypatch, folder, lambda row, image: replace(image, group="one"))
    with pytest.raises(
        StageError, match=r"but those to learn from are of too few groups; give parts of further groups"
    ):
        development(folder)


def test_no_real_defect_to_search_with(folder, monkeypatch):
    found = PreparedIndex.load(folder)
    images = tuple(replace(i, split="test") if i.split == "anomalous_train" else i for i in found.images)
    monkeypatch.setattr(PreparedIndex, "load", lambda _: replace(found, images=images))
    with pytest.raises(StageError, match=r"no real defects to search with; raise prepare.anomalous_train.count, or"):
        development(folder, Access(apart=True, learns=False, asked="real"))


def test_many_good_parts_are_chosen_evenly(folder, monkeypatch):
    monkeypatch.setattr("pipelines.tuning.development.MOST", 2)
    exam = exam_of(development(folder), 0)
    assert (exam.normals, exam.num_defects) == (2, 2)
    data = development(folder)
    holdout = data.index.rows("holdout")
    chosen = (255 * data.batch(holdout[:2]).image).round().byte()
    assert np.array_equal(exam.image[:2], chosen)
