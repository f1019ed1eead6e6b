"""Bodies of the inference service: written as safetensors, read strictly."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import safetensors.torch
import torch

from fedgen_app.serving import body
from fedgen_app.serving.body import MalformedError


def made(header: Any, payload: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + payload


def told(shape: list[Any], begin: int, end: int, dtype: str = "F32", **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


def test_what_was_written_is_read_and_safetensors_reads_it_too() -> None:
    tensors = {
        "b": torch.randn(2, 3),
        "a": torch.tensor([5, 2**40]),
        "none": torch.empty(0, 4),
        "one": torch.tensor(2.5, dtype=torch.float64),
    }
    data = body.write({**tensors, "turned": tensors["b"].T}, {"seed": "7"})
    found, facts = body.read(data)
    assert facts == {"seed": "7"}
    assert torch.equal(found.pop("turned"), tensors["b"].T)
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in tensors)
    assert torch.equal(safetensors.torch.load(data)["b"], tensors["b"])
    assert body.read(made({})) == ({}, {})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"a photo of a cat",
        made({}, length=2**63),
        made({}, length=body.MOST_HEADER + 1),
        made(b"{" + b" " * body.MOST_HEADER + b"}"),
        made(b"[" * 8000),
        made(b"no json"),
        made(b"\xff\xfe{}"),
        made([]),
        made({"__metadata__": {"seed": 7}}),
        made({"__metadata__": "seed"}),
        made(b'{"__metadata__": {"seed": "7", "seed": "8"}}'),
        made(b'{"x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, "x": {}}'),
        made(b'{"x": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}', bytes(4)),
        made(b'{"x": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 4]}}', bytes(4)),
        made({"x": 5}),
        made({"x": {"dtype": "F32", "shape": [1]}}, bytes(4)),
        made({"x": told([1], 0, 4, more=1)}, bytes(4)),
        made({"x": told([1], 0, 4, dtype="BOOL")}, bytes(4)),
        made({"x": told([1], 0, 4, dtype=["F32"])}, bytes(4)),  # type: ignore[arg-type]
        made({"x": told([-1], 0, 4)}, bytes(4)),
        made({"x": told([True], 0, 4)}, bytes(4)),
        made({"x": told([1.0], 0, 4)}, bytes(4)),
        made({"x": told([1] * 9, 0, 4)}, bytes(4)),
        made({"x": told([2**40], 0, 2**42)}, bytes(4)),
        made({"x": told([2**47, 2**47], 0, 4)}, bytes(4)),
        made({"x": told([2**47, 2**47, 0], 0, 0)}),
        made({"x": told([0, 2**47, 2], 0, 0)}),
        made({"x": told([1], 0, 8)}, bytes(8)),
        made({"x": told([1], 4, 8)}, bytes(8)),
        made({"x": told([1], 0, 4)}, bytes(8)),
        made({"x": told([2], 0, 8)}, bytes(4)),
        made({"x": told([1], 0, 4), "y": told([1], 0, 4)}, bytes(4)),
        made({"x": told([1], 0, 4), "y": told([1], 8, 12)}, bytes(12)),
        body.write({"x": torch.tensor([1.0, float("nan")])}, {}),
        body.write({"x": torch.tensor([float("inf")], dtype=torch.float64)}, {}),
        body.write({"x": torch.tensor([1.0]).half()}, {}),
    ],
)
def test_what_is_no_body_is_refused(data: bytes) -> None:
    with pytest.raises(MalformedError) as refused:
        body.read(data)
    assert "cat" not in str(refused.value)


def test_no_broken_body_does_anything_else_than_be_refused() -> None:
    whole = body.write({"prompt": torch.randn(2, 3), "clusters": torch.tensor([0, 1])}, {"seed": "1", "steps": "5"})
    draw, refused = random.Random(3), 0
    for _ in range(3000):
        broken = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            broken[draw.randrange(len(broken))] = draw.randrange(256)
        cut = bytes(broken[: draw.randint(0, len(broken))] if draw.random() < 0.2 else broken)
        try:
            body.read(cut)
        except MalformedError:
            refused += 1
    assert refused > 1000
