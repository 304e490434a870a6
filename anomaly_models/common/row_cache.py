"""What a function of an image alone, such as a frozen network, makes of the images of a data set: computed once."""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

CACHE_BYTES = 2**30  # kept at most, if nothing else is said


class RowCache:
    """Tensors by row of the data set, while there is room; what does not fit is computed anew each time.

    No state: what is missing, as after a resume, is computed again. Images pass one at a time unless `at_once` says
    otherwise, so that the bits do not depend on what a run, or a resumed one, has met before: a convolution may round
    differently in a larger batch.
    """

    def __init__(self, most_bytes: int = CACHE_BYTES) -> None:
        self._known: dict[int, tuple[Tensor, ...]] = {}
        self._most_bytes = self._room = most_bytes

    def clear(self) -> None:
        """Forget everything: rows will be those of another data set, or are not needed any more."""
        self._known.clear()
        self._room = self._most_bytes

    @torch.no_grad()
    def __call__(
        self, compute: Callable[[Tensor], Sequence[Tensor]], batch: Tensor, row: Tensor | None, at_once: int = 1
    ) -> list[Tensor]:
        """What `compute` makes of a batch (B, ...), per layer (B, ...).

        It is kept if the rows (B,) of the data set are known; until `clear`, `compute` must not change.
        """
        keys = list(range(len(batch))) if row is None else row.tolist()
        known = {} if row is None else self._known
        missing = {key: place for place, key in enumerate(keys) if key not in known}
        found: dict[int, tuple[Tensor, ...]] = {}
        for start in range(0, len(missing), at_once):
            chunk = list(missing)[start : start + at_once]
            layers = compute(batch[[missing[key] for key in chunk]])
            found |= zip(chunk, zip(*(torch.split(layer, 1) for layer in layers), strict=True), strict=True)
        if row is not None:
            self._keep(found)
        images = [found[key] if key in found else known[key] for key in keys]
        return [torch.cat(layer) for layer in zip(*images, strict=True)]

    def _keep(self, found: dict[int, tuple[Tensor, ...]]) -> None:
        for key, layers in found.items():
            size = sum(layer.numel() * layer.element_size() for layer in layers)
            if size <= self._room:
                self._known[key] = layers
                self._room -= size


def by_pixels(image: Tensor) -> Tensor:
    """A number (B,) int64 for each of images (B, ...) in the place of a row, the same for the same pixels."""
    digests = [hashlib.blake2b(pixels.numpy(), digest_size=8).digest() for pixels in image.cpu().contiguous()]
    return torch.tensor([int.from_bytes(digest, "big", signed=True) for digest in digests], dtype=torch.long)
