"""How a picture comes into the frame that a model sees, and how what the model says of it goes back.

What lies in the frame and is not to count, borders of a padded picture and all that is outside of the region of
interest, is of one grey in every picture, in training and at the line: nothing that lies there can reach a model.
"""

import base64
import io
from typing import Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from anomaly_models.common.sizes import Size
from pipelines.pictures.images import Filter, resize_mask, resize_rgb

Fit = Literal["stretch", "pad", "crop", "native"]
Window: TypeAlias = tuple[slice, slice]  # rows and columns
T = TypeVar("T", bound=np.generic)

WHOLE: Window = (slice(None), slice(None))
OUTSIDE = 128  # the grey of what does not count


class Place(NamedTuple):
    """Which part of a picture is seen, and where in the frame it is shown."""

    seen: Window  # of the picture
    shown: Window  # of the frame


class Shape(NamedTuple):
    """A frame for masks, which are resized by the nearest pixel whatever the pictures are by."""

    size: Size  # pixels
    # stretch: distorted to the frame; pad: whole, between borders; crop: its centre, which fills the frame; native: at
    # its own scale, between borders
    fit: Fit

    def __str__(self) -> str:
        return f"{self.size}" + ("" if self.fit == "stretch" else f", {self.fit}")

    @property
    def has_borders(self) -> bool:
        """Whether there may be more in the frame than the picture."""
        return self.fit in ("pad", "native")

    def holds(self, original: Size) -> bool:
        """Whether a picture of that size can be shown; only one that is not resized may be too large."""
        return self.fit != "native" or (original.height <= self.size.height and original.width <= self.size.width)

    def place(self, original: Size) -> Place:
        """Where a picture goes, of a size that the frame `holds`; pad and crop keep its proportions, to the pixel."""
        (height, width), frame = original, self.size
        if self.fit == "native":
            return Place(WHOLE, (_middle(height, frame.height), _middle(width, frame.width)))
        if self.fit == "crop":
            high = min(height, max(1, round(width * frame.height / frame.width)))
            wide = min(width, max(1, round(height * frame.width / frame.height)))
            return Place((_middle(high, height), _middle(wide, width)), WHOLE)
        if self.fit == "pad":
            scale = min(frame.height / height, frame.width / width)
            high, wide = (max(1, round(side * scale)) for side in original)
            return Place(WHOLE, (_middle(high, frame.height), _middle(wide, frame.width)))
        return Place(WHOLE, WHOLE)

    def fitted_mask(self, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """A mask (H, W) in the frame; outside of the picture nothing is marked."""
        place, result = self.place(size_of(mask)), np.zeros(self.size, dtype=bool)
        result[place.shown] = resize_mask(mask[place.seen], size_of(result[place.shown]))
        return result

    def region(self, original: Size, of_interest: NDArray[np.bool_] | None) -> NDArray[np.bool_] | None:
        """Which pixels of the frame count for a picture of that size; None if all do.

        `of_interest`, (H, W) at that size, is True in the region of interest, if there is one.
        """
        if of_interest is None and not self.has_borders:
            return None
        return self.fitted_mask(np.ones(original, dtype=bool) if of_interest is None else of_interest)

    def restored(self, array: NDArray[T], original: Size, outside: int) -> NDArray[T]:
        """What the frame (height, width, ...) shows of a picture of that size, at the scale of the frame.

        One between borders loses them; around one that was cropped there is what was not seen, as `outside`.
        """
        place = self.place(original)
        if self.fit != "crop":
            return array[place.shown]
        lengths = [window.stop - window.start for window in place.seen]
        whole = [
            max(side, round(side * of / seen)) for side, of, seen in zip(self.size, original, lengths, strict=True)
        ]
        result = np.full((*whole, *array.shape[2:]), outside, dtype=array.dtype)
        rows, columns = (_middle(side, length) for side, length in zip(self.size, whole, strict=True))
        result[rows, columns] = array
        return result


class Frame(NamedTuple):
    """What a picture is made into before a model sees it."""

    size: Size  # pixels
    resize: Filter
    fit: Fit

    def __str__(self) -> str:
        return f"{self.size} ({self.resize})" + ("" if self.fit == "stretch" else f", {self.fit}")

    @property
    def shape(self) -> Shape:
        return Shape(self.size, self.fit)

    def fitted(self, rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A picture (H, W, 3) in the frame, (height, width, 3)."""
        place = self.shape.place(size_of(rgb))
        if not self.shape.has_borders:
            return resize_rgb(rgb[place.seen], self.size, self.resize)
        result = np.full((*self.size, 3), OUTSIDE, dtype=np.uint8)
        result[place.shown] = resize_rgb(rgb, size_of(result[place.shown]), self.resize)
        return result


def size_of(array: NDArray[np.generic]) -> Size:
    """Of (H, W, ...)."""
    return Size(*array.shape[:2])


def greyed(rgb: NDArray[np.uint8], of_interest: NDArray[np.bool_] | None) -> NDArray[np.uint8]:
    """A picture (H, W, 3) without what lies outside of its region of interest (H, W), if it has one."""
    return rgb if of_interest is None else np.where(of_interest[..., None], rgb, np.uint8(OUTSIDE))


def written(of_interest: NDArray[np.bool_]) -> str:
    """A mask as the Base64 of a PNG of one bit a pixel, for a record."""
    file = io.BytesIO()
    Image.fromarray(of_interest).save(file, format="PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode("ascii")


def read_back(text: str) -> NDArray[np.bool_]:
    """The mask that was `written`."""
    with Image.open(io.BytesIO(base64.b64decode(text)), formats=("PNG",)) as image:
        return np.asarray(image) != 0


def _middle(side: int, of: int) -> slice:
    first = (of - side) // 2
    return slice(first, first + side)
