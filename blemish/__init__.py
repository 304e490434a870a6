"""The door of an installed Blemish: the command, and the detector of an exported file.

In a wheel this is the only package, with all else in its folder `repository`, laid out as in a clone. The names there
(`cli`, `pipelines`, `anomaly_models`) are found once someone asks for what is behind the door, and never meet those of
other packages in `site-packages`. In a clone they are found as they are.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.inference.detector import Detector

__all__ = ["Detector", "main"]

_REPOSITORY = Path(__file__).parent / "repository"


def main() -> None:
    """The command `blemish`."""
    _find_the_code()
    from cli import main

    main()


def __getattr__(name: str) -> Any:
    """`from blemish import Detector`, whose import takes onnxruntime's, only where it is asked for."""
    if name != "Detector":
        raise AttributeError(f"module 'blemish' has no attribute '{name}'")
    _find_the_code()
    from pipelines.inference.detector import Detector

    return Detector


def _find_the_code() -> None:
    if _REPOSITORY.is_dir() and str(_REPOSITORY) not in sys.path:
        sys.path.insert(0, str(_REPOSITORY))
