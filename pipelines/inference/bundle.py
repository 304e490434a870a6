"""A detector with its proof in one file, as a USB stick carries it: opened, checked byte by byte, replayed.

It is a ZIP that Python runs (`python gear.zip verify`), since the modules that score pictures lie in it. Nothing of it
is unpickled or unpacked to the disk. Its comment, the last bytes of the file, holds the SHA-256 of all bytes before it,
so that none can change unseen; `manifest.json` has that of each file.
"""

import csv
import hashlib
import io
import json
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipelines.errors import ExportError
from pipelines.inference.card import Card, Decision
from pipelines.inference.engine import Engine, open_session
from pipelines.pictures.overlays import Map
from pipelines.unreadable import reading

FORMAT = "2"
CARD, GRAPH, MANIFEST, CALIBRATION = "card.json", "model.onnx", "manifest.json", "calibration.csv"
SAMPLES, MAPS = "samples/samples.json", "samples/maps.npz"
TOLERANCE = 1e-4  # of a score or its threshold, where one is above 1: what processors round differently
_COMMENT = re.compile(rb"sha256:[0-9a-f]{64}")
_AGAIN = "copy it again, or make it again with `blemish bundle`"
_CHUNK = 2**20


class Sample(NamedTuple):
    """A picture of the bundle and what it scored when the bundle was made."""

    file: str  # in the bundle
    shows: str  # a defect's name, or "good"
    score: float
    decision: Decision


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a sample scores here."""

    sample: Sample
    score: float
    decision: Decision
    score_difference: float
    map_difference: float  # the largest of a pixel
    allowed: tuple[float, float]  # of the score, of the map

    @property
    def is_same(self) -> bool:
        """No comparison with NaN is true."""
        close = self.score_difference <= self.allowed[0] and self.map_difference <= self.allowed[1]
        return close and self.decision == self.sample.decision

    @property
    def line(self) -> str:
        """For a terminal."""
        said = "same" if self.is_same else "DIFFERS"
        was = "" if self.is_same else f", was {self.sample.score:.6g} {self.sample.decision}"
        return (
            f"{said:7}  score {self.score:.6g} {self.decision}{was} (off by {self.score_difference:.1e}, "
            f"map by {self.map_difference:.1e})  {self.sample.file}, {self.sample.shows}"
        )


class Bundle:
    """A bundle, every byte of which is the one that was written.

    Raises:
        ExportError: there is no such file, it is no bundle, one of its bytes has changed, or it has another format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        _require_whole(path)
        with reading(path, _AGAIN):
            self.about: dict[str, Any] = json.loads(self.read(CARD))
            if self.about["format"] != FORMAT:
                raise ExportError(
                    f"{path}: a bundle of format {self.about['format']}, this version reads {FORMAT}; make it again"
                )
            self.card = Card.from_json(self.about["detector"])

    def read(self, name: str) -> bytes:
        """A file of it."""
        with zipfile.ZipFile(self.path) as archive:
            return archive.read(name)

    def engine(self, providers: list[str] | None = None, threads: int | None = None) -> Engine:
        """Its detector, which names what is wrong by the bundle's path."""
        session = open_session(self.path, providers, threads, content=self.read(GRAPH))
        return Engine(self.path, session, self.card)

    @property
    def calibration(self) -> dict[str, list[float]]:
        """By column: what the held-out good parts scored, and how bright and sharp they are."""
        with reading(self.path, _AGAIN):
            rows = list(csv.DictReader(io.StringIO(self.read(CALIBRATION).decode(), newline="")))
            return {name: [float(row[name]) for row in rows if row[name]] for name in (rows[0] if rows else ())}

    @property
    def samples(self) -> list[Sample]:
        return [Sample(**sample) for sample in json.loads(self.read(SAMPLES))]

    def replay(self, engine: Engine) -> list[Replayed]:
        """Score its samples on this machine.

        Raises:
            ImageError: this machine's Pillow cannot read one.
        """
        with reading(self.path, _AGAIN), np.load(io.BytesIO(self.read(MAPS))) as maps:
            return [self._replayed(engine, sample, maps[str(number)]) for number, sample in enumerate(self.samples)]

    def _replayed(self, engine: Engine, sample: Sample, expected: Map) -> Replayed:
        rgb = engine.decode(self.read(sample.file), Path(sample.file))
        maps, scores = engine(engine.fitted(rgb, sample.file))
        score = float(scores[0])
        return Replayed(
            sample=sample,
            score=score,
            decision=engine.card.decision(score),
            score_difference=abs(score - sample.score),
            map_difference=float(np.abs(maps[0, 0].astype(np.float64) - expected).max()),
            allowed=(
                allowed(sample.score, engine.card.threshold),
                allowed(float(np.abs(expected).max()), engine.card.pixel_threshold),
            ),
        )


def verdict(bundle: Bundle, found: Sequence[Replayed]) -> str:
    """The last line of a verification."""
    different = sum(not replayed.is_same for replayed in found)
    named = f"{bundle.card.model} on {bundle.card.category}"
    if different:
        return (
            f"{bundle.path}: {different} of {len(found)} samples of {named} are not answered here as they were; do not "
            "use it on this machine"
        )
    return f"{bundle.path}: whole, and all {len(found)} samples of {named} are answered as they were"


def allowed(score: float, threshold: float) -> float:
    """How far a score, or a pixel of a map, may be from the one before: float32 rounds by a share of its value."""
    return TOLERANCE * max(1.0, abs(score), abs(threshold))


def is_bundle(path: Path) -> bool:
    """Whether it looks like one, and not like an ONNX file."""
    return zipfile.is_zipfile(path)


def comment(digest: str) -> bytes:
    """What a bundle ends on."""
    return f"sha256:{digest}".encode()


def digest_and_end(path: Path) -> tuple[str, bytes]:
    """The SHA-256 of all bytes but those of the comment, and these."""
    left = max(path.stat().st_size - len(comment("0" * 64)), 0)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while left and (chunk := file.read(min(_CHUNK, left))):
            digest.update(chunk)
            left -= len(chunk)
        return digest.hexdigest(), file.read()


def _require_whole(path: Path) -> None:
    """Raise ExportError unless every byte is as it was written."""
    if not path.is_file():
        raise ExportError(f"{path}: no such file; give the bundle that `blemish bundle` wrote")
    with reading(path, _AGAIN):
        digest, end = digest_and_end(path)
    if not _COMMENT.fullmatch(end):
        raise ExportError(f"{path}: no whole bundle, whose last bytes are its SHA-256; {_AGAIN}")
    if end != comment(digest):
        raise ExportError(f"{path}: not as it was written (its SHA-256 is another); {_AGAIN}")
