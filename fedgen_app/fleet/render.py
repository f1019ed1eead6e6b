"""What a fleet's machines get: each file's name, mode and content, from the templates beside this module."""

from __future__ import annotations

import io
import json
import shlex
import string
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from fedgen_app.fleet.certificates import is_address
from fedgen_app.fleet.spec import Device, Fleet, is_loopback, joined

TEMPLATES = Path(__file__).parent / "templates"
USER = "fedgen"
CLUSTER_KEY = "cluster.key"
# Beside what training may take: Python, torch and the SuperNode's own process, 0.4 GB each, and some room.
ROOM = 2 * 1024**3
# Of the worker's service. The code comes from the server; with a backbone on the device it has no use for the net.
OWN_LOOPBACK = "IPAddressDeny=any\nIPAddressAllow=localhost"
ANY_NET = "# The backbone may have to be fetched from a hub: no limit to addresses."
SECRET, PUBLIC, PROGRAM = 0o600, 0o644, 0o755


@dataclass(frozen=True)
class File:
    """One file of an archive."""

    content: bytes
    mode: int


Files = dict[str, File]


class _Template(string.Template):
    """``@{name}``: shells and nginx have their own use for the dollar."""

    delimiter = "@"
    pattern = r"(?P<escaped>(?!))|(?P<named>(?!))|@\{(?P<braced>[a-z_]+)\}|(?P<invalid>(?!))"  # type: ignore[assignment]


def _template(name: str, values: Mapping[str, object]) -> str:
    return _Template((TEMPLATES / name).read_text(encoding="utf-8")).substitute(values)


