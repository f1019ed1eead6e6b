"""The HTTP service: who asks, how much and how often, before anything of a body is looked at."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedgen_app.errors import ServiceError
from fedgen_app.fleet.spec import is_loopback
from fedgen_app.serving import asks, body, metrics
from fedgen_app.serving.asks import Frame, Kind
from fedgen_app.serving.connection import CROWDED
from fedgen_app.serving.guard import Buckets, LaterError, Limits, holder
from fedgen_app.serving.metrics import Metrics
from fedgen_app.serving.worker import Worker

log = logging.getLogger(__name__)
DRAINED = 4 * 1024**2  # bytes of a refused body that are still read, so that its sender sees why it was refused
PNG = "image/png"
PIECE = 64 * 1024  # bytes of an answer that are sent at once
HELD = "fedgen.held"  # of a request's scope: what is let go of when its answer is sent


@dataclass
class Service:
    """What the handlers share."""

    frame: Frame
    limits: Limits
    tokens: Sequence[str]
    worker: Worker
    counted: Metrics
    ending: Callable[[], bool] = lambda: False
    arriving: int = field(default=0, init=False)
    held: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.buckets = Buckets(self.limits.per_minute / 60, self.limits.burst)
        self.counted.gauges |= {"waiting": lambda: self.worker.waiting, "open": lambda: self.arriving}

    def known(self, request: Request) -> Hashable:
        """Who asks: whose token the request has, by its place; without tokens its address.

        Raises:
            ServiceError: 401: nobody's; 421: without tokens, it was sent to a name that is not this machine's
                loopback, as by a page in a browser that has such a name lead here.
        """
        if not self.tokens and not _means_loopback(request.headers.get("host", "")):
            raise ServiceError(421, "without tokens this service answers to localhost and loopback addresses alone")
        found = holder(request.headers.get("authorization", ""), self.tokens)
        if found is None:
            raise ServiceError(401, "a bearer token of this service is needed")
        return found if self.tokens else request.client and request.client.host

    async def answer(self, request: Request, kind: Kind) -> Response:
        """Carry out a request.

        Raises:
            ServiceError: it is refused.
        """
        client = self.known(request)
        if wait := self.buckets.take(client):
            raise LaterError("too many requests of this client", wait)
        if CROWDED in request.scope:
            raise LaterError("too many connections of this address, or of all", self.worker.wait)
        if self.arriving >= self.limits.arriving:
            raise LaterError("too many requests at once", self.worker.wait)
        self.arriving += 1
        received = bytearray()
        request.scope[HELD].callback(self._leave, received)
        began = time.perf_counter()
        data = await self._body(request, received)
        self.counted.add("received_bytes_total", len(data))
        found = await self._found(request, self.worker.put(asks.parse(kind, data, self.frame), client))
        self.counted.add("request_seconds_total", time.perf_counter() - began)
        self.counted.add("sent_bytes_total", len(found))
        return Answer(found, media_type=PNG if kind == "images" else body.MEDIA_TYPE)

    def _leave(self, received: bytearray) -> None:
        self.arriving -= 1
        self.held -= len(received)

    async def _found(self, request: Request, job: Future[bytes]) -> bytes:
        """What the worker makes of it; a request that nobody waits for any more is not carried out."""
        result, leaving = asyncio.wrap_future(job), asyncio.ensure_future(_gone(request))
        either: set[asyncio.Future[Any]] = {result, leaving}
        try:
            for _ in range(2):
                await asyncio.wait(either, timeout=self.limits.patience / 2, return_when=asyncio.FIRST_COMPLETED)
                if job.done():  # which ``result`` may not know yet
                    return job.result()
                if leaving.done():
                    raise ServiceError(499, "nobody waits for the answer any more")
                if not job.running():
                    raise LaterError(f"not begun in {self.limits.patience / 2:g} seconds", self.worker.wait)
            raise ServiceError(504, f"not done in {self.limits.patience:g} seconds: ask for less at once")
        finally:
            leaving.cancel()
            result.cancel()

    async def _body(self, request: Request, received: bytearray) -> bytes:
        most, said = self.frame.most_bytes, request.headers.get("content-length", "0")
        if not said.isdecimal() or int(said[:19]) > most:
            raise self._too_large()
        try:
            async with asyncio.timeout(self.limits.seconds):
                async for piece in request.stream():
                    if len(received) + len(piece) > most:
                        raise self._too_large()
                    if self.held + len(piece) > max(self.limits.held, most):
                        raise LaterError("too many bytes at once", self.worker.wait)
                    received += piece
                    self.held += len(piece)
        except TimeoutError:
            raise ServiceError(408, f"the body did not arrive in {self.limits.seconds:g} seconds") from None
        except ClientDisconnect:  # nobody is there any more to be told
            raise ServiceError(400, "the body ended too early") from None
        return bytes(received)

    def _too_large(self) -> ServiceError:
        images = f", which {self.frame.most_images} images need" if self.frame.shapes else ""
        return ServiceError(413, f"a body may have {self.frame.most_bytes} bytes{images}: ask for less at once")


class Answer(Response):
    """Sent in pieces, each when there is room for it: what is not read stays counted, and is not copied again."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Until the last piece is taken, or nobody is there any more."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for first in range(0, len(self.body), PIECE):
            piece = self.body[first : first + PIECE]
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


