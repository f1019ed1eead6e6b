"""What a process asks of Linux: to lose its privileges, to end with its parent, to be told of its orphans."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterable
from pathlib import Path

import psutil

# <linux/prctl.h>, <linux/capability.h>
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP = 1, 4, 24
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 36, 38, 47, 4
CAPABILITY_VERSION_3 = 0x20080522
# jemalloc's, which pyarrow brings, starts its thread anew in a forked child.
SAFE_THREADS = frozenset(("jemalloc_bg_thd",))
GRACE = 5.0  # seconds between asking processes to end and killing them


def _prctl(*arguments: int) -> bool:
    padded = [ctypes.c_ulong(number) for number in (*arguments, 0, 0, 0, 0)[:5]]
    return bool(ctypes.CDLL(None, use_errno=True).prctl(*padded) == 0)


def drop_privileges() -> None:
    """No capabilities, none by any program that is started, and no look into our memory by others of the same user.

    Has to be called before there are threads: each thread has capabilities of its own.

    Raises:
        OSError: the kernel does not do it.
    """
    _prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    for capability in range(64):  # fails beyond the last one, and for who may not: then there is nothing to lose
        _prctl(PR_CAPBSET_DROP, capability)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    if ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()) != 0:
        raise OSError(ctypes.get_errno(), "capset")
    for option, value in ((PR_SET_NO_NEW_PRIVS, 1), (PR_SET_DUMPABLE, 0)):
        if not _prctl(option, value):
            raise OSError(ctypes.get_errno(), f"prctl {option}")


def end_with_parent(parent: int) -> None:
    """Be killed when the parent's thread that forked us ends. To be called in the child, with the parent's id."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before we asked
        os._exit(1)


def adopt_orphans() -> None:
    """From now on our children's orphans become our own children, where we find them."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def other_threads() -> list[str]:
    """Names of this process's threads, but for the first one and those that a fork does not break."""
    names = []
    for task in Path("/proc/self/task").iterdir():
        if task.name != str(os.getpid()):
            with contextlib.suppress(OSError):  # it has ended since
                names.append((task / "comm").read_text(encoding="utf-8").strip())
    return sorted(name for name in names if name not in SAFE_THREADS)


def close_all_but(kept: Iterable[int]) -> None:
    """Close every file descriptor from 3 on but these."""
    start = 3
    for descriptor in sorted(set(kept)):
        os.closerange(start, descriptor)
        start = descriptor + 1
    os.closerange(start, os.sysconf("SC_OPEN_MAX"))


def end_descendants(spared: int = 0) -> None:
    """End all processes that came from us, those that an app left behind too, but for one."""
    left = [p for p in psutil.Process().children(recursive=True) if p.pid != spared]
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    for process in psutil.wait_procs(left, timeout=GRACE)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=GRACE)
    with contextlib.suppress(ChildProcessError):  # orphans that became ours
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
