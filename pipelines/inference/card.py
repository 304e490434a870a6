"""What an exported file says of itself: how pictures come to it, and what its scores mean. Plain Python."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, Self

from anomaly_models.common.sizes import Size, Tiled
from pipelines.errors import ExportError
from pipelines.pictures.frames import Fit, Frame
from pipelines.pictures.images import Filter
from pipelines.pictures.reading import AboveWhite, PlainWindow, Reading, WantedWindow

Decision = Literal["good", "defect"]
Disposition = Literal["accept", "review", "reject"]
Precision = Literal["float32", "int8"]


@dataclass(frozen=True, slots=True)
class ThresholdChoice:
    """That a person put another threshold in the place of the one before."""

    threshold: float
    former: float
    by: str  # who
    at: str  # when: ISO 8601, with the time zone
    because: str | None  # in the chooser's words
    on_test_images: str | None  # what the two make of them, in a sentence; None: they are not at hand


@dataclass(frozen=True, slots=True)
class Card:
    """What a picture goes through, and what was promised of the answer."""

    model: str
    category: str
    image_size: Size  # what pictures are made to, pixels: the input, but for tiles
    resize: Filter  # how pictures come to it
    fit: Fit  # likewise: distorted to it, whole between borders, their centre, or as they are between borders
    tiles: Tiled | None  # that it is cut into, each an input; None: it is one
    by_tile: bool  # the network knows which tile it sees, and has a memory for each
    scored_pixels: int  # with tiles, the score is the mean of so many of the largest pixels of the whole map
    region: str | None  # of interest, as `frames.written`: outside of it nothing counts; for pictures of its size alone
    black_level: int  # 16-bit value shown as black
    white_level: int  # likewise as white
    above_white: AboveWhite
    page: int | None  # of files that hold several; None: such a file is refused
    dicom_window: WantedWindow  # what of a DICOM's values is shown
    max_megapixels: int  # larger pictures are refused
    threshold: float  # a score above it is a defect
    pixel_threshold: float  # likewise for the map
    # Of good parts, that the held-out ones promise at the threshold; not what was asked for. None: a person chose it.
    false_alarm_rate: float | None
    reject_above: float | None  # a defect is rejected without a look if its score is above it; None: never
    # Of good parts, that go to a person: expected, and the ends of its 95 % interval. None: a person chose `threshold`.
    review_load: tuple[float, float, float] | None
    groups: (
        str | None
    )  # whether groups of good parts (days, lots, cameras) score alike; None where none were told apart
    run_id: str
    data_sha256: str
    weights: list[str]  # of each pretrained network inside: what it is, its source and licence
    params: dict[str, object]
    choices: tuple[ThresholdChoice, ...] = ()  # of the threshold, by people, the last one last; none: it is `export`'s
    precision: Precision = "float32"  # of its convolutions; a file from before there was another does not say

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """What `to_json` gave, taken as it is: of a file that is known to be whole."""
        tiles, window = values["tiles"], values["dicom_window"]
        read = {
            "image_size": Size.read(values["image_size"]),
            "tiles": None if tiles is None else PlainTiles(Size.read(tiles["side"]), tiles["overlap"]),
            "dicom_window": window if window == "file" else PlainWindow(**window),
            "review_load": None if values["review_load"] is None else tuple(values["review_load"]),
            "choices": tuple(ThresholdChoice(**choice) for choice in values["choices"]),
        }
        return cls(**{**values, **read})

    def to_json(self) -> dict[str, Any]:
        """Its fields, as JSON holds them."""
        tiles, window = self.tiles, self.dicom_window
        written = {
            "image_size": self.image_size.written(),
            "tiles": None if tiles is None else {"side": tiles.side.written(), "overlap": tiles.overlap},
            "dicom_window": window if window == "file" else {"centre": window.centre, "width": window.width},
            "review_load": None if self.review_load is None else list(self.review_load),
            "choices": [asdict(choice) for choice in self.choices],
        }
        return {field.name: getattr(self, field.name) for field in fields(self)} | written

    @property
    def frame(self) -> Frame:
        return Frame(self.image_size, self.resize, self.fit)

    @property
    def input_size(self) -> Size:
        """Of the graph, pixels."""
        return self.image_size if self.tiles is None else self.tiles.of(self.image_size)

    @property
    def takes_region(self) -> bool:
        """Whether the graph has a second input."""
        return self.frame.shape.has_borders or self.region is not None

    @property
    def reading(self) -> Reading:
        """How files are read."""
        return Reading.of(self)

    def decision(self, score: float) -> Decision:
        """What is said of a picture.

        Raises:
            ExportError: the score is no number. No comparison with NaN is true: it would pass as good.
        """
        if not math.isfinite(score):
            raise ExportError(f"the model's score is {score}; inspect this part by hand")
        return "defect" if score > self.threshold else "good"

    def disposition(self, score: float) -> Disposition:
        """What is done with a part: a defect goes to a person unless its score is high enough to reject it at once.

        Raises:
            ExportError: the score is no number.
        """
        if self.decision(score) == "good":
            return "accept"
        return "reject" if self.reject_above is not None and score > self.reject_above else "review"

    def at(self, threshold: float) -> Self:
        """The same with another threshold, at which the held-out parts promise nothing."""
        if threshold == self.threshold:
            return self
        return replace(self, threshold=threshold, false_alarm_rate=None, review_load=None)

    def chosen(self, choice: ThresholdChoice) -> Self:
        """The same with the threshold that a person chose."""
        return replace(self.at(choice.threshold), choices=(*self.choices, choice))


@dataclass(frozen=True, slots=True)
class PlainTiles(Tiled):
    """Tiles that were read, and have not to be checked."""

    side: Size
    overlap: int
