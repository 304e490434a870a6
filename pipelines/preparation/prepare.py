"""A folder of images in a supported layout -> resized uint8 arrays of all splits, with an index.

Of each model there is a record of what it sees of them, so that DVC trains again whom a change reaches, and no other.

Every problem of a category is found before one error lists them all, and nothing is kept of a category that has one.
"""

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.data.index import (
    FORMAT,
    GOOD,
    IndexedImage,
    IndexedMask,
    Layout,
    PreparedIndex,
    SeenBy,
    images_file,
    masks_file,
)
from pipelines.files import atomic_folder, file_sha256, write_json
from pipelines.paths import INDEX_FILE
from pipelines.pictures.frames import Frame, written
from pipelines.preparation.config import LayoutName, PrepareConfig
from pipelines.preparation.decoding import Decoded, decoded
from pipelines.preparation.frozen import FrozenSplit, resplit
from pipelines.preparation.groups import find_groups
from pipelines.preparation.interest import region_of_interest
from pipelines.preparation.layouts import choose_layout, list_category
from pipelines.preparation.listing import Findings, Listing, Masks, find_dead_links
from pipelines.preparation.mask_files import pair_masks
from pipelines.preparation.rows import array_file
from pipelines.preparation.splits import Item, split
from pipelines.threads import threads


@dataclass(frozen=True, slots=True)
class Prepared:
    """What `prepare` has made."""

    index: PreparedIndex
    seen: Mapping[str, SeenBy]  # by model
    notes: tuple[str, ...]  # one line each, for the user: what was decided, where nothing is wrong

    @property
    def warnings(self) -> list[str]:
        """One line each, for the user."""
        by_shape = sorted({(record.frame.shape, record.warning) for record in self.seen.values() if record.warning})
        return [*self.index.warnings, *(warning for _, warning in by_shape)]


def prepare(
    source: Path,
    category: str,
    config: PrepareConfig,
    frames: Mapping[str, Frame],
    destination: Path,
    on_progress: Callable[[int, int], None],
) -> Prepared:
    """Decode, check and resize the images of the category's folder `source` into the prepared folder `destination`.

    `frames`: what each model sees. `on_progress` is told (images done, images in all). The same files give the same
    bytes, and those of an index and an array do not depend on which others are made.

    Raises:
        DatasetError: `source` cannot be used; the message lists every problem.
        ImageError: the same, when files that cannot be read are the only problem.
    """
    findings = Findings()
    layout = choose_layout(source, config.layout, findings)
    listing = list_category(source, layout, findings)
    find_dead_links(source, findings)
    frozen = FrozenSplit.of_category(source)
    masks = pair_masks(source, listing, config.max_megapixels, findings)
    seen_as = sorted(set(frames.values()))
    of_interest = region_of_interest(source, listing, config, seen_as, findings)
    groups = find_groups(source, listing, config.groups, findings)
    with threads() as pool, atomic_folder(destination) as folder:
        with decoded(source, listing, masks, config, seen_as, of_interest, folder, pool, on_progress) as rows:
            if frozen is None:
                items = split(source, listing, masks, rows.pixels, groups, config, findings)
            else:
                items = resplit(source, frozen, listing, masks, rows, groups, config, findings)
            findings.add(rows.findings)
            findings.raise_problems(category)
            _write_arrays(items, rows, folder)
        digests = _digests(source, listing, masks, pool)
        region = None if of_interest is None else written(of_interest)
        split_sha256 = None if listing.split_file is None else file_sha256(listing.split_file)
        since = None if frozen is None else frozen.since
        index = _index(category, layout, items, rows, digests, split_sha256, since, groups, config, region, findings)
        write_json(folder / INDEX_FILE, {"format": FORMAT} | index.to_json())
        of_frame = {frame: _seen(folder, frame, rows, index) for frame in rows.images}  # which models may share
        seen = {model: of_frame[frame] for model, frame in frames.items()}
        for model, record in seen.items():
            record.save(folder, model)
    return Prepared(index, seen, tuple(findings.notes))


