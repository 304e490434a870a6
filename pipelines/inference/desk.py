"""A bundle at work for many at once: pictures come as bytes, wait for the network, and are answered.

One thread runs the network, on what has arrived together, so that the machine is never asked for more than it can do;
pictures are decoded beside it, a thread per core. What is accepted is answered, also at a stop and while a new bundle
takes the place of the old one.
"""

import asyncio
import os
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.inference.card import Card, Decision, Disposition
from pipelines.inference.drift import SCORE
from pipelines.inference.engine import Engine, Inputs
from pipelines.inference.measures import measured
from pipelines.inference.proven import Proven
from pipelines.pictures.overlays import Map, Pixels

_TOGETHER = 4  # pictures that the network sees at once, at most


class Full(Exception):
    """As many pictures wait as may."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a picture."""

    card: Card
    score: float
    decision: Decision
    disposition: Disposition
    milliseconds: dict[str, float]  # by part; `wait` is for the network, while it looks at others'
    picture: Pixels | None  # (H, W, 3), where it was asked for, and its map at its size
    map: Map | None

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.card.model,
            "category": self.card.category,
            "run_id": self.card.run_id,
            "score": self.score,
            "threshold": self.card.threshold,
            "decision": self.decision,
            "disposition": self.disposition,
            "reject_above": self.card.reject_above,
            "milliseconds": {part: round(value, 3) for part, value in self.milliseconds.items()},
        }


class _Seen(NamedTuple):
    """What the network made of a picture."""

    map: Map  # (H, W) of the network
    score: float
    waited: float  # seconds
    took: float  # likewise, for all that it saw together


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A picture that is ready for the network."""

    engine: Engine  # that it was made ready for: another may have taken its place
    inputs: Inputs
    since: float  # seconds of the performance counter
    future: "Future[_Seen]"


class Desk:
    """A bundle that answers; closed when it is left.

    Raises:
        ExportError: the bundle is none, has changed, or does not answer its samples on this machine as it did.
    """

    def __init__(self, path: Path, most_waiting: int, threads: int | None = None) -> None:
        self.name = path.stem
        self.proven = Proven(path, threads)
        self.waiting = 0  # pictures that are accepted and not yet answered
        self._most_waiting = most_waiting
        self._decoders = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix=f"decode {self.name}")
        self._queue: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._network = threading.Thread(target=self._work, name=f"network {self.name}", daemon=True)
        self._network.start()

    def state(self) -> dict[str, Any]:
        """What is in use, and why nothing newer is."""
        card = self.proven.card
        told = {"model": card.model, "category": card.category, "run_id": card.run_id, "threshold": card.threshold}
        changes = [change.text for change in self.proven.monitor.changes]
        return {**told, "refused": self.proven.refused, "drift": changes}

    async def answer(self, content: bytes, name: str, *, with_picture: bool = False) -> Answer:
        """Score a picture's bytes; `name` is told where something is wrong, and its suffix says DICOM.

        Raises:
            Full: too many wait.
            ImageError: no picture, or one that this model refuses.
            ExportError: the network gives no number.
        """
        if self.waiting >= self._most_waiting:
            raise Full
        self.waiting += 1  # in the event loop's one thread
        try:
            return await self._answer(content, name, with_picture=with_picture)
        finally:
            self.waiting -= 1

    async def _answer(self, content: bytes, name: str, *, with_picture: bool) -> Answer:
        begun, engine, loop = time.perf_counter(), self.proven.engine, asyncio.get_running_loop()
        read = await loop.run_in_executor(self._decoders, _read, engine, content, name)
        future: Future[_Seen] = Future()
        self._queue.put(_Waiting(engine, read.inputs, time.perf_counter(), future))
        picture = read.rgb if with_picture else None
        decoding, resizing, values = read.decoding, read.resizing, read.measures
        del content, read  # a large picture takes hundreds of megabytes, and need not wait along
        seen = await asyncio.wrap_future(future)
        self.proven.note({SCORE: seen.score, **values})
        shown = None
        if picture is not None:
            shown = await loop.run_in_executor(self._decoders, engine.restored, seen.map, picture)
        seconds = {"decode": decoding, "resize": resizing, "wait": seen.waited, "network": seen.took}
        seconds["total"] = time.perf_counter() - begun
        milliseconds = {part: 1000 * value for part, value in seconds.items()}
        card, score = engine.card, seen.score
        return Answer(card, score, card.decision(score), card.disposition(score), milliseconds, picture, shown)

    def _work(self) -> None:
        """Let the network see what waits, several pictures at once where several do, until None comes."""
        together: list[_Waiting] = []
        while (one := self._queue.get()) is not None:
            together.append(one)
            if len(together) < _TOGETHER and not self._queue.empty():
                continue
            for engine in dict.fromkeys(waiting.engine for waiting in together):
                _look(engine, [waiting for waiting in together if waiting.engine is engine])
            together = []
        for waiting in together:
            _look(waiting.engine, [waiting])

    def close(self) -> None:
        """Answer what was accepted, then end."""
        self._decoders.shutdown()
        self._queue.put(None)
        self._network.join()


@dataclass(frozen=True, slots=True)
class _Read:
    """A picture that was read."""

    rgb: Pixels
    inputs: Inputs
    measures: dict[str, float]
    decoding: float  # seconds
    resizing: float


def _read(engine: Engine, content: bytes, name: str) -> _Read:
    begun = time.perf_counter()
    rgb = engine.decode(content, Path(name))
    decoded = time.perf_counter()
    inputs = engine.fitted(rgb, name)
    resized = time.perf_counter()
    return _Read(rgb, inputs, measured(inputs), decoded - begun, resized - decoded)


def _look(engine: Engine, waiting: Sequence[_Waiting]) -> None:
    """Let the network see these pictures, and tell those who wait what came of theirs."""
    begun = time.perf_counter()
    try:
        maps, scores = engine(Inputs.together([one.inputs for one in waiting]))
    except Exception as error:  # whatever it was: those who wait must hear of it, and the next be answered
        for one in waiting:
            one.future.set_exception(error)
        return
    took = time.perf_counter() - begun
    for one, anomaly_map, score in zip(waiting, maps, scores, strict=True):
        one.future.set_result(_Seen(anomaly_map[0], float(score), begun - one.since, took))
