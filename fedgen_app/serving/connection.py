"""A connection of uvicorn's that a peer cannot keep by saying nothing, or by reading nothing, nor have too many of."""

from __future__ import annotations

import asyncio
from typing import ClassVar

from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from fedgen_app.serving.guard import Limits
from fedgen_app.serving.listener import MOST_CONNECTIONS, network

CROWDED = "fedgen.crowded"  # of a request's scope: it came over a connection too many


class Connection(H11Protocol):
    """Aborted where a request's head does not come, or an answer is not read, in the time that ``limits`` gives.

    Uvicorn itself only ends connections on which nothing at all comes after an answer; and then in good order, for
    which it waits as long as the peer does not read.
    """

    limits: ClassVar[Limits] = Limits()
    network = ""  # whose connection it is
    _speaking: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a request."""
        super().connection_made(transport)
        self.network = network(self.client[0]) if self.client else ""
        if len(self.connections) > MOST_CONNECTIONS or self._alike() > self.limits.alike:
            self.app = self._crowded
        self._speaking = self.loop.call_later(self.limits.head, transport.abort)

    def data_received(self, data: bytes) -> None:
        """The first byte after an answer, and all that comes of a request that was answered before its end."""
        if self._speaking is None and not self._busy:
            self._speaking = self.loop.call_later(self.limits.head, self.transport.abort)
        super().data_received(data)

    def handle_events(self) -> None:
        """With a whole head it is the app's turn, which has limits of its own."""
        super().handle_events()
        if self._busy:
            self._spoke()
            if not self.flow.write_paused:  # else the answer before this request is not read yet
                self._read()

    def pause_writing(self) -> None:
        """More is to be sent than the peer has read."""
        super().pause_writing()
        self._read_soon()

    def on_response_complete(self) -> None:
        """The last piece is on its way; whether the peer has it, TLS does not say."""
        self._read_soon()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Over."""
        self._spoke()
        self._read()
        super().connection_lost(exc)

    def _alike(self) -> int:
        """Connections of this one's network, itself included."""
        return sum(isinstance(other, Connection) and other.network == self.network for other in self.connections)

    async def _crowded(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the app refuse it, as it does all else."""
        scope[CROWDED] = True
        await self.config.loaded_app(scope, receive, send)

    @property
    def _busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _read_soon(self) -> None:
        if self._reading is None:
            self._reading = self.loop.call_later(self.limits.reading, self.transport.abort)

    def _read(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _spoke(self) -> None:
        if self._speaking is not None:
            self._speaking.cancel()
            self._speaking = None
