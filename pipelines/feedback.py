"""What people say of parts, in `feedback.csv`: written by `serve` and `blemish verdict`, or by hand in a spreadsheet.

A row is a verdict on a picture. `path` is relative to the file's own folder, `verdict` is "good" or the type of the
defect, `when` is ISO 8601, and `category` tells parts apart where one file is of several kinds. Rows without a verdict
are not judged yet.
"""

import contextlib
import csv
import getpass
import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

from filelock import FileLock

from pipelines.errors import ArgumentError, DatasetError, told
from pipelines.files import atomic_file, reporting_full_disk

FILE = "feedback.csv"
COLUMNS = ("path", "verdict", "who", "when", "category")
_NEEDED = ("path", "verdict")
_DELIMITERS = ",;\t"  # Excel's depends on the language
_MARK = "\N{ZERO WIDTH NO-BREAK SPACE}"  # which Excel begins a UTF-8 file with
_LONGEST = 60  # characters of a verdict, and of a name
_FORMULA = frozenset("=+-@")  # what a spreadsheet takes for one begins so
_NO_FOLDER = frozenset('/\\:*?"<>|')  # in the name of one, on any system


@dataclass(frozen=True, slots=True)
class Verdict:
    """What someone said of a picture."""

    picture: Path
    verdict: str  # "good", or a type of defect, as it was written
    who: str  # empty where nobody said
    when: datetime  # with its time zone
    category: str | None
    row: int  # of the file, as a spreadsheet counts, from 2; the first are the columns' names


class _Table(NamedTuple):
    names: list[str]  # of the columns
    delimiter: str
    rows: list[list[str]]  # below them


def read(path: Path) -> list[Verdict]:
    """All verdicts, in the order of the file; rows without one are left out.

    What has no time of its own has that of the next row that has one, since rows come in at the end, and below the last
    of them that of the file's last change. Where the zone is missing it is this machine's.

    Raises:
        DatasetError: there is no such file, or it is no such table; the message lists every problem.
    """
    table = _table(path, _text(path))
    time = datetime.fromtimestamp(path.stat().st_mtime).astimezone()
    found, problems = [], []
    for number, cells in reversed([*enumerate(table.rows, 2)]):
        row = dict(zip(table.names, cells, strict=False))
        if not row.get("verdict"):
            continue
        try:
            found.append(_verdict(path, number, row, time))
            time = found[-1].when
        except DatasetError as problem:
            problems.append(problem)
    if problems:
        raise DatasetError(told(problems[::-1], f"{path}: {len(problems)} rows cannot be read"))
    return found[::-1]


def append(path: Path, pictures: Sequence[Path], verdict: str, who: str, category: str | None = None) -> None:
    """Add a row for each picture, as of now; the file is begun if it is not there. Several processes may do so.

    The file is written anew beside itself, so that no row is ever half there.

    Raises:
        DatasetError: the file that lies there is no such table, or it cannot be written.
        DiskFull: there is no room for it.
    """
    values = {"verdict": verdict, "who": who, "category": category or ""}
    values["when"] = datetime.now().astimezone().isoformat(timespec="seconds")
    rows = [values | {"path": _shown(path, picture)} for picture in pictures]
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            text = _text(path) if path.exists() else ""
            if _is_empty(text):
                text = text.strip() + _lines([COLUMNS], ",", "\r\n")
            table = _table(path, text)
            end = "\r\n" if "\r\n" in text else "\n"
            if text[-1] not in "\r\n":
                text += end  # that an editor left out
            text += _lines([[row.get(name, "") for name in table.names] for row in rows], table.delimiter, end)
            with atomic_file(path) as temporary:
                temporary.write_bytes(text.encode())


def keep(folder: Path, content: bytes, suffix: str) -> Path:
    """Where a picture's bytes lie below `folder`: once, however often they come.

    Raises:
        DatasetError: they cannot be written.
        DiskFull: there is no room for them.
    """
    path = folder / "pictures" / f"{hashlib.sha256(content).hexdigest()[:16]}{suffix}"
    with _writing(path):
        if not path.exists():
            with atomic_file(path) as temporary:
                temporary.write_bytes(content)
    return path


def usable_verdict(text: str) -> str:
    """What may name a folder and stand in a spreadsheet, without the spaces around it.

    Raises:
        ArgumentError: it may not.
    """
    found = text.strip()
    if not found or not _is_plain(found) or found[0] == "." or _NO_FOLDER & {*found}:
        raise ArgumentError(
            f"verdict = {found[:_LONGEST]!r}: say good, or the type of the defect in at most {_LONGEST} printable "
            'characters, without / \\ : * ? " < > | and beginning with none of . = + - @'
        )
    return found


