"""The sheet shows what training gets, and nothing else."""

from itertools import islice

import numpy as np
import pytest
import tiny_models
import torch
from conftest import CATEGORY, tiny_params, write_params
from PIL import Image
from rich.console import Console

from anomaly_models import diffusion_ad
from anomaly_models.common.sizes import Size
from pipelines.data.batches import PreparedData
from pipelines.paths import Project
from pipelines.pictures.frames import Frame
from pipelines.preparation.photo_sets import PhotoSetConfig
from pipelines.preparation.textures import make_textures
from pipelines.preview import contact_sheet as sheets
from pipelines.preview.check import load_checked
from pipelines.preview.contact_sheet import GAP, MARGIN, TILE, TITLE, training_defects
from pipelines.training.inputs import find_inputs

SIZE = 64
CPU = torch.device("cpu")
SETTINGS = tiny_models.SETTINGS["diffusion_ad"]
SYNTHESIS = SETTINGS["synthesis"] | {"perlin_max_exponent": 3}


@pytest.fixture
def draw_textures(root):
    rng = np.random.default_rng(0)
    for number in range(6):
        path = root / f"surfaces/{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(path)
    config = PhotoSetConfig(image_size=SIZE, limit=100)
    make_textures(config, root / "surfaces", Project(root).input_of("diffusion_ad", "textures"), Console(quiet=True))


@pytest.fixture
def prepared(root, blemish, draw_textures):
    """Prepares the category as a surface or an object, with DiffusionAD in params.yaml."""

    def prepare(surface, **synthesis):
        values = tiny_params()
        values["prepare"]["surfaces"] = [CATEGORY] if surface else []
        settings = SETTINGS | {"batch_size": 3, "steps": 4, "synthesis": SYNTHESIS | synthesis}
        values["models"]["diffusion_ad"] = settings
        write_params(root, values)
        assert blemish("prepare", CATEGORY).code == 0
        return Project(root)

    return prepare


def defects_of(project):
    params = load_checked(project.params)
    config = params.model_config_of("diffusion_ad")
    data = PreparedData(project.prepared(CATEGORY), Frame(Size.square(SIZE), "bilinear", "stretch"), CPU)
    batches = find_inputs("diffusion_ad", config, project, CPU).added_to(data)
    return training_defects(batches, config.wants.synthesis, config.batch_size, params.seed)


@pytest.mark.parametrize("surface", [True, False])
def test_the_defects_are_those_of_training(prepared, blemish, monkeypatch, surface):
    project = prepared(surface)
    seen = []

    def watched(*arguments):
        made = synthesise(*arguments)
        seen.extend(zip(made.image[made.label], made.mask[made.label], strict=True))
        return made

    synthesise = diffusion_ad.synthesise
    monkeypatch.setattr(diffusion_ad, "synthesise", watched)
    outcome = blemish("train", "diffusion_ad", CATEGORY)
    assert outcome.code == 0, outcome.err
    assert 0 < len(seen) < 12  # of 4 steps of 3 images
    shown = list(islice(defects_of(project), len(seen)))
    for (image, mask), defect in zip(seen, shown, strict=True):
        assert torch.equal(defect.image, image)
        assert torch.equal(defect.mask, mask)
        assert (defect.foreground is None) == surface
        assert torch.equal(defect.normal[:, mask[0] == 0], image[:, mask[0] == 0])


def tile_of(page, row, column):
    left, top = MARGIN + column * (TILE + GAP), MARGIN + 2 * TITLE + row * (TILE + GAP)
    return np.asarray(page)[top : top + TILE, left : left + TILE]


@pytest.mark.parametrize(("surface", "columns"), [(True, 5), (False, 6)])
def test_a_row_for_each_defect(prepared, blemish, surface, columns):
    project = prepared(surface)
    outcome = blemish("synthesis", CATEGORY, "--number", "3", "--output", "sheets/mine.png")
    assert outcome.code == 0, outcome.err
    assert outcome.out == f"sheets/mine.png: 3 synthetic defects of diffusion_ad on {CATEGORY}\n"
    with Image.open(project.root / "sheets/mine.png") as page:
        width = 2 * MARGIN + columns * (TILE + GAP) - GAP
        assert page.size == (width, 2 * MARGIN + 2 * TITLE + 3 * (TILE + GAP) - GAP)
        for row, defect in enumerate(islice(defects_of(project), 3)):
            mask = tile_of(page, row, columns - 3)
            enlarged = np.repeat(np.repeat(defect.mask[0].numpy(), TILE // SIZE, axis=0), TILE // SIZE, axis=1)
            assert np.array_equal(mask, np.repeat(255 * enlarged[..., None], 3, axis=2))
            synthetic, outlined = tile_of(page, row, columns - 2), tile_of(page, row, columns - 1)
            changed = (synthetic != outlined).any(axis=2)
            assert changed.any()
            assert (outlined[changed] == (0, 255, 255)).all()
            assert (enlarged[changed] > 0).all()


def test_the_sheet_has_a_name_of_its_own(prepared, blemish, monkeypatch):
    project = prepared(surface=True)
    monkeypatch.setattr(sheets, "TILE", 32)
    assert blemish("synthesis", CATEGORY).code == 0
    with Image.open(project.root / f"synthesis_{CATEGORY}.png") as page:
        assert page.height == 2 * MARGIN + 2 * TITLE + 12 * (32 + GAP) - GAP


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--model", "fapm"], "model 'fapm' draws no synthetic defects: only DiffusionAD does; name its entry"),
        (["--model", "other"], "model 'other' is not in params.yaml, which lists: fapm, diffusion_ad"),
    ],
)
def test_models_without_synthetic_defects(prepared, blemish, arguments, error):
    prepared(surface=True)
    outcome = blemish("synthesis", CATEGORY, *arguments)
    assert outcome.code == 1
    assert outcome.err.strip() == f"error: {error}"


def test_settings_that_draw_no_defect(prepared, blemish):
    project = prepared(surface=True, probability=0.0)
    outcome = blemish("synthesis", CATEGORY)
    assert outcome.code == 1
    assert outcome.err.strip() == (
        f"error: models.diffusion_ad.synthesis: 0 defects on {CATEGORY} in 100 steps; "
        "raise probability (found 0.0) or lower perlin_threshold (found 0.5)"
    )
    assert not (project.root / f"synthesis_{CATEGORY}.png").exists()
