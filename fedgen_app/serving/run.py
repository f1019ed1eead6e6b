"""The service as a process: address, certificate, signals, and what it prints."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from fedgen_app.errors import RunError
from fedgen_app.serving.app import Service, make_app
from fedgen_app.serving.connection import Connection
from fedgen_app.serving.engine import Engine
from fedgen_app.serving.guard import Limits
from fedgen_app.serving.listener import MOST_CONNECTIONS, Loop, allow_files, listeners
from fedgen_app.serving.metrics import Metrics
from fedgen_app.serving.worker import Worker

SETTLE = 30  # seconds that requests in work have to end when the service does


@dataclass(frozen=True)
class Address:
    """Where the service listens; without certificate and key in the clear."""

    host: str
    port: int
    certificate: Path | None = None
    key: Path | None = None

    @property
    def url(self) -> str:
        """As a device names it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' if self.certificate else ''}://{host}:{self.port}"


def build(engine: Engine, tokens: Sequence[str], limits: Limits) -> Service:
    """The service and its worker, which does not work yet."""
    counted = Metrics()
    worker = Worker(engine.carry_out, limits.waiting, limits.batch, counted)
    return Service(engine.frame, limits, tokens, worker, counted)


class Server(uvicorn.Server):
    """Uvicorn on sockets and a loop of ours."""

    limits: Limits
    sockets: list[socket.socket]

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Until a signal, or ``should_exit``."""
        with asyncio.Runner(loop_factory=lambda: Loop(self.limits)) as runner:
            runner.run(self.serve(sockets or self.sockets))


def make_server(service: Service, address: Address) -> Server:
    """Uvicorn with nothing of a request in its log, on sockets that are bound.

    Raises:
        RunError: the address cannot be had.
    """

    class Bounded(Connection):
        limits = service.limits

    config = uvicorn.Config(
        make_app(service),
        ssl_certfile=address.certificate,
        ssl_keyfile=address.key,
        http=Bounded,
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        log_level=logging.WARNING,
        server_header=False,
        proxy_headers=False,
        backlog=MOST_CONNECTIONS,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=SETTLE,
    )
    config.load()
    if config.ssl is not None:
        config.ssl.minimum_version = ssl.TLSVersion.TLSv1_2
    server = Server(config)
    server.limits = service.limits
    try:
        server.sockets = [*listeners(address.host, address.port, service.limits.alike)]
    except OSError as error:
        raise RunError(f"{address.url}: cannot listen there: {error.strerror}") from None
    service.ending = lambda: server.should_exit
    return server


def serve(engine: Engine, tokens: Sequence[str], limits: Limits, address: Address, say: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; what is in work then is finished.

    Raises:
        RunError: the address cannot be had.
    """
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    if lack := allow_files():
        say(f"warning: {lack}")
    service = build(engine, tokens, limits)
    server = make_server(service, address)
    # Uvicorn ends in good order and then raises the signal again, for handlers that were there before: these.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    service.worker.start()
    say(f"serving on {address.url}, backbone {engine.backbone.fingerprint}")
    try:
        server.run()
    finally:
        service.worker.stop()
    say("ended")
