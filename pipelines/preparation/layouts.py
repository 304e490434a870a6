"""A folder in a known layout -> its files by role, with every problem gathered.

Layouts, found per category where `prepare.layout` does not name one:

    mvtec    train/good, test/good, test/<defect>, ground_truth/<defect>/<stem>_mask.png
    folder   normal, optional abnormal (images, or one folder per defect type), optional masks (mirrors abnormal)

and those in which other benchmarks are published (`published`). In these two, names may have capitals; good parts may
be called otherwise in train and test ("OK", "pass", ...). Below them there may be further folders, one per camera, say.
A mask is `<stem>_mask` or `<stem>` with any image suffix, in the folder that mirrors that of its image. Without a
folder of masks, a category has image labels only.
"""

from collections.abc import Callable
from pathlib import Path, PurePosixPath

from pipelines.data.index import GOOD, Layout
from pipelines.errors import DatasetError
from pipelines.numbers import counted
from pipelines.preparation import published
from pipelines.preparation.config import LayoutName
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
from pipelines.preparation.lookalikes import masks_beside, says_good

_SIGNS: dict[Layout, tuple[str, ...]] = {  # folders by which a layout is known, and no other has all of
    "visa": ("Data/Images/Normal",),
    "mtd": ("MT_Free/Imgs",),
    "ad2": ("train/good", "test_public"),
    "btad": ("train/ok", "test/ok", "test/ko", "ground_truth/ko"),
}
_TYPES_OF_LOCO = ("logical_anomalies", "structural_anomalies")  # the one or the other
_READ_ALIKE: set[Layout] = {"mvtec", "btad", "dtd_synthetic"}


def choose_layout(source: Path, name: LayoutName, findings: Findings) -> Layout:
    """The layout that `name` says, or that the folders show where it is "auto".

    Raises:
        DatasetError: there is no such folder; or the folders that the layout takes are not in it, or nothing shows one.
    """
    if not source.is_dir():
        raise DatasetError(f"{source}: no such folder; put the images there or correct the path in params.yaml")
    shown = _shown(source)
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
    names = sorted(entry.name + "/" * entry.is_dir() for entry in source.iterdir())
    found = f"holds {some(names)}" if names else "is empty"
    raise DatasetError(
        f"{source}: {found}; expected train/{GOOD} and test/ (as in MVTec AD), or normal/, or another layout of "
        "docs/layouts.md"
    )


def _shown(source: Path) -> list[Layout]:
    """The layouts that the folders may be in; MVTec AD's, from which others come, where it is none of these."""
    found = [layout for layout, folders in _SIGNS.items() if all((source / folder).is_dir() for folder in folders)]
    loco = [source / "test" / name for name in _TYPES_OF_LOCO]
    if (source / "validation" / GOOD).is_dir() and any(folder.is_dir() for folder in loco):
        found.append("loco")
    if not found and any(good_folders(source, folder) for folder in called(source, "train")):
        found.append("mvtec")
    return [*found, "folder"] if called(source, "normal") else found


def _missing(source: Path, layout: Layout) -> list[str]:
    """What the layout has and the folder has not."""
    if layout == "folder":
        return [] if called(source, "normal") else ["normal"]
    if layout == "mvtec":
        return [] if any(good_folders(source, folder) for folder in called(source, "train")) else [f"train/{GOOD}"]
    return [name for name in published.NEEDED[layout] if not (source / name).exists()]


def list_category(source: Path, layout: Layout, findings: Findings) -> Listing:
    listing = _LISTED[layout](source, findings)
    if listing.masks_beside_images:
        return listing
    pictures = [*listing.training, *(listing.holdout or []), *listing.test_normal, *listing.anomalous]
    if found := masks_beside(pictures):
        findings.problem(
            f"{source}: {counted(len(found), 'file')} called like masks, beside their images: {some(found)}; move them "
            f"into {listing.mask_folder} (<stem>_mask.png), or remove them"
        )
    return listing


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
    normal, abnormal, masks = (the_folder(source, name, findings) for name in ("normal", "abnormal", "masks"))
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
