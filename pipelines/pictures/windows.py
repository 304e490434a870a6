"""The window of DICOM pictures as a setting; `reading` has what it does."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from anomaly_models.common.settings import Settings


class GivenWindow(Settings):
    """One for all files, in the units of `reading.DicomWindow`."""

    centre: float
    width: Annotated[float, Field(ge=1)]


def _is_named(value: Any) -> str:
    return "named" if isinstance(value, str) else "given"


# The first that a file names, or one for all files.
Window = Annotated[
    Annotated[Literal["file"], Tag("named")] | Annotated[GivenWindow, Tag("given")], Discriminator(_is_named)
]
