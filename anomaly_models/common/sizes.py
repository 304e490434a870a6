"""Sizes of pictures and of the tiles that they are cut into: plain, so that a machine on the line needs no more."""

import math
from typing import NamedTuple


class Size(NamedTuple):
    """Height and width of a picture, a map or a grid, in the order of tensors."""

    height: int
    width: int

    @classmethod
    def square(cls, side: int) -> "Size":
        return cls(side, side)

    @classmethod
    def read(cls, written: "int | dict[str, int]") -> "Size":
        """What `written` gave."""
        return cls(**written) if isinstance(written, dict) else cls.square(written)

    def written(self) -> "int | dict[str, int]":
        """As settings have it: a number for a square, else height and width by name."""
        return self.height if self.height == self.width else self._asdict()

    def __str__(self) -> str:
        """One number for a square, else width and height, as cameras and viewers say it: 1920x1080."""
        return str(self.width) if self.height == self.width else f"{self.width}x{self.height}"

    @property
    def area(self) -> int:
        return self.height * self.width

    def divided(self, by: int) -> "Size":
        """What is left of it at a stride, rounded down."""
        return Size(self.height // by, self.width // by)


class Tiled:
    """What follows from how a picture is cut up: tiles of a `side`, pixels, that share an `overlap` or more."""

    side: Size
    overlap: int

    def of(self, picture: Size) -> Size:
        """The size of the tiles of a picture."""
        return Size(min(self.side.height, picture.height), min(self.side.width, picture.width))

    def number(self, picture: Size) -> Size:
        """How many tiles stand above and beside one another."""
        advances = (
            math.ceil((whole - side) / (side - self.overlap))
            for whole, side in zip(picture, self.of(picture), strict=True)
        )
        return Size(*(1 + advance for advance in advances))
