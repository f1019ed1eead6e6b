"""What travels: one flat array per adapter, and the only records that a client may answer with.

Flower turns every array into two objects with a request each, so an adapter goes as ONE array; keys and shapes are
known on both sides (up) or stand once beside it (down). A codec says how a number is written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from numpy.typing import NDArray

from fedgen_app.errors import AdapterError
from fedgen_app.learning.adapters import Adapter, Layout, digest_of, layout_of, rank_of

ARRAY = "adapter"
ROUND, RUN, LAYOUT, KEYS, SHAPES = "round", "run", "layout", "keys", "shapes"
RESIDUAL, EXTRA = "residual/", "extra/"  # in front of a key
RANK, STEPS = "rank", "steps"
AVERAGED = "averaged"  # the last round in which the client's reply counted; 0: none
CLUSTER = "cluster"
OFFERED = re.compile(r"cluster/(\d{1,9})/(.+)")
NUM_EXAMPLES = "num-examples"
# The header that numpy writes (versions 1 and 2), matched and never evaluated: numpy's own reader evaluates it as
# Python, and what a hostile one makes it raise is not bounded.
HEADER = re.compile(
    rb"\x93NUMPY(?:\x01\x00..|\x02\x00....)"
    rb"\{'descr': '([<>|][A-Za-z]\d{0,20})', 'fortran_order': (?:True|False), "
    rb"'shape': \(((?:\d{1,20}, ?)*(?:\d{1,20})?)\),? ?\} *\n",
    re.DOTALL,
)
SHAPE = re.compile(r"\d{1,9}(x\d{1,9}){0,7}")


@dataclass(frozen=True)
class Codec:
    """How the numbers of an adapter are written; a lossier one gets its own entry in CODECS."""

    dtype: str


CODECS = {"fp32": Codec("float32"), "fp16": Codec("float16")}


@dataclass(frozen=True)
class Parcel:
    """What travels in one array: an adapter, the residual that is added beside it, a method's own tensors."""

    adapter: Adapter
    residual: Adapter = field(default_factory=dict)
    extra: Adapter = field(default_factory=dict)

    def joined(self) -> Adapter:
        """All of it under one set of keys."""
        residual = {f"{RESIDUAL}{key}": tensor for key, tensor in self.residual.items()}
        return self.adapter | residual | {f"{EXTRA}{key}": tensor for key, tensor in self.extra.items()}

    @classmethod
    def parted(cls, joined: Mapping[str, torch.Tensor]) -> Parcel:
        """The inverse of ``joined``."""
        parts: dict[str, Adapter] = {"": {}, RESIDUAL: {}, EXTRA: {}}
        for key, tensor in joined.items():
            mark = next((m for m in (RESIDUAL, EXTRA) if key.startswith(m)), "")
            parts[mark][key.removeprefix(mark)] = tensor
        return cls(parts[""], parts[RESIDUAL], parts[EXTRA])


@dataclass(frozen=True)
class Offers:
    """Several parcels in one array, one per cluster, of which a client takes one."""

    parcels: Mapping[int, Parcel]

    def joined(self) -> Adapter:
        """All of it under one set of keys."""
        return {
            f"{CLUSTER}/{number}/{key}": tensor
            for number, parcel in self.parcels.items()
            for key, tensor in parcel.joined().items()
        }

    @classmethod
    def parted(cls, joined: Mapping[str, torch.Tensor]) -> Offers:
        """The inverse of ``joined``; without parcels where there is another kind of key."""
        found: dict[int, dict[str, torch.Tensor]] = {}
        for key, tensor in joined.items():
            if (match := OFFERED.fullmatch(key)) is None:
                return cls({})
            found.setdefault(int(match[1]), {})[match[2]] = tensor
        return cls({number: Parcel.parted(found[number]) for number in sorted(found)})


