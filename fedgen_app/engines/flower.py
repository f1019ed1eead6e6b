"""Runs the app in Flower: in its simulation with a SuperLink of its own, or on a SuperLink that is there.

Flower is driven through its console commands, so that importing this module costs nothing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fedgen_app.engines import keeper
from fedgen_app.errors import RunError
from fedgen_app.settings import RunConfig

PORT_ATTEMPTS = 5
SUBMIT_TIMEOUT = 30.0  # seconds for an interrupted submission to tell its run id, and for `flwr stop`
LOST_AFTER = 12  # times in a row that the SuperLink may fail to tell a run's status ...
RETRY_AFTER = 5.0  # ... so many seconds apart


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
        superlink = keeper.launch(keeper.free_port(), log_file)
        try:
            if not superlink.comes_up(tick):
                continue  # somebody else took the port first

            def watch(own: keeper.SuperLink = superlink) -> None:
                own.check()
                tick()

            flwr = _Flwr(keeper.OWN, superlink.environment, superlink.home, log_file, watch)
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
        flwr = _Flwr(superlink, keeper.own_environment(), Path(folder), log_file, tick)
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
        command = [keeper.program("flwr"), *arguments]
        # Not where we are: flwr takes a folder that is called like the connection for an app, readable or not.
        # A session of its own: Ctrl-C in the terminal is for us, who then stop the run.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            env=self.environment,
            cwd="/",
            start_new_session=True,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def wait(self, process: subprocess.Popen[bytes]) -> None:
        while process.poll() is None:
            self.pause(keeper.TICK)

    def pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.tick()
            time.sleep(min(keeper.TICK, left))

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
    return {"error-message": keeper.last_lines(errors.read() + text)}


def _reason(answer: dict[str, Any]) -> str:
    return str(answer.get("error-message") or answer).strip()
