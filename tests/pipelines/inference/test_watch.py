"""A folder that a camera fills: whole pictures alone, each decided on once, whatever kills the process or goes away."""

import base64
import contextlib
import csv
import errno
import hashlib
import hmac
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from clone import REPOSITORY
from small_bundles import make, png
from waiting import until as until_within

from pipelines.errors import ArgumentError, DatasetError
from pipelines.files import Busy, DiskFull
from pipelines.inference import outlets
from pipelines.inference import watch as module
from pipelines.inference.outlets import Outlet, Unavailable, Unwanted, Webhook
from pipelines.inference.proven import Proven
from pipelines.inference.watch import Pace, Record, watch

LONG = 30  # seconds that anything may take here
until = partial(until_within, seconds=LONG)
QUICK = Pace(settle=0.1, patience=0.6, poll=0.02)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures, one of them good, in the camera's folder."""
    (tmp_path / "camera" / "left").mkdir(parents=True)
    (tmp_path / "camera" / "a.png").write_bytes(png(100))
    (tmp_path / "camera" / "left" / "b.png").write_bytes(png(200))
    return tmp_path / "camera"


@pytest.fixture
def bundle(tmp_path: Path) -> Proven:
    return Proven(make(tmp_path / "gear.zip"), threads=1)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "watched"


class Kept(list[Record]):
    """An outlet that keeps what it gets."""

    def deliver(self, record: Any) -> None:
        self.append(dict(record))


def once(
    folder: Path, bundle: Proven, output: Path, *to: Outlet, pace: Pace = QUICK, move: bool = False
) -> list[Record]:
    """What is told of all that lies there."""
    told: list[Record] = []
    watch(folder, bundle, output, to, told.append, threading.Event(), pace=pace, move=move, once=True)
    return told


@contextlib.contextmanager
def following(folder: Path, bundle: Proven, output: Path, *to: Outlet, **more: Any) -> Iterator[list[Record]]:
    """What has been told so far, while a watcher runs."""
    told: list[Record] = []
    stop = threading.Event()
    given = {"pace": QUICK, **more}
    thread = threading.Thread(target=watch, args=(folder, bundle, output, to, told.append, stop), kwargs=given)
    thread.start()
    try:
        yield told
    finally:
        stop.set()
        thread.join(LONG)
        assert not thread.is_alive()


def records(output: Path) -> dict[str, Record]:
    """Of what was delivered, by picture."""
    found = [json.loads(path.read_bytes()) for path in output.glob("done/*/*.json")]
    assert len({record["picture"] for record in found}) == len(found)
    return {record["picture"]: record for record in found}


def table(output: Path) -> list[dict[str, str]]:
    (path,) = output.glob("results/*.csv")
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------------------------------------------------ decisions


def test_each_picture_is_decided_on_once(folder: Path, bundle: Proven, output: Path) -> None:
    (folder / "notes.txt").write_text("none")
    (folder / "._a.png").write_bytes(b"litter")
    taken = Kept()
    told = once(folder, bundle, output, taken)
    assert [(record["picture"], record["decision"]) for record in told] == [("a.png", "good"), ("left/b.png", "defect")]
    assert told[1]["score"] == pytest.approx(200 / 255)
    assert (told[1]["threshold"], told[1]["run_id"], told[1]["error"], told[1]["moved_to"]) == (0.5, "0123", None, None)
    assert told == taken == [records(output)[name] for name in ("a.png", "left/b.png")]
    assert [(row["id"], row["decision"]) for row in table(output)] == [
        (record["id"], record["decision"]) for record in told
    ]
    assert told[0]["overlay"] is None
    assert (output / told[1]["overlay"]).read_bytes()[:4] == b"\x89PNG"
    assert not list((output / "pending").iterdir())
    assert once(folder, bundle, output, taken) == []
    assert len(taken) == 2
    (folder / "a.png").write_bytes(png(250))  # the camera begins again with its first name
    assert [record["decision"] for record in once(folder, bundle, output)] == ["defect"]
    assert len(table(output)) == 3


