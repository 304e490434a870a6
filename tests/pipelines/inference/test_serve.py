"""`blemish serve` on loopback: the same answers, a line for what is no picture, nothing lost at a stop or renewal."""

import contextlib
import io
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from at_the_line import LONG, post, running
from drawn_dicoms import described, saved
from PIL import Image
from small_bundles import make, png

from pipelines.errors import ArgumentError, ExportError
from pipelines.inference import serve as server
from pipelines.inference.bundle import Bundle
from pipelines.inference.engine import Engine
from pipelines.inference.serve import Limits, application


@pytest.fixture(scope="module")
def gear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("bundles") / "gear.zip")


@pytest.fixture(scope="module")
def address(gear: Path) -> Iterator[str]:
    with running(gear) as found:
        yield found


# ------------------------------------------------------------------------------------------------------------- answers


def test_an_answer_is_that_of_the_file(address: str, gear: Path) -> None:
    engine = Bundle(gear).engine()
    for brightness in (0, 100, 127, 128, 255):
        content = png(brightness, seed=brightness)
        found = post(address, content).json()
        score = float(engine(engine.fitted(engine.decode(content, Path("a.png")), "a.png"))[1][0])
        assert found["score"] == score
        assert found["decision"] == engine.card.decision(score)
        assert (found["bundle"], found["model"], found["category"]) == ("gear", "brightness", "part")
        assert (found["threshold"], found["run_id"]) == (0.5, "0123")
        parts = found["milliseconds"]
        assert list(parts) == ["decode", "resize", "wait", "network", "total"]
        assert sum(value for part, value in parts.items() if part != "total") <= parts["total"] + 0.01


def test_an_overlay_and_a_map_are_as_large_as_the_picture(address: str) -> None:
    content = png(255, side=40)
    overlay = post(address, content, params={"answer": "overlay"})
    picture = Image.open(io.BytesIO(overlay.content))
    assert overlay.headers["content-type"] == "image/png"
    assert (picture.width >= 40, picture.height > 40) == (True, True)  # the words below
    found = post(address, content, params={"answer": "map"})
    assert np.load(io.BytesIO(found.content)).shape == (40, 40)
    for response in (overlay, found):
        assert response.headers["Blemish-Decision"] == "defect"
        assert float(response.headers["Blemish-Score"]) > float(response.headers["Blemish-Threshold"])
        assert response.headers["Blemish-Run"] == "0123"


def test_dicom_is_told_by_its_kind_or_its_name(address: str) -> None:
    content = saved(described(np.full((20, 20), 4095, np.uint16), bits=12))
    kind = {"headers": {"Content-Type": "application/dicom"}}
    for more in (kind, {"params": {"name": "scan.dcm"}}, kind | {"params": {"name": "IM0001"}}):
        answer = post(address, content, **more)
        assert answer.status_code == 200, answer.text
        assert answer.json()["score"] == 1
    assert post(address, content).status_code == 422


def test_many_at_once_are_scored_as_one_alone(address: str) -> None:
    contents = [png(number % 256, seed=number) for number in range(200)]
    alone = [post(address, content).json()["score"] for content in contents[:20]]
    with ThreadPoolExecutor(32) as pool:
        together = [response.json() for response in pool.map(lambda content: post(address, content), contents)]
    assert [found["score"] for found in together[:20]] == alone
    assert [found["decision"] for found in together] == ["defect" if n % 256 > 127 else "good" for n in range(200)]


def test_several_bundles_are_asked_by_name(gear: Path, tmp_path: Path) -> None:
    strict = make(tmp_path / "strict.zip", threshold=0.1)
    with running(gear, strict) as address:
        found = {name: post(address, png(100), params={"bundle": name}).json() for name in ("gear", "strict")}
        assert [found[name]["decision"] for name in ("gear", "strict")] == ["good", "defect"]
        for params, said in (({}, "no bundle is named"), ({"bundle": "nut"}, "bundle 'nut' is not served here")):
            refused = post(address, png(100), params=params)
            assert (refused.status_code, refused.json()) == (404, {"error": f"{said}; there are: gear, strict"})
    with pytest.raises(ArgumentError, match=r"bundle 'gear': two files have this name.*rename one"):
        application([gear, make(tmp_path / "gear.zip")], Limits())


