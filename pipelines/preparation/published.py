"""The layouts of published benchmarks, each as its authors' archive has it: a folder -> its files by role.

    visa           VisA (Zou et al., ECCV 2022): Data/Images/{Normal,Anomaly}, Data/Masks/Anomaly, and beside the
                   categories split_csv/1cls.csv, which says what trains and what tests
    loco           MVTec LOCO AD (Bergmann et al., IJCV 130, 2022): train/good, validation/good, test/good,
                   test/{logical,structural}_anomalies, ground_truth/<type>/<stem>/000.png, defects_config.json
    ad2            MVTec AD 2 (Heckler-Kram et al., arXiv 2503.21622, 2025): train/good, validation/good,
                   test_public/{good,bad}, test_public/ground_truth/bad/<stem>_mask.png
    btad           BTAD (Mishra et al., ISIE 2021): train/ok, test/{ok,ko}, ground_truth/ko/<stem>.png or .bmp
    mtd            Magnetic tile defects (Huang et al., The Visual Computer 36, 2020): MT_Free/Imgs, MT_<Defect>/Imgs,
                   the mask <stem>.png beside <stem>.jpg; no split was published
    dtd_synthetic  DTD-Synthetic (Aota et al., WACV 2023): train/good, test/{good,bad}, ground_truth/bad/<stem>_mask.png

A split for validation is there to set thresholds by, so it is what is held out.
"""

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from anomaly_models.common.settings import Settings
from pipelines.data.index import Layout
from pipelines.errors import DatasetError
from pipelines.numbers import counted
from pipelines.preparation.listing import (
    Findings,
    Listing,
    Saturation,
    defects_in,
    list_masks,
    normals_in,
    scan,
    some,
    warn_unused,
)

_SPLIT_FILE = "split_csv/1cls.csv"  # of VisA, beside its categories
_DEFECTS_FILE = "defects_config.json"  # of MVTec LOCO, in each category

NEEDED: Mapping[Layout, tuple[str, ...]] = {  # what a category has in each
    "visa": ("Data/Images/Normal", "Data/Images/Anomaly", "Data/Masks/Anomaly"),
    "loco": ("train/good", "validation/good", "test/good", "ground_truth", _DEFECTS_FILE),
    "ad2": ("train/good", "validation/good", "test_public/good", "test_public/bad", "test_public/ground_truth/bad"),
    "btad": ("train/ok", "test/ok", "test/ko", "ground_truth/ko"),
    "mtd": ("MT_Free/Imgs",),
    "dtd_synthetic": ("train/good", "test/good", "test/bad", "ground_truth/bad"),
}


# ---- with the folders of MVTec AD, more or less ----------------------------------------------------------------------


def btad(source: Path, findings: Findings) -> Listing:
    return _with_masks_in_one_folder(source, "ok", "ko", "<stem>.png", findings)


def dtd_synthetic(source: Path, findings: Findings) -> Listing:
    return _with_masks_in_one_folder(source, "good", "bad", "<stem>_mask.png", findings)


def _with_masks_in_one_folder(source: Path, good: str, bad: str, mask: str, findings: Findings) -> Listing:
    warn_unused(source, "", {"train", "test", "ground_truth"}, findings)
    warn_unused(source, "test", {good, bad}, findings)
    return Listing(
        training=normals_in(source, f"train/{good}", findings),
        test_normal=normals_in(source, f"test/{good}", findings),
        training_folder=f"train/{good}",
        takes_test_normal=False,
        anomalous=defects_in(source, f"test/{bad}", findings),
        anomalous_folder="test",
        mask_folder="ground_truth",
        masks=list_masks(source, "ground_truth", findings),
        mask_remedy=f"add ground_truth/{bad}/{mask} for each",
    )


def ad2(source: Path, findings: Findings) -> Listing:
    private = {folder.name for folder in source.glob("test_private*") if folder.is_dir()}
    if private:
        findings.notes.append(f"{' and '.join(sorted(private))} not used: their labels are not published")
    warn_unused(source, "", {"train", "validation", "test_public", *private}, findings)
    warn_unused(source, "test_public", {"good", "bad", "ground_truth"}, findings)
    return Listing(
        training=normals_in(source, "train/good", findings),
        holdout=_published_holdout(source, findings),
        test_normal=normals_in(source, "test_public/good", findings),
        training_folder="train/good",
        takes_test_normal=False,
        anomalous=defects_in(source, "test_public/bad", findings),
        anomalous_folder="test_public",
        mask_folder="test_public/ground_truth",
        masks=list_masks(source, "test_public/ground_truth", findings),
        mask_remedy="add test_public/ground_truth/bad/<stem>_mask.png for each",
    )


def _published_holdout(source: Path, findings: Findings) -> list[str]:
    findings.notes.append("validation/good is held out, as published; prepare.holdout is not used")
    return normals_in(source, "validation/good", findings)


# ---- MVTec LOCO AD ---------------------------------------------------------------------------------------------------


class _Defect(Settings):
    """An entry of `defects_config.json`."""

    defect_name: str
    pixel_value: int = Field(ge=1, le=255)  # of its masks
    saturation_threshold: float = Field(gt=0)  # pixels, or a share
    relative_saturation: bool

    @model_validator(mode="after")
    def _no_more_than_all(self) -> "_Defect":
        if self.relative_saturation and self.saturation_threshold > 1:
            raise ValueError("a relative saturation_threshold is at most 1")
        return self


