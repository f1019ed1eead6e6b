"""Reading images, from every kind of source and from the broken ones."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedgen_app.data.decoding import Pictures
from fedgen_app.data.images import load_images
from fedgen_app.errors import DataError

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / ".cache")


def train(source: Path | str, resolution: int = 8, **asked: Any) -> Pictures:
    found = load_images(str(source), "train", resolution=resolution, **asked)
    assert found is not None
    check(found, resolution)
    return found


def held_out(source: Path | str, resolution: int = 8, **asked: Any) -> Pictures:
    found = load_images(str(source), "test", resolution=resolution, **asked)
    assert found is not None
    check(found, resolution)
    return found


def check(found: Pictures, resolution: int) -> None:
    assert found.pixels.dtype == np.uint8 and found.pixels.shape[:3] == (len(found), resolution, resolution)
    assert found.pixels.flags.c_contiguous and found.pixels.flags.writeable
    for texts in (found.labels, found.captions):
        assert texts is None or (len(texts) == len(found) and all(type(text) is str for text in texts))


def colours(found: Pictures) -> list[tuple[int, ...]]:
    """The pixel in the middle of each image."""
    middle = found.pixels.shape[1] // 2
    return [tuple(pixel) for pixel in found.pixels[:, middle, middle].tolist()]


def png(colour: Any = RED, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> bytes:
    return encoded(Image.new(mode, size, colour))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write(folder: Path, files: Mapping[str, bytes | str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def bomb() -> bytes:
    """A PNG that says it has 10^10 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


# Arrays


def test_an_npz_file_trains(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    file = tmp_path / "toy.npz"
    np.savez_compressed(file, images=pixels, labels=np.array([2, 0, 1]), names=["a", "b", "c"], captions=["x", "", "z"])
    found = train(file)
    np.testing.assert_array_equal(found.pixels, pixels)
    assert (found.name, found.labels, found.captions) == ("toy.npz", ("c", "a", "b"), ("x", "", "z"))
    assert (found.classes, found.skipped) == (("a", "b", "c"), 0)
    assert load_images(str(file), "test", resolution=8) is None
    np.testing.assert_array_equal(train(file).pixels, train(file).pixels)


def test_a_folder_of_two_npz_files(tmp_path: Path) -> None:
    pixels = np.full((4, 16, 8), 7, np.uint8)
    np.savez(tmp_path / "train.npz", x=pixels, y=np.arange(4).reshape(4, 1))
    np.savez(tmp_path / "features.npz", other=pixels)
    assert load_images(str(tmp_path), "test", resolution=8) is None
    np.savez(tmp_path / "test.npz", data=pixels[:2])
    found, test = train(tmp_path, channels=3), held_out(tmp_path)
    assert (found.pixels.shape, found.labels, found.classes) == ((4, 8, 8, 3), ("0", "1", "2", "3"), ())
    assert (test.pixels.shape, test.labels, test.name) == ((2, 8, 8, 1), None, tmp_path.name)
    assert set(found.pixels.ravel()) == {7}
    (tmp_path / "train.npz").unlink()
    with pytest.raises(DataError, match="holds no train.npz"):
        train(tmp_path)


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        (np.array([1.0, 0.0]), None, ("1", "0")),
        (np.array(["cat", "dog"]), None, ("cat", "dog")),
        (np.array([True, False]), ["no", "yes"], ("yes", "no")),
        (np.array([2**63, 5], np.uint64), None, (str(2**63), "5")),
    ],
)
def test_labels_of_many_types(tmp_path: Path, labels: Any, names: Any, expected: tuple[str, ...]) -> None:
    arrays = {"images": np.zeros((2, 4, 4), np.uint8), "labels": labels}
    np.savez(tmp_path / "a.npz", **arrays, **({"names": np.array(names)} if names else {}))
    assert train(tmp_path / "a.npz").labels == expected


