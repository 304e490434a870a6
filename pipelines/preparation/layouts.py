"""A folder in a known layout -> its files by role, with every problem gathered.

Layouts, found per category:

    mvtec    train/good, test/good, test/<defect>, ground_truth/<defect>/<stem>_mask.png
    folder   normal, optional abnormal (images, or one folder per defect type), optional masks (mirrors abnormal)

A mask is `<stem>_mask` or `<stem>` with any image suffix. Without a folder of masks, a category has image labels only.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from pipelines.data.index import GOOD, Layout
from pipelines.errors import DatasetError, ImageError, told
from pipelines.pictures import images

_SILENTLY_IGNORED = frozenset({"license.txt", "readme.txt", "thumbs.db", "desktop.ini"})


@dataclass(frozen=True, slots=True)
class Findings:
    """What is wrong with a category, and what its user should know; gathered so that all of it is told at once."""

    problems: list[DatasetError] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def problem(self, message: str) -> None:
        self.problems.append(DatasetError(message))

    def raise_problems(self, category: str) -> None:
        if not self.problems:
            return
        kind = ImageError if all(isinstance(problem, ImageError) for problem in self.problems) else DatasetError
        if len(self.problems) == 1:
            raise kind(f"category {category!r}: {self.problems[0]}")
        raise kind(told(self.problems, f"category {category!r} has {len(self.problems)} problems:"))


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a category by role; paths are relative to its folder, posix, sorted."""

    training: list[str]  # normals to fit and to hold out
    test_normal: list[str]
    training_folder: str
    takes_test_normal: bool  # the layout has no normal test images of its own
    anomalous: dict[str, str]  # path -> type of defect
    anomalous_folder: str
    mask_folder: str
    masks: list[str] | None  # None: no such folder


def detect_layout(source: Path) -> Layout:
    if not source.is_dir():
        raise DatasetError(f"{source}: no such folder; put the images there or correct the path in params.yaml")
    mvtec, folder = (source / "train" / GOOD).is_dir(), (source / "normal").is_dir()
    if mvtec and folder:
        raise DatasetError(f"{source}: holds both train/{GOOD} and normal; keep one of the two layouts")
    if mvtec or folder:
        return "mvtec" if mvtec else "folder"
    names = sorted(entry.name + "/" * entry.is_dir() for entry in source.iterdir())
    found = f"holds {some(names)}" if names else "is empty"
    raise DatasetError(f"{source}: {found}; expected train/{GOOD} and test/ (as in MVTec AD), or normal/")


def list_mvtec(source: Path, findings: Findings) -> Listing:
    _warn_unused(source, "", {"train", "test", "ground_truth"}, findings)
    _warn_unused(source, "train", {GOOD}, findings)
    test_normal: list[str] = []
    anomalous: dict[str, str] = {}
    if (source / "test").is_dir():
        stray, folders = _scan(source, "test", findings)
        if stray:
            findings.problem(f"{source}: images directly in test ({some(stray)}); move each into test/<defect>")
        for folder in folders:
            paths = _leaf(source, folder, findings)
            defect = PurePosixPath(folder).name
            if defect == GOOD:
                test_normal = paths
                continue
            anomalous |= dict.fromkeys(paths, defect)
    return Listing(
        training=_leaf(source, f"train/{GOOD}", findings),
        test_normal=test_normal,
        training_folder=f"train/{GOOD}",
        takes_test_normal=False,
        anomalous=anomalous,
        anomalous_folder="test",
        mask_folder="ground_truth",
        masks=_list_masks(source, "ground_truth", findings),
    )


def list_folder(source: Path, findings: Findings) -> Listing:
    _warn_unused(source, "", {"normal", "abnormal", "masks"}, findings)
    anomalous: dict[str, str] = {}
    if (source / "abnormal").is_dir():
        paths, folders = _scan(source, "abnormal", findings)
        anomalous = dict.fromkeys(paths, "abnormal")
        for folder in folders:
            defect = PurePosixPath(folder).name
            if defect == GOOD:
                findings.problem(f"{source}: {folder} is a defect type called {GOOD!r}; move its images into normal")
            anomalous |= dict.fromkeys(_leaf(source, folder, findings), defect)
    return Listing(
        training=_leaf(source, "normal", findings),
        test_normal=[],
        training_folder="normal",
        takes_test_normal=True,
        anomalous=anomalous,
        anomalous_folder="abnormal",
        mask_folder="masks",
        masks=_list_masks(source, "masks", findings),
    )


