"""Images in one array file, on the device or on disk, and the order in which training takes them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from einops import rearrange
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from pipelines.records import read_array

DEVICE_BYTES = 2 * 2**30  # arrays up to this size live on the device; larger ones stay on disk and are read per batch

B_co = TypeVar("B_co", covariant=True)


class BatchSource(Protocol[B_co]):
    """The n-th batch, as a pure function of (seed, n)."""

    @property
    def device(self) -> torch.device: ...

    def training_batch(self, seed: int, step: int, batch_size: int) -> B_co: ...


class Rows:
    """An array (N, ...) of a `.npy` file, on the device or on disk.

    Raises:
        StageError: the file is not there or damaged, or its array not of that shape and type; `remedy` ends the
            message.
    """

    def __init__(
        self, file: Path, shape: tuple[int, ...], dtype: DTypeLike, remedy: str, device: torch.device, resident: bool
    ) -> None:
        self._device = device
        array = read_array(file, shape, dtype, remedy, mapped=not resident)
        self._array = torch.from_numpy(array).to(device) if resident else array

    def __len__(self) -> int:
        return len(self._array)

    def gather(self, rows: Sequence[int]) -> Tensor:
        if isinstance(self._array, Tensor):
            return self._array[sent(torch.tensor(rows, dtype=torch.long), self._device)]
        return sent(torch.from_numpy(np.asarray(self._array[list(rows)])), self._device)

    def cut(self, rows: Sequence[int], windows: Sequence[tuple[slice, slice]]) -> Tensor:
        """Of each row, an image or a mask (H, W, ...), a window, all of one size; of a file no more is read."""
        found = list(zip(rows, windows, strict=True))
        if isinstance(self._array, Tensor):
            return torch.stack([self._array[row][window] for row, window in found])
        return sent(torch.from_numpy(np.stack([self._array[row][window] for row, window in found])), self._device)


def sent(values: Tensor, device: torch.device) -> Tensor:
    """What the host holds, on the device; without waiting for what a GPU still has to do, where it is one."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def to_image(pixels: Tensor) -> Tensor:
    """Turn (B, H, W, 3) bytes into (B, 3, H, W) in [0, 1], with the bits of `images.to_input` on any device."""
    # Divided by a tensor: for a number, CUDA multiplies by its reciprocal, whose last bit differs. In one pass and in
    # place, as it is mostly the memory that takes time.
    image = rearrange(pixels, "b h w c -> b c h w").to(torch.float32, memory_format=torch.contiguous_format)
    return image.div_(torch.full((), 255.0, device=pixels.device))


def stream_rows(num_rows: int, key: Sequence[int], step: int, batch_size: int) -> list[int]:
    """Batch number `step` (from 0) of an endless stream over all rows, shuffled anew each epoch; a function of `key`.

    A batch may span the end of an epoch, or several epochs where it is larger than the array.
    """
    first, last = step * batch_size, (step + 1) * batch_size - 1  # positions in the stream
    epochs = range(first // num_rows, last // num_rows + 1)
    order = np.concatenate([_shuffled(num_rows, key, epoch) for epoch in epochs])
    start = first - epochs.start * num_rows
    return [int(row) for row in order[start : start + batch_size]]


def _shuffled(num_rows: int, key: Sequence[int], epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([*key, epoch]).permutation(num_rows)
