"""What every section of a file of settings is. It stands here since the pipeline knows the models, and not they it."""

import math
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    NonNegativeInt,
    PlainSerializer,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from anomaly_models.common.sizes import Size, Tiled

_LARGEST = 2.0**127  # a float32 goes to just below its double


class Settings(BaseModel):
    """Frozen and typed strictly; unknown keys and numbers that are not finite, for networks either, are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _finite_in_32_bits(cls, value: Any) -> Any:
        if isinstance(value, float) and _LARGEST < abs(value) < math.inf:  # infinity is the line's above to refuse
            raise ValueError(f"networks compute with numbers up to {_LARGEST:.2g}")
        return value


def _read(value: Any) -> Size:
    if isinstance(value, Size):
        return value
    oblong = isinstance(value, dict) and value.keys() == {"height", "width"}
    height, width = (value["height"], value["width"]) if oblong else (value, value)
    if type(height) is not int or type(width) is not int or min(height, width) < 1:
        raise PydanticCustomError("size", "Input should be above 0: a number for a square, or `height` and `width`")
    return Size(height, width)


# A size in a file: one number for a square, or a mapping of `height` and `width`.
Sides = Annotated[Size, BeforeValidator(_read), PlainSerializer(Size.written)]


class Tiles(Settings, Tiled):
    """How a picture is cut up, for a network that sees a part of it at a time."""

    side: Sides  # of a tile, pixels of the picture as `image_size` makes it; one that is smaller is a single tile
    overlap: NonNegativeInt  # pixels that neighbours share, or more; where they do, their maps are blended

    @model_validator(mode="after")
    def _advances(self) -> Self:
        if self.overlap >= min(self.side):
            raise ValueError(f"overlap {self.overlap} is not below side {self.side}: tiles would not advance; lower it")
        return self
