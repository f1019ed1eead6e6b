"""Install a packed backbone from a web server: whole and verified, or not at all; a cut download goes on.

Everything is gathered in ``.<name>.partial`` beside the folder and takes the folder's place by a rename. A partial
folder that is found is not trusted: its chunks are verified like those that arrive.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from fedgen_app.errors import BackboneError, LockedError, SettingsError
from fedgen_app.files import move_in, sync_tree
from fedgen_app.fleet import manifest
from fedgen_app.fleet.manifest import CHUNKS, LARGEST_MANIFEST, MANIFEST, SIGNATURE, Manifest, PackedFile
from fedgen_app.fleet.pack import fingerprint_of
from fedgen_app.fleet.source import Source

MOST_BYTES = 64 * 1000**3
SPARE_BYTES = 64 * 1000**2  # that stay free on the disk


@dataclass(frozen=True)
class Installed:
    """What lies in the folder now.

    Attributes:
        fetched: Bytes of chunks that came over the net this time.
        was_there: Whether the folder held exactly this before.
    """

    manifest: Manifest
    fetched: int
    was_there: bool


def pull(
    source: Source,
    folder: Path,
    key_file: Path,
    most_bytes: int = MOST_BYTES,
    replace: bool = False,
    report: Callable[[int, int], None] = lambda done, of: None,
) -> Installed:
    """Install what a source offers.

    Args:
        most_bytes: Of all files together; a manifest that says more is refused.
        replace: Whether another backbone in the folder may be replaced.
        report: Called with bytes that are there and bytes in all.

    Raises:
        SettingsError: the key is none, or the folder holds something else.
        BackboneError: what is offered is refused, not to be had, or does not fit on the disk. What came is kept.
        LockedError: another process installs there.
    """
    key = manifest.public_key(key_file)
    try:
        _make_parents(folder)
        with FileLock(folder.parent / f".{folder.name}.lock", timeout=0):
            content, signature = source.small(MANIFEST, LARGEST_MANIFEST), source.small(SIGNATURE, 1024)
            offered = manifest.verified(content, signature, key)
            if offered.total > most_bytes:
                raise BackboneError(f"the backbone has {offered.total} bytes, at most {most_bytes} are taken (--most)")
            if folder.exists() and _holds(folder, offered):
                return Installed(offered, 0, was_there=True)
            if folder.exists() and not replace:
                raise SettingsError(f"--to {folder}: is there and something else; --replace puts the new one there")
            _gather(source, offered, folder, report)
            return Installed(offered, source.fetched, was_there=False)
    except Timeout:
        raise LockedError(f"{folder}: another process is installing there") from None
    except OSError as error:
        place = error.filename or folder
        raise BackboneError(f"{place}: {error.strerror}; what came is kept, the same command goes on") from None


def _make_parents(folder: Path) -> None:
    """The folders above, those that are new open to all as what will lie below."""
    new = [parent for parent in folder.parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    for parent in new:
        parent.chmod(0o755)


def _gather(source: Source, offered: Manifest, folder: Path, report: Callable[[int, int], None]) -> None:
    partial = folder.parent / f".{folder.name}.partial"
    partial.mkdir(exist_ok=True, mode=0o700)
    wanted = {partial / file.path for file in offered.files}
    for path in sorted(partial.rglob("*")):
        if (path.is_file() or path.is_symlink()) and (path not in wanted or path.is_symlink()):
            path.unlink()  # of an earlier version
    there = sum(path.stat().st_size for path in wanted if path.exists())
    free = shutil.disk_usage(partial).free
    if (needed := offered.total - there + SPARE_BYTES) > free:
        raise BackboneError(f"{folder.parent}: {free} bytes are free, {needed} are needed")
    done = 0
    for file in offered.files:
        (partial / file.path).parent.mkdir(parents=True, exist_ok=True)
        (partial / file.path).touch()
        with (partial / file.path).open("r+b") as stream:
            for index in range(_verified_chunks(stream, offered, file), len(file.chunks)):
                begin = index * offered.chunk_bytes
                report(done + begin, offered.total)
                digest = file.chunks[index]
                source.append(f"{CHUNKS}/{digest}", digest, offered.size_of(file, index), stream, begin)
            stream.truncate(file.bytes)
        done += file.bytes
    report(done, offered.total)
    if (found := fingerprint_of(partial, offered.task)) != offered.fingerprint:
        shutil.rmtree(partial)
        raise BackboneError(f"the files' fingerprint is {found}, the manifest says {offered.fingerprint}")
    _remove_empty(partial)
    for path in (partial, *partial.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)  # who trains is another user than who pulls, whatever the umask
    sync_tree(partial)
    move_in(partial, folder)


def _verified_chunks(stream: BinaryIO, offered: Manifest, file: PackedFile) -> int:
    """How many of a file's first chunks are there; what follows them is cut off, but for the part of one chunk."""
    for index, digest in enumerate(file.chunks):
        begin, size = index * offered.chunk_bytes, offered.size_of(file, index)
        stream.seek(begin)
        piece = stream.read(size)
        if hashlib.sha256(piece).hexdigest() != digest:
            stream.truncate(begin + (len(piece) if len(piece) < size else 0))
            return index
    return len(file.chunks)


def _holds(folder: Path, offered: Manifest) -> bool:
    """Whether a folder has exactly the files of a manifest."""
    there = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    if not folder.is_dir() or set(there) != {file.path for file in offered.files}:
        return False
    for file in offered.files:
        if there[file.path].stat().st_size != file.bytes:
            return False
        with there[file.path].open("rb") as stream:
            for digest in file.chunks:
                if hashlib.sha256(stream.read(offered.chunk_bytes)).hexdigest() != digest:
                    return False
    return True


def _remove_empty(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
