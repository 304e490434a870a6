"""A bundle that proved itself on this machine, and the next one that is put in its place."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path

from pipelines.errors import ExportError
from pipelines.inference.bundle import Bundle
from pipelines.inference.card import Card
from pipelines.inference.drift import Monitor
from pipelines.inference.engine import Engine

_LOG = logging.getLogger(__name__)  # whose warnings Python writes to stderr as they are, if nobody asked otherwise


class Proven:
    """The detector of the bundle at a path.

    Raises:
        ExportError: the bundle is none, has changed, or does not answer its samples on this machine as it did.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        self.path, self._threads = path, threads
        self.refused: str | None = None  # why the file that lies there now was not taken over
        self._stamp = _stamp(path)
        self.engine, self.monitor = _proven(path, threads)

    @property
    def card(self) -> Card:
        return self.engine.card

    def renew(self) -> None:
        """Take over the file if it is another one now; not one that is damaged or does not prove itself here."""
        stamp = _stamp(self.path)
        if stamp == self._stamp:
            return
        try:
            self.engine, self.monitor = _proven(self.path, self._threads)
            self.refused = None
            _LOG.warning("%s: taken over, run %s", self.path, self.card.run_id)
        except Exception as error:  # whatever it was: the one before goes on answering
            self.refused = str(error) or type(error).__name__
            _LOG.warning("%s; the one before stays in use", self.refused)
        self._stamp = stamp

    def note(self, values: Mapping[str, float]) -> None:
        """A part's score and measures; what has changed by now is told in the log."""
        for change in self.monitor.add(time.time(), values):
            _LOG.warning("%s: %s", self.path, change.text)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """What is another as soon as a file is; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _proven(path: Path, threads: int | None) -> tuple[Engine, Monitor]:
    """Raises ExportError unless it is whole and answers its samples here as it did where it was made."""
    bundle = Bundle(path)
    engine = bundle.engine(threads=threads)
    if different := [replayed for replayed in bundle.replay(engine) if not replayed.is_same]:
        raise ExportError(
            f"{path}: {len(different)} of its samples are not answered on this machine as they were where it was made "
            f"({different[0].line}); `blemish verify` shows all"
        )
    return engine, Monitor(bundle.calibration, engine.card.threshold)