def test_columns_of_an_npz_file(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    np.savez(file, images=np.zeros((2, 4, 4), np.uint8), y=[0, 1], said=["a", "b"], kind=["k", "l"])
    assert train(file, label_column="label").labels == ("0", "1")
    found = train(file, label_column="kind", text_column="said")
    assert (found.labels, found.captions) == (("k", "l"), ("a", "b"))
    for wrong in ({"label_column": "nothing"}, {"text_column": "nothing"}):
        with pytest.raises(DataError, match=r"a\.npz has no array 'nothing'; its arrays: images, y, said, kind"):
            train(file, **wrong)


GOOD = np.zeros((2, 4, 4), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": GOOD.astype(np.float32)}, "images are float32, should be uint8"),
        ({"images": GOOD.astype(np.int64)}, "images are int64"),
        ({"images": np.zeros((2, 4), np.uint8)}, r"shape \(2, 4\)"),
        ({"images": np.zeros((2, 4, 4, 2), np.uint8)}, r"shape \(2, 4, 4, 2\)"),
        ({"images": np.zeros((2, 4, 4, 4), np.uint8)}, r"shape \(2, 4, 4, 4\)"),
        ({"images": np.zeros((), np.uint8)}, r"shape \(\)"),
        ({"images": np.zeros((0, 4, 4), np.uint8)}, "holds no image"),
        ({"images": np.zeros((2, 0, 4), np.uint8)}, "holds no image"),
        ({"pictures": GOOD}, "no array named images or x or data, only pictures"),
        ({"images": GOOD, "labels": [1, 2, 3]}, r"2 images but labels of shape \(3,\)"),
        ({"images": GOOD, "labels": np.eye(2)}, r"2 images but labels of shape \(2, 2\)"),
        ({"images": GOOD, "labels": np.array(1)}, r"labels of shape \(\)"),
        ({"images": GOOD, "labels": [0.5, 1]}, "labels are float64, should be whole numbers"),
        ({"images": GOOD, "labels": [np.nan, 1]}, "labels are float64, should be whole numbers"),
        ({"images": GOOD, "labels": np.array([b"a", b"b"])}, "labels are |S1"),
        ({"images": GOOD, "labels": [0, 2], "names": ["a", "b"]}, "label 2 has no name; there are 2 names"),
        ({"images": GOOD, "labels": [0, -1], "names": ["a", "b"]}, "label -1 has no name"),
        ({"images": GOOD, "captions": ["a"]}, "2 images but 1 captions"),
        ({"images": GOOD, "captions": [["a"], ["b"]]}, "captions and names are one row of strings"),
        ({"images": GOOD, "labels": np.array([{}, 1], object)}, "allow_pickle"),
        ({"images": np.array([b"x", None], object)}, "allow_pickle"),
    ],
)
def test_arrays_that_are_no_images_are_named(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    file = tmp_path / "odd.npz"
    np.savez(file, **arrays)
    with pytest.raises(DataError, match=message) as raised:
        train(file)
    assert str(file) in str(raised.value)


def test_channels_first_arrays_are_turned(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=pixels)
    np.testing.assert_array_equal(train(tmp_path / "a.npz").pixels, pixels.transpose(0, 2, 3, 1))


def test_damaged_npz_files_are_named(tmp_path: Path) -> None:
    whole = io.BytesIO()
    np.savez_compressed(whole, images=np.random.default_rng(0).integers(0, 256, (9, 16, 16), dtype=np.uint8))
    content = whole.getvalue()
    header = b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '|u1', 'fortran_order': False, 'shape': (10000000000000,), }"
    huge = io.BytesIO()
    with zipfile.ZipFile(huge, "w") as archive:
        archive.writestr("images.npy", header.ljust(127) + b"\n")
    single = io.BytesIO()
    np.save(single, GOOD)
    damaged = {
        "empty": b"",
        "cut": content[:-40],
        "half": content[: len(content) // 2],
        "flipped": content[:200] + bytes(255 - byte for byte in content[200:260]) + content[260:],
        "text": b"hello",
        "npy": single.getvalue(),
        "huge": huge.getvalue(),
    }
    for name, broken in damaged.items():
        (tmp_path / f"{name}.npz").write_bytes(broken)
        with pytest.raises(DataError, match=rf"{name}\.npz cannot be read as \.npz"):
            train(tmp_path / f"{name}.npz")


def idx(array: np.ndarray[Any, Any], code: int = 8) -> bytes:
    return bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("mark", ["-", "."])
def test_idx_files(tmp_path: Path, zipped: bool, mark: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8), dtype=np.uint8)
    pack, end = (gzip.compress, ".gz") if zipped else (bytes, "")
    images = {f"{part}-images{mark}idx3-ubyte{end}": pack(idx(pixels)) for part in ("train", "t10k")}
    write(tmp_path, {**images, f"train-labels{mark}idx1-ubyte{end}": pack(idx(np.array([7, 0, 9], np.uint8)))})
    found = train(tmp_path, label_column="label")
    np.testing.assert_array_equal(found.pixels[..., 0], pixels)
    assert (found.labels, found.captions, found.name) == (("7", "0", "9"), None, tmp_path.name)
    assert held_out(tmp_path).labels is None
    (tmp_path / f"t10k-images{mark}idx3-ubyte{end}").unlink()
    assert load_images(str(tmp_path), "test", resolution=8) is None
    with pytest.raises(DataError, match="no column 'digit'; its columns: label"):
        train(tmp_path, label_column="digit")


