"""Verb learn: people's verdicts on pictures of the line -> a new version of a category's data, its test left as it is.

The pictures go to `learnt/good/<day>/` and `learnt/<type of defect>/<day>/` of the category's folder, beside a table of
who said what (`learnt/feedback.csv`) and the split as it was before (`frozen`). The folder is replaced as a whole: a
process that is killed leaves the one or the other. The same verdicts twice add nothing, and of two on one picture the
later one counts, also where the picture was learnt by the first.
"""

import contextlib
import csv
import os
import shutil
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from pipelines import feedback
from pipelines.data.index import GOOD, MAY_BE_TESTED, PreparedIndex
from pipelines.errors import ArgumentError, BlemishError, DatasetError, StageError, hint, told
from pipelines.feedback import Verdict
from pipelines.files import Busy, atomic_folder, file_sha256, write_json
from pipelines.numbers import counted
from pipelines.pictures import images
from pipelines.preparation.config import PrepareConfig
from pipelines.preparation.frozen import SPLIT_FILE, FrozenSplit
from pipelines.preparation.listing import LEARNT, some
from pipelines.preparation.lookalikes import says_good, says_masks
from pipelines.preparation.prepare import as_it_is

JOURNAL = "feedback.csv"


@dataclass(frozen=True, slots=True)
class Place:
    """Of a category."""

    source: Path  # its pictures
    prepared: Path


@dataclass(slots=True)
class Learnt:
    """What became of the verdicts on one category."""

    category: str
    joined: Counter[str] = field(default_factory=Counter)  # pictures by verdict
    corrected: int = 0  # that were learnt before with another verdict
    known: int = 0  # that were there already
    tested: list[str] = field(default_factory=list)  # left out, since the test has them; their names there
    is_new: bool = False  # whether the test was frozen now
    num_tested: int = 0  # pictures that a model may be tested on

    @property
    def changes(self) -> bool:
        return bool(self.joined or self.corrected)

    @property
    def lines(self) -> list[str]:
        """For a terminal."""
        good, total = self.joined[GOOD], self.joined.total()
        types = ", ".join(f"{name} {number}" for name, number in sorted(self.joined.items()) if name != GOOD)
        defects = f" ({types})" if types else ""
        told = [
            f"{self.category}: {counted(good, 'good part')} and {counted(total - good, 'defect')}{defects} joined, "
            f"{self.corrected} corrected, {self.known} known already"
        ]
        if self.tested:
            tested = counted(len(self.tested), "picture")
            told.append(f"{self.category}: {tested} left out, for the test has it: {some(self.tested)}")
        if self.is_new and self.changes:
            told.append(f"{self.category}: its test stays from now on as it is, {counted(self.num_tested, 'picture')}")
        return told


@dataclass(frozen=True, slots=True)
class _Entry:
    """A picture that is to lie in the folder."""

    file: Path  # where it lies now
    name: str  # where it is to lie, relative to the folder, posix
    verdict: Verdict  # said of it, as its folder is called

    @property
    def folder(self) -> str:
        """The uppermost, that of its kind."""
        return self.name.partition("/")[0]


def learn(
    table: Path, category: str | None, places: Mapping[str, Place], config: PrepareConfig, brought: Sequence[Path]
) -> list[Learnt]:
    """Let the verdicts of a table join the data of their categories: those that it names, or else `category`.

    `brought`: folders that a stage makes and makes anew, to which nothing can be added.

    Raises:
        DatasetError: a row cannot be used; the message lists all of them, and nothing has changed.
        StageError: a category is not prepared, or has changed since, so that its split is not known.
        Busy: another process learns for the same category.
    """
    verdicts = feedback.read(table)
    if not verdicts:
        raise DatasetError(f"{table}: no verdict in it; write good, or the kind of defect, into the column 'verdict'")
    problems = list[BlemishError]()
    by_category: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        name = verdict.category or category or (next(iter(places)) if len(places) == 1 else None)
        if name is None or name not in places:
            problems.append(_of_no_category(table, verdict, name, places))
        else:
            by_category.setdefault(name, []).append(verdict)
    plans = []
    for name, own in by_category.items():
        _refuse_brought(name, places[name].source, brought)
        plan = _Plan(table, name, places[name], config)
        problems += plan.problems_of(own)
        plans.append(plan)
    if problems:
        raise DatasetError(told(problems, f"{table}: {len(problems)} problems, and nothing was learnt"))
    return [plan.carried_out() for plan in plans]


