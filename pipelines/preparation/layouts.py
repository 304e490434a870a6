"""A folder in a known layout -> its files by role, with every problem gathered.

Layouts, found per category where `prepare.layout` does not name one:

    mvtec    train/good, test/good, test/<defect>, ground_truth/<defect>/<stem>_mask.png
    folder   normal, optional abnormal (images, or one folder per defect type), optional masks (mirrors abnormal)

and those in which other benchmarks are published (`published`). In these two, names may have capitals; good parts may
be called otherwise ("OK", "pass", ...), and so may `abnormal` ("NG", "defect", ...). Below them there may be further
folders, one per camera, say. A mask is `<stem>_mask` or `<stem>` with any image suffix, in the folder that mirrors that
of its image. Without a folder of masks, a category has image labels only.
"""

from collections.abc import Callable
from pathlib import Path, PurePosixPath

from pipelines.data.index import GOOD, Layout
from pipelines.errors import DatasetError
from pipelines.numbers import counted
from pipelines.pictures.images import SUFFIXES, is_litter
from pipelines.preparation import published
from pipelines.preparation.config import LayoutName
from pipelines.preparation.frozen import with_learnt
from pipelines.preparation.listing import (
    Findings,
    Listing,
    called,
    defects_in,
    good_folders,
    list_masks,
    normals_in,
    scan,
    some,
    the_folder,
    warn_unused,
)
from pipelines.preparation.lookalikes import masks_beside, says_bad, says_good

_SIGNS: dict[Layout, tuple[str, ...]] = {  # folders by which a layout is known, and no other has all of
    "visa": ("Data/Images/Normal",),
    "mtd": ("MT_Free/Imgs",),
    "ad2": ("train/good", "test_public"),
    "btad": ("train/ok", "test/ok", "test/ko", "ground_truth/ko"),
}
_TYPES_OF_LOCO = ("logical_anomalies", "structural_anomalies")  # the one or the other
_PLAIN = {"normal": says_good, "abnormal": says_bad}  # the folders of that layout, which may be called otherwise
_READ_ALIKE: set[Layout] = {"mvtec", "btad", "dtd_synthetic"}


def choose_layout(source: Path, name: LayoutName, findings: Findings) -> Layout:
    """The layout that `name` says, or that the folders show where it is "auto".

    Raises:
        DatasetError: there is no such folder; or the folders that the layout takes are not in it, or nothing shows one.
    """
    if not source.is_dir():
        raise DatasetError(f"{source}: no such folder; put the images there or correct the path in params.yaml")
    shown = shown_layouts(source)
    if name == "auto":
        layout = _only(source, shown)
        if missing := _missing(source, layout):
            raise DatasetError(
                f"{source}: its folders look like {layout}, but there is no {some(missing)}; add what is missing, or "
                "name another layout in prepare.layout"
            )
        findings.notes.append(f"layout {layout}, as its folders show; prepare.layout names another")
        return layout
    others = [layout for layout in shown if layout != name and not {layout, name} <= _READ_ALIKE]
    looks = f"its folders look like {' and '.join(others)}" if others else ""
    if missing := _missing(source, name):
        hint = f"; {looks}" if looks else ""
        raise DatasetError(f"{source}: no {some(missing)}, which the layout {name} of prepare.layout has{hint}")
    if looks and name not in shown:
        findings.warnings.append(f"read in the layout {name} of prepare.layout, but {looks}")
    return name


def _only(source: Path, shown: list[Layout]) -> Layout:
    if len(shown) == 1:
        return shown[0]
    if sorted(shown) == ["folder", "mvtec"]:
        raise DatasetError(
            f"{source}: holds both train/{GOOD} and normal; keep one of the two, or name the layout in prepare.layout"
        )
    if shown:
        raise DatasetError(f"{source}: its folders look like {' and '.join(shown)}; name one of them in prepare.layout")
    entries = [entry for entry in source.iterdir() if not is_litter(entry.name)]
    loose = [entry for entry in entries if entry.suffix.lower() in SUFFIXES]
    if loose and not any(entry.is_dir() for entry in entries):
        raise DatasetError(
            f"{source}: {counted(len(loose), 'picture')} in the folder itself, which does not say what is good: move "
            "good parts into normal/, and defective ones, if there are any, into abnormal/"
        )
    names = sorted(entry.name + "/" * entry.is_dir() for entry in source.iterdir())
    found = f"holds {some(names)}" if names else "is empty"
    raise DatasetError(
        f"{source}: {found}; expected train/{GOOD} and test/ (as in MVTec AD), or normal/, or another layout of "
        "docs/layouts.md"
    )


def shown_layouts(source: Path) -> list[Layout]:
    """The layouts that the folders may be in; MVTec AD's, from which others come, where it is none of these."""
    found = [layout for layout, folders in _SIGNS.items() if all((source / folder).is_dir() for folder in folders)]
    loco = [source / "test" / name for name in _TYPES_OF_LOCO]
    if (source / "validation" / GOOD).is_dir() and any(folder.is_dir() for folder in loco):
        found.append("loco")
    if not found and any(good_folders(source, folder) for folder in called(source, "train")):
        found.append("mvtec")
    return [*found, "folder"] if _normal_folders(source) else found