def test_damaged_idx_files_are_named(tmp_path: Path) -> None:
    images = idx(np.zeros((3, 8, 8), np.uint8))
    labels = {"train-labels-idx1-ubyte": idx(np.zeros(3, np.uint8))}
    name = "train-images-idx3-ubyte"
    for broken, message in (
        (b"", "is no IDX file"),
        (b"hello world", "is no IDX file"),
        (idx(np.zeros((3, 8, 8), np.float32), 13), "is no IDX file of bytes"),
        (images[:-1], r"is damaged: 191 bytes for shape \(3, 8, 8\)"),
        (images + b"x", "is damaged: 193 bytes"),
        (images[:6], "is damaged: 0 bytes"),
        (idx(np.zeros((3, 8), np.uint8)), r"images have shape \(3, 8\)"),
        (idx(np.zeros((2, 8, 8), np.uint8)), r"2 images but labels of shape \(3,\)"),
    ):
        write(tmp_path, {name: broken, **labels})
        with pytest.raises(DataError, match=f"{name}.*{message}"):
            train(tmp_path)
    (tmp_path / name).unlink()
    for broken in (b"hello", gzip.compress(images)[:-9], gzip.compress(images)[:15] + b"\xff" * 30):
        write(tmp_path, {f"{name}.gz": broken, **labels})
        with pytest.raises(DataError, match=rf"{name}\.gz cannot be read"):
            train(tmp_path)


# Folders of image files


def test_class_folders(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        "dog/b.PNG": png(RED),
        "cat/a.png": png(GREEN),
        "cat/test.png": png(BLUE),  # a name that is no split
        "dog/photo.JPG": encoded(Image.new("RGB", (9, 9), BLUE), "JPEG"),
        "dog/notes.txt": "not this",
        "dog/clip.mp4": "nor this",
        "dog/._b.png": "nor this",
        "cat/.DS_Store": "nor this",
        "__MACOSX/dog/b.png": "nor this",
        ".trash/old.png": png(),
        "Thumbs.db": "nor this",
        "features.npz": "nor this",
        "list.json": "{}",
    }
    found = train(write(tmp_path / "a [few]*", files))
    assert (found.labels, found.captions, found.classes) == (("cat", "cat", "dog", "dog"), None, ())
    assert colours(found)[:3] == [GREEN, BLUE, RED] and found.skipped == 0 and found.name == "a [few]*"
    assert load_images(str(tmp_path / "a [few]*"), "test", resolution=8) is None
    write(tmp_path / "eels", {"e.png": png(GREEN)})
    (tmp_path / "a [few]*" / "eel").symlink_to(tmp_path / "eels")
    assert train(tmp_path / "a [few]*").labels == ("cat", "cat", "dog", "dog", "eel")


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["cat/1.png", "cat/2.png"], ("cat", "cat")),  # a device that knows one class only
        (["images/1.png", "images/2.png"], None),
        (["1.png", "2.png"], None),
        (["1.png", "cat/2.png"], None),
        (["train/1.png", "car/2.png"], ("car", "train")),  # trains
        (["val/1.png", "cat/2.png"], ("cat", "val")),
        (["train/1.png", "train/2.png"], None),
        (["train/dog/1.png", "Test/cat/2.png"], ("dog",)),
        (["train/dog/1.png", "test/cat/2.png", "extra/3.png"], ("dog",)),
        (["train/dog/1.png", "val/cat/2.png"], ("dog",)),
        (["data/train/dog/1.png", "data/test/cat/2.png"], ("dog",)),
        (["animals/cat/1.png", "animals/dog/2.png"], ("cat", "dog")),
    ],
)
def test_classes_are_the_folders_that_images_lie_in(
    tmp_path: Path, names: Sequence[str], labels: tuple[str, ...] | None
) -> None:
    folder = write(tmp_path / "set", {name: png() for name in names})
    assert train(folder).labels == labels
    has_test = any("test/" in name.lower() for name in names)
    test = load_images(str(folder), "test", resolution=8)
    assert test.labels == ("cat",) if test else not has_test


