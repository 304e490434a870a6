"""What stages leave for one another: typed records as JSON, arrays; read back whole or refused in one line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray
from pydantic import ValidationError

from anomaly_models.common.settings import Settings
from pipelines.files import write_json
from pipelines.unreadable import reading, refusal


class Record(Settings):
    """One file's content. Strict, so that what another version of Blemish wrote is noticed and not guessed at."""

    def save(self, path: Path) -> None:
        """Write it atomically; fields that are None are written too."""
        write_json(path, self.model_dump(mode="json"))

    @classmethod
    def load(cls, path: Path, remedy: str) -> Self:
        """Read what `save` wrote; `remedy` ends the message if that cannot be.

        Raises:
            StageError: there is no such file, or it is damaged or another version's.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise refusal(path, error, remedy) from None


def read_array(path: Path, shape: tuple[int, ...], dtype: DTypeLike, remedy: str, *, mapped: bool) -> NDArray[Any]:
    """The array of a `.npy` file, in memory or `mapped` from the disk.

    Raises:
        StageError: there is no such file, or it is damaged, or holds an array of another shape or type.
    """
    with reading(path, remedy):
        array = np.load(path, mmap_mode="r")  # which looks at the file's length before any memory is asked for
        if not isinstance(array, np.ndarray) or (array.shape, array.dtype) != (shape, np.dtype(dtype)):
            raise ValueError(f"not {np.dtype(dtype)} of shape {shape}")
        return array if mapped else np.array(array)


def read_arrays(path: Path, names: Sequence[str], remedy: str) -> list[NDArray[Any]]:
    """Arrays of as many rows each, of a `.npz` file; raises StageError as `read_array`."""
    with reading(path, remedy), path.open("rb") as file, np.load(file) as content:
        arrays = [content[name] for name in names]
        if len({array.shape[:1] for array in arrays}) > 1:
            raise ValueError("arrays of different length")
        return arrays
