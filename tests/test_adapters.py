"""The adapter's way into and out of a model and a file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fedgen_app.errors import AdapterError
from fedgen_app.learning import adapters
from fedgen_app.learning.adapters import Adapter, Layout

RANK = 3
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")
PAIR: Layout = ((A, (2, 3)), (B, (4, 2)))


def tiny() -> PeftModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    lora = LoraConfig(r=RANK, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    return get_peft_model(LlamaForCausalLM(config), lora)


@pytest.fixture(scope="module")
def model() -> PeftModel:
    return tiny()


def random_like(model: PeftModel, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) for key, shape in adapters.layout_of(adapters.read(model))}


def pair() -> Adapter:
    return adapters.fresh(PAIR, 1) | {B: torch.randn(4, 2)}


def test_keys_and_values_are_those_that_peft_saves(model: PeftModel) -> None:
    adapters.write(model, random_like(model, 3))
    ours, theirs = adapters.read(model), get_peft_model_state_dict(model)
    assert list(ours) == sorted(theirs) and len(ours) == 2 * 2 * 3
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_what_is_written_is_what_is_read_and_what_the_model_computes_with(model: PeftModel) -> None:
    tokens = torch.arange(8).reshape(1, 8)
    outputs = []
    for seed in (1, 2, 1):
        adapter = random_like(model, seed)
        adapters.write(model, adapter)
        got = adapters.read(model)
        assert adapters.digest(got) == adapters.digest(adapter)
        assert all(t.dtype == torch.float32 and not t.requires_grad for t in got.values())
        outputs.append(model(tokens).logits.detach())
    assert torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[0], outputs[1])


def test_what_is_read_is_a_copy(model: PeftModel) -> None:
    adapter = random_like(model, 1)
    adapters.write(model, adapter)
    for tensor in adapters.read(model).values():
        tensor.zero_()
    assert adapters.digest(adapters.read(model)) == adapters.digest(adapter)


def test_writing_refuses_what_does_not_fit_by_name_and_changes_nothing(model: PeftModel) -> None:
    good = random_like(model, 1)
    adapters.write(model, good)
    other = random_like(model, 2)
    with pytest.raises(AdapterError, match=f"missing keys.*{A}"):
        adapters.write(model, {key: tensor for key, tensor in other.items() if key != A})
    with pytest.raises(AdapterError, match="unexpected keys.*strange"):
        adapters.write(model, other | {"strange": torch.zeros(1)})
    # Both would broadcast into the model's (rank, 16).
    for shape in ((1, 16), (RANK, 1), ()):
        with pytest.raises(AdapterError) as caught:
            adapters.write(model, other | {A: torch.zeros(shape)})
        assert A in str(caught.value) and str(shape) in str(caught.value) and str((RANK, 16)) in str(caught.value)
    assert adapters.digest(adapters.read(model)) == adapters.digest(good)


def test_a_fresh_adapter_changes_nothing_and_is_drawn_as_peft_draws(model: PeftModel) -> None:
    layout = adapters.layout_of(adapters.read(model))
    adapter = adapters.fresh(layout, 5)
    assert adapters.layout_of(adapter) == layout
    adapters.write(model, adapter)
    tokens = torch.arange(8).reshape(1, 8)
    with model.disable_adapter():
        frozen = model(tokens).logits
    assert torch.equal(model(tokens).logits, frozen)
    theirs = adapters.read(tiny())
    for key, tensor in adapter.items():
        if ".lora_B." in key:
            assert not tensor.any()
            continue
        bound = 1 / math.sqrt(tensor.shape[1])
        assert tensor.abs().max() <= bound
        assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.35)
        assert theirs[key].abs().max() <= bound and theirs[key].abs().max() > 0.8 * bound


def test_fresh_is_uniform_up_to_its_bound() -> None:
    drawn = adapters.fresh((("x.lora_A.weight", (100, 4, 3, 3)),), 0)["x.lora_A.weight"].flatten()
    assert 0.99 / 6 < drawn.abs().max() <= 1 / 6
    assert drawn.std().item() == pytest.approx(1 / 6 / math.sqrt(3), rel=0.05)


def test_fresh_hangs_on_seed_and_key_and_on_nothing_else() -> None:
    small, large = adapters.fresh(PAIR, 1), adapters.fresh((("another.lora_A.weight", (2, 3)), *PAIR), 1)
    assert torch.equal(small[A], large[A])
    assert not torch.equal(large["another.lora_A.weight"], large[A])
    assert not torch.equal(small[A], adapters.fresh(PAIR, 2)[A])
    torch.manual_seed(99)
    assert adapters.digest(adapters.fresh(PAIR, 1)) == adapters.digest(small)


def test_pairs_are_the_layers_with_both_factors() -> None:
    assert list(adapters.pairs(PAIR)) == [(A, B)]
    assert list(adapters.pairs({A: 1})) == list(adapters.pairs({B: 1})) == []


def test_byte_size_counts_the_numbers() -> None:
    assert adapters.byte_size(pair()) == 4 * (6 + 8)


def test_a_file_gives_back_every_bit(tmp_path: Path) -> None:
    adapter = {B: torch.randn(2, 4).T, A: torch.randn(2, 3)}  # B is not contiguous
    file = tmp_path / "new" / "adapter.safetensors"
    adapters.save_adapter(adapter, file, {"round": "1"})
    got = adapters.load_adapter(file, PAIR)
    assert list(got) == [A, B]
    assert adapters.digest(got) == adapters.digest(adapter)
    assert [f.name for f in file.parent.iterdir()] == [file.name]


def test_one_adapter_is_one_sequence_of_bytes(tmp_path: Path) -> None:
    adapter = pair()
    adapters.save_adapter(adapter, tmp_path / "one")
    adapters.save_adapter(dict(reversed(adapter.items())), tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_another_layout_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "adapter.safetensors"
    adapters.save_adapter(pair(), file)
    with pytest.raises(AdapterError, match=r"missing keys \['more"):
        adapters.load_adapter(file, (*PAIR, ("more", (1,))))
    with pytest.raises(AdapterError, match=r"has shape \(2, 3\), expected \(1, 3\)"):
        adapters.load_adapter(file, ((A, (1, 3)), PAIR[1]))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_refused(tmp_path: Path, value: float) -> None:
    file = tmp_path / "adapter.safetensors"
    damaged = pair()
    damaged[B][3, 1] = value
    adapters.save_adapter(damaged, file)
    with pytest.raises(AdapterError, match="lora_B.*not finite"):
        adapters.load_adapter(file)


def hostile(header: str | bytes, body: bytes = bytes(24)) -> bytes:
    text = header.encode() if isinstance(header, str) else header
    return len(text).to_bytes(8, "little") + text + body


ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
HOSTILE = {
    "missing": None,
    "empty": b"",
    "huge header": (2**62).to_bytes(8, "little") + b"{}",
    "header beyond the file": (4096).to_bytes(8, "little") + b"{}",
    "no json": hostile("not json"),
    "no text": hostile(b"\xff\xfe{}"),
    "deep": hostile("[" * 100_000),
    "outside": hostile(json.dumps({A: ENTRY | {"data_offsets": [0, 48]}})),
    "before": hostile(json.dumps({A: ENTRY | {"data_offsets": [-24, 0]}})),
    "size": hostile(json.dumps({A: ENTRY | {"shape": [10**9, 10**9]}})),
    "overlap": hostile(json.dumps({A: ENTRY, B: ENTRY})),
    "type": hostile(json.dumps({A: ENTRY | {"dtype": "EVIL"}})),
    "hole": hostile(json.dumps({A: ENTRY}), bytes(100)),
    "pickle": b"\x80\x04\x95\x0a\x00\x00\x00\x00\x00\x00\x00cos\nsystem\n",
    "twice": hostile(f'{{"{A}": {json.dumps(ENTRY)}, "{A}": {json.dumps(ENTRY)}, "x": {json.dumps(ENTRY)}}}'),
    "path": hostile(json.dumps({"../../escape": ENTRY})),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_an_adapter_error_that_names_it(tmp_path: Path, name: str) -> None:
    file = tmp_path / "adapter.safetensors"
    data = HOSTILE[name]
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(AdapterError, match="adapter.safetensors"):
        adapters.load_adapter(file, PAIR)


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    file = tmp_path / "adapter.safetensors"
    adapters.save_adapter(pair(), file)
    whole = file.read_bytes()
    for end in range(0, len(whole), 7):
        file.write_bytes(whole[:end])
        with pytest.raises(AdapterError):
            adapters.load_adapter(file, PAIR)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_an_altered_byte_is_refused_or_is_another_adapter(tmp_path: Path, data: st.DataObject) -> None:
    file = tmp_path / "adapter.safetensors"
    adapter = adapters.fresh(PAIR, 1)
    adapters.save_adapter(adapter, file)
    whole = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(whole) - 1))
    whole[place] ^= data.draw(st.integers(1, 255))
    file.write_bytes(bytes(whole))
    try:
        got = adapters.load_adapter(file, PAIR)
    except AdapterError:
        return
    assert adapters.layout_of(got) == PAIR
    in_header = place < len(whole) - adapters.byte_size(adapter)
    assert in_header or adapters.digest(got) != adapters.digest(adapter)


def test_other_types_of_numbers_become_float32(tmp_path: Path) -> None:
    file = tmp_path / "adapter.safetensors"
    save_file({A: torch.ones(2, 3, dtype=torch.bfloat16), B: torch.ones(4, 2, dtype=torch.float16)}, file)
    assert {t.dtype for t in adapters.load_adapter(file, PAIR).values()} == {torch.float32}


def flipped(tensor: Tensor, bit: int) -> Tensor:
    return (tensor.clone().view(torch.int32) ^ (1 << bit)).view(torch.float32)


def test_the_digest_changes_with_one_bit_one_key_and_one_shape() -> None:
    adapter = adapters.fresh(PAIR, 1)
    others = [adapter | {A: flipped(adapter[A], bit)} for bit in range(31)]
    others += [adapter | {B: -adapter[B]}]  # -0.0 is another zero
    others += [{"b" + key[1:]: t for key, t in adapter.items()} | {"more": torch.zeros(0)}]
    others += [adapter | {A: adapter[A].reshape(3, 2)}, {A: adapter[B], B: adapter[A]}]
    assert len({adapters.digest(o) for o in [adapter, *others]}) == len(others) + 1
    assert adapters.digest(dict(reversed(adapter.items()))) == adapters.digest(adapter)