def test_a_test_folder_alone_does_not_train(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", {"test/a.png": png(), "annotations/a.json": "{}"})
    with pytest.raises(DataError, match="holds no folder train, only test"):
        train(folder)
    assert len(held_out(folder)) == 1
    write(folder, {"train/b.png": png()})
    assert len(train(folder)) == 1, "a folder without images is no class"


CSV = '\ufefffile_name,text,kind\r\nb.png,"a blue,\r\nb",x\r\na.png,,y\r\n'
JSONL = "\n".join(
    json.dumps(row)
    for row in (
        {"file_name": "b.png", "text": "a blue,\r\nb", "kind": "x"},
        {"file_name": "a.png", "text": None, "kind": "y", "extra": 1},
    )
)


@pytest.mark.parametrize(("table", "content"), [("metadata.csv", CSV), ("metadata.jsonl", JSONL)])
def test_captions_in_a_table(tmp_path: Path, table: str, content: str) -> None:
    folder = write(tmp_path, {"a.png": png(RED), "b.png": png(BLUE), "unnamed.png": png(GREEN), table: content})
    found = train(folder, label_column="kind")
    assert (found.captions, found.labels) == (("a blue,\r\nb", ""), ("x", "y"))
    assert colours(found) == [BLUE, RED]
    assert train(folder).labels is None
    assert train(folder, text_column="kind").captions == ("x", "y")
    for wrong in ({"label_column": "nothing"}, {"text_column": "nothing"}):
        with pytest.raises(DataError, match="has no column 'nothing'; its columns: text, kind"):
            train(folder, **wrong)


def test_captions_and_class_folders(tmp_path: Path) -> None:
    files = {"cat/a.png": png(RED), "dog/b.png": png(BLUE)}
    table = "file_name,text\ndog/b.png,a dog\ncat/a.png,a cat\n"
    found = train(write(tmp_path / "one", {**files, "metadata.csv": table}), label_column="label")
    assert (found.captions, found.labels, colours(found)) == (("a dog", "a cat"), ("dog", "cat"), [BLUE, RED])
    each = {"cat/metadata.csv": "file_name,text\na.png,a cat\n", "dog/metadata.jsonl": '{"file_name": "b.png"}\n'}
    found = train(write(tmp_path / "each", {**files, **each}))
    assert (found.captions, found.labels) == (("a cat", ""), ("cat", "dog"))
    labelled = "file_name,label\ndog/b.png,7\ncat/a.png,5\n"
    assert train(write(tmp_path / "labelled", {**files, "metadata.csv": labelled})).labels == ("7", "5")
    images = {"images/a.png": png(), "metadata.csv": "file_name,text\nimages/a.png,a cat\n"}
    found = train(write(tmp_path / "images", images))
    assert (found.captions, found.labels) == (("a cat",), None)


def test_captions_of_split_folders(tmp_path: Path) -> None:
    files = {"train/a.png": png(RED), "test/b.png": png(BLUE)}
    table = "file_name,text\ntrain/a.png,red\ntest/b.png,blue\n"
    own = {"train/metadata.csv": "file_name,text\na.png,red\n", "test/metadata.csv": "file_name,text\nb.png,blue\n"}
    for number, tables in enumerate(({"metadata.csv": table}, own)):
        folder = write(tmp_path / str(number), {**files, **tables})
        assert (train(folder).captions, colours(train(folder))) == (("red",), [RED])
        assert (held_out(folder).captions, colours(held_out(folder))) == (("blue",), [BLUE])


@pytest.mark.parametrize(
    ("table", "content", "message"),
    [
        ("metadata.csv", b"name,text\na.png,x\n", "record 1 has no file_name"),
        ("metadata.csv", b"file_name,text\na.png,x\n,y\n", "record 2 has no file_name"),
        ("metadata.csv", b"file_name,text\na.png,\xff\n", "is not UTF-8: byte 21"),
        ("metadata.csv", b"", "holds no image"),
        ("metadata.csv", b"file_name,text\n", "holds no image"),
        ("metadata.csv", b"file_name,text\n../../a.png,x\n", r"record 1 names \.\./\.\./a\.png, which lies outside"),
        ("metadata.csv", b"file_name,text\n/a.png,x\n", "lies outside the folder"),
        ("metadata.csv", b'file_name,text\na.png,"' + b"x" * 140_000, "field larger"),
        ("metadata.jsonl", b'{"file_name": "a.png"\n', "cannot be read"),
        ("metadata.jsonl", b'{"file_name": 5}\n', "record 1 has no file_name"),
        ("metadata.jsonl", b'["a.png"]\n', "record 1 has no file_name"),
        ("metadata.jsonl", b"[" * 100_000, "cannot be read"),
    ],
)
def test_broken_tables_are_named(tmp_path: Path, table: str, content: bytes, message: str) -> None:
    folder = write(tmp_path / "set", {"a.png": png(), table: content})
    with pytest.raises(DataError, match=message) as raised:
        train(folder)
    assert str(folder) in str(raised.value)


def test_two_tables_in_one_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="two kinds of metadata"):
        train(write(tmp_path, {"a.png": png(), "metadata.csv": CSV, "metadata.jsonl": JSONL}))


