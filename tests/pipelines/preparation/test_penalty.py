"""Penalty images are the middle of each photo, in colour, at the scale at which a part is seen."""

import io

import numpy as np
import pytest
import torch
from drawn_folders import write_image
from PIL import Image
from pydantic import ValidationError
from rich.console import Console

from anomaly_models.common.sizes import Size
from pipelines.data.photo_sets import PhotoSet
from pipelines.errors import DatasetError, StageError
from pipelines.files import read_json
from pipelines.paths import Project
from pipelines.preparation.penalty import make_penalty
from pipelines.preparation.photo_sets import PhotoSetConfig

SIZE = 16
CPU = torch.device("cpu")
CONFIG = PhotoSetConfig(image_size=SIZE, limit=100)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("project")
    for number in range(10):
        write_image(root / f"photos/class{number // 5}/{number}.png", number, width=80, height=50 + number)
    return root


@pytest.fixture(scope="module")
def made(root):
    folder = Project(root).input_of("efficient_ad", "penalty")
    assert make_penalty(CONFIG, root / "photos", folder, quiet()) == 10
    return folder


def test_an_image_is_the_centre_of_the_photo_at_twice_the_size(root, made):
    index = read_json(made / "index.json")
    rows = np.load(made / f"images_{SIZE}.npy")
    assert rows.shape == (10, SIZE, SIZE, 3)
    for row, name in zip(rows, index["photos"], strict=True):
        with Image.open(root / "photos" / name) as photo:
            resized = photo.resize((2 * SIZE, 2 * SIZE), Image.Resampling.BILINEAR)
        expected = resized.crop((SIZE // 2, SIZE // 2, 3 * SIZE // 2, 3 * SIZE // 2))
        assert np.array_equal(row, np.asarray(expected))


def test_the_same_photos_give_the_same_bytes(root, made, tmp_path):
    make_penalty(CONFIG, root / "photos", tmp_path / "again", quiet())
    for name in ("index.json", f"images_{SIZE}.npy"):
        assert (tmp_path / "again" / name).read_bytes() == (made / name).read_bytes()


def test_a_limit_takes_from_all_classes(root, tmp_path):
    config = PhotoSetConfig(image_size=SIZE, limit=4)
    assert make_penalty(config, root / "photos", tmp_path / "few", quiet()) == 4
    names = read_json(tmp_path / "few/index.json")["photos"]
    assert names == ["class0/0.png", "class0/2.png", "class1/5.png", "class1/7.png"]


def test_an_empty_folder_is_one_line_and_the_old_images_stay(root, made, tmp_path):
    (tmp_path / "empty").mkdir()
    config = PhotoSetConfig(image_size=SIZE, limit=4)
    with pytest.raises(DatasetError, match=r"^[^\n]*empty: holds no photos[^\n]*$"):
        make_penalty(config, tmp_path / "empty", made, quiet())
    assert len(PhotoSet(made, Size.square(SIZE), CPU, "penalty")) == 10


def test_a_stream_is_a_function_of_seed_and_step(made):
    penalty = PhotoSet(made, Size.square(SIZE), CPU, "penalty")
    images = penalty.images(0, 3, 4)
    assert images.shape == (4, 3, SIZE, SIZE)
    assert images.dtype == torch.float32
    assert 0 <= float(images.min()) < float(images.max()) <= 1
    assert torch.equal(images, PhotoSet(made, Size.square(SIZE), CPU, "penalty").images(0, 3, 4))
    assert not torch.equal(images, penalty.images(0, 4, 4))
    assert not torch.equal(images, penalty.images(1, 3, 4))
    epoch = penalty.images(0, 0, 10).flatten(1)
    assert len(epoch.unique(dim=0)) == 10


def test_missing_and_outdated_images_name_the_verb(made, tmp_path):
    with pytest.raises(StageError, match=r"^[^\n]*no penalty images; run `blemish penalty efficient_ad`$"):
        PhotoSet(Project(tmp_path).input_of("efficient_ad", "penalty"), Size.square(SIZE), CPU, "penalty")
    with pytest.raises(StageError, match=r"of 16 pixels, but the model's image_size is 32; set penalty.efficient_ad"):
        PhotoSet(made, Size.square(32), CPU, "penalty")


@pytest.mark.parametrize("name", ["index.json", f"images_{SIZE}.npy"])
def test_damaged_images_name_the_file_and_the_verb(made, name):
    path = made / name
    whole = path.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"{}", whole.replace(b"1", b"2", 1)):
        path.write_bytes(content)
        with pytest.raises(StageError) as caught:
            PhotoSet(made, Size.square(SIZE), CPU, "penalty")
        assert str(caught.value).startswith(f"{path}: damaged, or by another version of Blemish (")
        assert str(caught.value).endswith("); run `blemish penalty efficient_ad`")
    path.write_bytes(whole)


def test_settings_have_no_defaults_and_no_strangers():
    for change in ({"limit": 0}, {"image_size": "16"}, {"grey": 0.3}):
        with pytest.raises(ValidationError):
            PhotoSetConfig.model_validate(CONFIG.model_dump() | change)
    with pytest.raises(ValidationError, match="limit"):
        PhotoSetConfig.model_validate({"image_size": 16})
