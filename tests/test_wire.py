"""What travels: one flat array up and down, and nothing that a hostile peer can make of it."""

from __future__ import annotations

import io
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from hypothesis import example, given
from hypothesis import strategies as st

from fedgen_app.errors import AdapterError
from fedgen_app.federation import wire
from fedgen_app.learning.adapters import Adapter, Layout, digest_of, layout_of

A = "base.q_proj.lora_A.weight"
B = "base.q_proj.lora_B.weight"
LAYOUT: Layout = ((A, (2, 3)), (B, (4, 2)))
SIZE = 14


def npy(shape: object, descr: object = "<f4", body: bytes = bytes(4 * SIZE)) -> bytes:
    """A .npy payload whose header says what we want it to say."""
    return raw_npy(repr({"descr": descr, "fortran_order": False, "shape": shape}), body)


def raw_npy(header: str, body: bytes = bytes(4 * SIZE)) -> bytes:
    text = header.encode("latin1") + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + body


def record(data: bytes, shape: tuple[int, ...] = (SIZE,), dtype: str = "float32", key: str = wire.ARRAY) -> ArrayRecord:
    return ArrayRecord({key: Array(dtype, shape, "numpy.ndarray", data)})


def reason(arrays: ArrayRecord, codec: str = "fp32", layout: Layout = LAYOUT) -> str:
    with pytest.raises(wire.WireError) as caught:
        wire.unpack(arrays, layout, codec)
    return caught.value.reason


@st.composite
def some_adapters(draw: st.DrawFn) -> Adapter:
    shapes = draw(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=0, max_size=5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([1e-3, 1.0, 100.0]))
    # Not in the order of the keys: the wire's order must not hang on the dictionary's.
    return {f"layer.{9 - i}.lora_A": torch.randn(s, generator=generator) * scale for i, s in enumerate(shapes)}


@given(some_adapters())
def test_fp32_gives_back_every_bit(adapter: Adapter) -> None:
    packed = wire.pack(adapter, "fp32")
    assert list(packed) == [wire.ARRAY] and packed[wire.ARRAY].dtype == "float32"
    got = wire.unpack(packed, layout_of(adapter), "fp32")
    assert list(got) == sorted(adapter)
    for key, tensor in adapter.items():
        assert got[key].dtype == torch.float32 and torch.equal(got[key], tensor)


@given(some_adapters())
def test_fp16_gives_back_half_precision_at_half_the_size(adapter: Adapter) -> None:
    packed = wire.pack(adapter, "fp16")
    got = wire.unpack(packed, layout_of(adapter), "fp16")
    for key, tensor in adapter.items():
        assert got[key].dtype == torch.float32
        torch.testing.assert_close(got[key], tensor, rtol=2**-11, atol=2**-25)
    numbers = sum(t.numel() for t in adapter.values())
    assert len(wire.pack(adapter, "fp32")[wire.ARRAY].data) - len(packed[wire.ARRAY].data) == 2 * numbers


def test_unpacked_tensors_can_be_written_to() -> None:
    got = wire.unpack(wire.pack({A: torch.ones(2, 3)}, "fp32"), ((A, (2, 3)),), "fp32")
    got[A] += 1
    assert torch.equal(got[A], torch.full((2, 3), 2.0))


def test_what_overflows_half_precision_is_refused_on_the_sender() -> None:
    assert wire.pack({A: torch.tensor([65504.0])}, "fp16")
    with pytest.raises(AdapterError, match=r"-?70000.*fp16"):
        wire.pack({A: torch.tensor([1.0, -70000.0])}, "fp16")
    # What is not finite in the first place travels as it is: the server's admission names it.
    assert np.isnan(wire.pack({A: torch.tensor([float("nan")])}, "fp16")[wire.ARRAY].numpy()).all()


