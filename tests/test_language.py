"""The language task: packing, perplexity against a slow reference, where LoRA goes, what a device owns, samples."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_llama, sentences, tiny_model, tiny_settings, write_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from fedgen_app.data.local import Corpus
from fedgen_app.errors import BackboneError, DataError
from fedgen_app.learning import adapters
from fedgen_app.learning.backbone import Backbone, open_backbone
from fedgen_app.learning.task import Examples, Held, Share
from fedgen_app.settings import Settings
from fedgen_app.tasks import _text, language
from fedgen_app.tasks._text import IGNORED, pack, start_token
from fedgen_app.tasks.language import TASK, cross_entropy


@pytest.fixture
def backbone() -> Backbone:
    """The tiny model with an adapter that changes what it says."""
    opened = open_backbone(tiny_settings())
    generator = torch.Generator().manual_seed(7)
    loud = {key: torch.randn(shape, generator=generator) / 4 for key, shape in opened.layout}
    adapters.write(opened.model, loud)
    return opened


def long(tokens: int) -> Settings:
    return tiny_settings(samples__length=tokens)


def documents(pieces: list[list[int]]) -> dict[str, Any]:
    return {
        "tokens": np.array([token for piece in pieces for token in piece], np.int32),
        "starts": np.cumsum([0, *map(len, pieces)]),
        "words": np.array([10 * (i + 1) for i in range(len(pieces))]),
        "bytes": np.array([100 * (i + 1) for i in range(len(pieces))]),
    }


@given(st.data(), st.lists(st.lists(st.integers(1, 9), max_size=7), min_size=1, max_size=6), st.integers(1, 6))
def test_pack_makes_every_token_a_target_once(data: st.DataObject, pieces: list[list[int]], length: int) -> None:
    chosen = data.draw(st.lists(st.sampled_from(range(len(pieces))), unique=True))
    packed = pack(documents(pieces), chosen, length, start=0)
    stream = [token for i in chosen for token in pieces[i]]
    inputs, labels = [], []
    for first in range(0, len(stream), length):
        row = stream[first : first + length]
        padding = length - len(row)
        labels.append(row + [IGNORED] * padding)
        # What stands in the padding's inputs does not matter: attention looks back only, and nothing is scored there.
        inputs.append([0, *row][:length])
    assert packed.rows["labels"].tolist() == labels
    assert [row[: len(given)] for row, given in zip(packed.rows["input_ids"].tolist(), inputs, strict=True)] == inputs
    assert int((packed.rows["input_ids"] < 0).sum()) == 0
    assert packed.counts == {
        "words": sum(10 * (i + 1) for i in chosen),
        "bytes": sum(100 * (i + 1) for i in chosen),
        "tokens": len(stream),
    }


@torch.inference_mode()
def slow_nats(backbone: Backbone, rows: list[list[int]]) -> float:
    """-log p of all tokens, one row and one token at a time, in float64."""
    backbone.model.eval()
    total, start = 0.0, start_token(backbone.processor)
    for row in rows:
        for position, target in enumerate(row):
            logits = backbone.model(input_ids=torch.tensor([[start, *row[:position]]])).logits[0, -1].double()
            total -= float(torch.log_softmax(logits, 0)[target])
    return total


def test_evaluate_is_the_sum_of_log_probabilities(backbone: Backbone) -> None:
    text = "the captain and the crew\nset sail over the cold sea\n at night \n"
    tokens = backbone.processor(text, add_special_tokens=False)["input_ids"]
    corpus = Corpus("ptb", (text,), None, running=True, skipped=0)
    packed = pack(_text.tokenise(corpus, backbone.processor), [0], 8, start_token(backbone.processor))
    rows = [tokens[i : i + 8] for i in range(0, len(tokens), 8)]
    assert len(tokens) % 8, "the last row should be padded"
    nats = slow_nats(backbone, rows)
    words = 5 + 6 + 2 + 3  # what stands between spaces, and <eos> at each of three line ends
    expected = {
        "word_perplexity": math.exp(nats / words),
        "token_perplexity": math.exp(nats / len(tokens)),
        "bits_per_byte": nats / math.log(2) / len(text.encode()),
    }
    assert TASK.evaluate(tiny_settings(), backbone, packed, 0) == pytest.approx(expected, rel=1e-5)


def test_evaluate_does_not_depend_on_how_rows_are_batched(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = Corpus("any", tuple(sentences("sea", 9, 3)), None, running=False, skipped=0)
    packed = pack(_text.tokenise(corpus, backbone.processor), range(9), 16, start_token(backbone.processor))
    whole = TASK.evaluate(tiny_settings(), backbone, packed, 0)
    monkeypatch.setattr(language, "EVALUATED_TOKENS", 32)
    assert len(packed) > 4
    assert TASK.evaluate(tiny_settings(), backbone, packed, 0) == pytest.approx(whole, rel=1e-5)


def test_loss_is_the_mean_over_targets_alone(backbone: Backbone) -> None:
    rows = [[5, 6, 7, 8], [9, 10]]
    packed = pack(documents([[5, 6, 7, 8, 9, 10]]), [0], 4, start_token(backbone.processor))
    backbone.model.eval()
    with torch.no_grad():
        loss = float(cross_entropy(backbone.model, packed.rows, torch.Generator()))
    assert loss == pytest.approx(slow_nats(backbone, rows) / 6, rel=1e-5)


def test_words_and_bytes_by_the_convention_of_penn_treebank(backbone: Backbone) -> None:
    text = " no it was n't <unk> \n the N é \n\n"
    for running, words in ((True, 5 + 3 + 3), (False, 5 + 3 + 3 + 1)):  # a record also ends with <eos>
        corpus = Corpus("any", (text,), None, running=running, skipped=0)
        counted = _text.tokenise(corpus, backbone.processor)
        assert counted["words"].tolist() == [words]
        assert counted["bytes"].tolist() == [len(text.encode())]
    assert counted["tokens"][-1] == backbone.processor.eos_token_id


def test_a_text_without_tokens_is_no_division_by_zero(backbone: Backbone) -> None:
    empty = pack(documents([[]]), [], 8, 0)
    measured = TASK.evaluate(tiny_settings(), backbone, empty, 0)
    assert measured == {"word_perplexity": 1.0, "token_perplexity": 1.0, "bits_per_byte": 0.0}


def test_lora_targets_of_llama_and_gpt2() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    small = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 16}
    assert TASK.lora_targets(LlamaForCausalLM(LlamaConfig(intermediate_size=8, **small)), tiny_settings().lora) == (
        "q_proj",
        "v_proj",
    )
    assert TASK.lora_targets(
        GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16)), tiny_settings().lora
    ) == ("c_attn",)
    with pytest.raises(BackboneError, match="Sequential.* lora.targets .*'0', '1'"):
        TASK.lora_targets(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU()), tiny_settings().lora)


def test_gpt2_runs_with_its_transposed_layers(tmp_path: Path) -> None:
    """GPT-2 holds its projections transposed (Conv1D): A and B must still be (r, d_in) and (d_out, r)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path / "gpt2"
    folder.mkdir()
    size = write_tokenizer(folder)
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=size, n_positions=64)).save_pretrained(folder)
    opened = open_backbone(tiny_settings(backbone=str(folder)))
    assert [shape for _, shape in opened.layout] == [(4, 16), (48, 4)]
    inputs = torch.arange(1, 9)[None]
    with torch.no_grad():
        before = opened.model(input_ids=inputs).logits
        adapters.write(opened.model, {key: torch.full(shape, 0.3) for key, shape in opened.layout})
        assert not torch.allclose(opened.model(input_ids=inputs).logits, before)


