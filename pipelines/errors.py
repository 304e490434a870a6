"""Errors that are the user's to mend: `cli` prints them as one line and exits. Anything else keeps its traceback."""

import difflib
from collections.abc import Iterable, Sequence

_PROBLEMS_SHOWN = 10


class BlemishError(Exception):
    """Names the thing, the value that was found, and the remedy."""


class ParamsError(BlemishError):
    """`params.yaml` is wrong; the message lists every problem."""


class ArgumentError(BlemishError):
    """What was typed behind a verb and cannot be used."""


class DatasetError(BlemishError):
    """A folder of images that cannot be used as it is."""


class ImageError(DatasetError):
    """A file that cannot be read as an image."""


class DownloadError(BlemishError):
    """An archive that could not be fetched, verified or extracted."""


class WeightsError(BlemishError):
    """Pretrained weights that are missing, unreachable or do not fit."""


class TrainingDiverged(BlemishError):
    """A loss that is not finite, or what a finished model says."""


class StageError(BlemishError):
    """A stage that lacks what an earlier stage makes, or is already running."""


class ExportError(BlemishError):
    """An exported graph that does not reproduce its model, or a file that is no exported model."""


def hint(name: str, known: Iterable[str]) -> str:
    """A guess at what a misspelt name was to be, to stand behind it in a message; empty where nothing is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def told(problems: Sequence[BlemishError], heading: str) -> str:
    """One message with the first of the problems under their heading; a single one needs no heading."""
    if len(problems) == 1:
        return str(problems[0])
    lines = [heading, *(f"  - {problem}" for problem in problems[:_PROBLEMS_SHOWN])]
    if len(problems) > _PROBLEMS_SHOWN:
        lines.append(f"  and {len(problems) - _PROBLEMS_SHOWN} more")
    return "\n".join(lines)
