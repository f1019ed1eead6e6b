"""What the training scripts share: how long, how fast, from where, and the file that says what was done."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Recipe:
    """Linear warm-up, cosine decay to ``floor`` of the learning rate. Ends after `minutes` of training or `steps`."""

    minutes: float | None
    steps: int | None
    batch_size: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    floor: float = 0.0
    seed: int = 1

    def progress(self, step: int, seconds: float) -> float:
        """How much of the training is done, 0 to 1."""
        if self.steps is not None:
            return min(1.0, step / self.steps)
        return min(1.0, seconds / (60 * (self.minutes or 1.0)))

    def rate(self, step: int, progress: float) -> float:
        """Learning rate at a step."""
        decayed = self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))
        return self.learning_rate * min(1.0, (step + 1) / self.warmup_steps) * decayed


def arguments(about: str, output: str) -> argparse.ArgumentParser:
    """A parser with what every script takes: --output, --minutes or --steps, --threads."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help=output)
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="minutes of training")
    length.add_argument("--steps", type=int, help="optimiser steps")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    return parser


def draw_of(seed: int, step: int) -> torch.Generator:
    """What is random in a step hangs on (seed, step) alone: a resumed training sees the same."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def save_state(folder: Path, state: Mapping[str, object]) -> None:
    """Write the checkpoint ``state.pt`` whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(dict(state), folder / "state.pt.new")
    os.replace(folder / "state.pt.new", folder / "state.pt")


def load_state(folder: Path | None, device: torch.device | str = "cpu") -> dict[str, Any] | None:
    """The checkpoint of a folder; None where there is none."""
    if folder is None or not (folder / "state.pt").exists():
        return None
    state: dict[str, Any] = torch.load(folder / "state.pt", weights_only=True, map_location=device)
    print(f"resumed at step {state['step']}", flush=True)
    return state


def write_report(folder: Path, report: Mapping[str, object]) -> None:
    """What was done, into training.json and onto the screen."""
    text = json.dumps(report, indent=2)
    (folder / "training.json").write_text(text + "\n")
    print(text)


def without_machine_notes(tokenizer: Path) -> None:
    """Save a tokenizer's configuration under the class that every release of transformers knows.

    Without what it says of the machine on which it was made.
    """
    file = tokenizer / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    for note in ("backend", "is_local", "local_files_only"):
        config.pop(note, None)
    file.write_text(json.dumps(config, indent=2) + "\n")
