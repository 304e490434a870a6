"""What a frozen network makes of the images of a data set, computed once for each."""

from collections.abc import Callable

import torch
from torch import Tensor

CACHE_BYTES = 2**30  # kept at most; what does not fit is computed anew each time


class FeatureCache:
    """Features by row of the data set. No state: what is missing, as after a resume, is computed again.

    Images pass one at a time, so that the bits do not depend on what a run, or a resumed one, has met before: a
    convolution may round differently in a larger batch.
    """

    def __init__(self) -> None:
        self._known: dict[int, list[Tensor]] = {}
        self._bytes = 0

    def clear(self) -> None:
        """Forget everything: rows will be those of another data set, or are not needed any more."""
        self._known.clear()
        self._bytes = 0

    def __call__(self, compute: Callable[[Tensor], list[Tensor]], image: Tensor, row: Tensor | None) -> list[Tensor]:
        """What `compute` makes of images (B, 3, H, W), per layer (B, ...).

        It is kept if the images' rows (B,) of the data set are known; until `clear`, `compute` must not change.
        """
        rows: list[int | None] = [None] * len(image) if row is None else list(row.tolist())
        images = [
            self._features(compute, alone, its_row) for alone, its_row in zip(torch.split(image, 1), rows, strict=True)
        ]
        return [torch.cat(layer) for layer in zip(*images, strict=True)]

    @torch.no_grad()
    def _features(self, compute: Callable[[Tensor], list[Tensor]], image: Tensor, row: int | None) -> list[Tensor]:
        """Features of one image (1, 3, H, W)."""
        if row in self._known:
            return self._known[row]
        features = compute(image)
        size = sum(layer.numel() * layer.element_size() for layer in features)
        if row is not None and self._bytes + size <= CACHE_BYTES:
            self._known[row] = features
            self._bytes += size
        return features
