"""Archives from a local server: resumed, verified, extracted whole or not at all."""

import hashlib
import io
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from pydantic import ValidationError
from rich.console import Console
from waiting import until

from pipelines.errors import DatasetError, DownloadError, ParamsError
from pipelines.files import DiskFull
from pipelines.sources import demo_data
from pipelines.sources import download as download_module
from pipelines.sources.catalogue import MVTEC_AD_COUNTS, SOURCES, CategoryCounts, check_mvtec_ad
from pipelines.sources.download import ArchiveConfig, DownloadParams, acquire, download

NOISE = np.random.default_rng(0).bytes(300_000)  # so that the archive does not shrink to nothing
PHOTO = "dtd/images/banded/banded_0001.jpg"
DEMO = {"categories": ["gear"], "image_size": 256, "train": 40, "test_good": 20, "test_defect": 10, "seed": 0}
KNOWN = "demo, demo_textures, mvtec_ad, dtd, imagenette, elpv"
TEXTURES = {"image_size": 256, "per_class": 4, "seed": 0}


def tar_of(*members: tuple[str | tarfile.TarInfo, bytes], compression: str = "gz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{compression}") as archive:  # type: ignore[call-overload]
        for name, content in members:
            member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


GOOD = tar_of(("dtd/labels/test1.txt", b"labels"), (PHOTO, NOISE), ("dtd/images/dotted/dotted_0001.jpg", b"dots"))


@dataclass
class Server:
    """What the next answers are like, and the headers of the requests that came."""

    content: bytes = GOOD
    knows_ranges: bool = True
    states_length: bool = True
    statuses: list[int] = field(default_factory=list)  # of the next answers; 200 after these
    cuts: list[int] = field(default_factory=list)  # bytes of body in the next answers; all of it after these
    hang: threading.Event | None = None  # instead of closing a connection that is cut
    requests: list[dict[str, str]] = field(default_factory=list)
    url: str = ""

    def ranges(self) -> list[str | None]:
        """What of the archive each request asked for; None for all of it."""
        return [request.get("range") for request in self.requests]

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        headers = {name.lower(): value for name, value in handler.headers.items()}
        self.requests.append(headers)
        if self.statuses:
            handler.send_error(self.statuses.pop(0))
            return
        wants_range = self.knows_ranges and "range" in headers
        start = int(headers["range"].removeprefix("bytes=").removesuffix("-")) if wants_range else 0
        if wants_range and start >= len(self.content):
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{len(self.content)}")
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        self.send_body(handler, self.content[start:], start if wants_range else None)

    def send_body(self, handler: BaseHTTPRequestHandler, body: bytes, start: int | None) -> None:
        handler.send_response(200 if start is None else 206)
        if start is not None:
            handler.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        if self.states_length:
            handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        cut = self.cuts.pop(0) if self.cuts else None
        handler.wfile.write(body[:cut])
        handler.wfile.flush()
        if cut is not None and self.hang is not None:
            self.hang.wait(20)


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.close_connection = True
            state.answer(self)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        state.url = f"http://127.0.0.1:{listening.server_address[1]}/files/textures.tar.gz"
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield state
        if state.hang is not None:
            state.hang.set()
        listening.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def no_pauses_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_module, "_PAUSES", (0.0, 0.0))
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture(autouse=True)
def publish(monkeypatch: pytest.MonkeyPatch, server: Server) -> Callable[..., None]:
    """Lets the server's content be a published archive; GOOD is that of DTD at first."""

    def publish(content: bytes = GOOD, name: str = "dtd", **changes: object) -> None:
        server.content = content
        digest = hashlib.sha256(content).hexdigest()
        source = replace(SOURCES[name], url=server.url, sha256=digest, **changes)  # type: ignore[arg-type]
        monkeypatch.setitem(SOURCES, name, source)

    publish()
    return publish


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def fetch(data: Path, archive: str = "official", name: str = "dtd") -> None:
    download(name, DownloadParams.model_validate({name: {"archive": archive}}), data, quiet())


def fetch_whole(data: Path, archive: str = "official") -> None:
    """The data set stands after it and nothing else is left."""
    fetch(data, archive)
    assert (data / "dtd/images/banded/banded_0001.jpg").read_bytes() == NOISE
    assert (data / "dtd/labels/test1.txt").read_bytes() == b"labels"
    assert sorted(path.name for path in data.iterdir()) == [".archives", "dtd"]
    assert not list((data / ".archives").iterdir())


