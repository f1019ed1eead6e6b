"""Attention during training on a CPU, where torch's fused kernel is slow in bfloat16 over short sequences."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Pairs of places at most, 512 x 512 or 3400 places and a prompt of 77 tokens: the weights of all pairs are kept for the
# backward pass. Measured on one core, forward and backward: 0.2 to 0.6 of the fused kernel's time below, 1.1 at 1024^2.
PAIRS = 2**18


def plain(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """softmax(Q K^T / sqrt(d) + mask) V with two products in the inputs' own type; shapes (..., places, d).

    ``is_causal``: nothing that comes later is looked at.
    """
    scores = (query / math.sqrt(query.shape[-1])) @ key.transpose(-1, -2)
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    if attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1) @ value


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``scaled_dot_product_attention`` with its own arguments, by ``plain`` where that is faster and says the same."""
    short = query.shape[-2] * key.shape[-2] <= PAIRS
    usual = not dropout_p and not enable_gqa and scale in (None, query.shape[-1] ** -0.5)
    usual = usual and (attn_mask is None or attn_mask.dtype == query.dtype)  # where a bool shuts all, torch gives zeros
    if short and usual and query.dtype == torch.bfloat16:
        return plain(query, key, value, attn_mask, is_causal)
    return nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


class _Attend(TorchFunctionMode):
    """Takes ``attend`` wherever a model calls torch's attention."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One call of any torch function."""
        chosen = attend if func is nn.functional.scaled_dot_product_attention else func
        return chosen(*args, **kwargs or {})


def suited_to(device: torch.device) -> AbstractContextManager[object]:
    """While this is open, attention is computed in the way that trains fastest on a device."""
    return _Attend() if device.type == "cpu" else nullcontext()
