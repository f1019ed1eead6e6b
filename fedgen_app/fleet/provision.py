"""Make a fleet's folder, or bring it up to date with its fleet file; keys that are there stay.

fleet.json            that this is one, and of which devices
ca/                   the authority: ca.key never leaves this machine
clusters/             the secret of all devices, where the fleet file wants one; the server never gets it
server/  server.tar   what the server gets
operator/             a connection for `flwr`, where the server lets operators in
devices/<id>/  devices/<id>.tar
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from fedgen_app.errors import LockedError, SettingsError
from fedgen_app.files import to_json, write_atomic
from fedgen_app.fleet import certificates, render
from fedgen_app.fleet.registration import LOCK, RECORD
from fedgen_app.fleet.spec import Fleet

SECRET_BYTES = 48
CLUSTER_KEY_BYTES = 32
MARK = "fleet.json"
IGNORE = ".gitignore"  # of everything: whoever keeps the fleet file under version control does not keep its keys there
SOON = 30  # days before the end of a certificate in which it is told
RESTORE = "put your copy of it back; if there is none, name a new folder with --output and install all machines"
KEPT = (RECORD, LOCK)  # of `fedgen register`, where that is given this folder: what the SuperLink knows is not ours


@dataclass(frozen=True)
class Outcome:
    """What was done.

    Attributes:
        ca_renewed, server_renewed: Why the certificate is new, or "".
        changed: Machines ("server" or a device) whose archive has other content than before.
    """

    ca_days: int
    server_days: int
    ca_renewed: str
    server_renewed: str
    new: tuple[str, ...]
    rekeyed: tuple[str, ...]
    kept: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]


def provision(
    fleet: Fleet, output: Path, renew: bool = False, new_keys: Collection[str] = (), new_cluster_key: bool = False
) -> Outcome:
    """Write everything.

    Args:
        renew: Make the server's certificate, its key and the SuperExec's secret anew, and the authority's certificate
            where it would end before the server's.
        new_keys: Devices that get another key.
        new_cluster_key: Make the devices' common key anew.

    Raises:
        SettingsError: the folder is something else, cannot be written, there is no such device, the fleet has no
            common key or a damaged one, or the authority's key is missing where something has to be signed.
        LockedError: another process is at it.
    """
    if new_cluster_key and not fleet.cluster_key:
        raise SettingsError("--new-cluster-key: the fleet file does not say cluster-key = true")
    _check(fleet, output, new_keys)
    try:
        output.mkdir(parents=True, exist_ok=True, mode=0o700)
        output.chmod(0o700)
        with FileLock(output / ".lock", timeout=0):
            return _write(fleet, output, renew, new_keys, new_cluster_key)
    except Timeout:
        raise LockedError(f"{output}: another process is writing there") from None
    except OSError as error:
        raise SettingsError(f"{error.filename or output}: {error.strerror}") from None


def _check(fleet: Fleet, output: Path, new_keys: Collection[str]) -> None:
    here = {device.id for device in fleet.device}
    if unknown := sorted(set(new_keys) - here):
        raise SettingsError(f"--new-key {unknown[0]}: no such device in the fleet file ({', '.join(sorted(here))})")
    if output.exists() and not output.is_dir():
        raise SettingsError(f"--output {output}: is a file")
    others = [p.name for p in output.iterdir() if p.name not in (".lock", IGNORE)] if output.is_dir() else []
    if not others:
        return
    if MARK not in others:
        raise SettingsError(f"--output {output}: is not empty and holds no fleet; name a new folder")
    try:
        name = json.loads((output / MARK).read_text(encoding="utf-8"))["name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingsError(f"{output / MARK}: damaged: {error}") from None
    if name != fleet.name:
        raise SettingsError(f"name = {fleet.name!r}: --output {output} holds the fleet {name!r}")


def _write(fleet: Fleet, output: Path, renew: bool, new_keys: Collection[str], new_cluster_key: bool) -> Outcome:
    write_atomic(output / IGNORE, b"*\n")
    write_atomic(output / MARK, to_json({"schema": 1, "name": fleet.name, "devices": [d.id for d in fleet.device]}))
    ca_renewed, ca = _authority(fleet, output / "ca", renew)
    reason, secret_files = _server(fleet, output, ca, renew)
    here = {device.id: output / "devices" / device.id for device in fleet.device}
    there = (
        {path.name for path in (output / "devices").iterdir() if path.is_dir()}
        if (output / "devices").is_dir()
        else set()
    )
    removed = sorted(there - set(here))
    new = tuple(device for device, folder in here.items() if not (folder / "device.key").exists())
    rekeyed = tuple(device for device in here if device in new_keys and device not in new)
    cluster_key = _cluster_key(output / "clusters", new_cluster_key) if fleet.cluster_key else b""
    public, changed = {}, []
    for device in fleet.device:
        file = here[device.id] / "device.key"
        key = certificates.new_device_key() if device.id in (*new, *rekeyed) else file.read_bytes()
        public[device.id] = certificates.device_public_key(key, device.id)
        files = render.device_files(fleet, device, ca, key, cluster_key)
        if _place(output / "devices", device.id, files, f"fedgen-{device.id}"):
            changed.append(device.id)
    for gone in removed:
        shutil.rmtree(output / "devices" / gone)
        (output / "devices" / f"{gone}.tar").unlink(missing_ok=True)
    if _place(output, "server", render.server_files(fleet, secret_files, public), "fedgen-server"):
        changed.append("server")
    _operator(fleet, output / "operator", ca)
    return Outcome(
        ca_days=certificates.days_left(ca),
        server_days=certificates.days_left(secret_files["server.crt"]),
        ca_renewed=ca_renewed,
        server_renewed=reason,
        new=new,
        rekeyed=rekeyed,
        kept=tuple(device for device in here if device not in (*new, *rekeyed)),
        removed=tuple(removed),
        changed=tuple(changed),
    )


def _authority(fleet: Fleet, folder: Path, renew: bool) -> tuple[str, bytes]:
    """Why the authority's certificate is new, and what it is. Its key stays, so what it signed stays valid."""
    key_file, file, days = folder / "ca.key", folder / "ca.crt", fleet.certificates.ca_days
    reason = "it is the first"
    if file.exists():
        there = _read(file, certificates.days_left)
        if not (renew and certificates.days_left(there) <= max(fleet.certificates.server_days, SOON)):
            return "", there
        reason = "--renew"
    elif not key_file.exists():
        _put(key_file, certificates.new_key(), render.SECRET)
    _put(file, certificates.authority(_authority_key(folder), fleet.name, days), render.PUBLIC)
    return reason, file.read_bytes()


