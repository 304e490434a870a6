"""The maps of a frozen backbone, computed once for each image of a data set."""

import torch
from torch import Tensor

from anomaly_models.common.backbones import Backbone

CACHE_BYTES = 2**30  # kept at most; what does not fit is computed anew each time


class FeatureCache:
    """Maps by row of the data set. No state: what is missing, as after a resume, is computed again.

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

    def __call__(self, backbone: Backbone, image: Tensor, row: Tensor | None) -> list[Tensor]:
        """Maps (B, C_l, h_l, w_l) of images (B, 3, H, W), kept if their rows (B,) of the data set are known."""
        rows: list[int | None] = [None] * len(image) if row is None else list(row.tolist())
        images = [
            self._maps(backbone, alone, its_row) for alone, its_row in zip(torch.split(image, 1), rows, strict=True)
        ]
        return [torch.cat(layer) for layer in zip(*images, strict=True)]

    @torch.no_grad()
    def _maps(self, backbone: Backbone, image: Tensor, row: int | None) -> list[Tensor]:
        """Maps of one image (1, 3, H, W)."""
        if row in self._known:
            return self._known[row]
        maps = backbone(image)
        size = sum(layer.numel() * layer.element_size() for layer in maps)
        if row is not None and self._bytes + size <= CACHE_BYTES:
            self._known[row] = maps
            self._bytes += size
        return maps
