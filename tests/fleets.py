"""What tests of a fleet share: nginx as provisioned, without a system's nginx."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

NGINX = os.environ.get("FEDGEN_NGINX") or shutil.which("nginx")


@contextlib.contextmanager
def nginx(folder: Path, configuration: Path, port: int) -> Iterator[None]:
    """nginx with a provisioned configuration, its own files in `folder`."""
    conf = configuration.read_text(encoding="utf-8")
    if not Path("/proc/net/if_inet6").exists():
        conf = "\n".join(line for line in conf.splitlines() if "listen [::]" not in line)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in kinds)
    (folder / "nginx.conf").write_text(
        f"daemon off; pid {folder}/pid; error_log {folder}/error.log;\nevents {{}}\n"
        f"http {{ access_log {folder}/access.log;\n{temporary}{conf}\n}}\n"
    )
    assert NGINX
    process = subprocess.Popen([NGINX, "-p", folder, "-c", folder / "nginx.conf"], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert process.poll() is None and time.monotonic() < deadline, (folder / "error.log").read_text()
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait()