class WireError(ValueError):
    """A record is not what it should be; ``reason`` is one of the words of results.json."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


def count(layout: Layout) -> int:
    """Numbers in an adapter of this layout."""
    return sum(math.prod(shape) for _, shape in layout)


def pack(adapter: Mapping[str, torch.Tensor], codec: str) -> ArrayRecord:
    """An adapter as one flat array, in the order of its sorted keys.

    Raises:
        AdapterError: a number does not fit the codec.
    """
    parts = [adapter[key].detach().cpu().reshape(-1).numpy() for key in sorted(adapter)]
    whole = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    with np.errstate(over="ignore"):
        encoded = whole.astype(CODECS[codec].dtype)
    if np.isfinite(whole).all() and not np.isfinite(encoded).all():
        raise AdapterError(f"the adapter's largest number, {np.abs(whole).max():g}, does not fit wire.codec = {codec}")
    return ArrayRecord({ARRAY: Array(encoded)})


def unpack(record: ArrayRecord, layout: Layout, codec: str) -> Adapter:
    """The adapter of a record, checked before anything of its claimed size is allocated.

    Raises:
        WireError: with reason keys, size, dtype, shape or malformed.
    """
    if set(record) != {ARRAY}:
        raise WireError("keys", f"arrays {sorted(record)[:5]}, expected {[ARRAY]}")
    flat = _decode(record[ARRAY], count(layout), np.dtype(CODECS[codec].dtype))
    adapter, start = {}, 0
    for key, shape in layout:
        size = math.prod(shape)
        adapter[key] = torch.from_numpy(flat[start : start + size].astype(np.float32).reshape(shape))
        start += size
    return adapter


def _decode(array: Array, size: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The payload as a flat array. Declared dtype and shape of an Array are claims; the payload's header is checked."""
    payload = array.data
    if len(payload) > size * dtype.itemsize + 1024:
        raise WireError("size", f"{len(payload)} bytes for {size} numbers of {dtype}")
    header = HEADER.match(payload)
    if header is None:
        raise WireError("malformed", "not an array as numpy writes it")
    found, shape = header[1].decode(), tuple(int(n) for n in header[2].split(b",") if n.strip())
    if found != dtype.str or array.dtype != dtype.name:
        raise WireError("dtype", f"{found} (declared {array.dtype}), expected {dtype.str}")
    if shape != (size,) or tuple(array.shape) != (size,):
        raise WireError("shape", f"{shape} (declared {tuple(array.shape)}), expected {(size,)}")
    body = payload[header.end() :]
    if len(body) != size * dtype.itemsize:
        raise WireError("size", f"{len(body)} bytes for {size} numbers of {dtype}")
    return np.frombuffer(body, dtype)


def instruction(parcel: Parcel | Offers, codec: str, config: Mapping[str, int | float | str]) -> RecordDict:
    """What the server sends: tensors, their keys and shapes, and a few plain values."""
    adapter = parcel.joined()
    layout = layout_of(adapter)
    manifest: dict[str, Any] = {
        KEYS: [key for key, _ in layout],
        SHAPES: ["x".join(map(str, shape)) for _, shape in layout],
    }
    return RecordDict({"arrays": pack(adapter, codec), "config": ConfigRecord({**config, **manifest})})


def received(content: RecordDict, codec: str) -> Parcel:
    """The tensors of a server's instruction.

    Raises:
        WireError: the record is not one.
    """
    try:
        config, arrays = content.config_records["config"], content.array_records["arrays"]
        keys, shapes = cast("Sequence[str]", config[KEYS]), cast("Sequence[str]", config[SHAPES])
        layout = tuple((key, _shape(shape)) for key, shape in zip(keys, shapes, strict=True))
    except (KeyError, TypeError, ValueError) as error:
        raise WireError("malformed", f"no instruction: {type(error).__name__}") from None
    if len(dict(layout)) != len(layout):
        raise WireError("keys", "a key stands twice in the instruction")
    return Parcel.parted(unpack(arrays, layout, codec))


def _shape(text: str) -> tuple[int, ...]:
    if not isinstance(text, str) or not SHAPE.fullmatch(text):
        raise ValueError(f"{text!r} is no shape")
    return tuple(int(n) for n in text.split("x"))


def reply(
    number: int,
    metrics: Mapping[str, int | float],
    parcel: Parcel | None = None,
    codec: str = "fp32",
    facts: Mapping[str, int | float | str | list[float]] | None = None,
) -> RecordDict:
    """All that a client ever answers with: metrics, plain facts, and the tensors that its method shares.

    This is the one place where something leaves a device. A personal adapter never reaches it.
    """
    records: dict[str, ArrayRecord | ConfigRecord | MetricRecord] = {"metrics": MetricRecord(dict(metrics))}
    known: dict[str, Any] = {ROUND: number, **(facts or {})}
    if parcel is not None:
        joined = parcel.joined()
        records["arrays"] = pack(joined, codec)
        known |= {LAYOUT: digest_of(layout_of(joined)), RANK: rank_of(parcel.adapter)}
    return RecordDict(records | {"reply": ConfigRecord(known)})


def figures(state: str, measured: Mapping[str, Any], classes: Sequence[str]) -> dict[str, int | float]:
    """A client's metrics in one state under the names that travel; those by class under the class's number.

    A class that the server does not know has no number: neither its name nor its figure is sent.
    """
    found: dict[str, int | float] = {}
    for name, value in measured.items():
        if isinstance(value, Mapping):
            found |= {f"{state}.{name}_{n}": value[each] for n, each in enumerate(classes) if each in value}
        else:
            found[f"{state}.{name}"] = value
    return found


def byte_size(message: Message) -> int:
    """Bytes of a message as serialised for the network, all of its objects together."""
    if message.has_error():
        return len((message.error.reason or "").encode())
    return sum(len(part.deflate()) for part in get_all_nested_objects(message).values())
