"""Read documents: bundled topics, a file, a folder or a data set of the hub; and what reading images shares."""

from __future__ import annotations

import glob
import io
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedgen_app.errors import DataError
from fedgen_app.seeds import derive

if TYPE_CHECKING:
    from datasets import Dataset

IntArray = NDArray[np.int64]
Split = Literal["train", "test"]

BUILDERS = {".txt": "text", ".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
LINES_PER_PIECE = 16
PROMPTS = "prompts.txt"  # in a device's folder: what it is to generate, and no document
MOST_PROMPTS = 64
NO_LABEL = "none"

_ROLE = re.compile(r"(?:.*[._-])?(train|test|validation|valid|val|dev)(?:-\d+-of-\d+)?", re.IGNORECASE)
_HUB_ID = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(?P<config>[^:@]+))?(?:@(?P<revision>[^@]+))?"
)


@dataclass(frozen=True)
class Corpus:
    """Documents of one split.

    name: how a model card names the source: "bundled topics", a file's or folder's name, a hub id.
    texts: the documents, in source order.
    labels: one per document where the source has a label column.
    running: True where the texts are consecutive pieces of plain text files, whose concatenation gives the
        files back byte for byte; False where each text is a record of its own.
    skipped: records left out because their text was missing, not a string, or empty.
    """

    name: str
    texts: tuple[str, ...]
    labels: tuple[str, ...] | None
    running: bool
    skipped: int


def load_corpus(source: str, split: Split, *, text_column: str = "text", label_column: str = "") -> Corpus | None:
    """Read one split of ``source``; None where there is no test split.

    source: "bundled"; a file (.txt .csv .json .jsonl .parquet: all of it is the training split); a folder of
    such files; a folder written by ``datasets.save_to_disk``; or a hub id ``owner/name[:config][@revision]``.
    In a folder, ``[PREFIX.]train.*`` and ``[PREFIX.]test.*`` are the splits; without the former, every file
    that names no split trains. Validation files are left alone.

    Raises DataError where the source, a column or every document is missing, or a file is not what its ending
    says.
    """
    path = Path(source).expanduser()
    if source == "bundled":
        import fedgen_assets

        name, label_column = "bundled topics", label_column or "topic"
        files = split_files(Path(fedgen_assets.path("topics")), split)
    elif path.is_file():
        name, files = path.name, [path] if split == "train" else []
    elif path.is_dir():
        name = path.resolve().name
        if is_saved(path):
            dataset = saved_dataset(path, split)
            return None if dataset is None else _records(name, dataset, str(path), text_column, label_column)
        files = split_files(path, split)
    else:
        dataset = hub_dataset(source, split)
        return None if dataset is None else _records(source, dataset, source, text_column, label_column)
    if not files:
        return None
    kind = _kind_of(files, source)
    if kind == "text":
        return _plain(name, files, source, text_column, label_column)
    dataset = _read_records(kind, files, source, [column for column in (text_column, label_column) if column])
    return _records(name, dataset, source, text_column, label_column)


def holdout(count: int, fraction: float, seed: int) -> tuple[IntArray, IntArray]:
    """Indices of the documents to train on and of those held out, each sorted and int64.

    Where count >= 2, each side has at least one. A single document stands on both sides: there is no other
    way to say anything about it. Raises DataError for count 0.
    """
    if count < 1:
        raise DataError("there is no document to hold out: the client's share is empty")
    if count == 1:
        return np.zeros(1, np.int64), np.zeros(1, np.int64)
    held = min(max(round(count * fraction), 1), count - 1)
    order = np.random.default_rng(seed).permutation(count).astype(np.int64)
    return np.sort(order[held:]), np.sort(order[:held])


def limited(kept: IntArray, most: int, seed: int) -> IntArray:
    """At most ``most`` of the documents to train on, sorted, drawn by the seed; 0: all of them.

    A smaller limit keeps some of those that a larger one keeps, so that two of them differ in the amount of data alone.
    """
    if most == 0 or len(kept) <= most:
        return kept
    return np.sort(np.random.default_rng(seed).permutation(kept)[:most])


def own_rows(
    parts: Sequence[IntArray], index: int, pooled: bool, fraction: float, seed: int, unit: str, most: int = 0
) -> tuple[IntArray, IntArray]:
    """What one client trains on and what it holds out, as indices into the source.

    Args:
        parts: What every client owns; of a device's own folder there is one part.
        pooled: Train on what all clients train on, together: their hold-outs stay unseen.
        unit: What there is one of per index, for the error's text.
        most: So many that a client trains on at most, whatever it holds out; 0: no limit.

    Raises:
        DataError: the client owns nothing.
    """

    def dealt(number: int) -> tuple[IntArray, IntArray]:
        owned = parts[number]
        if len(owned) == 0:
            raise DataError(f"client {number} of {len(parts)} owns no {unit}")
        kept, held = holdout(len(owned), fraction, derive(seed, "holdout", number))
        return owned[limited(kept, most, derive(seed, "limit", number))], owned[held]

    kept, held = dealt(index)
    return np.concatenate([dealt(number)[0] for number in range(len(parts))]) if pooled else kept, held


