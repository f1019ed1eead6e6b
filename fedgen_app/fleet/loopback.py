"""What a SuperNode and its own processes say to each other on a device's loopback is under TLS as well.

    python -m fedgen_app.fleet.loopback FOLDER

makes ``ca.crt``, ``server.crt`` and ``server.key`` there. The SuperNode's start script does so each time: the keys are
the device's own, nobody else knows them, and none of them has to be renewed.
"""

from __future__ import annotations

import ssl
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fedgen_app.files import write_atomic
from fedgen_app.fleet import certificates

# For whatever the clock says: a small device has none that runs while it is off.
SINCE, DAYS = datetime(2000, 1, 1, tzinfo=UTC), 36500


@dataclass(frozen=True)
class Runtime:
    """Where a SuperNode listens for its own processes.

    Attributes:
        address: HOST:PORT.
        ca: The authority of its certificate; None: it speaks plain HTTP.
    """

    address: str
    ca: Path | None = None

    @property
    def url(self) -> str:
        """As a client wants it."""
        return f"{'https' if self.ca else 'http'}://{self.address}"

    def trust(self) -> ssl.SSLContext | bool:
        """Whom to believe: read anew, as the SuperNode makes another one when it starts.

        Raises:
            OSError: the file is not there, or holds no certificate.
        """
        return ssl.create_default_context(cafile=self.ca) if self.ca else True


def make(folder: Path) -> None:
    """Write a certificate for this machine's loopback, its key, and an authority whose key is kept nowhere."""
    ca_key, key = certificates.new_key(), certificates.new_key()
    ca = certificates.authority(ca_key, "loopback", DAYS, SINCE)
    certificate = certificates.server_certificate(ca, ca_key, key, certificates.LOCAL, DAYS, SINCE)
    for name, content in (("server.key", key), ("server.crt", certificate), ("ca.crt", ca)):
        write_atomic(folder / name, content)  # readable for its owner alone


if __name__ == "__main__":
    make(Path(sys.argv[1]))
