"""Arrays computed once per machine and shared by every process that needs them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

import fedgen_assets
from fedgen_app.data.local import files_below
from fedgen_app.errors import DataError

logger = logging.getLogger(__name__)

PATIENCE = 30.0  # seconds until a wait for another process is told
Arrays = dict[str, NDArray[Any]]

# safetensors' names for the types that numpy knows as well; its files are little-endian.
_DTYPES = {
    "BOOL": np.dtype("?"),
    **{f"U{8 * size}": np.dtype(f"<u{size}") for size in (1, 2, 4, 8)},
    **{f"I{8 * size}": np.dtype(f"<i{size}") for size in (1, 2, 4, 8)},
    **{f"F{8 * size}": np.dtype(f"<f{size}") for size in (2, 4, 8)},
}


def cached(kind: str, key: Mapping[str, object], build: Callable[[], Arrays]) -> Arrays:
    """Give the arrays that ``build`` returns, from the machine's cache where they were built before.

    kind: the start of the file's name; key: everything that the arrays depend on, JSON values. The arrays are
    mapped from the file, so that processes share their memory; writing into one changes this process's copy
    alone. A damaged file is built again with a warning. Two processes that ask at once build once; a long wait for the
    other is told in the log.

    The folder is $FEDGEN_CACHE, else $XDG_CACHE_HOME/fedgen, else ~/.cache/fedgen; raises DataError where it
    cannot be written.
    """
    canonical = json.dumps(key, sort_keys=True, separators=(",", ":"), allow_nan=False)
    digest = hashlib.sha256(canonical.encode()).hexdigest()[:24]
    folder = _folder()
    file = folder / f"{kind}-{digest}.safetensors"
    if file.exists() and (arrays := _mapped(file)) is not None:
        return arrays
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file.with_suffix(".lock"))
        try:
            lock.acquire(timeout=PATIENCE)
        except Timeout:
            logger.warning("waiting for %s: another process is building it, or hangs and should be ended", file)
            lock.acquire()
    try:
        if file.exists():  # built by another process meanwhile, or damaged
            if (arrays := _mapped(file)) is not None:
                return arrays
            logger.warning("%s is damaged and is built again", file)
        arrays = build()
        with _writing(folder):
            _save(arrays, file)
    finally:
        lock.release()
    written = _mapped(file)
    if written is None:
        raise DataError(f"{file} was written but cannot be read back; FEDGEN_CACHE names another folder")
    return written


def source_identity(source: str, split: str, bundled: str) -> str:
    """What a cache of a local source hangs on: a digest of its files' names, sizes and times, and of the split.

    source: "bundled", whose files are those of the asset ``bundled``; a file; or a folder, with all that lies below
    but hidden files. Where nothing is there, the digest is of no file: whoever reads it then says so better than could
    be said here.

    Raises DataError where it cannot be listed.
    """
    place = fedgen_assets.path(bundled) if source == "bundled" else Path(source).expanduser()
    try:
        below = files_below(place) if place.is_dir() else [place]
        files = [file for file in below if file.is_file()]
        facts = [(str(f), (found := f.stat()).st_size, found.st_mtime_ns) for f in files]
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error}") from error
    # The path as it is given can mean one folder today and, from another working directory, another.
    return hashlib.sha256(repr((split, str(place.resolve()), facts)).encode()).hexdigest()


def _folder() -> Path:
    if own := os.environ.get("FEDGEN_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedgen"


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"the cache folder {folder} cannot be written ({error}); set FEDGEN_CACHE to one that can"
        ) from error


def _save(arrays: Arrays, file: Path) -> None:
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    os.close(handle)
    try:
        # save_file writes the memory as it lies: a transposed array would come back scrambled.
        save_file({key: np.asarray(array, order="C") for key, array in arrays.items()}, name)
        with open(name, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _mapped(file: Path) -> Arrays | None:
    """Map the file's arrays; None where it is damaged.

    ``safe_open`` checks the file, but its numpy tensors are copies; the views into one map are not.
    """
    try:
        with safe_open(str(file), framework="numpy"):
            pass
    except (SafetensorError, OSError):
        return None
    whole = np.memmap(file, mode="c")
    start = 8 + int.from_bytes(whole[:8].tobytes(), "little")
    arrays: Arrays = {}
    for name, entry in json.loads(whole[8:start].tobytes()).items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            flat = np.asarray(whole[start + first : start + last]).view(_DTYPES[entry["dtype"]])
            arrays[name] = flat.reshape(entry["shape"])
    return arrays