def test_a_backbone_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    held = Held(torch.float32, torch.device("cpu"))
    bare, pickled, other, silent = (tmp_path / name for name in ("bare", "pickled", "other", "silent"))
    for folder in (bare, pickled, silent):
        shutil.copytree(tiny_model(), folder)
    (bare / "model.safetensors").unlink()
    (pickled / "model.safetensors").unlink()
    torch.save({"weight": torch.ones(2)}, pickled / "pytorch_model.bin")
    other.mkdir()
    (other / "notes.txt").write_text("nothing here")
    facts = json.loads((silent / "tokenizer_config.json").read_text())
    del facts["eos_token"]
    (silent / "tokenizer_config.json").write_text(json.dumps(facts))
    for folder in (bare, pickled, other):
        with pytest.raises(BackboneError, match=f"{folder}: not a causal language model"):
            TASK.load_backbone(folder, held, tiny_settings().lora)
        with pytest.raises(BackboneError, match=f"{folder}: no .*safetensors weights"):
            open_backbone(tiny_settings(backbone=str(folder)))
    with pytest.raises(BackboneError, match=f"{silent}: .* no end-of-text token"):
        TASK.load_backbone(silent, held, tiny_settings().lora)


def own_words(backbone: Backbone, examples: Examples) -> str:
    labels = examples.rows["labels"].flatten()
    return str(backbone.processor.decode(labels[labels != IGNORED].tolist(), skip_special_tokens=True))


