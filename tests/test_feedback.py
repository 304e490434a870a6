"""`feedback.csv` as people and spreadsheets leave it, and as several processes write it."""

import csv
import errno
import getpass
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipelines import feedback
from pipelines.errors import ArgumentError, DatasetError
from pipelines.feedback import COLUMNS, Verdict, append, keep, newest, read, usable_name, usable_verdict
from pipelines.files import DiskFull

ROOT = Path(__file__).parents[1]
SAID = "path,verdict,who,when,category\npictures/a.png,scratch,Jo,2026-11-28T14:03:00+01:00,gear\n"
SCRATCH = datetime(2026, 11, 28, 13, 3, tzinfo=UTC)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "feedback.csv"


def written(path: Path, text: str, encoding: str = "utf-8") -> list[Verdict]:
    path.write_bytes(text.encode(encoding))
    return read(path)


def refusal(path: Path, text: str, encoding: str = "utf-8") -> str:
    with pytest.raises(DatasetError) as error:
        written(path, text, encoding)
    return str(error.value).replace(f"{path}", "FILE")


def cells(path: Path, delimiter: str = ",") -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file, delimiter=delimiter))


# -------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_table_is_read_however_a_spreadsheet_saves_it(path: Path, delimiter: str, end: str, mark: str) -> None:
    found = written(path, mark + SAID.replace(",", delimiter).replace("\n", end))
    assert found == [Verdict(path.parent / "pictures/a.png", "scratch", "Jo", SCRATCH, "gear", 2)]


def test_columns_may_stand_in_any_order_be_more_or_fewer(path: Path) -> None:
    (full,) = written(path, "Lot, VERDICT ,When,Category,who,Path\n7, scratch ,2026-11-28T13:03Z,,,a.png\n")
    assert full == Verdict(path.parent / "a.png", "scratch", "", SCRATCH, None, 2)
    (short,) = written(path, "path,verdict\na.png,good\n")
    changed = datetime.fromtimestamp(path.stat().st_mtime, UTC)
    assert short == Verdict(path.parent / "a.png", "good", "", changed, None, 2)


def test_what_is_not_judged_yet_is_left_out_and_rows_are_counted_as_a_spreadsheet_does(path: Path) -> None:
    text = 'path,verdict,who\na.png,,Jo\nb.png\n\n"c.png","two\nlines",Jo\n, ,\nd.png, "a, b",Jo\n'
    assert [(v.picture.name, v.verdict, v.row) for v in written(path, text)] == [
        ("c.png", "two\nlines", 5),
        ("d.png", "a, b", 7),
    ]


def test_a_time_may_be_a_day_and_lacks_a_zone_as_people_write_it(path: Path) -> None:
    found = written(path, "path,verdict,when\na.png,good,2026-11-28\nb.png,good,2026-11-28 14:03\n")
    assert [v.when for v in found] == [
        datetime(2026, 11, 28).astimezone(),
        datetime(2026, 11, 28, 14, 3).astimezone(),
    ]
    assert all(v.when.tzinfo for v in found)


def test_a_row_without_a_time_is_no_newer_than_those_that_came_in_after_it(path: Path) -> None:
    path.write_text("path,verdict,who,when\na.png,good,,\nb.png,good,,\n", encoding="utf-8")
    append(path, [path.with_name("a.png")], "scratch", "Jo")
    os.utime(path, (2e9, 2e9))  # someone touched it
    verdicts = read(path)
    assert newest(verdicts, {v.picture: v.picture.name for v in verdicts})["a.png"].verdict == "scratch"
    assert verdicts[0].when == verdicts[2].when


def test_paths_may_be_of_windows_or_lie_elsewhere(path: Path) -> None:
    (path.parent / "odd\\name.png").touch()
    text = "path,verdict\npictures\\a.png,good\nodd\\name.png,good\n/line/b.png,good\n"
    assert [v.picture for v in written(path, text)] == [
        path.parent / "pictures" / "a.png",
        path.parent / "odd\\name.png",
        Path("/line/b.png"),
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "FILE: is empty; the columns are path, verdict, who, when, category"),
        ("\ufeff\r\n", "FILE: is empty; the columns are"),
        ("path,who\na.png,Jo\n", "FILE: no column 'verdict' (its first row is 'path, who'); the columns are"),
        ("\na.png,good\n", "FILE: no column 'path' and 'verdict' (its first row is ''); the columns are"),
        ("path,verdict,when\na.png,good,28.11.2026\n", "FILE, row 2: when = '28.11.2026': no time such as 2026-11-28T"),
        ("path,verdict,when\na.png,good,0001-01-01T00:00+14:00\n", "FILE, row 2: when = '0001-01-01T00:00+14:00': no"),
        ("path,verdict\n,good\n", "FILE, row 2: a verdict (good) without a path"),
        ("verdict,path\ngood\n", "FILE, row 2: a verdict (good) without a path"),
        ('path,verdict\na.png,good\nb.png,"scr\nc.png,good\n', "FILE, row 3: unexpected end of data; a quote may not"),
        (f"path,verdict\na.png,{'x' * 200_000}\n", "FILE, row 2: field larger than field limit (131072); a quote may"),
        ("path,verdict\na\0.png,good\n", "FILE: not UTF-8; save it as CSV UTF-8"),
    ],
)
def test_what_is_no_such_table_gets_one_line(path: Path, text: str, line: str) -> None:
    said = refusal(path, text)
    assert said.startswith(line)
    assert "\n" not in said


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le"])
def test_another_encoding_is_named(path: Path, encoding: str) -> None:
    assert refusal(path, "path,verdict\na.png,Größe\n", encoding) == "FILE: not UTF-8; save it as CSV UTF-8"