@pytest.mark.parametrize(
    ("expected", "arrays"),
    [
        ("keys", record(npy((SIZE,)), key="weights")),
        ("keys", ArrayRecord({})),
        ("keys", ArrayRecord({wire.ARRAY: Array(np.zeros(SIZE, "f4")), "more": Array(np.zeros(1, "f4"))})),
        ("dtype", ArrayRecord({wire.ARRAY: Array(np.zeros(SIZE, "f8"))})),
        ("dtype", ArrayRecord({wire.ARRAY: Array(np.zeros(SIZE, ">f4"))})),
        ("dtype", ArrayRecord({wire.ARRAY: Array(np.zeros(SIZE, "f2"))})),
        ("dtype", ArrayRecord({wire.ARRAY: Array(np.zeros(SIZE, "i4"))})),
        ("dtype", record(npy((SIZE,), "|O"))),
        ("dtype", record(npy((SIZE,)), dtype="float64")),
        ("shape", ArrayRecord({wire.ARRAY: Array(np.zeros((1, SIZE), "f4"))})),
        ("shape", ArrayRecord({wire.ARRAY: Array(np.zeros((), "f4"))})),
        ("shape", ArrayRecord({wire.ARRAY: Array(np.zeros(SIZE - 1, "f4"))})),
        ("shape", record(npy((SIZE,)), shape=(SIZE, 1))),
        ("shape", record(npy((1, SIZE)), shape=(SIZE,))),
        ("shape", record(npy((SIZE,)), shape=())),
        ("size", record(npy((SIZE,), body=bytes(4 * SIZE - 4)))),
        ("size", record(npy((SIZE,), body=bytes(4 * SIZE + 4)))),
        ("size", ArrayRecord({wire.ARRAY: Array(np.zeros(1000 * SIZE, "f4"))})),
        ("malformed", record(b"")),
        ("malformed", record(bytes(4 * SIZE))),
        ("malformed", record(npy((SIZE,))[:20])),
        ("malformed", record(b"\x93NUMPY\x03\x00" + npy((SIZE,))[8:])),
        ("malformed", record(npy((SIZE,), "no type"))),
        ("malformed", record(raw_npy("[1, 2"))),
        ("malformed", record(raw_npy("{[]: 1}"))),
        ("malformed", record(raw_npy("{'a': 1, 2: 3}"))),
        ("malformed", record(raw_npy("(" * 900))),
        ("malformed", record(raw_npy("'''"))),
        ("malformed", record(npy((SIZE,), ("<f4",)))),
        ("malformed", record(npy((SIZE,), {"a": 1}))),
        ("malformed", record(npy((SIZE,), [()]))),
        ("malformed", record(npy("many"))),
    ],
)
def test_what_is_not_the_expected_array_is_refused_with_its_reason(expected: str, arrays: ArrayRecord) -> None:
    assert reason(arrays) == expected


def test_the_shapes_used_above_pass_when_nothing_is_wrong() -> None:
    assert layout_of(wire.unpack(record(npy((SIZE,))), LAYOUT, "fp32")) == LAYOUT


@pytest.mark.parametrize("descr", ["<f4", "|V1000000000"])
def test_a_huge_claim_allocates_nothing(descr: str) -> None:
    claims = record(npy((10**13,), descr), shape=(10**13,))
    tracemalloc.start()
    try:
        assert reason(claims) in {"shape", "dtype", "malformed"}
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@given(st.binary(max_size=300))
@example(b"\x93NUMPY\x01\x00\xff\xff")
def test_random_bytes_raise_only_wire_errors(data: bytes) -> None:
    for payload in (data, b"\x93NUMPY" + data, raw_npy(data.decode("latin1"))):
        reason(record(payload))


HEADERS = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8) | st.just("<f4"),
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple),
    max_leaves=6,
)


@given(HEADERS, HEADERS, HEADERS)
def test_any_header_raises_only_wire_errors(descr: object, order: object, shape: object) -> None:
    header = repr({"descr": descr, "fortran_order": order, "shape": shape}).encode("ascii", "replace").decode()
    try:
        wire.unpack(record(raw_npy(header)), LAYOUT, "fp32")
    except wire.WireError as error:
        assert error.reason in {"malformed", "dtype", "shape", "size"}


