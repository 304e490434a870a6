"""A folder that a camera fills: each picture is scored once, when it is whole, and its decision goes out.

What is decided of a picture is one file, its record. It is written whole to `pending/` before anything else happens,
and goes to `done/<day>/` when every outlet has taken it. So a process that is killed at any moment leaves each picture
either without a record, to be scored, or with one, whose rest is made up for: never decided on twice, never lost. A
receiver may see a record twice, where the process died between its answer and the file's new place; by the same `id`.

Network shares do not tell of new files, so the folder is looked through again and again. A picture counts as whole when
its size and time have not changed for a while; one that cannot be read then has stalled, perhaps, and gets longer.
"""

import contextlib
import csv
import hashlib
import io
import json
import logging
import os
import queue
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from pipelines.errors import ArgumentError, DatasetError, ExportError, ImageError
from pipelines.files import Busy, DiskFull, atomic_file, reporting_full_disk, write_json
from pipelines.inference.drift import QUANTITIES
from pipelines.inference.measures import MEASURES, measured
from pipelines.inference.outlets import Outlet, Unwanted
from pipelines.inference.predict import decided, printable, save_overlay
from pipelines.inference.proven import Proven
from pipelines.memory import out_of_memory
from pipelines.pictures import images
from pipelines.unreadable import in_short

_LOG = logging.getLogger(__name__)  # whose warnings Python writes to stderr as they are, if nobody asked otherwise
_UNREADABLE = "unreadable"
_COLUMNS = (
    "scored_at",
    "id",
    "picture",
    "score",
    "threshold",
    "decision",
    "disposition",
    *MEASURES,
    "error",
    "model",
    "run_id",
    "overlay",
)
_SHORTEST_WAIT, _LONGEST_WAIT = 1.0, 60.0  # seconds between two tries to deliver, or to move
_REST = 3  # times what a look takes, until the next one: where many pictures stay, it takes a while
_LAST_TRIES = 10.0  # seconds that a stop waits for what is to be delivered


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds."""

    settle: float = 2.0  # that a picture must not change before it is read
    patience: float = 30.0  # likewise, before one that cannot be read is given up
    poll: float = 0.5  # between two looks at the folder


class _Stamp(NamedTuple):
    """What is another as soon as a picture is; of two cameras' pictures with one name, too."""

    size: int  # bytes
    changed: int  # milliseconds since 1970, which is as finely as shares agree with themselves


Record = dict[str, Any]


def watch(
    folder: Path,
    bundle: Proven,
    output: Path,
    outlets: Sequence[Outlet],
    tell: Callable[[Record], None],
    stop: threading.Event,
    *,
    pace: Pace = Pace(),
    move: bool = False,
    once: bool = False,
) -> None:
    """Score what comes into `folder` and its folders until `stop`, or `once`: until all that lies there is decided.

    In `output`: `results/<day>.csv`, `overlays/` of defects, the records; and, if they `move`, the pictures by what was
    decided. `tell` is called with each record, once.

    Raises:
        DatasetError: there is no such folder.
        ArgumentError: `output` lies in it, so that results would be looked at as pictures.
        Busy: another process watches for the same `output`.
        DiskFull: what was decided cannot be written.
    """
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder; give the one that the camera fills")
    if output.resolve().is_relative_to(folder.resolve()):
        raise ArgumentError(f"--output {output}: lies in the folder that is watched; give one beside it")
    output.mkdir(parents=True, exist_ok=True)
    with _alone(output):
        book = _Book(output)
        delivery = _Delivery(book, outlets)
        for record in book.resumed():
            delivery.add(record)

        def on_decision(record: Record) -> None:
            tell(record)
            delivery.add(record)
            if record["error"] is None:
                bundle.note({name: record[name] for name in QUANTITIES})

        bundle.monitor.replay(parts(output, bundle.card.run_id))

        try:
            _follow(_Watcher(folder, bundle, book, on_decision, move=move), delivery, pace, stop, once=once)
        finally:
            delivery.close()


