"""Arithmetic on adapters against slow, obvious float64 references."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from fedgen_app.federation.aggregation import change_norm, mean_of_factors, shrink
from fedgen_app.federation.method import GlobalState, Lora, Round, Update, weighted_mean
from fedgen_app.learning.adapters import Adapter, digest
from fedgen_app.settings import AdmissionSettings, Settings, defaults

RANK, ALPHA = 3, 7.5
LORA = Lora(RANK, ALPHA)
SCALING = ALPHA / RANK
SETTINGS = Settings.from_run_config(defaults(Path(__file__).resolve().parents[1]))
LAYERS = {"q_proj": (6, 5), "v_proj": (4, 5)}
CONV = "conv_in"


def adapter(seed: int, scale: float = 1.0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (out, into) in LAYERS.items():
        tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, into, generator=generator) * scale
        tensors[f"{name}.lora_B.weight"] = torch.randn(out, RANK, generator=generator) * scale
    tensors[f"{CONV}.lora_A.weight"] = torch.randn(RANK, 2, 3, 3, generator=generator) * scale
    tensors[f"{CONV}.lora_B.weight"] = torch.randn(4, RANK, 1, 1, generator=generator) * scale
    return tensors


def dense(tensors: Adapter, name: str) -> np.ndarray:
    """s B A of one layer, formed in full."""
    a = tensors[f"{name}.lora_A.weight"].double().numpy().reshape(RANK, -1)
    b = tensors[f"{name}.lora_B.weight"].double().numpy().reshape(-1, RANK)
    return SCALING * b @ a


def dense_norm(new: Adapter, old: Adapter) -> float:
    return math.sqrt(sum(((dense(new, n) - dense(old, n)) ** 2).sum() for n in (*LAYERS, CONV)))


def test_the_mean_weights_every_factor_by_its_clients_examples() -> None:
    adapters, weights = [adapter(i) for i in range(4)], [3, 500, 1, 41]
    mean = mean_of_factors(adapters, weights)
    assert list(mean) == sorted(adapters[0])
    for key, tensor in mean.items():
        oracle = np.average([a[key].double().numpy() for a in adapters], axis=0, weights=weights)
        assert tensor.dtype == torch.float32
        np.testing.assert_array_equal(tensor.numpy(), oracle.astype(np.float32))


def test_the_mean_of_one_is_that_one() -> None:
    assert digest(mean_of_factors([adapter(1)], [17])) == digest(adapter(1))


def test_the_mean_adds_in_float64() -> None:
    # In float32 the 1 is lost beside 2**25, and the mean of the four would be 0.
    values = [2.0**25, 1.0, -(2.0**25), 0.0]
    mean = mean_of_factors([{"x": torch.tensor([v])} for v in values], [1, 1, 1, 1])
    assert mean["x"].item() == 0.25


def test_the_mean_leaves_its_arguments_alone() -> None:
    adapters = [adapter(1), adapter(2)]
    before = [digest(a) for a in adapters]
    mean_of_factors(adapters, [1, 2])
    assert [digest(a) for a in adapters] == before


@pytest.mark.parametrize(
    ("adapters", "weights"),
    [
        ([], []),
        ([adapter(1)], [1, 2]),
        ([adapter(1)], [0]),
        ([adapter(1)], [math.nan]),
        ([adapter(1), {"x": torch.zeros(1)}], [1, 1]),
    ],
)
def test_what_has_no_mean_is_refused(adapters: Sequence[Adapter], weights: Sequence[float]) -> None:
    with pytest.raises(ValueError, match="mean|differ"):
        mean_of_factors(adapters, weights)


def test_the_rule_keeps_what_nobody_shared() -> None:
    start = GlobalState(adapter(9), {"r": torch.ones(1)}, {"e": torch.ones(2)})
    only = "q_proj.lora_B.weight"
    updates = [Update(i, {only: adapter(i)[only]}, RANK, i + 1.0) for i in range(2)]
    after = weighted_mean(start, updates, Round(1, LORA, 0, SETTINGS))
    assert after.residual is start.residual and after.extra is start.extra
    torch.testing.assert_close(after.adapter[only], (adapter(0)[only] + 2 * adapter(1)[only]) / 3)
    for key in set(start.adapter) - {only}:
        assert torch.equal(after.adapter[key], start.adapter[key])


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e6])
def test_change_norm_is_that_of_the_dense_products(scale: float) -> None:
    old, new = adapter(1), adapter(2, scale)
    assert change_norm(new, old, SCALING) == pytest.approx(dense_norm(new, old), rel=1e-9)


def test_change_norm_sees_the_product_and_not_the_factors() -> None:
    old = adapter(1)
    # B / 4 and 4 A: other factors, the same product.
    turned = {key: tensor * (4.0 if ".lora_A." in key else 0.25) for key, tensor in old.items()}
    assert change_norm(turned, old, SCALING) == pytest.approx(0, abs=1e-6)
    zero = {key: tensor * (".lora_A." in key) for key, tensor in old.items()}
    assert change_norm(zero, zero | {}, SCALING) == 0


def test_change_norm_takes_other_ranks_and_scalings() -> None:
    old, new, turned = adapter(1), {}, np.linalg.qr(np.random.default_rng(0).normal(size=(RANK, RANK)))[0]
    for key, tensor in adapter(2).items():  # two of the three directions, at another scaling
        new[key] = tensor[:2] if ".lora_A." in key else tensor[:, :2]
    square = 0.0
    for name in (*LAYERS, CONV):
        a, b = (new[f"{name}.lora_{x}.weight"].double().numpy() for x in "AB")
        square += ((1.7 * b.reshape(len(b), -1) @ a.reshape(2, -1) - dense(old, name)) ** 2).sum()
    assert change_norm(new, old, 1.7, SCALING) == pytest.approx(math.sqrt(square), rel=1e-9)
    # The same product at half the scaling, in a turned basis: no change.
    same = {}
    for name in (*LAYERS, CONV):
        key_a, key_b = (f"{name}.lora_{x}.weight" for x in "AB")
        a, b = (old[key].double().numpy().reshape(shape) for key, shape in ((key_a, (RANK, -1)), (key_b, (-1, RANK))))
        same[key_a] = torch.tensor(turned.T @ a).float().reshape(old[key_a].shape)
        same[key_b] = torch.tensor(2 * b @ turned).float().reshape(old[key_b].shape)
    assert change_norm(same, old, SCALING / 2, SCALING) < 1e-5 * change_norm(old, adapter(2), SCALING)


def test_a_tensor_that_is_no_factor_changes_by_its_difference() -> None:
    old, new = {"weight": torch.tensor([1.0, 2.0])}, {"weight": torch.tensor([4.0, 6.0])}
    assert change_norm(new, old, 9.0) == pytest.approx(5.0)
    assert shrink(new, old, 9.0, 1.0)["weight"].tolist() == pytest.approx([1.6, 2.8])
    both = change_norm(adapter(2) | new, adapter(1) | old, SCALING)
    assert both == pytest.approx(math.hypot(5.0, dense_norm(adapter(2), adapter(1))), rel=1e-9)


@pytest.mark.parametrize("share", [0.9, 0.3, 1e-3])
def test_shrink_stays_on_the_line_and_reaches_the_limit(share: float) -> None:
    old, new = adapter(1), adapter(2, 30.0)
    limit = share * dense_norm(new, old)
    got = shrink(new, old, SCALING, limit)
    assert dense_norm(got, old) == pytest.approx(limit, rel=1e-3)
    assert change_norm(got, old, SCALING) <= limit
    key = "q_proj.lora_A.weight"
    t = ((got[key] - old[key]) / (new[key] - old[key])).median().item()
    assert 0 < t < 1
    for key, tensor in got.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, old[key] + t * (new[key] - old[key]), rtol=1e-4, atol=1e-4)


def test_shrink_of_what_cannot_move_is_the_old_one() -> None:
    old, new = adapter(1), adapter(2)
    assert digest(shrink(new, old, SCALING, 0.0)) == digest(old)


def test_zero_switches_the_limits_off() -> None:
    assert AdmissionSettings.model_validate({"max-update-norm": 0, "norm-action": "clip", "max-weight": 0})
