"""A link between a device and its server as a test wants it: slow, cut, or listened to."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Iterator

ETHERTYPE_ALL = 3


class Link:
    """A TCP proxy on loopback that passes so many bytes a second and cuts every connection after so many."""

    def __init__(self, target: int, rate: int, cut_after: int, cuts: int) -> None:
        self.target, self.rate, self.cut_after, self.left = target, rate, cut_after, cuts
        self.passed, self.since_cut, self.cuts = 0, 0, 0
        self.last_cut = 0.0  # seconds since 1970
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0.2)
        self.port = int(self._listener.getsockname()[1])

    def __enter__(self) -> Link:
        self._spawn(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._cut()
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _spawn(self, what: object, *arguments: object) -> None:
        thread = threading.Thread(target=what, args=arguments)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(TimeoutError, OSError):
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self.target))
                with self._lock:
                    self._open |= {near, far}
                self._spawn(self._pass, near, far)

    def _cut(self) -> None:
        with self._lock:
            for end in self._open:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()
            self._open.clear()

    def _pass(self, near: socket.socket, far: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError):  # the other thread cut the connection
            while not self._stop.is_set():
                for source in select.select([near, far], [], [], 0.5)[0]:
                    if not (chunk := source.recv(4096)):
                        raise OSError("closed")
                    (far if source is near else near).sendall(chunk)
                    self._account(len(chunk))
        with self._lock:
            for end in (near, far):
                self._open.discard(end)
                end.close()

    def _account(self, count: int) -> None:
        with self._lock:  # held while it sleeps: one link, whatever the number of connections
            time.sleep(count / self.rate)
            self.passed += count
            self.since_cut += count
            due = self.left > 0 and self.since_cut > self.cut_after
            if due:
                self.left, self.since_cut, self.cuts = self.left - 1, 0, self.cuts + 1
                self.last_cut = time.time()
        if due:
            self._cut()


class Capture:
    """All that passes on loopback from or to some TCP ports, as an eavesdropper with root sees it."""

    def __init__(self, *ports: int) -> None:
        self.ports, self.packets = set(ports), 0
        self.seen: dict[int, bytearray] = {port: bytearray() for port in ports}
        self._stop = threading.Event()
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETHERTYPE_ALL))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024**2)
        self._socket.bind(("lo", 0))
        self._socket.settimeout(0.2)
        self._thread = threading.Thread(target=self._listen)

    def __enter__(self) -> Capture:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        time.sleep(0.5)  # what is still in the socket's buffer
        self._stop.set()
        self._thread.join()
        self._socket.close()

    def _listen(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(TimeoutError):
                self._take(self._socket.recv(256 * 1024))

    def _take(self, frame: bytes) -> None:
        kind, packet = frame[12:14], frame[14:]
        if kind == b"\x08\x00" and packet[9] == 6:
            segment = packet[(packet[0] & 15) * 4 :]
        elif kind == b"\x86\xdd" and packet[6] == 6:
            segment = packet[40:]
        else:
            return
        ports = int.from_bytes(segment[:2], "big"), int.from_bytes(segment[2:4], "big")
        for port in self.ports & set(ports):
            self.packets += 1
            self.seen[port] += segment[(segment[12] >> 4) * 4 :]

    def shows(self, port: int, text: bytes) -> bool:
        """Whether a text passed in the clear; a segment's end may cut it, so its halves are looked for as well.

        Halves of fewer than 7 bytes are not: three bytes are found in any megabyte.
        """
        halves = [half for half in (text[: len(text) // 2], text[len(text) // 2 :]) if len(half) >= 7]
        return any(part in self.seen[port] for part in (text, *halves))


@contextlib.contextmanager
def plain_echo() -> Iterator[int]:
    """A server in the clear, to see that a capture would show a text."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(TimeoutError):
                near, _ = listener.accept()
                with near:
                    near.recv(4096)

        listener.settimeout(30)
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield int(listener.getsockname()[1])
        finally:
            thread.join()