def test_pictures_move_by_what_was_decided_and_none_takes_another_ones_place(
    folder: Path, bundle: Proven, output: Path
) -> None:
    (folder / "cut.png").write_bytes(png(100)[:-30])
    told = once(folder, bundle, output, move=True)
    assert {record["picture"]: record["moved_to"] for record in told} == {
        "a.png": "accept/a.png",
        "left/b.png": "reject/left/b.png",
        "cut.png": "unreadable/cut.png",
    }
    assert [path for path in folder.rglob("*") if path.is_file()] == []
    assert (output / "accept" / "a.png").read_bytes() == png(100)
    assert (output / "unreadable" / "cut.png").read_bytes() == png(100)[:-30]
    (folder / "a.png").write_bytes(png(90))
    (again,) = once(folder, bundle, output, move=True)
    assert again["moved_to"] == f"accept/a-{again['id'][:8]}.png"
    assert (output / "accept" / "a.png").read_bytes() == png(100)
    assert (output / again["moved_to"]).read_bytes() == png(90)


def test_names_that_are_no_text_and_names_of_any_kind(folder: Path, bundle: Proven, output: Path) -> None:
    names = ["Größe 5.png", "a\\b.png", 'say "x", y.png', "C:nul.png", os.fsdecode(b"caf\xe9.png")]
    for level, name in enumerate(names):
        (folder / name).write_bytes(png(20 + level))
    told = once(folder, bundle, output, move=True)
    assert len(told) == len(names) + 2
    kept = ["a.png", *names[:-1], "caf\\xe9.png"]
    assert sorted(path.name for path in (output / "accept").iterdir()) == sorted(kept)
    assert [row["picture"] for row in table(output)] == [record["picture"] for record in told]
    assert "caf\\xe9.png" in records(output)
    assert once(folder, bundle, output, move=True) == []


