"""What row i of a category's prepared arrays is: the index that `prepare` writes and every later stage reads."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter
from pydantic_core import from_json

from anomaly_models.common.sizes import Size
from pipelines.errors import StageError
from pipelines.files import file_sha256, write_json
from pipelines.paths import INDEX_FILE
from pipelines.pictures.frames import Frame, Shape, read_back
from pipelines.pictures.reading import AboveWhite
from pipelines.pictures.windows import Window
from pipelines.unreadable import reading

FORMAT = 7  # of a prepared folder; raised when what is written changes
Layout = Literal["mvtec", "folder", "visa", "loco", "ad2", "btad", "mtd", "dtd_synthetic"]
# Some models learn from the real defects of `anomalous_train`, and are not tested on them, nor on those `withheld`.
# Whether others are, `PreparedIndex.tested` says. From those `known` no model learns, nor is any tested on them.
Split = Literal["train", "holdout", "anomalous_train", "withheld", "known", "test"]
MAY_BE_TESTED: tuple[Split, ...] = ("test", "anomalous_train", "withheld")
_SEEN_BY = "seen_by"  # a prepared folder's folder of a record for each model
GOOD = "good"  # the defect type of a normal image


@dataclass(frozen=True, slots=True)
class IndexedMask:
    """A file that marks a defect, or all defects, of an image."""

    path: str  # relative to the category's folder, posix
    sha256: str  # of the file
    saturation: int | None  # pixels of the original that count as all of its defect; None but in MVTec LOCO


@dataclass(frozen=True, slots=True)
class IndexedImage:
    """What is known about row i of the arrays."""

    path: str  # relative to the category's folder, posix
    split: Split
    label: bool  # True where anomalous
    defect: str  # "good", or the type of defect
    width: int  # of the upright original, pixels
    height: int
    masks: tuple[IndexedMask, ...]  # what they mark together is its row in the arrays of masks
    mask_row: int | None
    sha256: str  # of the file
    group: str | None  # by `prepare.groups`: what was made or photographed together
    fold: int | None  # with `prepare.holdout: folds`, whose models have not seen it

    @property
    def original(self) -> Size:
        """Of the upright original, pixels."""
        return Size(self.height, self.width)


@dataclass(frozen=True, slots=True)
class PreparedIndex:
    """Contents of a prepared folder; `images[i]` describes row i of each array of images."""

    category: str
    layout: Layout
    black_level: int
    white_level: int
    above_white: AboveWhite
    page: int | None
    dicom_window: Window
    has_masks: bool
    surface: bool  # the category fills the image
    region: str | None  # of interest, as `frames.written`; None: all of a picture
    counts: Mapping[str, int]  # train, holdout, anomalous_train, test_normal, test_anomalous; known where frozen
    data_sha256: str  # of every image and mask used, with its path
    split_sha256: str | None  # of the file that says which image is for what: VisA's, or that of a frozen split
    frozen: str | None  # since when no image changes sides, because pictures were learnt: ISO 8601
    warnings: tuple[str, ...]  # one line each, for the user
    images: tuple[IndexedImage, ...]

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read the index of a prepared folder.

        Raises:
            StageError: the folder is missing, or was made by another version, or its index is damaged.
        """
        path, remedy = folder / INDEX_FILE, f"run `blemish prepare {folder.name}`"
        if not path.is_file():
            raise StageError(f"{folder}: no prepared images; {remedy}")
        with reading(path, remedy):
            content = path.read_bytes()
            found = dict(from_json(content)).get("format")
            if found != FORMAT:
                raise StageError(f"{folder}: prepared in format {found}, this version reads {FORMAT}; {remedy}")
            return TypeAdapter(cls).validate_json(content, strict=True)

    def to_json(self) -> dict[str, Any]:
        return dict(TypeAdapter(type(self)).dump_python(self, mode="json"))

    @property
    def of_interest(self) -> NDArray[np.bool_] | None:
        """The region (H, W) of the upright originals that counts; None if all of them does."""
        return None if self.region is None else read_back(self.region)

    @property
    def num_masks(self) -> int:
        return sum(image.mask_row is not None for image in self.images)

    def rows(self, *splits: Split) -> list[int]:
        return [row for row, image in enumerate(self.images) if image.split in splits]

    @property
    def by_folds(self) -> bool:
        """Whether nothing is held out, and each good part is scored by a model that learnt from the other folds."""
        return not self.rows("holdout")

    def for_thresholds(self) -> list[int]:
        """Rows of the good parts that thresholds come from."""
        return self.rows("train") if self.by_folds else self.rows("holdout")

    def original(self, row: int, source: Path) -> Path:
        """The file of an image in the category's folder `source`, which is still what `prepare` saw.

        Raises:
            StageError: it is not there any more, or has changed.
        """
        image = self.images[row]
        return self._unchanged(source / image.path, image.sha256)

    def original_masks(self, row: int, source: Path) -> list[Path]:
        """The files of an image's masks likewise."""
        return [self._unchanged(source / mask.path, mask.sha256) for mask in self.images[row].masks]

    @property
    def has_saturations(self) -> bool:
        """Whether each mask is a defect of which a part counts as all, as in MVTec LOCO."""
        return any(mask.saturation is not None for image in self.images for mask in image.masks)

    def _unchanged(self, path: Path, sha256: str) -> Path:
        remedy = f"put it back, or run `blemish prepare {self.category}` again and all that follows (`dvc repro`)"
        try:
            found = file_sha256(path)
        except OSError as error:
            raise StageError(f"{path}: {error.strerror}, and it was prepared; {remedy}") from None
        if found != sha256:
            raise StageError(
                f"{path}: not the file that was prepared, it has changed since (SHA-256 {found[:12]}…, was "
                f"{sha256[:12]}…); {remedy}"
            )
        return path

    def apart(self) -> list[int]:
        """Rows of the real defects that a model which learns from some is not tested on."""
        return self.rows("anomalous_train", "withheld")

    def tested(self, *, defects_apart: bool) -> list[int]:
        """Rows that a model is tested on: the test split, and the rest of the real defects unless they are `apart`."""
        return self.rows("test") if defects_apart else self.rows(*MAY_BE_TESTED)

    @property
    def test_sha256(self) -> str:
        """Of every image that a model may be tested on, and its masks: whether two tests are of the same files."""
        digest = hashlib.sha256()
        for image in sorted((self.images[row] for row in self.rows(*MAY_BE_TESTED)), key=lambda image: image.path):
            digest.update(f"{image.path}\n{image.defect}\n{image.sha256}\n".encode())
            digest.update("".join(f"{mask.path}\n{mask.sha256}\n" for mask in image.masks).encode())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class SeenBy:
    """Which arrays of a prepared folder a model sees: the file on which, beside the index, its training depends."""

    frame: Frame
    images_sha256: str  # of the arrays' files
    masks_sha256: str | None
    warning: str | None  # for the user

    def save(self, folder: Path, model: str) -> None:
        (folder / _SEEN_BY).mkdir(exist_ok=True)
        write_json(folder / _SEEN_BY / f"{model}.json", asdict(self))


def frames_in(folder: Path) -> list[Frame]:
    """What a prepared folder holds its images as, the smallest first.

    Raises:
        StageError: a record is damaged.
    """
    found = set()
    for path in (folder / _SEEN_BY).glob("*.json"):
        with reading(path, f"run `blemish prepare {folder.name}`"):
            found.add(TypeAdapter(SeenBy).validate_json(path.read_bytes()).frame)
    return sorted(found, key=lambda frame: (frame.size.area, frame))


def images_file(folder: Path, frame: Frame) -> Path:
    """Where a prepared folder holds its images (N, H, W, 3), uint8."""
    return folder / f"images_{frame.size}_{frame.resize}{_fitted(frame.shape)}.npy"


def masks_file(folder: Path, shape: Shape) -> Path:
    """Where a prepared folder holds the masks of its anomalous images (M, H, W), bool; absent without masks."""
    return folder / f"masks_{shape.size}{_fitted(shape)}.npy"


def _fitted(shape: Shape) -> str:
    return "" if shape.fit == "stretch" else f"_{shape.fit}"
