"""The proxy in front of the SuperLink, with real nginx: devices reach the fleet API and nothing else."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import ssl
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from fleets import NGINX, nginx
from helpers import command

from fedgen_app.engines.keeper import free_port

pytestmark = pytest.mark.skipif(not NGINX, reason="no nginx here (FEDGEN_NGINX names one)")


class Behind(BaseHTTPRequestHandler):
    """Stands where the SuperLink would, and says what arrived."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        size = int(self.headers.get("Content-Length", 0))
        body = f"{self.path} {len(self.rfile.read(size))}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST

    def log_message(self, *arguments: Any) -> None:
        pass


@contextlib.contextmanager
def fleet(folder: Path, operators: str) -> Iterator[int]:
    """nginx as provisioned, with something that answers behind it; the port that devices use."""
    port, behind = free_port(), free_port()
    text = f'[server]\nhosts = ["localhost"]\nport = {port}\nsuperlink-port = {behind}\noperators = [{operators}]\n'
    paths = f'[paths]\nconfig = "{folder}/etc"\nstate = "{folder}/var"\nenvironment = "{folder}/env"\n'
    (folder / "fleet.toml").write_text(text + paths + '[[device]]\nid = "a"\ndata = "/d"\n')
    assert command("provision", folder / "fleet.toml", "--output", folder / "out").status == 0
    shutil.copytree(folder / "out" / "server", folder / "etc" / "server")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "etc" / "server" / "server.crt", folder / "etc" / "server" / "server.key")
    server = ThreadingHTTPServer(("127.0.0.1", behind), Behind)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        with nginx(folder, folder / "etc" / "server" / "nginx.conf", port):
            yield port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def ask(folder: Path, port: int, path: str, method: str = "POST", body: bytes = b"x") -> tuple[int, str]:
    context = ssl.create_default_context(cafile=str(folder / "out" / "devices" / "a" / "ca.crt"))
    connection = http.client.HTTPSConnection("localhost", port, context=context, timeout=20)
    try:
        connection.putrequest(method, path, skip_accept_encoding=True)
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


FLEET = ("register-node", "activate-node", "send-node-heartbeat", "pull-messages", "push-object", "get-fab")
OTHER = (
    "/",
    "/docs",
    "/openapi.json",
    "/health",
    "/v1/control/start-run",
    "/v1/control/register-node",
    "/v1/runtime/acquire-task",
    "/v1/fleet",
    "/v1/fleet/",
    "/v1/fleet/../control/start-run",
    "/v1/fleet/%2e%2e/control/start-run",
    "/v1/fleet/..%2fcontrol/start-run",
    "/v1/fleet//control/start-run",
    "/v1/control/../fleet/get-run",
    "/v1/control/%2e%2e/fleet/get-run",
    "//v1/control/start-run",
    "/v1/fleet/get-run?next=/v1/control",
    "/V1/control/start-run",
    "/v1/./control/start-run",
)


def test_devices_reach_the_fleet_api_and_nothing_else(tmp_path: Path) -> None:
    with fleet(tmp_path, "") as port:
        for name in FLEET:
            assert ask(tmp_path, port, f"/v1/fleet/{name}") == (200, f"/v1/fleet/{name} 1")
        answers = {path: ask(tmp_path, port, path)[0] for path in OTHER}
        assert {path: code for path, code in answers.items() if code not in (400, 403, 404)} == {}
        assert ask(tmp_path, port, "/v1/fleet/get-run", "GET")[0] == 403
        assert ask(tmp_path, port, "/v1/fleet/push-object", body=b"x" * 6_000_000) == (
            200,
            "/v1/fleet/push-object 6000000",
        )
        assert ask(tmp_path, port, "/v1/fleet/push-object", body=b"x" * (65 * 1024**2))[0] == 413
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as plain:
            plain.request("POST", "/v1/fleet/get-run", b"x")
            assert plain.getresponse().status == 400  # nginx's complaint about a request in the clear


def test_operators_reach_the_control_api_from_their_addresses_alone(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    with fleet(tmp_path / "in", '"127.0.0.1", "::1"') as port:
        assert ask(tmp_path / "in", port, "/v1/control/start-run") == (200, "/v1/control/start-run 1")
        assert ask(tmp_path / "in", port, "/v1/runtime/acquire-task")[0] == 404
        assert ask(tmp_path / "in", port, "/v1/control/../runtime/acquire-task")[0] == 404
    with fleet(tmp_path / "out", '"192.0.2.0/24"') as port:
        assert ask(tmp_path / "out", port, "/v1/control/start-run")[0] == 403


def test_a_server_behind_that_is_another_is_not_spoken_to(tmp_path: Path) -> None:
    with fleet(tmp_path, "") as port:
        assert ask(tmp_path, port, "/v1/fleet/get-run")[0] == 200
    (tmp_path / "rogue").mkdir()
    assert command("provision", tmp_path / "fleet.toml", "--output", tmp_path / "rogue" / "out").status == 0
    (tmp_path / "again").mkdir()
    with fleet(tmp_path / "again", "") as port:
        # nginx starts with the fleet's authority; from now on it is told of another one, and reads it again.
        shutil.copy(tmp_path / "rogue" / "out" / "ca" / "ca.crt", tmp_path / "again" / "etc" / "server" / "ca.crt")
        os.kill(int((tmp_path / "again" / "pid").read_text()), 1)
        deadline = time.monotonic() + 20
        while ask(tmp_path / "again", port, "/v1/fleet/get-run")[0] != 502:
            assert time.monotonic() < deadline
            time.sleep(0.1)