def leave_part(data: Path, server: Server, num_bytes: int) -> None:
    """Let a download end after `num_bytes`, for good."""
    server.cuts = [num_bytes, 0, 0, 0]
    with pytest.raises(DownloadError, match="run again to go on"):
        fetch(data)
    server.cuts.clear()
    server.requests.clear()
    assert part_of(data).stat().st_size == num_bytes


def part_of(data: Path) -> Path:
    return data / ".archives" / "textures.tar.gz.part"


def assert_no_dataset(data: Path) -> None:
    assert [path.name for path in data.iterdir() if path.name != ".archives"] == []


# --- fetching


@pytest.mark.parametrize(
    ("answers", "ranges"),
    [
        ({}, [None]),
        ({"cuts": [100_000]}, [None, "bytes=100000-"]),
        ({"cuts": [100_000], "knows_ranges": False}, [None, "bytes=100000-"]),  # it begins anew
        # tries that get further do not count against the three
        ({"cuts": [50_000] * 5}, [None, *(f"bytes={50_000 * (1 + number)}-" for number in range(5))]),
        ({"states_length": False}, [None]),
        ({"statuses": [503, 429]}, [None] * 3),
    ],
    ids=["whole", "cut", "no ranges", "cut often", "no length", "busy"],
)
def test_the_archive_becomes_a_folder_without_its_top_folder(tmp_path, server, answers, ranges):
    for name, value in answers.items():
        setattr(server, name, value)
    fetch_whole(tmp_path)
    assert server.ranges() == ranges


def test_an_xz_archive_with_the_categories_at_its_top(tmp_path, publish):
    content = tar_of(("bottle/train/good/000.png", b"png"), ("cable/license.txt", b"terms"), compression="xz")
    publish(content, "mvtec_ad", size=len(content), contents=("bottle", "cable"))
    fetch(tmp_path, name="mvtec_ad")
    assert (tmp_path / "mvtec_ad/bottle/train/good/000.png").read_bytes() == b"png"


def test_a_second_download_replaces_the_folder(tmp_path):
    (tmp_path / "dtd").mkdir()
    (tmp_path / "dtd/old.txt").write_text("old")
    fetch_whole(tmp_path)
    assert not (tmp_path / "dtd/old.txt").exists()


@pytest.mark.parametrize("mirror", ["", "?mirror"])
def test_a_later_run_resumes_what_an_earlier_one_left_from_whichever_mirror(tmp_path, server, mirror):
    leave_part(tmp_path, server, 200_000)
    assert_no_dataset(tmp_path)
    fetch_whole(tmp_path, archive=f"{server.url}{mirror}" if mirror else "official")
    assert server.ranges() == ["bytes=200000-"]


def test_a_part_of_another_file_is_told_by_the_hash_and_deleted(tmp_path, server, publish):
    publish(tar_of((PHOTO, NOISE[::-1])))
    leave_part(tmp_path, server, 100_000)
    publish()
    with pytest.raises(DownloadError, match=r"SHA-256 is .*; the file is deleted: try again"):
        fetch(tmp_path)
    fetch_whole(tmp_path)
    assert server.ranges() == ["bytes=100000-", None]


@pytest.mark.parametrize("left", [b"spoilt" + GOOD[6:100_000], GOOD + b"more"], ids=["spoilt", "too long"])
def test_the_hash_covers_the_resumed_beginning_and_what_there_is_too_much(tmp_path, server, left):
    leave_part(tmp_path, server, 100_000)
    part_of(tmp_path).write_bytes(left)
    with pytest.raises(DownloadError, match=r"SHA-256 is .*; the file is deleted: try again"):
        fetch(tmp_path)
    assert_no_dataset(tmp_path)
    fetch_whole(tmp_path)


@pytest.mark.parametrize("size_is_known", [True, False])
def test_a_whole_part_is_not_fetched_again(tmp_path, server, publish, size_is_known):
    publish(size=len(GOOD) if size_is_known else None)
    leave_part(tmp_path, server, 100_000)
    part_of(tmp_path).write_bytes(GOOD)
    server.cuts = [0, 0, 0]  # no body will come
    fetch_whole(tmp_path)
    assert len(server.requests) == (0 if size_is_known else 1)


