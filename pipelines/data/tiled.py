"""Pictures cut into tiles for a model that sees no more at a time, and what it says of these put together again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from anomaly_models.base import AnomalyModel, Batch, Config, Prediction
from pipelines.data.batches import Images, PreparedData
from pipelines.data.index import Split
from pipelines.pictures.frames import Window
from pipelines.pictures.tiles import Map, Tiling, score_of, tiling

Detects = Callable[[Tensor, Tensor | None], Prediction]  # image (B, 3, H, W) and region (B, 1, H, W) to maps and scores


@dataclass(frozen=True, slots=True)
class Stitched:
    """A model of tiles that looks at pictures, tile by tile: what an exported file does, with torch."""

    model: AnomalyModel
    tiling: Tiling
    scored_pixels: int

    def __call__(self, image: Tensor, region: Tensor | None) -> Prediction:
        regions = [None] * len(image) if region is None else list(region[:, 0].cpu().numpy() > 0)
        maps = [
            self.tiling.stitched(partial(self._look, image[[row]], None if region is None else region[[row]]), counts)
            for row, counts in enumerate(regions)
        ]
        scores = [score_of(found, self.scored_pixels, counts) for found, counts in zip(maps, regions, strict=True)]
        return Prediction(torch.from_numpy(np.stack(maps))[:, None], torch.tensor(scores))

    def _look(self, image: Tensor, region: Tensor | None, number: int, window: Window) -> Map:
        tile = image[..., *window], None if region is None else region[..., *window]
        with torch.no_grad():
            prediction = self.model.forward_at(*tile, torch.tensor([number], device=image.device))
        found: Map = prediction.anomaly_map[0, 0].cpu().numpy()
        return found


class TiledData(Images):
    """The tiles of the images, as a model learns from them: row r is tile r % T of image r // T, of T tiles."""

    def __init__(self, whole: PreparedData, tiling: Tiling) -> None:
        self.index, self.device = whole.index, whole.device
        self._whole, self._windows = whole, list(tiling)

    def rows(self, split: Split) -> list[int]:
        """Of good images, the tiles in which anything counts; of defects those in which any is marked."""
        return self.rows_of(self.index.rows(split))

    def rows_of(self, images: Sequence[int]) -> list[int]:
        number = len(self._windows)
        tiles = [(image, tile) for image in images for tile in range(number)]
        return [image * number + tile for image, tile in tiles if self._counts(image, self._windows[tile])]

    def _counts(self, image: int, window: Window) -> bool:
        if self.index.images[image].label:
            return self._whole.marks(image, window)
        region = self._whole.region(image)
        return region is None or bool(region[:, *window].any())

    def batch(self, rows: Sequence[int]) -> Batch:
        found = [divmod(row, len(self._windows)) for row in rows]
        images, windows = [image for image, _ in found], [self._windows[tile] for _, tile in found]
        tiles = torch.tensor([tile for _, tile in found])
        return replace(self._whole.cut(images, windows), tile=tiles, row=torch.tensor(rows, dtype=torch.long))


def learnt_from(whole: PreparedData, config: Config) -> Images:
    """The images as a model of these settings learns from them: cut up, if it sees tiles."""
    cut_up = tiling(config.image_size, config.tiles)
    return whole if cut_up is None else TiledData(whole, cut_up)


def whole(model: AnomalyModel, config: Config) -> Detects:
    """A model that has learnt by these settings, looking at whole pictures."""
    cut_up = tiling(config.image_size, config.tiles)
    return model if cut_up is None else Stitched(model, cut_up, config.scored_pixels)
