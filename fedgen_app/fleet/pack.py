"""Cut a backbone's folder into signed chunks that any static web server can offer."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from fedgen_app.errors import SettingsError
from fedgen_app.files import folder_atomic, write_atomic
from fedgen_app.fleet import manifest
from fedgen_app.fleet.manifest import CHUNKS, LARGEST_MANIFEST, MANIFEST, SIGNATURE, Manifest, PackedFile

CHUNK_BYTES = 1024**2  # 16 s at 64 kB/s: what a cut costs where the server cannot send a part of a file


@dataclass(frozen=True)
class Packed:
    """What was packed.

    Attributes:
        left_out: Files of the folder that are no part of a backbone, each with the reason.
    """

    manifest: Manifest
    left_out: tuple[tuple[str, str], ...]


def fingerprint_of(folder: Path, task_name: str) -> str:
    """The fingerprint of a backbone's folder, as clients report it.

    Raises:
        BackboneError: it has no weights, or damaged ones.
        SettingsError: there is no such task.
    """
    from fedgen_app.learning.backbone import fingerprint, load_task
    from fedgen_app.settings import plugins

    if task_name not in plugins("tasks"):
        raise SettingsError(f"--task {task_name}: should be one of {', '.join(plugins('tasks'))}")
    task = load_task(task_name)
    return fingerprint(folder, task.weight_files(folder), task.config(folder))


def pack(folder: Path, output: Path, key_file: Path, task: str, chunk_bytes: int = CHUNK_BYTES) -> Packed:
    """Write the packed backbone; a packed one that is there already is replaced as a whole.

    Raises:
        SettingsError: the folder, the key or the place to write to is wrong.
        BackboneError: the folder holds no backbone.
    """
    if not folder.is_dir():
        raise SettingsError(f"{folder}: no such folder")
    source, target = folder.resolve(), output.resolve()
    if target.is_relative_to(source) or source.is_relative_to(target):
        raise SettingsError(f"--output {output}: should lie beside the backbone, not in it or around it")
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not (target / MANIFEST).is_file())):
        raise SettingsError(f"--output {output}: is there and no packed backbone; name another folder")
    paths = sorted(str(path.relative_to(source).as_posix()) for path in source.rglob("*") if path.is_file())
    reasons = {path: manifest.objection(path) for path in paths}
    marks = fingerprint_of(source, task)
    _check(folder, {path: (source / path).stat().st_size for path in paths if not reasons[path]}, task, chunk_bytes)
    key = manifest.private_key(key_file)  # last: where there is none, it is made
    try:
        with folder_atomic(target) as building:
            (building / CHUNKS).mkdir()
            files = [_cut(source, path, building / CHUNKS, chunk_bytes) for path in paths if not reasons[path]]
            made = Manifest(
                version=1, name=source.name, task=task, fingerprint=marks, chunk_bytes=chunk_bytes, files=tuple(files)
            )
            write_atomic(building / MANIFEST, made.to_bytes())
            write_atomic(building / SIGNATURE, manifest.sign(made.to_bytes(), key))
            for path in building.rglob("*"):
                path.chmod(0o755 if path.is_dir() else 0o644)  # a web server's user has to read it
    except OSError as error:
        raise SettingsError(f"{error.filename or output}: {error.strerror}") from None
    return Packed(made, tuple((path, reason) for path, reason in reasons.items() if reason))


def _check(folder: Path, sizes: Mapping[str, int], task: str, chunk_bytes: int) -> None:
    """Whether a manifest can be made that `pull` takes: with made-up digests, as all are of one length."""
    name = folder.resolve().name
    if not re.fullmatch(manifest.NAME, name):
        raise SettingsError(f"{folder}: its name {name!r} should be letters, digits and . _ - only; rename the folder")
    zeros = "0" * 64
    counts = {path: math.ceil(size / chunk_bytes) for path, size in sizes.items()}
    too_long = f"--chunk-size: chunks of {chunk_bytes} bytes make a manifest of more than "
    too_long += f"{LARGEST_MANIFEST // 1024**2} MiB, which no device takes; take larger ones"
    if sum(counts.values()) * len(zeros) > LARGEST_MANIFEST:
        raise SettingsError(too_long)
    try:
        files = tuple(PackedFile(path=path, bytes=sizes[path], chunks=(zeros,) * counts[path]) for path in sizes)
        marks = f"sha256:{zeros}"
        made = Manifest(version=1, name=name, task=task, fingerprint=marks, chunk_bytes=chunk_bytes, files=files)
    except ValidationError as error:
        first = error.errors()[0]
        raise SettingsError(f"{folder}: {'.'.join(map(str, first['loc']))} {first['msg']}") from None
    if len(made.to_bytes()) > LARGEST_MANIFEST:
        raise SettingsError(too_long)


def _cut(source: Path, path: str, chunks: Path, chunk_bytes: int) -> PackedFile:
    digests, size = [], 0
    with (source / path).open("rb") as stream:
        while piece := stream.read(chunk_bytes):
            digest = hashlib.sha256(piece).hexdigest()
            (chunks / digest).write_bytes(piece)
            digests.append(digest)
            size += len(piece)
    return PackedFile(path=path, bytes=size, chunks=tuple(digests))
