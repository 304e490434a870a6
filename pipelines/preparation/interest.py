"""The region of interest of a category: the mask or the polygons of `prepare.regions`, as a mask of the originals."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pipelines.errors import DatasetError
from pipelines.pictures import images
from pipelines.pictures.frames import Frame, size_of
from pipelines.preparation.config import Polygon, PrepareConfig
from pipelines.preparation.listing import Findings, Listing


def region_of_interest(
    source: Path, listing: Listing, config: PrepareConfig, frames: Sequence[Frame], findings: Findings
) -> NDArray[np.bool_] | None:
    """The region (H, W) of the upright originals that counts, True there; None where all does, or where it is unusable.

    `source` is the category's folder. What is wrong goes into the findings.
    """
    region = config.regions.get(source.name)
    if region is None:
        return None
    setting = f"prepare.regions.{source.name}"
    try:
        if region.mask is not None:
            found = images.load_mask(source / region.mask, config.max_megapixels)
        else:
            found = _drawn(region.polygons or (), source / _first(listing), setting, config)
    except DatasetError as error:
        findings.problems.append(error)
        return None
    held = [frame for frame in frames if frame.shape.holds(size_of(found))]  # of the others, pictures are told of
    lost = [frame for frame in held if not frame.shape.fitted_mask(found).any()]
    if not found.any():
        findings.problem(f"{setting}: nothing is left of the pictures; mark white what counts, and black what does not")
    elif lost:
        findings.problem(f"{setting}: nothing of it is left at {lost[0]} pixels; mark more, or raise image_size")
    return found


def _first(listing: Listing) -> str:
    if not listing.training:
        raise DatasetError(f"{listing.training_folder} holds no image")
    return listing.training[0]


def _drawn(polygons: Sequence[Polygon], picture: Path, setting: str, config: PrepareConfig) -> NDArray[np.bool_]:
    """The inside of the polygons, their outlines included, of pictures as large as that one."""
    height, width = images.load_rgb(picture, config.reading).shape[:2]
    canvas = Image.new("1", (width, height))
    for polygon in polygons:
        if beyond := [corner for corner in polygon if corner[0] > width or corner[1] > height]:
            raise DatasetError(
                f"{setting}: the corner {list(beyond[0])} (x, y) lies outside of {picture.name}, which is {width} x "
                f"{height} pixels; correct it"
            )
        ImageDraw.Draw(canvas).polygon(polygon, fill=1)
    return np.asarray(canvas) != 0