def toml(table: Mapping[str, object]) -> str:
    """Texts, numbers and truth values as TOML lines. A JSON text is a TOML text, but for DEL."""
    return "".join(f"{json.dumps(key)} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in table.items())


def superlink_address(fleet: Fleet) -> str:
    """Where the SuperLink itself listens."""
    first = fleet.server.hosts[0]
    host = first if not fleet.server.proxy and is_address(first) and is_loopback(first) else "127.0.0.1"
    return joined(host, fleet.server.superlink_port)


def connection(fleet: Fleet, address: str, ca: str) -> str:
    """Flower's ``config.toml`` with the one connection that has the fleet's name."""
    entry = toml({"address": address, "root-certificates": ca})
    return f"[superlink]\n{toml({'default': fleet.name})}\n[superlink.{fleet.name}]\n{entry}"


def _common(fleet: Fleet) -> dict[str, object]:
    host, _, port = superlink_address(fleet).rpartition(":")
    return {
        "name": fleet.name,
        "user": USER,
        "version": version("fedgen-edge"),
        "config": fleet.paths.config,
        "state": fleet.paths.state,
        "environment": fleet.paths.environment,
        "superlink_host": host.strip("[]"),
        "superlink_port": port,
        "superlink_address": superlink_address(fleet),
    }


def _installer(name: str, values: Mapping[str, object]) -> File:
    common = _template("install-common.sh", values)
    return File(_template(name, {**values, "common": common}).encode(), PROGRAM)


def _starter(name: str, values: Mapping[str, object], home: str) -> File:
    common = _template("start-common.sh", {**values, "home": home}).rstrip("\n")
    return File(_template(name, {**values, "common": common}).encode(), PROGRAM)


def node_config(fleet: Fleet, device: Device) -> dict[str, object]:
    """What the SuperNode tells its ClientApp."""
    state, config = f"{fleet.paths.state}/{device.id}", f"{fleet.paths.config}/{device.id}"
    wanted = {
        "backbone": device.backbone,
        "rank": device.rank,
        "memory": device.memory,
        "backbone-bits": device.backbone_bits,
        "threads": device.threads,
        "prompts": device.prompts,
        "cluster-key": device.cluster_key or (f"{config}/{CLUSTER_KEY}" if fleet.cluster_key else ""),
        "cluster-noise": device.cluster_noise,
        "cluster-encoder": device.cluster_encoder,
    }
    return {
        "client-id": device.id,
        "data": device.data,
        **{key: value for key, value in wanted.items() if value},
        "state-dir": f"{state}/adapters",
        "policy": f"{config}/policy.toml",
    }


def device_files(fleet: Fleet, device: Device, ca: bytes, key: bytes, cluster_key: bytes = b"") -> Files:
    """All that one device gets: its own key, the devices' common one where there is one, and nobody else's secret."""
    values = _common(fleet) | {
        "id": device.id,
        "address": fleet.server.address,
        "port": device.port,
        "data": shlex.quote(device.data),
        "paths": " ".join(shlex.quote(path) for path in device.paths().values()),
        "warm": "yes" if device.warm else "no",
        "common_key": "yes" if cluster_key and not device.cluster_key else "no",
        "limits": f"MemoryMax={device.memory + ROOM}"
        if device.memory
        else "# No memory in the fleet file: no MemoryMax.",
        "net": OWN_LOOPBACK if _here(device.backbone) and _here(device.cluster_encoder or "bundled") else ANY_NET,
        "programs": "fedgen-supernode fedgen" if device.warm else "fedgen-supernode flower-superexec flwr-clientapp",
    }
    files = {
        "ca.crt": File(ca, PUBLIC),
        "device.key": File(key, SECRET),
        "node.toml": File(toml(node_config(fleet, device)).encode(), SECRET),
        "policy.toml": File(_template("policy.toml", values).encode(), SECRET),
        "install.sh": _installer("install-device.sh", values),
    }
    if cluster_key and not device.cluster_key:
        files[CLUSTER_KEY] = File(cluster_key, SECRET)
    for name in ("supernode", "worker") if device.warm else ("supernode",):
        files[f"{name}.sh"] = _starter(f"{name}.sh", values, f"{fleet.paths.state}/{device.id}")
        files[f"fedgen-{name}-{device.id}.service"] = File(_template(f"{name}.service", values).encode(), PUBLIC)
    return files


def _here(source: str) -> bool:
    """Whether a model of the fleet file lies on the device."""
    return source.startswith("/") or source in ("bundled", "backbone")


def server_files(fleet: Fleet, secrets: Mapping[str, bytes], public_keys: Mapping[str, bytes]) -> Files:
    """All that the server gets: its certificate and secret, and of the devices the public keys alone.

    Args:
        secrets: ``ca.crt``, ``server.crt``, ``server.key`` and ``superexec.secret``.
        public_keys: By device.
    """
    values = _common(fleet) | {"programs": "flower-superlink flower-superexec flwr-serverapp flwr fedgen"}
    values |= {"port": fleet.server.port, "names": " ".join(_nginx_name(host) for host in fleet.server.hosts)}
    values["devices"] = " ".join(public_keys)
    values["proxy"] = _template("install-proxy.sh", values) if fleet.server.proxy else ""
    files = {
        "ca.crt": File(secrets["ca.crt"], PUBLIC),
        "server.crt": File(secrets["server.crt"], PUBLIC),
        "server.key": File(secrets["server.key"], SECRET),
        "superexec.secret": File(secrets["superexec.secret"], SECRET),
        "config.toml": File(
            connection(fleet, superlink_address(fleet), f"{fleet.paths.config}/server/ca.crt").encode(), SECRET
        ),
        "install.sh": _installer("install-server.sh", values),
    }
    for name in ("superlink", "superexec"):
        files[f"{name}.sh"] = _starter(f"{name}.sh", values, f"{fleet.paths.state}/server")
        files[f"fedgen-{name}.service"] = File(_template(f"{name}.service", values).encode(), PUBLIC)
    for device, key in public_keys.items():
        files[f"devices/{device}.pub"] = File(key, PUBLIC)
    if fleet.server.proxy:
        allow = "\n".join(f"        allow {network};" for network in fleet.server.operators)
        values["control"] = _template("nginx-control.conf", {"allow": allow}) if allow else ""
        files["nginx.conf"] = File(_template("nginx.conf", values).encode(), PUBLIC)
    return files


def _nginx_name(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def archive(folder: str, files: Files) -> bytes:
    """A tar of the files under one folder; the same files give the same bytes, owned by root."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, file in sorted(files.items()):
            entry = tarfile.TarInfo(f"{folder}/{name}")
            entry.size, entry.mode = len(file.content), file.mode
            tar.addfile(entry, io.BytesIO(file.content))
    return stream.getvalue()
