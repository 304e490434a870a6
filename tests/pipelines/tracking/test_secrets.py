"""No password of a tracking store is printed or written down, whatever the store does."""

import base64
import http.client
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import CATEGORY

import cli
from pipelines.tracking.pages import serve
from pipelines.tracking.runs import OpenRun
from pipelines.tracking.secrets import discreet_output, masked, shown, without_secrets

SECRET = "Tr0ub4dor"  # in each password, and what is looked for
CELL = ("fapm", CATEGORY)

SERVER = """
import sys
from mlflow.server import app
from mlflow.server.handlers import initialize_backend_stores
from werkzeug.serving import make_server
initialize_backend_stores(f"sqlite:///{sys.argv[1]}/server.db", None, f"{sys.argv[1]}/artifacts")
server = make_server("127.0.0.1", 0, app, threaded=True)
print(server.port, flush=True)
server.serve_forever()
"""


@pytest.fixture(scope="module")
def mlflow_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """MLflow's own server."""
    folder = tmp_path_factory.mktemp("server")
    environment = os.environ | {"MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE": "true"}
    with (
        (folder / "log").open("w", encoding="utf-8") as log,
        subprocess.Popen(
            [sys.executable, "-c", SERVER, folder], env=environment, stdout=subprocess.PIPE, stderr=log
        ) as process,
    ):
        assert process.stdout is not None
        yield int(process.stdout.readline())
        process.kill()