def _of_no_category(table: Path, verdict: Verdict, name: str | None, places: Mapping[str, Place]) -> DatasetError:
    known = ", ".join(places)
    if name is None:
        return DatasetError(f"{table}, row {verdict.row}: of which category? Give --category, one of {known}")
    return DatasetError(
        f"{table}, row {verdict.row}: category '{name}': not in data.categories{hint(name, places)}, which has {known}"
    )


def _refuse_brought(category: str, source: Path, brought: Sequence[Path]) -> None:
    if made := [folder for folder in brought if source.resolve().is_relative_to(folder.resolve())]:
        raise DatasetError(
            f"category '{category}': {source} is made by `blemish download {made[0].name}`, and made anew when that "
            "changes; copy it to a folder of your own, name that in data.root, and run `blemish run`"
        )


class _Plan:
    """What is to become of one category's folder.

    Raises:
        StageError: it is not prepared, or has changed since.
    """

    def __init__(self, table: Path, category: str, place: Place, config: PrepareConfig) -> None:
        self._table, self._place, self._config = table, place, config
        self._folder = place.source / LEARNT
        self._index = PreparedIndex.load(place.prepared)
        frozen = FrozenSplit.of_category(place.source)
        self._frozen = frozen or self._freeze(category)
        num_tested = len(self._index.rows(*MAY_BE_TESTED))
        self._learnt = Learnt(category, is_new=frozen is None, num_tested=num_tested)
        self._state = self._as_it_is()
        self._entries = {file_sha256(entry.file): entry for entry in self._journal()}
        self._names = {_bare(entry.name) for entry in self._entries.values()}
        kinds = {image.defect for image in self._index.images} | {entry.folder for entry in self._entries.values()}
        self._kinds = {_bare(kind): kind for kind in sorted(kinds, reverse=True)}  # of several, the first

    def _freeze(self, category: str) -> FrozenSplit:
        """The split that the figures of today are of."""
        source, config = self._place.source, self._config
        listing, sha256 = as_it_is(source, config.layout, config.max_megapixels)
        if sha256 != self._index.data_sha256:
            raise StageError(
                f"category '{category}': {source} has changed since it was prepared, so that it is not known what is "
                "tested; run `blemish run` first"
            )
        return FrozenSplit.of(self._index, listing.pictures)

    def _journal(self) -> Iterator[_Entry]:
        """What was learnt before; also what someone put there by hand."""
        path = self._folder / JOURNAL
        said = {verdict.picture: verdict for verdict in feedback.read(path)} if path.exists() else {}
        for picture in self._files():
            name = picture.relative_to(self._folder)
            is_picture = picture.suffix.lower() in images.SUFFIXES and not images.is_litter(picture.name)
            if is_picture and len(name.parts) > 1:
                yield _Entry(picture, name.as_posix(), said.get(picture) or _by_hand(picture, name.parts[0]))

    def _as_it_is(self) -> str | None:
        """Another one when something else was learnt."""
        journal = self._folder / JOURNAL
        return file_sha256(journal) if journal.exists() else None

    def _files(self) -> list[Path]:
        """Of the folder as it is now."""
        return [path for path in sorted(self._folder.rglob("*")) if path.is_file()]

    # ---- rows --------------------------------------------------------------------------------------------------------

    def problems_of(self, verdicts: Sequence[Verdict]) -> Iterator[BlemishError]:
        """Take in what can be used; gives what is wrong with the rest."""
        content: dict[Path, str] = {}
        usable = []
        for verdict in verdicts:
            try:
                self._check(verdict)
                content[verdict.picture] = file_sha256(verdict.picture)
                usable.append(verdict)
            except BlemishError as problem:
                yield DatasetError(f"{self._table}, row {verdict.row}: {problem}")
        of_data = {image.sha256: image for image in self._index.images if not image.path.startswith(f"{LEARNT}/")}
        for digest, verdict in feedback.newest(usable, content).items():
            known = of_data.get(digest)
            if known is None:
                self._take(digest, verdict)
            elif known.split in MAY_BE_TESTED:
                self._learnt.tested.append(known.path)
            elif says_good(verdict.verdict) != known.label:
                self._learnt.known += 1
            else:
                kept = "kept as a defect" if known.label else "learnt from as a good part"
                yield DatasetError(
                    f"{self._table}, row {verdict.row}: {verdict.picture} is said to be {verdict.verdict}, and is "
                    f"{kept}, {self._place.source / known.path}; move that away if it is none"
                )

    def _check(self, verdict: Verdict) -> None:
        """Raises ArgumentError or DatasetError where a row cannot be used."""
        picture = verdict.picture
        if says_masks(feedback.usable_verdict(verdict.verdict)):
            raise ArgumentError(
                f"verdict = {verdict.verdict!r}: called like a folder of masks; call the defect otherwise"
            )
        if not picture.is_file():
            raise DatasetError(f"{picture}: no such picture; correct the path, which is relative to the table's folder")
        if picture.suffix.lower() not in images.SUFFIXES:
            raise DatasetError(f"{picture}: no picture by its name; read are {' '.join(sorted(images.SUFFIXES))}")
        height, width = images.read(picture, self._config.reading).rgb.shape[:2]
        first = self._index.images[0]
        if self._index.region is not None and (width, height) != (first.width, first.height):
            raise DatasetError(
                f"{picture}: is {width} x {height} pixels, and the region of interest is of {first.width} x "
                f"{first.height}; take pictures as the camera's others"
            )

    def _spelt(self, verdict: str) -> str:
        """As the folder is called: one that is there already may have other capitals."""
        return GOOD if says_good(verdict) else self._kinds.setdefault(_bare(verdict), verdict)

    def _take(self, digest: str, verdict: Verdict) -> None:
        name = self._spelt(verdict.verdict)
        before = self._entries.get(digest)
        if before is not None and (before.verdict.when >= verdict.when or self._spelt(before.folder) == name):
            self._learnt.known += 1
            return
        file = verdict.picture if before is None else before.file
        day = verdict.when.date().isoformat()
        place = f"{name}/{day}/{verdict.picture.name}"
        if _bare(place) in self._names:  # cameras begin again at 0001
            place = f"{name}/{day}/{verdict.picture.stem}-{digest[:8]}{verdict.picture.suffix}"
        self._names.add(_bare(place))
        self._entries[digest] = _Entry(file, place, replace(verdict, verdict=name))
        if before is None:
            self._learnt.joined[name] += 1
        else:
            self._learnt.corrected += 1

    # ---- files -------------------------------------------------------------------------------------------------------

    def carried_out(self) -> Learnt:
        """Replace the folder, if anything has changed."""
        if not self._learnt.changes:
            return self._learnt
        with _writable(self._folder), atomic_folder(self._folder) as folder:
            if self._as_it_is() != self._state:
                raise Busy(f"{self._folder}: another process has just changed it; run again")
            entries = sorted(self._entries.values(), key=lambda entry: entry.name)
            for entry in entries:
                _put(entry.file, folder / entry.name, self._folder)
            ours = {self._folder / JOURNAL, self._folder / SPLIT_FILE, *(entry.file for entry in entries)}
            for path in self._files():  # notes that someone keeps there, say
                if path not in ours:
                    _put(path, folder / path.relative_to(self._folder), self._folder)
            _write_journal(folder / JOURNAL, entries)
            write_json(folder / SPLIT_FILE, self._frozen.model_dump(mode="json"))
        return self._learnt


@contextlib.contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except PermissionError:
        raise DatasetError(
            f"{folder}: cannot be written; allow it, or copy the category into a folder of your own (data.root)"
        ) from None


def _by_hand(picture: Path, verdict: str) -> Verdict:
    """What its folder says of a picture that no row tells of."""
    when = datetime.fromtimestamp(picture.stat().st_mtime).astimezone()
    return Verdict(picture, verdict, "", when, None, 0)


def _bare(name: str) -> str:
    """What Windows and a Mac take for one."""
    return unicodedata.normalize("NFC", name).casefold()


def _put(file: Path, target: Path, before: Path) -> None:
    """What was there before gets a second name instead of a copy, where the file system has such."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if file.is_relative_to(before):
        with contextlib.suppress(OSError):
            os.link(file, target)
            return
    try:
        shutil.copyfile(file, target)
    except FileNotFoundError:
        raise DatasetError(f"{file}: is gone since it was looked at; nothing was learnt") from None


def _write_journal(path: Path, entries: Iterable[_Entry]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(feedback.COLUMNS[:-1])
        for entry in entries:
            said = entry.verdict
            writer.writerow([entry.name, said.verdict, said.who, said.when.isoformat(timespec="seconds")])
