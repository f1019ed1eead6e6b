"""The run folder: settings, events as they happen, checkpoints, results. One place writes them, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fedgen_app.errors import AdapterError, CheckpointError, LockedError, RunError
from fedgen_app.files import folder_atomic, to_json, write_atomic
from fedgen_app.learning.adapters import Adapter, digest, load_adapter, save_adapter
from fedgen_app.settings import Value

CHECKPOINT = re.compile(r"round-(\d{4,})")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: not a JSON object")
    return value


@dataclass(frozen=True)
class Checkpoint:
    """The state after a round, in named parts, and all that is needed to go on from it."""

    number: int
    parts: dict[str, Adapter]
    facts: dict[str, Any]


class RunFolder:
    """A run's folder; at most one process writes into it."""

    def __init__(self, path: Path, keep: int) -> None:
        self.path = path
        self.keep = keep
        path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(path / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise LockedError(f"{path}: another run is writing into this folder") from None
        self._events = (path / "events.jsonl").open("a", encoding="utf-8")
        for abandoned in (path / "checkpoints").glob(".round-*"):  # a run was killed while it saved
            shutil.rmtree(abandoned)

    def close(self) -> None:
        """Let another process write here."""
        self._events.close()
        self._lock.release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def event(self, kind: str, **fields: object) -> None:
        """Append one line to events.jsonl; the command line shows progress from it."""
        line = json.dumps({"time": round(time.time(), 3), "event": kind, **fields}, allow_nan=False)
        try:
            self._events.write(line + "\n")
            self._events.flush()
        except OSError as error:
            raise RunError(f"cannot write {self.path / 'events.jsonl'}: {error.strerror}") from error

    def write_settings(self, flat: Mapping[str, Value]) -> None:
        """settings.json: every setting, so that `fedgen resume` needs nothing else."""
        write_atomic(self.path / "settings.json", to_json(dict(flat)))

    def write_results(self, results: Mapping[str, Any]) -> None:
        """results.json, as the contract describes it."""
        write_atomic(self.path / "results.json", to_json(results))

    def save_checkpoint(self, number: int, parts: Mapping[str, Adapter], facts: Mapping[str, Any]) -> None:
        """checkpoints/round-<number>/: whole or not at all; older ones beyond ``keep`` are removed afterwards.

        Raises:
            RunError: it cannot be written (a full disk); the last good one is still there.
        """
        folder = self.path / "checkpoints" / f"round-{number:04d}"
        try:
            with folder_atomic(folder) as building:
                digests = {}
                for part, tensors in parts.items():
                    if tensors:
                        save_adapter(tensors, building / f"{part}.safetensors")
                        digests[part] = digest(tensors)
                body = {"round": number, "digests": digests, **facts}
                seal = hashlib.sha256(to_json(body)).hexdigest()
                write_atomic(building / "state.json", to_json({"sha256": seal, **body}))
        except OSError as error:
            raise RunError(
                f"cannot save the checkpoint of round {number} in {self.path}: {error.strerror}; free some space, "
                f"then: fedgen resume {self.path}"
            ) from error
        for old in checkpoint_numbers(self.path)[: -self.keep]:
            remove_checkpoint(self.path, old)


def checkpoint_numbers(path: Path) -> list[int]:
    """Rounds that have a checkpoint, oldest first."""
    folder = path / "checkpoints"
    names = [CHECKPOINT.fullmatch(f.name) for f in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match[1]) for match in names if match)


def remove_checkpoint(path: Path, number: int) -> None:
    """Delete one checkpoint; state.json goes first, so that a half-deleted one is never taken for whole."""
    folder = path / "checkpoints" / f"round-{number:04d}"
    (folder / "state.json").unlink(missing_ok=True)
    shutil.rmtree(folder)


def load_checkpoint(path: Path, number: int | None = None) -> Checkpoint | None:
    """The newest checkpoint, or that of one round; None where there is none at all.

    Raises:
        CheckpointError: it is damaged or missing; names the one before it, which the user may ask for.
    """
    # A folder without state.json was being deleted when the run ended: it never was the newest good one.
    checkpoints = path / "checkpoints"
    numbers = [n for n in checkpoint_numbers(path) if (checkpoints / f"round-{n:04d}" / "state.json").exists()]
    if number is None:
        if not numbers:
            return None
        number = numbers[-1]
    folder = checkpoints / f"round-{number:04d}"
    try:
        return _read_checkpoint(folder, number)
    except (AdapterError, CheckpointError) as error:
        older = [n for n in numbers if n < number]
        offer = f"; the one before it: fedgen resume {path} --round {older[-1]}" if older else ""
        raise CheckpointError(f"checkpoint of round {number} refused: {error}{offer}") from None


def _read_checkpoint(folder: Path, number: int) -> Checkpoint:
    facts = read_json(folder / "state.json")
    seal = facts.pop("sha256", None)
    if seal != hashlib.sha256(to_json(facts)).hexdigest():
        raise CheckpointError(f"{folder / 'state.json'} was altered: its checksum does not match")
    parts = {}
    for part, expected in facts["digests"].items():
        file = folder / f"{part}.safetensors"
        parts[part] = load_adapter(file)
        if digest(parts[part]) != expected:
            raise CheckpointError(f"{file} was altered: its checksum does not match")
    if facts["round"] != number:
        raise CheckpointError(f"{folder} holds round {facts['round']}")
    return Checkpoint(number, parts, facts)
