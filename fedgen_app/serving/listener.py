"""Sockets that count connections from their first packet on, and a loop that does not wait long for TLS.

Asyncio and uvicorn tell nobody of a connection before its TLS has begun: whoever opens many and says nothing would have
all the files that the process may open.
"""

from __future__ import annotations

import asyncio
import ipaddress
import resource
import socket
from asyncio.base_events import Server
from typing import Any

from fedgen_app.serving.guard import Limits

MOST_CONNECTIONS = 2048  # that are served
# So many times those that are served are accepted, of one network and in all: some to be told so, and of some TLS has
# not begun. Beyond, they are closed.
TOLD = 2
MOST_ACCEPTED = TOLD * MOST_CONNECTIONS
OTHER_FILES = 256  # that the process has open besides: what belongs to the model, the log, the libraries


class Listener(socket.socket):
    """A listening socket; connections are closed at once where their network, or all of them together, have too many.

    Attributes:
        alike: Connections of one network that are served.
        accepted: Network and connection, as long as that is open; one list for all listeners of a service.
    """

    alike: int
    accepted: list[tuple[str, socket.socket]]

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection.

        Raises:
            ConnectionAbortedError: it was one too many; asyncio goes on with the next one.
        """
        found, address = super().accept()
        self.accepted[:] = [(there, other) for there, other in self.accepted if other.fileno() >= 0]
        here = network(address[0])
        if len(self.accepted) >= MOST_ACCEPTED or sum(there == here for there, _ in self.accepted) >= TOLD * self.alike:
            found.close()
            raise ConnectionAbortedError
        self.accepted.append((here, found))
        return found, address


def network(address: str) -> str:
    """To whom an address belongs: itself, of IPv6 the 64 bits that one household or machine chooses from."""
    found = ipaddress.ip_address(address.partition("%")[0])
    return str(ipaddress.ip_network((found, 64), strict=False)) if found.version == 6 else address


def listeners(host: str, port: int, alike: int) -> list[Listener]:
    """On all addresses of a host; bound, they listen once uvicorn has them.

    Raises:
        OSError: an address cannot be had.
    """
    accepted: list[tuple[str, socket.socket]] = []
    found: list[Listener] = []
    for family, kind, protocol, _, place in socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    ):
        made = Listener(family, kind, protocol)
        made.alike, made.accepted = alike, accepted
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # 0.0.0.0 has a listener of its own
        found.append(made)
        try:
            made.bind(place)
        except OSError:
            for opened in found:
                opened.close()
            raise
    return found


class Loop(asyncio.SelectorEventLoop):
    """Asyncio's own, as uvloop takes connections past ``Listener``; TLS has to begin in the time for a head.

    Uvicorn does not hand such a time on, and asyncio's own is a minute.
    """

    def __init__(self, limits: Limits) -> None:
        super().__init__()
        self._limits = limits

    async def create_server(self, *arguments: Any, **options: Any) -> Server:
        """As asyncio's."""
        if options.get("ssl"):
            options |= {"ssl_handshake_timeout": self._limits.head, "ssl_shutdown_timeout": self._limits.head}
        return await super().create_server(*arguments, **options)


def allow_files() -> str:
    """Let this process open a file for each connection; what to do where it may not, else nothing."""
    needed = MOST_ACCEPTED + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed == needed:
        return ""
    return f"may open {hard} files, and {needed} are needed for all connections: raise ulimit -Hn, or LimitNOFILE"