def test_a_killed_process_leaves_no_data_set_and_the_next_one_goes_on(tmp_path, server):
    server.cuts, server.hang = [100_000], threading.Event()
    script = (
        "import dataclasses, sys; from pathlib import Path; from rich.console import Console\n"
        "from pipelines.sources.download import DownloadParams, download\n"
        "from pipelines.sources.catalogue import SOURCES\n"
        "SOURCES['dtd'] = dataclasses.replace(SOURCES['dtd'], url=sys.argv[1], sha256=sys.argv[2])\n"
        "params = DownloadParams.model_validate({'dtd': {'archive': 'official'}})\n"
        "download('dtd', params, Path(sys.argv[3]), Console(stderr=True))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, server.url, SOURCES["dtd"].sha256, str(tmp_path)],
        cwd=Path(__file__).parents[3],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until(lambda: part_of(tmp_path).exists() and part_of(tmp_path).stat().st_size, 30, process)
    finally:
        process.kill()
    assert process.wait(10) == -signal.SIGKILL
    server.hang.set()
    left = part_of(tmp_path).stat().st_size
    assert 0 < left <= 100_000
    assert_no_dataset(tmp_path)

    server.requests.clear()
    fetch_whole(tmp_path)
    assert server.requests[0]["range"] == f"bytes={left}-"


# --- refusals


def test_wrong_bytes_are_deleted_and_both_hashes_named(tmp_path, server):
    server.content = GOOD[:-1] + b"?"
    with pytest.raises(DownloadError) as caught:
        fetch(tmp_path)
    found = hashlib.sha256(server.content).hexdigest()
    assert str(caught.value) == (
        f"{server.url}: SHA-256 is {found}, expected {SOURCES['dtd'].sha256}; the file is deleted: try again, "
        "or set download.dtd.archive to a mirror's URL or a local copy of textures.tar.gz"
    )
    assert_no_dataset(tmp_path)
    assert not list((tmp_path / ".archives").iterdir())


def test_another_size_is_refused_before_the_first_byte(tmp_path, publish):
    publish(size=len(GOOD) + 1)
    with pytest.raises(DownloadError, match=f"{len(GOOD):,} bytes are offered, expected {len(GOOD) + 1:,}; set "):
        fetch(tmp_path)
    assert not part_of(tmp_path).exists()


@pytest.mark.parametrize(("status", "words"), [(404, "HTTP 404 Not Found"), (403, "HTTP 403 Forbidden")])
def test_a_missing_file_is_one_line_at_once(tmp_path, server, status, words):
    server.statuses = [status]
    with pytest.raises(DownloadError) as caught:
        fetch(tmp_path)
    assert str(caught.value) == (
        f"{server.url}: {words}; set download.dtd.archive to a mirror's URL or a local copy of textures.tar.gz"
    )
    assert len(server.requests) == 1


def test_three_tries_are_the_end(tmp_path, server):
    server.statuses = [500] * 9
    with pytest.raises(DownloadError, match=r"HTTP 500 .* \(3 tries\)"):
        fetch(tmp_path)
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("archive", "message"),
    [
        ("http://127.0.0.1:9/x.tar.gz", r"^{}: .*Connection refused \(3 tries\); run again"),
        ("http://", "^{}: .*; set download.dtd.archive"),
        ("/nowhere.tar.gz", "^download.dtd.archive: no such file '{}'; set download.dtd"),
    ],
)
def test_nothing_there(tmp_path, archive, message):
    with pytest.raises(DownloadError, match=message.format(archive)):
        fetch(tmp_path, archive)


def test_a_server_that_says_nothing(tmp_path, server, monkeypatch):
    monkeypatch.setattr(download_module, "_TIMEOUT", (5.0, 0.1))
    server.cuts, server.hang = [0, 0, 0], threading.Event()
    with pytest.raises(DownloadError, match=r"\(3 tries\)"):
        fetch(tmp_path)


# --- local files and kept archives


def test_a_local_archive_is_used_where_it_lies(tmp_path, server):
    local = tmp_path / "usb stick" / "my copy.tar.gz"
    local.parent.mkdir()
    local.write_bytes(GOOD)
    data = tmp_path / "data"
    fetch(data, archive=str(local))
    assert (data / "dtd/images/banded/banded_0001.jpg").read_bytes() == NOISE
    assert [path.name for path in data.iterdir()] == ["dtd"]
    assert local.read_bytes() == GOOD
    assert server.requests == []