def test_to_another_disk_and_past_what_holds_a_picture(
    folder: Path, bundle: Proven, output: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rename, held = Path.replace, [True, True]

    def across(self: Path, target: Path) -> Path:
        if self.is_relative_to(folder):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return rename(self, target)

    def unlink(self: Path, *arguments: Any, **more: Any) -> None:
        if self == folder / "a.png" and held:
            held.pop()
            raise PermissionError(errno.EACCES, "used by another process")
        removing(self, *arguments, **more)

    removing = Path.unlink
    monkeypatch.setattr(Path, "replace", across)
    monkeypatch.setattr(Path, "unlink", unlink)
    assert len(once(folder, bundle, output, move=True)) == 2
    assert [path for path in folder.rglob("*") if path.is_file()] == []
    assert (output / "accept" / "a.png").read_bytes() == png(100)
    assert [path.name for path in (output / "accept").iterdir()] == ["a.png"]
    assert caplog.text.count("cannot be moved to") == 2


def test_a_picture_is_read_when_it_is_whole(folder: Path, bundle: Proven, output: Path) -> None:
    content = png(200, side=64)
    with following(folder, bundle, output, pace=Pace(settle=0.3, patience=LONG, poll=0.02)) as told:
        with (folder / "slow.png").open("wb") as file:
            for start in range(0, len(content), 1 + len(content) // 8):
                file.write(content[start : start + 1 + len(content) // 8])
                file.flush()
                assert "slow.png" not in [record["picture"] for record in told]
                time.sleep(0.1)
        # One that stalled for longer than it takes to settle.
        (folder / "stalled.png").write_bytes(content[:-40])
        until(lambda: len(told) == 3)
        time.sleep(0.7)
        assert "stalled.png" not in [record["picture"] for record in told]
        (folder / "stalled.png").write_bytes(content)
        until(lambda: len(told) == 4)
    assert [record["error"] for record in told] == [None] * 4


def test_what_cannot_be_read_is_told_once_and_never_good(folder: Path, bundle: Proven, output: Path) -> None:
    (folder / "cut.png").write_bytes(png(100)[:-30])
    (folder / "text.jpg").write_text("none")
    (folder / "empty.bmp").touch()
    os.link(folder / "a.png", folder / f"{'x' * 240}.png")
    told = {record["picture"]: record for record in once(folder, bundle, output)}
    assert len(told) == 6
    for name in ("cut.png", "text.jpg", "empty.bmp"):
        assert (told[name]["score"], told[name]["decision"]) == (None, None)
        assert told[name]["error"].startswith(f"{folder / name}: ")
    assert once(folder, bundle, output) == []


def test_whatever_fails_on_a_picture_does_not_stop_the_next(
    folder: Path, bundle: Proven, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = bundle.engine.decode

    def broken(content: bytes, name: Path) -> Any:
        if name.name == "a.png":
            raise RuntimeError("a fault\nof a library")
        return decode(content, name)

    monkeypatch.setattr(bundle.engine, "decode", broken)
    told = {record["picture"]: record["error"] for record in once(folder, bundle, output)}
    assert told == {"a.png": f"{folder / 'a.png'}: a fault of a library", "left/b.png": None}


def test_a_score_that_is_none_is_told_at_once(folder: Path, bundle: Proven, output: Path) -> None:
    class Nothing:
        card = bundle.card
        decode = staticmethod(lambda content, path: content)
        fitted = staticmethod(lambda rgb, name: rgb)

        def __call__(self, inputs: Any) -> Any:
            return [[None]], [float("nan")]

    bundle.engine = Nothing()  # type: ignore[assignment]
    begun = time.monotonic()
    told = once(folder, bundle, output, pace=Pace(settle=0.1, patience=LONG, poll=0.02))
    assert time.monotonic() - begun < LONG / 2
    assert [record["error"] for record in told] == [
        f"{folder / name}: the model's score is nan; inspect this part by hand" for name in ("a.png", "left/b.png")
    ]


# ---------------------------------------------------------------------------------------------- what goes away, or ends


def test_a_share_that_is_away_for_a_while(
    folder: Path, bundle: Proven, output: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with following(folder, bundle, output) as told:
        until(lambda: len(told) == 2)
        folder.rename(folder.with_name("away"))
        until(lambda: "cannot be looked through" in caplog.text)
        time.sleep(0.2)
        folder.with_name("away").rename(folder)
        (folder / "c.png").write_bytes(png(20))
        until(lambda: len(told) == 3)
    assert caplog.text.count("cannot be looked through") == 1


@pytest.mark.parametrize("write", range(1, 7))
def test_a_full_disk_ends_it_in_a_line_and_it_goes_on_when_there_is_room(
    folder: Path, bundle: Proven, output: Path, write: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each of the writes of two pictures that move to another disk, one of them with an overlay."""
    sync, rename, left = os.fsync, Path.replace, [write]

    def full(handle: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    def across(self: Path, target: Path) -> Path:
        if self.is_relative_to(folder):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(Path, "replace", across)
    taken = Kept()
    if write <= 5:
        with pytest.raises(DiskFull, match="No space left on device"):
            once(folder, bundle, output, taken, move=True)
    once(folder, bundle, output, taken, move=True)
    assert records(output).keys() == {"a.png", "left/b.png"}
    assert len(table(output)) == len({record["id"] for record in taken}) == 2
    assert [path for path in folder.rglob("*") if path.is_file()] == []
    assert (output / "accept" / "a.png").read_bytes() == png(100)
    assert (output / "reject" / "left" / "b.png").read_bytes() == png(200)


def test_a_new_bundle_is_taken_over(folder: Path, bundle: Proven, output: Path, tmp_path: Path) -> None:
    with following(folder, bundle, output) as told:
        until(lambda: len(told) == 2)
        make(tmp_path / "gear.zip", run_id="4567", threshold=0.1)
        until(lambda: bundle.card.run_id == "4567")
        (folder / "c.png").write_bytes(png(100))
        until(lambda: len(told) == 3)
    assert (told[2]["run_id"], told[2]["threshold"], told[2]["decision"]) == ("4567", 0.1, "defect")


def test_one_process_for_an_output(folder: Path, bundle: Proven, output: Path) -> None:
    with following(folder, bundle, output) as told:
        until(lambda: told)
        with pytest.raises(Busy, match="another process watches for it"):
            once(folder, bundle, output)


def test_folders_that_cannot_be(folder: Path, bundle: Proven, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such folder"):
        once(tmp_path / "none", bundle, tmp_path / "watched")
    for inside in (folder, folder / "results"):
        with pytest.raises(ArgumentError, match="lies in the folder that is watched"):
            once(folder, bundle, inside)


def test_a_row_that_a_power_cut_tore_is_left_behind(folder: Path, bundle: Proven, output: Path) -> None:
    once(folder, bundle, output)
    (path,) = output.glob("results/*.csv")
    path.write_bytes(path.read_bytes()[:-20])
    (folder / "c.png").write_bytes(png(20))
    (record,) = once(folder, bundle, output)
    assert table(output)[-1]["id"] == record["id"]


# The n-th time that the output is written to, the process is gone.
KILLED = """
import os, sys
import cli, pipelines.inference.watch, pipelines.inference.outlets, pipelines.inference.proven
left, place = int(sys.argv[1]), os.getcwd()
def kill(event, arguments):
    global left
    if event == "http.client.connect" or event in ("open", "os.rename", "os.remove", "os.mkdir") and any(
        os.path.join(place, str(path)).startswith(f"{place}/watched") for path in arguments[:2]
    ):
        left -= 1
        if left == 0:
            os._exit(9)
sys.argv = ["blemish", *sys.argv[2:]]
sys.addaudithook(kill)
try:
    cli.main()
finally:
    print("left", left, file=sys.stderr)
"""


def test_killed_at_any_write_it_goes_on_without_deciding_twice(
    folder: Path, bundle: Proven, tmp_path: Path, thorough: bool
) -> None:
    with receiver() as (address, received):

        def run(left: int, place: Path) -> subprocess.CompletedProcess[str]:
            pace = ["--settle", "0.05", "--patience", "0.1", "--poll", "0.02", "--threads", "1"]
            given = ["watch", "camera", "--bundle", str(bundle.path), "--once", "--move", "--webhook", address, *pace]
            return subprocess.run(
                [sys.executable, "-c", KILLED, str(left), *given],
                cwd=place,
                env={**os.environ, "PYTHONPATH": str(REPOSITORY), outlets.SECRET: "secret", "NO_PROXY": "*"},
                capture_output=True,
                text=True,
                check=False,
            )

        def begin(name: str) -> Path:
            shutil.copytree(folder, tmp_path / name / "camera")
            return tmp_path / name

        last = 1000
        whole = run(last, begin("whole"))
        assert whole.returncode == 0, whole.stderr
        writes = last - int(whole.stderr.split()[-1])
        assert writes > 20
        for number in range(1, writes + 1, 1 if thorough else writes // 8):
            place = begin(f"killed {number}")
            received.clear()
            killed = run(number, place)
            assert killed.returncode == 9, killed.stderr
            again = run(last, place)
            assert again.returncode == 0, again.stderr
            decided = (killed.stdout + again.stdout).splitlines()
            for name in ("a.png", "left/b.png"):
                assert sum(line.endswith(name) for line in decided) <= 1, (number, decided)
            found, output = records(place / "watched"), place / "watched"
            assert found.keys() == {"a.png", "left/b.png"}, number
            ids = {record["id"] for record in found.values()}
            assert {row["id"] for row in table(output)} == ids
            assert len(table(output)) == 2, number
            assert {record["id"] for _, record in received} == ids, number
            assert not list((output / "pending").glob("*.json"))
            assert [path for path in (place / "camera").rglob("*") if path.is_file()] == []
            assert sorted(p.name for p in (output / "accept").iterdir()) == ["a.png"]
            assert sorted(p.name for p in (output / "reject" / "left").iterdir()) == ["b.png"]


# -------------------------------------------------------------------------------------------------------------- outlets


@contextlib.contextmanager
def receiver(*statuses: int) -> Iterator[tuple[str, list[tuple[dict[str, str], Record]]]]:
    """Address of a receiver, and the headers and records that it has taken; it first answers these statuses."""
    received: list[tuple[dict[str, str], Record]] = []
    answers = list(statuses)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status = answers.pop(0) if answers else 200
            if status == 200:
                received.append(
                    (
                        {name.lower(): value for name, value in self.headers.items()} | {"body": body.decode()},
                        json.loads(body),
                    )
                )
            self.send_response(status)
            self.send_header("Content-Length", "0")
            if status == 302:
                self.send_header("Location", "/elsewhere")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/decisions", received
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize(
    ("secret", "key"), [("a secret", b"a secret"), (f"whsec_{base64.b64encode(b'0123456789').decode()}", b"0123456789")]
)
def test_a_webhook_is_signed_as_the_standard_says(folder, bundle, output, secret: str, key: bytes) -> None:
    with receiver() as (address, received):
        told = once(folder, bundle, output, Webhook(address, secret))
    assert [record for _, record in received] == told
    for headers, record in received:
        assert headers["webhook-id"] == record["id"]
        assert abs(int(headers["webhook-timestamp"]) - time.time()) < LONG
        signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.{headers['body']}".encode()
        expected = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
        assert headers["webhook-signature"] == f"v1,{expected}"


def test_what_is_away_is_tried_again_and_scoring_goes_on(
    folder: Path, bundle: Proven, output: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_SHORTEST_WAIT", 0.02)
    away, taken = threading.Event(), Kept()
    away.set()

    class Moody(Kept):
        def deliver(self, record: Any) -> None:
            if away.is_set():
                raise Unavailable("Connection refused")
            super().deliver(record)

    moody = Moody()
    with following(folder, bundle, output, moody, taken) as told:
        until(lambda: len(told) == 2)
        until(lambda: "Connection refused; tried again" in caplog.text)
        assert records(output) == {}
        away.clear()
        until(lambda: len(taken) == 2)
        until(lambda: len(records(output)) == 2)
    assert moody == taken == told
    assert caplog.text.count("tried again") == 1
    assert "is there again" in caplog.text


def test_what_was_not_delivered_is_at_the_next_start(
    folder: Path, bundle: Proven, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Away:
        def deliver(self, record: Any) -> None:
            raise Unavailable("away")

    monkeypatch.setattr(module, "_LAST_TRIES", 0.2)
    with following(folder, bundle, output, Away()) as told:
        until(lambda: len(told) == 2)
    assert len(list((output / "pending").glob("*.json"))) == 2
    taken = Kept()
    assert once(folder, bundle, output, taken) == []
    assert taken == told
    assert len(table(output)) == 2


@pytest.mark.parametrize("status", [400, 302, 410])
def test_what_a_receiver_will_never_take_does_not_hold_up_the_rest(
    folder: Path, bundle: Proven, output: Path, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    with receiver(status) as (address, received):
        told = once(folder, bundle, output, Webhook(address, "secret"))
    assert [record for _, record in received] == told[1:]
    assert len(records(output)) == 2
    assert f"answers {status} to record {told[0]['id']}, which will not be sent again" in caplog.text


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_what_it_may_take_later_is_sent_again(folder, bundle, output, status: int, monkeypatch) -> None:
    monkeypatch.setattr(module, "_SHORTEST_WAIT", 0.02)
    with receiver(status, status) as (address, received):
        told = once(folder, bundle, output, Webhook(address, "secret"))
    assert [record for _, record in received] == told


def test_nobody_there_and_no_answer() -> None:
    with receiver() as (address, _):
        pass
    with pytest.raises(Unavailable, match="Connection refused"):
        Webhook(address, "secret").deliver({"id": "1"})


@pytest.mark.parametrize(
    ("url", "secret", "message"),
    [
        ("ftp://host/a", "secret", "no address of a receiver"),
        ("host/a", "secret", "no address of a receiver"),
        ("https://host/a", None, "set the secret that the receiver knows"),
        ("https://host/a", "", "set the secret that the receiver knows"),
        ("https://host/a", "whsec_%", "not Base64 behind whsec_"),
    ],
)
def test_no_webhook(url: str, secret: str | None, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Webhook(url, secret)


def test_a_receivers_key_and_password_are_not_shown() -> None:
    assert str(Webhook("https://host/a?key=1", "secret")) == "https://host/a"
    with pytest.raises(ArgumentError, match="a name and a password in the address") as caught:
        Webhook("https://user:word@host/a", "secret")
    assert "word@" not in str(caught.value)


def test_an_outlet_may_say_never(folder: Path, bundle: Proven, output: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Never:
        def deliver(self, record: Any) -> None:
            raise Unwanted("says no")

    with caplog.at_level(logging.WARNING):
        once(folder, bundle, output, Never())
    assert caplog.text.count("which will not be sent again") == 2


# ----------------------------------------------------------------------------------------------------- on the terminal


def test_the_verb(folder: Path, bundle: Proven, output: Path, blemish: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ("watch", str(folder), "--bundle", str(bundle.path), "-o", str(output), "--once", "--settle", "0.1")
    (folder / "cut.png").write_bytes(png(100)[:-30])
    done = blemish(*given, "--patience", "0.5", "--poll", "0.02")
    assert done.code == 0, done.err
    assert done.out.splitlines()[0] == f"{folder}: watched with brightness on part; results in {output}"
    assert [line.split()[0] for line in done.out.splitlines()[1:]] == ["good", "defect"]
    assert done.err.startswith(f"error: {folder / 'cut.png'}: ")
    monkeypatch.delenv(outlets.SECRET, raising=False)
    refused = blemish(*given, "--webhook", "https://host/a")
    assert (refused.code, refused.err.count("\n")) == (1, 1)
    assert "BLEMISH_WEBHOOK_SECRET" in refused.err
    assert blemish("watch", str(folder), "--bundle", str(folder / "a.png")).code == 1


def test_sigterm_ends_it_with_what_was_decided_written(folder: Path, bundle: Proven, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import cli; cli.main()", "watch", "camera", "--bundle", str(bundle.path)]
    process = subprocess.Popen(
        [*command, "--settle", "0.1", "--poll", "0.02"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(3)]
    process.terminate()
    assert process.wait(LONG) == 0
    process.stdout.close()
    assert lines[2].startswith("defect")
    assert len(records(tmp_path / "watched")) == 2
