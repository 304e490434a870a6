"""An exported file -> what it says of itself, and a detector. Needs onnxruntime and what reads images; never torch."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from pydantic import FiniteFloat, TypeAdapter

from anomaly_models.common.settings import Sides, Tiles
from anomaly_models.common.sizes import Size
from pipelines.errors import ArgumentError, ExportError, ImageError
from pipelines.memory import out_of_memory
from pipelines.pictures import images
from pipelines.pictures.frames import Fit, Frame, Window, greyed, read_back, size_of
from pipelines.pictures.overlays import Map, Mask, Pixels, resize_map
from pipelines.pictures.reading import AboveWhite, Reading
from pipelines.pictures.reading import Window as DicomWindow
from pipelines.pictures.tiles import score_of, tiling
from pipelines.records import reading

FORMAT = "6"  # of the metadata below

Decision = Literal["good", "defect"]


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
class ModelCard:
    """What an exported file says of itself, in the ONNX metadata under `blemish.<field>`, each value as JSON."""

    model: str
    category: str
    image_size: Sides  # what pictures are made to, pixels: the input, but for tiles
    resize: images.Filter  # how pictures come to it
    fit: Fit  # likewise: distorted to it, whole between borders, their centre, or as they are between borders
    tiles: Tiles | None  # that it is cut into, each an input; None: it is one
    by_tile: bool  # the network knows which tile it sees, and has a memory for each
    scored_pixels: int  # with tiles, the score is the mean of so many of the largest pixels of the whole map
    region: str | None  # of interest, as `frames.written`: outside of it nothing counts; for pictures of its size alone
    black_level: int  # 16-bit value shown as black
    white_level: int  # likewise as white
    above_white: AboveWhite
    page: int | None  # of files that hold several; None: such a file is refused
    dicom_window: DicomWindow  # what of a DICOM's values is shown
    max_megapixels: int  # larger pictures are refused
    threshold: FiniteFloat  # a score above it is a defect
    pixel_threshold: FiniteFloat  # likewise for the map
    # Of good parts, that the held-out ones promise at the threshold; not what was asked for. None: a person chose it.
    false_alarm_rate: float | None
    groups: (
        str | None
    )  # whether groups of good parts (days, lots, cameras) score alike; None where none were told apart
    run_id: str
    data_sha256: str
    weights: list[str]  # of each pretrained network inside: what it is, its source and licence
    params: dict[str, object]
    choices: tuple[ThresholdChoice, ...] = ()  # of the threshold, by people, the last one last; none: it is `export`'s

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
        return Reading(
            self.black_level,
            self.white_level,
            self.above_white,
            self.page,
            self.dicom_window,
            self.max_megapixels,
        )

    def decision(self, score: float) -> Decision:
        """What is said of a picture.

        Raises:
            ExportError: the score is no number. No comparison with NaN is true: it would pass as good.
        """
        if not math.isfinite(score):
            raise ExportError(f"the model's score is {score}; inspect this part by hand")
        return "defect" if score > self.threshold else "good"

    def at(self, threshold: float) -> Self:
        """The same with another threshold, at which the held-out parts promise nothing."""
        return self if threshold == self.threshold else replace(self, threshold=threshold, false_alarm_rate=None)

    def chosen(self, choice: ThresholdChoice) -> Self:
        """The same with the threshold that a person chose."""
        return replace(self.at(choice.threshold), choices=(*self.choices, choice))

    def to_json(self) -> dict[str, Any]:
        return dict(_CARD.dump_python(self, mode="json"))

    def to_metadata(self) -> dict[str, str]:
        values = {f"blemish.{name}": json.dumps(value) for name, value in self.to_json().items()}
        return {"blemish.format": FORMAT, **values}


_CARD = TypeAdapter(ModelCard)
_AGAIN = "export it again, or copy it again"
_LONGEST_REASON = 200  # characters


class Inputs(NamedTuple):
    """What a detector takes."""

    pixels: NDArray[np.uint8]  # (B, H, W, 3)
    region: NDArray[np.bool_] | None  # (B, H, W), where the image counts; None: everywhere

    @classmethod
    def together(cls, several: Sequence["Inputs"]) -> "Inputs":
        """As one batch; of one detector."""
        regions = [inputs.region for inputs in several if inputs.region is not None]
        return cls(np.concatenate([inputs.pixels for inputs in several]), np.concatenate(regions) if regions else None)


class Detector:
    """An exported model, ready to run.

    Raises:
        ExportError: the file is missing, no ONNX model, not exported by Blemish, or by a newer format.
    """

    def __init__(self, path: Path, providers: list[str] | None = None, threads: int | None = None) -> None:
        self.path = path
        self._session = open_session(path, providers, threads)
        self.card = _read_card(path, self._session)
        with reading(path, _AGAIN):
            self._of_interest = None if self.card.region is None else read_back(self.card.region)
            self._tiling = tiling(self.card.image_size, self.card.tiles)
        _require_match(path, self._session, self.card)

    @property
    def provider(self) -> str:
        """What runs the graph, in ONNX Runtime's words."""
        return str(self._session.get_providers()[0])

    def read(self, path: Path) -> NDArray[np.uint8]:
        """A file -> (H, W, 3), by the path that `prepare` took; raises ImageError."""
        return images.load_rgb(path, self.card.reading)

    def fitted(self, rgb: Pixels, name: str) -> Inputs:
        """A picture (H, W, 3) called `name` -> a batch of one, by the path that `prepare` took.

        Raises:
            ImageError: its size is not that of the region of interest, or it does not go into the frame.
        """
        frame, original = self.card.frame, size_of(rgb)
        if self._of_interest is not None and size_of(self._of_interest) != original:
            height, width = self._of_interest.shape
            raise ImageError(
                f"{name}: {original.width} x {original.height} pixels, but the model's region of interest is of "
                f"pictures of {width} x {height}; give it the pictures that it was trained for"
            )
        if not frame.shape.holds(original):
            raise ImageError(
                f"{name}: {original.width} x {original.height} pixels, but its model does not resize and takes "
                f"up to {frame.size.width} x {frame.size.height}; give it those that it was trained for"
            )
        region = frame.shape.region(original, self._of_interest)
        pixels = frame.fitted(greyed(rgb, self._of_interest))
        return Inputs(pixels[None], None if region is None else region[None])

    def load(self, path: Path) -> Inputs:
        """A file -> a batch of one, by the path that `prepare` took; raises ImageError."""
        return self.fitted(self.read(path), str(path))

    def __call__(self, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
        """Anomaly maps (B, 1, H, W), 0 where nothing counts, and scores (B,)."""
        if self._tiling is None:
            return self._run(inputs)
        regions = [None] * len(inputs.pixels) if inputs.region is None else list(inputs.region)
        pictures = list(zip(inputs.pixels, regions, strict=True))
        # A tile after the other: it takes no more memory than one and the map.
        maps = [self._tiling.stitched(partial(self._look, pixels, region), region) for pixels, region in pictures]
        scores = [score_of(found, self.card.scored_pixels, region) for found, region in zip(maps, regions, strict=True)]
        together = maps[0][None] if len(maps) == 1 else np.stack(maps)  # which would copy what may fill half the memory
        return together[:, None], np.array(scores, dtype=np.float32)

    def _look(self, pixels: Pixels, region: Mask | None, number: int, window: Window) -> Map:
        """The map of a tile of a picture (H, W, 3) in its frame."""
        inputs = Inputs(pixels[window][None], None if region is None else region[window][None])
        found: Map = self._run(inputs, number if self.card.by_tile else None)[0][0, 0]
        return found

    def _run(self, inputs: Inputs, tile: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        region = None if inputs.region is None else inputs.region[:, None].astype(np.float32)
        return self.graph(images.to_input(inputs.pixels), region, tile)

    def graph(
        self, image: NDArray[np.float32], region: NDArray[np.float32] | None, tile: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """What the file itself makes of its inputs: (B, 3, H, W) in [0, 1] and, where it has it, (B, 1, H, W).

        `tile`: which one all of them are, where each has its own memory.
        """
        given = {"region": region, "tile": None if tile is None else np.array([tile], dtype=np.int64)}
        feed = {"image": image} | {name: value for name, value in given.items() if value is not None}
        with reading(self.path, _AGAIN):
            anomaly_map, score = self._session.run(["anomaly_map", "score"], feed)
        if (anomaly_map.shape, score.shape) != ((len(image), 1, *image.shape[2:]), (len(image),)):
            shapes = f"{anomaly_map.shape} and {score.shape}"
            raise ExportError(f"{self.path}: its maps and scores for {image.shape} have shapes {shapes}; {_AGAIN}")
        return anomaly_map, score

    def restored(self, anomaly_map: Map, rgb: Pixels) -> Map:
        """A map (H, W) at the size of the picture that it is of."""
        original = size_of(rgb)
        shown = self.card.frame.shape.restored(anomaly_map, original, 0)
        return resize_map(shown, original.width, original.height)


def as_threshold(text: str) -> float:
    """What someone typed as a threshold.

    Raises:
        ArgumentError: it is no number, or not a finite one.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ArgumentError(f"threshold '{text}': not a finite number; give one such as 2.5")
    return value


def open_session(
    path: Path, providers: list[str] | None = None, threads: int | None = None
) -> onnxruntime.InferenceSession:
    """Open any ONNX file, by default on the CPU with a thread per core.

    Raises:
        ExportError: the file is missing or onnxruntime cannot read it.
    """
    if not path.is_file():
        raise ExportError(f"{path}: no such file; give the model.onnx that `blemish export` wrote")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: the warnings are about graph clean-up
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        # Its fallback would say so on stdout, with stars, and try the very same again.
        return onnxruntime.InferenceSession(
            str(path), options, providers=providers or ["CPUExecutionProvider"], enable_fallback=False
        )
    except Exception as error:  # onnxruntime's own exceptions share no base class but Exception
        if out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:_LONGEST_REASON]
        raise ExportError(f"{path}: not an ONNX model that onnxruntime can run ({reason})") from None


def _read_card(path: Path, session: onnxruntime.InferenceSession) -> ModelCard:
    with reading(path, _AGAIN):
        metadata = session.get_modelmeta().custom_metadata_map
    if "blemish.format" not in metadata:
        raise ExportError(f"{path}: an ONNX model, but not one that `blemish export` wrote; it has no threshold")
    if metadata["blemish.format"] != FORMAT:
        raise ExportError(
            f"{path}: written in format {metadata['blemish.format']}, this version reads {FORMAT}; export it again"
        )
    with reading(path, _AGAIN):
        if missing := [name for name in ModelCard.__dataclass_fields__ if f"blemish.{name}" not in metadata]:
            raise ValueError(f"no blemish.{missing[0]} in its metadata")
        return _CARD.validate_python({n: json.loads(metadata[f"blemish.{n}"]) for n in ModelCard.__dataclass_fields__})


def _require_match(path: Path, session: onnxruntime.InferenceSession, card: ModelCard) -> None:
    """Raise ExportError if the graph takes or gives something else than its card says."""
    size = card.input_size
    expected = {"image": [3, *size]} | ({"region": [1, *size]} if card.takes_region else {})
    expected |= {"tile": []} if card.by_tile else {}
    with reading(path, _AGAIN):  # names are bytes, and need not be text
        found = {value.name: value.shape[1:] for value in session.get_inputs()}
        given = {value.name for value in session.get_outputs()}
    if found != expected:
        raise ExportError(f"{path}: its graph takes {found}, its metadata say {expected}; {_AGAIN}")
    if missing := {"anomaly_map", "score"} - given:
        raise ExportError(f"{path}: its graph gives no {', '.join(sorted(missing))}; {_AGAIN}")
