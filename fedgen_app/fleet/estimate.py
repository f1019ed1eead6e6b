"""What a run will cost a device, before anything runs: memory at its peak, bytes up and down, seconds per round.

The model is built from its configuration, without its weights, and one step of training and one of measuring are
counted operation by operation (``learning/counting.py``). What that leaves out stands in docs/devices.md.
"""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedgen_app.engines.keeper import ended_with, last_lines
from fedgen_app.errors import RunError, SettingsError
from fedgen_app.federation.compatibility import check_method
from fedgen_app.federation.method import Method
from fedgen_app.federation.work import round_plan
from fedgen_app.fleet.devices import CLASSES, THIS, Device, device_of
from fedgen_app.fleet.traffic import traffic
from fedgen_app.learning import attention
from fedgen_app.learning.adapters import parameters
from fedgen_app.learning.backbone import Backbone, find, load_task, outlined, pick_device, pick_dtype
from fedgen_app.learning.counting import Cost, counted, emptied, without_numbers
from fedgen_app.learning.task import Task
from fedgen_app.learning.training import choose, planned_steps
from fedgen_app.settings import Settings

ROOT = Path(__file__).parents[2]
# What a client's process imports, and how it says what that takes.
IMPORTED = "import importlib, sys, psutil; sys.path.insert(0, sys.argv[1]); import client_app; "
IMPORTED += "importlib.import_module('fedgen_app.tasks.' + sys.argv[2]); print(psutil.Process().memory_info().rss)"
# An adapter is there as what learns, as what was received, and as AdamW's two moments; gradients are counted.
COPIES = 4


@dataclass(frozen=True)
class Memory:
    """Bytes of a client's process at its peak, by what they are.

    Attributes:
        libraries: Python, torch and all that is imported.
        adapter: As it learns, as it was received, and the optimiser's moments.
        step: Activations and gradients of a batch, or of a forward pass of a measurement, whichever is more.
        kept: What the allocator keeps of smaller pieces that were let go: about as much as was held of them at once.
        measuring: In place of `step` and `kept`, where nothing is trained.
    """

    libraries: int
    weights: int
    adapter: int
    step: int
    kept: int
    measuring: int

    @property
    def peak(self) -> int:
        """Of a client: all of it."""
        return self.libraries + self.model

    @property
    def model(self) -> int:
        """Of that, what lies where the model computes."""
        return self.weights + self.adapter + self.step + self.kept

    @property
    def measured_model(self) -> int:
        """The same of a server, which measures the adapter and trains nothing."""
        return self.weights + self.adapter + self.measuring


@dataclass(frozen=True)
class Estimate:
    """What a run will cost one client.

    Attributes:
        rows: That the client is taken to train on.
        flops_per_step: Of one optimiser step.
    """

    device: Device
    dtype: str
    parameters: int
    memory: Memory
    up: int
    down_first: int
    down: int
    rows: int
    steps: int
    flops_per_step: int
    seconds_per_step: float

    @property
    def seconds(self) -> float:
        """Of a client's training in a round, without loading the model, and without the net."""
        return self.steps * self.seconds_per_step

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "device": self.device.name,
            "device_source": self.device.source,
            "dtype": self.dtype,
            "parameters": self.parameters,
            "memory": {
                "libraries": self.memory.libraries,
                "weights": self.memory.weights,
                "adapter": self.memory.adapter,
                "step": self.memory.step,
                "kept": self.memory.kept,
                "peak": self.memory.peak,
                "device": self.device.memory,
            },
            "uplink_bytes": self.up,
            "downlink_bytes_first_round": self.down_first,
            "downlink_bytes": self.down,
            "rows": self.rows,
            "steps": self.steps,
            "flops_per_step": self.flops_per_step,
            "seconds_per_step": self.seconds_per_step,
            "seconds_per_round": self.seconds,
        }


@functools.lru_cache(maxsize=4)
def libraries(task: str) -> int:
    """Bytes that a process takes which has imported what a client imports, measured in one.

    Raises:
        RunError: it does not get so far.
    """
    command = [sys.executable, "-c", IMPORTED, str(ROOT), task.replace("-", "_")]
    ended = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    if ended.returncode:  # killed for lack of memory, it says nothing
        reason = last_lines(ended.stderr, 1) or ended_with(ended.returncode)
        raise RunError(f"a client's libraries cannot be imported: {reason}")
    return int(ended.stdout.split()[-1])