def test_columns_of_class_folders(tmp_path: Path) -> None:
    folder = write(tmp_path, {"cat/a.png": png(), "dog/a.png": png()})
    assert train(folder, label_column="label").labels == ("cat", "dog")
    for wrong in ({"label_column": "kind"}, {"text_column": "kind"}):
        with pytest.raises(DataError, match="has no column 'kind'; its columns: label"):
            train(folder, **wrong)
    with pytest.raises(DataError, match="has no column 'label'"):
        train(write(tmp_path / "flat", {"a.png": png()}), label_column="label")


def test_changed_files_are_read_again(tmp_path: Path) -> None:
    folder = write(tmp_path, {"cat/a.png": png(RED), "dog/b.png": png(RED)})
    before = folder.joinpath("cat", "a.png").stat()
    assert colours(train(folder)) == [RED, RED]
    write(folder, {"cat/a.png": png(BLUE), "eel/c.png": png(GREEN)})
    os.utime(folder / "cat" / "a.png", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert colours(train(folder)) == [BLUE, RED, GREEN]
    (folder / "dog" / "b.png").unlink()
    assert train(folder).labels == ("cat", "eel")


# Kinds and sizes of images


def only(tmp_path: Path, content: bytes, resolution: int = 8, name: str = "a.png", **asked: Any) -> Any:
    shutil.rmtree(tmp_path / "only", ignore_errors=True)
    found = train(write(tmp_path / "only", {name: content}), resolution, **asked)
    assert len(found) == 1
    return found.pixels[0]


def test_the_middle_is_cut_out(tmp_path: Path) -> None:
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 200
    for array in (wide, wide.transpose(1, 0, 2)):
        assert (only(tmp_path, encoded(Image.fromarray(array))) == 200).all()
        assert abs(only(tmp_path, encoded(Image.fromarray(array)), 4).astype(int) - 200).max() <= 60  # blurred edges
    assert (only(tmp_path, png(RED, (1, 1)), 16) == RED).all()
    large = only(tmp_path, encoded(Image.new("RGB", (900, 1200), (10, 200, 30)), "JPEG"), name="a.jpg")
    assert abs(large.astype(int) - (10, 200, 30)).max() <= 3


def test_exif_turns_the_image(tmp_path: Path) -> None:
    array = np.zeros((8, 8, 3), np.uint8)
    array[:4] = 255  # bright above
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter clockwise: bright on the right
    turned = only(tmp_path, encoded(Image.fromarray(array), exif=exif))
    assert (turned[:, 4:] == 255).all() and (turned[:, :4] == 0).all()


def test_transparent_pixels_are_white(tmp_path: Path) -> None:
    assert (only(tmp_path, png((255, 0, 0, 0), mode="RGBA")) == 255).all()
    assert abs(only(tmp_path, png((0, 0, 0, 128), mode="RGBA")).astype(int) - 127).max() <= 1
    assert (only(tmp_path, png((0, 0), mode="LA")) == 255).all()
    assert only(tmp_path, png((0, 0), mode="LA")).shape == (8, 8, 1)
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 0, 0, 255])
    assert (only(tmp_path, encoded(palette)) == BLUE).all()
    assert (only(tmp_path, encoded(palette, transparency=1)) == WHITE).all()
    assert (only(tmp_path, encoded(palette, "GIF", transparency=1), name="a.gif") == WHITE).all()
    array = np.zeros((16, 16, 4), np.uint8)
    array[..., 0] = 255  # red that nobody sees must not bleed into what is seen
    array[:, 8:] = (0, 0, 255, 255)
    assert only(tmp_path, encoded(Image.fromarray(array)), 4)[:, 0].min() > 200


