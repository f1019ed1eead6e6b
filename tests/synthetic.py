"""What the tests of rules share: random adapters of linear and convolution layers, and their dense products."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from fedgen_app.federation.method import GlobalState, Lora, Round, Update
from fedgen_app.learning.adapters import Adapter, fresh, layout_of
from fedgen_app.settings import Settings, Value, defaults

ROOT = Path(__file__).resolve().parents[1]

# d_out, and the form of an input: (d_in,), or (channels, height, width) of a convolution.
Shapes = Mapping[str, tuple[int, tuple[int, ...]]]
Dense = dict[str, np.ndarray]
SHAPES: Shapes = {"layers.0.q_proj": (6, (5,)), "layers.1.v_proj": (7, (9,)), "layers.1.conv": (6, (2, 3, 3))}


def keys(name: str) -> tuple[str, str]:
    return f"{name}.lora_A.weight", f"{name}.lora_B.weight"


def random_adapter(seed: int, rank: int, shapes: Shapes = SHAPES, scale: float = 1.0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    adapter = {}
    for name, (out, into) in shapes.items():
        key_a, key_b = keys(name)
        ones = (1,) * (len(into) - 1)
        adapter[key_a] = torch.randn(rank, *into, generator=generator) * scale
        adapter[key_b] = torch.randn(out, rank, *ones, generator=generator) * scale
    return dict(sorted(adapter.items()))


def start(rank: int, shapes: Shapes = SHAPES, seed: int = 3) -> Adapter:
    """The fresh adapter, B = 0."""
    return fresh(layout_of(random_adapter(0, rank, shapes)), seed)


def matrices(adapter: Mapping[str, Tensor], name: str) -> tuple[np.ndarray, np.ndarray]:
    """B and A in float64."""
    a, b = (adapter[key].double().numpy() for key in keys(name))
    return b.reshape(len(b), -1), a.reshape(len(a), -1)


def dense(adapter: Mapping[str, Tensor], scaling: float) -> Dense:
    """s B A of every layer, formed in full."""
    names = sorted({key.partition(".lora_")[0] for key in adapter})
    return {name: scaling * np.matmul(*matrices(adapter, name)) for name in names}


def dense_mean(updates: Sequence[Update], lora: Lora) -> Dense:
    """dW* = sum of p_k s_k B_k A_k."""
    total = sum(u.num_examples for u in updates)
    each = [(u.num_examples / total, dense(u.adapter, lora.at(u.rank).scaling)) for u in updates]
    return {name: sum(p * products[name] for p, products in each) for name in each[0][1]}


def plus(one: Dense, other: Dense, times: float = 1.0) -> Dense:
    return {name: one[name] + times * other[name] for name in one}


def best(products: Dense, rank: int) -> Dense:
    """The best approximation of each layer of at most this rank."""
    cut = {}
    for name, product in products.items():
        u, s, v = np.linalg.svd(product, full_matrices=False)
        cut[name] = (u[:, :rank] * s[:rank]) @ v[:rank]
    return cut


def norm(products: Dense) -> float:
    return math.sqrt(sum(float((product**2).sum()) for product in products.values()))


def assert_same(got: Dense, wanted: Dense, tolerance: float = 2e-6) -> None:
    """Equal up to a few roundings of float32, relative to the whole."""
    assert norm(plus(got, wanted, -1)) <= tolerance * max(norm(wanted), 1e-12)


def settings(**overrides: Value) -> Settings:
    """The defaults; an override's key is written with _ for - and __ for a dot."""
    changed = {key.replace("__", ".").replace("_", "-"): value for key, value in overrides.items()}
    return Settings.from_run_config(defaults(ROOT) | changed)


def a_round(lora: Lora, number: int = 1, clients: int = 10, shapes: Shapes = SHAPES, **overrides: Value) -> Round:
    layout = layout_of(random_adapter(0, lora.rank, shapes))
    return Round(number, lora, 1000 + number, settings(**overrides), layout, clients)


def updates_of(
    ranks: Sequence[int], weights: Sequence[float], shapes: Shapes = SHAPES, seed: int = 0, scale: float = 1.0
) -> list[Update]:
    return [
        Update(client, random_adapter(100 * seed + client + 1, rank, shapes, scale), rank, weight)
        for client, (rank, weight) in enumerate(zip(ranks, weights, strict=True))
    ]


def assert_alive(adapter: Adapter, residual: Adapter, scaling: float) -> None:
    """Every direction of every layer has a gradient, and one step on both factors moves the product.

    The layer is W x + s B A x + R x with a squared error, trained by torch.
    """
    for name in sorted({key.partition(".lora_")[0] for key in adapter}):
        b, a = (torch.tensor(m, requires_grad=True) for m in matrices(adapter, name))
        frozen = torch.tensor(np.matmul(*matrices(residual, name))) if residual else torch.zeros(1, dtype=torch.float64)
        generator = torch.Generator().manual_seed(8)
        inputs = torch.randn(64, a.shape[1], generator=generator, dtype=torch.float64)
        target = torch.randn(64, len(b), generator=generator, dtype=torch.float64)
        loss = ((inputs @ (scaling * b @ a + frozen).T - target) ** 2).mean()
        loss.backward()
        assert a.grad is not None and b.grad is not None
        alive = a.grad.abs().amax(1) + b.grad.abs().amax(0)
        assert (alive > 1e-8).all(), f"{name}: directions {(alive <= 1e-8).nonzero().flatten().tolist()} never learn"
        with torch.no_grad():
            moved = (b - 1e-2 * b.grad) @ (a - 1e-2 * a.grad)
            assert (moved - b @ a).norm() > 1e-8


@st.composite
def federations(draw: st.DrawFn, mixed: bool) -> tuple[Lora, list[Update], Shapes]:
    """Clients with unequal weights, of equal or mixed ranks; ranks may exceed a layer's dimensions."""
    rank = draw(st.integers(1, 7))
    lora = Lora(rank, draw(st.sampled_from([1.0, 7.5, 16.0])), draw(st.booleans()))
    size = st.integers(1, 8)
    shapes: dict[str, tuple[int, tuple[int, ...]]] = {}
    for index in range(draw(st.integers(1, 2))):
        shapes[f"linear{index}"] = (draw(size), (draw(size),))
    if draw(st.booleans()):
        shapes["conv"] = (draw(size), (draw(st.integers(1, 3)), *draw(st.sampled_from([(1, 1), (3, 3), (1, 2)]))))
    count = draw(st.integers(1, 5))
    ranks = [draw(st.integers(1, rank)) if mixed else rank for _ in range(count)]
    weights = [draw(st.sampled_from([1.0, 3.0, 41.0, 500.0])) for _ in range(count)]
    return lora, updates_of(ranks, weights, shapes, seed=draw(st.integers(0, 50))), shapes


def state_of(lora: Lora, shapes: Shapes = SHAPES) -> GlobalState:
    """Some trained adapter that the round started from."""
    return GlobalState(random_adapter(999, lora.rank, shapes))