def _seen(folder: Path, frame: Frame, rows: Decoded, index: PreparedIndex) -> SeenBy:
    return SeenBy(
        frame=frame,
        images_sha256=file_sha256(images_file(folder, frame)),
        masks_sha256=file_sha256(masks_file(folder, frame.shape)) if index.has_masks else None,
        warning=rows.shrunk.get(frame.shape),
    )


def _digests(source: Path, listing: Listing, masks: Mapping[str, Masks], pool: ThreadPoolExecutor) -> dict[str, str]:
    """SHA-256 of every image and mask used, by path."""
    paths = [*listing.pictures, *(path for found in masks.values() for path in found)]
    return dict(zip(paths, pool.map(lambda path: file_sha256(source / path), paths), strict=True))


def _write_arrays(items: list[Item], rows: Decoded, folder: Path) -> None:
    masked = [item for item in items if item.mask is not None]
    for frame, spool in rows.images.items():
        with array_file(images_file(folder, frame), (len(items), *frame.size, 3), np.uint8) as file:
            file.writelines(spool.row(item.path) for item in items)
    for shape, spool in rows.masks.items() if masked else ():
        with array_file(masks_file(folder, shape), (len(masked), *shape.size), np.bool_) as file:
            file.writelines(spool.row(item.path) for item in masked)


def _index(
    category: str,
    layout: Layout,
    items: list[Item],
    rows: Decoded,
    digests: Mapping[str, str],
    split_sha256: str | None,
    frozen: str | None,
    groups: Mapping[str, str],
    config: PrepareConfig,
    region: str | None,
    findings: Findings,
) -> PreparedIndex:
    mask_rows = {item.path: row for row, item in enumerate(item for item in items if item.mask is not None)}
    entries = tuple(
        IndexedImage(
            path=item.path,
            split=item.split,
            label=item.defect != GOOD,
            defect=item.defect,
            width=rows.originals[item.path][0],
            height=rows.originals[item.path][1],
            masks=tuple(IndexedMask(path, digests[path], rows.saturations.get(path)) for path in item.mask or ()),
            mask_row=mask_rows.get(item.path),
            sha256=digests[item.path],
            group=groups.get(item.path),
            fold=item.fold,
        )
        for item in items
    )
    return PreparedIndex(
        category=category,
        layout=layout,
        black_level=config.black_level,
        white_level=config.white_level,
        above_white=config.above_white,
        page=config.page,
        dicom_window=config.dicom_window,
        has_masks=bool(mask_rows),
        surface=category in config.surfaces,
        region=region,
        counts={
            "train": sum(entry.split == "train" for entry in entries),
            "holdout": sum(entry.split == "holdout" for entry in entries),
            "anomalous_train": sum(entry.split == "anomalous_train" for entry in entries),
            "test_normal": sum(entry.split == "test" and not entry.label for entry in entries),
            "test_anomalous": sum(entry.split == "test" and entry.label for entry in entries),
        }
        | ({} if frozen is None else {"known": sum(entry.split == "known" for entry in entries)}),
        data_sha256=_data_digest(digests),
        split_sha256=split_sha256,
        frozen=frozen,
        warnings=tuple(findings.warnings),
        images=entries,
    )


def as_it_is(source: Path, layout: LayoutName, max_megapixels: int) -> tuple[Listing, str]:
    """A category's files now, and their SHA-256: that of its index, if nothing has changed since it was prepared.

    Raises:
        DatasetError: what is wrong with the folder by its names alone.
    """
    findings = Findings()
    listing = list_category(source, choose_layout(source, layout, findings), findings)
    masks = pair_masks(source, listing, max_megapixels, findings)
    findings.raise_problems(source.name)
    with threads() as pool:
        return listing, _data_digest(_digests(source, listing, masks, pool))


def _data_digest(digests: Mapping[str, str]) -> str:
    """SHA-256 over the lines `<SHA-256 of the file>  <path>` sorted by path, as `sha256sum` writes them."""
    lines = "".join(f"{digests[path]}  {path}\n" for path in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()