@pytest.mark.parametrize(("kind", "ending"), [("PNG", "png"), ("TIFF", "tif")])
def test_16_bits_become_8(tmp_path: Path, kind: str, ending: str) -> None:
    deep = (np.arange(64, dtype=np.uint16) * 1040).reshape(8, 8)
    found = only(tmp_path, encoded(Image.fromarray(deep), kind), name=f"a.{ending}")
    assert found.shape == (8, 8, 1)
    np.testing.assert_array_equal(found[..., 0], (deep / 257).round())
    assert only(tmp_path, encoded(Image.fromarray(deep), kind), name=f"a.{ending}", channels=3).shape == (8, 8, 3)


def test_other_colours(tmp_path: Path) -> None:
    header = b"P5 8 8 65535\n"
    assert (only(tmp_path, header + b"\x80\x80" * 64, name="a.pgm") == 128).all()
    cmyk = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF")
    assert (only(tmp_path, cmyk, name="a.tif") == RED).all()
    assert only(tmp_path, cmyk, name="a.tif", channels=1).shape == (8, 8, 1)
    cmyk = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    assert abs(only(tmp_path, cmyk, name="a.jpg").astype(int) - RED).max() <= 30
    lab = encoded(Image.new("LAB", (8, 8), (128, 128, 128)), "TIFF")
    assert only(tmp_path, lab, name="a.tif", channels=1).shape == (8, 8, 1)
    bits = only(tmp_path, png(1, mode="1"))
    assert bits.shape == (8, 8, 1) and (bits == 255).all()


def test_an_animation_is_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (GREEN, RED)]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (only(tmp_path, content, name="a.gif") == GREEN).all()


def test_channels_are_those_of_the_first_image_that_can_be_read(tmp_path: Path) -> None:
    grey, colour = png(100, mode="L"), png(RED)
    broken = grey[:-30]
    first_grey = write(tmp_path / "grey", {"0.png": colour[:-30], "1.png": grey, "2.png": colour})
    first_colour = write(tmp_path / "colour", {"0.png": broken, "1.png": colour, "2.png": grey})
    assert train(first_grey).pixels.shape == (2, 8, 8, 1)
    assert train(first_colour).pixels.shape == (2, 8, 8, 3)
    for folder in (first_grey, first_colour):
        for channels in (1, 3):
            assert train(folder, channels=channels).pixels.shape == (2, 8, 8, channels)
    assert colours(train(first_colour)) == [RED, (100, 100, 100)]
    assert colours(train(first_grey)) == [(100,), (76,)]


# Broken images


