"""What a piece of work on a model costs, counted without doing it: memory at its peak, operations, bytes moved.

torch runs the real code on tensors that have a shape, a type and a device but no numbers (``FakeTensorMode``), so that
it takes the branches it will take. Every result is booked when it comes and when nobody holds it any more.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

SMALL = 32 * 2**20  # glibc maps what is larger, and gives it back at once (mallopt(3), M_MMAP_THRESHOLD)


@dataclass(frozen=True)
class Operation:
    """One call of torch: multiplications and additions, counted as two, and bytes read and written."""

    flops: int
    moved: int


@dataclass
class Cost:
    """What a piece of work takes.

    Attributes:
        peak: Bytes held at once beside the model itself.
        heap: The most that was held at once in pieces of up to 32 MiB, of which glibc keeps what is let go.
        operations: In order; views, which compute nothing, have no bytes.
    """

    peak: int = 0
    heap: int = 0
    operations: list[Operation] = field(default_factory=list)

    @property
    def flops(self) -> int:
        """Of all operations."""
        return sum(operation.flops for operation in self.operations)


def without_numbers() -> FakeTensorMode:
    """The mode in which tensors have no numbers; what a scheduler or a tokenizer holds stays real."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def emptied(model: nn.Module, mode: FakeTensorMode) -> None:
    """Put tensors of that mode, on the CPU, in the place of a model's own, which may lie on torch's meta device."""
    made: dict[int, torch.Tensor] = {}
    before = []  # kept, so that no id is used twice
    with mode:
        for module in model.modules():
            stores: list[dict[str, Any]] = [cast(Any, module._parameters), cast(Any, module._buffers), vars(module)]
            for store in stores:
                for name, tensor in list(store.items()):
                    if not isinstance(tensor, torch.Tensor):
                        continue
                    before.append(tensor)
                    if id(tensor) not in made:
                        empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                        learns = tensor.requires_grad
                        made[id(tensor)] = nn.Parameter(empty, learns) if isinstance(tensor, nn.Parameter) else empty
                    store[name] = made[id(tensor)]


def counted(work: Callable[[], object], model: nn.Module) -> Cost:
    """The cost of a piece of work, in the mode that the model's tensors are of."""
    book = _Book(model)
    with cast(AbstractContextManager[Any], book):
        work()
    return book.cost


class _Book(cast(Any, TorchDispatchMode)):  # type: ignore[misc]  # torch leaves it without types
    """Books what each call of torch allocates, and what is let go."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.cost = Cost()
        self.held, self.small = 0, 0
        owned = [*model.parameters(), *model.buffers()]
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in owned}  # counted elsewhere

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        fresh = sum(self._take(tensor) for tensor in _tensors(result))
        written_in_place = func._schema.is_mutable
        moved = 0
        if fresh or written_in_place:
            moved = sum(tensor.nbytes for tensor in _tensors([args, kwargs, result]))
        self.cost.operations.append(Operation(_flops(func, args, dict(kwargs or {}), result), moved))
        self.cost.peak = max(self.cost.peak, self.held)
        self.cost.heap = max(self.cost.heap, self.small)
        return result

    def _take(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        if storage._cdata in self.sizes:
            return 0
        size = self.sizes[storage._cdata] = storage.nbytes()
        self.held += size
        self.small += size if size <= SMALL else 0
        weakref.finalize(storage, self._let_go, storage._cdata)
        return size

    def _let_go(self, storage: int) -> None:
        size = self.sizes.pop(storage)
        self.held -= size
        self.small -= size if size <= SMALL else 0


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    formula = flop_registry.get(func._overloadpacket)
    return int(formula(*args, **kwargs, out_val=result)) if formula else 0
