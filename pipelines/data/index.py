"""What row i of a category's prepared arrays is: the index that `prepare` writes and every later stage reads."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pipelines.errors import StageError
from pipelines.files import read_json
from pipelines.paths import INDEX_FILE
from pipelines.pictures.images import Filter

FORMAT = 3  # of a prepared folder; raised when what is written changes
Layout = Literal["mvtec", "folder"]
Split = Literal["train", "holdout", "anomalous_train", "test"]
GOOD = "good"  # the defect type of a normal image


@dataclass(frozen=True, slots=True)
class IndexedImage:
    """What is known about row i of the arrays."""

    path: str  # relative to the category's folder, posix
    split: Split
    label: bool  # True where anomalous
    defect: str  # "good", or the type of defect
    width: int  # of the upright original, pixels
    height: int
    mask: str | None  # relative to the category's folder, posix
    mask_row: int | None  # row in the arrays of masks


@dataclass(frozen=True, slots=True)
class PreparedIndex:
    """Contents of a prepared folder; `images[i]` describes row i of each array of images."""

    category: str
    layout: Layout
    image_sizes: Mapping[Filter, tuple[int, ...]]
    white_level: int
    has_masks: bool
    surface: bool  # the category fills the image
    counts: Mapping[str, int]  # train, holdout, anomalous_train, test_normal, test_anomalous
    data_sha256: str  # of every image and mask used, with its path
    warnings: tuple[str, ...]  # one line each, for the user
    images: tuple[IndexedImage, ...]

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read the index of a prepared folder.

        Raises:
            StageError: the folder is missing, or was made by another version.
        """
        remedy = f"run `blemish prepare {folder.name}`"
        if not (folder / INDEX_FILE).is_file():
            raise StageError(f"{folder}: no prepared images; {remedy}")
        content = read_json(folder / INDEX_FILE)
        if (found := content.pop("format", None)) != FORMAT:
            raise StageError(f"{folder}: prepared in format {found}, this version reads {FORMAT}; {remedy}")
        return cls(
            **content
            | {
                "image_sizes": {resize: tuple(sizes) for resize, sizes in content["image_sizes"].items()},
                "warnings": tuple(content["warnings"]),
                "images": tuple(IndexedImage(**image) for image in content["images"]),
            }
        )

    def rows(self, split: Split) -> list[int]:
        return [row for row, image in enumerate(self.images) if image.split == split]


def images_file(folder: Path, size: int, resize: Filter) -> Path:
    """Where a prepared folder holds its images (N, size, size, 3), uint8."""
    return folder / f"images_{size}_{resize}.npy"


def masks_file(folder: Path, size: int) -> Path:
    """Where a prepared folder holds the masks of its anomalous images (M, size, size), bool; absent without masks."""
    return folder / f"masks_{size}.npy"
