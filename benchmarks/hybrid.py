"""Images between two clusters of a finished run: a row per prompt, a column per mixture, from one of them to the other.

    python benchmarks/hybrid.py RUN_DIR --clusters 0,2 --steps 5 --prompt TEXT --prompt TEXT --output grid.png

The mixtures are the exact ones of `fedgen generate --mix`, and all images come from one batch, each with its own. All
images of a row begin with the same noise, so that nothing but the mixture differs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from fedgen_app.cli.finished import settings_of
from fedgen_app.cli.mixing import clusters_in
from fedgen_app.errors import FedgenError, SettingsError
from fedgen_app.federation.hybrid import adapters_of
from fedgen_app.federation.method import load_method
from fedgen_app.learning.backbone import load_task, open_backbone
from fedgen_app.learning.mixture import Mixture, active
from fedgen_app.learning.task import Sample
from fedgen_app.tasks._grid import side_by_side


def between(
    run: Path, first: int, second: int, shares: Sequence[float], prompts: Sequence[str], seed: int
) -> dict[str, list[Sample]]:
    """For each share of the second cluster one image per prompt, under the weights of both.

    Raises:
        SettingsError: the run draws no images for encoded prompts.
        AdapterError: all its weights learned, or an adapter is damaged.
    """
    settings = settings_of(run)
    task = load_task(settings.task)
    backbone = open_backbone(settings, weights=load_method(settings.method).weights)
    stages = task.stages
    if stages is None or not stages.hides(backbone):
        raise SettingsError(f"{run}: this {settings.task} run draws no images for encoded prompts")
    mixtures = [Mixture.of({first: 1 - share, second: share}) for share in shares]
    each = [mixture for mixture in mixtures for _ in prompts]
    drawn = settings.sampling(batch=len(each))
    noise = stages.noise(drawn, backbone, len(prompts), seed).repeat(len(shares), 1, 1, 1)
    with active(backbone.model, adapters_of(run / "clusters", (first, second)), each) as rows:
        encoded = []
        for begin in range(0, len(each), len(prompts)):
            with rows(range(begin, begin + len(prompts))):  # a text encoder may have learned too
                encoded.append(stages.encode(backbone, prompts))
        steps = min(drawn.samples.steps, stages.shapes(drawn, backbone).steps)
        reached = stages.advance(drawn, backbone, torch.cat(encoded), noise, 0, steps, rows)
    columns = torch.split(reached, len(prompts))
    return {
        f"{1 - share:.3g} : {share:.3g}": [
            Sample(text, image) for text, image in zip(prompts, stages.finish(backbone, column), strict=True)
        ]
        for share, column in zip(shares, columns, strict=True)
    }


def read_way(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, tuple[int, int], list[float]]:
    """The arguments, RUN_DIR, --clusters, --steps and --seed too; from which cluster to which, and in what shares."""
    parser.add_argument("run", type=Path, metavar="RUN_DIR")
    parser.add_argument("--clusters", required=True, help="two of them, such as 0,2")
    parser.add_argument("--steps", type=int, default=5, help="mixtures")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    known = clusters_in(args.run / "clusters")
    named = [int(part) for part in args.clusters.split(",") if part.isdecimal()]
    if len(set(named)) != 2 or not set(named) <= set(known):
        parser.error(f"--clusters {args.clusters}: should name two of {', '.join(map(str, known)) or 'none'}")
    if args.steps < 2:
        parser.error(f"--steps {args.steps}: should be 2 or more")
    return args, (named[0], named[1]), [step / (args.steps - 1) for step in range(args.steps)]


def main() -> None:
    """Draw the grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", action="append", required=True, help="may be repeated")
    parser.add_argument("--output", type=Path, default=Path("grid.png"))
    args, named, shares = read_way(parser)
    try:
        columns = between(args.run, *named, shares, args.prompt, args.seed)
    except FedgenError as error:
        parser.exit(error.exit_status, f"{error}\n")
    args.output.write_bytes(side_by_side(columns))
    print(args.output)


if __name__ == "__main__":
    main()
