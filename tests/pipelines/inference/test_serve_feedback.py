"""`blemish serve --feedback`: what people say of parts is kept with the picture, and nobody else says it for them."""

import base64
import contextlib
import errno
import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import at_the_line
import numpy as np
import pytest
import small_bundles
from at_the_line import running
from browser import Browser, browse, chromium
from drawn_dicoms import described, saved
from PIL import Image
from small_bundles import make, png
from starlette.testclient import TestClient

from pipelines.errors import ArgumentError
from pipelines.feedback import read
from pipelines.inference.engine import Engine
from pipelines.inference.serve import Limits, application

LIMITS = Limits()


@pytest.fixture(scope="module")
def gear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("bundles") / "gear.zip")


@contextlib.contextmanager
def serving(
    *bundles: Path, feedback: Path | None, limits: Limits = LIMITS, token: str | None = None
) -> Iterator[TestClient]:
    with TestClient(application(bundles, limits, token, threads=1, feedback=feedback)) as client:
        yield client


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "kept"


@pytest.fixture
def client(gear: Path, folder: Path) -> Iterator[TestClient]:
    with serving(gear, feedback=folder) as found:
        yield found


def say(client: TestClient, verdict: str, content: bytes | None = None, **more: Any) -> Any:
    params = {"verdict": verdict, **more.pop("params", {})}
    return client.post("/feedback", content=png(200) if content is None else content, params=params, **more)


def pictures(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "pictures").glob("*"))


# ----------------------------------------------------------------------------------------------------------------- kept


def test_a_picture_is_kept_once_and_each_verdict_on_it(client: TestClient, folder: Path) -> None:
    for verdict, who in ((" scratch ", "Jo"), ("good", "")):
        answer = say(client, verdict, params={"who": who, "name": "part 7.png", "bundle": "gear"})
        assert answer.status_code == 200, answer.text
        (name,) = pictures(folder)
        assert answer.json() == {"picture": f"pictures/{name}", "verdict": verdict.strip(), "category": "part"}
    found = read(folder / "feedback.csv")
    assert [(v.picture, v.verdict, v.who, v.category) for v in found] == [
        (folder / "pictures" / name, "scratch", "Jo", "part"),
        (folder / "pictures" / name, "good", "", "part"),
    ]
    assert found[0].picture.read_bytes() == png(200)


def test_several_bundles_tell_whose_part_it_is(
    gear: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_bundles, "CARD", replace(small_bundles.CARD, category="nuts"))
    with serving(gear, make(tmp_path / "nut.zip"), feedback=folder) as client:
        for bundle, category in (("gear", "part"), ("nut", "nuts")):
            assert say(client, "good", params={"bundle": bundle}).json()["category"] == category
        assert say(client, "good").json() == {"error": "no bundle is named; there are: gear, nut"}
    assert [v.category for v in read(folder / "feedback.csv")] == ["part", "nuts"]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "WEBP"])
def test_a_picture_without_a_suffix_gets_that_of_what_it_is(client: TestClient, folder: Path, kind: str) -> None:
    file = io.BytesIO()
    Image.open(io.BytesIO(png(200))).save(file, format=kind)
    expected = {"JPEG": ".jpg", "TIFF": ".tif"}.get(kind, f".{kind.lower()}")
    for name in ("", "part.7", "../part"):
        assert say(client, "good", file.getvalue(), params={"name": name}).json()["picture"].endswith(expected)
    assert say(client, "good", file.getvalue(), params={"name": "PART.TIFF"}).json()["picture"].endswith(".tiff")
    assert len(pictures(folder)) == 2


def test_dicom_is_kept_as_it_is(client: TestClient, folder: Path) -> None:
    content = saved(described(np.full((20, 20), 4095, np.uint16), bits=12))
    kind = {"headers": {"Content-Type": "application/dicom"}}
    for more in (kind, {"params": {"name": "scan.dcm"}}, kind | {"params": {"name": "IM0001"}}):
        assert say(client, "nodule", content, **more).status_code == 200
    (name,) = pictures(folder)
    assert name.endswith(".dcm")
    assert (folder / "pictures" / name).read_bytes() == content
    assert say(client, "nodule", content).status_code == 422


