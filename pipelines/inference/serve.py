"""Bundles behind HTTP: a picture's bytes in, a decision out."""

import asyncio
import contextlib
import hmac
import io
import math
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import uvicorn
from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from fastapi_offline import FastAPIOffline
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.requests import ClientDisconnect

from pipelines.errors import ArgumentError, DatasetError, ExportError, ImageError
from pipelines.feedback import FILE, append, keep, usable_name, usable_verdict
from pipelines.files import DiskFull
from pipelines.inference.desk import Answer, Desk, Full
from pipelines.inference.engine import Engine
from pipelines.inference.predict import overlaid
from pipelines.memory import out_of_memory
from pipelines.pictures.images import SUFFIXES

TOKEN = "BLEMISH_TOKEN"  # noqa: S105  # where it is: a secret has no place among a command's arguments
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_PAGE = Path(__file__).parent / "drop.html"
_LOOK = 1.0  # seconds between two looks at the bundles' files
_PATIENCE = 60  # seconds that a stop waits for the pictures that were accepted
_MILLISECONDS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)  # edges of a histogram
# Without a token: neither a picture nor a score is to be had there.
_OPEN = frozenset({"/", "/health", "/ready", "/docs", "/openapi.json"})
_CODE_OF_DOCS = "/static-offline-docs/"
_DICOM = "application/dicom"
_BYTES = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_PICTURE = {"requestBody": {"required": True, "content": _BYTES}}
# Of what can be read without a suffix, by how it begins.
_ENDINGS = {b"\x89PNG": ".png", b"\xff\xd8": ".jpg", b"BM": ".bmp", b"II": ".tif", b"MM": ".tif", b"RIFF": ".webp"}

