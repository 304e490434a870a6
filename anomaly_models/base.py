"""What a detector is, for the pipeline: four phases behind one small interface.

A model sees tensors only. Files, YAML, MLflow and the terminal belong to `pipelines`.
"""

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, NamedTuple, Self, TypeAlias

import torch
from pydantic import BaseModel, GetCoreSchemaHandler, PositiveInt, PrivateAttr
from pydantic_core import CoreSchema, core_schema
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from anomaly_models.common.row_cache import RowCache, by_pixels
from anomaly_models.common.settings import Settings, Sides, Tiles
from anomaly_models.common.shards import WHOLE, Shard, Share
from anomaly_models.common.sizes import Size
from anomaly_models.common.synthesis import SynthesisConfig


class ModelError(ValueError):
    """Data or settings that a model cannot work with; the message is meant for the user."""


@dataclass(frozen=True, slots=True)
class Wants:
    """What training reads beside the normal images of a category; the pipeline finds it and puts it into batches."""

    anomalies: int = 0  # real ones that follow the normal images of each batch, where the category has any
    foreground: bool = False  # where the part is, unless the category is a surface
    penalty: bool = False  # as many out-of-domain images as a batch has images
    textures: bool = False  # as many other surfaces
    teacher: str | None = None  # the setting `teacher`: a file of weights, for `load_teacher`
    synthesis: SynthesisConfig | None = None  # how the model draws defects into its batches, for whoever shows them


class _Whole(BaseModel):
    """How a model's section says what a tile is of."""

    image_size: Sides
    tiles: Tiles


class Config(Settings):
    """Hyper-parameters of a model, straight from `params.yaml`.

    No field has a default: a default is a parameter that DVC cannot see.
    """

    image_size: Sides  # what pictures are made to, pixels: the input, but for `tiles`
    resize: Literal["bilinear", "lanczos"]  # the filter that pictures come to it by
    # how: distorted, whole between borders, the centre of it, or as it is between borders
    fit: Literal["stretch", "pad", "crop", "native"]
    tiles: Tiles | None  # None: the model sees the picture at once
    batch_size: PositiveInt  # images per training step, and per gradient-free pass
    _num_tiles: int = PrivateAttr(default=1)  # of a network: how many a picture has

    @classmethod
    def __get_pydantic_core_schema__(cls, source: type[BaseModel], handler: GetCoreSchemaHandler) -> CoreSchema:
        """Around all that a model's own validators ask: a validator of this class would come before them."""
        return core_schema.no_info_wrap_validator_function(cls._of_a_tile, handler(source))

    @classmethod
    def _of_a_tile(cls, values: Any, handler: Callable[[Any], Self]) -> Self:
        """With `tiles`, all that the settings must fit is the tile."""
        if not isinstance(values, dict) or not isinstance(values.get("tiles"), dict | Tiles):
            return handler(values)
        whole = _Whole.model_validate({name: values[name] for name in _Whole.model_fields if name in values})
        tile = whole.tiles.of(whole.image_size)
        network = handler(values | {"image_size": tile, "tiles": None})
        network.check_for_tiles()
        return network.model_copy(update={"image_size": whole.image_size, "tiles": whole.tiles})

    def check_for_tiles(self) -> None:
        """Raise ValueError if settings of a network cannot be those of one that sees tiles."""
        if self.seen != self.image_size:
            raise ValueError(
                f"with tiles the model must see all of one: crop must be {self.image_size}, found {self.seen}"
            )
        if not self.scored_pixels:
            raise ValueError("with tiles the score is that of all maps together; set image_score: max")

    @property
    def network(self) -> Self:
        """Settings of the network: its input is a tile, if there are `tiles`."""
        if self.tiles is None:
            return self
        network = self.model_copy(update={"image_size": self.tiles.of(self.image_size), "tiles": None})
        network._num_tiles = self.tiles.number(self.image_size).area
        return network

    @property
    def places(self) -> int:
        """Of a network: how many tiles it tells from one another, with a memory for each; 1: all are alike to it."""
        return 1

    @property
    def seen(self) -> Size:
        """Of the centre of the input that the model sees, pixels; most see all of it."""
        return self.image_size

    @property
    def scored_pixels(self) -> int:
        """With `tiles`: how many of the largest pixels of all maps together the score is the mean of; 0: of none."""
        return 1

    @property
    def wants(self) -> Wants:
        """What a model of these settings wants; most want nothing."""
        return Wants()

    @property
    def learns_at_once(self) -> bool:
        """Whether `prepare` is all that a model of these settings learns by: no step, and no calibration."""
        return False