def own_prompts(folder: str, file: str = "") -> list[str]:
    """What a device's owner asks for: one prompt per line of ``file``, or of prompts.txt in its data folder.

    Raises:
        DataError: ``file`` is named and cannot be read.
    """
    place = Path(file).expanduser() if file else Path(folder).expanduser() / PROMPTS
    if not file and not place.is_file():
        return []
    lines = (line.strip() for line in utf8_text(place).splitlines())
    return [line for line in lines if line][:MOST_PROMPTS]


def files_below(folder: Path) -> list[Path]:
    """All files below a folder, sorted, those behind links too; not what a file manager or an archiver hides there.

    Raises DataError where a folder cannot be listed.
    """

    def unreadable(error: OSError) -> None:
        raise DataError(f"{folder} cannot be read: {error}") from error

    found: list[Path] = []
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link to a folder above would go round for ever
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(each for each in folders if not each.startswith((".", "__MACOSX")))
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(found)


def split_files(folder: Path, split: Split, endings: Collection[str] = tuple(BUILDERS)) -> list[Path]:
    """Give the files of ``split`` in ``folder`` or, as hub downloads have it, in ``folder/data``.

    Raises DataError where no file has one of the ``endings``, or none is for training.
    """
    files = _ending(folder, endings) or _ending(folder / "data", endings)
    if not files:
        folders = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != ".")
        inside = f"; its subfolders: {', '.join(folders)}" if folders else ""
        raise DataError(f"{folder} holds no file of kind {' '.join(endings)}{inside}")
    roles = {file: match[1].lower() if (match := _ROLE.fullmatch(file.stem)) else "" for file in files}
    wanted = [file for file in files if roles[file] == split]
    if split == "train" and not wanted:
        wanted = [file for file in files if not roles[file]]
        if not wanted:
            names = ", ".join(file.name for file in files)
            raise DataError(f"{folder} holds no training file (train.*), only {names}")
    return wanted


def _ending(folder: Path, endings: Collection[str]) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() in endings and file.name[0] != "." and file.name != PROMPTS and file.is_file()
    )


def _kind_of(files: Sequence[Path], source: str) -> str:
    kinds = {BUILDERS.get(file.suffix.lower(), "") for file in files}
    if "" in kinds:
        raise DataError(f"{source} has an ending that cannot be read; allowed: {' '.join(BUILDERS)}")
    if len(kinds) > 1:
        raise DataError(f"{source} mixes {', '.join(sorted(kinds))} files in one split; keep one kind")
    return kinds.pop()


def _plain(name: str, files: Iterable[Path], source: str, text_column: str, label_column: str) -> Corpus:
    # Read here and not by `datasets`, which turns \r\n into \n.
    _check_columns(["text"], [text_column, label_column], source)
    texts = tuple(piece for file in files for piece in _pieces(utf8_text(file)))
    return _checked(Corpus(name, texts, None, running=True, skipped=0), source)


def utf8_text(file: Path) -> str:
    """All of a file, line ends as they are.

    Raises DataError where it cannot be read or is not UTF-8.
    """
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8: byte {error.start} ({error.reason}); convert it to UTF-8") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error}") from error


def _pieces(text: str) -> Iterator[str]:
    """Cut at blank lines, which stay with the piece before them, and after 16 lines where there are none."""
    piece: list[str] = []
    filled, blank_before = 0, False
    for line in io.StringIO(text, newline=""):  # newline="": ends at \n, \r\n or \r, and keeps them
        blank = not line.strip()
        if filled and not blank and (blank_before or filled == LINES_PER_PIECE):
            yield "".join(piece)
            piece, filled = [], 0
        piece.append(line)
        filled += not blank
        blank_before = blank
    if piece:
        yield "".join(piece)