def test_all_bad_rows_are_told_in_their_order(path: Path) -> None:
    assert refusal(path, "path,verdict,when\na.png,good,soon\nb.png,good,\n,scratch,\n").splitlines() == [
        "FILE: 2 rows cannot be read",
        "  - FILE, row 2: when = 'soon': no time such as 2026-11-28T14:03:00",
        "  - FILE, row 4: a verdict (scratch) without a path",
    ]


def test_what_is_no_file_is_told(path: Path) -> None:
    with pytest.raises(DatasetError, match=r"feedback\.csv: No such file or directory; give a table with the columns"):
        read(path)
    with pytest.raises(DatasetError, match="Is a directory; give a table"):
        read(path.parent)


# ------------------------------------------------------------------------------------------------------------ appending


@pytest.mark.parametrize("before", [None, "", "\ufeff", "\n"])
def test_the_first_verdict_begins_the_file(tmp_path: Path, before: str | None) -> None:
    path = tmp_path / "new" / "feedback.csv"
    if before is not None:
        path.parent.mkdir()
        path.write_text(before, encoding="utf-8")
    pictures = [path.parent / "pictures" / name for name in ("a.png", "b.png")]
    begun = datetime.now(UTC) - timedelta(seconds=1)
    append(path, pictures, "scratch, deep", "Jo", "gear")
    assert path.read_text(encoding="utf-8").removeprefix("\ufeff").startswith(",".join(COLUMNS))
    found = read(path)
    assert [(v.picture, v.verdict, v.who, v.category) for v in found] == [
        (picture, "scratch, deep", "Jo", "gear") for picture in pictures
    ]
    assert all(begun <= v.when <= datetime.now(UTC) for v in found)


def test_the_columns_the_delimiter_and_all_else_of_a_file_are_kept(path: Path) -> None:
    before = "\ufeffVerdict;Lot;Path\r\ngood;7;a.png\r\n"
    path.write_bytes(before.encode())
    append(path, [path.with_name("b.png")], "scratch; deep", "Jo", "gear")
    assert path.read_bytes().decode() == before + '"scratch; deep";;b.png\r\n'


def test_a_last_line_without_its_end_stays_a_row(path: Path) -> None:
    path.write_bytes(SAID.rstrip("\n").encode())
    append(path, [path.with_name("b.png")], "good", "")
    assert path.read_bytes().startswith(SAID.encode())
    assert b"\r" not in path.read_bytes()
    assert [v.verdict for v in read(path)] == ["scratch", "good"]


@pytest.mark.parametrize("text", ["path,who\n", 'path,verdict\na.png,"scr\n', "path\0verdict\n"])
def test_nothing_is_added_to_what_is_no_such_table(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DatasetError):
        append(path, [path.with_name("a.png")], "good", "Jo")
    assert path.read_text(encoding="utf-8") == text


