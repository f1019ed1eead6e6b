"""Runs the app in Flower: in its simulation with a SuperLink of its own, or on a SuperLink that is there.

Flower is driven through its console commands, so that importing this module costs nothing.

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
import importlib.util
import json
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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil  # type: ignore[import-untyped]

from fedgen_app.errors import RunError

RunConfig = Mapping[str, bool | int | float | str]
"""Every setting of the app, flat: dotted, kebab-case keys."""

TICK = 0.2  # seconds between two calls of `tick`
PORT_ATTEMPTS = 5
START_TIMEOUT = 120.0  # seconds; importing Flower takes 2 on an idle laptop
SUBMIT_TIMEOUT = 30.0  # seconds for an interrupted submission to tell its run id, and for `flwr stop`
LOST_AFTER = 12  # times in a row that the SuperLink may fail to tell a run's status ...
RETRY_AFTER = 5.0  # ... so many seconds apart
END_PATIENCE = 8.0  # seconds between asking processes to end and killing them
PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>
MARKER = "FEDGEN_SIMULATION"  # in the environment of one simulation's processes; its folder is the value
OWN = "fedgen-own-superlink"  # the connection's name in the simulation's own config.toml

_SIMULATION = {
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


def _nothing() -> None:
    pass


def simulate(
    app_dir: Path,
    run_config: RunConfig,
    *,
    clients: int,
    log_file: Path,
    cpus_per_client: int = 1,
    gpus_per_client: float = 0.0,
    tick: Callable[[], None] = _nothing,
) -> str:
    """Run the app in `app_dir` on `clients` simulated nodes; Flower's status, such as "finished:completed".

    What Flower prints is appended to `log_file`. `tick` is called about five times a second; what it raises
    ends the simulation, and so does KeyboardInterrupt. Raises RunError where the start or the submission
    fails, or the SuperLink dies. No process and no temporary file is left behind.
    """
    if importlib.util.find_spec("ray") is None:
        raise RunError("Ray is missing, which the simulation needs: pip install 'fedgen-edge[sim]'")
    federation = (
        f"num-supernodes={clients} client-resources-num-cpus={cpus_per_client} "
        f"client-resources-num-gpus={float(gpus_per_client)!r}"
    )
    for _ in range(PORT_ATTEMPTS):
        superlink = _launch(_free_port(), log_file)
        try:
            if not superlink.comes_up(tick):
                continue  # somebody else took the port first

            def watch(own: _SuperLink = superlink) -> None:
                own.check()
                tick()

            flwr = _Flwr(OWN, superlink.environment, superlink.home, log_file, watch)
            return _run_to_end(flwr, app_dir, run_config, "--federation-config", federation)
        finally:
            superlink.close()
    raise RunError(f"{PORT_ATTEMPTS} ports of 127.0.0.1 in a row were taken as the SuperLink started; see {log_file}")


def submit(
    app_dir: Path,
    run_config: RunConfig,
    *,
    superlink: str,
    log_file: Path,
    tick: Callable[[], None] = _nothing,
) -> str:
    """Run the app on the connection `superlink` of Flower's config.toml; Flower's status of the run.

    The SuperLink is left as it is; an exception, KeyboardInterrupt included, stops the run. `log_file` and
    `tick` are those of `simulate`. Raises RunError where the submission fails or the SuperLink stays out of
    reach.
    """
    with tempfile.TemporaryDirectory(prefix="fedgen-") as folder:
        flwr = _Flwr(superlink, _environment(), Path(folder), log_file, tick)
        return _run_to_end(flwr, app_dir, run_config)


def as_toml(run_config: RunConfig) -> str:
    """`run_config` as TOML, one quoted key per line; RunError names a value that Flower could not carry."""
    return "".join(f"{_quoted(key, key)} = {_value(key, value)}\n" for key, value in run_config.items())


def _value(key: str, value: bool | int | float | str) -> str:
    match value:
        case bool():
            return str(value).lower()
        case int():
            if not -(2**63) <= value < 2**63:
                raise RunError(f"{key} = {value} does not fit into 64 bits")
            return int.__repr__(value)
        case float():  # repr() of a subclass, such as numpy.float64, may be no number
            return float.__repr__(value)
        case str():
            return _quoted(key, value)
        case _:
            raise RunError(f"{key} = {value!r} is neither a bool, an int, a float nor a str")


def _quoted(key: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RunError(f"{key} = {text!r} is not valid Unicode") from error
    # A JSON string is a TOML string, but for DEL; escaped surrogate pairs, which TOML refuses, are avoided.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


@dataclass(frozen=True)
class _Flwr:
    """The command `flwr`, spoken to about one connection; `folder` is for files that it reads."""

    connection: str
    environment: dict[str, str]
    folder: Path
    log_file: Path
    tick: Callable[[], None]

    @contextlib.contextmanager
    def start(self, *arguments: str, output: IO[bytes], errors: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
        """Start `flwr`; it does not outlive the block."""
        command = [_command("flwr"), *arguments]
        # A session of its own: Ctrl-C in the terminal is for us, who then stop the run.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            env=self.environment,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def wait(self, process: subprocess.Popen[bytes]) -> None:
        while process.poll() is None:
            self.pause(TICK)

    def pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.tick()
            time.sleep(min(TICK, left))

    def follow(self, run_id: str) -> str:
        """Copy the run's log into the file until the run has finished, and tell its status."""
        failures = 0
        while True:
            arguments = ("log", run_id, self.connection, "--stream")
            with self.log_file.open("ab") as log, self.start(*arguments, output=log, errors=log) as stream:
                self.wait(stream)
            try:
                status = self.status(run_id)
                failures = 0
                if status.startswith("finished"):
                    return status
            except RunError:
                failures += 1
                if failures == LOST_AFTER:
                    raise
            self.pause(RETRY_AFTER)  # the connection broke: the next stream begins with the run's first line

    def status(self, run_id: str) -> str:
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            arguments = ("list", self.connection, "--run-id", run_id, "--format", "json")
            with self.start(*arguments, output=output, errors=errors) as process:
                self.wait(process)
            answer = _answer(output, errors)
        if not answer.get("runs"):
            raise RunError(f"SuperLink {self.connection} does not tell the status of run {run_id}: {_reason(answer)}")
        return str(answer["runs"][0]["status"])

    def stop(self, run_id: str) -> None:
        arguments = ("stop", run_id, self.connection)
        with (
            self.log_file.open("ab") as log,
            self.start(*arguments, output=log, errors=log) as process,
            contextlib.suppress(subprocess.TimeoutExpired),
        ):
            process.wait(SUBMIT_TIMEOUT)


