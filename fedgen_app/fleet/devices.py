"""Classes of devices as an estimate sees them: how fast they multiply, move bytes and start an operation."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import psutil
import torch

from fedgen_app.learning.counting import Operation

THIS = "this"
# Of the arithmetic and the memory peak that a data sheet gives, this much is assumed to be reached.
REACHED = 0.5
# A step takes longer than its operations one by one, whose inputs lie in the caches: fitted on one machine to what the
# bundled backbones take (docs/devices.md).
TOGETHER = 1.4
REPEATS, SIDE, COPIED, STARTED = 12, 768, 8_000_000, 2000


Kind = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Device:
    """What an estimate needs to know of a device.

    Attributes:
        kind: What computes there.
        memory: Bytes in all; what training can have of it is less.
        multiplies: Operations a second by type of number; what computes in no other type counts as float32.
        moves: Bytes a second.
        start: Seconds that an operation takes however small it is.
    """

    name: str
    kind: Kind
    memory: int
    multiplies: dict[str, float]
    moves: float
    start: float
    source: str

    def seconds(self, operations: Sequence[Operation], dtype: torch.dtype) -> float:
        """Each operation takes what its multiplications take or what its bytes take, whichever is more, and its start.

        Williams et al. 2009 (doi 10.1145/1498765.1498785), the roofline.
        """
        speed = self.multiplies.get(str(dtype).removeprefix("torch."), self.multiplies["float32"])
        return TOGETHER * sum(max(each.flops / speed, each.moved / self.moves) + self.start for each in operations)


def _class(
    name: str, kind: Kind, memory: int, multiplies: dict[str, float], moves: float, start: float, source: str
) -> tuple[str, Device]:
    reached = {dtype: REACHED * peak for dtype, peak in multiplies.items()}
    return name, Device(name, kind, memory, reached, REACHED * moves, start, source)


# None of them was tried: peaks are of data sheets, starts are guesses from the processor's speed. See docs/devices.md.
CLASSES = dict(
    (
        _class(
            "raspberry-pi-5",
            "cpu",
            8 * 10**9,
            {"float32": 153.6e9},
            17.1e9,
            20e-6,
            "4 Cortex-A76 at 2.4 GHz with two 128-bit FMA units each, 32-bit LPDDR4X-4267; not tried",
        ),
        _class(
            "jetson-orin-nano",
            "cuda",
            8 * 10**9,
            {"float32": 1.28e12, "bfloat16": 10.2e12, "float16": 10.2e12},
            68e9,
            25e-6,
            "1024 CUDA and 32 tensor cores at 625 MHz, 128-bit LPDDR5 (8 GB module); not tried",
        ),
        _class(
            "laptop",
            "cpu",
            16 * 10**9,
            {"float32": 384e9},
            51.2e9,
            7e-6,
            "4 cores at 3 GHz with two 256-bit FMA units each, two channels of DDR4-3200; not tried",
        ),
    )
)


# This machine where its speed does not matter, and a GPU need not work.
UNMEASURED = Device(THIS, "cpu", 0, {"float32": 1.0}, 1.0, 0.0, "not measured")


def measured(device: torch.device, dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter) -> Device:
    """This machine, by a second of products, copies and small operations in the type that is computed in."""

    def best(work: Callable[[], object]) -> float:
        """Seconds of the quickest of a few tries, as others may use the machine too."""
        taken = []
        for _ in range(REPEATS + 1):
            began = clock()
            work()
            taken.append(clock() - began)
        return min(taken[1:])

    def ended(work: Callable[[], object]) -> Callable[[], object]:
        def waited() -> None:
            work()
            torch.cuda.synchronize()

        return waited if device.type == "cuda" else work

    left, right = (torch.rand(SIDE, SIDE, device=device).to(dtype) for _ in range(2))
    big, small = torch.rand(COPIED, device=device), torch.rand(8, device=device)
    with torch.inference_mode():
        product = best(ended(lambda: left @ right))
        moving = best(ended(lambda: big + 1))
        starting = best(ended(lambda: [small + 1 for _ in range(STARTED)]))
    name = str(dtype).removeprefix("torch.")
    speeds = {"float32": 2 * SIDE**3 / product} | {name: 2 * SIDE**3 / product}
    memory = torch.cuda.mem_get_info()[1] if device.type == "cuda" else psutil.virtual_memory().total
    source = f"measured now, {torch.get_num_threads()} threads" if device.type == "cpu" else "measured now"
    kind: Kind = "cuda" if device.type == "cuda" else "cpu"
    return Device(THIS, kind, memory, speeds, 2 * 4 * COPIED / moving, starting / STARTED, source)


def device_of(name: str, place: torch.device, dtype: torch.dtype) -> Device:
    """A class by its name, or this machine as it is."""
    return measured(place, dtype) if name == THIS else CLASSES[name]