@dataclass(frozen=True, slots=True)
class Batch:
    """Images on one device, with what is known about them."""

    image: Tensor  # (B, 3, H, W) float32 RGB in [0, 1]; a model normalises for itself
    mask: Tensor  # (B, 1, H, W) float32, 1 where anomalous, real or synthesised alike
    label: Tensor  # (B,) bool, True where anomalous
    penalty: Tensor | None = None  # (B, 3, H, W) out-of-domain images (EfficientAD)
    texture: Tensor | None = None  # (B, 3, H, W) in [0, 1], other surfaces to fill synthetic defects with
    foreground: Tensor | None = None  # (B, 1, H, W) float32, 1 on the part; None: the part fills the image
    region: Tensor | None = None  # (B, 1, H, W) float32, 1 where the image counts, grey elsewhere; None: everywhere
    tile: Tensor | None = None  # (B,) int64, which tile of its picture an image is; None: pictures are not cut up
    row: Tensor | None = None  # (B,) int64 on the CPU, which image of its data set; for what is computed once per image

    @property
    def part(self) -> Tensor | None:
        """Where a defect may lie, like `foreground`."""
        return self.region if self.foreground is None else self.foreground

    def of(self, share: Share) -> "Batch":
        """The images of one process, and what is known about them."""
        known: dict[str, Tensor | None] = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: share.of(value) for name, value in known.items() if value is not None})


def places_in(batch: Batch, places: int) -> Iterator[tuple[int, slice | Tensor]]:
    """The tiles that a model of so many places tells from one another, and which images of a batch are of each."""
    if places == 1:
        yield 0, slice(None)
        return
    assert batch.tile is not None, "pictures of several places are cut up"
    for place in sorted(set(batch.tile.tolist())):
        yield place, (batch.tile == place).to(batch.image.device)


class Prediction(NamedTuple):
    """Higher is more anomalous, on the model's own scale."""

    anomaly_map: Tensor  # (B, 1, H, W)
    score: Tensor  # (B,)


@dataclass(frozen=True, slots=True)
class Progress:
    """Where training stands. `generator` is a function of (seed, step): all of a step's randomness comes from it."""

    step: int  # 0-based
    total_steps: int
    generator: torch.Generator
    shard: Shard = WHOLE  # which of the processes that take the step together


ConfigClass: TypeAlias = type[Config]  # inside AnomalyModel the name Config is the class attribute