def test_a_local_archive_with_another_hash_is_refused_and_kept(tmp_path):
    expected = SOURCES["dtd"].sha256
    local = tmp_path / "copy.tar.gz"
    local.write_bytes(GOOD[:1000])
    with pytest.raises(DownloadError, match=f"copy.tar.gz: SHA-256 is [0-9a-f]{{64}}, expected {expected}; it is"):
        fetch(tmp_path / "data", archive=str(local))
    assert local.exists()


def test_an_interrupted_extraction_keeps_the_archive_and_no_folder(tmp_path, server, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "extract", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch(tmp_path)
    assert_no_dataset(tmp_path)
    server.requests.clear()
    fetch_whole(tmp_path)
    assert server.requests == []


def interrupt(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt


def test_a_kept_archive_that_went_bad_is_fetched_again(tmp_path, server):
    kept = tmp_path / ".archives" / "textures.tar.gz"
    kept.parent.mkdir()
    kept.write_bytes(b"bad")
    fetch_whole(tmp_path)
    assert len(server.requests) == 1


# --- what an archive may hold


@pytest.mark.parametrize(
    ("member", "content"),
    [
        ("dtd/../../escaped.txt", b"x"),
        (special("dtd/link", tarfile.SYMTYPE, "../../escaped"), b""),
        (special("dtd/link", tarfile.SYMTYPE, "/etc/passwd"), b""),
        (special("dtd/link", tarfile.LNKTYPE, "../escaped.txt"), b""),
        (special("dtd/link", tarfile.LNKTYPE, "/etc/passwd"), b""),
        (special("dtd/device", tarfile.CHRTYPE), b""),
        (special("dtd/pipe", tarfile.FIFOTYPE), b""),
    ],
)
def test_what_tarfiles_filter_refuses_leaves_nothing(tmp_path, publish, member, content):
    publish(tar_of((PHOTO, b"photo"), (member, content)))
    data = tmp_path / "inner" / "data"
    name = member if isinstance(member, str) else member.name
    with pytest.raises(DownloadError, match=r"damaged, cut short or unsafe \(") as caught:
        fetch(data)
    assert name in str(caught.value)
    assert_no_dataset(data)
    assert [path.name for path in tmp_path.rglob("*") if "escaped" in path.name] == []


def test_links_that_stay_inside_are_kept(tmp_path, publish):
    twin = special("dtd/images/banded/twin.jpg", tarfile.LNKTYPE, PHOTO)
    alias = special("dtd/images/banded/alias.jpg", tarfile.SYMTYPE, "banded_0001.jpg")
    publish(tar_of((PHOTO, b"photo"), (twin, b""), (alias, b"")))
    fetch(tmp_path)
    assert (tmp_path / "dtd/images/banded/twin.jpg").read_bytes() == b"photo"
    assert (tmp_path / "dtd/images/banded/alias.jpg").read_bytes() == b"photo"


@pytest.mark.parametrize(
    "content",
    [GOOD[:150_000], GOOD[:-4], b"not an archive at all", b"", tar_of()[:10]],
    ids=["half", "cut", "text", "empty", "head"],  # the head holds the time
)
def test_a_damaged_archive_with_the_right_hash_is_refused(tmp_path, publish, content):
    publish(content)
    with pytest.raises(DownloadError, match=r"damaged, cut short or unsafe \(|holds no images"):
        fetch(tmp_path)
    assert_no_dataset(tmp_path)


@pytest.mark.parametrize(
    "members",
    [
        [
            (special("dtd/a", tarfile.SYMTYPE, "b"), b""),
            (special("dtd/b", tarfile.SYMTYPE, "a"), b""),
            ("dtd/a/x", b""),
        ],
        [("dtd/images", b"a file"), (PHOTO, b"photo")],
        [(special("dtd/link", tarfile.LNKTYPE, "dtd/nowhere"), b"")],
        [(PHOTO, b"photo"), (PHOTO.upper(), b"photo")],
    ],
    ids=["a loop of links", "a file for a folder", "a link to nowhere", "two names, one file elsewhere"],
)
def test_members_that_cannot_be_written_are_refused_in_a_line(tmp_path, publish, members):
    publish(tar_of(*members))
    with pytest.raises(DownloadError, match=r"damaged, cut short or unsafe \(") as caught:
        fetch(tmp_path)
    assert "\n" not in str(caught.value)
    assert_no_dataset(tmp_path)


def test_an_archive_that_inflates_is_no_data_set(tmp_path, publish, monkeypatch):
    monkeypatch.setattr("pipelines.sources.download._NO_BOMB", 1_000_000)
    publish(tar_of((PHOTO, b"photo"), ("dtd/images/zeros", bytes(3_000_000))))
    with pytest.raises(DownloadError, match=r"it would unpack to more than 0\.0 GB"):
        fetch(tmp_path)
    assert_no_dataset(tmp_path)


def test_an_archive_without_the_folders_it_should_hold(tmp_path, publish):
    publish(tar_of(("dtd/labels/test1.txt", b"labels")))
    with pytest.raises(DownloadError, match=r"holds no images; set download.dtd.archive"):
        fetch(tmp_path)
    assert_no_dataset(tmp_path)


# --- zip archives

TEACHER = "efficientad_pretrained_weights/pretrained_teacher_small.pth"
TWIN = "efficientad_pretrained_weights/pretrained_teacher_medium.pth"


def zip_of(*members: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.fixture
def fetch_zip(tmp_path, publish) -> Callable[[bytes], Path]:
    """Extract the bytes as if they were the published teachers; gives the folder of data."""

    def extract(content: bytes) -> Path:
        archive, data = tmp_path / "teachers.zip", tmp_path / "inner" / "data"
        archive.write_bytes(content)
        publish(content, "efficientad_teachers")
        acquire("efficientad_teachers", ArchiveConfig(archive=str(archive)), data, quiet())
        return data

    return extract


def test_a_zip_becomes_a_folder_without_its_top_folder(fetch_zip):
    data = fetch_zip(zip_of(("efficientad_pretrained_weights/", b""), (TEACHER, NOISE), (TWIN, b"medium")))
    folder = data / "efficientad_teachers"
    assert (folder / "pretrained_teacher_small.pth").read_bytes() == NOISE
    assert sorted(path.name for path in folder.iterdir()) == [
        "pretrained_teacher_medium.pth",
        "pretrained_teacher_small.pth",
    ]
    assert [path.name for path in data.iterdir()] == ["efficientad_teachers"]


def test_no_name_in_a_zip_leads_outside(tmp_path, fetch_zip):
    names = ["../escaped.txt", "efficientad_pretrained_weights/../../escaped.txt", "/escaped.txt"]
    data = fetch_zip(zip_of((TEACHER, b"small"), (TWIN, b"medium"), *((name, b"x") for name in names)))
    escaped = list(tmp_path.rglob("*escaped*"))
    assert escaped
    assert all(path.is_relative_to(data / "efficientad_teachers") for path in escaped)


WHOLE_ZIP = zip_of((TEACHER, NOISE), (TWIN, b"medium"))
DAMAGED = r"damaged, cut short or unsafe \("


@pytest.mark.parametrize(
    ("content", "message"),
    [(WHOLE_ZIP[:cut], f"{DAMAGED}|holds no pretrained") for cut in (0, 10, 150_000, -4)]
    + [(WHOLE_ZIP[:100_000] + bytes([WHOLE_ZIP[100_000] ^ 0xFF]) + WHOLE_ZIP[100_001:], DAMAGED)],
    ids=["empty", "begun", "half", "no end", "spoilt"],
)
def test_a_damaged_zip_is_refused(tmp_path, fetch_zip, content, message):
    with pytest.raises(DownloadError, match=message):
        fetch_zip(content)
    assert list((tmp_path / "inner/data").iterdir()) == []


def test_a_zip_that_unpacks_to_more_than_there_is_room_for(tmp_path, fetch_zip, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    with pytest.raises(DiskFull, match=r"efficientad_teachers needs 0\.0 GB"):
        fetch_zip(zip_of((TEACHER, bytes(1_000_000)), (TWIN, b"medium")))  # a thousandth of it when packed
    assert list((tmp_path / "inner/data").iterdir()) == []


def test_a_zip_without_the_teachers(fetch_zip):
    with pytest.raises(DownloadError, match=r"holds no pretrained_teacher_medium.pth; set download.efficientad_teach"):
        fetch_zip(zip_of((TEACHER, b"small")))


# --- room


def test_too_little_room_is_said_before_the_download(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * len(GOOD) - 1))
    with pytest.raises(DiskFull, match=r"dtd needs 0.0 GB there and 0.0 GB are free; free some space and run again"):
        fetch(tmp_path)
    assert not part_of(tmp_path).exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * len(GOOD)))
    fetch_whole(tmp_path)


def test_too_little_room_is_said_before_the_extraction(tmp_path, monkeypatch):
    local = tmp_path / "copy.tar.gz"
    local.write_bytes(GOOD)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=len(GOOD) - 1))
    with pytest.raises(DiskFull):
        fetch(tmp_path / "data", archive=str(local))
    assert_no_dataset(tmp_path / "data")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_disk_that_fills_up_meanwhile(tmp_path):
    part_of(tmp_path).parent.mkdir()
    part_of(tmp_path).symlink_to("/dev/full")
    with pytest.raises(DiskFull, match=r"textures.tar.gz.part: the disk is full; what was fetched is kept: free some"):
        fetch(tmp_path)
    assert_no_dataset(tmp_path)


