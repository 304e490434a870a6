import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pipelines.files import DiskFull, atomic_file, atomic_folder, read_json, reporting_full_disk, write_json

ROOT = Path(__file__).parents[2]

# A limit on the size of a file is what an ordinary user can set; it looks like a full disk to the program.
FULL_DISK = """
import resource, sys
from pathlib import Path
from PIL import Image
from pipelines.files import DiskFull, atomic_file, atomic_folder, write_json, written_whole

resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
folder, what = Path(sys.argv[1]), sys.argv[2]
try:
    if what == "file":
        with atomic_file(folder / "a.bin") as temporary:
            temporary.write_bytes(bytes(20_000))
    elif what == "json":
        write_json(folder / "a.json", ["x" * 20_000])
    elif what == "picture":
        with atomic_file(folder / "a.bin") as temporary, written_whole(temporary) as file:
            Image.effect_noise((200, 200), 50).save(file, "JPEG")
    else:
        with atomic_folder(folder / "sub") as temporary:
            write_json(temporary / "a.json", ["x" * 20_000])
except DiskFull as error:
    sys.exit(f"error: {error}")
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_takes_its_name_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "a.txt"
    with atomic_file(target) as temporary:
        temporary.write_text("new")
        assert not target.exists()
        assert temporary.suffix == ".txt"  # some writers choose the format by it
    assert target.read_text() == "new"
    assert names(target.parent) == ["a.txt"]
    assert target.stat().st_mode & 0o777 == 0o644


def test_a_folder_replaces_the_old_one_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    for name in ("first", "second"):
        with atomic_folder(target) as temporary:
            (temporary / name).write_text(name)
    assert names(target) == ["second"]
    assert names(target.parent) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(("atomic", "inside"), [(atomic_file, ""), (atomic_folder, "a.txt")])
def test_an_exception_leaves_what_was_there(tmp_path: Path, atomic: Any, inside: str, error: Any) -> None:
    target = tmp_path / "out"
    (target / inside).parent.mkdir(exist_ok=True)
    (target / inside).write_text("old")

    def write() -> None:
        with atomic(target) as temporary:
            (temporary / inside).write_text("half of the n")
            raise error

    with pytest.raises(error):
        write()
    assert (target / inside).read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_leftovers_of_a_killed_process_are_swept_away(tmp_path: Path) -> None:
    for leftover in ("new", "old"):
        (tmp_path / ".out.partial" / leftover).mkdir(parents=True)
        (tmp_path / ".out.partial" / leftover / "half").write_text("half")
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out") as temporary:
        assert names(temporary) == []
        (temporary / "whole").write_text("whole")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["whole"]


def test_the_old_folder_is_never_half_deleted(tmp_path: Path) -> None:
    """Killed without warning at the last moment: one of old and new is whole, the other not there."""
    code = """
import os, sys
from pathlib import Path
from pipelines.files import atomic_folder
import shutil
original = shutil.rmtree
def dying(path, *args, **kwargs):
    if Path(path).exists():
        os._exit(9)  # in the middle of deleting
    original(path, *args, **kwargs)
with atomic_folder(Path(sys.argv[1])) as temporary:
    (temporary / "a").write_text("new")
    (temporary / "b").write_text("new")
    shutil.rmtree = dying
"""
    target = tmp_path / "out"
    target.mkdir()
    for name in ("a", "b"):
        (target / name).write_text("old")
    assert subprocess.run([sys.executable, "-c", code, target], cwd=ROOT, check=False).returncode == 9
    assert [(target / name).read_text() for name in ("a", "b")] == ["new", "new"]
    with atomic_folder(target) as temporary:
        (temporary / "c").write_text("newer")
    assert names(tmp_path) == ["out"]
    assert names(target) == ["c"]


WRITER = """
import sys, time
from pathlib import Path
from pipelines.files import Busy, atomic_folder

target, name, seconds = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
try:
    with atomic_folder(target) as temporary:
        for part in ("a", "b", "c"):
            (temporary / part).write_text(name)
            time.sleep(seconds / 3)
except Busy as error:
    sys.exit(f"error: {error}")
