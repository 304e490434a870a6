"""What a category's folder holds: its files by role, and what is wrong with them; how folders are searched."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from pipelines.errors import DatasetError, ImageError, told
from pipelines.numbers import counted
from pipelines.pictures import images
from pipelines.preparation.lookalikes import says_bad, says_good, says_masks

Masks = tuple[str, ...]  # of one image, sorted; several in MVTec LOCO alone

LEARNT = "learnt"  # a category's folder of pictures that people gave a verdict on, and that `blemish learn` put there
_SILENTLY_IGNORED = frozenset({"license.txt", "readme.txt"})


@dataclass(frozen=True, slots=True)
class Findings:
    """What is wrong with a category, and what its user should know; gathered so that all of it is told at once."""

    problems: list[DatasetError] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what was decided, where nothing is wrong

    def problem(self, message: str) -> None:
        self.problems.append(DatasetError(message))

    def add(self, others: "Findings") -> None:
        self.problems.extend(others.problems)
        self.warnings.extend(others.warnings)
        self.notes.extend(others.notes)

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
class Saturation:
    """How much of a defect counts as all of it: sPRO of MVTec LOCO AD (Bergmann et al., IJCV 130, 2022)."""

    threshold: float  # pixels of the original, or a share of the defect
    relative: bool

    def pixels(self, area: int) -> int:
        """Of a defect of `area` pixels; rounded down, as the published evaluation does, and one at the least."""
        return max(int(min(self.threshold * area if self.relative else self.threshold, area)), 1)


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a category by role; paths are relative to its folder, posix, sorted."""

    training: list[str]  # normals to fit and, where there is no `holdout`, to hold out
    test_normal: list[str]
    training_folder: str
    takes_test_normal: bool  # the layout has no normal test images of its own
    anomalous: dict[str, str]  # path -> type of defect
    anomalous_folder: str
    mask_folder: str
    masks: list[str] | None  # None: no such folder
    mask_remedy: str  # what to do where an image has no mask
    holdout: list[str] | None = None  # where the data set was published with such a split
    masks_beside_images: bool = False  # in the same folders, where their suffix tells them apart
    saturations: Mapping[int, Saturation] | None = None  # by grey value; then each mask is one defect of that value
    split_file: Path | None = None  # that says which image is which; beside the category's folder, or LEARNT in it
    learnt: Mapping[str, str] = field(default_factory=dict)  # path -> "good" or type of defect, of LEARNT's pictures

    @property
    def pictures(self) -> list[str]:
        """All but the masks."""
        return [*self.training, *(self.holdout or []), *self.test_normal, *self.anomalous, *self.learnt]


def called(source: Path, name: str) -> list[str]:
    """The folders of that name, with capitals or not: Windows shows no difference."""
    return sorted(entry.name for entry in source.iterdir() if entry.name.lower() == name and entry.is_dir())


def the_folder(source: Path, name: str, findings: Findings) -> str:
    """The folder of that name, as it is written there; `name` where there is none."""
    found = called(source, name)
    if len(found) > 1:
        findings.problem(f"{source}: holds {' and '.join(found)}; keep one of them")
    return name if name in found or not found else found[0]


def good_folders(source: Path, folder: str) -> list[str]:
    """The folders in `folder` whose names say that they hold good parts."""
    if not (source / folder).is_dir():
        return []
    entries = sorted(entry.name for entry in (source / folder).iterdir() if entry.is_dir() and says_good(entry.name))
    return [f"{folder}/{name}".lstrip("/") for name in entries]


def normals_in(source: Path, folder: str, findings: Findings) -> list[str]:
    """The images of good parts."""
    return all_below(source, folder, findings, lambda name: says_bad(name) or says_masks(name))


def _no_defect(folder: str) -> bool:
    return says_good(folder) or says_masks(folder)


def defects_in(source: Path, folder: str, findings: Findings) -> dict[str, str]:
    """The images of a type of defect."""
    name = PurePosixPath(folder).name
    if says_masks(name):
        findings.problem(f"{source}: {folder} is called like a folder of masks; move it out of the defects")
    return dict.fromkeys(all_below(source, folder, findings, _no_defect), name)


def list_masks(source: Path, mask_folder: str, findings: Findings) -> list[str] | None:
    if not (source / mask_folder).is_dir():
        return None
    return all_below(source, mask_folder, findings, lambda _: False)


def all_below(
    source: Path, folder: str, findings: Findings, is_misplaced: Callable[[str], bool], above: tuple[Path, ...] = ()
) -> list[str]:
    """The images in a folder and in those below it, one per camera, say; sorted.

    `is_misplaced` says of a folder's name that it cannot hold what the others do.
    """
    paths, folders = scan(source, folder, findings)
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
            paths += all_below(source, inner, findings, is_misplaced, above)
    return sorted(paths)


def scan(source: Path, folder: str, findings: Findings) -> tuple[list[str], list[str]]:
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


def warn_unused(source: Path, folder: str, used: set[str], findings: Findings) -> None:
    entries = sorted(entry.name for entry in (source / folder).iterdir() if entry.is_dir())
    used = used if folder else {*used, LEARNT}
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
