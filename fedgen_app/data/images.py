"""Read images: bundled pictures, arrays (.npz, IDX), folders of image files, or a data set of the hub."""

from __future__ import annotations

import csv
import glob
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedgen_app.data.arrays import from_idx, from_npz, idx_file
from fedgen_app.data.decoding import Asked, Pictures, absent, decoded
from fedgen_app.data.local import (
    Split,
    files_below,
    hub_dataset,
    is_saved,
    label_name,
    quiet_datasets,
    saved_dataset,
    split_files,
    utf8_text,
)
from fedgen_app.data.styles import styled
from fedgen_app.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

# The bundled pictures, as they are and in four styles.
STYLED = "bundled:styles"
BUNDLED = ("bundled", STYLED)
ENDINGS = frozenset(
    (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
)
TABLES = ("metadata.csv", "metadata.jsonl")  # captions of a folder's images, as `datasets` names them
SPLIT_FOLDERS = frozenset(("train", "test", "validation", "valid", "val", "dev"))
# The one folder that images lie in is their class, unless it is called what every such folder is called.
NO_CLASS = frozenset(("images", "image", "imgs", "img", "pictures", "photos", "data"))

SINGLE_FILES = (".npz", ".parquet")


def load_images(
    source: str,
    split: Split,
    *,
    resolution: int,
    channels: int = 0,
    text_column: str = "text",
    label_column: str = "",
) -> Pictures | None:
    """Read one split of ``source``; None where there is no test split.

    source: "bundled"; "bundled:styles" (see ``styles.styled``); an .npz or .parquet file (all of it is the training
    split); a folder with train.npz and test.npz, with IDX files as MNIST has them, or with ``[PREFIX.]train*.parquet``;
    a folder of image files; a folder written by ``datasets.save_to_disk``; or a hub id
    ``owner/name[:config][@revision]``.

    In a folder of image files, ``train`` and ``test`` are the splits; without them, every image trains. An image's
    class is the folder it lies in. Where there is a metadata.csv or .jsonl, the images are those that its column
    file_name names, and its other columns are theirs.

    Images are scaled so that the shorter side is ``resolution``, and cut square from the middle; what is transparent
    becomes white. channels: 1 grey, 3 RGB, 0: as the first image is. label_column "": a column named label where there
    is one; a ``text_column`` other than "text" has to be there.

    Raises DataError where the source, a column or every image is missing.
    """
    asked = Asked(source, resolution, channels, text_column, label_column)
    path = Path(source).expanduser()
    if source in BUNDLED:
        import fedgen_assets

        path = Path(fedgen_assets.path("pictures"))
    name = "bundled pictures" if source in BUNDLED else path.resolve().name
    if source == STYLED:
        plain = _from_directory(path, name, split, asked)
        return None if plain is None else styled(plain)
    if path.is_file():
        return _from_file(path, name, split, asked)
    if path.is_dir():
        return _from_directory(path, name, split, asked)
    hub = hub_dataset(source, split, SINGLE_FILES)
    return None if hub is None else _from_dataset(hub, source, asked)


def _from_file(file: Path, name: str, split: Split, asked: Asked) -> Pictures | None:
    kind = file.suffix.lower()
    if kind not in SINGLE_FILES:
        raise DataError(f"{asked.source}: an image data set is an .npz or .parquet file, a folder or a hub id")
    if split == "test":
        return None
    return from_npz(file, name, asked) if kind == ".npz" else _from_parquet([file], name, asked)


def _from_directory(folder: Path, name: str, split: Split, asked: Asked) -> Pictures | None:
    """What the folder holds decides: a saved data set, arrays, tables, else image files."""
    if is_saved(folder):
        saved = saved_dataset(folder, split)
        return None if saved is None else _from_dataset(saved, name, asked)
    if any((folder / f"{part}.npz").is_file() for part in ("train", "test")):
        file = folder / f"{split}.npz"
        if not file.is_file():
            absent(split, f"{folder} holds no {file.name}")
            return None
        return from_npz(file, name, asked)
    if any(idx_file(folder, part, "images", 3) for part in ("train", "test")):
        return from_idx(folder, name, split, asked)
    if any(file for place in (folder, folder / "data") for file in place.glob("*.parquet")):
        files = split_files(folder, split, (".parquet",))
        return _from_parquet(files, name, asked) if files else None
    return _from_folder(folder, name, split, asked)


def _from_folder(folder: Path, name: str, split: Split, asked: Asked) -> Pictures | None:
    # Not by the builder `imagefolder` of `datasets`: one image called test.png, or one class called val, makes it
    # leave out all other images; it gives no label where there is one class only, as on many a device; and it drops
    # the classes where there are captions.
    folder = folder.resolve()  # so that a path in a table can be compared with it
    files = files_below(folder)
    images = [file for file in files if file.suffix.lower() in ENDINGS]
    base = _split_folder(folder, images, split)
    if base is None:
        return None
    tables = [file for file in files if file.name.lower() in TABLES]
    # A table next to the split folders names the images of all of them.
    tables = [table for table in tables if table.is_relative_to(base)] or [
        t for t in tables if base.is_relative_to(t.parent)
    ]
    if len({table.parent for table in tables}) < len(tables):
        raise DataError(f"{asked.source} has two kinds of metadata in one folder; keep one")
    captions = labels = None
    if tables:
        rows = [row for table in tables for row in _table(table, folder, base)]
        images = [file for file, _ in rows]
        columns = dict.fromkeys(column for _, row in rows for column in row)
    else:
        rows, columns = [], {}
        images = [file for file in images if file.is_relative_to(base)]
    if not images:
        raise DataError(f"{asked.source} holds no image ({' '.join(sorted(ENDINGS))})")
    labelled = asked.label_column or next((key for key in ("label", "labels") if key in columns), "")
    if labelled in columns:
        labels = [label_name(row.get(labelled), None) for _, row in rows]
    elif (folders := _classes(images, base)) is not None:
        labels, columns = folders, columns | {"label": None}
    asked.check(columns)
    if asked.text_column in columns:
        captions = [_caption(row.get(asked.text_column)) for _, row in rows]
    return decoded(images, len(images), name, labels, captions, (), asked)


def _split_folder(folder: Path, images: Sequence[Path], split: Split) -> Path | None:
    """Where the images of ``split`` lie: in a folder of its name, else, those to train on, in ``folder`` itself."""
    tops = {parts[0].lower(): folder / parts[0] for parts in (i.relative_to(folder).parts for i in images) if parts[1:]}
    if set(tops) == {"data"} and not any(image.parent == folder for image in images):  # as hub downloads have it
        return _split_folder(folder / tops["data"].name, images, split)
    # A class may be called train, and so may the one class of a device; `train` next to `test` is a split.
    if tops and ("train" in tops and "test" in tops or set(tops) <= SPLIT_FOLDERS):
        if "train" not in tops:
            absent(split, f"{folder} holds no folder train, only {', '.join(sorted(tops))}")
        return tops.get(split)
    return folder if split == "train" else None


def _table(table: Path, folder: Path, base: Path) -> list[tuple[Path, Mapping[str, Any]]]:
    """The images below ``base`` that ``table`` names, and what it says of each."""
    text = utf8_text(table).removeprefix("\ufeff")  # which some programs put before a .csv file
    try:
        if table.suffix.lower() == ".csv":
            entries: list[Any] = list(csv.DictReader(io.StringIO(text, newline=""), restval=""))
        else:
            entries = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (csv.Error, ValueError, RecursionError) as error:
        raise DataError(f"{table} cannot be read: {error}") from error
    rows: list[tuple[Path, Mapping[str, Any]]] = []
    for number, entry in enumerate(entries, start=1):
        name = entry.get("file_name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not name:
            raise DataError(f"{table}: record {number} has no file_name")
        file = Path(os.path.normpath(table.parent / name))
        if not file.is_relative_to(folder):
            raise DataError(f"{table}: record {number} names {name}, which lies outside the folder")
        if file.is_relative_to(base):
            rows.append((file, {key: value for key, value in entry.items() if key not in (None, "file_name")}))
    return rows


def _classes(images: Sequence[Path], base: Path) -> list[str] | None:
    """The folder of each image; None where some lie in none, or all in one whose name says nothing."""
    if any(image.parent == base for image in images):
        return None
    names = [image.parent.name for image in images]
    only = set(names)
    return None if len(only) == 1 and only.pop().lower() in NO_CLASS else names


def _caption(value: object) -> str:
    """The first one where there are several; none is an empty one."""
    if isinstance(value, list):
        value = value[0] if value else None
    return "" if value is None else str(value)


def _from_parquet(files: Sequence[Path], name: str, asked: Asked) -> Pictures:
    datasets = quiet_datasets()
    try:
        found = datasets.load_dataset(
            "parquet", data_files={"train": [glob.escape(str(file)) for file in files]}, split="train"
        )
    except (OSError, ValueError, TypeError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{asked.source} holds no images or cannot be read: {error.__cause__ or error}") from error
    return _from_dataset(found, name, asked)


def _from_dataset(dataset: Dataset, name: str, asked: Asked) -> Pictures:
    datasets = quiet_datasets()
    features = dataset.features
    column = next((key for key, kind in features.items() if isinstance(kind, datasets.Image)), None)
    if column is None:  # written by something else than `datasets`, which notes what a column is
        column = next((key for key in ("image", "img") if key in features and _holds_files(features[key])), None)
    if column is None:
        raise DataError(f"{asked.source} has no column of images; its columns: {', '.join(dataset.column_names)}")
    asked.check(features)
    labels, captions = None, None
    classes: tuple[str, ...] = ()
    labelled = asked.label_column or next((key for key in ("label", "labels") if key in features), "")
    if labelled:
        kind = features[labelled]
        labels = [label_name(value, kind) for value in dataset[labelled]]
        # Folders become classes in the order of their names: on two devices the same number can mean two things.
        from_folders = dataset.builder_name == "imagefolder"
        classes = () if from_folders else tuple(getattr(kind, "names", None) or ())
    if asked.text_column in features:
        captions = [_caption(value) for value in dataset[asked.text_column]]
    raw = dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    stored = (_stored(row[column]) for row in raw)
    return decoded(stored, len(raw), name, labels, captions, classes, asked)


def _holds_files(feature: Any) -> bool:
    content = feature.get("bytes") if isinstance(feature, dict) else feature
    return getattr(content, "dtype", "") in ("binary", "large_binary")


def _stored(entry: Any) -> bytes | Path | None:
    """A file's content, or else where it lies."""
    if not entry:
        return None
    return entry["bytes"] or (Path(entry["path"]) if entry["path"] else None)