# --- drawn data sets and the section of params.yaml


@pytest.mark.parametrize(
    ("name", "function", "config"), [("demo", "draw_demo", DEMO), ("demo_textures", "draw_textures", TEXTURES)]
)
def test_a_drawn_data_set(tmp_path, monkeypatch, name, function, config):
    params = DownloadParams.model_validate({name: config})

    def draw(root: Path, drawn: object, on_progress: Callable[[int, int], None]) -> None:
        assert drawn == getattr(params, name)
        on_progress(1, 1)
        (root / "image.png").write_bytes(b"drawn")

    monkeypatch.setattr(demo_data, function, draw)
    download(name, params, tmp_path, quiet())
    assert (tmp_path / name / "image.png").read_bytes() == b"drawn"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_data, "draw_demo", interrupt)
    with pytest.raises(KeyboardInterrupt):
        download("demo", DownloadParams.model_validate({"demo": DEMO}), tmp_path, quiet())
    assert list(tmp_path.iterdir()) == []


def test_names_that_are_unknown_or_not_asked_for(tmp_path):
    params = DownloadParams.model_validate({"dtd": {"archive": "official"}, "demo": DEMO})
    with pytest.raises(ParamsError) as caught:
        download("mvtec", params, tmp_path, quiet())
    assert str(caught.value) == f"data set 'mvtec': unknown; known: {KNOWN}"
    with pytest.raises(ParamsError) as caught:
        download("mvtec_ad", params, tmp_path, quiet())
    assert str(caught.value) == (
        "data set 'mvtec_ad': not in the section 'download' of params.yaml, which lists: demo, dtd"
    )