def test_broken_images_are_skipped_and_counted(tmp_path: Path) -> None:
    whole = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)))
    broken: dict[str, bytes | str] = {
        "cat/cut.png": whole[: len(whole) // 2],
        "cat/empty.png": b"",
        "cat/text.png": "hello",
        "dog/bomb.png": bomb(),
        "dog/cut.jpg": encoded(Image.new("RGB", (64, 64)), "JPEG")[:200],
        "dog/float.tif": encoded(Image.new("F", (8, 8), 0.5), "TIFF"),
        "dog/flipped.png": whole[:60] + b"\xff" * 40 + whole[100:],
    }
    folder = write(tmp_path / "set", {**broken, "cat/z.png": png(RED), "dog/a.png": png(BLUE)})
    (folder / "cat" / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(folder / "cat" / "pipe.png")
    found = train(folder)
    assert (found.labels, colours(found), found.skipped) == (("cat", "dog"), [RED, BLUE], 9)
    again = train(folder)
    assert again.labels == found.labels and np.array_equal(again.pixels, found.pixels)
    bad = write(tmp_path / "bad", broken)
    with pytest.raises(DataError, match="bad holds no image that can be read; of 7 the first: "):
        train(bad)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "AVIF", "GIF", "TIFF", "BMP", "PPM"])