# ------------------------------------------------------------------------------------------------------------ refusals


def malformed(rng: random.Random) -> Iterator[bytes]:
    """What is no picture, in every way that people and programs send."""
    whole = png(200)
    jpeg, gif, tiff, webp, animated = (io.BytesIO() for _ in range(5))
    image = Image.open(io.BytesIO(whole))
    image.save(jpeg, format="JPEG")
    image.save(gif, format="GIF")
    image.save(tiff, format="TIFF", compression="tiff_lzw")
    image.save(webp, format="WEBP")
    image.save(animated, format="PNG", save_all=True, append_images=[image.rotate(90)], duration=100)
    yield from (gif.getvalue(), animated.getvalue(), b"\0", b"\xff" * 1000, b"<svg/>", b"%PDF-1.7", b"GIF89a")
    for content in (whole, jpeg.getvalue(), tiff.getvalue(), webp.getvalue()):
        yield content[: len(content) // 2]
        for _ in range(10):
            yield content[: rng.randrange(1, max(len(content) - 20, 2))]
            yield rng.randbytes(rng.randrange(1, 500))
    # A header that promises more pixels than anyone has memory for.
    yield whole[:16] + (200_000).to_bytes(4, "big") * 2 + whole[24:]


def test_whatever_is_no_picture_gets_one_line(address: str, thorough: bool) -> None:
    rng = random.Random(0)
    sent = 0
    for _ in range(25 if thorough else 1):
        for content in malformed(rng):
            refused = post(address, content)
            assert 400 <= refused.status_code < 500, refused.text
            line = refused.json()["error"]
            assert line
            assert "\n" not in line
            assert "Traceback" not in line
            sent += 1
    assert sent >= (2000 if thorough else 80)
    assert post(address, png(255)).json()["decision"] == "defect"


def test_nothing_too_much_and_a_form(gear: Path) -> None:
    with running(gear, limits=Limits(megabytes=1)) as address:
        for body in (b"\0" * 1_000_001, iter([b"\0" * 400_000] * 3)):  # with its length declared, and without
            refused = post(address, body)
            assert refused.status_code == 413
            assert refused.json()["error"].startswith("more than 1 MB; send a smaller file")
        empty = post(address, b"")
        assert (empty.status_code, empty.json()["error"][:30]) == (400, "no picture: the body is empty ")
        form = requests.post(f"{address}/predict", files={"file": png(200)}, timeout=LONG)
        assert form.status_code == 415
        assert "send the picture's bytes as the body" in form.json()["error"]
        assert post(address, png(200), params={"answer": "pixels"}).status_code == 422
        assert requests.get(f"{address}/predict", timeout=LONG).status_code == 405


def test_clients_that_hang_up_or_speak_something_else(gear: Path, capfd: pytest.CaptureFixture[str]) -> None:
    begins = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
    others = (b"\0\r\n\r\n", b"POST /predict HTTP/1.1\r\nContent-Length: -5\r\n\r\n", b"GET / HTTP/9\r\n\r\n")
    with running(gear) as address:
        port = int(address.rpartition(":")[2])
        for sent in (*(begins + png(200)[:size] for size in (0, 1, 50)), *others):
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(sent)
                time.sleep(0.05)
        until = time.monotonic() + LONG
        gone = 'blemish_refusals_total{bundle="gear",status="400"} 3.0'
        while gone not in requests.get(f"{address}/metrics", timeout=LONG).text:
            assert time.monotonic() < until
            time.sleep(0.02)
        assert post(address, png(200)).status_code == 200
    assert "Traceback" not in capfd.readouterr().err


def test_more_than_may_wait_are_sent_away_and_nobody_else(gear: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, call = threading.Event(), Engine.__call__
    with running(gear, limits=Limits(waiting=3)) as address:

        def slow(self: Engine, inputs: Any) -> Any:
            go_on.wait(LONG)
            return call(self, inputs)

        monkeypatch.setattr(Engine, "__call__", slow)
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(post, address, png(200)) for _ in range(8)]
            while sum(one.done() for one in asked) < 5:
                time.sleep(0.01)
            go_on.set()
            found = [one.result() for one in asked]
    assert sorted(response.status_code for response in found) == [200] * 3 + [503] * 5
    away = next(response for response in found if response.status_code == 503)
    assert away.json() == {"error": "3 pictures wait already; try again"}
    assert away.headers["Retry-After"] == "1"


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (MemoryError("unable to allocate 3 GiB"), 503, "the memory ran out; try again, or send a smaller picture"),
        (ExportError("the model's score is nan; inspect this part by hand"), 500, "the model's score is nan; inspect"),
    ],
)
def test_what_fails_within_is_told_and_the_next_is_answered(address, monkeypatch, error, status, line) -> None:
    def fails(*_: Any) -> Any:
        raise error

    for method in ("decode", "__call__"):
        with monkeypatch.context() as context:
            context.setattr(Engine, method, fails)
            refused = post(address, png(200))
            assert refused.status_code == status
            assert refused.json()["error"].startswith(line)
        assert post(address, png(200)).status_code == 200


