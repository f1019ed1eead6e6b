"""Arrays that are built once per machine."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedgen_app.data import cache
from fedgen_app.data.cache import cached, source_identity
from fedgen_app.errors import DataError

ARRAYS = {
    "tokens": np.arange(12, dtype=np.uint16).reshape(3, 4),
    "turned": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "half": np.array([1.5, -2], np.float16),
    "flags": np.array([True, False, True]),
    "number": np.array(7, np.int64),
    "nothing": np.zeros((0, 3), np.float64),
}


def never() -> dict[str, np.ndarray]:
    raise AssertionError("built again")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDGEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def only_file(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


def test_arrays_come_back_as_they_were(folder: Path) -> None:
    for build in (lambda: ARRAYS, never):
        got = cached("toy", {"a": 1, "b": [2, "c"]}, build)
        assert got.keys() == ARRAYS.keys()
        for name, array in ARRAYS.items():
            assert got[name].dtype == array.dtype and got[name].shape == array.shape
            np.testing.assert_array_equal(got[name], array)
    assert only_file(folder).name.startswith("toy-")
    assert load_file(only_file(folder)).keys() == ARRAYS.keys()
    assert not list(folder.glob(".*")), "a temporary file was left"


def test_the_key_decides_and_its_order_does_not(folder: Path) -> None:
    cached("toy", {"a": 1, "b": 2}, lambda: {"x": np.zeros(1)})
    assert cached("toy", {"b": 2, "a": 1}, never)["x"] == 0
    for kind, key in (("toy", {"a": 1, "b": 3}), ("toy", {"a": 1}), ("other", {"a": 1, "b": 2})):
        assert cached(kind, key, lambda: {"x": np.ones(1)})["x"] == 1
    with pytest.raises(TypeError):
        cached("toy", {"a": object()}, never)


def test_arrays_are_mapped_and_private() -> None:
    cached("toy", {}, lambda: {"x": np.arange(4.0)})
    got = cached("toy", {}, never)["x"]
    base: object = got
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)
    got[0] = 9
    assert cached("toy", {}, never)["x"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("damage", ["cut", "emptied", "header", "text"])
def test_a_damaged_file_is_built_again(folder: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    cached("toy", {}, lambda: {"x": np.arange(100)})
    file = only_file(folder)
    whole = file.read_bytes()
    file.write_bytes({"cut": whole[:-8], "emptied": b"", "header": b"\xff" * 8 + whole, "text": b"hello"}[damage])
    with caplog.at_level(logging.WARNING):
        assert cached("toy", {}, lambda: {"x": np.arange(100)})["x"].tolist() == list(range(100))
    assert str(file) in caplog.text and "damaged" in caplog.text
    assert file.read_bytes() == whole


def test_a_failed_build_leaves_nothing(folder: Path) -> None:
    with pytest.raises(AssertionError, match="built again"):
        cached("toy", {}, never)
    assert not list(folder.glob("*.safetensors")) and not list(folder.glob(".*"))
    assert cached("toy", {}, lambda: {"x": np.ones(1)})["x"] == 1


def test_processes_that_ask_at_once_build_once(folder: Path) -> None:
    code = """
import sys, time, pathlib, os, numpy as np
from fedgen_app.data.cache import cached, source_identity
def build():
    (pathlib.Path(os.environ["FEDGEN_CACHE"]) / f"built-{os.getpid()}").touch()
    time.sleep(1.0)
    return {"x": np.arange(5)}
while not pathlib.Path(sys.argv[1]).exists():
    time.sleep(0.01)
assert cached("toy", {}, build)["x"].tolist() == [0, 1, 2, 3, 4]
"""
    start = folder.parent / "start"
    running = [subprocess.Popen([sys.executable, "-c", code, start]) for _ in range(3)]
    start.touch()
    assert [process.wait(30) for process in running] == [0, 0, 0]
    assert len(list(folder.glob("built-*"))) == 1


def test_a_long_wait_for_another_process_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache, "PATIENCE", 0.05)
    begun, told = threading.Event(), threading.Event()

    def build() -> cache.Arrays:
        begun.set()
        assert told.wait(60)
        return {"n": np.arange(3)}

    class Told(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.set()

    handler = Told(logging.WARNING)
    cache.logger.addHandler(handler)
    try:
        with ThreadPoolExecutor(1) as other:
            first = other.submit(cached, "kind", {"a": 1}, build)
            assert begun.wait(60)
            second = cached("kind", {"a": 1}, lambda: {"n": np.zeros(3)})
            np.testing.assert_array_equal(second["n"], first.result()["n"])
    finally:
        cache.logger.removeHandler(handler)
    assert f"waiting for {next(folder.glob('kind-*.safetensors'))}" in caplog.text


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FEDGEN_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(DataError, match=r"file/below cannot be written .* FEDGEN_CACHE"):
        cached("toy", {}, lambda: {"x": np.ones(1)})


def test_where_the_cache_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDGEN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    cached("toy", {}, lambda: {"x": np.ones(1)})
    only_file(tmp_path / "xdg" / "fedgen")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    cached("toy", {}, lambda: {"x": np.ones(1)})
    only_file(tmp_path / "home" / ".cache" / "fedgen")


def test_a_source_is_known_by_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "cats").mkdir(parents=True)
    picture = folder / "cats" / "a.png"
    picture.write_bytes(b"abc")
    seen = [source_identity(str(folder), "train", "topics")]
    assert source_identity(str(folder), "train", "pictures") == seen[0], "a folder is no bundled asset"
    seen.append(source_identity(str(folder), "test", "topics"))
    seen.append(source_identity(str(picture), "train", "topics"))
    picture.write_bytes(b"abcd")
    seen.append(source_identity(str(folder), "train", "topics"))
    os.utime(picture, ns=(1, 1))
    seen.append(source_identity(str(folder), "train", "topics"))
    picture.rename(folder / "cats" / "b.png")
    seen.append(source_identity(str(folder), "train", "topics"))
    (folder / "empty.png").touch()
    seen.append(source_identity(str(folder), "train", "topics"))
    assert len(set(seen)) == len(seen)


def test_the_bundled_source_is_known_by_the_asset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("topics", "pictures"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train").write_text("a")
    monkeypatch.setattr("fedgen_assets.path", lambda name: tmp_path / name)
    topics = source_identity("bundled", "train", "topics")
    assert topics != source_identity("bundled", "train", "pictures")
    (tmp_path / "pictures" / "train").write_text("ab")
    assert topics == source_identity("bundled", "train", "topics")


def test_a_source_whose_files_vanish_is_another_source(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").touch()
    before = source_identity(str(tmp_path / "data"), "train", "topics")
    (tmp_path / "data" / "a.txt").unlink()
    (tmp_path / "data").rmdir()
    assert source_identity(str(tmp_path / "data"), "train", "topics") != before


def test_one_relative_path_in_two_places_is_two_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "a.txt").touch()
        os.utime(tmp_path / place / "a.txt", ns=(1, 1))
        monkeypatch.chdir(tmp_path / place)
        seen.add(source_identity("a.txt", "train", "topics"))
    assert len(seen) == 2
