"""What is said of a picture that is refused."""

from pathlib import Path

import pytest

from pipelines.errors import ImageError
from pipelines.pictures import images
from pipelines.pictures.reading import Reading


def refused(path: Path, reading: Reading) -> str:
    """The one line, without the path that it begins with."""
    with pytest.raises(ImageError) as caught:
        images.load_rgb(path, reading)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")
