"""What the tests of the inference service share: tiny clustered runs, a service that listens, and requests for it."""

from __future__ import annotations

import contextlib
import functools
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn
from helpers import federate, tiny_config, workspace
from pipelines import image_config
from torch import Tensor

from fedgen_app.cli.finished import settings_of
from fedgen_app.cli.mixing import clusters_in
from fedgen_app.learning.task import Shapes
from fedgen_app.serving import asks, body
from fedgen_app.serving.app import Service
from fedgen_app.serving.asks import Frame
from fedgen_app.serving.engine import Engine, open_engine
from fedgen_app.serving.guard import Limits
from fedgen_app.serving.metrics import Metrics
from fedgen_app.serving.run import Address, build, make_server
from fedgen_app.serving.worker import Worker
from fedgen_app.settings import Value

TOKEN = "t0ken-" + "x" * 40
OTHER_TOKEN = "0ther-" + "y" * 40
LOCAL = Address("127.0.0.1", 0)
FINGERPRINT = "sha256:" + "ab" * 32
CLUSTERS: dict[str, Value] = {
    "partition__by": "single-label",
    "samples__count": 0,
    "num_server_rounds": 1,
    "clusters__by": "prompts",
    "clusters__choose": "count",
    "clusters__count": 3,
    "clusters__encoder": "bundled",
    "learning_rate": 5e-2,
}


def image_run(learns_text: bool = False) -> Path:
    """Three clusters of a tiny generator, made once."""
    return _image_run(learns_text)


@functools.cache
def _image_run(learns_text: bool) -> Path:
    folder = workspace() / f"served-images-{learns_text}"
    changes: dict[str, Value] = {
        **CLUSTERS,
        "dataset": "bundled:styles",
        "metrics__samples": 0,
        "test_sequences": 8,
        "max_steps": 3,
        "personal__max_steps": 1,
        "resolution": 16,
        "samples__steps": 6,
        "samples__guidance": 3.0,
        "lora__text_encoder": learns_text,
    }
    federate(image_config(folder, "text", **changes), 3)
    return folder


@functools.cache
def text_run() -> Path:
    """Three clusters of a tiny language model, made once."""
    folder = workspace() / "served-texts"
    federate(tiny_config(folder, **{**CLUSTERS, "clusters__encoder": "backbone"}), 3)
    return folder


def engine_of(folder: Path, limits: Limits) -> Engine:
    """A run's engine."""
    return open_engine(folder, settings_of(folder), clusters_in(folder / "clusters"), limits)


class Listening:
    """A service on a port of this machine."""

    def __init__(self, server: uvicorn.Server, engine: Engine) -> None:
        self.engine = engine
        host, port = server.servers[0].sockets[0].getsockname()[:2]
        self.url = f"http://{host}:{port}"

    def post(self, kind: str, content: bytes, token: str = TOKEN, **headers: str) -> httpx.Response:
        """One request."""
        given = {"Authorization": f"Bearer {token}"} | headers
        return httpx.post(f"{self.url}/v1/{kind}", content=content, headers=given, timeout=60)

    def get(self, path: str, token: str = TOKEN) -> httpx.Response:
        """One question."""
        return httpx.get(f"{self.url}{path}", headers={"Authorization": f"Bearer {token}"}, timeout=60)

    def metric(self, line: str) -> float:
        """What a line of /metrics says."""
        found = [text for text in self.get("/metrics").text.splitlines() if text.startswith(f"fedgen_serve_{line} ")]
        return float(found[0].rpartition(" ")[2]) if found else 0.0


def until(holds: Callable[[], bool]) -> None:
    """Wait for it, not for ever."""
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextlib.contextmanager
def listening(folder: Path, **limits: Any) -> Iterator[Listening]:
    """The service of a run, in threads of this process."""
    bounds = Limits(**{"per_minute": 100_000, "burst": 100_000, **limits})
    engine = engine_of(folder, bounds)
    with running(build(engine, (TOKEN, OTHER_TOKEN), bounds)) as server:
        yield Listening(server, engine)


@contextlib.contextmanager
def running(service: Service, address: Address = LOCAL) -> Iterator[uvicorn.Server]:
    """A service in threads of this process, once it listens."""
    server = make_server(service, address)
    thread = threading.Thread(target=server.run)
    service.worker.start()
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while not server.started:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield server
    finally:
        server.should_exit = True
        thread.join()
        service.worker.stop()


@contextlib.contextmanager
def answering(
    answer: bytes = b"", tokens: Sequence[str] = (TOKEN,), address: Address = LOCAL, work: float = 0, **limits: Any
) -> Iterator[tuple[str, int]]:
    """The host and port of a service without a model that answers every right request, after seconds of work."""

    def carry_out(batch: Sequence[asks.Ask]) -> list[bytes]:
        time.sleep(work)
        return [answer] * len(batch)

    counted, bounds = Metrics(), Limits(**{"per_minute": 100_000, "burst": 100_000, **limits})
    worker = Worker(carry_out, bounds.waiting, bounds.batch, counted)
    with running(Service(frame(), bounds, tokens, worker, counted), address) as server:
        host, port = server.servers[0].sockets[0].getsockname()[:2]
        yield host, port


def frame(**changes: Any) -> Frame:
    """What a made-up service can be asked."""
    known: dict[str, Any] = {
        "fingerprint": FINGERPRINT,
        "shapes": Shapes((4, 3), (1, 2, 2), 50, (16, 16, 1)),
        "clusters": (0, 2),
        "has_global": True,
        "centroids": {0: torch.eye(5)[0].double().numpy(), 2: torch.eye(5)[1].double().numpy()},
        "space": "0123456789abcdef",
        "temperature": 0.1,
        "most_images": 3,
        "most_steps": 20,
    }
    return Frame(**known | changes)


def image_body(
    tensors: Mapping[str, Tensor | None] | None = None, without: str = "", fingerprint: str = FINGERPRINT, **facts: str
) -> bytes:
    """A request for images that is right for ``frame()``, less what is changed."""
    named = {asks.PROMPT: torch.zeros(2, 4, 3), **(tensors or {})}
    told = {"backbone": fingerprint, "seed": "1", "steps": "6", "guidance": "3.0", "sampler": "ddim", **facts}
    return body.write(
        {name: tensor for name, tensor in named.items() if tensor is not None},
        {name: text for name, text in told.items() if name != without},
    )


def asked_of(engine: Engine, text: str = "a photo of a disc", **facts: str) -> bytes:
    """A request for one image that is right for an engine."""
    assert engine.task.stages is not None
    encoded = engine.task.stages.encode(engine.backbone, [text])
    return image_body({asks.PROMPT: encoded}, fingerprint=engine.backbone.fingerprint, **facts)


class Wire:
    """A listener on this machine that passes everything on to a service and keeps it, both ways."""

    def __init__(self, to: str) -> None:
        self.target = ("127.0.0.1", int(to.rpartition(":")[2]))
        self.seen = bytearray()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.threads = [threading.Thread(target=self._accept, daemon=True)]
        self.threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near, far = self.listener.accept()[0], socket.create_connection(self.target)
                for source, sink in ((near, far), (far, near)):
                    self.threads.append(threading.Thread(target=self._pass_on, args=(source, sink), daemon=True))
                    self.threads[-1].start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(65536):
                self.seen += piece
                sink.sendall(piece)
            sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Take no more connections."""
        self.listener.close()
