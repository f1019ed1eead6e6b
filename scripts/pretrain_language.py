"""Train the bundled language backbone from nothing: a byte-level BPE tokenizer and a small Llama.

    python scripts/pretrain_language.py --text text/ --output fedgen_assets/language --minutes 50 --compile

The text comes from fetch_pretraining_text.py: files whose documents are separated by a form feed. A few percent
of the documents are held out; bits per byte on them, before and after, go to training.json beside the weights.
With --checkpoint DIR an interrupted training goes on where it stopped.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from _training import Recipe, arguments, draw_of, load_state, save_state, without_machine_notes, write_report
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
PIECE = 8_000  # characters: a book is cut into pieces of this size, so that the held-out split sees every source


@dataclass(frozen=True)
class Shape:
    """Size of the model. The defaults give 4.3 million parameters, 8.5 MB in bfloat16."""

    vocabulary: int = 4096
    width: int = 256
    inner: int = 704
    layers: int = 4
    heads: int = 4
    context: int = 256


@dataclass(frozen=True)
class LanguageRecipe(Recipe):
    """Muon and AdamW, cosine decay to a twentieth."""

    batch_size: int = 16
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    floor: float = 0.05
    clip: float = 1.0


def read_documents(paths: Iterable[Path]) -> list[str]:
    """All documents of the text files, long ones cut at line ends."""
    files = sorted(file for path in paths for file in (path.rglob("*.txt") if path.is_dir() else [path]))
    pieces = []
    for file in files:
        for document in file.read_text(encoding="utf-8").split("\f"):
            lines, size = [], 0
            for line in document.strip().splitlines(keepends=True):
                lines.append(line)
                size += len(line)
                if size >= PIECE:
                    pieces.append("".join(lines))
                    lines, size = [], 0
            if lines:
                pieces.append("".join(lines))
    return pieces


def split(documents: list[str], fraction: float, seed: int) -> tuple[list[str], list[str]]:
    """Shuffle, then hold out a fraction: (training, held-out)."""
    order = random.Random(seed).sample(documents, len(documents))
    count = max(1, round(fraction * len(order)))
    return order[count:], order[:count]


def train_tokenizer(documents: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every text can be encoded and comes back unchanged; digits stand alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes, seen or not
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save under the class name that every release of transformers knows."""
    tokenizer.save_pretrained(folder)
    without_machine_notes(folder)


