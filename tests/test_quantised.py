"""A frozen backbone in 4 or 8 bits: what becomes of its weights, that it learns, that a fleet may hold it unlike."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, RecordDict
from helpers import RecordingGrid, events, federate, tiny_config, tiny_settings
from networks import network_settings
from pipelines import image_settings
from torch import nn

from fedgen_app.errors import BackboneError, SettingsError
from fedgen_app.federation.client import Participant
from fedgen_app.federation.compatibility import check_method
from fedgen_app.learning import adapters
from fedgen_app.learning.backbone import Backbone, open_backbone
from fedgen_app.learning.quantised import placed
from fedgen_app.learning.task import Held

CPU = torch.device("cpu")


def opened(bits: int, **changes: Any) -> Backbone:
    if bits:
        pytest.importorskip("bitsandbytes")
    return open_backbone(tiny_settings(backbone_bits=bits, **changes))


def logits(backbone: Backbone) -> torch.Tensor:
    backbone.model.eval()
    ids = torch.arange(64).reshape(2, 32)
    with torch.inference_mode():
        return torch.as_tensor(backbone.model(input_ids=ids).logits).float()


@pytest.mark.parametrize(("bits", "near"), [(4, 0.2), (8, 0.03)])
def test_fewer_bits_compute_nearly_the_same_and_take_less(bits: int, near: float) -> None:
    whole = opened(0)
    expected, fingerprint, taken = logits(whole), whole.fingerprint, whole.held_bytes
    assert taken == 4 * whole.parameters and whole.bits == 0
    few = opened(bits)
    found = logits(few)
    assert 0 < float((found - expected).norm() / expected.norm()) < near
    assert (few.fingerprint, few.parameters, few.layout, few.bits) == (
        fingerprint,
        whole.parameters,
        whole.layout,
        bits,
    )
    rounded: list[Any] = [m for m in few.model.modules() if type(m).__module__.startswith("bitsandbytes")]
    linear = sum(layer.in_features * layer.out_features for layer in rounded)
    assert linear == 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)  # and not the output, which is tied
    # The weights of those layers at ``bits`` each, and at most a byte per 8 of them for their scales.
    of_linear = few.held_bytes - (taken - 4 * linear)
    assert linear * bits / 8 < of_linear < linear * bits / 8 + linear / 8


@pytest.mark.parametrize("bits", [4, 8])
def test_the_adapter_stays_float32_and_learns(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    config = tiny_config(tmp_path / "run", backbone_bits=bits, num_server_rounds=3, learning_rate=1e-2)
    results = federate(config)
    losses = [entry["train_loss"] for entry in results["rounds"]]
    assert results["status"] == "completed" and losses[-1] < losses[0]
    assert results["final"]["metrics"]["word_perplexity"] < results["frozen"]["word_perplexity"]
    backbone = opened(bits)
    assert {p.dtype for p in adapters.parameters(backbone.model).values()} == {torch.float32}


def test_a_residual_acts_beside_quantised_layers() -> None:
    backbone = opened(4)
    adapter = backbone.fresh(0)
    before = logits(backbone)
    beside = {key: torch.full_like(tensor, 0.05) for key, tensor in adapter.items()}
    adapters.write(backbone.model, adapter, beside)
    assert not torch.allclose(logits(backbone), before)
    adapters.write(backbone.model, adapter)
    assert torch.equal(logits(backbone), before)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    found = []
    for checkpointing in (False, True):
        backbone = opened(4, gradient_checkpointing=checkpointing)
        adapters.write(backbone.model, {k: torch.full_like(t, 0.02) for k, t in backbone.fresh(0).items()})
        backbone.model.train()
        learning = adapters.parameters(backbone.model)
        for parameter in learning.values():
            parameter.requires_grad_(True)
            parameter.grad = None
        torch.autograd.backward(
            backbone.model(input_ids=torch.arange(64).reshape(2, 32)).logits.float().square().mean()
        )
        found.append({key: parameter.grad for key, parameter in learning.items()})
    for key, gradient in found[0].items():
        assert gradient is not None and found[1][key] is not None
        torch.testing.assert_close(gradient, found[1][key])


@pytest.mark.parametrize("kind", ["text", "dit"])
def test_a_denoiser_is_held_in_fewer_bits_too(kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    whole = open_backbone(image_settings(kind))
    parameters, taken = whole.parameters, whole.held_bytes
    few = open_backbone(image_settings(kind, backbone_bits=8))
    assert few.parameters == parameters and few.held_bytes < taken
    assert any(type(layer).__name__ == "Linear8bitLt" for layer in few.model.modules())


def test_without_the_library_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        SettingsError, match=r"backbone-bits = 4: needs bitsandbytes: pip install 'fedgen-edge\[bits\]'"
    ):
        open_backbone(tiny_settings(backbone_bits=4, seed=77))


def test_what_has_no_linear_layers_is_refused() -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(BackboneError, match="backbone-bits = 8: Sequential has no linear layer"):
        placed(nn.Sequential(nn.Conv2d(1, 1, 3)), Held(torch.float32, CPU, 8))


def test_what_learns_as_a_whole_is_refused() -> None:
    with pytest.raises(SettingsError, match="backbone-bits = 4: method = fedavg-full trains the weights"):
        check_method(tiny_settings(method="fedavg-full", backbone_bits=4))


@pytest.mark.parametrize("task", ["gan", "vae"])
def test_small_networks_are_refused(task: str) -> None:
    with pytest.raises(SettingsError, match="backbone-bits = 8: a GAN or VAE is too small"):
        open_backbone(network_settings(task, backbone_bits=8))


def test_a_device_decides_for_itself(tmp_path: Path) -> None:
    node = {"client-id": "pi", "data": "/nowhere", "backbone-bits": 8, "threads": 3}
    own = Participant.from_context(Context(1, 1, node, RecordDict(), tiny_config(tmp_path, backbone_bits=4)))
    assert (own.settings.backbone_bits, own.settings.threads) == (8, 3)
    with pytest.raises(SettingsError, match="threads = -2"):
        Participant.from_context(Context(1, 1, node | {"threads": -2}, RecordDict(), tiny_config(tmp_path)))


def test_threads_are_set_where_a_number_is_given() -> None:
    before = torch.get_num_threads()
    try:
        open_backbone(tiny_settings(threads=before + 1))
        assert torch.get_num_threads() == before + 1
        open_backbone(tiny_settings())
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_devices_that_hold_the_backbone_unlike_train_together(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    config = tiny_config(tmp_path / "run")
    grid = RecordingGrid(config, 3)
    grid.contexts[2].node_config["backbone-bits"] = 4
    results = federate(config, grid=grid)
    assert [entry["clients"] for entry in results["rounds"]] == [[0, 1, 2]] * 2
    started = next(event for event in events(tmp_path / "run") if event["event"] == "start")
    assert started["held"] == {"float32": 2, "4 bits, float32": 1}
