"""An exported graph and its card -> maps and scores of pictures. Needs onnxruntime, numpy and Pillow."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from pipelines.errors import ExportError, ImageError
from pipelines.inference.card import Card
from pipelines.memory import out_of_memory
from pipelines.pictures import images
from pipelines.pictures.frames import Window, greyed, read_back, size_of
from pipelines.pictures.overlays import Map, Mask, Pixels, resize_map
from pipelines.pictures.tiles import score_of, tiling
from pipelines.unreadable import in_short, reading

AGAIN = "export it again, or copy it again"  # what to do about a file that is damaged


class Inputs(NamedTuple):
    """What a detector takes."""

    pixels: NDArray[np.uint8]  # (B, H, W, 3)
    region: NDArray[np.bool_] | None  # (B, H, W), where the image counts; None: everywhere

    @classmethod
    def together(cls, several: Sequence["Inputs"]) -> "Inputs":
        """As one batch; of one detector."""
        regions = [inputs.region for inputs in several if inputs.region is not None]
        return cls(np.concatenate([inputs.pixels for inputs in several]), np.concatenate(regions) if regions else None)


class Engine:
    """A graph that runs, and all that its card says of pictures before and after it.

    Raises:
        ExportError: the graph is not that of the card.
    """

    def __init__(self, path: Path, session: onnxruntime.InferenceSession, card: Card) -> None:
        self.path, self._session = path, session  # the path is what is named where something is wrong
        self.card = card
        with reading(path, AGAIN):
            self._of_interest = None if card.region is None else read_back(card.region)
            self._tiling = tiling(card.image_size, card.tiles)
        _require_match(path, session, card)

    @property
    def provider(self) -> str:
        """What runs the graph, in ONNX Runtime's words."""
        return str(self._session.get_providers()[0])

    def decode(self, content: bytes, name: Path) -> NDArray[np.uint8]:
        """A file's bytes -> (H, W, 3), as `read` does; `name` is told, and its suffix looked at; raises ImageError."""
        return images.read_bytes(content, name, self.card.reading).rgb

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
        with reading(self.path, AGAIN):
            anomaly_map, score = self._session.run(["anomaly_map", "score"], feed)
        if (anomaly_map.shape, score.shape) != ((len(image), 1, *image.shape[2:]), (len(image),)):
            shapes = f"{anomaly_map.shape} and {score.shape}"
            raise ExportError(f"{self.path}: its maps and scores for {image.shape} have shapes {shapes}; {AGAIN}")
        return anomaly_map, score

    def restored(self, anomaly_map: Map, rgb: Pixels) -> Map:
        """A map (H, W) at the size of the picture that it is of."""
        original = size_of(rgb)
        shown = self.card.frame.shape.restored(anomaly_map, original, 0)
        return resize_map(shown, original.width, original.height)


def open_session(
    path: Path, providers: list[str] | None = None, threads: int | None = None, *, content: bytes | None = None
) -> onnxruntime.InferenceSession:
    """Open any ONNX file, by default on the CPU with a thread per core; of one that is not on the disk, its `content`.

    Raises:
        ExportError: the file is missing or onnxruntime cannot read it.
    """
    if content is None and not path.is_file():
        raise ExportError(f"{path}: no such file; give the model.onnx that `blemish export` wrote")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: the warnings are about graph clean-up
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        # Its fallback would say so on stdout, with stars, and try the very same again.
        return onnxruntime.InferenceSession(
            str(path) if content is None else content,
            options,
            providers=providers or ["CPUExecutionProvider"],
            enable_fallback=False,
        )
    except Exception as error:  # onnxruntime's own exceptions share no base class but Exception
        if out_of_memory(error):
            raise
        raise ExportError(f"{path}: not an ONNX model that onnxruntime can run ({in_short(error)})") from None


def _require_match(path: Path, session: onnxruntime.InferenceSession, card: Card) -> None:
    """Raise ExportError if the graph takes or gives something else than its card says."""
    size = card.input_size
    expected = {"image": [3, *size]} | ({"region": [1, *size]} if card.takes_region else {})
    expected |= {"tile": []} if card.by_tile else {}
    with reading(path, AGAIN):  # names are bytes, and need not be text
        found = {value.name: value.shape[1:] for value in session.get_inputs()}
        given = {value.name for value in session.get_outputs()}
    if found != expected:
        raise ExportError(f"{path}: its graph takes {found}, its metadata say {expected}; {AGAIN}")
    if missing := {"anomaly_map", "score"} - given:
        raise ExportError(f"{path}: its graph gives no {', '.join(sorted(missing))}; {AGAIN}")