@contextlib.contextmanager
def stopping() -> Iterator[threading.Event]:
    """What SIGTERM or Ctrl-C sets, so that the picture at hand is decided on; a second one ends at once."""
    stop = threading.Event()

    def ask(number: int, _: FrameType | None) -> None:
        stop.set()
        signal.signal(number, before[signal.Signals(number)])

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def parts(output: Path, run_id: str) -> Iterator[tuple[float, dict[str, float]]]:
    """Time (seconds since 1970) and quantities of what this model decided on, as the tables of `output` have it."""
    for path in sorted(output.glob("results/*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if row["run_id"] == run_id and not row["error"]:
                    with contextlib.suppress(KeyError, TypeError, ValueError):  # a row that a power cut tore
                        values = {name: float(row[name]) for name in QUANTITIES}
                        yield datetime.fromisoformat(row["scored_at"]).timestamp(), values


def line_of(record: Record) -> str:
    """For a terminal."""
    if record["error"] is not None:
        return f"error: {record['error']}"
    return decided(record["disposition"], record["score"], record["threshold"], record["picture"])


@contextlib.contextmanager
def _alone(output: Path) -> Iterator[None]:
    lock = FileLock(output / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise Busy(f"{output}: another process watches for it; give another --output, or end that one") from None
    with lock:
        yield


def _follow(watcher: "_Watcher", delivery: "_Delivery", pace: Pace, stop: threading.Event, *, once: bool) -> None:
    settling, away = _Settling(pace), ""
    while not stop.is_set():
        watcher.bundle.renew()
        found, before, begun = {}, away, time.monotonic()
        try:
            found, away = dict(_pictures(watcher.folder)), ""
        except OSError as error:  # a share that is away for a while
            away = f"{watcher.folder}: cannot be looked through ({error.strerror}); tried again until it can"
        if away and away != before:
            _LOG.warning("%s", away)
        wait = max(pace.poll, _REST * (time.monotonic() - begun))
        for path, stamp, age in settling.due(found, time.monotonic()):
            if stop.is_set():
                break
            if watcher.look(path, stamp, given_up=age >= pace.patience):
                settling.done(path)
            else:
                settling.postpone(path)
        if once and not away and settling.is_idle(found) and delivery.is_idle:
            return
        stop.wait(wait)


# ------------------------------------------------------------------------------------------------------------ pictures


def _pictures(folder: Path) -> Iterator[tuple[Path, _Stamp]]:
    """What may be a picture by its name, to the bottom; links to folders are not followed. Raises OSError."""

    def refuse(error: OSError) -> None:
        if Path(error.filename or folder) == folder:
            raise error

    for place, _, names in os.walk(folder, onerror=refuse):
        for name in names:
            path = Path(place, name)
            if path.suffix.lower() in images.SUFFIXES and not images.is_litter(name):
                stamp = _stamp(path)
                if stamp is not None:
                    yield path, stamp


def _stamp(path: Path) -> _Stamp | None:
    """None where it is gone."""
    try:
        found = path.stat()
    except OSError:
        return None
    return _Stamp(found.st_size, found.st_mtime_ns // 1_000_000)


class _Settling:
    """Which pictures are whole, by how long they have not changed."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._since: dict[Path, tuple[_Stamp, float]] = {}
        self._next: dict[Path, float] = {}  # age at which one is due that was looked at in vain
        self._done: dict[Path, _Stamp] = {}

    def due(self, found: Mapping[Path, _Stamp], now: float) -> list[tuple[Path, _Stamp, float]]:
        """Path, stamp and seconds without a change of what is to be looked at, the oldest first."""
        for path in self._since.keys() - found.keys():
            for known in (self._since, self._next, self._done):
                known.pop(path, None)
        for path, stamp in found.items():
            if path not in self._since or self._since[path][0] != stamp:
                self._since[path] = stamp, now
                self._next.pop(path, None)
        ages = [(path, stamp, now - self._since[path][1]) for path, stamp in found.items()]
        due = [
            (path, stamp, age) for path, stamp, age in ages if self._done.get(path) != stamp and age >= self._at(path)
        ]
        return sorted(due, key=lambda one: (one[1].changed, one[0]))

    def _at(self, path: Path) -> float:
        return self._next.get(path, self._pace.settle)

    def postpone(self, path: Path) -> None:
        """Each time for twice as long, and once when it is to be given up."""
        at, patience = self._at(path), self._pace.patience
        self._next[path] = min(2 * max(at, self._pace.poll), patience) if at < patience else at + _LONGEST_WAIT

    def done(self, path: Path) -> None:
        self._done[path] = self._since[path][0]

    def is_idle(self, found: Mapping[Path, _Stamp]) -> bool:
        return all(self._done.get(path) == stamp for path, stamp in found.items())


# ------------------------------------------------------------------------------------------------------------- deciding


class _Watcher:
    """Decides on pictures, and puts them where they belong."""

    def __init__(
        self, folder: Path, bundle: Proven, book: "_Book", on_decision: Callable[[Record], None], *, move: bool
    ) -> None:
        self.folder, self.bundle = folder, bundle
        self._book, self._on_decision, self._move = book, on_decision, move

    def look(self, path: Path, stamp: _Stamp, *, given_up: bool) -> bool:
        """Decide on a picture, unless it was decided on before; False if there is something left to do with it.

        One that cannot be read is left for later until it is `given_up`.

        Raises:
            DiskFull: what was decided cannot be written.
        """
        name = path.relative_to(self.folder)
        key = hashlib.sha256(os.fsencode(f"{name.as_posix()}\0{stamp.size}\0{stamp.changed}")).hexdigest()[:32]
        record = self._book.find(key)
        if record is None:
            now = datetime.now().astimezone()
            found = self._decide(path, stamp, Path("overlays", f"{now:%Y-%m-%d}", f"{key}.png"), given_up=given_up)
            if found is None:
                return False
            record = {
                "id": key,
                "picture": printable(name.as_posix()),
                "scored_at": now.isoformat(timespec="milliseconds"),
                **found,
                "moved_to": self._place(name, found["disposition"], key) if self._move else None,
            }
            self._book.add(record)
            self._on_decision(record)
        return self._put_away(path, record)

    def _decide(self, path: Path, stamp: _Stamp, overlay: Path, *, given_up: bool) -> Record | None:
        """Score, decision or error; None if it is too early to say."""
        engine, begun = self.bundle.engine, time.perf_counter()
        card = engine.card
        score, decision, disposition, error = None, None, None, None
        measures: dict[str, float | None] = dict.fromkeys(MEASURES)
        try:
            content = path.read_bytes()
            if _stamp(path) != stamp:
                return None  # it was changed while it was read
            rgb = engine.decode(content, path)
            inputs = engine.fitted(rgb, str(path))
            maps, scores = engine(inputs)
            score = float(scores[0])
            decision, disposition = card.decision(score), card.disposition(score)
            if decision == "defect":
                save_overlay(self._book.folder / overlay, rgb, engine.restored(maps[0, 0], rgb), card, score)
            measures |= measured(inputs)
        except DiskFull:
            raise
        except Exception as failure:  # whatever it was: the pictures behind this one must be decided on
            if not given_up and not isinstance(failure, ExportError):  # of which more of the same would come
                return None
            score, decision, disposition, error = None, None, None, _said(path, failure)
        return {
            "score": score,
            "threshold": card.threshold,
            "decision": decision,
            "disposition": disposition,
            **measures,
            "error": error,
            "overlay": overlay.as_posix() if decision == "defect" else None,
            "model": card.model,
            "category": card.category,
            "run_id": card.run_id,
            "milliseconds": round(1000 * (time.perf_counter() - begun), 1),
        }

    def _place(self, name: Path, disposition: str | None, key: str) -> str:
        """Where the picture is to lie, a name that no other has: cameras begin again at 0001."""
        place = Path(disposition or _UNREADABLE, printable(name.as_posix()))  # the record is to hold it
        taken = (self._book.folder / place).exists()
        return (place.with_name(f"{place.stem}-{key[:8]}{place.suffix}") if taken else place).as_posix()

    def _put_away(self, path: Path, record: Record) -> bool:
        """Whether the picture lies where it belongs now."""
        if record["moved_to"] is None:
            return True
        target = self._book.folder / record["moved_to"]
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            _moved(path, target)
        except FileNotFoundError:
            return True  # someone else took it
        except OSError as error:
            _LOG.warning("%s: cannot be moved to %s (%s); tried again later", path, target, error.strerror)
            return False
        return True


def _moved(path: Path, target: Path) -> None:
    """By a new name, or to another disk by a copy that is whole before the picture goes."""
    try:
        path.replace(target)
    except FileNotFoundError:
        raise
    except OSError:
        with atomic_file(target) as temporary:
            shutil.copyfile(path, temporary)
        path.unlink()


def _said(path: Path, error: Exception) -> str:
    """What was wrong with a picture, in a line."""
    if isinstance(error, ImageError):
        return printable(str(error))  # which names it
    reason = out_of_memory(error) or getattr(error, "strerror", None) or in_short(error)
    return printable(f"{path}: {reason}")


# ------------------------------------------------------------------------------------------------------------- records


class _Book:
    """What was decided, in files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pending, self._done = folder / "pending", folder / "done"
        self._pending.mkdir(exist_ok=True)
        self._days = {path.stem: path.parent.name for path in self._done.glob("*/*.json")}  # of each that was decided

    def find(self, key: str) -> Record | None:
        """What was decided of a picture, if it was."""
        if key not in self._days:
            return None
        for path in (self._pending / f"{key}.json", self._done / self._days[key] / f"{key}.json"):
            with contextlib.suppress(FileNotFoundError):  # it goes from the first to the second when it is delivered
                return _read(path)
        return None  # someone removed the days of old

    def add(self, record: Record) -> None:
        """From here on it is decided. Raises DiskFull."""
        write_json(self._pending / f"{record['id']}.json", record)
        self._days[record["id"]] = _day(record)
        self._append(record)

    def resumed(self) -> list[Record]:
        """What a process before this one could not deliver any more, in the order in which it was decided."""
        paths = [path for path in self._pending.glob("*.json") if not path.name.startswith(".")]
        found = sorted(map(_read, paths), key=lambda record: str(record["scored_at"]))
        for record in found:
            self._days[record["id"]] = _day(record)
            table = self._table(record)
            if not table.exists() or record["id"] not in table.read_text(encoding="utf-8"):
                self._append(record)
        return found

    def finish(self, record: Record) -> None:
        """It has been delivered."""
        name = f"{record['id']}.json"
        (self._done / _day(record)).mkdir(parents=True, exist_ok=True)
        (self._pending / name).replace(self._done / _day(record) / name)

    def _table(self, record: Record) -> Path:
        return self.folder / "results" / f"{_day(record)}.csv"

    def _append(self, record: Record) -> None:
        path = self._table(record)
        path.parent.mkdir(exist_ok=True)
        with reporting_full_disk(path), path.open("ab+") as file:
            row = io.StringIO(newline="")
            writer = csv.DictWriter(row, _COLUMNS, extrasaction="ignore")
            if file.tell() == 0:
                writer.writeheader()
            else:
                file.seek(-1, io.SEEK_END)
                if file.read() != b"\n":  # a power cut took the end of the last row
                    row.write("\r\n")
            writer.writerow(record)
            file.write(row.getvalue().encode())


def _day(record: Record) -> str:
    return str(record["scored_at"])[:10]


def _read(path: Path) -> Record:
    found: Record = json.loads(path.read_bytes())
    return found


# ------------------------------------------------------------------------------------------------------------ delivery


class _Delivery:
    """Hands records to the outlets, one after the other, and waits where one of them is not there."""

    def __init__(self, book: _Book, outlets: Sequence[Outlet]) -> None:
        self._book, self._outlets = book, outlets
        self._queue: queue.SimpleQueue[Record | None] = queue.SimpleQueue()
        self._left: set[str] = set()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="delivery", daemon=True)
        self._thread.start()

    @property
    def is_idle(self) -> bool:
        return not self._left

    def add(self, record: Record) -> None:
        self._left.add(record["id"])
        self._queue.put(record)

    def close(self) -> None:
        """Deliver what can be delivered at once; the rest is for the next start."""
        self._closing.set()
        self._queue.put(None)
        self._thread.join(_LAST_TRIES)

    def _work(self) -> None:
        while (record := self._queue.get()) is not None:
            if not all(self._is_taken(outlet, record) for outlet in self._outlets):
                return
            try:
                self._book.finish(record)
            except OSError as error:
                _LOG.warning("record %s: delivered, but cannot be put away (%s)", record["id"], error.strerror)
            self._left.discard(record["id"])

    def _is_taken(self, outlet: Outlet, record: Record) -> bool:
        """Whether there is nothing more to do for this outlet; False at a stop, if it is not there."""
        wait, told = _SHORTEST_WAIT, False
        while True:
            try:
                outlet.deliver(record)
            except Unwanted as refusal:
                _LOG.warning("%s: %s to record %s, which will not be sent again", outlet, refusal, record["id"])
            except Exception as error:  # Unavailable, or a fault of an outlet's own
                if not told:
                    _LOG.warning("%s: %s; tried again until it takes what was decided", outlet, in_short(error))
                told = True
                if self._closing.wait(wait):
                    return False
                wait = min(2 * wait, _LONGEST_WAIT)
                continue
            if told:
                _LOG.warning("%s: is there again", outlet)
            return True
