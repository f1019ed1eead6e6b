"""What a run will cost, against what it then costs: bytes exactly, memory of single steps, operations by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import command, federate, tiny_config, tiny_model, tiny_settings
from networks import network_settings
from pipelines import MAKERS, image_settings
from torch import nn

from fedgen_app.errors import BackboneError, RunError, SettingsError
from fedgen_app.fleet import estimate as estimating
from fedgen_app.fleet.devices import CLASSES, TOGETHER, Device, measured
from fedgen_app.fleet.estimate import estimate
from fedgen_app.learning.backbone import load_task, open_backbone, outlined
from fedgen_app.learning.counting import Operation, counted, emptied, without_numbers
from fedgen_app.settings import defaults, own_defaults

ROOT = Path(__file__).resolve().parents[1]


def test_peak_and_operations_of_a_layer_by_hand() -> None:
    layer, mode = nn.Linear(10, 20, bias=False), without_numbers()
    emptied(layer, mode)
    with mode:
        inputs = torch.zeros(4, 10)
        cost = counted(lambda: layer(layer(inputs) @ torch.zeros(20, 10)), layer)
    assert cost.flops == 2 * 4 * (10 * 20 + 20 * 10 + 10 * 20)
    # A (4, 20) while the (20, 10) is there and the (4, 10) comes of it; then the (4, 10) with the last (4, 20). The
    # weight is the model's own.
    assert cost.peak in (4 * (80 + 200 + 40), 4 * (80 + 200 + 40) + 4 * 80)
    assert sum(each.moved for each in cost.operations) >= 4 * (40 + 200 + 80 + 200 + 40 + 200 + 80)


def test_what_is_kept_for_the_backward_pass_counts() -> None:
    mode = without_numbers()
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(6)))
    emptied(model, mode)
    with mode:
        inputs = torch.zeros(100, 32)

        def forward() -> torch.Tensor:
            return torch.as_tensor(model(inputs).tanh().sum())

        with torch.no_grad():
            alone = counted(forward, model).peak
        whole = counted(lambda: torch.autograd.backward(forward()), model).peak
    each = 4 * 100 * 32
    assert alone < 3 * each < 6 * each < whole < 12 * each


def test_a_roofline_by_hand() -> None:
    device = Device("x", "cpu", 0, {"float32": 100.0, "bfloat16": 200.0}, moves=10.0, start=1.0, source="")
    work = [Operation(1000, 10), Operation(0, 50), Operation(0, 0)]
    assert device.seconds(work, torch.float32) == TOGETHER * (10 + 5 + 3)
    assert device.seconds(work, torch.bfloat16) == TOGETHER * (5 + 5 + 3)
    assert device.seconds(work, torch.float16) == TOGETHER * (
        10 + 5 + 3
    )  # in what it does not compute natively it is no faster


def test_this_machine_is_measured() -> None:
    found = measured(torch.device("cpu"), torch.float32)
    assert found.name == "this" and found.multiplies["float32"] > 1e8 and found.moves > 1e7 and 0 < found.start < 1


def test_libraries_that_the_memory_does_not_hold_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimating, "IMPORTED", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(RunError, match="cannot be imported: killed by signal 9"):
        estimating.libraries.__wrapped__("language")


@pytest.mark.parametrize("bits", [0, 4, 8])
def test_the_outline_is_the_model_that_is_loaded(bits: int) -> None:
    if bits:
        pytest.importorskip("bitsandbytes")
    settings = tiny_settings(backbone_bits=bits)
    there = open_backbone(settings)
    outline = outlined(settings, tiny_model(), load_task("language"), torch.float32)
    assert (outline.layout, outline.parameters) == (there.layout, there.parameters)
    assert outline.held_bytes == there.held_bytes


@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_denoisers_have_outlines_too(kind: str) -> None:
    settings = image_settings(kind)
    there = open_backbone(settings)
    found = estimate(settings, device="laptop")
    assert found.parameters == there.parameters and found.memory.weights == there.held_bytes
    assert found.flops_per_step > 0 and found.memory.step > 0


@pytest.mark.parametrize(
    "method",
    ["fedgen-edge", "ffa-lora", "rolora", "flora", "fedex-lora", "scaffold", "fedper", "local-only", "fedavg-full"],
)
def test_the_bytes_are_those_of_a_run(method: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"method": method, "num_server_rounds": 4, "max_steps": 1, "expected_clients": 3}
    changes |= {"personal__epochs": 0, "aggregation__residual_rank": 6}
    results = federate(tiny_config(tmp_path / "run", **changes))
    found = estimate(tiny_settings(**changes), device="laptop")
    up = max(entry["uplink_bytes"] for entry in results["rounds"]) / 3
    down = [entry["downlink_bytes"] / 3 for entry in results["rounds"]]
    # Numbers of examples and of rounds and a run's name have more or fewer digits: a few bytes.
    assert abs(found.up - up) < 24
    assert abs(found.down_first - down[0]) < 48
    assert abs(found.down - max(down)) < 48


def test_more_of_everything_takes_more() -> None:
    usual = estimate(tiny_settings(), device="laptop")
    wide, wider = (estimate(tiny_settings(batch_size=n), device="laptop").memory.step for n in (200, 400))
    assert 1.9 * wide < wider < 2.1 * wide and usual.memory.step < wide  # where measuring takes less than a batch
    assert estimate(tiny_settings(lora__rank=8), device="laptop").memory.adapter == 2 * usual.memory.adapter
    assert estimate(tiny_settings(sequence_length=64), device="laptop").flops_per_step > 1.9 * usual.flops_per_step
    assert usual.memory.peak == sum(vars(usual.memory).values()) - usual.memory.measuring
    assert usual.memory.adapter == 16 * sum(t.numel() for t in open_backbone(tiny_settings()).fresh(0).values())
    assert usual.steps == 64 and estimate(tiny_settings(max_steps=3), device="laptop").steps == 3
    slower = estimate(tiny_settings(), device="raspberry-pi-5")
    assert slower.seconds > usual.seconds and slower.up == usual.up


def test_checkpoints_save_memory_and_cost_operations() -> None:
    changes: dict[str, Any] = {"batch_size": 64, "sequence_length": 64}
    plain = estimate(tiny_settings(**changes), device="laptop")
    saving = estimate(tiny_settings(gradient_checkpointing=True, **changes), device="laptop")
    assert saving.memory.step <= plain.memory.step and saving.flops_per_step > 1.1 * plain.flops_per_step


def test_a_half_type_where_the_device_has_it() -> None:
    found = {name: estimate(tiny_settings(dtype="auto", device="auto"), device=name).dtype for name in CLASSES}
    assert found == {"raspberry-pi-5": "float32", "jetson-orin-nano": "bfloat16", "laptop": "float32"}


def test_a_class_is_counted_with_what_it_computes_with_whatever_this_machine_has() -> None:
    """Only a CPU's allocator keeps what small pieces took."""
    found = {name: estimate(tiny_settings(device="auto"), device=name).memory for name in CLASSES}
    assert {name for name, memory in found.items() if memory.kept == 0} == {"jetson-orin-nano"}
    assert estimate(tiny_settings(device="cuda"), device="jetson-orin-nano").memory == found["jetson-orin-nano"]
    for device, name in (("cpu", "jetson-orin-nano"), ("cuda", "laptop")):
        with pytest.raises(SettingsError, match=f"device = '{device}': a {name} is counted with its"):
            estimate(tiny_settings(device=device), device=name)


