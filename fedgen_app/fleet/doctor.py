"""Is this machine fit for its part? Each finding says what is there, and how to mend what is wrong."""

from __future__ import annotations

import email.utils
import importlib
import importlib.metadata
import math
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psutil

from fedgen_app.errors import FedgenError
from fedgen_app.federation.policy import policy_of
from fedgen_app.fleet import wheels
from fedgen_app.fleet.checks import barred, days_left
from fedgen_app.settings import Settings, looks_like_path

LIBRARIES = ("torch", "transformers", "peft", "safetensors", "datasets")
NEEDED = ("torch", "transformers", "peft")  # without which nothing of a model can be looked at
SIMULATION = ("ray", "flwr-datasets", "scikit-learn", "matplotlib")
LEAST_DISK = 2 * 1000**3  # bytes; caches, checkpoints and a run's adapters
LEAST_DAYS = 14
# What Flower's node authentication takes: 5 s ahead, 305 s behind.
AHEAD, BEHIND = 5.0, 305.0
PROCESS = 1000**3  # bytes: Python with torch, transformers and peft, and Flower's own process beside it
PROCESS_BESIDE = 200 * 1000**2  # bytes: Flower's own process, the SuperNode
SMALLER = "end other programs, or see docs/devices.md for what makes a run smaller"
TIMEOUT = 10.0
CONTROLLERS = Path("/sys/fs/cgroup/cgroup.controllers")  # of the kernel's cgroups, version 2


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        fix: How to mend it, where it is not as it should be.
        hint: What could be better where it is.
    """

    what: str
    ok: bool
    detail: str
    fix: str = ""
    hint: str = ""


def versions(simulation: bool) -> Iterator[Finding]:
    """Python, Flower and the libraries."""
    python, (unusable, reason) = platform.python_version(), broken()
    yield Finding("python", sys.version_info >= (3, 11), python, "install Python 3.11 or newer")
    for name in ("flwr", *LIBRARIES, *(SIMULATION if simulation else ())):
        extra = "[sim]" if name in SIMULATION else ""
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, False, "not installed", f"{sys.executable} -m pip install 'fedgen-edge{extra}'")
            continue
        if name == unusable:
            fix = f"install {name}, or the system's library that is missing, again"
            if wheels.tegra():
                fix += f"; for torch: {wheels.for_jetson(wheels.jetson_linux())}"
            yield Finding(name, False, f"{found}, which cannot be imported: {reason}", fix)
            continue
        fits = name != "flwr" or found.startswith("1.41.")
        yield Finding(name, fits, found, f"{sys.executable} -m pip install 'flwr>=1.41,<1.42'")


def broken() -> tuple[str, str]:
    """The first of the needed libraries that cannot be imported, and why; "" and "": all can."""
    for name in NEEDED:
        try:
            importlib.import_module(name)
        except Exception as error:  # half a library may raise anything, and to find that is what we are here for
            return name, (str(error).splitlines() or [type(error).__name__])[0]
    return "", ""


def hardware() -> Iterator[Finding]:
    """CPU, and the GPU by a kernel that is really launched; nothing where `versions` found the libraries broken."""
    if broken()[0]:
        return
    import torch

    from fedgen_app.learning.backbone import computes_bfloat16

    cpu = torch.device("cpu")
    half = "native" if computes_bfloat16(cpu) else "emulated: dtype = auto takes float32"
    features = " ".join(sorted(name for name, there in torch.cpu.get_capabilities().items() if there is True))
    yield Finding("cpu", True, f"{platform.machine()}, {os.cpu_count()} cores, bfloat16 {half}; {features}")
    yield gpu(wheels.tegra())


def gpu(jetson: bool) -> Finding:
    """Whether CUDA computes; on a Jetson the usual wheels are found and may then fail at the first kernel."""
    import torch

    if not torch.cuda.is_available():
        return no_gpu(jetson, torch.version.cuda)
    try:
        name = torch.cuda.get_device_name()
        value = float((torch.ones(64, 64, device="cuda") @ torch.ones(64, 64, device="cuda")).sum())
    except (RuntimeError, torch.cuda.DeferredCudaCallError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        fix = wheels.for_jetson(wheels.jetson_linux()) if jetson else "install a torch whose CUDA fits this driver"
        return Finding("gpu", False, f"torch sees it, but no kernel runs: {reason}", fix)
    return Finding("gpu", value == 64**3, f"{name}, a kernel ran", "the GPU computes wrongly: see the system's log")


def no_gpu(jetson: bool, cuda: str | None) -> Finding:
    """What it means that torch sees no GPU.

    Args:
        cuda: The version that torch was built for; None: torch was built for the CPU alone, which is a choice.
    """
    detail, fix, hint = "none that torch sees; training is on the CPU", "", ""
    if jetson and cuda:
        fix = wheels.for_jetson(wheels.jetson_linux())
    elif jetson:
        hint = f"this torch is for the CPU alone. For the GPU: {wheels.for_jetson(wheels.jetson_linux())}"
    elif cuda and not wheels.nvidia():
        hint = f"this torch is built for CUDA {cuda}, several GB that nothing here uses; in a new environment, before "
        hint += f"fedgen-edge: {wheels.CPU}"
    return Finding("gpu", not fix, detail, fix, hint)


def room() -> Finding:
    """Free memory against what the processes take before they load a model."""
    free = psutil.virtual_memory().available
    detail = f"{free / 1e9:.1f} GB free, {PROCESS / 1e9:.1f} GB needed before a model is loaded"
    return Finding("memory", free >= PROCESS, detail, "end other programs")


def memory(
    node: Mapping[str, Any], settings: Settings, gpu_computes: bool = True, trains: bool = True
) -> Iterator[Finding]:
    """Free memory, and what the device allows, against the estimate for its backbone and the run's settings.

    Args:
        node: A device's own configuration; of a server or a simulation there is none.
        gpu_computes: False: the estimate is for the CPU, whatever the settings say.
        trains: Else it measures alone, as a server does.
    """
    from fedgen_app.federation.client import own_choices
    from fedgen_app.fleet.devices import UNMEASURED
    from fedgen_app.fleet.estimate import estimate
    from fedgen_app.learning.backbone import load_task, pick_device

    if load_task(settings.task).probe is None:  # networks so small that the libraries are all that counts
        yield room()
        return
    rank = min(int(node.get("rank", 0)) or settings.lora.rank, settings.lora.rank)
    own = own_choices(node) | {"lora.rank": rank, "lora.ranks": ""} | ({} if gpu_computes else {"device": "cpu"})
    try:
        here = Settings.from_run_config(settings.flat() | own)
        needed = estimate(here, str(node.get("backbone", "")), UNMEASURED).memory
        place = pick_device(here.device)
    except FedgenError as error:
        yield Finding("memory", False, str(error), "until that is mended nobody can say what training takes")
        return
    shape = f"rank {rank}, batches of {here.batch_size}"
    shape += f", {here.sequence_length} tokens" if here.task == "language" else ""
    allowed = int(node.get("memory", 0))
    if allowed and allowed < needed.model:
        detail = f"memory = {allowed}, training takes {needed.model} beside the libraries ({shape})"
        yield Finding("memory", False, detail, SMALLER)
        return
    model = needed.model if trains else needed.measured_model
    apart = place.type == "cuda" and not wheels.tegra()  # a Jetson's GPU has no memory of its own
    peak = needed.libraries + PROCESS_BESIDE + (0 if apart else model)
    yield _fits("memory", psutil.virtual_memory().available, peak, shape)
    if apart:
        import torch

        yield _fits("gpu memory", torch.cuda.mem_get_info()[0], model, shape)


def _fits(what: str, free: int, peak: int, shape: str) -> Finding:
    detail = f"{free / 1e9:.1f} GB free, {peak / 1e9:.1f} GB needed at the peak ({shape})"
    return Finding(what, free >= peak, detail, SMALLER)


def allowed(place: Path, mode: int) -> bool:
    """Whether this user may do so: ``os.access`` asks for who started the process, which a change of user leaves."""
    return os.access(place, mode, effective_ids=os.access in os.supports_effective_ids)


def shut(what: str, place: Path, folder: Path) -> Finding:
    """It lies behind a folder that this user may not enter."""
    fix = f"let others pass through it: chmod o+x {folder}; or lay it elsewhere"
    return Finding(what, False, f"{place}: this user may not enter {folder}", fix)


def limits(controllers: Path = CONTROLLERS) -> Iterator[Finding]:
    """Whether the kernel can hold a service to a limit of memory; nothing where it has no cgroups of version 2."""
    try:
        there = controllers.read_text(encoding="utf-8").split()
    except OSError:
        return
    if "memory" in there:
        yield Finding("limits", True, "the kernel can limit a service's memory")
        return
    # Raspberry Pi's firmware starts the kernel with cgroup_disable=memory (github.com/raspberrypi/linux/issues/6980).
    hint = (
        "on a Raspberry Pi: cgroup_enable=memory at the end of the one line in /boot/firmware/cmdline.txt, and restart"
    )
    yield Finding("limits", True, "the kernel cannot limit memory: the service's MemoryMax has no effect", hint=hint)


def disk(folder: Path) -> Finding:
    """Free space where state is kept, and whether it can be written."""
    if closed := barred(folder):
        return shut("disk", folder, closed)
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if not allowed(there, os.W_OK):
        return Finding(
            "disk", False, f"{there} cannot be written by this user", f"chown it to the user that runs this: {there}"
        )
    return Finding("disk", free >= LEAST_DISK, f"{free / 1e9:.1f} GB free at {there}", "delete old runs and caches")


def backbone_there(source: str, task: str) -> Finding:
    """Whether the backbone lies here, and its fingerprint."""
    if not looks_like_path(source):
        return Finding("backbone", True, f"{source or 'as the run says'}: no folder of this machine")
    from fedgen_app.fleet.pack import fingerprint_of

    folder = Path(source).expanduser()
    if closed := barred(folder):
        return shut("backbone", folder, closed)
    if not folder.is_dir():
        return Finding(
            "backbone", False, f"{source}: no such folder", f"fedgen backbone pull URL --to {source} --key FILE"
        )
    try:
        return Finding("backbone", True, f"{source}: {fingerprint_of(folder.resolve(), task)}")
    except FedgenError as error:
        return Finding("backbone", False, str(error), f"fedgen backbone pull URL --to {source} --key FILE --replace")
    except OSError as error:
        return Finding("backbone", False, f"{error.filename}: {error.strerror}", f"chmod -R a+rX {source}")


def server(address: str, ca: Path) -> Iterator[Finding]:
    """The server's port, days of its certificate and of this machine's ``ca``, and this clock against the server's."""
    try:
        days, own = days_left(address, ca)
    except FedgenError as error:
        yield Finding(
            "server", False, str(error), "is the server up, its port open, and this ca.crt of the same fleet?"
        )
        return
    yield Finding("server", days >= LEAST_DAYS, f"{address} answers, {days} days left", "fedgen provision ... --renew")
    fix = f"fedgen provision ... --renew where it has not been done, then install its ca.crt here as {ca}"
    yield Finding("authority", own >= LEAST_DAYS, f"{ca}: {own} days left", fix)
    yield clock(address, ca)


