"""All that a search may look at of a category: the good parts that models learn from, and defects.

Of an image that a model may be tested on, `Development` gives no pixel, nor of the held-out good parts: a threshold
promises its rate of false alarms for settings that were not chosen on the parts that it comes from. So a quarter of the
training's good parts is kept from learning in a search, whole groups and copies together. The defects are

real        those that are known and that the model is neither tested on nor learns from: `known` ones, which people
            said of parts on the line, and those of `prepare.anomalous_train`, where they are apart from its test. Of a
            model that learns from these, every second one, in the order of the index, is kept from its learning;
synthetic   drawn into the good parts that are kept in the manner of DRAEM (anomaly_models/common/synthesis.py): a
            region of Perlin noise on the part, filled with the part's own picture, its colours changed and its strips
            shuffled; 20 to 80 % of the part shine through. A function of the seed and of these parts: alike in each
            trial.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from anomaly_models.base import Batch
from anomaly_models.common.appearance import to_bytes
from anomaly_models.common.foreground import foreground_mask
from anomaly_models.common.synthesis import SynthesisConfig, synthesise
from pipelines.data.batches import PreparedData
from pipelines.data.index import PreparedIndex, Split
from pipelines.errors import StageError
from pipelines.pictures.frames import Frame, Window

Defects = Literal["real", "synthetic"]

FEWEST_REAL = 20  # known defects with which a search asks for no synthetic ones: six were found by all settings
KEPT = 4  # one good part of so many is kept from learning
FEWEST_NORMALS = 3  # that are
MOST = 60  # of them that are scored in each trial, and of synthetic defects
_SMALLEST_CELL = 8  # pixels of the finest noise that a synthetic defect is cut from


@dataclass(frozen=True, slots=True)
class Access:
    """What a model may be shown in a search."""

    apart: bool  # whether it is not tested on the defects of `anomalous_train`
    learns: bool  # whether it learns from them
    asked: Defects | None  # what it is to be measured on; None: real ones, if there are enough

    def splits(self) -> tuple[Split, ...]:
        with_defects = self.apart or self.asked == "real"
        return ("train", "known", "anomalous_train") if with_defects else ("train", "known")


class Development(PreparedData):
    """A category's prepared images without its test and its held-out parts; `holdout` is what a search keeps.

    Raises:
        StageError: as `PreparedData`; or there are too few good parts, or none of the defects asked for.
    """

    def __init__(self, folder: Path, frame: Frame, device: torch.device, access: Access) -> None:
        super().__init__(folder, frame, device)
        self._open = set(self.index.rows(*access.splits()))
        self.index, self.defects = _for_search(self.index, access)

    @property
    def sha256(self) -> str:
        """Of all that may be looked at, and what for."""
        digest = hashlib.sha256()
        for row in sorted(self._open):
            image = self.index.images[row]
            digest.update(f"{image.path}\n{image.split}\n{image.sha256}\n".encode())
            digest.update("".join(f"{mask.path}\n{mask.sha256}\n" for mask in image.masks).encode())
        return digest.hexdigest()

    def batch(self, rows: Sequence[int]) -> Batch:
        self._require_open(rows)
        return super().batch(rows)

    def cut(self, images: Sequence[int], windows: Sequence[Window]) -> Batch:
        self._require_open(images)
        return super().cut(images, windows)

    def marks(self, image: int, window: Window) -> bool:
        self._require_open([image])
        return super().marks(image, window)

    def _require_open(self, rows: Sequence[int]) -> None:
        closed = set(rows) - self._open
        assert not closed, f"a search does not look at rows {sorted(closed)} of {self.index.category}"


def _for_search(index: PreparedIndex, access: Access) -> tuple[PreparedIndex, Defects]:
    """The index with what is measured on as `holdout` and `known`, and which defects those are."""
    splits: dict[int, Split] = dict.fromkeys(index.rows("holdout"), "test")  # as closed as the test is
    splits |= dict.fromkeys(_kept(index), "holdout")
    given = index.rows("anomalous_train") if "anomalous_train" in access.splits() else []
    others = given[1::2] if access.learns else given
    known = len(index.rows("known")) + len(others)
    is_real = access.asked == "real" or (access.asked is None and known >= FEWEST_REAL)
    if is_real and not known:
        raise StageError(
            f"{index.category}: no real defects to search with; raise prepare.anomalous_train.count, or ask for "
            "synthetic ones (--defects synthetic)"
        )
    if is_real:
        splits |= dict.fromkeys(others, "known")
    images = tuple(replace(image, split=splits.get(row, image.split)) for row, image in enumerate(index.images))
    return replace(index, images=images), "real" if is_real else "synthetic"


def _kept(index: PreparedIndex) -> list[int]:
    """The good parts that are kept from learning, in an order that their files alone decide."""
    rows = index.rows("train")
    if len(rows) < 2 * FEWEST_NORMALS:
        raise StageError(
            f"{index.category}: a search takes {2 * FEWEST_NORMALS} good parts to learn from or more, found "
            f"{len(rows)}; give more good parts"
        )
    units: dict[str, list[int]] = {}
    for row in rows:
        units.setdefault(index.images[row].group or index.images[row].sha256, []).append(row)
    kept, wanted = list[int](), max(FEWEST_NORMALS, math.ceil(len(rows) / KEPT))
    for key in sorted(units, key=lambda key: hashlib.sha256(key.encode()).digest()):
        if len(kept) < wanted and len(kept) + len(units[key]) < len(rows):
            kept += units[key]
    if len(kept) < FEWEST_NORMALS:
        raise StageError(
            f"{index.category}: a search keeps {FEWEST_NORMALS} good parts from learning or more, but those to learn "
            "from are of too few groups; give parts of further groups"
        )
    return kept


@dataclass(frozen=True, slots=True)
class Exam:
    """What each trial is measured on: pictures as they are held in memory, and what is anomalous of them."""

    image: Tensor  # (N, 3, H, W) uint8, the good parts first
    mask: Tensor  # (N, 1, H, W) bool
    region: Tensor | None  # (N, 1, H, W) float32
    normals: int
    masked: bool  # whether every defect has a mask

    @property
    def num_defects(self) -> int:
        return len(self.image) - self.normals

    def batches(self, size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Images and regions, in order."""
        for start in range(0, len(self.image), size):
            of = slice(start, start + size)
            pixels = self.image[of].to(device).float() / torch.tensor(255.0, device=device)
            yield pixels, None if self.region is None else self.region[of].to(device)


