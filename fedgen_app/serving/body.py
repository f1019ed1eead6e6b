"""What stands in a request and in an answer: safetensors, tensors by name and facts beside them, read strictly.

The format is that of the safetensors library, which writes it. It is read here, as what comes from the net is to be
refused by every byte that is not as it should be, before anything of a claimed size is allocated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from safetensors.torch import save
from torch import Tensor

DTYPES = {"F32": torch.float32, "F64": torch.float64, "I64": torch.int64}
FACTS = "__metadata__"
LENGTH = 8  # bytes in front, which say how long the header is
MOST_HEADER = 16 * 1024  # bytes: a handful of tensors and facts
MOST_AXES = 8
MOST_NUMBERS = 2**48  # of an offset, and of a shape with its zeros left out: torch multiplies without looking at zeros
MEDIA_TYPE = "application/octet-stream"


class MalformedError(ValueError):
    """The bytes are not such a body; the text says what is wrong and repeats nothing of them."""


def write(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> bytes:
    """A body; the order of the facts says nothing."""
    return save({name: tensors[name].contiguous() for name in sorted(tensors)}, dict(facts))


def read(data: bytes, most_header: int = MOST_HEADER) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and facts of a body; all numbers are finite.

    Args:
        most_header: Bytes that the header may have; an adapter has many keys.

    Raises:
        MalformedError: the bytes are no such body.
    """
    if len(data) < LENGTH:
        raise MalformedError("shorter than a safetensors header")
    size = int.from_bytes(data[:LENGTH], "little")
    if not 2 <= size <= min(most_header, len(data) - LENGTH):
        raise MalformedError("its header's length is impossible, or too much")
    header = _header(data[LENGTH : LENGTH + size])
    facts = header.pop(FACTS, {})
    if not isinstance(facts, dict) or not all(isinstance(value, str) for value in facts.values()):
        raise MalformedError("its metadata should be texts by name")
    return _tensors(header, memoryview(data)[LENGTH + size :]), facts


def _header(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=_each_once, parse_constant=_no_constant)
    except (ValueError, RecursionError):  # whatever is wrong with JSON, or a name that stands twice
        raise MalformedError("its header is no JSON, or names something twice") from None
    if not isinstance(found, dict):
        raise MalformedError("its header is no JSON object")
    return found


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _tensors(header: Mapping[str, Any], payload: memoryview) -> dict[str, Tensor]:
    """The tensors, whose places have to follow one another and to fill the payload."""
    places = sorted((_place(entry) for entry in header.items()), key=lambda place: place[:2])
    tensors, reached = {}, 0
    for begin, end, name, shape, dtype in places:
        if begin != reached or end - begin != math.prod(shape) * dtype.itemsize or end > len(payload):
            raise MalformedError("the places of its tensors do not follow from their shapes")
        reached = end
        # A copy: torch wants memory that it may write to.
        flat = torch.frombuffer(bytearray(payload[begin:end]), dtype=dtype) if end > begin else torch.empty(0)
        if dtype.is_floating_point and not bool(torch.isfinite(flat).all()):
            raise MalformedError("a number in it is not finite")
        tensors[name] = flat.to(dtype).reshape(shape)
    if reached != len(payload):
        raise MalformedError("it goes on behind its tensors")
    return tensors


def _place(entry: tuple[str, Any]) -> tuple[int, int, str, tuple[int, ...], torch.dtype]:
    name, told = entry
    if not isinstance(told, dict) or set(told) != {"dtype", "shape", "data_offsets"}:
        raise MalformedError("a tensor should have dtype, shape and data_offsets")
    shape, offsets, dtype = told["shape"], told["data_offsets"], told["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise MalformedError(f"a tensor's dtype should be one of {', '.join(DTYPES)}")
    if not _counts(shape) or len(shape) > MOST_AXES or not _counts(offsets) or len(offsets) != 2:
        raise MalformedError("a tensor's shape or place makes no sense")
    if math.prod(size for size in shape if size) >= MOST_NUMBERS:
        raise MalformedError("a tensor's shape is too large")
    return offsets[0], offsets[1], name, tuple(shape), DTYPES[dtype]


def _counts(value: object) -> bool:
    """Whether it is a list of numbers of things."""
    whole = isinstance(value, list) and all(isinstance(n, int) and not isinstance(n, bool) for n in value)
    return whole and all(0 <= n < MOST_NUMBERS for n in value)  # type: ignore[attr-defined]
