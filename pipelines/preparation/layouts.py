"""A folder in a known layout -> its files by role, with every problem gathered.

Layouts, found per category:

    mvtec    train/good, test/good, test/<defect>, ground_truth/<defect>/<stem>_mask.png
    folder   normal, optional abnormal (images, or one folder per defect type), optional masks (mirrors abnormal)

The names may have capitals; good parts may be called otherwise in train and test ("OK", "pass", ...). Below them there
may be further folders, one per camera, say. A mask is `<stem>_mask` or `<stem>` with any image suffix, in the folder
that mirrors that of its image. Without a folder of masks, a category has image labels only.
"""

import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from pipelines.data.index import GOOD, Layout
from pipelines.errors import DatasetError, ImageError, told
from pipelines.numbers import counted
from pipelines.pictures import images
from pipelines.preparation.lookalikes import masks_beside, says_bad, says_good, says_masks

_SILENTLY_IGNORED = frozenset({"license.txt", "readme.txt"})


@dataclass(frozen=True, slots=True)
class Findings:
    """What is wrong with a category, and what its user should know; gathered so that all of it is told at once."""

    problems: list[DatasetError] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def problem(self, message: str) -> None:
        self.problems.append(DatasetError(message))

    def add(self, others: "Findings") -> None:
        self.problems.extend(others.problems)
        self.warnings.extend(others.warnings)

    def raise_problems(self, category: str) -> None:
        """The warnings are told too: what was left out may be why something is missing."""
        if not self.problems:
            return
        kind = ImageError if all(isinstance(problem, ImageError) for problem in self.problems) else DatasetError
        heading = f"category {category!r}: {self.problems[0]}"
        if len(self.problems) > 1:
            heading = told(self.problems, f"category {category!r} has {len(self.problems)} problems:")
        raise kind("\n".join([heading, *(f"warning: {warning}" for warning in self.warnings)]))


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
    mvtec = any(_good_folders(source, folder) for folder in _called(source, "train"))
    folder = bool(_called(source, "normal"))
    if mvtec and folder:
        raise DatasetError(f"{source}: holds both train/{GOOD} and normal; keep one of the two layouts")
    if mvtec or folder:
        return "mvtec" if mvtec else "folder"
    names = sorted(entry.name + "/" * entry.is_dir() for entry in source.iterdir())
    found = f"holds {some(names)}" if names else "is empty"
    raise DatasetError(f"{source}: {found}; expected train/{GOOD} and test/ (as in MVTec AD), or normal/")


def list_category(source: Path, layout: Layout, findings: Findings) -> Listing:
    listing = _list_mvtec(source, findings) if layout == "mvtec" else _list_folder(source, findings)
    if found := masks_beside([*listing.training, *listing.test_normal, *listing.anomalous]):
        findings.problem(
            f"{source}: {counted(len(found), 'file')} called like masks, beside their images: {some(found)}; move them "
            f"into {listing.mask_folder} (<stem>_mask.png), or remove them"
        )
    return listing


def _list_mvtec(source: Path, findings: Findings) -> Listing:
    train, test, truth = (_the(source, name, findings) for name in ("train", "test", "ground_truth"))
    _warn_unused(source, "", {train, test, truth}, findings)
    good = _good_folders(source, train)
    _warn_unused(source, train, {PurePosixPath(folder).name for folder in good}, findings)
    test_normal: list[str] = []
    anomalous: dict[str, str] = {}
    if (source / test).is_dir():
        stray, folders = _scan(source, test, findings)
        if stray:
            findings.problem(f"{source}: images directly in {test} ({some(stray)}); move each into {test}/<defect>")
        for folder in folders:
            name = PurePosixPath(folder).name
            if says_good(name):
                test_normal += _all_below(source, folder, findings, _no_good_part)
            else:
                anomalous |= _defects(source, folder, findings)
    good_by_word = [
        folder for folder in [*good, *_good_folders(source, test)] if not folder.lower().endswith(f"/{GOOD}")
    ]
    if good_by_word:
        findings.warnings.append(f"counted as good parts, by their names: {some(good_by_word)}")
    return Listing(
        training=[path for folder in good for path in _all_below(source, folder, findings, _no_good_part)],
        test_normal=test_normal,
        training_folder=some(good),
        takes_test_normal=False,
        anomalous=anomalous,
        anomalous_folder=test,
        mask_folder=truth,
        masks=_list_masks(source, truth, findings),
    )


def _list_folder(source: Path, findings: Findings) -> Listing:
    normal, abnormal, masks = (_the(source, name, findings) for name in ("normal", "abnormal", "masks"))
    if good := [folder for folder in _good_folders(source, "") if folder != normal]:
        findings.problem(
            f"{source}: {some(good)} beside {normal}, by its name of good parts too; move its images there"
        )
    _warn_unused(source, "", {normal, abnormal, masks, *good}, findings)
    anomalous: dict[str, str] = {}
    if (source / abnormal).is_dir():
        paths, folders = _scan(source, abnormal, findings)
        anomalous = dict.fromkeys(paths, "abnormal")
        for folder in folders:
            if says_good(PurePosixPath(folder).name):
                findings.problem(
                    f"{source}: {folder} is a defect type called {PurePosixPath(folder).name!r}; move its images into "
                    f"{normal}"
                )
            anomalous |= _defects(source, folder, findings)
    return Listing(
        training=_all_below(source, normal, findings, _no_good_part),
        test_normal=[],
        training_folder=normal,
        takes_test_normal=True,
        anomalous=anomalous,
        anomalous_folder=abnormal,
        mask_folder=masks,
        masks=_list_masks(source, masks, findings),
    )


