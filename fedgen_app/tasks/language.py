"""Language: any causal model that AutoModelForCausalLM loads; text packed into full sequences; word perplexity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils import logging as transformers_logging

from fedgen_app.errors import BackboneError, SettingsError
from fedgen_app.learning.backbone import Backbone, facts_of
from fedgen_app.learning.encoder import MOST_TOKENS
from fedgen_app.learning.mixture import Rows, unmixed
from fedgen_app.learning.quantised import placed
from fedgen_app.learning.task import Batch, Examples, Held, Loaded, Metrics, Probe, Render, Sample, Task
from fedgen_app.seeds import derive
from fedgen_app.settings import LoraSettings, Settings
from fedgen_app.tasks._text import IGNORED, load_data, load_test, requirements, split, start_token

EVALUATED_TOKENS = 2048  # per forward pass: bounds the logits' memory, 2048 x 49152 float32 = 400 MB
# The usual places of LoRA in a language model; the first set of which every name occurs is taken.
TARGETS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "v_proj"),
    ("c_attn",),
    ("query_key_value",),
    ("qkv_proj",),
    ("query", "value"),
    ("q", "v"),
    ("Wqkv",),
)
CONFIG = (
    *("config.json", "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)
METRICS = ("word_perplexity", "token_perplexity", "bits_per_byte")
PROMPTS = ("And it came to pass", "My fellow citizens,", "The captain")


def lora_targets(model: nn.Module, lora: LoraSettings) -> tuple[str, ...]:
    """q and v projections, or what stands for them in this architecture.

    Raises:
        BackboneError: none of the known names occurs.
        SettingsError: the adapter is wanted in something that a language model does not have.
    """
    for key, value in (("convolutions", lora.convolutions), ("text-encoder", lora.text_encoder)):
        if value:
            raise SettingsError(f"lora.{key} = true: a language model has none; for task = diffusion only")
    leaves = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    for names in TARGETS:
        if leaves.issuperset(names):
            return names
    raise BackboneError(
        f"no known attention projection in {type(model).__name__}: set lora.targets to some of {sorted(leaves)}"
    )


def load_backbone(folder: Path, held: Held, lora: LoraSettings) -> Loaded:
    """Model and tokenizer from a folder; weights in their own type on disk are mapped, not copied.

    Raises:
        BackboneError: the folder holds no causal language model with safetensors weights.
    """
    cast(Any, transformers_logging).disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            # What is to be quantised is read as it lies on disk: mapped, and never there as a whole in a larger type.
            dtype="auto" if held.bits else held.dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0][:300]
        raise BackboneError(f"{folder}: not a causal language model that transformers loads: {first}") from None
    if tokenizer.eos_token_id is None:
        raise BackboneError(f"{folder}: its tokenizer has no end-of-text token")
    model.config.use_cache = False
    return Loaded(placed(cast(nn.Module, model), held), tokenizer)


def config(folder: Path) -> dict[str, object]:
    """The model's configuration and all that its tokenizer reads."""
    return {name: facts_of(folder / name) for name in CONFIG if (folder / name).is_file()}


def save_memory(model: nn.Module) -> None:
    """Gradient checkpointing."""
    cast(Any, model).gradient_checkpointing_enable({"use_reentrant": False})


def cross_entropy(model: nn.Module, batch: Batch, noise: torch.Generator) -> Tensor:
    """Mean cross entropy over the batch's targets, in nats."""
    logits = model(input_ids=batch["input_ids"]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten(), ignore_index=IGNORED)


@torch.inference_mode()
def negative_log_likelihood(backbone: Backbone, examples: Examples) -> float:
    """Sum of -log p over all targets, in nats."""
    backbone.model.eval()
    length = examples.rows["labels"].shape[1]
    step = max(1, EVALUATED_TOKENS // length)
    total = 0.0
    for start in range(0, len(examples), step):
        total += float(_scored(backbone, {k: v[start : start + step] for k, v in examples.rows.items()}))
    return total


def _scored(backbone: Backbone, rows: Batch) -> Tensor:
    """Sum of -log p over the targets of some rows."""
    logits = backbone.model(input_ids=rows["input_ids"].to(backbone.device)).logits
    targets = rows["labels"].to(backbone.device).flatten()
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=IGNORED, reduction="sum")


def outline(folder: Path, held: Held, lora: LoraSettings) -> Loaded:
    """The model of ``config.json``.

    Raises:
        BackboneError: the folder holds no causal language model.
    """
    try:
        shape = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model = cast(Any, AutoModelForCausalLM).from_config(shape, dtype=held.dtype, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0][:300]
        raise BackboneError(f"{folder}: not a causal language model that transformers knows: {first}") from None
    model.config.use_cache = False
    return Loaded(cast(nn.Module, model), None)


