"""Where the part is in each image, for models that put synthetic defects on it."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from anomaly_models.base import Batch
from anomaly_models.common.synthesis import foreground_mask
from pipelines.arrays import BatchSource


@dataclass(frozen=True, slots=True)
class WithForeground:
    """A stream of batches of a category that shows a part before a background."""

    parts: BatchSource[Batch]
    _known: dict[int, Tensor] = field(default_factory=dict)  # by row: (1, H, W) bool; a function of the image alone

    @property
    def device(self) -> torch.device:
        return self.parts.device

    def training_batch(self, seed: int, step: int, batch_size: int) -> Batch:
        batch = self.parts.training_batch(seed, step, batch_size)
        return replace(batch, foreground=self._foreground(batch))

    def _foreground(self, batch: Batch) -> Tensor:
        assert batch.row is not None
        for row, image in zip(batch.row.tolist(), batch.image, strict=True):
            if row not in self._known:
                self._known[row] = foreground_mask(image.unsqueeze(0))[0] > 0
        return torch.stack([self._known[row] for row in batch.row.tolist()]).float()
