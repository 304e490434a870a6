"""Section `prepare` of params.yaml."""

import re
from pathlib import PurePath
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeInt,
    PositiveInt,
    RootModel,
    Tag,
    model_validator,
)

from anomaly_models.common.settings import Settings, Sides
from pipelines.data.index import Layout
from pipelines.pictures.frames import Fit, Frame
from pipelines.pictures.images import Filter
from pipelines.pictures.reading import AboveWhite, Reading
from pipelines.pictures.windows import Window

Corner: TypeAlias = Annotated[tuple[NonNegativeInt, NonNegativeInt], Field(strict=False)]  # x, y of the upright picture
Polygon: TypeAlias = Annotated[tuple[Corner, ...], Field(strict=False, min_length=3)]

LayoutName = Literal["auto", Layout]


class AnomalousTrainConfig(Settings):
    """Section `prepare.anomalous_train`: the real anomalies that supervised methods may learn from.

    A model that learns from them is not tested on them; whether others are, `evaluate.learnt_defects` says. `spread` is
    the published protocol of BGAD (Yao et al., CVPR 2023): count // T of each of the T types, the rest at random; at
    least half of each type stays. `one_type` is the open-set protocol: all from one type, drawn by the seed, and a
    model that learns from them is tested on nothing else of that type.
    """

    count: NonNegativeInt  # per category, at the most
    protocol: Literal["spread", "one_type"]


class RegionConfig(Settings):
    """Of the pictures of a category, all of one size, where a defect counts: elsewhere nothing is learnt nor looked at.

    Either a mask, white there and black elsewhere, or polygons; what lies in any of them counts.
    """

    mask: Annotated[str, Field(min_length=1)] | None = None  # a PNG, BMP or TIFF; relative to the category's folder
    polygons: Annotated[tuple[Polygon, ...], Field(strict=False, min_length=1)] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.mask is None) == (self.polygons is None):
            raise ValueError("give either `mask` or `polygons`")
        path = PurePath(self.mask or "")
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"the mask {self.mask} must lie in the category's own folder, to which it is relative")
        return self


class FolderGroups(Settings):
    """The group is the name of the folder that many levels below the good parts' own; 1 is the first below it."""

    folder: PositiveInt


def _capturing(pattern: str) -> str:
    try:
        expression = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"not a regular expression: {error}") from None
    if not expression.groups:
        raise ValueError("captures nothing: put what tells the group in parentheses, as in '_(lot[0-9]+)_'")
    if len(expression.groupindex) > 1:
        raise ValueError(f"names {len(expression.groupindex)} groups ({', '.join(expression.groupindex)}): name one")
    return pattern


class PatternGroups(Settings):
    """The group is what is captured, by the named parentheses or else the first, in a path in the category's folder."""

    pattern: Annotated[str, AfterValidator(_capturing)]

    def search(self, path: str) -> str | None:
        """What is captured, None where that is nothing."""
        expression = re.compile(self.pattern)
        found = expression.search(path)
        return found[next(iter(expression.groupindex), 1)] or None if found else None


def _kind(value: Any) -> str | None:
    if isinstance(value, FolderGroups | PatternGroups):
        value = dict(value)
    keys = {"folder", "pattern"} & set(value) if isinstance(value, dict) else set()
    return f"by {keys.pop()}" if len(keys) == 1 else None


# Where the group of a picture is found, of what was made or photographed together: a day, a lot, a camera, an item.
Groups = Annotated[
    Annotated[FolderGroups, Tag("by folder")] | Annotated[PatternGroups, Tag("by pattern")],
    Discriminator(
        _kind,
        custom_error_type="groups",
        custom_error_message="Input should be null, or {folder: LEVEL}, or {pattern: 'REGULAR EXPRESSION'}",
    ),
]


Share = Annotated[float, Field(gt=0, lt=1)]
# A share of the good parts, or none at all: each is scored by a model that learns from the other folds.
HoldOut = Annotated[
    Annotated[Share, Tag("a share")] | Annotated[Literal["folds"], Tag("all")],
    Discriminator(lambda value: "all" if isinstance(value, str) else "a share"),
]


class View(BaseModel):
    """What `prepare` must know of a model's section; the rest is the model's own."""

    model_config = ConfigDict(frozen=True, strict=True)

    image_size: Sides  # pixels
    resize: Filter
    fit: Fit


class Views(RootModel[dict[str, View]]):
    """Section `models`."""

    @property
    def frames(self) -> dict[str, Frame]:
        """What each model sees of a picture."""
        return {model: Frame(view.image_size, view.resize, view.fit) for model, view in self.root.items()}


class PrepareConfig(Settings):
    """Section `prepare` of `params.yaml`. What pictures are resized to, the models' own sections say."""

    layout: LayoutName  # of the categories' folders (docs/layouts.md); auto: what each of them looks like
    black_level: Annotated[int, Field(ge=0, le=65534)]  # 16-bit value shown as black, as are those below
    white_level: Annotated[int, Field(ge=1, le=65535)]  # 16-bit value shown as white, above black_level
    above_white: AboveWhite  # what becomes of a value above white_level
    page: NonNegativeInt | None  # of files that hold several, from 0; None: such a file is refused
    dicom_window: Window  # the first that a file names, or one for all
    max_megapixels: PositiveInt  # larger pictures are refused: a file of kilobytes may unpack to gigabytes
    holdout: HoldOut  # of the normal training images
    test_normal: Share  # share of `normal`, in the plain-folder layout only
    groups: Groups | None  # which stay whole when images are held out, or to test on
    anomalous_train: AnomalousTrainConfig
    regions: dict[str, RegionConfig]  # by category, of those that have one
    surfaces: list[str]  # categories that fill the image: no part stands out from a background
    seed: NonNegativeInt

    @model_validator(mode="after")
    def _has_a_window(self) -> Self:
        if self.black_level >= self.white_level:
            raise ValueError(f"black_level {self.black_level} is not below white_level {self.white_level}")
        return self

    @property
    def reading(self) -> Reading:
        """What its settings say of how pictures are read."""
        return Reading.of(self)
