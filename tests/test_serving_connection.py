"""Connections that say nothing or read nothing are cut off; those that are slow but in time are not."""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from serving import LOCAL, TOKEN, answering, image_body, until

from fedgen_app.errors import RunError
from fedgen_app.fleet import certificates
from fedgen_app.serving.listener import MOST_ACCEPTED, OTHER_FILES, network
from fedgen_app.serving.run import Address

BODY = image_body()
REQUEST = (
    f"POST /v1/images HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: {len(BODY)}\r\n\r\n"
).encode() + BODY
LARGE = bytes(16 * 1024**2)  # more than a machine's own buffers take


def connect(place: tuple[str, int]) -> socket.socket:
    """A connection that has little room for an answer."""
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    made.settimeout(20)
    made.connect(place)
    return made


def rest(connection: socket.socket) -> bytes:
    """What still comes until the service ends the connection."""
    found = bytearray()
    try:
        while piece := connection.recv(65536):
            found += piece
    except (ConnectionResetError, ssl.SSLEOFError):
        pass
    return bytes(found)


@pytest.fixture(params=["clear", "tls"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Address:
    if request.param == "clear":
        return LOCAL
    ca_key, key = certificates.new_key(), certificates.new_key()
    ca = certificates.authority(ca_key, "test", 2)
    files = {"crt": certificates.server_certificate(ca, ca_key, key, ["127.0.0.1"], 2), "key": key}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    return Address("127.0.0.1", 0, tmp_path / "crt", tmp_path / "key")


@pytest.mark.parametrize("sent", [b"", b"POST /v1/im"])
def test_a_connection_that_does_not_say_what_it_wants_is_cut_off(sent: bytes, address: Address) -> None:
    with answering(head=0.5, address=address) as place, connect(place) as plain:
        began = time.monotonic()
        if sent:
            silent = wrapped(plain, address)
            silent.sendall(sent)
        else:  # with TLS it does not begin that either
            silent = plain
        assert rest(silent) == b"" and 0.2 < time.monotonic() - began < 10


def test_nor_may_it_fall_silent_between_requests_but_work_may_take_longer() -> None:
    with answering(b"first", head=0.5, work=1.0) as place, connect(place) as talking:
        talking.sendall(REQUEST)
        assert talking.recv(1000).startswith(b"HTTP/1.1 200")  # later than a head may come
        talking.sendall(REQUEST[:20])
        began = time.monotonic()
        assert b"HTTP" not in rest(talking) and time.monotonic() - began < 5


def wrapped(connection: socket.socket, address: Address) -> socket.socket:
    if address is LOCAL:
        return connection
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context.wrap_socket(connection)


def test_an_answer_that_is_not_read_is_counted_and_given_up(address: Address) -> None:
    with answering(LARGE, arriving=1, reading=3.0, address=address) as place:
        url = f"{'http' if address is LOCAL else 'https'}://{place[0]}:{place[1]}"
        with (
            httpx.Client(base_url=url, headers={"Authorization": f"Bearer {TOKEN}"}, verify=False) as client,
            wrapped(connect(place), address) as unread,
        ):

            def told(line: str) -> bool:
                return f"fedgen_serve_{line}" in client.get("/metrics").text.splitlines()

            unread.sendall(REQUEST)
            until(lambda: told(f"sent_bytes_total {len(LARGE)}"))
            assert told("open 1")
            assert client.post("/v1/images", content=BODY).status_code == 429
            until(lambda: told("open 0"))
            assert len(rest(unread)) < len(LARGE)
            assert client.post("/v1/images", content=BODY).content == LARGE


def test_what_is_left_of_an_answer_is_given_up_too() -> None:
    with answering(LARGE, reading=0.5) as place, connect(place) as unread:
        unread.sendall(REQUEST.replace(b"Host: x", b"Connection: close"))
        time.sleep(1.5)
        assert len(rest(unread)) < len(LARGE)


def test_one_address_does_not_get_all_connections(address: Address) -> None:
    with answering(alike=1, head=20, address=address) as place, connect(place) as one, connect(place) as two:
        with connect(place) as three:  # though none of them has begun with TLS
            assert rest(three) == b""
        for kept in (one, two):
            with wrapped(kept, address) as talking:
                talking.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                assert rest(talking).startswith(b"HTTP/1.1 200")

        def answered() -> bool:
            with wrapped(connect(place), address) as later:
                later.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                return rest(later).startswith(b"HTTP/1.1 200")

        until(lambda: address is not LOCAL or answered())  # what has ended is not counted


def test_who_has_more_connections_than_are_served_is_told_so(address: Address) -> None:
    closing = REQUEST.replace(b"Host: x", b"Host: x\r\nConnection: close")
    with (
        answering(b"drawn", alike=1, head=20, address=address) as place,
        wrapped(connect(place), address) as one,
        wrapped(connect(place), address) as two,
    ):
        two.sendall(REQUEST)
        told = rest(two)
        assert told.startswith(b"HTTP/1.1 429") and b"retry-after: 1" in told and b"connection: close" in told.lower()
        one.sendall(closing)
        assert rest(one).endswith(b"drawn")


def test_an_address_is_that_of_its_network() -> None:
    assert network("192.0.2.7") == "192.0.2.7"
    assert network("2001:db8::1%eth0") == network("2001:db8:0:0:ffff::2") != network("2001:db8:0:1::1")


def test_the_process_may_open_a_file_for_each_connection() -> None:
    script = (
        "import resource; from fedgen_app.serving.listener import *;"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, {hard}));"
        "print(allow_files(), resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )

    def told(hard: int) -> str:
        return subprocess.check_output([sys.executable, "-c", script.format(hard=hard)], text=True).strip()

    assert told(MOST_ACCEPTED + OTHER_FILES) == str(MOST_ACCEPTED + OTHER_FILES)
    assert told(1000).startswith("may open 1000 files") and told(1000).endswith(" 1000")


def test_a_taken_address_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(RunError, match=f"{port}: cannot listen there"),
            answering(address=Address("127.0.0.1", port)),
        ):
            pass
