"""What attackers do to a run: every robust rule against every attack, on the bundled language model and texts.

    python benchmarks/attacks.py [--clients 10] [--attackers 3] [--rounds 4] [--steps 10] [--markdown FILE]

The real apps run in one process. Attackers train as the others do and falsify the factors of their reply on the way:

- noise: the change of each factor is replaced by Gaussian noise of ten times its size;
- sign flip: three times the change, backwards;
- scaled: twenty times the change;
- colluding: all send one and the same random change of three times the size.

None of them breaks a limit of ``admission.*``, and all say the truth about their examples.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from flwr.app import Message  # noqa: E402

from fedgen_app.engines import in_process  # noqa: E402
from fedgen_app.engines.in_process import InProcessGrid  # noqa: E402
from fedgen_app.federation import wire  # noqa: E402
from fedgen_app.learning.adapters import Adapter, layout_of  # noqa: E402
from fedgen_app.settings import Settings, defaults  # noqa: E402

RULES = ("none", "norm-bound", "krum", "multi-krum", "geometric-median", "factor-median", "factor-trimmed-mean")
METRIC = "word_perplexity"


def noise(change: torch.Tensor, draw: torch.Generator, shared: torch.Generator) -> torch.Tensor:
    """Ten times as large as the change, in no direction of it."""
    return 10 * change.square().mean().sqrt() * torch.randn(change.shape, generator=draw)


def sign_flip(change: torch.Tensor, draw: torch.Generator, shared: torch.Generator) -> torch.Tensor:
    """Three steps back."""
    return -3 * change


def scaled(change: torch.Tensor, draw: torch.Generator, shared: torch.Generator) -> torch.Tensor:
    """Twenty steps forward."""
    return 20 * change


def colluding(change: torch.Tensor, draw: torch.Generator, shared: torch.Generator) -> torch.Tensor:
    """The same for all attackers."""
    return 3 * change.square().mean().sqrt() * torch.randn(change.shape, generator=shared)


ATTACKS: dict[str, Callable[..., torch.Tensor]] = {
    "noise": noise,
    "sign flip": sign_flip,
    "scaled": scaled,
    "colluding": colluding,
}


class Attacked(InProcessGrid):
    """The clients 0 to ``attackers`` - 1 falsify what they send."""

    def __init__(self, config: dict[str, Any], clients: int, attackers: int, attack: str) -> None:
        super().__init__(in_process.load_apps(ROOT)[1], config, clients)
        self.attackers, self.attack = attackers, attack

    def deliver(self, message: Message) -> Message:
        """The reply, falsified where an attacker trained."""
        reply = super().deliver(message)
        node = message.metadata.dst_node_id
        if node > self.attackers or message.metadata.message_type != "train" or reply.has_error():
            return reply
        received = wire.received(message.content, "fp32").adapter
        metrics = reply.content.metric_records["metrics"]
        number = int(reply.content.config_records["reply"][wire.ROUND])  # type: ignore[arg-type]
        trained = wire.unpack(reply.content.array_records["arrays"], layout_of(received), "fp32")
        parcel = wire.Parcel(self.falsified(trained, received, number, node))
        return Message(wire.reply(number, dict(metrics), parcel), reply_to=message)

    def falsified(self, trained: Adapter, received: Adapter, number: int, node: int) -> Adapter:
        """``received`` plus what the attack makes of the change."""
        draw = torch.Generator().manual_seed(1000 * number + node)
        shared = torch.Generator().manual_seed(number)
        attack = ATTACKS[self.attack]
        return {key: old + attack(trained[key] - old, draw, shared) for key, old in received.items()}


def run(args: argparse.Namespace, rule: str, attack: str, folder: Path) -> dict[str, float]:
    """The frozen and the final perplexity of one run."""
    config = defaults(ROOT) | {
        "output-dir": str(folder),
        "partition.by": "iid",
        "expected-clients": args.clients,
        "num-server-rounds": args.rounds,
        "local-epochs": 1000,
        "max-steps": args.steps,
        "learning-rate": 3e-3,
        "evaluate-every": args.rounds,
        "test-sequences": args.test_sequences,
        "personal.epochs": 0,
        "samples.count": 0,
        "aggregation.robust": rule,
        "aggregation.attackers": min(0.49, args.attackers / args.clients),
    }
    Settings.from_run_config(config)
    grid = Attacked(config, args.clients, args.attackers, attack) if attack else None
    in_process.run(ROOT, config, args.clients, grid)
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    metrics = found["final"]["metrics"]
    return {"frozen": found["frozen"][METRIC], "final": metrics[METRIC] if metrics else float("nan")}


def main() -> None:
    """Run all pairs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("clients", 10), ("attackers", 3), ("rounds", 4), ("steps", 10), ("test-sequences", 120)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rules", nargs="*", default=list(RULES), choices=RULES)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for rule in args.rules:
            found[rule] = {}
            for attack in ("", *ATTACKS):
                measured = run(args, rule, attack, Path(scratch) / f"{rule}-{attack.replace(' ', '-') or 'honest'}")
                found[rule][attack] = measured["final"]
                found[rule]["frozen"] = measured["frozen"]
                print(f"{rule:>20}  {attack or 'no attack':>10}  {measured['final']:,.0f}", file=sys.stderr, flush=True)
    frozen = next(iter(found.values()))["frozen"]
    lines = ["| `aggregation.robust` | no attack | " + " | ".join(ATTACKS) + " |", "|---" * (len(ATTACKS) + 2) + "|"]
    for rule, by_attack in found.items():
        lines.append(f"| {rule} | " + " | ".join(f"{by_attack[attack]:,.0f}" for attack in ("", *ATTACKS)) + " |")
    table = "\n".join([*lines, "", f"Word perplexity on the server's test set; frozen backbone {frozen:,.0f}."])
    print(table)
    if args.markdown:
        args.markdown.write_text(table + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