def clock(address: str, ca: Path) -> Finding:
    """How far this clock is from the server's, as its ``Date`` tells, to a second."""
    import ssl

    try:
        answer = httpx.get(f"https://{address}/", verify=ssl.create_default_context(cafile=str(ca)), timeout=TIMEOUT)
        theirs = email.utils.parsedate_to_datetime(answer.headers["Date"])
    except (httpx.HTTPError, KeyError, ValueError) as error:
        return Finding("clock", False, f"the server does not tell the time: {type(error).__name__}", "look at its log")
    ahead = (datetime.now(UTC) - theirs).total_seconds()
    fits = -BEHIND < ahead < AHEAD
    return Finding(
        "clock", fits, f"{math.floor(abs(ahead))} s {'ahead' if ahead > 0 else 'behind'}", "timedatectl set-ntp true"
    )


def data_there(source: str) -> Finding:
    """Whether the device's data can be read."""
    place = Path(source)
    if closed := barred(place):
        return shut("data", place, closed)
    readable = place.exists() and allowed(place, os.R_OK | (os.X_OK if place.is_dir() else 0))
    detail = "can be read" if readable else "cannot be read by this user, or is not there"
    return Finding(
        "data", readable, f"{source}: {detail}", f"let the group of the user read it: chmod -R g+rX {source}"
    )


