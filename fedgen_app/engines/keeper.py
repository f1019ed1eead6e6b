"""Starts a SuperLink in simulation mode, and sees to it that nothing of the simulation outlives us.

Why a keeper. A simulation is a tree of a dozen processes (SuperLink, SuperExec, ServerApp, Ray's servers and
workers); some open sessions of their own, some outlive their parents, and the SuperLink does not notice when
whoever started it is killed. So a keeper starts the SuperLink: a small process whose standard input is a pipe
from us. The pipe closes when we end, however we end, kill -9 included; the system does it, with no preexec_fn
and none of PR_SET_PDEATHSIG's surprises (it follows the starting thread, reaches the direct child only, and
exists on Linux only). The keeper then ends the tree and removes its folder. It finds the tree by a variable
in the environment and by descent; Linux hands orphans to the keeper (a "subreaper"), so that descent misses
none, and elsewhere the variable finds them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from fedgen_app.errors import RunError

TICK = 0.2  # seconds between two calls of `tick`
START_TIMEOUT = 120.0  # seconds; importing Flower takes 2 on an idle laptop
END_PATIENCE = 8.0  # seconds between asking processes to end and killing them
PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>
MARKER = "FEDGEN_SIMULATION"  # in the environment of one simulation's processes; its folder is the value
OWN = "fedgen-own-superlink"  # the connection's name in the simulation's own config.toml

SIMULATION = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # else every run waits for `uv sync`
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",  # Ray's own default of 15 lets anything else on the machine go first
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's ports know no login: only on loopback
    "TOKENIZERS_PARALLELISM": "false",
}


def free_port() -> int:
    """A port of 127.0.0.1 that nobody has at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def can_bind(port: int) -> bool:
    """Whether nobody listens on a port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@dataclass(frozen=True)
class SuperLink:
    """A SuperLink in simulation mode and its keeper; `home` is its FLWR_HOME and Ray's folder."""

    home: Path
    port: int
    environment: dict[str, str]
    keeper: subprocess.Popen[bytes]
    log_file: Path
    log_start: int

    def comes_up(self, tick: Callable[[], None]) -> bool:
        """Wait until it listens; False where somebody else has the port."""
        deadline = time.monotonic() + START_TIMEOUT
        while not self._listens():
            tick()
            if self.keeper.poll() is not None and not can_bind(self.port):
                return False
            self.check()
            if time.monotonic() > deadline:
                raise RunError(f"the SuperLink did not start within {START_TIMEOUT:g} s: {self._last_words()}")
            time.sleep(TICK)
        return True

    def check(self) -> None:
        """Raise RunError with the last lines of the log where the SuperLink has ended."""
        if (code := self.keeper.poll()) is not None:
            raise RunError(f"the SuperLink ended with status {code}: {self._last_words()}")

    def close(self) -> None:
        """End every process of the simulation and remove its folder."""
        assert self.keeper.stdin is not None
        self.keeper.stdin.close()  # first, so that the keeper acts even if we are interrupted from here on
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.keeper.wait(4 * END_PATIENCE)
        if self.keeper.returncode is None or self.home.exists():  # the keeper itself was killed
            end_processes(self.home)
            shutil.rmtree(self.home, ignore_errors=True)
            self.keeper.wait()

    def _listens(self) -> bool:
        # Not a request to the port: another server's answer could pass for ours.
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            for process in psutil.Process(self.keeper.pid).children():
                sockets = process.net_connections("tcp4")
                if any(s.status == psutil.CONN_LISTEN and s.laddr.port == self.port for s in sockets):
                    return True
        return False

    def _last_words(self) -> str:
        with self.log_file.open("rb") as log:
            log.seek(self.log_start)
            return last_lines(log.read())


