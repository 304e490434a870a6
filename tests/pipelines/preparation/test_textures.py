"""Textures are whole pictures, dealt out by a stream of their own beside the training batches."""

import numpy as np
import pytest
import torch
from conftest import CATEGORY, write_params
from drawn_folders import write_image
from PIL import Image
from rich.console import Console

from anomaly_models.common.sizes import Size
from pipelines.data.photo_sets import PhotoSet
from pipelines.errors import StageError
from pipelines.paths import Project
from pipelines.preparation.penalty import make_penalty
from pipelines.preparation.photo_sets import PhotoSetConfig
from pipelines.preparation.textures import make_textures

SIZE = 16
CPU = torch.device("cpu")
CONFIG = PhotoSetConfig(image_size=SIZE, limit=100)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    root = tmp_path_factory.mktemp("project")
    for number in range(10):
        write_image(root / f"dtd/images/class{number // 5}/{number}.png", number, width=60 + number, height=40)
    project = Project(root)
    quiet = Console(quiet=True)
    assert make_textures(CONFIG, root / "dtd", project.input_of("diffusion_ad", "textures"), quiet) == 10
    make_penalty(CONFIG, root / "dtd", project.input_of("diffusion_ad", "penalty"), quiet)
    return project


@pytest.fixture(scope="module")
def textures(project):
    return PhotoSet(project.input_of("diffusion_ad", "textures"), Size.square(SIZE), CPU, "textures")


def test_a_texture_is_the_whole_picture(project):
    rows = np.load(project.input_of("diffusion_ad", "textures") / f"images_{SIZE}.npy")
    with Image.open(project.root / "dtd/images/class0/3.png") as picture:
        expected = np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    assert np.array_equal(rows[3], expected)


def test_the_stream_is_a_function_of_seed_and_step_and_apart_from_the_penalty_images(project, textures):
    assert torch.equal(textures.images(0, 1, 4), textures.images(0, 1, 4))
    assert not torch.equal(textures.images(0, 1, 4), textures.images(1, 1, 4))
    one_epoch = textures.images(0, 0, 10).flatten(1)
    assert len(one_epoch.unique(dim=0)) == 10
    penalty = PhotoSet(project.input_of("diffusion_ad", "penalty"), Size.square(SIZE), CPU, "penalty")
    places = [int((one_epoch == row).all(1).nonzero()) for row in textures.images(0, 0, 10).flatten(1)]
    assert places == list(range(10))
    assert not torch.equal(penalty.images(0, 0, 10), textures.images(0, 0, 10))


def test_what_is_missing_or_of_another_size_is_told_with_the_verb(project, tmp_path):
    with pytest.raises(StageError, match="no textures; run `blemish textures diffusion_ad`"):
        PhotoSet(Project(tmp_path).input_of("diffusion_ad", "textures"), Size.square(SIZE), CPU, "textures")
    with pytest.raises(StageError, match=r"textures of 16 pixels.* set textures.diffusion_ad.image_size to it"):
        PhotoSet(project.input_of("diffusion_ad", "textures"), Size.square(32), CPU, "textures")


def test_the_verb(root, blemish):
    from conftest import tiny_params

    values = tiny_params()
    values["textures"] = {"fapm": {"image_size": 64, "limit": 3}}
    write_params(root, values)
    assert blemish("download", "demo_textures").code == 0
    outcome = blemish("textures", "fapm")
    assert outcome.code == 0
    assert outcome.out == "fapm: 3 textures\n"
    assert len(PhotoSet(Project(root).input_of("fapm", "textures"), Size.square(64), CPU, "textures")) == 3
    assert blemish("check").code == 0
    assert CATEGORY in blemish("prepare", CATEGORY).out
