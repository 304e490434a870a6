"""A folder of images in a supported layout -> resized uint8 arrays per split, with an index.

Masks are resized by the nearest pixel, images bilinearly and antialiased; neither keeps the aspect ratio.

Every problem of a category is found before one error lists them all, and nothing is kept of a category that has one.
"""

import contextlib
import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipelines.data.index import FORMAT, GOOD, IndexedImage, Layout, PreparedIndex, images_file, masks_file
from pipelines.errors import DatasetError, ImageError
from pipelines.files import atomic_folder, write_json
from pipelines.paths import INDEX_FILE
from pipelines.pictures import images
from pipelines.preparation.config import PrepareConfig
from pipelines.preparation.layouts import (
    Findings,
    Listing,
    counted,
    detect_layout,
    list_folder,
    list_mvtec,
    pair_masks,
    some,
)
from pipelines.preparation.rows import array_file, in_order, threads
from pipelines.preparation.splits import Item, split

_EIGHT_CONNECTED = np.ones((3, 3), dtype=bool)


def prepare(
    source: Path, category: str, config: PrepareConfig, destination: Path, on_progress: Callable[[int, int], None]
) -> PreparedIndex:
    """Decode, check and resize the images of the category's folder `source` into the prepared folder `destination`.

    `on_progress` is told (images done, images in all). The same files give the same bytes.

    Raises:
        DatasetError: `source` cannot be used; the message lists every problem.
        ImageError: the same, when files that cannot be read are the only problem.
    """
    layout = detect_layout(source)
    findings = Findings()
    listing = list_mvtec(source, findings) if layout == "mvtec" else list_folder(source, findings)
    masks = pair_masks(source, listing, findings)
    with threads() as pool:
        digests = _digests(source, listing, masks, pool)
        items = split(source, listing, masks, digests, config, findings)
        with atomic_folder(destination) as folder:
            originals = _write_arrays(source, items, config, folder, pool, on_progress, findings)
            findings.raise_problems(category)
            index = _index(category, layout, items, originals, digests, config, findings)
            write_json(folder / INDEX_FILE, {"format": FORMAT} | asdict(index))
    return index


@dataclass(slots=True)
class _Decoded:
    """An image, resized to every size, with its mask: filled as far as the files allow."""

    original: tuple[int, int] | None = None  # (width, height) of the upright original
    images: list[NDArray[np.uint8]] = field(default_factory=list)
    masks: list[NDArray[np.bool_]] = field(default_factory=list)
    problems: list[DatasetError] = field(default_factory=list)
    altered: list[tuple[int, str]] = field(default_factory=list)  # sizes at which the mask lost regions, and how


# ---------------------------------------------------------------------------------------------------------------- masks


def _shrink_mask(mask: NDArray[np.bool_], size: int) -> tuple[NDArray[np.bool_], str | None]:
    """Resize a mask; also tell what became of its regions, None if there are as many as before.

    A mask that would come out empty keeps one pixel for each region, the one under its centroid: an anomalous image
    without an anomalous pixel would count against a model that finds it.
    """
    regions, before = ndimage.label(mask, structure=_EIGHT_CONNECTED)
    small = images.resize_mask(mask, size)
    if not small.any():
        centroids = np.array(ndimage.center_of_mass(mask, regions, range(1, before + 1)))  # (R, 2), pixel centres at .0
        rows, columns = ((centroids + 0.5) * size / mask.shape).astype(int).T
        small = np.zeros((size, size), dtype=bool)
        small[rows, columns] = True
        return small, "vanished, kept at the centroid"
    after = ndimage.label(small, structure=_EIGHT_CONNECTED)[1]
    return small, None if after >= before else f"{before} regions became {after}"


def _digests(source: Path, listing: Listing, masks: Mapping[str, str], pool: ThreadPoolExecutor) -> dict[str, str]:
    """SHA-256 of every image and mask used, by path."""
    paths = [*listing.training, *listing.test_normal, *listing.anomalous, *masks.values()]
    return dict(zip(paths, pool.map(lambda path: _digest(source / path), paths), strict=True))


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:  # decoding meets it again, and reports it
        return f"unreadable: {path}"


# --------------------------------------------------------------------------------------------------------------- arrays