def _run_to_end(flwr: _Flwr, app_dir: Path, run_config: RunConfig, *options: str) -> str:
    settings = flwr.folder / "run-config.toml"
    settings.write_text(as_toml(run_config), encoding="utf-8")
    flwr.log_file.parent.mkdir(parents=True, exist_ok=True)
    arguments = ("run", str(app_dir.resolve()), flwr.connection, "--run-config", str(settings), *options)
    with (
        tempfile.TemporaryFile() as output,
        tempfile.TemporaryFile() as errors,
        flwr.start(*arguments, "--format", "json", output=output, errors=errors) as submission,
    ):
        status = None
        try:
            flwr.wait(submission)
            answer = _answer(output, errors)
            if not answer.get("run-id"):
                raise RunError(f"Flower refused the app in {app_dir}: {_reason(answer)}")
            status = flwr.follow(answer["run-id"])
            return status
        finally:
            if status is None:
                _stop(flwr, submission, output, errors)


def _stop(flwr: _Flwr, submission: subprocess.Popen[bytes], output: IO[bytes], errors: IO[bytes]) -> None:
    """Stop the run, also where the interruption came before the submission told its id."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        submission.wait(SUBMIT_TIMEOUT)
    if run_id := _answer(output, errors).get("run-id"):
        flwr.stop(run_id)


def _answer(output: IO[bytes], errors: IO[bytes]) -> dict[str, Any]:
    """What `flwr ... --format json` printed; where that is no JSON, its complaint under Flower's key."""
    for stream in (output, errors):
        stream.seek(0)
    text = output.read()
    try:
        answer = json.loads(text)
    except json.JSONDecodeError:
        answer = None
    if isinstance(answer, dict):
        return answer
    return {"error-message": _last_lines(errors.read() + text)}


def _reason(answer: dict[str, Any]) -> str:
    return str(answer.get("error-message") or answer).strip()


def _last_lines(printed: bytes, count: int = 12) -> str:
    plain = re.sub(r"\x1b\[[0-9;]*m", "", printed.decode(errors="replace"))
    return "\n".join([line.rstrip() for line in plain.splitlines() if line.strip()][-count:])


def _command(name: str) -> str:
    # Beside the interpreter and not on PATH, where another environment's Flower may come first.
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise RunError(f"{path} is missing: pip install 'fedgen-edge[sim]' into the environment of {sys.executable}")
    return str(path)


def _environment() -> dict[str, str]:
    """Ours, so that Flower's programs find each other and their output can be read while they run."""
    folders = (str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath))
    environment = {
        **os.environ,
        "PATH": os.pathsep.join(folders),
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    environment.pop("FORCE_COLOR", None)  # else colours inside the JSON
    return environment


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _can_bind(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@dataclass(frozen=True)
class _SuperLink:
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
            if self.keeper.poll() is not None and not _can_bind(self.port):
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
            return _last_lines(log.read())


def _launch(port: int, log_file: Path) -> _SuperLink:
    command = [
        _command("flower-superlink"),
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
        **_environment(),
        **_SIMULATION,
        "FLWR_HOME": str(home),
        "RAY_TMPDIR": str(home),
        MARKER: str(home),
    }
    environment.pop("RAY_ADDRESS", None)  # a Ray of our own, never somebody's cluster
    boot = "import sys; sys.path.insert(0, sys.argv[1]); from fedgen_app.engines.flower import keep; keep()"
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
    return _SuperLink(home, port, environment, keeper, log_file, start)


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