Wanted = Literal["decision", "overlay", "map"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What is refused, so that one client cannot take the whole machine."""

    megabytes: int = 100  # of a picture's file
    waiting: int = 64  # pictures of a bundle that are accepted and not yet answered


class Refused(Exception):
    """What a client hears: a status and a line."""

    def __init__(self, status: int, line: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(line)
        self.status, self.line, self.headers = status, line, headers

    @property
    def response(self) -> JSONResponse:
        return JSONResponse({"error": self.line}, self.status, self.headers)


def token_for(host: str) -> str | None:
    """What clients have to know: nothing on this machine alone, else what the environment holds.

    Raises:
        ArgumentError: others can reach the address, and there is no token.
    """
    token = os.environ.get(TOKEN) or None
    if host not in _LOOPBACK and token is None:
        raise ArgumentError(
            f"--host {host}: others can reach it; set a secret that they must know, in the environment: {TOKEN}=..."
        )
    return token


def serve(app: FastAPI, host: str, port: int) -> None:
    """Answer until SIGTERM or Ctrl-C, and what was accepted by then."""
    uvicorn.Server(configuration(app, host, port)).run()


def configuration(app: FastAPI, host: str, port: int) -> uvicorn.Config:
    return uvicorn.Config(
        app, host=host, port=port, log_level="warning", access_log=False, timeout_graceful_shutdown=_PATIENCE
    )


def application(
    paths: Sequence[Path],
    limits: Limits,
    token: str | None = None,
    threads: int | None = None,
    feedback: Path | None = None,
) -> FastAPI:
    """The server of these bundles, each by the name of its file; what people say of parts goes to `feedback`, a folder.

    Raises:
        ArgumentError: two bundles have one name, or the folder cannot be written to.
        ExportError: a bundle is none, has changed or does not prove itself here.
    """
    names = [path.stem for path in paths]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ArgumentError(f"bundle '{twice[0]}': two files have this name, by which they are asked for; rename one")
    if feedback is not None:
        _require_writable(feedback)
    desks = {path.stem: Desk(path, limits.waiting, threads) for path in paths}
    metrics = _Metrics(desks)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        looking = asyncio.create_task(_renew(desks))
        yield
        looking.cancel()
        for desk in desks.values():
            await asyncio.to_thread(desk.close)

    app = FastAPIOffline(  # FastAPI's own page of the API loads its code from elsewhere
        title="Blemish",
        description="A picture's bytes in, a decision out. `GET /` is a page to drop a picture on.",
        redoc_url=None,
        lifespan=lifespan,
    )
    _guard(app, token)
    _add_page(app)
    _add_states(app, desks, metrics, feedback)
    _add_prediction(app, desks, metrics, limits)
    _add_feedback(app, desks, limits, feedback)
    return app


def _require_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(f"--feedback {folder}: {error.strerror}; give a folder that can be written to") from None
    if not os.access(folder, os.W_OK):
        raise ArgumentError(f"--feedback {folder}: cannot be written to; change its permissions, or give another")


def _guard(app: FastAPI, token: str | None) -> None:
    @app.exception_handler(Refused)
    async def tell(_: Request, refused: Refused) -> Response:
        return refused.response

    @app.middleware("http")
    async def guarded(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        path = request.url.path
        is_open = path in _OPEN or path.startswith(_CODE_OF_DOCS)
        if token is not None and not is_open and not _knows(request, token):
            line = "a token is needed: send `Authorization: Bearer ...` with the one that the server was started with"
            return Refused(401, line, {"WWW-Authenticate": "Bearer"}).response
        return await call_next(request)


def _add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(_PAGE, media_type="text/html; charset=utf-8")


def _add_states(app: FastAPI, desks: Mapping[str, Desk], metrics: "_Metrics", feedback: Path | None) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the server is there."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, Any]:
        """What is served, and whether verdicts are kept; `refused`: why the file that lies there was not taken over."""
        bundles = {name: desk.state() for name, desk in desks.items()}
        return {"bundles": bundles, "feedback": feedback is not None}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def figures() -> Response:
        """For Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_prediction(app: FastAPI, desks: Mapping[str, Desk], metrics: "_Metrics", limits: Limits) -> None:
    @app.post("/predict", openapi_extra=_PICTURE)
    async def predict(
        request: Request,
        bundle: Annotated[str | None, Query(description="By the name of its file; not needed of one alone.")] = None,
        answer: Annotated[
            Wanted, Query(description="`decision`: JSON. `overlay`: PNG. `map`: NPY, float32, as large as the picture.")
        ] = "decision",
        name: Annotated[str, Query(description="Of the picture, for messages; `.dcm` says that it is DICOM.")] = "",
    ) -> Response:
        """Score the picture whose bytes are the body (`curl --data-binary @part.png`)."""
        desk = _desk(desks, bundle)
        try:
            found = await _answered(desk, request, limits, name, answer)
        except Refused as refused:
            metrics.refused(desk, refused.status)
            raise
        metrics.answered(desk, found)
        return await asyncio.to_thread(_response, desk.name, found, answer)


def _add_feedback(app: FastAPI, desks: Mapping[str, Desk], limits: Limits, folder: Path | None) -> None:
    one_by_one = asyncio.Lock()  # people take their time, and a large picture takes hundreds of megabytes

    @app.post("/feedback", openapi_extra=_PICTURE)
    async def judge(
        request: Request,
        bundle: Annotated[str | None, Query(description="By the name of its file; not needed of one alone.")] = None,
        verdict: Annotated[str, Query(description="`good`, or the type of the defect.")] = "",
        who: Annotated[str, Query(description="Says so.")] = "",
        name: Annotated[str, Query(description="Of the picture, for messages; `.dcm` says that it is DICOM.")] = "",
    ) -> dict[str, str]:
        """Keep the picture whose bytes are the body, and what a person says of it; the latest counts."""
        _require_own_page(request)
        if folder is None:
            raise Refused(404, "verdicts are not kept here; start the server with --feedback FOLDER")
        desk = _desk(desks, bundle)
        with _refusing():
            verdict, who = usable_verdict(verdict), usable_name(who)
            content = await _content(request, limits)
            async with one_by_one:
                engine = desk.proven.engine
                kept = await asyncio.to_thread(_keep, folder, engine, content, _shown(request, name), verdict, who)
        return {"picture": kept, "verdict": verdict, "category": engine.card.category}


def _require_own_page(request: Request) -> None:
    """Refuse other sites' pages in the browser of someone who may: a browser says whose page it is that posts."""
    origin, host = request.headers.get("origin"), request.headers.get("host", "")
    if origin is not None and origin.partition("://")[2].lower() != host.lower():
        line = f"a page of {origin!r} may not speak for people here; open that of this server (by its Host, {host!r})"
        raise Refused(403, line)


def _keep(folder: Path, engine: Engine, content: bytes, name: str, verdict: str, who: str) -> str:
    """Where in the folder the picture lies, once it is whole and the table has its row."""
    engine.decode(content, Path(name))
    suffix = Path(name).suffix.lower()
    if suffix not in SUFFIXES:
        suffix = next(ending for beginning, ending in _ENDINGS.items() if content.startswith(beginning))
    picture = keep(folder, content, suffix)
    append(folder / FILE, [picture], verdict, who, engine.card.category)
    return picture.relative_to(folder).as_posix()


async def _renew(desks: Mapping[str, Desk]) -> None:
    while True:
        await asyncio.sleep(_LOOK)
        for desk in desks.values():
            await asyncio.to_thread(desk.proven.renew)


def _knows(request: Request, token: str) -> bool:
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    return hmac.compare_digest(given.encode(), token.encode())


def _desk(desks: Mapping[str, Desk], name: str | None) -> Desk:
    if name is None and len(desks) == 1:
        return next(iter(desks.values()))
    if name is not None and name in desks:
        return desks[name]
    said = "no bundle is named" if name is None else f"bundle '{name}' is not served here"
    raise Refused(404, f"{said}; there are: {', '.join(desks)}")


async def _answered(desk: Desk, request: Request, limits: Limits, name: str, wanted: Wanted) -> Answer:
    """Raises Refused for whatever cannot be answered."""
    content = await _content(request, limits)
    try:
        with _refusing():
            return await desk.answer(content, _shown(request, name), with_picture=wanted != "decision")
    except Full:
        line = f"{limits.waiting} pictures wait already; try again"
        raise Refused(503, line, {"Retry-After": "1"}) from None


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Raise Refused for what a picture, its verdict, the model or this machine makes fail within."""
    try:
        yield
    except (ArgumentError, ImageError) as error:
        raise Refused(422, str(error)) from None
    except DiskFull as error:
        raise Refused(507, str(error)) from None
    except (DatasetError, ExportError) as error:
        raise Refused(500, str(error)) from None
    except Exception as error:  # of these, a memory that has run out is no bug
        if out_of_memory(error) is None:
            raise
        raise Refused(503, "the memory ran out; try again, or send a smaller picture", {"Retry-After": "1"}) from None


def _kind(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _shown(request: Request, name: str) -> str:
    """What the picture is called in messages, and read by."""
    name = name or "picture"
    return f"{name}.dcm" if _kind(request) == _DICOM and Path(name).suffix.lower() not in SUFFIXES else name


async def _content(request: Request, limits: Limits) -> bytes:
    """The picture's bytes; Refused if they come in a form, or there are none, or too many."""
    if _kind(request).startswith("multipart/"):
        raise Refused(415, "a form; send the picture's bytes as the body (curl --data-binary @part.png)")
    return await _body(request, limits.megabytes)


async def _body(request: Request, megabytes: int) -> bytes:
    """The picture's bytes; Refused as soon as it is clear that they are none, or too many."""
    limit = megabytes * 1_000_000
    too_many = Refused(413, f"more than {megabytes} MB; send a smaller file, or start the server with --max-megabytes")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise too_many
    content = bytearray()
    try:
        async for chunk in request.stream():
            content += chunk
            if len(content) > limit:
                raise too_many
    except ClientDisconnect:
        raise Refused(400, "the client was gone before its picture was whole") from None
    if not content:
        raise Refused(400, "no picture: the body is empty (curl --data-binary @part.png)")
    return bytes(content)


def _response(bundle: str, answer: Answer, wanted: Wanted) -> Response:
    if wanted == "decision":
        return JSONResponse({"bundle": bundle, **answer.to_json()})
    assert answer.picture is not None
    assert answer.map is not None
    headers = {
        "Blemish-Score": repr(answer.score),
        "Blemish-Threshold": repr(answer.card.threshold),
        "Blemish-Decision": answer.decision,
        "Blemish-Disposition": answer.disposition,
        "Blemish-Run": answer.card.run_id,
    }
    file = io.BytesIO()
    if wanted == "map":
        np.save(file, answer.map)
        return Response(file.getvalue(), media_type="application/x-npy", headers=headers)
    overlaid(answer.picture, answer.map, answer.card, answer.score).save(file, format="PNG")
    return Response(file.getvalue(), media_type="image/png", headers=headers)


class _Metrics:
    """What Prometheus collects."""

    def __init__(self, desks: Mapping[str, Desk]) -> None:
        self._registry = CollectorRegistry()
        self._answers = self._make(Counter, "answers", "Pictures that were scored", "decision", "disposition")
        self._refusals = self._make(Counter, "refusals", "Requests that were not answered", "status")
        self._seconds = self._make(
            Histogram, "seconds", "Of a picture, by part", "part", buckets=[edge / 1000 for edge in _MILLISECONDS]
        )
        waiting = self._make(Gauge, "waiting", "Pictures that are accepted and not yet answered")
        started = self._make(Gauge, "start_time_seconds", "When the server began to serve it")
        refused = self._make(Gauge, "refused", "1 if the file that lies there now was not taken over")
        for name, desk in desks.items():
            waiting.labels(name).set_function(lambda desk=desk: desk.waiting)
            refused.labels(name).set_function(lambda desk=desk: desk.proven.refused is not None)
            started.labels(name).set(time.time())
        self._desks = desks
        self._drift = {
            key: self._make(Gauge, key, meaning, "quantity")
            for key, meaning in (
                ("drift", "1 if it is no longer what it was of the good parts that the threshold comes from"),
                ("drift_evidence", "That it is not: 0 none, 1 told"),
                ("recent_mean", "Of the latest parts"),
                ("calibration_mean", "Of the good parts that the threshold comes from"),
            )
        }

    def _make(self, kind: Any, name: str, meaning: str, *labels: str, **more: Any) -> Any:
        return kind(f"blemish_{name}", meaning, ("bundle", *labels), registry=self._registry, **more)

    def answered(self, desk: Desk, answer: Answer) -> None:
        self._answers.labels(desk.name, answer.decision, answer.disposition).inc()
        for part, milliseconds in answer.milliseconds.items():
            self._seconds.labels(desk.name, part).observe(milliseconds / 1000)

    def refused(self, desk: Desk, status: int) -> None:
        self._refusals.labels(desk.name, str(status)).inc()

    def text(self) -> bytes:
        for name, desk in self._desks.items():
            for quantity, test in desk.proven.monitor.tests.items():
                mean = math.nan if test.mean is None else test.mean
                values = test.change is not None, test.evidence, mean, test.expected
                for gauge, value in zip(self._drift.values(), values, strict=True):
                    gauge.labels(name, quantity).set(value)
        return generate_latest(self._registry)
