"""A model all of whose weights learn and travel: what FedAvg did before adapters, for small backbones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class WholeModel(nn.Module):
    """A model in the place where a PEFT model stands: the pre-trained weights are set aside and can act again.

    Costs the memory of a second copy of the weights.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        # Not buffers: they are no part of the state that learns.
        self.pretrained = {name: p.detach().clone() for name, p in base.named_parameters()}

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """As the model's own."""
        return self.base(*inputs, **named)

    def get_base_model(self) -> nn.Module:
        """The model itself."""
        return self.base

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The pre-trained weights act while this lasts."""
        learned = {name: p.detach().clone() for name, p in self.base.named_parameters()}
        self._load(self.pretrained)
        try:
            yield
        finally:
            self._load(learned)

    @torch.no_grad()
    def _load(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.base.named_parameters():
            parameter.copy_(weights[name])
