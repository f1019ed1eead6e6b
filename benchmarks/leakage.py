"""What encoded prompts leak beside what their protection leaves of the clusters: the tables of `docs/clusters.md`.

    python benchmarks/leakage.py --candidates candidates.txt --output leakage.md

The candidates are all wordings of the four styles for the ten kinds of clothes, 240, which `fedgen audit-prompts` takes
from the file too. The clusters are those of the preset `styles`: what its twenty clients ask for, told the number.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from fedgen_app.cli import presets
from fedgen_app.cli.launch import find_app
from fedgen_app.data.styles import STYLES
from fedgen_app.federation.clustering import adjusted_rand, agglomerate
from fedgen_app.federation.cosines import mismatches
from fedgen_app.federation.leakage import recoveries
from fedgen_app.federation.protection import drawn, noisy
from fedgen_app.learning.backbone import load_task, open_backbone
from fedgen_app.learning.encoder import Numbers, direction, encode
from fedgen_app.learning.task import Share
from fedgen_app.settings import absolute, check, defaults

THINGS = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
DELTA = 1e-5
SIGMAS = (0.05, 0.1, 0.2, 0.5)
DRAWS = 10
SEED = 7


def wordings() -> dict[str, str]:
    """Every way in which the styles' captions and their owners name a thing, with its style."""
    return {
        text.format(thing): style
        for style, (_, told, asked) in STYLES.items()
        for text in (*told, *asked)
        for thing in THINGS
    }


def found_clusters(wants: Sequence[Numbers], styles: Sequence[str], sigma: float) -> float:
    """Adjusted Rand index against the clients' styles, the mean over draws of noise; a rotation changes nothing."""
    draw, scores = np.random.default_rng(SEED), []
    for _ in range(DRAWS if sigma else 1):
        rows = np.stack([noisy(each, drawn(len(each), sigma, draw)) for each in wants])
        scores.append(adjusted_rand(styles, agglomerate(rows @ rows.T, "count", len(STYLES), 0.0)))
    return float(np.mean(scores))


def guessed(asked: Sequence[Sequence[int]], vectors: Numbers, count: int) -> tuple[float, float]:
    """The share of devices of which the first guess is a prompt of its own, when each sends the mean of ``count``.

    Returns:
        By the nearest candidate in the clear, and by the cosines among the devices behind a rotation.
    """
    sent = np.stack([direction(vectors[list(each[:count])]) for each in asked])
    guesses = (sent @ vectors.T).argmax(axis=1), mismatches(sent, vectors).argmin(axis=1)
    clear, turned = (
        float(np.mean([guess in each[:count] for guess, each in zip(some, asked, strict=True)])) for some in guesses
    )
    return clear, turned


def guessed_pairs(asked: Sequence[Sequence[int]], vectors: Numbers, styles: Sequence[str]) -> float:
    """The share of devices with two prompts of which cosines tell both, where the attacker lists all of one style."""
    pairs = [pair for pair in combinations(range(len(styles)), 2) if styles[pair[0]] == styles[pair[1]]]
    means = vectors[[one for one, _ in pairs]] + vectors[[other for _, other in pairs]]
    listed = means / np.linalg.norm(means, axis=1, keepdims=True)
    truth = [pairs.index((min(each[:2]), max(each[:2]))) for each in asked]
    return float(np.mean(mismatches(listed[truth], listed).argmin(axis=1) == truth))


def measure() -> list[str]:
    """Both tables as lines of Markdown."""
    settings = check(absolute(defaults(find_app(None)) | presets.load("styles") | {"clusters.delta": DELTA}))
    task, backbone = load_task(settings.task), open_backbone(settings)
    candidates = wordings()
    vectors = encode(settings, task, backbone, list(candidates))
    places = {text: place for place, text in enumerate(candidates)}
    shares = [Share(client, settings.expected_clients) for client in range(settings.expected_clients)]
    asked = [[places[text] for text in task.requirements(settings, backbone, share)] for share in shares]
    styles = [list(candidates.values())[each[0]] for each in asked]
    wants = [direction(vectors[each]) for each in asked]
    clusters = {sigma: found_clusters(wants, styles, sigma) for sigma in (0.0, *SIGMAS)}
    sizes = {f"{sigma:g}": sigma for sigma in SIGMAS}
    lines = [
        f"| protection | attacker has | epsilon ({DELTA:g}) | found at once | among five | clusters of `styles` |",
        "|---|---|---|---|---|---|",
    ]
    for row in recoveries(vectors, range(len(candidates)), SIGMAS, settings):
        sigma = sizes.get(row.protection.rpartition("noise ")[2], 0.0)
        lines.append(f"| {' | '.join(row.as_text())} | {clusters[sigma]:.2f} |")
    lines += ["", "| prompts per device | in the clear | behind a rotation |", "|---|---|---|"]
    for count in (1, 2, 4, 8):
        clear, turned = guessed(asked, vectors, count)
        lines.append(f"| {count} | {clear:.0%} | {turned:.0%} |")
    both = guessed_pairs(asked, vectors, list(candidates.values()))
    lines.append(f"| 2, and all pairs of one style are candidates | | {both:.0%} |")
    return lines


def main() -> None:
    """Write the candidates, measure, print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=Path, help="also write them into this file, one per line")
    parser.add_argument("--output", type=Path, help="also write the tables into this file")
    args = parser.parse_args()
    if args.candidates:
        args.candidates.write_text("\n".join(wordings()) + "\n", encoding="utf-8")
    lines = measure()
    print("\n".join(lines))
    if args.output:
        args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
