"""What an install script asks: ``python -m fedgen_app.fleet.checks server HOST:PORT CA``.

Or ``... policy FILE``, or ``... readable PATH``.
"""

from __future__ import annotations

import os
import socket
import ssl
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedgen_app.errors import FedgenError, RunError
from fedgen_app.federation.policy import Policy

TIMEOUT = 10.0  # seconds


def split(address: str) -> tuple[str, int]:
    """Host and port of ``host:port``, IPv6 in brackets."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def server_days_left(address: str, ca: Path) -> int:
    """Whole days that a device still reaches a server: until its certificate ends, or the device's own authority."""
    return min(days_left(address, ca))


def days_left(address: str, ca: Path) -> tuple[int, int]:
    """Whole days that the server's certificate and the authority in ``ca`` are still valid, after a TLS handshake.

    The authority may end first: after a renewal the server has new certificates and the device the old file.

    Raises:
        RunError: it cannot be reached, or its certificate is not for it or not of this authority.
    """
    host, port = split(address)
    try:
        context = ssl.create_default_context(cafile=str(ca))
        with (
            socket.create_connection((host, port), TIMEOUT) as plain,
            context.wrap_socket(plain, server_hostname=host) as tls,
        ):
            certificate = tls.getpeercert()
    except ssl.SSLCertVerificationError as error:
        raise RunError(
            f"{address}: its certificate is refused: {error.verify_message}. Is this device's clock right (it says "
            f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC)? Are server and device of one `fedgen provision`?"
        ) from None
    except (OSError, ValueError) as error:
        raise RunError(f"{address}: cannot be reached: {error}") from None
    shown: dict[str, Any] = dict(certificate or {})
    known = context.get_ca_certs()
    # With another certificate between the two the file's authorities are those further up.
    signers = [each for each in known if each["subject"] == shown["issuer"]] or known
    return _days(shown), max(_days(dict(each)) for each in signers)


def _days(certificate: Mapping[str, Any]) -> int:
    return int((ssl.cert_time_to_seconds(certificate["notAfter"]) - datetime.now(UTC).timestamp()) // 86400)


def barred(place: Path) -> Path | None:
    """The folder on the way to a place that this user may not enter; None: the place can be asked for."""
    real = place.resolve()
    for path in (*reversed(real.parents), real):
        try:
            path.stat()
        except PermissionError:
            return path.parent
        except OSError:  # it is not there, and nothing below it
            return None
    return None


def check_readable(path: Path) -> None:
    """Open a file, or every file below a folder, as whoever trains has to.

    Raises:
        RunError: names the first that this user cannot read.
    """

    def refuse(error: OSError) -> None:
        raise error

    try:
        if os.path.isfile(path):
            path.open("rb").close()
            return
        for place, _, names in os.walk(path, onerror=refuse):
            for name in names:
                (Path(place) / name).open("rb").close()
    except OSError as error:
        raise RunError(
            f"{error.filename}: {error.strerror}, for this user: chmod -R a+rX {path}, and let others enter the "
            "folders above"
        ) from None


def main(arguments: list[str]) -> int:
    """Exit status 0: as it should be; 1: the reason is on standard error."""
    try:
        match arguments:
            case ["server", address, ca]:
                print(f"ok: {address} answers, certificates are valid for {server_days_left(address, Path(ca))} days")
            case ["policy", file]:
                Policy.read(Path(file))
                print(f"ok: {file}")
            case ["readable", path]:
                check_readable(Path(path))
                print(f"ok: {path} can be read")
            case _:
                raise RunError("arguments: server HOST:PORT CA, policy FILE, or readable PATH")
    except FedgenError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