def _normal_folders(source: Path) -> list[str]:
    """Those of a plain folder's good parts: called "normal", or else by a word that says as much."""
    return called(source, "normal") or good_folders(source, "")


def _missing(source: Path, layout: Layout) -> list[str]:
    """What the layout has and the folder has not."""
    if layout == "folder":
        return [] if _normal_folders(source) else ["normal"]
    if layout == "mvtec":
        return [] if any(good_folders(source, folder) for folder in called(source, "train")) else [f"train/{GOOD}"]
    return [name for name in published.NEEDED[layout] if not (source / name).exists()]


def list_category(source: Path, layout: Layout, findings: Findings) -> Listing:
    """All files by role, and what is wrong with them."""
    listing = _LISTED[layout](source, findings)
    if not listing.masks_beside_images and (found := masks_beside(listing.pictures)):
        findings.problem(
            f"{source}: {counted(len(found), 'file')} called like masks, beside their images: {some(found)}; move them "
            f"into {listing.mask_folder} (<stem>_mask.png), or remove them"
        )
    return with_learnt(source, listing, findings)


def _list_mvtec(source: Path, findings: Findings) -> Listing:
    train, test, truth = (the_folder(source, name, findings) for name in ("train", "test", "ground_truth"))
    warn_unused(source, "", {train, test, truth}, findings)
    good = good_folders(source, train)
    warn_unused(source, train, {PurePosixPath(folder).name for folder in good}, findings)
    test_normal: list[str] = []
    anomalous: dict[str, str] = {}
    if (source / test).is_dir():
        stray, folders = scan(source, test, findings)
        if stray:
            findings.problem(f"{source}: images directly in {test} ({some(stray)}); move each into {test}/<defect>")
        for folder in folders:
            name = PurePosixPath(folder).name
            if says_good(name):
                test_normal += normals_in(source, folder, findings)
            else:
                anomalous |= defects_in(source, folder, findings)
    good_by_word = [
        folder for folder in [*good, *good_folders(source, test)] if not folder.lower().endswith(f"/{GOOD}")
    ]
    if good_by_word:
        findings.warnings.append(f"counted as good parts, by their names: {some(good_by_word)}")
    return Listing(
        training=[path for folder in good for path in normals_in(source, folder, findings)],
        test_normal=test_normal,
        training_folder=some(good),
        takes_test_normal=False,
        anomalous=anomalous,
        anomalous_folder=test,
        mask_folder=truth,
        masks=list_masks(source, truth, findings),
        mask_remedy=f"add {truth}/.../<stem>_mask.png for each, or remove {truth} altogether",
    )


def _list_folder(source: Path, findings: Findings) -> Listing:
    normal, abnormal = (_only_folder(source, name, says, findings) for name, says in _PLAIN.items())
    masks = the_folder(source, "masks", findings)
    if by_word := [name for name in (normal, abnormal) if name.lower() not in _PLAIN and (source / name).is_dir()]:
        findings.warnings.append(f"{some(by_word)}: taken for good or defective parts by their names")
    if good := [folder for folder in good_folders(source, "") if folder != normal]:
        findings.problem(
            f"{source}: {some(good)} beside {normal}, by its name of good parts too; move its images there"
        )
    warn_unused(source, "", {normal, abnormal, masks, *good}, findings)
    anomalous: dict[str, str] = {}
    if (source / abnormal).is_dir():
        paths, folders = scan(source, abnormal, findings)
        anomalous = dict.fromkeys(paths, "abnormal")
        for folder in folders:
            if says_good(PurePosixPath(folder).name):
                findings.problem(
                    f"{source}: {folder} is a defect type called {PurePosixPath(folder).name!r}; move its images into "
                    f"{normal}"
                )
            anomalous |= defects_in(source, folder, findings)
    return Listing(
        training=normals_in(source, normal, findings),
        test_normal=[],
        training_folder=normal,
        takes_test_normal=True,
        anomalous=anomalous,
        anomalous_folder=abnormal,
        mask_folder=masks,
        masks=list_masks(source, masks, findings),
        mask_remedy=f"add {masks}/.../<stem>_mask.png for each, or remove {masks} altogether",
    )


def _only_folder(source: Path, name: str, says: Callable[[str], bool], findings: Findings) -> str:
    """The folder called `name`, or else the one whose name says as much."""
    if called(source, name):
        return the_folder(source, name, findings)
    found = sorted(entry.name for entry in source.iterdir() if entry.is_dir() and says(entry.name))
    if len(found) > 1:
        findings.problem(f"{source}: holds {' and '.join(found)}; keep one of them, or call one {name}")
    return found[0] if found else name


_LISTED: dict[Layout, Callable[[Path, Findings], Listing]] = {
    "mvtec": _list_mvtec,
    "folder": _list_folder,
    "visa": published.visa,
    "loco": published.loco,
    "ad2": published.ad2,
    "btad": published.btad,
    "mtd": published.mtd,
    "dtd_synthetic": published.dtd_synthetic,
}
