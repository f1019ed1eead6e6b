"""Which build of torch suits this machine, and where it comes from."""

from __future__ import annotations

import platform
import re
from pathlib import Path

# PyTorch's own indexes. PyPI's wheel for Linux, that for aarch64 too, brings CUDA 13 along: several GB.
INDEX = "pip install torch --index-url https://download.pytorch.org/whl/"
CPU = f"{INDEX}cpu"
# Begins like "# R36 (release), REVISION: 4.7, GCID: ...".
RELEASE = Path("/etc/nv_tegra_release")
# JetPack by its Jetson Linux, and which of PyTorch's indexes has kernels for it: 7.0 and 7.1 are for Thor alone
# (compute capability 11.0, in wheels from CUDA 13.0 on); Orin (8.7) runs those for 8.0 from CUDA 13.2 on, which 7.2
# has (``torch.cuda.DEVICE_REQUIREMENT_POST_JETSON_SBSA_UNIFICATION``).
JETPACK = {32: "4", 34: "5", 35: "5", 36: "6", 38: "7.0 or 7.1", 39: "7.2"}
WITH_KERNELS = {38: f"{INDEX}cu130", 39: f"{INDEX}cu132"}
# NVIDIA's number among the makers of PCI devices, and what its drivers make: in Linux, and in Windows' Linux (WSL).
VENDOR, DRIVERS = "0x10de", ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/dxg")


def tegra() -> bool:
    """Whether this is a Jetson."""
    return "tegra" in platform.release() or RELEASE.exists()


def jetson_linux(release: Path = RELEASE) -> int:
    """The first number of a Jetson's system; 0: it does not say."""
    try:
        found = re.search(r"R(\d+)", release.read_text(encoding="utf-8"))
    except OSError:
        return 0
    return int(found[1]) if found else 0


def for_jetson(system: int) -> str:
    """How a Jetson with this Jetson Linux comes to a torch for Python 3.11 or newer."""
    if system in WITH_KERNELS:
        return f"for JetPack {JETPACK[system]}: {WITH_KERNELS[system]}; for the CPU alone: {CPU}"
    known = f"JetPack {JETPACK[system]} is" if system in JETPACK else "JetPack 6 and older are"
    return (
        f"{known} without wheels of NVIDIA's for Python 3.11 or newer: go to JetPack 7.2, build torch for this Python "
        f"yourself, or take the CPU alone: {CPU}"
    )


def nvidia(devices: Path = Path("/sys/bus/pci/devices")) -> bool:
    """Whether something of NVIDIA's computes here, or would with its driver."""
    if tegra() or any(Path(driver).exists() for driver in DRIVERS):
        return True
    return any(file.read_text(encoding="utf-8").strip() == VENDOR for file in devices.glob("*/vendor"))