def test_a_picture_is_named_from_the_folder_of_the_file_where_it_lies_below(
    path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path_factory.mktemp("line") / "b.png"
    monkeypatch.chdir(path.parent)
    append(Path("feedback.csv"), [Path("pictures/a.png"), elsewhere], "good", "Jo")
    assert [row[0] for row in cells(path)[1:]] == ["pictures/a.png", elsewhere.as_posix()]
    assert [v.picture for v in read(path)] == [path.parent / "pictures" / "a.png", elsewhere]


def test_several_processes_lose_no_row(path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom pipelines.feedback import append\n"
        "for n in range(25): append(Path(sys.argv[1]), [Path(f'/line/{sys.argv[2]}-{n}.png')], 'good', sys.argv[2])"
    )
    commands = [[sys.executable, "-c", code, str(path), str(number)] for number in range(4)]
    processes = [subprocess.Popen(command, cwd=ROOT) for command in commands]
    assert [process.wait(60) for process in processes] == [0] * 4
    found = [v.picture.stem for v in read(path)]
    assert sorted(found) == sorted(f"{number}-{n}" for number in range(4) for n in range(25))
    assert [name for name in found if name.startswith("3-")] == [f"3-{n}" for n in range(25)]


def test_a_full_disk_or_a_file_that_may_not_be_written_leaves_it_as_it_was(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_text(SAID, encoding="utf-8")
    for code, error, line in (
        (errno.ENOSPC, DiskFull, r"feedback\.csv: No space left on device; nothing was kept of it"),
        (errno.EACCES, DatasetError, r"feedback\.csv: cannot be written \(Permission denied\); check its permissions"),
    ):

        def fails(_: int, code: int = code) -> None:
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as context:
            context.setattr(os, "fsync", fails)
            with pytest.raises(error, match=line):
                append(path, [path.with_name("b.png")], "good", "Jo")
            with pytest.raises(error):
                keep(path.parent, b"bytes", ".png")
    assert path.read_text(encoding="utf-8") == SAID
    assert {found.name for found in path.parent.rglob("*")} - {".feedback.csv.lock"} == {"feedback.csv", "pictures"}


# ------------------------------------------------------------------------------------------------- pictures and words


def test_a_picture_is_kept_once(tmp_path: Path) -> None:
    kept = keep(tmp_path, b"bytes", ".png")
    assert kept == keep(tmp_path, b"bytes", ".png") != keep(tmp_path, b"other", ".png")
    assert kept.read_bytes() == b"bytes"
    assert kept.relative_to(tmp_path).as_posix() == "pictures/277089d91c0bdf4f.png"
    assert len(list((tmp_path / "pictures").iterdir())) == 2


def test_of_one_content_the_verdict_that_was_given_last_counts(path: Path) -> None:
    text = (
        "path,verdict,when\na.png,scratch,2026-11-28T12:00Z\nb.png,good,2026-11-28T12:30+01:00\n"
        "c.png,dent,2026-11-28T12:00Z\nd.png,good,2026-11-27\n"
    )
    content = {path.parent / f"{name}.png": digest for name, digest in zip("abcd", "1112", strict=True)}
    found = newest(written(path, text), content)
    assert {digest: verdict.verdict for digest, verdict in found.items()} == {"1": "dent", "2": "good"}


@pytest.mark.parametrize("text", ["", "  ", "a/b", "a\\b", ".a", "two\nlines", "x" * 61, "=1+1", "-", "@a", "\ud800"])
def test_a_verdict_that_can_name_no_folder_is_refused(text: str) -> None:
    with pytest.raises(ArgumentError, match=r"^verdict = .*: say good, or the type of the defect in at most") as error:
        usable_verdict(text)
    assert "\n" not in str(error.value)
    assert repr(text.strip()[:60]) in str(error.value)


def test_words_are_taken_without_the_spaces_around_them() -> None:
    assert usable_verdict(" Kratzer, größer als 2 mm ") == "Kratzer, größer als 2 mm"
    assert (usable_name(" QA / Jo. "), usable_name(" ")) == ("QA / Jo.", "")
    for text in ("two\nlines", "x" * 61, "=1+1"):
        with pytest.raises(ArgumentError, match=r"^who = .*: give a name of at most 60 printable characters"):
            usable_name(text)


def test_who_is_logged_in_is_told_or_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "jo")
    assert feedback.login_name("give --who NAME") == "jo"

    def fails() -> str:
        raise KeyError("getpwuid(): uid not found: 10001")

    monkeypatch.setattr(getpass, "getuser", fails)
    with pytest.raises(ArgumentError, match="no name is known here of who is logged in: give --who NAME"):
        feedback.login_name("give --who NAME")


def test_the_verb_takes_pictures_and_folders_of_them(tmp_path: Path, blemish: Any) -> None:
    folder = tmp_path / "watched" / "review" / "deep"
    folder.mkdir(parents=True)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(folder / name)
    table = tmp_path / "watched" / "feedback.csv"
    done = blemish("verdict", "scratch", str(folder.parent), "--feedback", str(table), "--by", "Kim")
    assert (done.code, done.out) == (0, f"{table}: 2 pictures scratch, says Kim\n")
    assert blemish("verdict", "good", str(folder / "b.png"), "--feedback", str(table), "--by", "Jo").code == 0
    said = [(verdict.picture, verdict.verdict, verdict.who) for verdict in read(table)]
    assert said == [
        (folder / "a.png", "scratch", "Kim"),
        (folder / "b.png", "scratch", "Kim"),
        (folder / "b.png", "good", "Jo"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("good", "nothing.png"), "nothing.png: no such file or folder"),
        (("a/b", "a.png"), "verdict = 'a/b': say good"),
        (("good", "a.png", "--by", "=1"), "who = '=1': give a name"),
    ],
)
def test_the_verb_refuses_in_a_line_and_writes_nothing(
    tmp_path: Path, blemish: Any, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (4, 4)).save("a.png")
    done = blemish("verdict", *arguments)
    assert done.code == 1
    assert done.err.startswith(f"error: {message}")
    assert len(done.err.splitlines()) == 1
    assert not Path("feedback.csv").exists()