def test_a_devices_own_folder_gives_all_its_documents_less_the_holdout(backbone: Backbone, tmp_path: Path) -> None:
    marked = [f"{text} {number * 'the ' or 'night '}" for number, text in enumerate(sentences("farm", 10, 5))]
    (tmp_path / "diary.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in marked))
    data = TASK.load_data(tiny_settings(holdout_fraction=0.2, label_column=""), backbone, Share(folder=str(tmp_path)))
    kept, held = own_words(backbone, data.train), own_words(backbone, data.holdout)
    assert len(kept) + len(held) == sum(map(len, marked))
    assert sum(text in kept for text in marked) == 8 and sum(text in held for text in marked) == 2
    assert all((text in kept) != (text in held) for text in marked)
    words = data.train.counts["words"] + data.holdout.counts["words"]
    assert words == sum(len(text.split()) + 1 for text in marked)


def test_clients_of_a_simulation_share_out_every_document(backbone: Backbone) -> None:
    owned = [TASK.load_data(tiny_settings(), backbone, Share(index, 3)) for index in range(3)]
    total = sum(part.counts["tokens"] for data in owned for part in (data.train, data.holdout))
    alone = TASK.load_data(tiny_settings(), backbone, Share(0, 1))
    assert total == alone.train.counts["tokens"] + alone.holdout.counts["tokens"]
    assert min(data.train.counts["tokens"] for data in owned) > 0


def test_a_limit_shrinks_the_training_rows_and_leaves_the_holdout(backbone: Backbone, tmp_path: Path) -> None:
    whole = TASK.load_data(tiny_settings(), backbone, Share(0, 2))
    part = TASK.load_data(tiny_settings(partition__max_examples=3), backbone, Share(0, 2))
    assert torch.equal(part.holdout.rows["labels"], whole.holdout.rows["labels"])
    assert 0 < part.train.counts["tokens"] < whole.train.counts["tokens"] / 2
    assert part.train.counts["words"] >= 3 * 6, "three documents of at least six words"
    (tmp_path / "train.txt").write_text("\n\n".join(f"a page about the number {i}" for i in range(40)))
    on_a_device = [
        TASK.load_data(
            tiny_settings(label_column="", partition__max_examples=most), backbone, Share(folder=str(tmp_path))
        )
        for most in (0, 3)
    ]
    assert on_a_device[0].train.counts == on_a_device[1].train.counts


def test_one_document_is_enough_and_none_is_an_error(backbone: Backbone, tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": "the wind rose\0at night"}) + "\n")
    settings = tiny_settings(label_column="")
    data = TASK.load_data(settings, backbone, Share(folder=str(tmp_path)))
    assert len(data.train) == len(data.holdout) == 1
    assert torch.equal(data.train.rows["labels"], data.holdout.rows["labels"])
    with pytest.raises(DataError, match="dataset = ''"):
        TASK.load_data(tiny_settings(dataset=""), backbone, Share())


def test_test_sequences_limits_to_whole_documents(backbone: Backbone) -> None:
    whole = TASK.load_test(tiny_settings(), backbone)
    part = TASK.load_test(tiny_settings(test_sequences=2), backbone)
    least = TASK.load_test(tiny_settings(test_sequences=1, sequence_length=8), backbone)
    assert whole is not None and part is not None and least is not None
    assert len(whole) > 3
    assert 32 < part.counts["tokens"] <= 64
    assert least.counts["tokens"] > 8  # one document at least, however long
    assert TASK.load_test(tiny_settings(dataset=""), backbone) is None


def test_the_same_seed_gives_the_same_texts(backbone: Backbone) -> None:
    texts = ["the captain", "the judge"]
    first, again = (TASK.sample(long(12), backbone, texts, 3) for _ in range(2))
    other = TASK.sample(long(12), backbone, texts, 4)
    assert first == again
    assert [s.content for s in first] != [s.content for s in other]
    for text, sample in zip(texts, first, strict=True):
        assert sample.prompt == text and sample.content.startswith(text) and len(sample.content) > len(text)


def test_a_text_does_not_hang_on_those_beside_it(backbone: Backbone) -> None:
    texts = ["the captain", "the judge of the court", "a", "the captain", ""]
    alone, pairs, all_ = (
        TASK.sample(tiny_settings(samples__length=12, samples__batch=batch), backbone, texts, 3) for batch in (1, 2, 8)
    )
    assert alone == pairs == all_ and [sample.prompt for sample in all_] == texts
    assert all_[0] != all_[3]  # each has its own random numbers
    assert TASK.sample(tiny_settings(samples__length=12), backbone, texts[:2], 3) == all_[:2]


def test_the_adapter_changes_what_is_said(backbone: Backbone) -> None:
    said = TASK.sample(long(20), backbone, ["the captain"], 0)
    with backbone.model.disable_adapter():
        assert TASK.sample(long(20), backbone, ["the captain"], 0) != said


def test_another_tokenizer_is_not_served_from_the_cache(backbone: Backbone, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    before = TASK.load_data(tiny_settings(), backbone, Share(0, 1)).train.counts["tokens"]
    folder = make_llama(tmp_path / "other")
    whole = json.loads((folder / "tokenizer.json").read_text())
    whole["model"]["merges"] = whole["model"]["merges"][:10]
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    opened = open_backbone(tiny_settings(backbone=str(folder)))
    assert len(AutoTokenizer.from_pretrained(folder)("the captain")["input_ids"]) > 3
    assert TASK.load_data(tiny_settings(), opened, Share(0, 1)).train.counts["tokens"] > before