"""


def writer(target: Path, name: str, seconds: float) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", WRITER, str(target), name, str(seconds)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def test_one_process_at_a_time_writes_a_folder(tmp_path: Path) -> None:
    target = tmp_path / "out"
    first = writer(target, "first", 60)
    while not (tmp_path / ".out.partial" / "new" / "a").exists():
        assert first.poll() is None
        time.sleep(0.01)
    second = writer(target, "second", 0)
    assert second.communicate()[1] == (
        f"error: {target}: another process is writing it; wait for it to end, and run again\n"
    )
    assert second.returncode == 1
    first.kill()
    first.communicate()
    third = writer(target, "third", 0)
    assert third.communicate()[1] == ""
    assert [(target / part).read_text() for part in ("a", "b", "c")] == ["third"] * 3
    assert names(tmp_path) == ["out"]


def test_processes_that_write_a_folder_at_once_leave_one_whole_result(tmp_path: Path) -> None:
    target = tmp_path / "out"
    for _ in range(3):
        at_once = [writer(target, str(number), 0) for number in range(4)]
        said = [process.communicate()[1] for process in at_once]
        written = {number for number, process in enumerate(at_once) if process.returncode == 0}
        assert written
        others = [text for number, text in enumerate(said) if number not in written]
        assert [text for text in others if "another process is writing it" not in text] == []
        found = {(target / part).read_text() for part in ("a", "b", "c")}
        assert found in [{str(number)} for number in written]
        assert names(tmp_path) == ["out"]


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks there")
def test_a_writer_that_finishes_while_it_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, asked = os.mkdir, list[str]()

    def mkdir(path: str | Path, *mode: int) -> None:
        if Path(path).name == ".out.partial" and not asked:
            asked.append(str(path))
            raise FileExistsError(path)  # and is gone by now
        make(path, *mode)

    monkeypatch.setattr("os.mkdir", mkdir)
    with atomic_folder(tmp_path / "out") as temporary:
        (temporary / "a").touch()
    assert asked
    assert names(tmp_path) == ["out"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems rename twice")
def test_a_folder_is_replaced_in_one_step(tmp_path: Path) -> None:
    """Watched while it is written again and again, it is there at every moment."""
    target = tmp_path / "out"
    with atomic_folder(target) as temporary:
        (temporary / "a").write_text("0")
    watched, done = [], threading.Event()

    def watch() -> None:
        while not done.is_set():
            watched.append(target.exists())

    watcher = threading.Thread(target=watch)
    watcher.start()
    for number in range(200):
        with atomic_folder(target) as temporary:
            (temporary / "a").write_text(str(number))
    done.set()
    watcher.join()
    assert all(watched)
    assert len(watched) > 200
    assert (target / "a").read_text() == "199"


def test_what_a_killed_process_left_of_a_file_is_swept_away(tmp_path: Path) -> None:
    """Only of this file, and nothing that another process is writing at the time."""
    target = tmp_path / "a[1].json"
    dead = [tmp_path / f".{name}.{random}.json" for name, random in ((target.name, "abcd_123"), ("b.json", "abcd_123"))]
    for path in dead:
        path.write_text("half")
    with atomic_file(target) as living:
        living.write_text("first")
        write_json(target, "second")
        assert names(tmp_path) == sorted([living.name, dead[1].name, target.name])
    assert target.read_text() == "first"
    assert names(tmp_path) == sorted([dead[1].name, target.name])


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    """Where a system or a file system cannot exchange two folders."""
    code = """
import os, sys
from pathlib import Path
from pipelines import files
from pipelines.files import atomic_folder
files._exchanged = lambda *_: False
replace = Path.replace
def dying(source, target):
    replace(source, target)
    os._exit(9)  # the old folder is moved away, the new one is not in its place
with atomic_folder(Path(sys.argv[1])) as temporary:
    (temporary / "a").write_text("new")
    Path.replace = dying
"""
    target = tmp_path / "out"
    target.mkdir()
    (target / "a").write_text("old")
    assert subprocess.run([sys.executable, "-c", code, target], cwd=ROOT, check=False).returncode == 9
    assert not target.exists()
    with pytest.raises(RuntimeError), atomic_folder(target):
        raise RuntimeError
    assert (target / "a").read_text() == "old"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("what", "named"), [("file", "a.bin"), ("json", "a.json"), ("picture", "a.bin"), ("folder", "sub")]
)
def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path: Path, what: str, named: str) -> None:
    for name in ("a.bin", "a.json"):
        (tmp_path / name).write_text("old")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.json").write_text("old")
    command = [sys.executable, "-c", FULL_DISK, tmp_path, what]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    remedy = "nothing was kept of it: free some space and run again"
    assert done.stderr == f"error: {tmp_path / named}: File too large; {remedy}\n"
    assert names(tmp_path) == ["a.bin", "a.json", "sub"]
    assert {path.read_text() for path in tmp_path.rglob("*.*")} == {"old"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_no_space_left_is_recognised(tmp_path: Path) -> None:
    with pytest.raises(DiskFull, match=r"^somewhere: No space left on device; nothing was kept of it"):  # noqa: SIM117
        with reporting_full_disk(Path("somewhere")), Path("/dev/full").open("wb", buffering=0) as file:
            file.write(b"x")


def test_no_space_left_is_recognised_below_another_exception() -> None:
    def write() -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 1024 vs 918")  # noqa: B904

    with pytest.raises(DiskFull, match=r"^somewhere: No space left on device"), reporting_full_disk(Path("somewhere")):
        write()


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), atomic_file(tmp_path / "a"):
        raise PermissionError(13, "Permission denied")
    with pytest.raises(OSError, match="no number") as caught, atomic_folder(tmp_path / "b"):
        raise OSError("no number")
    assert type(caught.value) is OSError
    assert names(tmp_path) == []


def test_json_round_trip_keeps_order_and_letters(tmp_path: Path) -> None:
    value = {"z": [1, 2.5, None, True], "a": {"naïve": "Ø 5 µm"}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert text.index('"z"') < text.index('"a"')
    assert "Ø 5 µm" in text
    assert text.endswith("}\n")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_refuses_what_other_readers_do_not_take(tmp_path: Path, value: float) -> None:
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"auroc": value})
    assert read_json(tmp_path / "a.json") == {"old": 1}
    assert names(tmp_path) == ["a.json"]
