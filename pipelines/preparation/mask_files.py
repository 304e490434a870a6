"""The mask files of a category: which image each belongs to."""

import unicodedata
from collections import defaultdict
from pathlib import Path, PurePosixPath

from pipelines.errors import ImageError
from pipelines.numbers import counted
from pipelines.pictures import images
from pipelines.preparation.listing import Findings, Listing, Masks, some


def pair_masks(source: Path, listing: Listing, max_megapixels: int, findings: Findings) -> dict[str, Masks]:
    """Image -> its masks, for every anomalous image; empty where the category has no masks at all."""
    if listing.masks is None:
        return {}
    owners: defaultdict[str, list[str]] = defaultdict(list)
    candidates = _candidate_masks(listing, listing.masks)
    for path, found in candidates.items():
        if len(found) > 1 and listing.saturations is None:
            findings.problem(f"{source}: {path} has several masks ({some(found)}); keep one")
        for mask in found:
            owners[mask].append(path)
    if missing := [path for path, found in candidates.items() if not found]:
        findings.problem(
            f"{source}: {counted(len(missing), 'defect image')} without a mask: {some(missing)}; {listing.mask_remedy}"
        )
    for mask, paths in owners.items():
        if len(paths) > 1:
            findings.problem(f"{source}: {mask} fits several images ({some(paths)}); give them different stems")
    unpaired = [mask for mask in listing.masks if mask not in owners]
    if orphans := [mask for mask in unpaired if not _is_black(source / mask, max_megapixels)]:
        among = f" in {listing.anomalous_folder}" if listing.anomalous_folder else ""
        findings.problem(
            f"{source}: {counted(len(orphans), 'mask')} without a defect image{among}: "
            f"{some(orphans)}; add the images or remove the masks"
        )
    return {path: tuple(found) for path, found in candidates.items() if found}


def _candidate_masks(listing: Listing, masks: list[str]) -> dict[str, list[str]]:
    """Anomalous image -> the masks in the same place below the folder of masks, by the one stem or the other.

    Where an image may have several, they lie in a folder that is called as its stem.
    """
    in_folders = listing.saturations is not None
    by_place: defaultdict[PurePosixPath, list[str]] = defaultdict(list)
    for mask in masks:
        place = _place(mask, listing.mask_folder)
        by_place[place.parent if in_folders else place].append(mask)
    candidates = {}
    for path in listing.anomalous:
        place = _place(path, listing.anomalous_folder)
        candidates[path] = by_place[place.with_name(place.name + "_mask")] + by_place[place]
    return candidates


def _place(path: str, folder: str) -> PurePosixPath:
    """Where a file is below `folder`, without its suffix; a Mac writes "ü" as "u" and two dots, others as one sign."""
    return PurePosixPath(unicodedata.normalize("NFC", str(PurePosixPath(path).relative_to(folder)))).with_suffix("")


def _is_black(mask: Path, max_megapixels: int) -> bool:
    """Whether a mask marks nothing, as that of a good part; one that cannot be read may mark anything."""
    try:
        return not images.load_mask(mask, max_megapixels).any()
    except ImageError:
        return False