def _read_records(kind: str, files: Sequence[Path], source: str, columns: Sequence[str]) -> Dataset:
    if kind != "parquet":
        for file in files:  # checked here: the readers differ in what they let pass, and none names the byte
            utf8_text(file)
    filled = [str(file) for file in files if file.stat().st_size]
    if not filled:
        raise DataError(f"{source} holds no document: it is empty")
    datasets = quiet_datasets()
    options: dict[str, Any] = {}
    try:
        if kind == "csv":
            options = _csv_options(filled[0], columns, source)
        # A bracket or a star in a name is no pattern.
        return datasets.load_dataset(
            kind, data_files={"train": [glob.escape(file) for file in filled]}, split="train", **options
        )
    except DataError:
        raise
    except (OSError, ValueError, TypeError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{source} holds no document or cannot be read: {error.__cause__ or error}") from error


def _csv_options(file: str, columns: Sequence[str], source: str) -> dict[str, Any]:
    """Ask for strings as they stand: guessed types would turn the text "NA" into nothing and "007" into 7."""
    import pandas

    _check_columns([str(column) for column in pandas.read_csv(file, nrows=0).columns], columns, source)
    converters = dict.fromkeys(columns, str)
    return {"usecols": list(converters), "converters": converters, "keep_default_na": False}


def is_saved(folder: Path) -> bool:
    """Whether ``datasets.save_to_disk`` wrote the folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def saved_dataset(folder: Path, split: Split) -> Dataset | None:
    """One split of what ``datasets.save_to_disk`` wrote; None where there is no test split.

    Raises DataError where it is damaged or has no training split.
    """
    datasets = quiet_datasets()
    try:
        found = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder} cannot be read as a saved data set: {error}") from error
    return choose_split(found if isinstance(found, datasets.DatasetDict) else {"train": found}, split, str(folder))


def hub_dataset(source: str, split: Split, endings: Collection[str] = tuple(BUILDERS)) -> Dataset | None:
    """One split of a hub data set ``owner/name[:config][@revision]``; None where there is no test split.

    endings: what a file could have been: an id with one of them is a file that is missing.

    Raises DataError where it is no such id, or the hub does not give it.
    """
    match = _HUB_ID.fullmatch(source)
    if match is None or Path(source).suffix.lower() in endings:
        raise DataError(
            f"{source}: no such file or folder; allowed: bundled, a file ({' '.join(endings)}), a folder, "
            "or a hub id owner/name[:config][@revision]"
        )
    name = match["name"]
    datasets = quiet_datasets()
    try:
        splits = datasets.load_dataset(name, match["config"], revision=match["revision"])
    except OSError as error:  # out of reach, not there, or private
        raise DataError(
            f"{source} is no file or folder here, and the hub does not give it ({error}): download it with "
            f"`hf download --repo-type dataset {name} --local-dir FOLDER` where there is a net and set "
            "dataset=FOLDER"
        ) from error
    except (ValueError, TypeError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{source} cannot be read: {error.__cause__ or error}") from error
    return choose_split(splits, split, source)


def choose_split(splits: Mapping[Any, Dataset], split: Split, source: str) -> Dataset | None:
    """One of a data set's splits; None where there is no test split.

    Raises DataError where there is no training split.
    """
    if split in splits:
        return splits[split]
    if split == "test":
        return None
    raise DataError(f"{source} has no split train, only {', '.join(map(str, splits))}")


def _records(name: str, dataset: Dataset, source: str, text_column: str, label_column: str) -> Corpus:
    _check_columns(dataset.column_names, [text_column, label_column], source)
    texts = list(dataset[text_column])
    kept = [index for index, text in enumerate(texts) if isinstance(text, str) and text]
    labels = None
    if label_column:
        values, feature = list(dataset[label_column]), dataset.features[label_column]
        labels = tuple(label_name(values[index], feature) for index in kept)
    corpus = Corpus(name, tuple(texts[index] for index in kept), labels, running=False, skipped=len(texts) - len(kept))
    return _checked(corpus, source)


def label_name(value: object, feature: Any) -> str:
    """Give a class its name; -1 is how ``datasets`` writes a class that is missing.

    Raises DataError for a number beyond the names.
    """
    names = getattr(feature, "names", None)
    if value is None or (names and value == -1):
        return NO_LABEL
    if names and isinstance(value, int) and not 0 <= value < len(names):
        raise DataError(f"label {value} has no name; there are {len(names)} names")
    return str(names[value]) if names and isinstance(value, int) else str(value)


def _check_columns(there: Sequence[str], wanted: Iterable[str], source: str) -> None:
    for column in wanted:
        if column and column not in there:
            raise DataError(f"{source} has no column {column!r}; its columns: {', '.join(there)}")


def _checked(corpus: Corpus, source: str) -> Corpus:
    if not any(text.strip() for text in corpus.texts):
        left_out = f" ({corpus.skipped} records without text)" if corpus.skipped else ""
        raise DataError(f"{source} holds no document{left_out}")
    return corpus


def quiet_datasets() -> Any:
    """The module ``datasets``, without its bars and its second telling of what it raises."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs as an error, it also raises
    return datasets