def launch(port: int, log_file: Path) -> SuperLink:
    """Start a keeper, which starts a SuperLink; it may not listen yet (`SuperLink.comes_up`)."""
    command = [
        program("flower-superlink"),
        "--insecure",
        "--simulation",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    command.append("--disable-runtime-dependency-installation")
    # Ray's socket paths add 70 characters to the folder, and 103 are allowed: Ray too prefers /tmp on macOS.
    parent = tempfile.gettempdir() if len(tempfile.gettempdir()) <= 16 else "/tmp"
    home = Path(tempfile.mkdtemp(prefix="fedgen-", dir=parent))
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "{OWN}"\n[superlink.{OWN}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    environment = {
        **own_environment(),
        **SIMULATION,
        "FLWR_HOME": str(home),
        "RAY_TMPDIR": str(home),
        MARKER: str(home),
    }
    environment.pop("RAY_ADDRESS", None)  # a Ray of our own, never somebody's cluster
    boot = "import sys; sys.path.insert(0, sys.argv[1]); from fedgen_app.engines.keeper import keep; keep()"
    package = str(Path(__file__).resolve().parents[2])
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("ab") as log:
        start = log.tell()
        keeper = subprocess.Popen(
            [sys.executable, "-P", "-c", boot, package, str(home), *command],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,  # Ctrl-C in the terminal must not reach the keeper
        )
    return SuperLink(home, port, environment, keeper, log_file, start)


def keep() -> None:
    """Be the keeper: run the command until it ends or standard input closes, then end all, remove the folder.

    The command line is: this package's folder, the simulation's folder, the command.
    """
    _, _, home, *command = sys.argv
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    superlink = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        while superlink.poll() is None and not select.select([sys.stdin], [], [], TICK)[0]:
            pass
    finally:
        end_processes(Path(home))
        shutil.rmtree(home, ignore_errors=True)
        with contextlib.suppress(ChildProcessError):  # adopted orphans: a container's init may not reap them
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
    code = superlink.returncode or 0
    sys.exit(code if code >= 0 else 128 - code)  # as a shell tells a signal


def end_processes(home: Path) -> None:
    """End the processes of the simulation in `home` and their descendants: ask them once, then kill."""
    for attempt in range(30):
        left = _processes(home)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill() if attempt else process.terminate()
        if not left:
            return
        psutil.wait_procs(left, timeout=1.0 if attempt else END_PATIENCE)
    raise RunError(f"these processes of the simulation do not end: {sorted(process.pid for process in left)}")


def _processes(home: Path) -> set[psutil.Process]:
    """All of them but this one. Ray's agents overwrite their environment: descent finds those."""
    every = psutil.process_iter(["environ"])
    marked = [process for process in every if (process.info["environ"] or {}).get(MARKER) == str(home)]
    found = set(marked)
    for process in marked:
        with contextlib.suppress(psutil.NoSuchProcess):
            found.update(process.children(recursive=True))
    found.discard(psutil.Process())
    return {process for process in found if is_alive(process)}


def is_alive(process: psutil.Process) -> bool:
    """Whether `process` still runs; a zombie does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:  # it ended between the two questions
        return False


def last_lines(printed: bytes, count: int = 12) -> str:
    """The end of what a program printed, without colours and empty lines."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", printed.decode(errors="replace"))
    return "\n".join([line.rstrip() for line in plain.splitlines() if line.strip()][-count:])


def ended_with(status: int) -> str:
    """How a process ended that said nothing else."""
    return f"killed by signal {-status}" if status < 0 else f"exit status {status}"


def program(name: str) -> str:
    """Path of one of Flower's console commands; RunError where it is not installed."""
    # Beside the interpreter and not on PATH, where another environment's Flower may come first.
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise RunError(f"{path} is missing: pip install 'fedgen-edge[sim]' into the environment of {sys.executable}")
    return str(path)


def own_environment() -> dict[str, str]:
    """Our environment, where Flower's programs find each other and their output can be read while they run."""
    folders = (str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath))
    environment = {
        **os.environ,
        "PATH": os.pathsep.join(folders),
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    environment.pop("FORCE_COLOR", None)  # else colours inside the JSON
    if home := environment.get("FLWR_HOME"):  # seen from here, wherever the program is started
        environment["FLWR_HOME"] = str(Path(home).absolute())
    return environment
