"""Which pictures were made or photographed together (`prepare.groups`): by a folder, or by a part of their names."""

import unicodedata
from pathlib import Path, PurePosixPath

from pipelines.numbers import counted
from pipelines.preparation.config import FolderGroups, PatternGroups
from pipelines.preparation.listing import LEARNT, Findings, Listing, some


def find_groups(
    source: Path, listing: Listing, groups: FolderGroups | PatternGroups | None, findings: Findings
) -> dict[str, str]:
    """Path -> group, of the pictures that have one: all good parts of training, or there is a problem.

    Names in NFC and NFD are one group. What was learnt and shows no group has that of its own folder, which is the day.
    """
    if groups is None:
        return {}
    found = {}
    for path in listing.pictures:
        if (group := _group(path, listing, groups)) is not None:
            found[path] = group
    missing = [path for path in listing.training if path not in found]
    if missing:
        ((key, value),) = groups
        every = len(missing) == len(listing.training)
        which = "a group for none" if every else f"no group for {len(missing)}"
        findings.problem(
            f"{source}: prepare.groups.{key} = {value!r} finds {which} of the "
            f"{counted(len(listing.training), 'image')} of {listing.training_folder}: {some(missing)}; correct it, "
            "rename or move the images, or set prepare.groups: null"
        )
        return {}
    return found


def _group(path: str, listing: Listing, groups: FolderGroups | PatternGroups) -> str | None:
    is_learnt, path = path in listing.learnt, unicodedata.normalize("NFC", path)
    folders = PurePosixPath(path).parts[:-1]
    if is_learnt and (isinstance(groups, FolderGroups) or groups.search(path) is None):
        return f"{LEARNT} {folders[-1]}"
    if isinstance(groups, PatternGroups):
        return groups.search(path)
    plain = listing.takes_test_normal and path not in listing.anomalous
    below = folders[1 if plain else 2 :]  # of normal/, or of train/good/, test/<defect>/, abnormal/<defect>/
    return below[groups.folder - 1] if len(below) >= groups.folder else None