def test_images_with_a_few_wrong_bytes_never_stop_the_others(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    try:
        whole = encoded(image, kind)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow does not write {kind}")
    files: dict[str, bytes | str] = {"good.png": png()}
    for number in range(80):
        broken = bytearray(whole)
        for place in rng.integers(0, min(len(broken), rng.choice([40, 200, 4000])), 3):
            broken[place] = rng.integers(0, 256)
        files[f"{number}.png"] = bytes(broken)
    found = train(write(tmp_path / "set", files))
    assert len(found) + found.skipped == 81 and len(found) >= 1


def test_images_that_a_table_names_and_are_not_there(tmp_path: Path) -> None:
    table = "file_name,text\nmissing.png,gone\na.png,here,and,more\nsub,a folder\nx\0.png,odd\n"
    found = train(write(tmp_path, {"a.png": png(), "sub/b.txt": "x", "metadata.csv": table}))
    assert (found.captions, found.skipped) == (("here",), 3)
    with pytest.raises(DataError, match="no column 'nothing'; its columns: text$"):
        train(tmp_path, text_column="nothing")


# Data sets of `datasets`


def dataset(images: Sequence[Any], **columns: Any) -> Any:
    import datasets

    features = datasets.Features({"image": datasets.Image(), **{name: kind for name, (kind, _) in columns.items()}})
    values = {name: value for name, (_, value) in columns.items()}
    return datasets.Dataset.from_dict({"image": images, **values}, features=features)


def entry(content: bytes) -> dict[str, Any]:
    return {"bytes": content, "path": None}


def test_saved_data_sets(tmp_path: Path) -> None:
    from datasets import ClassLabel, DatasetDict, List, Value

    data = dataset(
        [entry(png(RED)), entry(b"hello"), None, entry(png(BLUE))],
        label=(ClassLabel(names=["cat", "dog"]), [1, 0, 0, -1]),
        text=(List(Value("string")), [["a", "b"], ["c"], ["d"], []]),
    )
    data.save_to_disk(tmp_path / "one")
    found = train(tmp_path / "one")
    assert (found.labels, found.captions, found.skipped) == (("dog", "none"), ("a", ""), 2)
    assert (found.classes, colours(found)) == (("cat", "dog"), [RED, BLUE])
    assert load_images(str(tmp_path / "one"), "test", resolution=8) is None
    with pytest.raises(DataError, match="has no column 'kind'; its columns: image, label, text"):
        train(tmp_path / "one", label_column="kind")
    DatasetDict({"train": data, "test": data.select([3])}).save_to_disk(tmp_path / "both")
    assert colours(held_out(tmp_path / "both")) == [BLUE]
    DatasetDict({"dev": data}).save_to_disk(tmp_path / "dev")
    with pytest.raises(DataError, match="no split train, only dev"):
        train(tmp_path / "dev")
    data.select([1, 2]).save_to_disk(tmp_path / "bad")
    with pytest.raises(DataError, match="bad holds no image that can be read; of 2"):
        train(tmp_path / "bad")
    data.remove_columns("image").save_to_disk(tmp_path / "blind")
    with pytest.raises(DataError, match="no column of images; its columns: label, text"):
        train(tmp_path / "blind")
    for file in (tmp_path / "one").glob("*.arrow"):
        file.write_bytes(b"hello")
    with pytest.raises(DataError, match="one cannot be read as a saved data set"):
        train(tmp_path / "one")


def test_parquet_with_embedded_images(tmp_path: Path) -> None:
    from datasets import ClassLabel

    kind = ClassLabel(names=["cat", "dog"])
    folder = tmp_path / "a [few]"
    (folder / "data").mkdir(parents=True)
    for name, colour, label in (("train-00000-of-00001", RED, 1), ("test-00000-of-00001", BLUE, 0)):
        data = dataset([entry(png(colour)), entry(b"")], label=(kind, [label, 0]))
        data.to_parquet(folder / "data" / f"{name}.parquet")
    found, test = train(folder), held_out(folder)
    assert (found.labels, colours(found), found.skipped) == (("dog",), [RED], 1)
    assert (test.labels, colours(test), found.classes) == (("cat",), [BLUE], ("cat", "dog"))
    file = folder / "data" / "train-00000-of-00001.parquet"
    assert colours(train(file)) == [RED] and load_images(str(file), "test", resolution=8) is None
    dataset([entry(png(GREEN))], label=(kind, [0])).to_parquet(file)
    assert colours(train(folder)) == [GREEN], "an old copy was read"
    file.write_bytes(b"hello")
    with pytest.raises(DataError, match="holds no images or cannot be read"):
        train(folder)


def test_parquet_that_says_nothing_of_images(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    for name, image in (("plain", png()), ("struct", {"bytes": png(), "path": "a.png"})):
        table = pyarrow.table({"image": [image, None], "text": ["a", "b"]})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
        found = train(tmp_path / f"{name}.parquet")
        assert (found.captions, found.labels, found.skipped) == (("a",), None, 1)
    pyarrow.parquet.write_table(pyarrow.table({"image": ["a.png"]}), tmp_path / "names.parquet")
    empty = pyarrow.table({"image": pyarrow.array([], pyarrow.binary())})
    pyarrow.parquet.write_table(empty, tmp_path / "none.parquet")
    with pytest.raises(DataError, match="none.parquet holds no image"):
        train(tmp_path / "none.parquet")
    with pytest.raises(DataError, match="names.parquet has no column of images; its columns: image"):
        train(tmp_path / "names.parquet")


# What is not there


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file or folder; allowed: bundled, a file \(\.npz \.parquet\)"):
        train(tmp_path / "missing")
    with pytest.raises(DataError, match="no such file or folder"):
        train("data/missing.npz")  # has the shape of a hub id as well
    with pytest.raises(DataError, match="a.zip: an image data set is an .npz or .parquet file, a folder or a hub id"):
        train(write(tmp_path / "zip", {"a.zip": b"PK"}) / "a.zip")
    for files in ({}, {"a.txt": "x"}, {"features.npz": b"x"}, {"cat/.a.png": png()}):
        with pytest.raises(DataError, match=r"holds no image \(.*\.png"):
            train(write(tmp_path / f"set-{len(files)}-{'-'.join(files).replace('/', '-')}", files))


def test_an_unreachable_hub_says_what_to_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    start = time.monotonic()
    with pytest.raises(DataError, match="--repo-type dataset no-such-owner/no-such-set --local-dir FOLDER"):
        train("no-such-owner/no-such-set:plain@main")
    assert time.monotonic() - start < 10


def test_the_bundled_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pictures").mkdir()
    for name in ("train", "test"):
        labels = {"labels": np.array([0, 1], np.uint8), "names": np.array(["a", "b"])}
        np.savez(tmp_path / "pictures" / f"{name}.npz", images=GOOD, **labels)
    monkeypatch.setattr("fedgen_assets.path", lambda name: tmp_path / name)
    found = train("bundled")
    assert (found.name, found.labels, found.classes) == ("bundled pictures", ("a", "b"), ("a", "b"))
    assert len(held_out("bundled")) == 2


def test_arrays_and_folders_need_no_data_libraries(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=GOOD)
    folder = write(tmp_path / "set", {"cat/a.png": png(), "metadata.csv": "file_name,text\ncat/a.png,x\n"})
    code = (
        "import sys; from fedgen_app.data.images import load_images\n"
        "for source in sys.argv[1:]: load_images(source, 'train', resolution=8)\n"
        "heavy = {'torch', 'datasets', 'pandas', 'diffusers'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a.npz", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