# ------------------------------------------------------------------------------------------- token, states, pages


def test_another_address_needs_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(server.TOKEN, raising=False)
    assert server.token_for("127.0.0.1") is None
    with pytest.raises(ArgumentError, match=r"--host 0\.0\.0\.0: others can reach it; set a secret.*BLEMISH_TOKEN"):
        server.token_for("0.0.0.0")
    monkeypatch.setenv(server.TOKEN, "")
    with pytest.raises(ArgumentError):
        server.token_for("::")
    monkeypatch.setenv(server.TOKEN, "a secret")
    assert server.token_for("::") == server.token_for("localhost") == "a secret"


def test_who_does_not_know_the_token_is_told_nothing(gear: Path) -> None:
    with running(gear, token="a secret") as address:
        for headers in ({}, {"Authorization": "Bearer "}, {"Authorization": "Bearer a secreT"}):
            refused = post(address, png(200), headers=headers)
            assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (401, "Bearer")
            assert refused.json()["error"].startswith("a token is needed")
            assert requests.get(f"{address}/metrics", headers=headers, timeout=LONG).status_code == 401
        for page in ("docs", "openapi.json", "static-offline-docs/swagger-ui.css"):
            assert requests.get(f"{address}/{page}", timeout=LONG).status_code == 200
        assert post(address, png(200), headers={"Authorization": "Bearer a secret"}).status_code == 200
        assert requests.get(f"{address}/health", timeout=LONG).json() == {"status": "ok"}
        assert requests.get(address, timeout=LONG).status_code == 200


def test_states_figures_and_pages(gear: Path) -> None:
    with running(gear) as address:
        post(address, png(200))
        post(address, png(20))
        post(address, b"no picture")
        state = requests.get(f"{address}/ready", timeout=LONG).json()["bundles"]["gear"]
        told = {"model": "brightness", "category": "part", "run_id": "0123", "threshold": 0.5, "refused": None}
        assert state == told | {"drift": []}
        figures = requests.get(f"{address}/metrics", timeout=LONG).text
        for line in (
            'blemish_answers_total{bundle="gear",decision="defect",disposition="reject"} 1.0',
            'blemish_answers_total{bundle="gear",decision="good",disposition="accept"} 1.0',
            'blemish_refusals_total{bundle="gear",status="422"} 1.0',
            'blemish_waiting{bundle="gear"} 0.0',
            'blemish_refused{bundle="gear"} 0.0',
            'blemish_seconds_count{bundle="gear",part="network"} 2.0',
        ):
            assert line in figures.splitlines()
        assert "/predict" in requests.get(f"{address}/openapi.json", timeout=LONG).json()["paths"]
        for page in ("", "docs"):
            text = requests.get(f"{address}/{page}", timeout=LONG).text
            assert "https://" not in text  # all that they load is here
        docs = requests.get(f"{address}/docs", timeout=LONG).text
        for file in ("swagger-ui-bundle.js", "swagger-ui.css"):
            (place,) = re.findall(rf'"(/[^"]+/{file})"', docs)
            assert requests.get(f"{address}{place}", timeout=LONG).status_code == 200


# -------------------------------------------------------------------------------------------------- renewal and stop