def elsewhere(settings: Settings, state: Path, serves: bool) -> Iterator[Finding]:
    """All findings of a server, or of a machine that simulates, which trains one client at a time.

    Args:
        state: Where its runs lie.
    """
    yield from versions(simulation=not serves)
    yield from _computing({}, settings, state, trains=not serves)


def device(node: Mapping[str, Any], settings: Settings) -> Iterator[Finding]:
    """All findings of a device."""
    yield from versions(simulation=False)
    yield from _computing(node, settings, Path(str(node.get("state-dir", "~/.local/state/fedgen"))).expanduser())
    yield from limits()
    if "data" in node:
        yield data_there(str(node["data"]))
    try:
        policy_of(node)
        yield Finding("policy", True, str(node.get("policy", "none: all is allowed")))
    except FedgenError as error:
        yield Finding("policy", False, str(error), "mend the file; until then this device agrees to nothing")


def _computing(node: Mapping[str, Any], settings: Settings, state: Path, trains: bool = True) -> Iterator[Finding]:
    """What computes, where its state goes, and whether its backbone is there and fits."""
    gpu_computes = True
    for finding in hardware():
        yield finding
        gpu_computes &= finding.ok
    yield disk(state)
    if broken()[0]:
        yield room()
        return
    there = backbone_there(str(node.get("backbone", "")) or settings.backbone, settings.task)
    yield there
    if there.ok:
        yield from memory(node, settings, gpu_computes, trains)
