"""Texts between two clusters of a finished run over the bundled topics: how well mixtures know the works of either.

    python benchmarks/hybrid_texts.py RUN_DIR --clusters 0,2 --topics drama,novel --steps 5 --prompt TEXT

Prints a table: for each mixture, the exact one of `fedgen generate --mix`, bits per byte of both works' test passages
and what the prompt becomes, with the same random numbers for each.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from hybrid import read_way

from fedgen_app.cli.finished import settings_of
from fedgen_app.data.local import load_corpus
from fedgen_app.errors import DataError, FedgenError, SettingsError
from fedgen_app.federation.hybrid import adapters_of
from fedgen_app.federation.method import load_method
from fedgen_app.learning.backbone import load_task, open_backbone
from fedgen_app.learning.mixture import Mixture, active
from fedgen_app.tasks._text import pack, start_token, tokenise


def between(
    run: Path, first: int, second: int, topics: Sequence[str], shares: Sequence[float], prompt: str, seed: int
) -> Iterator[tuple[float, list[float], str]]:
    """For each share of the second cluster: it, bits per byte on each topic, and a continuation.

    Raises:
        SettingsError: the run is not one of texts.
        DataError: a topic is none of the bundled.
        AdapterError: all its weights learned, or an adapter is damaged.
    """
    settings = settings_of(run)
    if settings.task != "language":
        raise SettingsError(f"{run}: a {settings.task} run; should be one of texts")
    task, corpus = load_task(settings.task), load_corpus("bundled", "test", label_column="topic")
    assert corpus is not None and corpus.labels is not None
    labels = np.asarray(corpus.labels)
    if unknown := [topic for topic in topics if topic not in labels]:
        raise DataError(f"no topic {unknown[0]}; there are {', '.join(sorted(set(corpus.labels)))}")
    backbone = open_backbone(settings, weights=load_method(settings.method).weights)
    documents, start = tokenise(corpus, backbone.processor), start_token(backbone.processor)
    owned = [np.flatnonzero(labels == topic) for topic in topics]
    passages = [pack(documents, chosen, settings.sequence_length, start) for chosen in owned]
    parts = adapters_of(run / "clusters", (first, second))
    for share in shares:
        with active(backbone.model, parts, [Mixture.of({first: 1 - share, second: share})]) as rows:
            with rows([0]):
                known = [task.evaluate(settings, backbone, examples, seed)["bits_per_byte"] for examples in passages]
            (written,) = task.sample(settings, backbone, [prompt], seed, rows)
        yield share, known, str(written.content)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topics", required=True, help="what the two have learned, such as drama,novel")
    parser.add_argument("--prompt", required=True)
    args, named, shares = read_way(parser)
    topics = args.topics.split(",")
    print(f"| weights | {' | '.join(f'bits per byte, {topic}' for topic in topics)} | {args.prompt!r} |")
    print("|---|" + "---:|" * len(topics) + "---|")
    try:
        for share, bits, written in between(args.run, *named, topics, shares, args.prompt, args.seed):
            figures = " | ".join(f"{value:.3f}" for value in bits)
            text = " / ".join(written.split("\n")).replace("|", "\\|")
            print(f"| {1 - share:.3g} : {share:.3g} | {figures} | {text} |", flush=True)
    except FedgenError as error:
        parser.exit(error.exit_status, f"{error}\n")


if __name__ == "__main__":
    main()
