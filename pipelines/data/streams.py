"""What some models want beside the normal images of a batch: real anomalies, where the part is, other photos."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from anomaly_models.base import Batch
from anomaly_models.common.foreground import foreground_mask
from anomaly_models.common.row_cache import RowCache
from pipelines.data.arrays import BatchSource, stream_rows
from pipelines.data.batches import Images
from pipelines.data.photo_sets import PhotoSet

_STREAM = 3  # apart from the normal images, which are drawn by the same seed


@dataclass(frozen=True, slots=True)
class WithAnomalies:
    """A stream of batches, each followed by `number` images of the split `anomalous_train`.

    By none where that is empty, as it is of a category without masks.
    """

    data: Images
    number: int

    @property
    def device(self) -> torch.device:
        return self.data.device

    def training_batch(self, seed: int, step: int, batch_size: int) -> Batch:
        normal = self.data.training_batch(seed, step, batch_size)
        rows = self.data.rows("anomalous_train")
        if not rows:
            return normal
        chosen = stream_rows(len(rows), (seed, _STREAM), step, self.number)
        anomalous = self.data.batch([rows[place] for place in chosen])
        assert normal.row is not None
        assert anomalous.row is not None
        return Batch(
            image=torch.cat([normal.image, anomalous.image]),
            mask=torch.cat([normal.mask, anomalous.mask]),
            label=torch.cat([normal.label, anomalous.label]),
            region=_both(normal.region, anomalous.region),
            tile=_both(normal.tile, anomalous.tile),
            row=torch.cat([normal.row, anomalous.row]),
        )


def _both(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return None if first is None or second is None else torch.cat([first, second])


def anomalies_warning(data: Images) -> str | None:
    """What a user should know of a category that a supervised model is to learn from; None if all is well."""
    category = data.index.category
    if data.rows("anomalous_train"):
        return None
    if not data.index.has_masks and any(image.label for image in data.index.images):
        return (
            f"{category}: its real anomalies have no masks, so that nothing can be learnt from them; all are tested on"
        )
    return f"{category}: no real anomalies to learn from (prepare.anomalous_train.count is 0, or too few defects)"


@dataclass(frozen=True, slots=True)
class WithForeground:
    """A stream of batches of a category that shows a part before a background."""

    parts: BatchSource[Batch]
    _cache: RowCache = field(default_factory=RowCache)

    @property
    def device(self) -> torch.device:
        return self.parts.device

    def training_batch(self, seed: int, step: int, batch_size: int) -> Batch:
        batch = self.parts.training_batch(seed, step, batch_size)
        if batch.region is None:
            (foreground,) = self._cache(lambda image: [foreground_mask(image) > 0], batch.image, batch.row)
        else:
            counted = torch.cat([batch.image, batch.region], dim=1)
            (foreground,) = self._cache(
                lambda both: [foreground_mask(both[:, :3], both[:, 3:]) > 0], counted, batch.row
            )
        return replace(batch, foreground=foreground.float())


@dataclass(frozen=True, slots=True)
class WithPhotos:
    """A stream of batches, each with as many penalty images, and as many textures, as it has images."""

    parts: BatchSource[Batch]
    penalty: PhotoSet | None
    textures: PhotoSet | None

    @property
    def device(self) -> torch.device:
        return self.parts.device

    def training_batch(self, seed: int, step: int, batch_size: int) -> Batch:
        batch = self.parts.training_batch(seed, step, batch_size)
        penalty, texture = (
            photos.images(seed, step, len(batch.image)) if photos is not None else None
            for photos in (self.penalty, self.textures)
        )
        return replace(batch, penalty=penalty, texture=texture)