def to_stream(documents: list[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """One row of token ids, an end-of-text token before each document and at the end."""
    end = tokenizer.eos_token_id
    ids = [end]
    for encoded in tokenizer(documents)["input_ids"]:
        ids += [*encoded, end]
    return torch.tensor(ids)


def build(shape: Shape, end: int, seed: int) -> LlamaForCausalLM:
    """A fresh model, embeddings tied."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.width,
            intermediate_size=shape.inner,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            max_position_embeddings=shape.context,
            tie_word_embeddings=True,
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=end,
        )
    )


def token_loss(model: LlamaForCausalLM, windows: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats of windows[:, 1:] given what stands before; windows: (batch, tokens)."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, stream: Tensor, text_bytes: int, context: int) -> float:
    """Bits per UTF-8 byte over a stream; every token is predicted once, from at most `context` before it."""
    model.eval()
    windows = [stream[i : i + context + 1] for i in range(0, len(stream) - 1, context)]
    full, rest = windows[:-1], windows[-1]
    nats = sum(token_loss(model, torch.stack(full[i : i + 16]), "sum").item() for i in range(0, len(full), 16))
    nats += token_loss(model, rest[None], "sum").item()
    model.train()
    return nats / math.log(2) / text_bytes


def build_optimizers(model: LlamaForCausalLM, recipe: LanguageRecipe) -> list[torch.optim.Optimizer]:
    """Muon (https://kellerjordan.github.io/posts/muon) for the matrices inside, AdamW for embeddings and norms.

    Muon needs fewer tokens than AdamW for the same loss, and tokens are what a processor has few of.
    """
    inside = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    outside = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
    # match_rms_adamw scales Muon's updates so that both can share one learning rate.
    muon = torch.optim.Muon(
        inside, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(outside, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return [muon, adamw]


def train(
    model: LlamaForCausalLM,
    stream: Tensor,
    context: int,
    recipe: LanguageRecipe,
    checkpoint: Path | None,
    forward: Callable[..., Tensor],
) -> tuple[int, float]:
    """Train in place on random windows of the stream; returns (steps, seconds of training)."""
    optimizers = build_optimizers(model, recipe)
    step, seconds = 0, 0.0
    if state := load_state(checkpoint):
        model.load_state_dict(state["model"])
        for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        step, seconds = state["step"], state["seconds"]
    saved = seconds
    while (progress := recipe.progress(step, seconds)) < 1:
        started = time.monotonic()
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = recipe.rate(step, progress)
        draw = draw_of(recipe.seed, step)
        starts = torch.randint(len(stream) - context - 1, (recipe.batch_size,), generator=draw)
        loss = forward(model, torch.stack([stream[i : i + context + 1] for i in starts]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        seconds += time.monotonic() - started
        if step % 100 == 0:
            pace = step * recipe.batch_size * context / seconds
            print(f"step {step}  {progress:.1%}  loss {loss.item():.3f}  {pace:.0f} tokens/s", flush=True)
        if checkpoint and seconds - saved > 120:
            kept_state = [optimizer.state_dict() for optimizer in optimizers]
            state = {"model": model.state_dict(), "optimizers": kept_state, "step": step, "seconds": seconds}
            save_state(checkpoint, state)
            saved = seconds
    return step, seconds


def main() -> None:
    """Train tokenizer and model, measure, save."""
    parser = arguments(__doc__, "folder for tokenizer and weights")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="text files, or folders of .txt files")
    parser.add_argument("--checkpoint", type=Path, help="folder to save to, and to go on from")
    parser.add_argument("--held-out", type=float, default=0.02, help="fraction of the documents")
    parser.add_argument("--batch-size", type=int, default=16, help="windows in a step")
    parser.add_argument("--compile", action="store_true", help="torch.compile: needs a C++ compiler, much faster")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shape, recipe = Shape(), LanguageRecipe(minutes=args.minutes, steps=args.steps, batch_size=args.batch_size)

    training, held_out = split(read_documents(args.text), args.held_out, recipe.seed)
    if args.checkpoint and (args.checkpoint / "tokenizer.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    else:
        tokenizer = train_tokenizer(training, shape.vocabulary)
        if args.checkpoint:
            save_tokenizer(tokenizer, args.checkpoint)
    stream, test_stream = to_stream(training, tokenizer), to_stream(held_out, tokenizer)
    test_bytes = sum(len(document.encode()) for document in held_out)
    print(f"{len(stream)} tokens to train on, {test_bytes / (len(test_stream)):.2f} bytes per token", flush=True)

    model = build(shape, tokenizer.eos_token_id, recipe.seed)
    before = bits_per_byte(model, test_stream, test_bytes, shape.context)
    print(f"{model.num_parameters()} parameters, {before:.4f} bits per byte before training", flush=True)
    forward = torch.compile(token_loss) if args.compile else token_loss
    steps, seconds = train(model, stream, shape.context, recipe, args.checkpoint, forward)

    model.to(torch.bfloat16).save_pretrained(args.output)
    save_tokenizer(tokenizer, args.output)
    # Measured on the rounded weights that users load.
    after = bits_per_byte(model, test_stream, test_bytes, shape.context)
    report = {
        "parameters": model.num_parameters(),
        "shape": asdict(shape),
        "recipe": asdict(recipe),
        "steps": steps,
        "minutes": round(seconds / 60, 1),
        "tokens_seen": steps * recipe.batch_size * shape.context,
        "training_tokens": len(stream),
        "training_bytes": sum(len(document.encode()) for document in training),
        "held_out_bytes": test_bytes,
        "bits_per_byte": {"before": round(before, 4), "after": round(after, 4)},
    }
    write_report(args.output, report)


if __name__ == "__main__":
    main()