def exam_of(data: Development, seed: int) -> Exam:
    """The good parts that are kept from learning, evenly chosen if there are many, and the defects.

    Raises:
        StageError: no synthetic defect can be drawn.
    """
    rows = data.index.rows("holdout")
    normals = [rows[place * len(rows) // min(MOST, len(rows))] for place in range(min(MOST, len(rows)))]
    good = [_bytes_of(data.batch([row])) for row in normals]
    defects = _real(data) if data.defects == "real" else _synthetic(data, normals, seed)
    image, mask, region = zip(*good, *defects, strict=True)
    masks = torch.cat(mask)
    return Exam(
        image=torch.cat(image),
        mask=masks,
        region=None if region[0] is None else torch.cat(region),
        normals=len(good),
        masked=bool(masks[len(good) :].flatten(1).any(dim=1).all()),
    )


_Picture = tuple[Tensor, Tensor, Tensor | None]  # of one image, on the CPU: bytes, mask, region


def _real(data: Development) -> list[_Picture]:
    return [_bytes_of(data.batch([row])) for row in data.index.rows("known")]


def _synthetic(data: Development, normals: Sequence[int], seed: int) -> list[_Picture]:
    """As many on each part, one after the other, as make `MOST` together, or one on each."""
    found: list[_Picture] = []
    for drawn in range(math.ceil(MOST / len(normals))):
        for place, row in enumerate(normals):
            if len(found) >= MOST:
                break
            batch = data.batch([row])
            generator = torch.Generator().manual_seed(_drawn_by(seed, drawn * len(normals) + place))
            made = synthesise(batch.image, None, _part(data, batch), _synthesis(data.frame), generator)
            if bool(made.label.all()):
                found.append(_bytes_of(replace(batch, image=made.image, mask=made.mask)))
    if not found:
        raise StageError(f"{data.index.category}: no synthetic defect can be drawn into its pictures; give real ones")
    return found


def _part(data: Development, batch: Batch) -> Tensor | None:
    """Where a defect may lie; None: anywhere."""
    if data.index.surface:
        return batch.region
    return (foreground_mask(batch.image, batch.region) > 0).float()


def _synthesis(frame: Frame) -> SynthesisConfig:
    """From noise of a single cell to that of cells of 8 pixels."""
    return SynthesisConfig(
        probability=1.0,
        self_augmentation=1.0,
        blend_low=0.2,
        blend_high=0.8,
        perlin_threshold=0.5,
        perlin_max_exponent=max(0, int(math.log2(min(frame.size) / _SMALLEST_CELL))),
    )


def _drawn_by(seed: int, number: int) -> int:
    digest = hashlib.sha256(f"defect {number} of seed {seed}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _bytes_of(batch: Batch) -> _Picture:
    region = None if batch.region is None else batch.region.cpu()
    return to_bytes(255 * batch.image).byte().cpu(), batch.mask.cpu() > 0.5, region