class Door(ThreadingHTTPServer):
    """Stands before a server: passes requests on as long as `left` of them are, and then answers by itself."""

    def __init__(self, port: int = 0, left: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.port, self.left = port, left
        self.status, self.body = 200, ""
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def address(self, login: str = "", query: str = "") -> str:
        return f"http://{login}127.0.0.1:{self.server_port}{query}"


class _Answer(BaseHTTPRequestHandler):
    server: Door

    def answer(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, body = self.server.status, self.server.body.encode()
        if self.server.left:
            self.server.left -= 1
            passed_on = http.client.HTTPConnection("127.0.0.1", self.server.port)
            passed_on.request(self.command, self.path, sent, {"Content-Type": "application/json"})
            answer = passed_on.getresponse()
            status, body = answer.status, answer.read()
        elif status == 0:
            return  # hangs up
        elif status == 401:  # as servers do that show the request
            body += f"{self.path} {self.headers.get('Authorization')}".encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PATCH = do_PUT = answer  # noqa: N815  # their names in http.server

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch) -> Iterator[Door]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    with Door() as made:
        yield made
        made.shutdown()


def texts(root: Path) -> Iterator[bytes]:
    for path in root.rglob("*"):
        yield os.fsencode(path)
        if path.is_file():
            yield path.read_bytes()


def assert_kept(outcome: Any, root: Path) -> None:
    for secret in (SECRET, base64.b64encode(SECRET.encode()).decode()[:-2]):
        assert secret not in outcome.out + outcome.err
        assert not any(secret.encode() in text for text in texts(root))


VERBS = [("prepare", CATEGORY), *((verb, *CELL) for verb in ("train", "evaluate", "export", "latency"))]


def test_a_server_that_works_and_then_does_not(
    root: Path, blemish: Any, door: Door, mlflow_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    door.port, door.left = mlflow_port, 10_000
    monkeypatch.setenv("MLFLOW_TRACKING_URI", door.address(f"user:a@{SECRET}@"))
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "user")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", f"{SECRET}2")
    for arguments in (*VERBS, ("report",), ("results",), ("compare",)):
        outcome = blemish(*arguments)
        assert outcome.code == 0, outcome.err
        assert_kept(outcome, root)
    assert "View run" not in outcome.out + outcome.err
    door.status = 0
    for left, *arguments in ((0, *VERBS[2]), (5, *VERBS[3]), (5, "report"), (1, "compare")):
        door.left = left
        outcome = blemish(*arguments)
        assert outcome.code == 1, arguments
        assert_kept(outcome, root)
        assert f"error: tracking store {door.address()}: " in outcome.err, arguments
        assert "Traceback" not in outcome.err


def test_an_outage_in_a_training_is_one_line(
    root: Path, blemish: Any, door: Door, mlflow_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    door.port, door.left = mlflow_port, 10_000
    monkeypatch.setenv("MLFLOW_TRACKING_URI", door.address(f"user:{SECRET}@"))
    assert blemish("prepare", CATEGORY).code == 0

    def outage(self: OpenRun, *_: Any) -> None:
        door.left, door.status = 0, 0
        self.client.get_run(self.run_id)

    monkeypatch.setattr(OpenRun, "params", outage)
    outcome = blemish("train", *CELL)
    assert_kept(outcome, root)
    assert outcome.err.splitlines()[-1].startswith(f"error: tracking store {door.address()}: ")
    assert "Traceback" not in outcome.err


ADDRESSES = [
    (f"user:{SECRET}@", ""),
    (f"user:a@{SECRET}@", ""),
    (f"user:a/{SECRET}@", ""),
    (f"user:{SECRET}/a@b?{SECRET}#@", ""),
    (f"user:%40{SECRET}%2F@", ""),
    (f"{SECRET}{SECRET}@", ""),
    (f"{SECRET}-{SECRET}:x-oauth-basic@", ""),
    ("", f"/?password={SECRET}"),
    ("", f"?user=me&password=a@{SECRET}"),
    ("", f"#token={SECRET}"),
]


@pytest.mark.parametrize(("login", "query"), ADDRESSES)
@pytest.mark.parametrize(("status", "body"), [(200, "<p>Welcome</p>"), (200, "{}"), (401, "who?"), (500, ""), (0, "")])
def test_a_server_that_is_none(
    root: Path,
    blemish: Any,
    door: Door,
    monkeypatch: pytest.MonkeyPatch,
    login: str,
    query: str,
    status: int,
    body: str,
) -> None:
    door.status, door.body = status, body
    monkeypatch.setenv("MLFLOW_TRACKING_URI", door.address(login, query))
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", f"token{SECRET}")
    for arguments in (("compare",), ("ui",)):
        outcome = blemish(*arguments)
        assert outcome.code == 1
        assert_kept(outcome, root)
        assert len(outcome.err.splitlines()) == 1, outcome.err


@pytest.mark.parametrize(("login", "query"), ADDRESSES)
@pytest.mark.parametrize(
    "address", ["http://{login}127.0.0.1:1{query}", "ftp://{login}host{query}", "{login}host{query}"]
)
def test_an_address_that_leads_nowhere(
    root: Path, blemish: Any, door: Door, monkeypatch: pytest.MonkeyPatch, address: str, login: str, query: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address.format(login=login, query=query))
    outcome = blemish("compare")
    assert outcome.code == 1
    assert_kept(outcome, root)


def test_the_traceback_of_a_bug(
    root: Path, blemish: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:it's{SECRET}@host")

    def bug(_: object) -> None:
        thread = threading.Thread(target=lambda: print(os.environ["MLFLOW_TRACKING_URI"], file=sys.stderr))
        thread.start()
        thread.join()
        raise RuntimeError(os.environ["MLFLOW_TRACKING_URI"]) from KeyError(f"it's{SECRET}")

    monkeypatch.setattr(cli, "_project", lambda: bug(None))
    outcome = blemish("check")
    assert outcome.code == 1
    assert_kept(outcome, root)
    assert "RuntimeError: http://host" in outcome.err
    assert "KeyError" in outcome.err


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("http://host:5000/path", "http://host:5000/path"),
        ("http://user:secret@host:5000/path?a=b#c", "http://host:5000/path"),
        ("http://user:a@secret@host", "http://host"),
        ("http://user:a/secret@host", "http://***"),
        ("http://host?password=a@secret", "http://***"),
        ("postgresql+psycopg2://user:secret@host/db?sslmode=require", "postgresql+psycopg2://host/db"),
        ("sqlite:////home/a@b/mlflow.db", "sqlite:////home/a@b/mlflow.db"),
        ("sqlite:///x?password=secret", "sqlite:///x"),
        ("http:///user:secret@host", "http://***"),
        ("user:secret@host", "***"),
        ("./mlruns", "./mlruns"),
    ],
)
def test_what_is_shown_of_an_address(address: str, expected: str) -> None:
    assert shown(address) == expected


def test_any_address_in_a_message_is_cleaned() -> None:
    text = "'s3://key:secret@bucket/x', then mysql://a:b@c/d?password=secret and me@example.org"
    assert without_secrets(text) == "'s3://bucket/x', then mysql://c/d and me@example.org"


def test_without_secrets_nothing_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    before = sys.stdout, sys.stderr
    with discreet_output():
        assert (sys.stdout, sys.stderr) == before
    assert masked("http://host:5000 ab") == "http://host:5000 ab"


def test_a_database_s_password_is_no_argument_of_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every user of a machine can read the arguments of all its processes."""
    called: list[Any] = []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"postgresql://user:{SECRET}@host/db")
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", "")
    monkeypatch.setenv("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "")
    monkeypatch.setattr(os, "execv", lambda *arguments: called.append(arguments))
    serve(tmp_path, 5123)
    assert SECRET not in repr(called)
    assert SECRET in os.environ["MLFLOW_BACKEND_STORE_URI"]