def test_a_new_bundle_is_taken_over_without_losing_a_request(tmp_path: Path) -> None:
    path = make(tmp_path / "gear.zip", run_id="old")
    with running(path) as address, ThreadPoolExecutor(4) as pool:
        stop = threading.Event()
        runs: list[str] = []

        def ask() -> None:
            while not stop.is_set():
                response = post(address, png(200))
                assert response.status_code == 200, response.text
                runs.append(response.json()["run_id"])

        asking = [pool.submit(ask) for _ in range(4)]
        while len(runs) < 20:
            time.sleep(0.01)
        make(path, run_id="new", threshold=0.9)
        until = time.monotonic() + LONG
        while "new" not in runs[-1:] and time.monotonic() < until:
            time.sleep(0.05)
        stop.set()
        for one in asking:
            one.result()
        assert {*runs} == {"old", "new"}
        assert post(address, png(200)).json()["decision"] == "good"


@pytest.mark.parametrize("fault", ["half", "one byte", "other scores", "gone"])
def test_what_is_no_whole_bundle_is_not_taken_over(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_LOOK", 0.05)
    path = make(tmp_path / "gear.zip", run_id="old")
    whole = make(tmp_path / "other.zip", run_id="new").read_bytes()
    with running(path) as address:
        if fault == "half":
            path.write_bytes(whole[: len(whole) // 2])
        elif fault == "one byte":
            path.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
        elif fault == "other scores":
            make(path, run_id="new", expected=0.2)
        else:
            path.unlink()
        until = time.monotonic() + LONG
        while not (said := requests.get(f"{address}/ready", timeout=LONG).json()["bundles"]["gear"]["refused"]):
            assert time.monotonic() < until
            time.sleep(0.02)
        assert str(path) in said
        assert 'blemish_refused{bundle="gear"} 1.0' in requests.get(f"{address}/metrics", timeout=LONG).text
        assert post(address, png(200)).json()["run_id"] == "old"
        path.write_bytes(whole)  # mended
        while post(address, png(200)).json()["run_id"] != "new":
            assert time.monotonic() < until
            time.sleep(0.02)
        assert requests.get(f"{address}/ready", timeout=LONG).json()["bundles"]["gear"]["refused"] is None


def test_at_a_stop_what_was_accepted_is_answered(tmp_path: Path) -> None:
    path = make(tmp_path / "gear.zip")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "import cli; cli.main()", "serve", str(path), "--port", str(port)]
    environment = os.environ | {"PYTHONPATH": str(Path(server.__file__).parents[2])}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(2400):
            with contextlib.suppress(requests.ConnectionError):
                requests.get(f"{address}/health", timeout=LONG)
                break
            time.sleep(0.05)
        large = io.BytesIO()
        Image.fromarray(np.zeros((4000, 4000, 3), np.uint8)).save(large, format="PNG")
        with ThreadPoolExecutor(6) as pool:
            asked = [pool.submit(post, address, large.getvalue()) for _ in range(6)]
            waiting = 'blemish_waiting{bundle="gear"} '
            while f"{waiting}0.0" in requests.get(f"{address}/metrics", timeout=LONG).text:
                if all(one.done() for one in asked):
                    break  # too fast to be caught waiting
            process.send_signal(signal.SIGTERM)
            found = [one for one in asked if one.exception(LONG) is None]
        assert found
        assert {one.result().status_code for one in found} == {200}
        out, err = process.communicate(timeout=LONG)
    finally:
        process.kill()
    assert f"1 bundle at {address}: drop a picture on the page there, or" in out
    assert err == ""
    assert process.returncode in (0, -signal.SIGTERM)


def test_a_bundle_that_does_not_prove_itself_here_is_not_served(tmp_path: Path, blemish: Any) -> None:
    other = make(tmp_path / "gear.zip", expected=0.2)
    refused = blemish("serve", str(other))
    assert refused.code == 1
    assert "1 of its samples are not answered on this machine as they were where it was made" in refused.err
    nothing = blemish("serve", str(tmp_path / "none.zip"))
    assert (nothing.code, nothing.err) == (
        1,
        f"error: {tmp_path / 'none.zip'}: no such file; give the bundle that `blemish bundle` wrote\n",
    )
