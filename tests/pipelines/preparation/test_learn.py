"""People's verdicts join a category's folder, once and with their history, or nothing of it changes."""

import csv
import errno
import os
import shutil
import unicodedata
from datetime import datetime

import pytest
from drawn_folders import CONFIG, paths_of, run, write_image

from pipelines import feedback
from pipelines.errors import DatasetError, StageError
from pipelines.files import Busy, DiskFull
from pipelines.preparation import learn as learning
from pipelines.preparation.config import RegionConfig
from pipelines.preparation.learn import Place, learn

NOON, EVENING, NEXT_DAY = "2026-11-28T12:00", "2026-11-28T20:00", "2026-11-29T12:00"


def draw_line(folder, numbers=range(6), first=1000):
    """Pictures of a line, as 000.png."""
    for number in numbers:
        write_image(folder / f"{number:03}.png", first + number)
    return folder


def said(folder, *rows):
    """A table beside the folder's pictures; each row (path, verdict), with when and category, who is always Jo."""
    path = folder / "feedback.csv"
    folder.mkdir(exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(feedback.COLUMNS)
        for row in rows:
            picture, verdict, when, category = *row, *(NOON, "")[len(row) - 2 :]
            writer.writerow([picture, verdict, "Jo", when, category])
    return path


def places(*roots):
    return {root.name: Place(root, root.parent / "prepared" / root.name) for root in roots}


def taught(root, *rows, config=CONFIG, line=None):
    """What became of the verdicts on a category that is prepared if it was not, with its pictures in `line`."""
    if not (root.parent / "prepared" / root.name).exists():
        run(root, config)
    (found,) = learn(said(line or root.parent / "line", *rows), None, places(root), config, [])
    return found


def refused(root, *rows, config=CONFIG, kind=DatasetError, category=None, of=None):
    """What is told, where nothing may change."""
    table, before = said(root.parent / "line", *rows), tree(root)
    with pytest.raises(kind) as caught:
        learn(table, category, of or places(root), config, [])
    assert type(caught.value) is kind
    assert tree(root) == before
    return str(caught.value).replace(f"{table}, ", "").replace(f"{root.parent}/", "")


def tree(root):
    """All that is in a folder."""
    return {path.relative_to(root).as_posix(): path.is_file() and path.read_bytes() for path in root.rglob("*")}


def learnt(root):
    """The pictures below `learnt`."""
    return sorted(path.relative_to(root / "learnt").as_posix() for path in (root / "learnt").rglob("*.png"))


def journal(root):
    with (root / "learnt/feedback.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def local(when):
    return datetime.fromisoformat(when).astimezone().isoformat(timespec="seconds")


@pytest.fixture(autouse=True)
def line(tmp_path):
    return draw_line(tmp_path / "line")


# ---- what joins -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mvtec", "plain"])
def test_pictures_join_by_day_with_who_said_what_and_when(request, name, line):
    root = request.getfixturevalue(name)
    rows = [("000.png", "good"), ("001.png", "scratch", EVENING), ("002.png", "", NOON), ("003.png", "good", NEXT_DAY)]
    found = taught(root, *rows)
    assert learnt(root) == ["good/2026-11-28/000.png", "good/2026-11-29/003.png", "scratch/2026-11-28/001.png"]
    assert (root / "learnt/scratch/2026-11-28/001.png").read_bytes() == (line / "001.png").read_bytes()
    assert journal(root) == [
        ["path", "verdict", "who", "when"],
        ["good/2026-11-28/000.png", "good", "Jo", local(NOON)],
        ["good/2026-11-29/003.png", "good", "Jo", local(NEXT_DAY)],
        ["scratch/2026-11-28/001.png", "scratch", "Jo", local(EVENING)],
    ]
    assert found.lines == [
        f"{root.name}: 2 good parts and 1 defect (scratch 1) joined, 0 corrected, 0 known already",
        f"{root.name}: its test stays from now on as it is, 5 pictures",
    ]


def test_the_same_verdicts_twice_add_nothing(mvtec):
    rows = [("000.png", "good"), ("001.png", "scratch")]
    assert taught(mvtec, *rows).changes
    before = tree(mvtec)
    times = {path: path.stat().st_mtime_ns for path in (mvtec / "learnt").rglob("*")}
    again = taught(mvtec, *rows)
    assert tree(mvtec) == before
    assert {path: path.stat().st_mtime_ns for path in (mvtec / "learnt").rglob("*")} == times, "written anew"
    assert not again.changes
    assert again.lines == ["nut: 0 good parts and 0 defects joined, 0 corrected, 2 known already"]
    run(mvtec)
    taught(mvtec, *rows)
    assert tree(mvtec) == before


@pytest.mark.parametrize(("first", "then"), [("good", "scratch"), ("scratch", "good"), ("scratch", "dent")])
def test_a_later_verdict_moves_a_picture_and_an_earlier_one_does_not(mvtec, first, then):
    taught(mvtec, ("000.png", first), ("001.png", "good"))
    split = (mvtec / "learnt/split.json").read_bytes()
    for when in ("2026-11-27T12:00", NOON):
        assert taught(mvtec, ("000.png", then, when)).known == 1
    assert f"{first}/2026-11-28/000.png" in learnt(mvtec)
    moved = taught(mvtec, ("000.png", then, NEXT_DAY))
    assert (moved.corrected, moved.joined.total(), moved.is_new) == (1, 0, False)
    assert learnt(mvtec) == sorted([f"{then}/2026-11-29/000.png", "good/2026-11-28/001.png"])
    assert [f"{then}/2026-11-29/000.png", then, "Jo", local(NEXT_DAY)] in journal(mvtec)
    assert len(journal(mvtec)) == 3
    assert (mvtec / "learnt/split.json").read_bytes() == split
    assert taught(mvtec, ("000.png", first)).known == 1  # the older table once more
    assert learnt(mvtec) == sorted([f"{then}/2026-11-29/000.png", "good/2026-11-28/001.png"])


def test_of_two_verdicts_in_one_table_the_later_counts_whichever_picture_of_the_same_bytes_has_it(mvtec, line):
    shutil.copy(line / "000.png", line / "again.png")
    taught(mvtec, ("000.png", "scratch", EVENING), ("again.png", "good"), ("001.png", "good"), ("001.png", "dent"))
    assert learnt(mvtec) == ["dent/2026-11-28/001.png", "scratch/2026-11-28/000.png"]


def test_pictures_of_one_name_from_two_cameras_both_stay(mvtec, line):
    draw_line(line / "left", range(1), 2000)
    draw_line(line / "right", range(1), 3000)
    (line / "right/000.png").rename(line / "right/000.PNG")
    taught(mvtec, ("000.png", "good"), ("left/000.png", "good"), ("right/000.PNG", "good"))
    pictures = list((mvtec / "learnt/good/2026-11-28").iterdir())
    assert len({path.name.casefold() for path in pictures}) == 3
    wanted = {(line / name).read_bytes() for name in ("000.png", "left/000.png", "right/000.PNG")}
    assert {path.read_bytes() for path in pictures} == wanted
    assert run(mvtec).counts["train"] + run(mvtec).counts["holdout"] == 13


def test_copies_of_what_is_tested_are_left_out_and_named(mvtec, line):
    shutil.copy(mvtec / "test/good/001.png", line / "a.png")
    shutil.copy(mvtec / "test/crack/000.jpg", line / "b.jpg")
    found = taught(mvtec, ("a.png", "scratch"), ("b.jpg", "crack"), ("000.png", "good"))
    assert learnt(mvtec) == ["good/2026-11-28/000.png"]
    assert "nut: 2 pictures left out, for the test has it: test/good/001.png, test/crack/000.jpg" in found.lines


def test_where_nothing_joins_nothing_is_frozen(mvtec, line):
    shutil.copy(mvtec / "test/good/001.png", line / "a.png")
    shutil.copy(mvtec / "train/good/001.png", line / "b.png")
    found = taught(mvtec, ("a.png", "good"), ("b.png", "good"))
    assert not (mvtec / "learnt").exists()
    assert found.lines == [
        "nut: 0 good parts and 0 defects joined, 0 corrected, 1 known already",
        "nut: 1 picture left out, for the test has it: test/good/001.png",
    ]


@pytest.mark.parametrize("word", ["OK", "pass", "i.O.", "Good"])
def test_other_words_of_good_parts_are_good(mvtec, word):
    assert taught(mvtec, ("000.png", word)).joined == {"good": 1}
    assert learnt(mvtec) == ["good/2026-11-28/000.png"]
    assert taught(mvtec, ("000.png", "good", NEXT_DAY)).known == 1


def test_a_type_of_defect_is_spelt_as_the_first_was(mvtec):
    chipped = unicodedata.normalize("NFD", "ébréché")  # as a Mac writes names of folders
    for folder in ("test", "ground_truth"):
        (mvtec / folder / "crack").rename(mvtec / folder / chipped)
    typed = unicodedata.normalize("NFC", "Ébréché")
    rows = [("000.png", "Scratch"), ("001.png", "scratch"), ("002.png", "BENT"), ("003.png", typed)]
    assert taught(mvtec, *rows).joined == {"Scratch": 2, "bent": 1, chipped: 1}
    assert taught(mvtec, ("004.png", "SCRATCH")).joined == {"Scratch": 1}
    known = [image.defect for image in run(mvtec).images if image.split == "known"]
    assert sorted(known) == ["Scratch", "Scratch", "Scratch", "bent", chipped]


def test_what_was_put_there_by_hand_stays(mvtec):
    taught(mvtec, ("000.png", "good"))
    write_image(mvtec / "learnt/good/mine.png", 5000)
    write_image(mvtec / "learnt/OK/other.png", 5001)
    (mvtec / "learnt/scratch").mkdir()
    shutil.copy(mvtec / "learnt/OK/other.png", mvtec / "learnt/good/twice.png")
    (mvtec / "learnt/notes.txt").write_text("of line 3")
    before = tree(mvtec / "learnt")
    taught(mvtec, ("001.png", "scratch"))
    after = tree(mvtec / "learnt")
    files = {path: content for path, content in before.items() if content and path != "feedback.csv"}
    assert files.items() <= after.items()
    said_of = {row[0]: row[1:3] for row in journal(mvtec)}
    assert said_of["good/mine.png"] == ["good", ""]  # nobody said who
    assert said_of["good/2026-11-28/000.png"] == ["good", "Jo"]
    assert "notes.txt" not in said_of
    index = run(mvtec)
    assert {"learnt/good/mine.png", "learnt/OK/other.png"} <= {*paths_of(index, "train"), *paths_of(index, "holdout")}


def test_a_verdict_moves_what_was_put_there_by_hand(mvtec, line):
    taught(mvtec, ("000.png", "good"))
    shutil.copy(line / "001.png", mvtec / "learnt/good/mine.png")
    os.utime(mvtec / "learnt/good/mine.png", (1e9, 1e9))
    assert taught(mvtec, ("001.png", "scratch")).corrected == 1
    assert learnt(mvtec) == ["good/2026-11-28/000.png", "scratch/2026-11-28/001.png"]


def test_one_table_may_be_of_two_categories(mvtec, plain):
    run(mvtec)
    run(plain)
    rows = [("000.png", "good", NOON, "nut"), ("001.png", "dent", NOON, "part"), ("002.png", "good", NOON, "")]
    table = said(mvtec.parent / "line", *rows)
    found = learn(table, "part", places(mvtec, plain), CONFIG, [])
    assert [(one.category, dict(one.joined)) for one in found] == [
        ("nut", {"good": 1}),
        ("part", {"dent": 1, "good": 1}),
    ]
    assert learnt(mvtec) == ["good/2026-11-28/000.png"]
    assert learnt(plain) == ["dent/2026-11-28/001.png", "good/2026-11-28/002.png"]


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_all_that_is_wrong_is_told_at_once_and_nothing_has_changed(mvtec, line):
    taught(mvtec, ("005.png", "good"))
    (line / "text.txt").write_text("no picture")
    (line / "broken.png").write_bytes(b"no picture either")
    shutil.copy(mvtec / "train/good/003.png", line / "trained.png")
    message = refused(
        mvtec, ("000.png", "good"), ("gone.png", "good"), ("text.txt", "good"), ("broken.png", "scratch"),
        ("001.png", "a/b"), ("002.png", "mask"), ("003.png", ""), ("trained.png", "scratch"),
        ("004.png", "good", NOON, "nat"),
    )  # fmt: skip
    assert message.splitlines()[0].endswith("feedback.csv: 7 problems, and nothing was learnt")
    told = sorted(line.removeprefix("  - ") for line in message.splitlines()[1:])
    starts = [
        "row 10: category 'nat': not in data.categories (did you mean 'nut'?), which has nut",
        "row 3: line/gone.png: no such picture; correct the path, which is relative to the table's folder",
        "row 4: line/text.txt: no picture by its name; read are .bmp ",
        "row 5: line/broken.png: not a PNG, JPEG, BMP, TIFF or WEBP image; save it as one or remove it",
        "row 6: verdict = 'a/b': say good, or the type of the defect in at most 60 printable characters",
        "row 7: verdict = 'mask': called like a folder of masks; call the defect otherwise",
        "row 9: line/trained.png is said to be scratch, and is learnt from as a good part, nut/train/good/003.png; "
        "move that away if it is none",
    ]
    assert [line[: len(start)] for line, start in zip(told, starts, strict=True)] == starts


def test_where_there_are_several_categories_a_row_has_to_say_of_which_it_is(mvtec, plain):
    run(mvtec)
    run(plain)
    several = places(mvtec, plain)
    message = refused(mvtec, ("000.png", "good"), ("001.png", "good", NOON, "part"), of=several)
    assert message == "row 2: of which category? Give --category, one of nut, part"
    assert not (plain / "learnt").exists()
    assert "category 'screw': not in data.categories" in refused(
        mvtec, ("000.png", "good"), of=several, category="screw"
    )


def test_a_defect_put_among_the_tested_by_hand_is_no_good_part(plain, line):
    taught(plain, ("000.png", "good"))
    shutil.rmtree(plain / "masks")
    shutil.copy(line / "001.png", plain / "abnormal/dent/late.png")
    run(plain)
    assert refused(plain, ("001.png", "good")) == (
        "row 2: line/001.png is said to be good, and is kept as a defect, part/abnormal/dent/late.png; move that away "
        "if it is none"
    )
    assert taught(plain, ("001.png", "dent")).known == 1


def test_a_table_without_a_verdict_is_refused(mvtec):
    run(mvtec)
    message = refused(mvtec, ("000.png", ""))
    assert message.endswith(": no verdict in it; write good, or the kind of defect, into the column 'verdict'")


def test_with_a_region_of_interest_a_picture_of_another_size_is_refused(mvtec, line):
    region = RegionConfig(polygons=(((0, 0), (20, 0), (20, 15), (0, 15)),))
    config = CONFIG.model_copy(update={"regions": {"nut": region}})
    run(mvtec, config)
    write_image(line / "large.png", 1, width=40)
    assert refused(mvtec, ("large.png", "good"), config=config) == (
        "row 2: line/large.png: is 40 x 20 pixels, and the region of interest is of 30 x 20; take pictures as the "
        "camera's others"
    )
    assert taught(mvtec, ("000.png", "good"), config=config).changes


def test_folders_that_a_stage_makes_are_refused_with_the_remedy(mvtec, line):
    run(mvtec)
    with pytest.raises(DatasetError) as caught:
        learn(said(line, ("000.png", "good")), None, places(mvtec), CONFIG, [mvtec.parent / "other", mvtec.parent])
    assert str(caught.value) == (
        f"category 'nut': {mvtec} is made by `blemish download {mvtec.parent.name}`, and made anew when that changes; "
        "copy it to a folder of your own, name that in data.root, and run `blemish run`"
    )
    assert not (mvtec / "learnt").exists()


def test_a_category_that_is_not_prepared_or_has_changed_since_is_refused(mvtec):
    message = refused(mvtec, ("000.png", "good"), kind=StageError)
    assert message == "prepared/nut: no prepared images; run `blemish prepare nut`"
    run(mvtec)
    write_image(mvtec / "train/good/new.png", 4000)
    assert refused(mvtec, ("000.png", "good"), kind=StageError) == (
        "category 'nut': nut has changed since it was prepared, so that it is not known what is tested; run `blemish "
        "run` first"
    )
    run(mvtec)
    assert taught(mvtec, ("000.png", "good")).changes


@pytest.mark.parametrize("learnt_before", [False, True])
def test_a_full_disk_in_the_middle_leaves_the_folder_as_it_was(mvtec, monkeypatch, learnt_before):
    run(mvtec)
    if learnt_before:
        taught(mvtec, ("004.png", "good"), ("005.png", "scratch"))
    copy, calls = shutil.copyfile, []

    def copyfile(*args):
        calls.append(args)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return copy(*args)

    rows = [(f"{number:03}.png", "good") for number in range(4)]
    with monkeypatch.context() as context:
        context.setattr(shutil, "copyfile", copyfile)
        message = refused(mvtec, *rows, kind=DiskFull)
    assert message.startswith("nut/learnt: No space left on device; nothing was kept of it: free some space")
    assert taught(mvtec, *rows).joined == {"good": 4}


def test_of_two_that_learn_at_once_the_later_begins_anew(mvtec, monkeypatch):
    run(mvtec)
    taught(mvtec, ("000.png", "good"))
    whole = learning.atomic_folder

    def after_another(folder):
        journal = folder / "feedback.csv"
        journal.write_bytes(journal.read_bytes() + b"good/x.png,good,Kim,2026-11-28T10:00:00+00:00\r\n")
        return whole(folder)

    with monkeypatch.context() as context:
        context.setattr(learning, "atomic_folder", after_another)
        with pytest.raises(Busy, match="learnt: another process has just changed it; run again"):
            taught(mvtec, ("001.png", "good"))
    assert taught(mvtec, ("001.png", "good")).joined == {"good": 1}


def test_a_category_that_may_not_be_written_to_is_told(mvtec, monkeypatch):
    run(mvtec)

    def denied(folder):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))

    monkeypatch.setattr(learning, "atomic_folder", denied)  # root may write anywhere
    assert refused(mvtec, ("000.png", "good")) == (
        "nut/learnt: cannot be written; allow it, or copy the category into a folder of your own (data.root)"
    )
