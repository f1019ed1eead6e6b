"""Reading documents, from every kind of source and from the broken ones."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedgen_app.data.local import Corpus, files_below, holdout, label_name, limited, load_corpus
from fedgen_app.errors import DataError


def train(source: Path | str, **columns: str) -> Corpus:
    corpus = load_corpus(str(source), "train", **columns)
    assert corpus is not None
    return corpus


def parquet(file: Path, **columns: Sequence[Any]) -> Path:
    import pyarrow
    import pyarrow.parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file


lines = st.text(st.sampled_from("ab \0\t\x0b\x1c\u2028é\ufeff"), max_size=4)
ends = st.sampled_from(["\n", "\n", "\r\n", "\r", "\n\n"])


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.tuples(lines, ends), max_size=60).map(lambda parts: "".join(a + b for a, b in parts)), lines)
def test_pieces_of_a_text_file_give_it_back(tmp_path: Path, text: str, last: str) -> None:
    file = tmp_path / "any.txt"
    file.write_bytes(("x" + text + last).encode())
    corpus = train(file)
    assert "".join(corpus.texts).encode() == file.read_bytes()
    assert corpus.running and all(corpus.texts)
    written = sum(bool(line.strip()) for piece in corpus.texts for line in piece.replace("\r", "\n").split("\n"))
    assert len(corpus.texts) >= written / 16


def test_text_is_cut_at_blank_lines_and_every_16_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\none\ntwo\r\n \r\n\nthree\x00\n\n")
    assert train(tmp_path / "a.txt").texts == ("\none\ntwo\r\n \r\n\n", "three\0\n\n")
    sentences = [f"sentence {i}\n" for i in range(40)]
    (tmp_path / "ptb.txt").write_text("\n\n" + "".join(sentences))  # blank lines at the start do not count
    assert [text.count("\n") for text in train(tmp_path / "ptb.txt").texts] == [18, 16, 8]
    (tmp_path / "exact.txt").write_text("".join(sentences[:16]) + "\n")  # the blank line is no 17th line
    assert len(train(tmp_path / "exact.txt").texts) == 1


def test_a_folder_names_its_splits(tmp_path: Path) -> None:
    for name in ("train", "valid", "test"):
        (tmp_path / f"ptb.{name}.txt").write_text(f"{name}\n")
    assert train(tmp_path) == Corpus(tmp_path.name, ("train\n",), None, running=True, skipped=0)
    test = load_corpus(str(tmp_path), "test")
    assert test is not None and test.texts == ("test\n",)


def test_a_folder_without_splits_trains_on_everything_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second\n\nthird")
    (tmp_path / "a train journey.txt").write_text("first")  # a word in a title is no split
    (tmp_path / "notes.md").write_text("not this")
    assert train(tmp_path).texts == ("first", "second\n\n", "third")
    assert load_corpus(str(tmp_path), "test") is None


def test_brackets_and_stars_in_a_name_are_no_patterns(tmp_path: Path) -> None:
    folder = tmp_path / "a [few]*"
    folder.mkdir()
    (folder / "[1].csv").write_text("text\na\n")
    assert train(folder).texts == ("a",)


def test_a_downloaded_hub_folder(tmp_path: Path) -> None:
    parquet(tmp_path / "data" / "train-00000-of-00002.parquet", text=["a"])
    parquet(tmp_path / "data" / "train-00001-of-00002.parquet", text=["b"])
    parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", text=["v"])
    assert train(tmp_path).texts == ("a", "b")
    assert load_corpus(str(tmp_path), "test") is None
    (tmp_path / "data").rename(tmp_path / "plain-en")
    with pytest.raises(DataError, match="subfolders: plain-en"):
        train(tmp_path)


def test_bundled_topics_have_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet(tmp_path / "topics" / "train.parquet", text=["a", "b"], topic=["x", "y"])
    parquet(tmp_path / "topics" / "test.parquet", text=["c"], topic=["x"])
    assets = SimpleNamespace(path=lambda name: tmp_path / name)
    monkeypatch.setitem(sys.modules, "fedgen_assets", assets)  # type: ignore[arg-type]
    assert train("bundled") == Corpus("bundled topics", ("a", "b"), ("x", "y"), running=False, skipped=0)
    test = load_corpus("bundled", "test")
    assert test is not None and test.texts == ("c",)


def test_csv_is_taken_at_its_word(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b'id,text,label\n1,NA,01\n2,"a\r\nb, c",2\n3,12,\n4,,4\n5,x\0y,None\n')
    corpus = train(file, label_column="label")
    assert corpus.texts == ("NA", "a\r\nb, c", "12", "x\0y")
    assert corpus.labels == ("01", "2", "", "None")
    assert (corpus.skipped, corpus.running, corpus.name) == (1, False, "a.csv")


@pytest.mark.parametrize("ending", [".jsonl", ".json"])
def test_json_records_without_text_are_counted(tmp_path: Path, ending: str) -> None:
    records: list[dict[str, object]] = [
        {"body": "a", "kind": 1},
        {"body": 5, "kind": 1},
        {"kind": 2},
        {"body": "", "kind": 2},
        {"body": "x\0\u2028y", "kind": None},
    ]
    file = tmp_path / f"a{ending}"
    file.write_text(json.dumps(records) if ending == ".json" else "\n".join(map(json.dumps, records)))
    corpus = train(file, text_column="body", label_column="kind")
    assert (corpus.texts, corpus.labels, corpus.skipped) == (("a", "x\0\u2028y"), ("1", "none"), 3)
    assert load_corpus(str(file), "test", text_column="body") is None


def test_saved_data_sets_and_class_names(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["cat", "dog"])})
    data = Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    data.save_to_disk(tmp_path / "one")
    assert train(tmp_path / "one", label_column="label").labels == ("dog", "cat", "none")
    assert load_corpus(str(tmp_path / "one"), "test") is None
    DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(tmp_path / "both")
    test = load_corpus(str(tmp_path / "both"), "test")
    assert test is not None and test.texts == ("b",)
    DatasetDict({"dev": data}).save_to_disk(tmp_path / "dev")
    with pytest.raises(DataError, match="no split train, only dev"):
        train(tmp_path / "dev")


def test_class_numbers_beyond_the_names(tmp_path: Path) -> None:
    feature = SimpleNamespace(names=["cat", "dog"])
    assert [label_name(value, feature) for value in (0, 1, -1, None)] == ["cat", "dog", "none", "none"]
    for value in (2, -2):
        with pytest.raises(DataError, match=f"label {value} has no name; there are 2 names"):
            label_name(value, feature)


def test_files_below_a_folder(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "set", tmp_path / "elsewhere"
    for file in (folder / "b" / "2", folder / "a", folder / ".hidden", folder / ".git" / "x", elsewhere / "1"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (folder / "linked").symlink_to(elsewhere)
    (folder / "b" / "round").symlink_to(folder)
    names = [str(file.relative_to(folder)) for file in files_below(folder)]
    assert names == ["a", "b/2", "linked/1"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt holds no document"),
        ("blank.txt", b" \n\n", "blank.txt holds no document"),
        ("a.csv", b"", "a.csv holds no document"),
        ("head.csv", b"text\n", "head.csv holds no document"),
        ("empty.csv", b'text,n\n"",1\n', r"empty.csv holds no document \(1 records"),
        ("a.json", b"[]", "a.json holds no document"),
        ("a.parquet", b"hello", "a.parquet .*cannot be read"),
        ("a.jsonl", b'{"text": "a"', "a.jsonl .*cannot be read"),
        ("b.txt", b"good\nb\xffd", "b.txt is not UTF-8: byte 6"),
        ("b.csv", b"text\nb\xffd\n", "b.csv is not UTF-8: byte 6"),
        ("b.jsonl", b'{"text": "b\xffd"}', "b.jsonl is not UTF-8: byte 11"),
        ("c.csv", b"body,label\na,b\n", "no column 'text'; its columns: body, label"),
        ("c.jsonl", b'{"body": "a"}\n', "no column 'text'; its columns: body"),
        ("a.pdf", b"%PDF", r"a.pdf has an ending .*\.txt \.csv \.json \.jsonl \.parquet"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        train(file)
    assert str(file) in str(raised.value)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        train(tmp_path / "missing.txt")
    with pytest.raises(DataError, match="no such file or folder"):
        train("data/missing.csv")  # has the shape of a hub id as well
    with pytest.raises(DataError, match="holds no file of kind"):
        train(tmp_path)
    (tmp_path / "test.txt").write_text("a")
    with pytest.raises(DataError, match="no training file .* only test.txt"):
        train(tmp_path)
    (tmp_path / "train.txt").write_text("a")
    with pytest.raises(DataError, match="no column 'topic'; its columns: text"):
        train(tmp_path, label_column="topic")
    (tmp_path / "train.csv").write_text("text\na\n")
    with pytest.raises(DataError, match="mixes csv, text"):
        train(tmp_path)


def test_an_unreachable_hub_says_what_to_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="--repo-type dataset no-such-owner/no-such-set --local-dir FOLDER"):
        train("no-such-owner/no-such-set:plain@main")


def test_a_text_file_needs_no_data_libraries(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    code = (
        "import sys; from fedgen_app.data import cache, local, partition\n"
        "local.load_corpus(sys.argv[1], 'train')\n"
        "heavy = {'torch', 'datasets', 'pandas', 'sklearn', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a.txt"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@given(st.integers(2, 300), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_holdout_splits_everything(count: int, fraction: float, seed: int) -> None:
    kept, held = holdout(count, fraction, seed)
    assert sorted([*kept, *held]) == list(range(count))
    assert (np.diff(kept) > 0).all() and (np.diff(held) > 0).all()
    assert len(kept) >= 1 and len(held) >= 1
    assert abs(len(held) - fraction * count) <= 1
    assert all(np.array_equal(a, b) for a, b in zip(holdout(count, fraction, seed), (kept, held), strict=True))


def test_holdout_at_the_edges() -> None:
    assert not np.array_equal(holdout(100, 0.2, 0)[1], holdout(100, 0.2, 1)[1])
    assert [indices.tolist() for indices in holdout(1, 0.2, 0)] == [[0], [0]]
    with pytest.raises(DataError, match="no document"):
        holdout(0, 0.2, 0)


def test_a_limit_draws_from_the_whole_share_and_smaller_ones_are_nested() -> None:
    kept, _ = holdout(500, 0.2, 3)
    few, more = limited(kept, 10, seed=5), limited(kept, 100, seed=5)
    assert (len(few), len(more)) == (10, 100)
    assert set(few) < set(more) < set(kept)
    assert few.tolist() == sorted(few.tolist())
    assert not np.array_equal(few, limited(kept, 10, seed=6))
    assert few.max() > 250, "drawn from all of them, not the first"
    for no_limit in (0, 400, 1000):
        assert np.array_equal(limited(kept, no_limit, seed=5), kept)
