"""A bundle's answers to pictures as programs have them at hand: paths, bytes, or bytes as Base64."""

import base64
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipelines.errors import ExportError, ImageError
from pipelines.inference.bundle import Bundle

COLUMNS = ("score", "threshold", "decision", "disposition", "error")
_DICOM = slice(128, 132), b"DICM"  # where such a file says so


class Answers:
    """Scores pictures and decides, one after the other.

    Raises:
        ExportError: the bundle is none, or has changed.
    """

    def __init__(self, path: Path) -> None:
        self._engine = Bundle(path).engine()

    def __call__(self, pictures: Iterable[object]) -> list[dict[str, Any]]:
        """Of each picture its `COLUMNS`, of which the last or the others are None.

        A text is a path where there is such a file, and Base64 where not. What cannot be read does not stop the others.
        """
        return [self._answer(picture) for picture in pictures]

    def _answer(self, picture: object) -> dict[str, Any]:
        try:
            return self._scored(*_content(picture))
        except (ImageError, ExportError) as error:
            return {**dict.fromkeys(COLUMNS), "error": str(error)}

    def _scored(self, content: bytes | None, name: Path) -> dict[str, Any]:
        engine = self._engine
        rgb = engine.read(name) if content is None else engine.decode(content, name)
        score = float(engine(engine.fitted(rgb, str(name)))[1][0])
        card = engine.card
        found = score, card.threshold, card.decision(score), card.disposition(score), None
        return dict(zip(COLUMNS, found, strict=True))


def _content(picture: object) -> tuple[bytes | None, Path]:
    """Bytes and what they are called, or no bytes and their file; raises ImageError."""
    if isinstance(picture, os.PathLike):
        return None, Path(picture)
    if isinstance(picture, str):
        if os.path.isfile(picture):  # noqa: PTH113  # which takes a text of any length
            return None, Path(picture)
        try:
            content = base64.b64decode(picture, validate=True)
        except ValueError:
            raise ImageError(f"'{picture[:100]}': neither a file here nor a picture's bytes as Base64") from None
    elif isinstance(picture, bytes | bytearray | memoryview):
        content = bytes(picture)
    else:
        raise ImageError(f"no picture but {picture!r:.100}; give its path, its bytes, or these as Base64")
    place, mark = _DICOM
    return content, Path("picture.dcm" if content[place] == mark else "picture")