def _write_arrays(
    source: Path,
    items: list[Item],
    config: PrepareConfig,
    folder: Path,
    pool: ThreadPoolExecutor,
    on_progress: Callable[[int, int], None],
    findings: Findings,
) -> list[tuple[int, int]]:
    """Write the arrays row by row; return the (width, height) of each original."""
    altered: defaultdict[int, list[str]] = defaultdict(list)
    originals: list[tuple[int, int]] = []
    with contextlib.ExitStack() as stack:
        image_files, mask_files = _open_arrays(items, config, folder, stack)
        decoding = in_order(lambda item: _decode(source, item, config), items, pool)
        for done, (item, decoded) in enumerate(zip(items, decoding, strict=True), 1):
            findings.problems.extend(decoded.problems)
            for size, what in decoded.altered:
                altered[size].append(f"{item.mask} ({what})")
            if not decoded.problems and decoded.original is not None:
                originals.append(decoded.original)
                for image_file, image in zip(image_files, decoded.images, strict=True):
                    image_file.write(image.tobytes())
                for mask_file, mask in zip(mask_files if item.mask else [], decoded.masks, strict=True):
                    mask_file.write(mask.tobytes())
            on_progress(done, len(items))
    for size in sorted(altered):
        masks = counted(len(altered[size]), "mask")
        findings.warnings.append(f"{masks} with fewer regions at {size} pixels: {some(altered[size])}")
    return originals


def _open_arrays(
    items: list[Item], config: PrepareConfig, folder: Path, stack: contextlib.ExitStack
) -> tuple[list[BinaryIO], list[BinaryIO]]:
    """Begin the arrays of images and of masks, one of each per size."""
    num_masks = sum(item.mask is not None for item in items)
    image_files, mask_files = [], []
    for size in config.image_sizes:
        shape = (len(items), size, size, 3)
        image_files.append(stack.enter_context(array_file(images_file(folder, size), shape, np.uint8)))
        if num_masks:
            shape_of_masks = (num_masks, size, size)
            mask_files.append(stack.enter_context(array_file(masks_file(folder, size), shape_of_masks, np.bool_)))
    return image_files, mask_files


def _decode(source: Path, item: Item, config: PrepareConfig) -> _Decoded:
    decoded = _Decoded()
    try:
        rgb = images.load_rgb(source / item.path, config.white_level)
        decoded.original = (rgb.shape[1], rgb.shape[0])
        decoded.images = [images.resize_rgb(rgb, size) for size in config.image_sizes]
    except ImageError as error:
        decoded.problems.append(error)
    if item.mask is None:
        return decoded
    try:
        mask = _load_mask(source, item, decoded.original)
    except DatasetError as error:
        decoded.problems.append(error)
        return decoded
    for size in config.image_sizes:
        small, what = _shrink_mask(mask, size)
        decoded.masks.append(small)
        if what is not None:
            decoded.altered.append((size, what))
    return decoded


def _load_mask(source: Path, item: Item, original: tuple[int, int] | None) -> NDArray[np.bool_]:
    """The mask of an image whose (width, height) is `original`, None where the image cannot be read."""
    assert item.mask is not None
    path = source / item.mask
    mask = images.load_mask(path)
    height, width = mask.shape
    if original is not None and (width, height) != original:
        raise DatasetError(
            f"{path}: the mask is {width} x {height} pixels, its image {item.path} {original[0]} x {original[1]}; "
            "export it at the size of the image"
        )
    if not mask.any():
        raise DatasetError(
            f"{path}: the mask is all black, its image {item.path} is among the defects; mark the defect"
        )
    return mask


# ---------------------------------------------------------------------------------------------------------------- index


def _index(
    category: str,
    layout: Layout,
    items: list[Item],
    originals: list[tuple[int, int]],
    digests: Mapping[str, str],
    config: PrepareConfig,
    findings: Findings,
) -> PreparedIndex:
    mask_rows = {item.path: row for row, item in enumerate(item for item in items if item.mask is not None)}
    entries = tuple(
        IndexedImage(
            path=item.path,
            split=item.split,
            label=item.defect != GOOD,
            defect=item.defect,
            width=width,
            height=height,
            mask=item.mask,
            mask_row=mask_rows.get(item.path),
        )
        for item, (width, height) in zip(items, originals, strict=True)
    )
    return PreparedIndex(
        category=category,
        layout=layout,
        image_sizes=tuple(config.image_sizes),
        white_level=config.white_level,
        has_masks=bool(mask_rows),
        surface=category in config.surfaces,
        counts={
            "train": sum(entry.split == "train" for entry in entries),
            "holdout": sum(entry.split == "holdout" for entry in entries),
            "anomalous_train": sum(entry.split == "anomalous_train" for entry in entries),
            "test_normal": sum(entry.split == "test" and not entry.label for entry in entries),
            "test_anomalous": sum(entry.split == "test" and entry.label for entry in entries),
        },
        data_sha256=_data_digest(digests),
        warnings=tuple(findings.warnings),
        images=entries,
    )


def _data_digest(digests: Mapping[str, str]) -> str:
    """SHA-256 over the lines `<SHA-256 of the file>  <path>` sorted by path, as `sha256sum` writes them."""
    lines = "".join(f"{digests[path]}  {path}\n" for path in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()