class Around:
    """Around all handlers, until the answer is sent: then a request's place is free again.

    An error that no handler knows is a 500 and a line with its type. Starlette would hand it on to uvicorn, whose log
    would have its text, and where the files of this machine lie.
    """

    def __init__(self, app: ASGIApp, counted: Metrics) -> None:
        self.app, self.counted = app, counted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, whatever happens."""
        begun = False

        async def sending(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            with contextlib.ExitStack() as scope[HELD]:
                await self.app(scope, receive, sending)
        except Exception as error:  # whatever one request runs into, it is told without a word of the request
            kind = type(error).__name__
            log.error("a request failed: %s", kind)
            self.counted.add("requests_total", labels={"path": _counted(scope["path"]), "status": 500})
            if not begun:
                await JSONResponse({"error": f"the request could not be carried out: {kind}"}, 500)(
                    scope, receive, send
                )


def make_app(service: Service) -> FastAPI:
    """The routes; no page that describes them, as nobody is to look around."""
    app = FastAPI(title="FedGen-Edge", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Around, counted=service.counted)

    @app.get("/health")
    async def health() -> Response:
        ending = service.ending()
        return JSONResponse({"status": "ending" if ending else "ok"}, 503 if ending else 200)

    @app.get("/metrics")
    async def told(request: Request) -> Response:
        service.known(request)
        return Response(service.counted.text(), media_type=metrics.MEDIA_TYPE)

    @app.get(f"/v1/{asks.SPACE}")
    async def space(request: Request) -> Response:
        service.known(request)
        return PlainTextResponse(service.frame.compared)

    def offer(kind: Kind) -> None:
        @app.post(f"/v1/{kind}")
        async def handle(request: Request) -> Response:
            answer = await service.answer(request, kind)
            service.counted.add("requests_total", labels={"path": kind, "status": 200})
            return answer

    for kind in asks.KINDS:
        offer(kind)

    @app.exception_handler(ServiceError)
    async def refuse(request: Request, error: ServiceError) -> Response:
        service.counted.add("requests_total", labels={"path": _counted(request.url.path), "status": error.status})
        await _drain(request)
        headers = (
            {"Retry-After": str(error.wait if isinstance(error, LaterError) else 1)} if error.status == 429 else {}
        )
        headers |= {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
        headers |= {"Connection": "close"} if CROWDED in request.scope else {}
        return JSONResponse({"error": str(error)}, error.status, headers)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        service.counted.add("requests_total", labels={"path": "other", "status": error.status_code})
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    return app


async def _gone(request: Request) -> None:
    """Until the connection ends; for a request whose body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _means_loopback(host: str) -> bool:
    """Whether a Host header, with or without a port, names this machine's loopback."""
    try:
        return is_loopback(urlsplit(f"//{host}").hostname or "")
    except ValueError:  # no address at all
        return False


def _counted(path: str) -> str:
    """Under what a path is counted: it is a client's text."""
    kind = path.removeprefix("/v1/")
    return kind if kind in asks.KINDS else "other"


async def _drain(request: Request) -> None:
    """Read on for a little: a connection that is closed with bytes unread takes the answer with it."""
    read = 0
    try:
        async with asyncio.timeout(5):
            async for piece in request.stream():
                read += len(piece)
                if read > DRAINED:
                    return
    except (TimeoutError, RuntimeError, ClientDisconnect):  # it takes too long, was read already, or nobody is there
        return
