"""Let the SuperLink know exactly the devices of a fleet: their public keys, none of the removed, none of the old."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from fedgen_app.engines import keeper
from fedgen_app.errors import LockedError, RunError, SettingsError
from fedgen_app.files import to_json, write_atomic

RECORD, LOCK = "registered.json", ".lock"
TIMEOUT = 60.0  # seconds for one answer of the SuperLink


@dataclass(frozen=True)
class Change:
    """One thing that was done: a device and "registered" or "unregistered"."""

    device: str
    what: str


def register(folder: Path, superlink: str, again: bool = False) -> Iterator[Change]:
    """Bring the SuperLink's list in line with ``devices/*.pub``; what was done stands in ``registered.json``.

    Args:
        folder: The installed server's folder, or ``server/`` of the fleet's.
        superlink: The connection in Flower's config.toml.
        again: The SuperLink's database is new: register all, unregister none.

    Raises:
        SettingsError: the folder has no devices.
        RunError: the SuperLink does not do it; what was done before stays noted.
    """
    keys = {file.stem: file for file in sorted((folder / "devices").glob("*.pub"))}
    if not keys:
        raise SettingsError(f"{folder}: no devices/*.pub; name the folder of the server (docs/deploy.md)")
    try:
        with FileLock(folder / LOCK, timeout=0):
            known = {} if again else _known(folder)
            marks = {device: hashlib.sha256(file.read_bytes()).hexdigest() for device, file in keys.items()}
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


def _known(folder: Path) -> dict[str, dict[str, str]]:
    file = folder / RECORD
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {str(d): {"node": str(entry["node"]), "key": str(entry["key"])} for d, entry in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SettingsError(f"{file}: damaged: {error}") from None


def _flwr(*arguments: str) -> dict[str, object]:
    """One answer of ``flwr ... --format json``."""
    command = [keeper.program("flwr"), *arguments, "--format", "json"]
    try:
        ended = subprocess.run(
            command, capture_output=True, stdin=subprocess.DEVNULL, env=keeper.own_environment(), timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        raise RunError(f"the SuperLink did not answer within {TIMEOUT:g} s: {' '.join(arguments)}") from None
    try:
        answer = json.loads(ended.stdout)
    except ValueError:
        answer = {}
    if ended.returncode or not isinstance(answer, dict) or not answer.get("success"):
        said = answer.get("error-message") or keeper.last_lines(ended.stderr + ended.stdout)
        raise RunError(f"flwr {' '.join(arguments)}: {str(said).strip() or os.strerror(ended.returncode)}")
    return answer