def _list_masks(source: Path, mask_folder: str, findings: Findings) -> list[str] | None:
    if not (source / mask_folder).is_dir():
        return None
    masks, folders = _scan(source, mask_folder, findings)
    for folder in folders:
        masks += _leaf(source, folder, findings)
    return sorted(masks)


def _scan(source: Path, folder: str, findings: Findings) -> tuple[list[str], list[str]]:
    """The images directly in a folder, and its sub-folders, both sorted; other files get a warning."""
    paths, folders, ignored = [], [], []
    for entry in sorted((source / folder).iterdir(), key=lambda entry: entry.name):
        relative = f"{folder}/{entry.name}"
        if not _is_unicode(relative):
            findings.problem(f"{source}: the name of {relative!a} is not UTF-8; rename it")
        elif entry.is_dir():
            if not entry.name.startswith("."):
                folders.append(relative)
        elif entry.suffix.lower() in images.SUFFIXES:
            paths.append(relative)
        elif not entry.name.startswith(".") and entry.name.lower() not in _SILENTLY_IGNORED:
            ignored.append(relative)
    if ignored:
        findings.warnings.append(f"{counted(len(ignored), 'file')} ignored, of no image type: {some(ignored)}")
    return paths, folders


def _leaf(source: Path, folder: str, findings: Findings) -> list[str]:
    """The images of a folder that holds nothing but images."""
    paths, folders = _scan(source, folder, findings)
    if folders:
        findings.problem(f"{source}: folders among the images of {folder} ({some(folders)}); move them out")
    return paths


def _warn_unused(source: Path, folder: str, used: set[str], findings: Findings) -> None:
    entries = sorted(entry.name for entry in (source / folder).iterdir() if entry.is_dir())
    unused = [f"{folder}/{name}".lstrip("/") for name in entries if name not in used and not name.startswith(".")]
    if unused:
        findings.warnings.append(f"folders that are not used: {some(unused)}")


def _is_unicode(name: str) -> bool:
    """False for a name whose bytes the file system could not decode: JSON cannot hold it."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def some(names: Iterable[str]) -> str:
    """The first three, and how many more."""
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def counted(number: int, noun: str, plural: str = "") -> str:
    return f"1 {noun}" if number == 1 else f"{number} {plural or noun + 's'}"


def pair_masks(source: Path, listing: Listing, findings: Findings) -> dict[str, str]:
    """Image -> mask, for every anomalous image; empty where the category has no masks at all."""
    if listing.masks is None:
        return {}
    owners: defaultdict[str, list[str]] = defaultdict(list)
    missing = []
    for path, found in _candidate_masks(listing, listing.masks).items():
        if not found:
            missing.append(path)
        if len(found) > 1:
            findings.problem(f"{source}: {path} has several masks ({some(found)}); keep one")
        for mask in found:
            owners[mask].append(path)
    if missing:
        findings.problem(
            f"{source}: {counted(len(missing), 'defect image')} without a mask: {some(missing)}; "
            f"add {listing.mask_folder}/.../<stem>_mask.png for each, or remove {listing.mask_folder} altogether"
        )
    for mask, paths in owners.items():
        if len(paths) > 1:
            findings.problem(f"{source}: {mask} fits several images ({some(paths)}); give them different stems")
    if orphans := [mask for mask in listing.masks if mask not in owners]:
        findings.problem(
            f"{source}: {counted(len(orphans), 'mask')} without a defect image in {listing.anomalous_folder}: "
            f"{some(orphans)}; add the images or remove the masks"
        )
    return {paths[0]: mask for mask, paths in owners.items()}


def _candidate_masks(listing: Listing, masks: list[str]) -> dict[str, list[str]]:
    """Anomalous image -> the masks in the same place below the folder of masks, by the one stem or the other."""
    by_place: defaultdict[PurePosixPath, list[str]] = defaultdict(list)
    for mask in masks:
        by_place[PurePosixPath(mask).relative_to(listing.mask_folder).with_suffix("")].append(mask)
    candidates = {}
    for path in listing.anomalous:
        place = PurePosixPath(path).relative_to(listing.anomalous_folder).with_suffix("")
        candidates[path] = by_place[place.with_name(place.name + "_mask")] + by_place[place]
    return candidates