def loco(source: Path, findings: Findings) -> Listing:
    warn_unused(source, "", {"train", "validation", "test", "ground_truth"}, findings)
    _, folders = scan(source, "test", findings)
    anomalous = [folder for folder in folders if folder != "test/good"]
    return Listing(
        training=normals_in(source, "train/good", findings),
        holdout=_published_holdout(source, findings),
        test_normal=normals_in(source, "test/good", findings),
        training_folder="train/good",
        takes_test_normal=False,
        anomalous={path: kind for folder in anomalous for path, kind in defects_in(source, folder, findings).items()},
        anomalous_folder="test",
        mask_folder="ground_truth",
        masks=list_masks(source, "ground_truth", findings),
        mask_remedy="add ground_truth/<type>/<stem>/000.png for each",
        saturations=_saturations(source / _DEFECTS_FILE),
    )


def _saturations(file: Path) -> dict[int, Saturation]:
    """How much of each defect counts as all of it, by the grey value of its masks."""
    try:
        entries = TypeAdapter(list[_Defect]).validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        what = error.strerror if isinstance(error, OSError) else _first_of(error)
        raise DatasetError(f"{file}: {what}; copy it from the published archive again") from None
    return {entry.pixel_value: Saturation(entry.saturation_threshold, entry.relative_saturation) for entry in entries}


def _first_of(error: ValidationError) -> str:
    first = error.errors()[0]
    return ": ".join([*(".".join(map(str, first["loc"])) for _ in first["loc"][:1]), first["msg"]])


# ---- VisA ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Row:
    """A row of VisA's split file; paths are relative to the category's folder."""

    split: Literal["train", "test"]
    anomalous: bool
    image: str
    mask: str | None


def visa(source: Path, findings: Findings) -> Listing:
    file = source.parent / _SPLIT_FILE
    rows = list(_rows_of(file, source.name))
    there = {path for name in ("Images/Normal", "Images/Anomaly") for path in scan(source, f"Data/{name}", findings)[0]}
    named = {row.image for row in rows}
    if lacking := sorted(named - there):
        findings.problem(f"{file}: {counted(len(lacking), 'image')} of {source.name} not there: {some(lacking)}")
    if unnamed := sorted(there - named):
        findings.warnings.append(f"{counted(len(unnamed), 'image')} not in {_SPLIT_FILE}, not used: {some(unnamed)}")
    rows = [row for row in rows if row.image in there]
    return Listing(
        training=sorted(row.image for row in rows if row.split == "train"),
        test_normal=sorted(row.image for row in rows if row.split == "test" and not row.anomalous),
        training_folder=f"the train split of {_SPLIT_FILE}",
        takes_test_normal=False,
        anomalous=dict.fromkeys(sorted(row.image for row in rows if row.anomalous), "anomaly"),
        anomalous_folder="Data/Images",
        mask_folder="Data/Masks",
        masks=sorted(row.mask for row in rows if row.mask is not None),
        mask_remedy=f"name Data/Masks/Anomaly/<stem>.png for each in {_SPLIT_FILE}",
        split_file=file,
    )


def _rows_of(file: Path, category: str) -> Iterator[_Row]:
    """The rows of one category.

    Raises:
        DatasetError: the file is not there, is no such table, has no row of the category, or one that says nothing.
    """
    if not file.is_file():
        raise DatasetError(
            f"{file}: no such file, and VisA says in it which image is for what; copy it from the published archive"
        )
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            table = csv.DictReader(lines, strict=True)
            if lacking := {"object", "split", "label", "image", "mask"} - set(table.fieldnames or ()):
                raise DatasetError(f"{file}: no column {some(sorted(lacking))}; copy it from the published archive")
            numbered = [(table.line_num, row) for row in table if row["object"] == category]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{file}: cannot be read ({error}); copy it from the published archive") from None
    if not numbered:
        raise DatasetError(f"{file}: no row of the object {category}; call the category as the file does")
    for number, row in numbered:
        yield _row(row, f"{file}: line {number}", category)


def _row(row: Mapping[str, str | None], place: str, category: str) -> _Row:
    split, label = row["split"], row["label"]
    if split not in ("train", "test") or label not in ("normal", "anomaly"):
        raise DatasetError(f"{place} says {split} and {label}; expected train or test, and normal or anomaly")
    if (split, label) == ("train", "anomaly"):
        raise DatasetError(f"{place} is an anomaly to train on; expected normal images alone there")
    image = _below(row["image"], place, category)
    mask = _below(row["mask"], place, category) if row["mask"] else None
    return _Row("train" if split == "train" else "test", label == "anomaly", image, mask)


def _below(path: str | None, place: str, category: str) -> str:
    """A path of the split file, relative to the category's folder."""
    parts = PurePosixPath(path or "").parts
    if parts[:1] != (category,) or ".." in parts:
        raise DatasetError(f"{place} names {path}; expected {category}/Data/...")
    return "/".join(parts[1:])


# ---- magnetic tiles --------------------------------------------------------------------------------------------------


def mtd(source: Path, findings: Findings) -> Listing:
    folders = sorted(folder.name for folder in source.glob("MT_*") if (folder / "Imgs").is_dir())
    warn_unused(source, "", set(folders), findings)
    images, masks = dict[str, list[str]](), list[str]()
    for name in folders:
        files = scan(source, f"{name}/Imgs", findings)[0]
        images[name] = [path for path in files if not _is_mask(path)]
        masks += [path for path in files if _is_mask(path)]
    training = images.pop("MT_Free")
    return Listing(
        training=training,
        test_normal=[],
        training_folder="MT_Free/Imgs",
        takes_test_normal=True,
        anomalous={path: name.removeprefix("MT_") for name in images for path in images[name]},
        anomalous_folder="",
        mask_folder="",
        masks=masks,
        mask_remedy="add <stem>.png beside each",
        masks_beside_images=True,
    )


def _is_mask(path: str) -> bool:
    return path.lower().endswith(".png")
