"""Arrays that are written row by row."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import DTypeLike


@contextlib.contextmanager
def array_file(path: Path, shape: tuple[int, ...], dtype: DTypeLike) -> Iterator[BinaryIO]:
    """Begin a .npy file; its rows follow in order.

    Written as a plain stream: a full disk raises, where a memory map would kill the process.
    """
    with path.open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        yield file