def estimate(settings: Settings, source: str = "", device: str | Device = "this", rows: int = 256) -> Estimate:
    """What a run with these settings costs one client of a class of devices, or of a device that was measured.

    Args:
        source: A device's own place of the backbone.
        rows: That the client trains on.

    Raises:
        FedgenError: the settings do not go together, or the backbone is not there.
    """
    method, task = check_method(settings), load_task(settings.task)
    place = _place(settings, device)
    folder = find(source or settings.backbone, settings.backbone_revision, task, weights=False)
    name = device if isinstance(device, str) else device.name
    dtype = torch.float32 if method.weights == "model" else _dtype(settings, name, place)
    backbone = outlined(settings, folder, task, dtype, method.weights)
    train, measure = _costs(settings, task, method, backbone, place)
    learning = 4 * sum(math.prod(shape) for _, shape in backbone.layout)
    step, kept, measuring = max(train.peak, measure.peak), max(train.heap, measure.heap), measure.peak + measure.heap
    if place.type != "cpu":  # whose allocator keeps next to nothing of small pieces
        kept, measuring = 0, measure.peak
    copies = COPIES - 1 if method.weights == "model" else COPIES  # the model itself is what learns
    memory = Memory(libraries(settings.task), backbone.held_bytes, copies * learning, step, kept, measuring)
    of = device_of(device, place, dtype) if isinstance(device, str) else device
    sent = traffic(settings, method, backbone.layout)
    plan = round_plan(settings, 1, 0, dtype)
    per_step = settings.accumulate * of.seconds(train.operations, dtype)
    flops = settings.accumulate * train.flops
    called = str(dtype).removeprefix("torch.")
    steps = planned_steps(rows, plan)
    return Estimate(
        of, called, backbone.parameters, memory, sent.up, sent.down_first, sent.down, rows, steps, flops, per_step
    )


def _place(settings: Settings, device: str | Device) -> torch.device:
    """What computes on the device; of a class that is known, whatever this machine has.

    Raises:
        SettingsError: the settings say another.
    """
    if isinstance(device, Device) or device == THIS:
        return pick_device(settings.device)
    kind = CLASSES[device].kind
    if settings.device not in ("auto", kind):
        raise SettingsError(f"device = {settings.device!r}: a {device} is counted with its {kind!r}")
    return torch.device(kind)


def _dtype(settings: Settings, device: str, place: torch.device) -> torch.dtype:
    """What ``dtype = auto`` means on another device: what it computes natively."""
    if settings.dtype != "auto" or device == THIS:
        return pick_dtype(settings.dtype, place)
    return torch.bfloat16 if "bfloat16" in device_of(device, place, torch.float32).multiplies else torch.float32


def _costs(
    settings: Settings, task: Task, method: Method, backbone: Backbone, place: torch.device
) -> tuple[Cost, Cost]:
    """Of one batch of training, and of one forward pass of a measurement."""
    if task.probe is None:
        raise SettingsError(f"task = {settings.task!r}: what it costs is not counted beforehand")
    mode = without_numbers()
    emptied(backbone.model, mode)
    with mode:
        probe, loss = task.probe(settings, backbone), task.loss(settings, backbone)
        choose(backbone.model, lambda key: True)
        backbone.model.train()

        def step() -> None:
            with attention.suited_to(place):  # as ``training.train`` has it
                torch.autograd.backward(loss(backbone.model, probe.batch, torch.Generator()))

        train = counted(step, backbone.model)
        for parameter in parameters(backbone.model).values():
            parameter.grad = None
        backbone.model.eval()
        with torch.no_grad():
            measure = counted(probe.measure, backbone.model)
    if settings.backbone_bits:  # a layer's weights come back for as long as it computes
        largest = max((m.weight.numel() for m in backbone.model.modules() if isinstance(m, nn.Linear)), default=0)
        extra = largest * backbone.dtype.itemsize
        train.peak, measure.peak = train.peak + extra, measure.peak + extra
    return train, measure


def shown(found: Estimate) -> Sequence[str]:
    """Lines for a person."""
    memory, fits = found.memory, found.memory.peak <= found.device.memory
    parts = {
        "libraries": memory.libraries,
        "weights": memory.weights,
        "adapter and optimiser": memory.adapter,
        "activations and gradients": memory.step,
        "kept by the allocator": memory.kept,
    }
    return [
        f"device     {found.device.name}: {found.device.source}",
        f"backbone   {found.parameters / 1e6:.1f} million parameters, computes in {found.dtype}",
        f"memory     {memory.peak / 1e6:,.0f} MB at the peak: "
        + ", ".join(f"{name} {size / 1e6:,.0f}" for name, size in parts.items()),
        f"           the device has {found.device.memory / 1e6:,.0f} MB" + ("" if fits else ": TOO LITTLE"),
        f"up         {found.up:,} bytes a round",
        f"down       {found.down_first:,} bytes in the first round, {found.down:,} in later ones at most",
        f"time       {found.seconds_per_step:.3g} s per step, {found.flops_per_step / 1e9:,.1f} GFLOP; "
        f"{found.seconds:,.1f} s per round of {found.steps} steps ({found.rows} rows)",
    ]
