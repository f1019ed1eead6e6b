"""What a backbone in 4 or 8 bits costs in quality: word perplexity, frozen and after a short federated run.

    python benchmarks/bits.py [--backbone FOLDER --dataset FOLDER] [--rounds N] [--clients N] [--steps N] [--batch N]

The same run three times, in one process each, that differ in `backbone-bits` alone, on server and clients. Prints a
table in Markdown.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
BITS = (0, 8, 4)


def run(bits: int, options: argparse.Namespace, output: Path) -> dict[str, float]:
    """One run's perplexities, and what the weights take in memory."""
    sets = {
        "backbone": options.backbone,
        "dataset": options.dataset,
        "backbone-bits": bits,
        "dtype": options.dtype,
        "num-server-rounds": options.rounds,
        "max-steps": options.steps,
        "batch-size": options.batch,
        "test-sequences": options.test_rows,
        "evaluate-every": options.rounds,
        "personal.epochs": 0,
        "samples.count": 0,
        "holdout-fraction": 0.01,
    }
    command = [sys.executable, "-W", "ignore", "-c", "from fedgen_app.cli import main; main()", "run", str(ROOT)]
    command += ["--engine", "in-process", "--clients", str(options.clients), "--output", str(output)]
    command += [f"--set={key}={value}" for key, value in sets.items()]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if ended.returncode:
        raise SystemExit(ended.stderr[-2000:])
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    return {
        "frozen": results["frozen"]["word_perplexity"],
        "global": results["final"]["metrics"]["word_perplexity"],
        "loss": results["rounds"][-1]["train_loss"],
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backbone", default="bundled")
    parser.add_argument("--dataset", default="bundled")
    parser.add_argument("--dtype", default="bfloat16")
    for name, default in (("rounds", 3), ("clients", 3), ("steps", 20), ("batch", 8), ("test-rows", 100)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    print("| bits | frozen | after the run | last round's loss |\n|---|---|---|---|")
    whole: dict[str, float] = {}
    for bits in BITS:
        with tempfile.TemporaryDirectory() as folder:
            found = run(bits, options, Path(folder) / "run")
        whole = whole or found
        cells = [f"{found[name]:,.1f} ({found[name] / whole[name] - 1:+.1%})" for name in ("frozen", "global")]
        print(f"| {bits or options.dtype} | {' | '.join(cells)} | {found['loss']:.3f} |", flush=True)


if __name__ == "__main__":
    main()