def probe(settings: Settings, backbone: Backbone) -> Probe:
    """A batch of full rows, and as many rows as are evaluated at once."""

    def rows(count: int) -> Batch:
        tokens = torch.zeros(count, settings.sequence_length, dtype=torch.long)
        return {"input_ids": tokens, "labels": torch.zeros_like(tokens)}

    at_once = max(1, EVALUATED_TOKENS // settings.sequence_length)
    return Probe(rows(settings.batch_size), lambda: _scored(backbone, rows(at_once)))


def evaluate(settings: Settings, backbone: Backbone, examples: Examples, seed: int) -> Metrics:
    """Perplexity per word and per token and bits per byte; every token is scored exactly once.

    Word perplexity is exp(-log p of all tokens / words of the original text), so it compares across tokenizers; token
    perplexity does not.
    """
    nats = negative_log_likelihood(backbone, examples)
    counts = examples.counts
    figures = (
        math.exp(min(nats / max(1, counts["words"]), 690.0)),
        math.exp(min(nats / max(1, counts["tokens"]), 690.0)),
        nats / math.log(2) / max(1, counts["bytes"]),
    )
    return dict(zip(METRICS, figures, strict=True))


@torch.inference_mode()
def embed(backbone: Backbone, texts: Sequence[str]) -> Tensor:
    """Mean of the frozen model's last hidden states over a text's tokens, (texts, width)."""
    tokenizer, model = backbone.processor, cast(Any, backbone.model)
    model.eval()
    rows = []
    with model.disable_adapter():
        for text in texts:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"][: MOST_TOKENS - 1]
            inputs = torch.tensor([[start_token(tokenizer), *ids]], device=backbone.device)
            hidden = model(input_ids=inputs, output_hidden_states=True).hidden_states[-1][0].double()
            rows.append(hidden[1:].mean(0) if ids else hidden[0])
    return torch.stack(rows)


def prompts(settings: Settings, backbone: Backbone) -> tuple[str, ...]:
    """The prompts of the settings, or a few that suit the bundled topics."""
    return settings.samples.prompts or PROMPTS


@torch.inference_mode()
def sample(
    settings: Settings, backbone: Backbone, texts: Sequence[str], seed: int, rows: Rows = unmixed
) -> list[Sample]:
    """One continuation per prompt, by nucleus sampling; the same seed gives the same texts.

    ``samples.batch`` of them are written at once, each drawn with random numbers of its own: a text is the one that it
    would be alone, unless rounding, which the batch changes, decides between two tokens.

    Args:
        rows: Which mixture of adapters acts on each text's row (``mixture.active``); else the model is as it is.
    """
    tokenizer, model, samples = backbone.processor, cast(Any, backbone.model), []
    model.eval()
    for first in range(0, len(texts), settings.samples.batch):
        chosen = range(first, min(first + settings.samples.batch, len(texts)))
        prompts = [tokenizer(texts[number], add_special_tokens=False)["input_ids"] for number in chosen]
        begun = max(map(len, prompts)) + 1
        inputs = torch.full((len(prompts), begun), start_token(tokenizer))
        seen = torch.zeros_like(inputs)
        for row, ids in enumerate(prompts):  # to the left of what is seen: all go on in the same place
            inputs[row, begun - len(ids) :] = torch.tensor(ids, dtype=torch.long)
            seen[row, begun - len(ids) - 1 :] = 1
        draws = [torch.Generator(backbone.device).manual_seed(derive(seed, "sample", n)) for n in chosen]
        with rows(chosen):
            output = model.generate(
                input_ids=inputs.to(backbone.device),
                attention_mask=seen.to(backbone.device),
                max_new_tokens=settings.samples.length,
                do_sample=False,  # of what is left of the scores: the one token that was drawn
                temperature=None,
                top_p=None,
                top_k=None,
                num_beams=1,  # whatever the checkpoint's own configuration says
                num_return_sequences=1,
                logits_processor=LogitsProcessorList(
                    [TemperatureLogitsWarper(0.8), TopPLogitsWarper(0.95), _DrawnAlone(draws)]
                ),
                use_cache=True,
                pad_token_id=tokenizer.eos_token_id,
            )
        for number, ids, whole in zip(chosen, prompts, output, strict=True):
            said = tokenizer.decode(whole[begun - len(ids) :], skip_special_tokens=True)
            samples.append(Sample(texts[number], said))
    return samples


class _DrawnAlone(LogitsProcessor):
    """Leaves each row the token that its own generator drew: transformers would draw all rows' from one."""

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self.generators = generators

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        rows = zip(scores.softmax(-1), self.generators, strict=True)
        drawn = torch.stack([torch.multinomial(row, 1, generator=generator) for row, generator in rows])
        return cast(torch.FloatTensor, torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0))


def encode(samples: Sequence[Sample]) -> bytes:
    """The texts, one below the other, as UTF-8."""
    return ("\n\n---\n\n".join(str(s.content).strip() for s in samples) + "\n").encode()


def save_samples(folder: Path, samples: Mapping[str, Sequence[Sample]]) -> None:
    """One text file per name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, texts in samples.items():
        (folder / f"{name}.txt").write_bytes(encode(texts))


def usage(settings: Settings, backbone: Backbone) -> list[str]:
    """How to load the adapter with PEFT."""
    revision = f", revision={backbone.revision!r}" if backbone.revision else ""
    return [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({backbone.reference!r}{revision})",
        "model = PeftModel.from_pretrained(base, FOLDER)  # the folder of this file",
    ]


TASK = Task(
    lora_targets=lora_targets,
    hub_files=("*.json", "*.safetensors", "*.model", "*.txt", "README.md"),
    weight_files=lambda folder: sorted(folder.rglob("*.safetensors")),
    config=config,
    load_backbone=load_backbone,
    save_memory=save_memory,
    load_data=load_data,
    load_test=load_test,
    split=split,
    check=lambda settings, backbone, test, frozen: None,
    loss=lambda settings, backbone: cross_entropy,
    evaluate=evaluate,
    client_metrics=lambda settings, backbone: {name: (name,) for name in METRICS},
    requirements=requirements,
    embed=embed,
    sample=sample,
    takes=lambda backbone: frozenset(("prompt", "length")),
    prompts=prompts,
    render=Render(".txt", encode, printable=True),
    save_samples=save_samples,
    export=lambda folder, backbone, adapter: None,  # PEFT's own format is what language models are loaded from
    usage=usage,
    bundled_backbone="language",
    outline=outline,
    probe=probe,
)
