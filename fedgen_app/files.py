"""Files and folders that are whole or not there: temporary name, fsync, rename."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(file: Path, data: bytes) -> None:
    """Write ``data`` so that a reader, or a crash at any moment, sees the old content or the new, never a part."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _sync_folder(file.parent)


def sync_tree(folder: Path) -> None:
    """Have every file and folder below ``folder``, and itself, on the disk."""
    for path in (*folder.rglob("*"), folder):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        elif path.is_dir():
            _sync_folder(path)


def move_in(building: Path, folder: Path) -> None:
    """Let a folder beside ``folder`` take its place; what was there is removed once the new one stands."""
    if folder.exists():
        retired = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.old."))
        try:
            os.replace(folder, retired / folder.name)
            os.replace(building, folder)
        except BaseException:
            if not folder.exists():
                os.replace(retired / folder.name, folder)
            retired.rmdir()
            raise
        shutil.rmtree(retired)
    else:
        os.replace(building, folder)
    _sync_folder(folder.parent)


@contextlib.contextmanager
def folder_atomic(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that takes its place when the block ends well."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield building
        sync_tree(building)
        building.chmod(0o755)
        move_in(building, folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def to_json(value: object) -> bytes:
    """Indented JSON; refuses NaN, which no other JSON reader accepts."""
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()
