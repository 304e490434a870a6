"""A prepared folder -> batches on the device, with no loader, no worker and no decoding.

The n-th training batch is a pure function of (seed, n): an interrupted run resumes by starting at n. Arrays larger than
`DEVICE_BYTES` stay on disk, memory-mapped, and are gathered batch by batch; the batches are the same.
"""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from anomaly_models.base import Batch, Config
from anomaly_models.common.sizes import Size
from pipelines.data.arrays import DEVICE_BYTES, Rows, sent, stream_rows, to_image
from pipelines.data.index import PreparedIndex, Split, frames_in, images_file, masks_file
from pipelines.errors import StageError
from pipelines.paths import INDEX_FILE
from pipelines.pictures import images
from pipelines.pictures.frames import WHOLE, Frame, Window
from pipelines.records import Record


class DataVersion(Record):
    """What tells two data sets apart: the images' bytes, and the index of how they were split and resized."""

    category: str
    sha256: str
    index_sha256: str


def frame_of(config: Config) -> Frame:
    """What a model of these settings sees of a picture."""
    return Frame(config.image_size, config.resize, config.fit)


class Images(ABC):
    """What a model is shown, by rows of numbers."""

    index: PreparedIndex
    device: torch.device

    @abstractmethod
    def rows(self, split: Split) -> list[int]:
        """In the order of the index."""

    @abstractmethod
    def rows_of(self, images: Sequence[int]) -> list[int]:
        """Of images, by their rows in the index."""

    @abstractmethod
    def batch(self, rows: Sequence[int]) -> Batch:
        """In the order of `rows`. Masks are zero for normal images, and for all where the category has none."""

    def batches(self, split: Split, batch_size: int) -> "SplitBatches":
        """The whole split in the order of the index; the last batch may be smaller."""
        return SplitBatches(self, self.rows(split), batch_size)

    def training_batch(self, seed: int, step: int, batch_size: int) -> Batch:
        """Batch number `step` (from 0) of an endless stream over `train`, shuffled anew each epoch.

        A batch may span the end of an epoch, or several epochs where it is larger than the split.
        """
        train = self._train
        return self.batch([train[position] for position in stream_rows(len(train), (seed,), step, batch_size)])

    @cached_property
    def _train(self) -> list[int]:
        return self.rows("train")


class PreparedData(Images):
    """The images of one category in one frame, with everything that is known about them.

    Raises:
        StageError: the category, or this array of it, is not prepared.
    """

    def __init__(self, folder: Path, frame: Frame, device: torch.device) -> None:
        self.index = PreparedIndex.load(folder)
        self.frame = frame
        self.of_interest = self.index.of_interest
        self.device = device
        self._regions: dict[Size, Tensor] = {}  # of originals of a size, (1, H, W)
        _check_frame(folder, frame)
        files = [images_file(folder, frame)]
        if self.index.has_masks:
            files.append(masks_file(folder, frame.shape))
        for file in files:
            if not file.is_file():
                raise StageError(f"{file}: missing; run `blemish prepare {folder.name}`")
        resident = sum(file.stat().st_size for file in files) <= DEVICE_BYTES
        remedy = f"run `blemish prepare {folder.name}`"
        shapes = [(len(self.index.images), *frame.size, 3), (self.index.num_masks, *frame.size)]
        self._images = Rows(files[0], shapes[0], np.uint8, remedy, device, resident)
        self._masks = Rows(files[1], shapes[1], np.bool_, remedy, device, resident) if self.index.has_masks else None
        self._index_sha256 = hashlib.sha256((folder / INDEX_FILE).read_bytes()).hexdigest()

    @property
    def version(self) -> DataVersion:
        return DataVersion(category=self.index.category, sha256=self.index.data_sha256, index_sha256=self._index_sha256)

    def rows(self, split: Split) -> list[int]:
        return self.index.rows(split)

    def rows_of(self, images: Sequence[int]) -> list[int]:
        return list(images)

    def batch(self, rows: Sequence[int]) -> Batch:
        return self._batch(rows, to_image(self._images.gather(rows)), [WHOLE] * len(rows))

    def cut(self, images: Sequence[int], windows: Sequence[Window]) -> Batch:
        """Of each image a window, all of one size."""
        return self._batch(images, to_image(self._images.cut(images, windows)), windows)

    def _batch(self, images: Sequence[int], pixels: Tensor, windows: Sequence[Window]) -> Batch:
        entries = [self.index.images[image] for image in images]
        mask = torch.zeros_like(pixels[:, :1])
        masked = [place for place, entry in enumerate(entries) if entry.mask_row is not None]
        if self._masks is not None and masked:
            mask_rows = [entry.mask_row for entry in entries if entry.mask_row is not None]
            found = self._masks.cut(mask_rows, [windows[place] for place in masked])
            mask[masked] = rearrange(found, "b h w -> b 1 h w").float()
        regions = [
            region[:, *window]
            for image, window in zip(images, windows, strict=True)
            if (region := self.region(image)) is not None
        ]
        return Batch(
            image=pixels,
            mask=mask,
            label=sent(torch.tensor([entry.label for entry in entries]), self.device),
            region=torch.stack(regions) if regions else None,
            row=torch.tensor(images, dtype=torch.long),
        )

    def region(self, image: int) -> Tensor | None:
        """What counts of an image, (1, H, W); None if all does."""
        original = self.index.images[image].original
        if original not in self._regions:
            region = self.frame.shape.region(original, self.of_interest)
            if region is None:
                return None
            self._regions[original] = torch.from_numpy(region).float().unsqueeze(0).to(self.device)
        return self._regions[original]

    def marks(self, image: int, window: Window) -> bool:
        """Whether a mask marks anything of a window of an image."""
        row = self.index.images[image].mask_row
        return row is not None and self._masks is not None and bool(self._masks.cut([row], [window]).any())

    def native_mask(self, row: int, source: Path) -> NDArray[np.bool_]:
        """The mask (H, W) at the size of the upright original, read from the category's folder `source`.

        Raises:
            StageError: the file is not there any more, or has changed since it was prepared.
        """
        entry = self.index.images[row]
        marked = np.zeros((entry.height, entry.width), dtype=bool)
        for mask in self.native_masks(row, source):
            marked |= mask
        return marked

    def native_masks(self, row: int, source: Path) -> list[NDArray[np.bool_]]:
        """Each of an image's masks likewise."""
        entry = self.index.images[row]
        megapixels = math.ceil(entry.width * entry.height / 1e6)  # which `prepare` found not to be too many
        return [images.load_mask(file, megapixels) for file in self.index.original_masks(row, source)]


class SplitBatches:
    """Batches of fixed rows; each `iter` starts anew."""

    def __init__(self, data: Images, rows: list[int], batch_size: int) -> None:
        self._data = data
        self._chunks = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]

    def __len__(self) -> int:
        return len(self._chunks)

    def __iter__(self) -> Iterator[Batch]:
        return (self._data.batch(rows) for rows in self._chunks)


def _check_frame(folder: Path, frame: Frame) -> None:
    found = frames_in(folder)
    if frame not in found:
        at = ", ".join(map(str, found))
        raise StageError(
            f"{folder}: prepared at {at or 'no size'}, not at {frame} pixels; run `blemish prepare {folder.name}`"
        )