def test_every_problem_of_the_section_is_listed():
    with pytest.raises(ValidationError) as caught:
        DownloadParams.model_validate({"mvtec": {}, "imagenet": {}, "dtd": {"archive": 3, "url": "x"}})
    problems = {".".join(map(str, detail["loc"])): detail["msg"] for detail in caught.value.errors()}
    unknown = f"Value error, unknown data set; known: {KNOWN}"
    assert problems.keys() == {"mvtec", "imagenet", "dtd.archive", "dtd.url"}
    assert problems["mvtec"] == problems["imagenet"] == unknown


def test_an_empty_section_wants_nothing():
    assert DownloadParams.model_validate({}).wanted() == {}


# --- sources


def test_the_published_counts_sum_to_the_published_totals():
    columns = zip(
        *((c.train_good, c.test_good, c.test_defect, c.defect_types) for c in MVTEC_AD_COUNTS.values()), strict=True
    )
    assert [sum(column) for column in columns] == [3629, 467, 1258, 73]
    assert len(MVTEC_AD_COUNTS) == 15


def test_counts_are_compared_and_every_difference_named(tmp_path, monkeypatch):
    monkeypatch.setitem(MVTEC_AD_COUNTS, "bottle", CategoryCounts(2, 1, 2, 2))
    names = ["train/good/000", "train/good/001", "test/good/000", "test/cut/000", "test/hole/000"]
    names += ["ground_truth/cut/000_mask", "ground_truth/hole/000_mask"]
    for name in names:
        path = tmp_path / "bottle" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    check_mvtec_ad(tmp_path, ["bottle"])

    (tmp_path / "bottle/train/good/001.png").unlink()
    (tmp_path / "bottle/ground_truth/hole/000_mask.png").unlink()
    with pytest.raises(DatasetError) as caught:
        check_mvtec_ad(tmp_path, ["bottle"])
    assert str(caught.value).splitlines() == [
        f"{tmp_path}: not the published MVTec AD; take the original archive",
        "  bottle: 1 training images, published are 2",
        "  bottle: 1 masks, published are 2",
    ]