def test_what_the_server_sends_is_what_the_client_receives() -> None:
    adapter = {B: torch.randn(4, 2), A: torch.randn(2, 3), "conv.lora_A": torch.randn(2, 3, 1, 1)}
    for codec, tolerance in (("fp32", 0.0), ("fp16", 1e-2)):
        content = wire.instruction(wire.Parcel(adapter), codec, {wire.ROUND: 3, wire.RUN: "name"})
        config = content.config_records["config"]
        assert (config[wire.ROUND], config[wire.RUN]) == (3, "name")
        got = wire.received(content, codec).adapter
        assert list(got) == sorted(adapter)
        for key, tensor in adapter.items():
            torch.testing.assert_close(got[key], tensor, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "changes",
    [
        {wire.KEYS: [A]},
        {wire.SHAPES: ["2x3", "4xtwo"]},
        {wire.SHAPES: ["2x3", ""]},
        {wire.SHAPES: ["2x3", "-4x-2"]},
        {wire.SHAPES: ["2x3", "4x2x99999999999x99999999999"]},
        {wire.SHAPES: 7},
        {wire.KEYS: [A, A]},
        {wire.KEYS: None},
        None,
    ],
)
def test_an_instruction_that_is_none_is_a_wire_error(changes: dict[str, Any] | None) -> None:
    content = wire.instruction(wire.Parcel({A: torch.randn(2, 3), B: torch.randn(4, 2)}), "fp32", {})
    if changes is None:
        content = RecordDict({"arrays": content.array_records["arrays"]})
    else:
        config = dict(content.config_records["config"]) | changes
        content["config"] = ConfigRecord({key: value for key, value in config.items() if value is not None})
    with pytest.raises(wire.WireError):
        wire.received(content, "fp32")


def test_a_reply_holds_the_allowed_records_and_no_others() -> None:
    adapter = {A: torch.randn(2, 3)}
    answer = wire.reply(4, {wire.NUM_EXAMPLES: 7, "train_loss": 1.5}, wire.Parcel(adapter))
    assert set(answer) == {"metrics", "reply", "arrays"}
    assert dict(answer.metric_records["metrics"]) == {wire.NUM_EXAMPLES: 7, "train_loss": 1.5}
    assert dict(answer.config_records["reply"]) == {
        wire.ROUND: 4,
        wire.LAYOUT: digest_of(layout_of(adapter)),
        wire.RANK: 2,
    }
    assert torch.equal(wire.unpack(answer.array_records["arrays"], layout_of(adapter), "fp32")[A], adapter[A])
    assert set(wire.reply(4, {})) == {"metrics", "reply"}  # without an adapter no array


def test_two_layouts_of_one_size_have_two_digests() -> None:
    assert digest_of(((A, (2, 3)),)) != digest_of(((A, (3, 2)),)) != digest_of(((B, (3, 2)),))


def test_byte_size_counts_what_is_sent() -> None:
    def size(numbers: int, codec: str = "fp32") -> int:
        return wire.byte_size(Message(wire.reply(1, {}, wire.Parcel({A: torch.zeros(numbers)}), codec), 1, "train"))

    small, large = size(1000), size(3000)
    assert 4000 < small < 6000
    assert large - small == pytest.approx(8000, abs=32)  # a longer number in some header
    assert size(3000, "fp16") < 0.6 * large
    message = Message(wire.reply(1, {}), 1, "train")
    assert wire.byte_size(Message(Error(199, "ab"), reply_to=message)) == 2


def test_a_payload_is_read_as_numpy_reads_it() -> None:
    numbers = np.arange(SIZE, dtype="f4")
    stream = io.BytesIO()
    np.lib.format.write_array(stream, numbers, version=(2, 0))
    got = wire.unpack(record(stream.getvalue()), LAYOUT, "fp32")
    np.testing.assert_array_equal(got[A].numpy(), numbers[:6].reshape(2, 3))
    np.testing.assert_array_equal(got[B].numpy(), numbers[6:].reshape(4, 2))