def _cluster_key(folder: Path, anew: bool) -> bytes:
    """What turns the encoded requirements of all devices alike; made once, as clusters are formed with it.

    Raises:
        SettingsError: the file that is there holds no such key.
    """
    from fedgen_app.federation.protection import read_key  # which imports numpy

    file = folder / render.CLUSTER_KEY
    if anew or not file.exists():
        _put(file, base64.b64encode(secrets.token_bytes(CLUSTER_KEY_BYTES)) + b"\n", render.SECRET)
    read_key(file)
    return file.read_bytes()


def _authority_key(folder: Path) -> bytes:
    """What signs. Another one in its place would make an authority that no installed device trusts."""
    file = folder / "ca.key"
    if not file.exists():
        raise SettingsError(f"{file}: is missing beside ca.crt, and something has to be signed: {RESTORE}")
    return _read(file, certificates.load_key)


def _read(file: Path, parse: Callable[[bytes], object]) -> bytes:
    """A file of the authority, which nothing here can make again."""
    content = file.read_bytes()
    try:
        parse(content)
    except ValueError as error:
        raise SettingsError(f"{file}: damaged: {error}; {RESTORE}") from None
    return content


def _server(fleet: Fleet, output: Path, ca: bytes, renew: bool) -> tuple[str, dict[str, bytes]]:
    """Why the server's certificate is new (or ""), and the server's own files."""
    folder, hosts = output / "server", fleet.server.hosts
    names = ("server.crt", "server.key", "superexec.secret")
    there = {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}
    if first := len(there) < len(names):
        reason = "it is the first"
    elif renew:
        reason = "--renew"
    elif not certificates.belongs_to(there["server.crt"], there["server.key"]):  # a run that was ended between the two
        reason = "it was damaged, or not for its key"
    elif not certificates.same_hosts(there["server.crt"], hosts):
        reason = "server.hosts changed"
    else:
        return "", there | {"ca.crt": ca}
    key, ca_key = certificates.new_key(), _authority_key(output / "ca")
    days = min(fleet.certificates.server_days, max(1, certificates.days_left(ca)))
    files = there | {"server.key": key, "server.crt": certificates.server_certificate(ca, ca_key, key, hosts, days)}
    if first or renew:
        files["superexec.secret"] = secrets.token_bytes(SECRET_BYTES)
    return reason, files | {"ca.crt": ca}


def _operator(fleet: Fleet, folder: Path, ca: bytes) -> None:
    """A Flower home for operators elsewhere; on the server itself its own one serves."""
    if not fleet.server.operators and fleet.server.proxy:
        shutil.rmtree(folder, ignore_errors=True)
        return
    _put(folder / "ca.crt", ca, render.PUBLIC)
    entry = render.connection(fleet, fleet.server.address, str((folder / "ca.crt").resolve()))
    _put(folder / "config.toml", entry.encode(), render.SECRET)


def _place(parent: Path, name: str, files: render.Files, inside: str) -> bool:
    """A machine's folder with these files and none of an older time, and its archive; whether that is another now."""
    folder = parent / name
    for relative, file in files.items():
        _put(folder / relative, file.content, file.mode)
    for path in sorted(folder.rglob("*")):
        if path.is_file() and str(path.relative_to(folder)) not in (*files, *KEPT):
            path.unlink()
    return _put(parent / f"{name}.tar", render.archive(inside, files), render.SECRET)


def _put(file: Path, content: bytes, mode: int) -> bool:
    """Whether the file had to be written."""
    for folder in reversed(file.parents):
        folder.mkdir(exist_ok=True, mode=0o700)
    if new := not (file.exists() and file.read_bytes() == content):
        write_atomic(file, content)  # which makes it readable for its owner alone
    os.chmod(file, mode)
    return new