def _called(source: Path, name: str) -> list[str]:
    """The folders of that name, with capitals or not: Windows shows no difference."""
    return sorted(entry.name for entry in source.iterdir() if entry.name.lower() == name and entry.is_dir())


def _the(source: Path, name: str, findings: Findings) -> str:
    """The folder of that name, as it is written there; `name` where there is none."""
    found = _called(source, name)
    if len(found) > 1:
        findings.problem(f"{source}: holds {' and '.join(found)}; keep one of them")
    return name if name in found or not found else found[0]


def _good_folders(source: Path, folder: str) -> list[str]:
    """The folders in `folder` whose names say that they hold good parts."""
    if not (source / folder).is_dir():
        return []
    entries = sorted(entry.name for entry in (source / folder).iterdir() if entry.is_dir() and says_good(entry.name))
    return [f"{folder}/{name}".lstrip("/") for name in entries]


def _no_good_part(folder: str) -> bool:
    return says_bad(folder) or says_masks(folder)


def _no_defect(folder: str) -> bool:
    return says_good(folder) or says_masks(folder)


def _defects(source: Path, folder: str, findings: Findings) -> dict[str, str]:
    """The images of a type of defect."""
    name = PurePosixPath(folder).name
    if says_masks(name):
        findings.problem(f"{source}: {folder} is called like a folder of masks; move it out of the defects")
    return dict.fromkeys(_all_below(source, folder, findings, _no_defect), name)


def _list_masks(source: Path, mask_folder: str, findings: Findings) -> list[str] | None:
    if not (source / mask_folder).is_dir():
        return None
    return _all_below(source, mask_folder, findings, lambda _: False)


def _all_below(
    source: Path, folder: str, findings: Findings, is_misplaced: Callable[[str], bool], above: tuple[Path, ...] = ()
) -> list[str]:
    """The images in a folder and in those below it, one per camera, say; sorted.

    `is_misplaced` says of a folder's name that it cannot hold what the others do.
    """
    paths, folders = _scan(source, folder, findings)
    above = (*above, (source / folder).resolve())
    for inner in folders:
        name = PurePosixPath(inner).name
        if is_misplaced(name):
            findings.problem(
                f"{source}: {inner} contradicts the folder that it is in; move its images where they belong"
            )
        elif (source / inner).resolve() in above:
            findings.problem(f"{source}: {inner} is a link to a folder that it is in; remove it")
        else:
            paths += _all_below(source, inner, findings, is_misplaced, above)
    return sorted(paths)


def _scan(source: Path, folder: str, findings: Findings) -> tuple[list[str], list[str]]:
    """The images directly in a folder, and its sub-folders, both sorted; other files get a warning."""
    paths, folders, ignored = [], [], []
    for entry in sorted((source / folder).iterdir(), key=lambda entry: entry.name):
        relative = f"{folder}/{entry.name}"
        if images.is_litter(entry.name):
            continue
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
        findings.warnings.append(
            f"{counted(len(ignored), 'file')} ignored, of no image type: {some(ignored)} (read are "
            f"{' '.join(sorted(images.SUFFIXES))}: rename what is one of them, save what is not)"
        )
    return paths, folders


def _warn_unused(source: Path, folder: str, used: set[str], findings: Findings) -> None:
    entries = sorted(entry.name for entry in (source / folder).iterdir() if entry.is_dir())
    unused = [
        f"{folder}/{name}".lstrip("/")
        for name in entries
        if name not in used and not name.startswith(".") and not images.is_litter(name)
    ]
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


def find_dead_links(source: Path, findings: Findings) -> None:
    """Those that nobody reads, too: DVC would end at them. Of an image, its reader tells."""
    links = [path for path in sorted(source.rglob("*")) if path.is_symlink() and not path.exists()]
    if dead := [str(path.relative_to(source)) for path in links if path.suffix.lower() not in images.SUFFIXES]:
        findings.problem(
            f"{source}: {counted(len(dead), 'link')} to nothing: {some(dead)}; remove what DVC cannot follow"
        )


def pair_masks(source: Path, listing: Listing, max_megapixels: int, findings: Findings) -> dict[str, str]:
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
    unpaired = [mask for mask in listing.masks if mask not in owners]
    if orphans := [mask for mask in unpaired if not _is_black(source / mask, max_megapixels)]:
        findings.problem(
            f"{source}: {counted(len(orphans), 'mask')} without a defect image in {listing.anomalous_folder}: "
            f"{some(orphans)}; add the images or remove the masks"
        )
    return {paths[0]: mask for mask, paths in owners.items()}


def _candidate_masks(listing: Listing, masks: list[str]) -> dict[str, list[str]]:
    """Anomalous image -> the masks in the same place below the folder of masks, by the one stem or the other."""
    by_place: defaultdict[PurePosixPath, list[str]] = defaultdict(list)
    for mask in masks:
        by_place[_place(mask, listing.mask_folder)].append(mask)
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