def usable_name(text: str) -> str:
    """Who says it, without the spaces around it; nobody has to.

    Raises:
        ArgumentError: it cannot stand in a spreadsheet.
    """
    found = text.strip()
    if not _is_plain(found):
        raise ArgumentError(
            f"who = {found[:_LONGEST]!r}: give a name of at most {_LONGEST} printable characters, of which the first "
            "is none of = + - @"
        )
    return found


def login_name(remedy: str) -> str:
    """Who is logged in.

    Raises:
        ArgumentError: nobody knows; the message ends with the `remedy`.
    """
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # which it is, depends on the version of Python
        raise ArgumentError(f"no name is known here of who is logged in: {remedy}") from None


def newest(verdicts: Iterable[Verdict], content: Mapping[Path, str]) -> dict[str, Verdict]:
    """Of each content of a picture, the verdict that was given last; `content` by its path, a SHA-256, say."""
    found: dict[str, Verdict] = {}
    for verdict in sorted(verdicts, key=lambda verdict: (verdict.when, verdict.row)):
        found[content[verdict.picture]] = verdict
    return found


def _text(path: Path) -> str:
    """Raises DatasetError."""
    try:
        text = path.read_bytes().decode("utf-8")
        if "\0" in text:
            raise ValueError("UTF-16")
    except ValueError:  # of which one that cannot be decoded is a kind
        raise DatasetError(f"{path}: not UTF-8; save it as CSV UTF-8") from None
    except OSError as error:
        raise DatasetError(f"{path}: {error.strerror}; give a table with the columns {', '.join(COLUMNS)}") from None
    return text


def _is_empty(text: str) -> bool:
    return not text.removeprefix(_MARK).strip()


def _table(path: Path, text: str) -> _Table:
    """Raises DatasetError."""
    if _is_empty(text):
        raise DatasetError(f"{path}: is empty; the columns are {', '.join(COLUMNS)}")
    file = io.StringIO(text.removeprefix(_MARK), newline="")
    delimiter = max(_DELIMITERS, key=file.readline().count)  # the first of equals
    file.seek(0)
    rows: list[list[str]] = []
    try:
        cells = csv.reader(file, delimiter=delimiter, skipinitialspace=True, strict=True)
        rows.extend([cell.strip() for cell in row] for row in cells)
    except csv.Error as error:
        raise DatasetError(
            f"{path}, row {len(rows) + 1}: {error}; a quote may not be closed there, or stand within a word"
        ) from None
    names = [name.casefold() for name in rows[0]]
    if missing := [name for name in _NEEDED if name not in names]:
        raise DatasetError(
            f"{path}: no column {' and '.join(map(repr, missing))} (its first row is {', '.join(rows[0])!r}); the "
            f"columns are {', '.join(COLUMNS)}, of which who, when and category may be missing"
        )
    return _Table(names, delimiter, rows[1:])


def _verdict(path: Path, number: int, row: Mapping[str, str], otherwise: datetime) -> Verdict:
    """What a row says, at that time if it tells none. Raises DatasetError."""
    if not row.get("path"):
        raise DatasetError(f"{path}, row {number}: a verdict ({row['verdict']}) without a path")
    try:
        when = datetime.fromisoformat(row["when"]).astimezone() if row.get("when") else otherwise
    except (ValueError, OverflowError):
        raise DatasetError(
            f"{path}, row {number}: when = {row['when']!r}: no time such as 2026-11-28T14:03:00"
        ) from None
    picture = _place(path, row["path"])
    return Verdict(picture, row["verdict"], row.get("who", ""), when, row.get("category") or None, number)


def _lines(rows: Iterable[Sequence[str]], delimiter: str, end: str) -> str:
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=delimiter, lineterminator=end).writerows(rows)
    return file.getvalue()


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Raise DiskFull or DatasetError if the system refuses to write `path`."""
    try:
        with reporting_full_disk(path):
            yield
    except OSError as error:
        line = f"{path}: cannot be written ({error.strerror}); check its permissions, and close it elsewhere"
        raise DatasetError(line) from None


def _is_plain(text: str) -> bool:
    return text.isprintable() and len(text) <= _LONGEST and text[:1] not in _FORMULA


def _place(path: Path, text: str) -> Path:
    """Of a picture; a table may come from Windows."""
    found = path.parent / text
    return path.parent / PureWindowsPath(text).as_posix() if "\\" in text and not found.exists() else found


def _shown(path: Path, picture: Path) -> str:
    """As the file names a picture: relative where it lies below the file's folder."""
    folder, picture = path.parent.resolve(), picture.resolve()
    return (picture.relative_to(folder) if picture.is_relative_to(folder) else picture).as_posix()
