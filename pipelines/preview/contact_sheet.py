"""What a model's synthetic defects look like on a category: a sheet of the very pictures that training gets."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from einops import rearrange, repeat
from PIL import Image, ImageDraw
from torch import Tensor

from anomaly_models.base import Batch
from anomaly_models.common.synthesis import SynthesisConfig, synthesise
from pipelines.data.arrays import BatchSource
from pipelines.data.batches import PreparedData, frame_of
from pipelines.data.tiled import learnt_from
from pipelines.errors import ParamsError
from pipelines.paths import Project
from pipelines.pictures.overlays import CONTOUR, outline
from pipelines.pictures.panels import FAINT, PAPER, Layout, write_line
from pipelines.settings.params import Params
from pipelines.training.inputs import find_inputs
from pipelines.training.loop import step_seed

TILE, GAP, MARGIN, TITLE = 192, 6, 12, 24  # px
_MOST_STEPS = 100  # of training without a defect, after which there is none to wait for


@dataclass(frozen=True, slots=True)
class Defect:
    """One picture with a synthetic defect, and what it was made of; all (C, H, W) in [0, 1]."""

    normal: Tensor
    foreground: Tensor | None  # None: a surface
    texture: Tensor | None  # half of an object's defects are made of the picture itself
    mask: Tensor
    image: Tensor


def contact_sheet(
    model_name: str, category: str, number: int, params: Params, project: Project, device: torch.device
) -> Image.Image:
    """The first `number` synthetic defects that training `model_name` on `category` sees, a row each.

    Raises:
        ParamsError: no such model or category in the params file, a model without synthetic defects, or settings that
            draw none.
        StageError: the category is not prepared, or the textures are missing.
    """
    params.check_category(category)
    config = params.model_config_of(model_name)
    synthesis = config.wants.synthesis
    if synthesis is None:
        raise ParamsError(f"model '{model_name}' draws no synthetic defects: only DiffusionAD does; name its entry")
    data = learnt_from(PreparedData(project.prepared(category), frame_of(config), device), config)
    batches = find_inputs(model_name, config, project, device).added_to(data)
    defects = list(islice(training_defects(batches, synthesis, config.batch_size, params.seed), number))
    if len(defects) < number:
        raise ParamsError(
            f"models.{model_name}.synthesis: {len(defects)} defects on {category} in {_MOST_STEPS} steps; raise "
            f"probability (found {synthesis.probability}) or lower perlin_threshold "
            f"(found {synthesis.perlin_threshold})"
        )
    return _sheet(f"{model_name} on {category}: the first synthetic defects of training", defects)


def training_defects(
    batches: BatchSource[Batch], synthesis: SynthesisConfig, batch_size: int, seed: int
) -> Iterator[Defect]:
    """The defects of the first steps, as the loop and the model draw them."""
    generator = torch.Generator(device=batches.device)
    for step in range(_MOST_STEPS):
        generator.manual_seed(step_seed(seed, step))
        batch = batches.training_batch(seed, step, batch_size)
        made = synthesise(batch.image, batch.texture, batch.foreground, synthesis, generator)
        for row in made.label.nonzero().flatten().tolist():
            foreground = None if batch.foreground is None else batch.foreground[row]
            texture = None if batch.texture is None else batch.texture[row]
            yield Defect(batch.image[row], foreground, texture, made.mask[row], made.image[row])


def _sheet(heading: str, defects: Sequence[Defect]) -> Image.Image:
    rows = [_tiles(defect) for defect in defects]
    pitch = TILE + GAP
    width, top = len(rows[0]) * pitch - GAP + 2 * MARGIN, MARGIN + 2 * TITLE
    page = Image.new("RGB", (width, top + len(rows) * pitch - GAP + MARGIN), PAPER)
    draw = ImageDraw.Draw(page)
    write_line(draw, MARGIN, MARGIN, heading, width - 2 * MARGIN, 16)
    for column, title in enumerate(rows[0]):
        write_line(draw, MARGIN + column * pitch, MARGIN + TITLE, title, TILE, 13, FAINT)
    for row, tiles in enumerate(rows):
        for column, tile in enumerate(tiles.values()):
            page.paste(tile, (MARGIN + column * pitch, top + row * pitch))
    return page


def _tiles(defect: Defect) -> dict[str, Image.Image]:
    """By the title of their column; all defects of a category have the same."""
    image, mask = _tile(defect.image), _tile(defect.mask)
    outlined = np.array(image)
    outlined[outline(np.asarray(mask)[..., 0] > 127)] = CONTOUR
    tiles = {"normal part": _tile(defect.normal)}
    if defect.foreground is not None:
        tiles["foreground"] = _tile(defect.foreground)
    if defect.texture is not None:
        tiles["texture at hand"] = _tile(defect.texture)
    return tiles | {"mask": mask, "synthetic defect": image, "its outline": Image.fromarray(outlined)}


def _tile(image: Tensor) -> Image.Image:
    """A picture (3, H, W), or a mask (1, H, W), as large as a tile takes."""
    rgb = image if len(image) == 3 else repeat(image, "1 h w -> c h w", c=3)
    pixels = rearrange((255 * rgb).round().byte().cpu(), "c h w -> h w c").contiguous().numpy()
    method = Image.Resampling.LANCZOS if len(image) == 3 else Image.Resampling.NEAREST
    height, width = pixels.shape[:2]
    return Image.fromarray(pixels).resize(Layout(TILE).fitted(width, height), method)