def test_many_at_once_lose_nothing(client: TestClient, folder: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = [*pool.map(lambda n: say(client, f"type {n}", png(n % 5 + 100)).status_code, range(40))]
    assert found == [200] * 40
    assert sorted(v.verdict for v in read(folder / "feedback.csv")) == sorted(f"type {n}" for n in range(40))
    assert len(pictures(folder)) == 5


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("verdict", ["", " ", "a/b", "a\\b", ".hidden", "two\nlines", "x" * 61, "=cmd()"])
def test_a_verdict_that_is_no_name_is_refused(client: TestClient, folder: Path, verdict: str) -> None:
    refused = say(client, verdict)
    assert refused.status_code == 422
    assert refused.json()["error"].startswith(f"verdict = {verdict.strip()[:60]!r}: say good, or the type of the")
    assert say(client, "good", params={"who": "two\nlines"}).json()["error"].startswith(r"who = 'two\nlines': give a")
    assert [*folder.iterdir()] == []


def test_what_is_no_picture_is_not_kept(gear: Path, folder: Path) -> None:
    with serving(gear, feedback=folder, limits=Limits(megabytes=1)) as client:
        for content, status, line in (
            (b"", 400, "no picture: the body is empty"),
            (b"\0" * 1_000_001, 413, "more than 1 MB; send a smaller file"),
            (b"no picture", 422, "picture: not a PNG, JPEG, BMP, TIFF or WEBP image"),
            (png(200)[:60], 422, "picture: damaged image"),
        ):
            refused = say(client, "good", content)
            assert refused.status_code == status
            assert refused.json()["error"].startswith(line)
        form = client.post("/feedback", params={"verdict": "good"}, files={"file": png(200)})
        assert (form.status_code, form.json()["error"][:7]) == (415, "a form;")
        assert say(client, "good", params={"bundle": "nut"}).status_code == 404
    assert [*folder.iterdir()] == []


def test_without_a_folder_nothing_is_kept(gear: Path, folder: Path) -> None:
    with serving(gear, feedback=None) as client:
        refused = say(client, "good")
        assert refused.status_code == 404
        assert refused.json() == {"error": "verdicts are not kept here; start the server with --feedback FOLDER"}
        assert client.get("/ready").json()["feedback"] is False
    with serving(gear, feedback=folder) as client:
        assert client.get("/ready").json().keys() == {"bundles", "feedback"}
        assert client.get("/ready").json()["feedback"] is True


@pytest.mark.parametrize(
    "origin", ["http://elsewhere.example", "http://testserver:8000", "https://testserver.example", "null", "", "x://["]
)
def test_a_page_of_elsewhere_cannot_say_anything(client: TestClient, folder: Path, origin: str) -> None:
    refused = say(client, "good", headers={"Origin": origin})
    assert refused.status_code == 403
    assert refused.json()["error"].startswith(f"a page of {origin!r} may not speak for people here")
    assert [*folder.iterdir()] == []
    for own in ({"Origin": "http://testserver"}, {"Origin": "http://127.0.0.1:8000", "Host": "127.0.0.1:8000"}, {}):
        assert say(client, "good", headers=own).status_code == 200


def test_who_does_not_know_the_token_says_nothing(gear: Path, folder: Path) -> None:
    with serving(gear, feedback=folder, token="a secret") as client:
        assert say(client, "good").status_code == 401
        assert [*folder.iterdir()] == []
        assert say(client, "good", headers={"Authorization": "Bearer a secret"}).status_code == 200


@pytest.mark.parametrize("write", [1, 2])
def test_a_full_disk_is_told_and_no_row_is_without_its_picture(
    client: TestClient, folder: Path, write: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, left = os.fsync, [write]

    def full(handle: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    monkeypatch.setattr(os, "fsync", full)
    refused = say(client, "scratch")
    assert refused.status_code == 507
    assert "No space left on device; nothing was kept of it: free some space" in refused.json()["error"]
    assert len(pictures(folder)) == write - 1
    assert not (folder / "feedback.csv").exists()
    assert say(client, "scratch").status_code == 200
    assert [v.picture.name for v in read(folder / "feedback.csv")] == pictures(folder)


def test_what_fails_within_is_told_in_a_line(client: TestClient, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "feedback.csv").write_text("path,who\n", encoding="utf-8")
    refused = say(client, "good")
    assert (refused.status_code, "no column 'verdict'" in refused.json()["error"]) == (500, True)

    def fails(*_: Any) -> Any:
        raise MemoryError("unable to allocate 3 GiB")

    monkeypatch.setattr(Engine, "decode", fails)
    assert (say(client, "good").status_code, say(client, "good").headers["Retry-After"]) == (503, "1")


def test_a_folder_that_cannot_be_one_is_told_at_the_start(
    gear: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ArgumentError, match=r"--feedback .*file: File exists; give a folder that can be written to"):
        application([gear], LIMITS, feedback=tmp_path / "file")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(ArgumentError, match=r"--feedback .*kept: cannot be written to; change its permissions"):
        application([gear], LIMITS, feedback=tmp_path / "kept")


# ------------------------------------------------------------------------------------------------------------- the page


def drop(browser: Browser, address: str, width: int) -> None:
    """Open the page and drop a picture on it, as on a screen that is so wide."""
    browser.show(width, 844, phone=width < 500)
    browser.call("Page.navigate", url=address)
    browser.wait("document.readyState === 'complete' && document.getElementById('bundle').length")
    content = base64.b64encode(png(200)).decode()
    bytes_ = f"Uint8Array.from(atob('{content}'), letter => letter.charCodeAt(0))"
    browser.run(f"take([new File([{bytes_}], 'part 7.png')])")
    browser.wait("!document.getElementById('overlay').hidden")


def test_the_page_asks_and_is_told(gear: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = chromium()
    if program is None:
        pytest.skip("no Chromium is installed")
    with contextlib.ExitStack() as stack:
        plain = stack.enter_context(running(gear))
        monkeypatch.setattr(at_the_line, "application", partial(application, feedback=folder))
        address, browser = stack.enter_context(running(gear)), stack.enter_context(browse(program))
        drop(browser, plain, 1280)
        assert browser.run("document.getElementById('question').checkVisibility()") is False
        drop(browser, address, 390)
        assert browser.run("document.documentElement.scrollWidth - innerWidth") <= 0
        heights = "[...document.querySelectorAll('#question :is(button, input)')].map(one => one.offsetHeight)"
        assert min(browser.run(heights)) >= 44
        said = "document.getElementById('kept').textContent"
        browser.run("document.getElementById('fine').focus()")
        browser.press("Enter", 13, "\r")
        browser.wait(f"{said} === 'Kept: good.'")
        browser.run("document.getElementById('faulty').click()")
        browser.wait(f"{said} === 'Kept: defect.'")
        browser.run("document.getElementById('kind').focus()")
        browser.press("x", 88, "x")
        browser.press("Tab", 9)
        browser.press("J", 74, "J")
        browser.run("document.getElementById('kind').focus()")
        browser.press("Enter", 13, "\r")
        browser.wait(f"{said} === 'Kept: x.'")
        assert browser.problems == []
        drop(browser, address, 390)  # who said it is remembered, of what not
        assert browser.run("document.getElementById('who').value + document.getElementById('kind').value") == "J"
        browser.run("document.getElementById('kind').value = 'a/b'; document.getElementById('faulty').click()")
        browser.wait(f"{said}.startsWith(\"verdict = 'a/b': say good\")")
        drop(browser, plain, 1280)
        where = f"{address}/feedback?verdict=good"
        browser.run(f"fetch('{where}', {{method: 'POST', mode: 'no-cors', body: last}}).then(() => true)")
    assert [(v.verdict, v.who) for v in read(folder / "feedback.csv")] == [("good", ""), ("defect", ""), ("x", "J")]