def test_what_is_not_counted_is_refused() -> None:
    for task in ("gan", "vae"):
        with pytest.raises(SettingsError, match=f"task = '{task}': what it costs is not counted beforehand"):
            estimate(network_settings(task), device="laptop")
    with pytest.raises(BackboneError, match="no such folder"):
        estimate(tiny_settings(), source="/no/such/folder", device="laptop")
    with pytest.raises(SettingsError, match="lora.text-encoder = true"):
        estimate(image_settings("text", lora__text_encoder=True), device="laptop")


def test_the_command() -> None:
    arguments = (
        "estimate",
        "--set",
        f"backbone={tiny_model()}",
        "--set",
        "dtype=float32",
        "--device",
        "raspberry-pi-5",
    )
    shown = command(*arguments)
    assert shown.status == 0 and [line.split()[0] for line in shown.out.splitlines()] == [
        *("device", "backbone", "memory", "the", "up", "down", "time")
    ]
    assert "not tried" in shown.out
    found = json.loads(command(*arguments, "--rows", "20", "--json").out)
    assert found["steps"] == 3 and found["memory"]["peak"] > found["memory"]["libraries"] > 10**8
    assert command("estimate", "--device", "toaster").status == 2
    assert command("estimate", "--set", "lora.rank=0").status == 2


def test_an_installed_package_has_its_defaults() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included == {"pyproject.toml": "fedgen_app/pyproject.toml"}
    assert own_defaults() == defaults(ROOT)
