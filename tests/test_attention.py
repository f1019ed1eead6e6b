"""Attention on a CPU: the same function as torch's own, and taken where it was measured to be faster."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fedgen_app.learning import attention


def drawn(places: int, keys: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 3, n, 8, dtype=dtype, requires_grad=True) for n in (places, keys, keys)]


MASKS: list[dict[str, Any]] = [
    {},
    {"is_causal": True},
    {"attn_mask": torch.linspace(-3, 3, 20, dtype=torch.float64).view(4, 5)},
]


@pytest.mark.parametrize("options", MASKS)
def test_equals_torch_and_its_gradients(options: dict[str, Any]) -> None:
    inputs = drawn(4, 5)
    results = []
    for function in (attention.plain, scaled_dot_product_attention):
        value = function(*inputs, **options)
        results.append([value, *torch.autograd.grad((value**2).sum(), inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def taken(monkeypatch: pytest.MonkeyPatch, inputs: list[Tensor], **options: Any) -> bool:
    """Whether a call under ``suited_to`` was computed by ``plain``."""
    calls = []
    plain = attention.plain
    monkeypatch.setattr(attention, "plain", lambda *arguments: calls.append(1) or plain(*arguments))
    with attention.suited_to(torch.device("cpu")):
        inside = scaled_dot_product_attention(*inputs, **options)
    if not options.get("dropout_p"):
        torch.testing.assert_close(inside, scaled_dot_product_attention(*inputs, **options), atol=0.02, rtol=0.05)
    return bool(calls)


@pytest.mark.parametrize(
    ("places", "dtype", "options", "expected"),
    [
        (16, torch.bfloat16, {}, True),
        (16, torch.bfloat16, {"is_causal": True, "scale": 8**-0.5}, True),
        (16, torch.float32, {}, False),
        (1024, torch.bfloat16, {}, False),
        (16, torch.bfloat16, {"scale": 1.0}, False),
        (16, torch.bfloat16, {"attn_mask": torch.ones(16, 16, dtype=torch.bfloat16).triu()}, True),
        (16, torch.bfloat16, {"attn_mask": torch.ones(16, 16, dtype=torch.bool).tril()}, False),
        (16, torch.bfloat16, {"dropout_p": 0.5}, False),
    ],
)
def test_taken_where_it_is_faster_and_says_the_same(
    monkeypatch: pytest.MonkeyPatch, places: int, dtype: torch.dtype, options: dict[str, Any], expected: bool
) -> None:
    assert taken(monkeypatch, drawn(places, places, dtype), **options) is expected


def test_nothing_is_taken_outside_or_on_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "plain", lambda *arguments: pytest.fail("taken"))
    inputs = drawn(16, 16, torch.bfloat16)
    scaled_dot_product_attention(*inputs)
    with attention.suited_to(torch.device("cuda")):
        scaled_dot_product_attention(*inputs)


def test_shared_keys_stay_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = (torch.randn(1, heads, 8, 8, dtype=torch.bfloat16) for heads in (4, 2, 2))
    assert not taken(monkeypatch, [query, key, value], enable_gqa=True)
