"""A web server's folder, read over a bad line: asked again after failures that may pass, from where it was."""

from __future__ import annotations

import contextlib
import hashlib
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeVar
from urllib.parse import urlsplit

import httpx

from fedgen_app.errors import BackboneError, SettingsError
from fedgen_app.fleet.spec import is_loopback

TIMEOUTS = httpx.Timeout(30.0, connect=10.0)
PATIENCE = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
WRONG = 3  # times that a server may give other bytes than those that were asked for
LATER = frozenset((408, 425, 429, 500, 502, 503, 504))  # answers that may be others in a while
Result = TypeVar("Result")


@contextlib.contextmanager
def connected(url: str, ca: Path | None, timeouts: httpx.Timeout = TIMEOUTS) -> Iterator[httpx.Client]:
    """A client for an address, over TLS unless it is this machine's own.

    Raises:
        SettingsError: the address is none, or would send in the clear over a net; or the certificate is none.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise SettingsError(f"{url}: no address: {error}") from None
    if parts.scheme not in ("https", "http") or not host or parts.query or parts.fragment or "@" in parts.netloc:
        raise SettingsError(f"{url}: should be like https://HOST{f':{port}' if port else ''}/FOLDER")
    if parts.scheme == "http" and not is_loopback(host):
        raise SettingsError(f"{url}: http is taken from this machine itself only; use https")
    try:
        context = ssl.create_default_context(cafile=str(ca) if ca else None)
    except OSError as error:
        raise SettingsError(f"--ca {ca}: {error.strerror or error}") from None
    with httpx.Client(verify=context, timeout=timeouts, follow_redirects=False) as client:
        yield client


class _Failed(Exception):
    """A request did not succeed, but may do so later."""


@dataclass
class Source:
    """A folder of a web server.

    Attributes:
        url: Ends in a slash.
        patience: Seconds to wait after one failure in a row, two, ...; after the last it gives up. A failure before
            which bytes had come counts as the first.
        fetched: Bytes that came so far.
    """

    url: str
    client: httpx.Client
    patience: tuple[float, ...] = PATIENCE
    fetched: int = field(default=0, init=False)

    @classmethod
    @contextlib.contextmanager
    def open(cls, url: str, ca: Path | None, patience: tuple[float, ...] = PATIENCE) -> Iterator[Source]:
        """A source at an address.

        Args:
            ca: The certificate of an authority of one's own; None: those of the system.

        Raises:
            SettingsError: the address is none, or would send in the clear over a net.
        """
        with connected(url, ca) as client:
            yield cls(url.rstrip("/") + "/", client, patience)

    def small(self, name: str, most: int) -> bytes:
        """A whole file of at most so many bytes.

        Raises:
            BackboneError: it is not to be had, or larger.
        """

        def once() -> bytes:
            content = bytearray()
            with self._get(name, 0) as (answer, _):
                for piece in answer.iter_raw():
                    content += piece
                    if len(content) > most:
                        raise BackboneError(f"{self.url}{name}: larger than {most} bytes")
            return bytes(content)

        return self._again(name, once, lambda: 0)

    def append(self, name: str, digest: str, size: int, stream: BinaryIO, begin: int) -> None:
        """Fill a file from ``begin`` on with ``size`` bytes of a known SHA-256; what stands there is a part of them.

        Raises:
            BackboneError: they are not to be had, or the server gives others.
        """
        wrong = 0

        def refuse() -> None:
            nonlocal wrong
            wrong += 1
            stream.truncate(begin)
            if wrong == WRONG:
                raise BackboneError(f"{self.url}{name}: other bytes than the manifest says, {WRONG} times")
            raise _Failed("other bytes than the manifest says")

        def once() -> None:
            have = _end(stream) - begin
            if have < size:
                with self._get(name, have) as (answer, start):
                    stream.truncate(begin + start)
                    stream.seek(begin + start)
                    for piece in answer.iter_raw():
                        start += len(piece)
                        if start > size:
                            refuse()
                        stream.write(piece)
                        self.fetched += len(piece)
                stream.flush()
                if start < size:
                    raise _Failed("the answer ended too early")
            stream.seek(begin)
            if hashlib.sha256(stream.read(size)).hexdigest() != digest:
                refuse()

        self._again(name, once, lambda: _end(stream))

    @contextlib.contextmanager
    def _get(self, name: str, start: int) -> Iterator[tuple[httpx.Response, int]]:
        """The answer, and from which byte on it is: ``start``, or 0 where the server gives whole files only."""
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        with self.client.stream("GET", self.url + name, headers=headers) as answer:
            code = answer.status_code
            if code in LATER:
                raise _Failed(f"HTTP {code}")
            if code == 416 and start:  # the file there is shorter than what stands here: take it from its start
                with self._get(name, 0) as whole:
                    yield whole
                return
            if code not in (200, 206):
                raise BackboneError(f"{self.url}{name}: HTTP {code}")
            if answer.headers.get("Content-Encoding", "identity") != "identity":
                raise BackboneError(f"{self.url}{name}: comes compressed, though that was not asked for")
            if code == 206 and not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                raise BackboneError(f"{self.url}{name}: another part than was asked for")
            yield answer, start if code == 206 else 0

    def _again(self, name: str, action: Callable[[], Result], reached: Callable[[], int]) -> Result:
        failures, best = 0, reached()
        while True:
            try:
                return action()
            except (httpx.TransportError, _Failed) as error:
                now = reached()
                failures = 1 if now > best else failures + 1
                best = max(best, now)
                if failures > len(self.patience):
                    raise BackboneError(f"{self.url}{name}: {error or type(error).__name__}") from None
                time.sleep(self.patience[failures - 1])


def _end(stream: BinaryIO) -> int:
    return stream.seek(0, 2)