class AnomalyModel(nn.Module, ABC):
    """prepare, then losses batch by batch, then calibrate; ever after, forward.

    All that is learnt lives in parameters and buffers: `state_dict` is the whole model and the module itself is what
    gets exported. Building a model never touches the disk or the network; pretrained weights are put in afterwards.
    Concrete models are final, and take their own `Config` as the only argument.
    """

    Config: ClassVar[ConfigClass]
    min_holdout: ClassVar[int] = 0  # images that `calibrate` needs
    makes_it_smaller: ClassVar[str] = "choose narrower networks"  # for whom the exported file is too large
    learns_in_shares: ClassVar[bool] = False  # whether several processes can train it: its `losses` know of shards
    # Whether `losses` does one step of the same work on every batch, whatever the step's number and all values: a GPU
    # then records it once. It may not wait for the device, nor make a tensor on it of what Python holds.
    same_every_step: ClassVar[bool] = False
    _met: RowCache | None = None  # what precedes the scale, of each image, while the model remembers it

    @abstractmethod
    def forward(self, image: Tensor, region: Tensor | None = None) -> Prediction:
        """Score images (B, 3, H, W) in [0, 1], each by itself and deterministically.

        What lies outside the `region`, (B, 1, H, W) of 0 and 1, never counts: the map is 0 there.
        """

    def forward_at(self, image: Tensor, region: Tensor | None, tile: Tensor) -> Prediction:  # noqa: ARG002
        """As `forward`, of images that all are the same tile of their pictures, its number (1,) from 0."""
        return Prediction(*self(image, region))

    def load_teacher(self, state: Mapping[str, Tensor]) -> None:
        """Put in the weights of the file that the settings want; raises ModelError if they do not fit."""
        raise NotImplementedError(f"{type(self).__name__} wants a teacher but takes none")

    def prepare(self, normals: Iterable[Batch]) -> None:
        """Learn what needs no gradient from the normal images, before the first step.

        A model may pass over them more than once: iterated again, `normals` gives the same batches.
        """

    def prepare_together(self, normals: Iterable[Batch], share: Iterable[Batch], shard: Shard) -> None:  # noqa: ARG002
        """As `prepare`, by several processes, of which each has all `normals` and a `share` of them that is its own.

        All are then given the state of the first one. Unless a model shares out the work, that one does it alone.
        """
        if shard.rank == 0:
            self.prepare(normals)

    def total_steps(self, num_normals: int) -> int:  # noqa: ARG002
        """How many batches training takes, given the number of normal training images; 0 if gradient-free."""
        return 0

    def optimizer(self, total_steps: int) -> tuple[Optimizer, LRScheduler] | None:  # noqa: ARG002
        """The optimiser and its per-step schedule; None if the model is gradient-free."""
        return None

    def losses(self, batch: Batch, progress: Progress) -> Iterator[dict[str, Tensor]]:
        """Yield the named scalar terms of one optimiser step at a time; the loop minimises their sum.

        Terms that are only monitored are detached. With several processes (`progress.shard`) each gets the whole batch,
        and yields its share of every term: shares add up to what one process would yield.
        """
        raise NotImplementedError(f"{type(self).__name__} has an optimiser but no losses")

    def exportable(self) -> nn.Module:
        """A module with the same outputs to export in this one's place, if constants can be folded; else this one."""
        return self

    def calibrate(self, holdout: Iterable[Batch]) -> None:
        """Fix the scale of the map on normal images that training has not seen.

        `evaluate` does so again, on copies of the trained model and with some of the images left out: what precedes
        the scale goes through `once_per_image`, or is computed for each copy anew.
        """

    @contextlib.contextmanager
    def remembering(self) -> Iterator[None]:
        """Until it ends, and while nothing is learnt but the scale, each image passes the networks once."""
        self._met = RowCache()
        try:
            yield
        finally:
            self._met = None

    def once_per_image(self, compute: Callable[[Tensor], Sequence[Tensor]], image: Tensor) -> Sequence[Tensor]:
        """What `compute` makes of images (B, 3, H, W), per layer (B, ...); known images are not computed again."""
        return compute(image) if self._met is None else self._met(compute, image, by_pixels(image))

    def copied(self) -> Self:
        """A copy for another scale, which remembers what this one does."""
        return copy.deepcopy(self, {id(self._met): self._met})

    def check_scores(self, holdout: Iterable[Batch]) -> None:
        """Raise ModelError if the finished model cannot score these normal images, which training has not seen."""

    def warnings(self) -> Iterator[str]:
        """Say in one line each what the finished model knows to doubt of its training; read from its buffers."""
        return iter(())
