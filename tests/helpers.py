"""What the end-to-end tests share: a tiny language model, small data sets, and the real apps in one process."""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import json
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flwr.app import Message

from fedgen_app import cli
from fedgen_app.engines import in_process
from fedgen_app.engines.in_process import InProcessGrid
from fedgen_app.settings import Settings, Value, defaults

ROOT = Path(__file__).resolve().parents[1]
TOPICS = {
    "sea": "the captain and the crew set sail over the cold sea while the wind and the waves rose at night",
    "law": "the court and the judge read every article of the law before the people of this state could vote",
    "farm": "the farmer and the horse went to the old barn where wheat and barley lay dry after the harvest",
}


def write_tokenizer(folder: Path) -> int:
    """A byte-level BPE tokenizer trained on the topics' own words; the size of its vocabulary."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(list(TOPICS.values()) * 4, vocab_size=320, min_frequency=2, special_tokens=["<|end|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<|end|>")
    fast.save_pretrained(folder)
    return len(fast)


def make_llama(folder: Path, seed: int = 0) -> Path:
    """A random Llama of two layers, 32 wide, in float32, with its own tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True)
    size = write_tokenizer(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def sentences(topic: str, count: int, seed: int) -> list[str]:
    """Texts of a topic: its words in some order."""
    draw = random.Random(f"{topic}/{seed}")
    words = TOPICS[topic].split()
    return [" ".join(draw.choices(words, k=draw.randint(6, 14))) for _ in range(count)]


def write_records(file: Path, counts: Mapping[str, int], seed: int) -> None:
    """Records of text and label, as JSON lines."""
    records = [{"text": text, "label": topic} for topic, n in counts.items() for text in sentences(topic, n, seed)]
    random.Random(seed).shuffle(records)
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def make_data(folder: Path) -> Path:
    """Sixty labelled texts to train on and nine to test on."""
    folder.mkdir(parents=True)
    write_records(folder / "train.jsonl", {"sea": 30, "law": 18, "farm": 12}, seed=1)
    write_records(folder / "test.jsonl", dict.fromkeys(TOPICS, 3), seed=2)
    return folder


@functools.cache
def workspace() -> Path:
    """A folder for what all tests of this process share; gone when it ends."""
    folder = Path(tempfile.mkdtemp(prefix="fedgen-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def tiny_model() -> Path:
    """The folder of the tiny model, made once."""
    return make_llama(workspace() / "tiny-llama")


@functools.cache
def tiny_data() -> Path:
    """The folder of the small data set, made once."""
    return make_data(workspace() / "topics")


def tiny_overrides(output: Path) -> dict[str, Value]:
    """Settings that make a run of a second or two."""
    return {
        "backbone": str(tiny_model()),
        "dataset": str(tiny_data()),
        "label-column": "label",
        "output-dir": str(output),
        "dtype": "float32",
        "device": "cpu",
        "num-server-rounds": 2,
        "sequence-length": 32,
        "batch-size": 4,
        "learning-rate": 5e-3,
        "lora.rank": 4,
        "lora.alpha": 8.0,
        "partition.by": "label",
        "partition.alpha": 1.0,
        "samples.count": 1,
        "samples.length": 5,
    }


def tiny_config(output: Path, **overrides: Value) -> dict[str, Value]:
    """A whole run config; an override's key is written with _ for - and __ for a dot."""
    changed = {key.replace("__", ".").replace("_", "-"): value for key, value in overrides.items()}
    config = defaults(ROOT) | tiny_overrides(output) | changed
    Settings.from_run_config(config)
    return config


def tiny_settings(**overrides: Value) -> Settings:
    """The same as settings, of a run without a folder."""
    return Settings.from_run_config(tiny_config(Path(), **overrides))


class RecordingGrid(InProcessGrid):
    """Keeps every message that crosses the wire, both ways, in order."""

    def __init__(self, run_config: Mapping[str, Value], clients: int) -> None:
        super().__init__(in_process.load_apps(ROOT)[1], run_config, clients)
        self.sent: list[Message] = []
        self.replies: list[Message] = []

    def deliver(self, message: Message) -> Message:
        self.sent.append(message)
        reply = super().deliver(message)
        self.replies.append(reply)
        return reply


def federate(config: Mapping[str, Value], clients: int = 3, grid: InProcessGrid | None = None) -> dict[str, Any]:
    """Run the apps to the end; results.json."""
    in_process.run(ROOT, config, clients, grid)
    return results(Path(str(config["output-dir"])))


def results(folder: Path) -> dict[str, Any]:
    """results.json of a run folder."""
    found: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return found


def events(folder: Path) -> list[dict[str, Any]]:
    """The lines of events.jsonl."""
    return [json.loads(line) for line in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()]


def without_times(value: Any) -> Any:
    """The same JSON value without what differs between two equal runs: names of runs and seconds."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in ("seconds", "run", "time")}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def client_states(folder: Path, number: int) -> dict[int, dict[str, torch.Tensor]]:
    """What each simulated client kept on its own disk after a round."""
    from safetensors.torch import load_file

    files = folder.glob(f"clients/*/state/round-{number:04d}.safetensors")
    return {int(file.parents[1].name): load_file(file) for file in files}


def weighted_mean(
    states: Mapping[int, Mapping[str, torch.Tensor]], weights: Mapping[int, float]
) -> dict[str, torch.Tensor]:
    """The slow, obvious mean of adapters, number by number, in client order and float64."""
    clients, mean = sorted(states), {}
    total = sum(weights[c] for c in clients)
    for key in states[clients[0]]:
        added = torch.zeros(states[clients[0]][key].shape, dtype=torch.float64)
        for c in clients:
            added = added + weights[c] * states[c][key].to(torch.float64)
        mean[key] = (added / total).to(torch.float32)
    return mean


FEDGEN = Path(sys.executable).parent / "fedgen"


@dataclass(frozen=True)
class Ended:
    """What a command left: its exit status and what it printed."""

    status: int
    out: str
    err: str


def command(*arguments: str | Path) -> Ended:
    """``fedgen ARGUMENTS`` in this process."""
    out, err, before = io.StringIO(), io.StringIO(), (sys.argv, signal.getsignal(signal.SIGTERM))
    sys.argv = ["fedgen", *map(str, arguments)]
    status: object = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as end:
        status = end.code
    finally:
        sys.argv = before[0]
        signal.signal(signal.SIGTERM, before[1])
    assert status is None or isinstance(status, int), status
    return Ended(status or 0, out.getvalue(), err.getvalue())


def run_arguments(output: Path, clients: int = 3, **overrides: Value) -> list[str]:
    """``run`` of the tiny model in one process, with every setting that differs from the default."""
    config, standard = tiny_config(output, **overrides), defaults(ROOT)
    changed = [f"--set={k}={v}" for k, v in config.items() if v != standard[k] and k != "output-dir"]
    return ["run", str(ROOT), "--engine", "in-process", "--clients", str(clients), "--output", str(output), *changed]
