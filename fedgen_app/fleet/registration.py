"""Let the SuperLink know exactly the devices of a fleet: their public keys, none of the removed, none of the old."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from filelock import FileLock, Timeout

from fedgen_app.engines import keeper
from fedgen_app.errors import LockedError, RunError, SettingsError
from fedgen_app.files import to_json, write_atomic

RECORD, LOCK = "registered.json", ".lock"
GONE = "unregistered"  # Flower's status of a node whose key it does not take again
TIMEOUT = 60.0  # seconds for one answer of the SuperLink
STARTING = 60.0  # seconds in which one that was just started may not listen yet
UNAVAILABLE = "SuperLink is unavailable"  # what Flower says of it then


@dataclass(frozen=True)
class Change:
    """One thing that was done or found: "registered", "unregistered" or "already registered", and the device."""

    device: str
    what: str


def register(folder: Path, superlink: str, again: bool = False) -> Iterator[Change]:
    """Bring the SuperLink's list in line with ``devices/*.pub``; what was done stands in ``registered.json``.

    The record says which nodes are ours to unregister; where it and the SuperLink differ, the SuperLink is right. A key
    that was unregistered cannot come back, so a node that neither knows is named and left alone.

    Args:
        folder: The installed server's folder, or ``server/`` of the fleet's.
        superlink: The connection in Flower's config.toml.
        again: The SuperLink's database is new: register all, unregister none.

    Raises:
        SettingsError: the folder has no devices, or what is no public key, or one that was unregistered before.
        RunError: the SuperLink does not do it; what was done before stays noted.
    """
    keys = {file.stem: file.resolve() for file in sorted((folder / "devices").glob("*.pub"))}
    if not keys:
        raise SettingsError(f"{folder}: no devices/*.pub; name the folder of the server (docs/deploy.md)")
    try:
        with FileLock(folder / LOCK, timeout=0):
            marks = {device: hashlib.sha256(file.read_bytes()).hexdigest() for device, file in keys.items()}
            pems = {_pem(file): device for device, file in keys.items()}
            nodes = _nodes(superlink)
            if lost := [pems[n["key"]] for n in nodes if n["status"] == GONE and n["key"] in pems]:
                raise SettingsError(
                    f"device {lost[0]}: its key was unregistered here, and Flower takes no key twice: fedgen provision "
                    f"... --new-key {lost[0]}, install server and device again"
                )
            live = {n["node"]: n for n in nodes if n["status"] != GONE}
            known = {d: entry for d, entry in ({} if again else _known(folder)).items() if entry["node"] in live}
            ours = {entry["node"] for entry in known.values()}
            for number, node in live.items():
                if number not in ours and (device := pems.get(node["key"])):
                    known[device] = {"node": number, "key": marks[device]}
                    yield Change(device, "already registered")
                elif number not in ours:
                    named = f"{number} ({node['name'] or 'no name'}), which is not of this folder"
                    yield Change(f"{named}; to remove it: flwr supernode unregister {number} {superlink}", "left: node")
            write_atomic(folder / RECORD, to_json(known))
            for device in [d for d, entry in known.items() if entry["key"] != marks.get(d)]:
                _flwr("supernode", "unregister", str(known[device]["node"]), superlink)
                del known[device]
                write_atomic(folder / RECORD, to_json(known))
                yield Change(device, "unregistered")
            for device in [d for d in keys if d not in known]:
                answer = _flwr("supernode", "register", str(keys[device]), superlink, "--name", device)
                known[device] = {"node": str(answer["node-id"]), "key": marks[device]}
                write_atomic(folder / RECORD, to_json(known))
                yield Change(device, "registered")
    except Timeout:
        raise LockedError(f"{folder}: another process is at it") from None
    except OSError as error:
        raise SettingsError(f"{error.filename or folder}: {error.strerror}") from None


def _pem(file: Path) -> str:
    """A public key as the SuperLink keeps it."""
    try:
        key = serialization.load_ssh_public_key(file.read_bytes())
    except ValueError as error:
        raise SettingsError(f"{file}: not a public key: {error}") from None
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_bytes(serialization.Encoding.PEM, form).decode()


def _nodes(superlink: str) -> list[dict[str, str]]:
    """All that the SuperLink knows, those that it has unregistered too: ``node``, ``name``, ``key`` and ``status``.

    It is asked first, so this waits for one that starts.
    """
    end = time.monotonic() + STARTING
    while True:
        try:
            return list(_answer([sys.executable, "-P", "-m", "fedgen_app.fleet.nodes", superlink])["nodes"])
        except RunError as error:
            if UNAVAILABLE not in str(error) or time.monotonic() > end:
                raise
        time.sleep(1.0)


def _known(folder: Path) -> dict[str, dict[str, str]]:
    file = folder / RECORD
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {str(d): {"node": str(entry["node"]), "key": str(entry["key"])} for d, entry in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SettingsError(f"{file}: damaged: {error}") from None


def _flwr(*arguments: str) -> Mapping[str, Any]:
    """One answer of ``flwr ... --format json``."""
    return _answer([keeper.program("flwr"), *arguments, "--format", "json"])


def _answer(command: list[str]) -> Mapping[str, Any]:
    """What a program that speaks to the SuperLink prints as JSON."""
    said_as = " ".join(command[1:])
    try:
        ended = subprocess.run(
            command,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            env=keeper.own_environment(),
            cwd="/",  # as in engines/flower.py
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        raise RunError(f"the SuperLink did not answer within {TIMEOUT:g} s: {said_as}") from None
    try:
        answer = json.loads(ended.stdout)
    except ValueError:
        answer = {}
    if ended.returncode or not isinstance(answer, dict) or not answer.get("success"):
        said = answer.get("error-message") or keeper.last_lines(ended.stderr + ended.stdout)
        raise RunError(f"{Path(command[0]).name} {said_as}: {str(said).strip() or keeper.ended_with(ended.returncode)}")
    return answer
