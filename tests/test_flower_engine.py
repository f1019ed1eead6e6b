"""The Flower engine, on a tiny app that reports where and with what it ran."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgen_app.engines import flower, keeper
from fedgen_app.errors import RunError

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent

PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "tiny"
version = "1.0.0"
description = "Reports what it sees"
license = {text = "Apache-2.0"}
dependencies = []

[tool.flwr.app]
publisher = "tester"

[tool.flwr.app.components]
serverapp = "server:app"
clientapp = "client:app"

[tool.flwr.app.config]
report = ""
mode = "run"
quoted = ""
small = 0.5
flag = false
"group.key" = 1
"""

SERVER = """
import json, os, time
from pathlib import Path
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()

@app.main()
def main(grid, context):
    config = dict(context.run_config)
    report = {"config": config, "pid": os.getpid(), "cwd": os.getcwd(), "home": os.environ["FLWR_HOME"]}
    if config["mode"] == "raise":
        raise RuntimeError("the app says no")
    while len(nodes := list(grid.get_node_ids())) < 4:
        time.sleep(0.1)
    messages = [Message(RecordDict(), dst_node_id=node, message_type="train") for node in nodes]
    replies = grid.send_and_receive(messages)
    report["clients"] = [json.loads(reply.content["report"]["json"]) for reply in replies]
    partial = Path(config["report"] + ".partial")
    partial.write_text(json.dumps(report))
    partial.rename(config["report"])
    while config["mode"] == "hang":
        time.sleep(0.5)
"""

CLIENT = """
import json, os
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

@app.train()
def train(message, context):
    print("a client speaks")
    report = {"config": dict(context.run_config), "pid": os.getpid(), "cwd": os.getcwd()}
    return Message(RecordDict({"report": ConfigRecord({"json": json.dumps(report)})}), reply_to=message)
"""


@pytest.fixture
def app(tmp_path: Path) -> Path:
    folder = tmp_path / "app"
    folder.mkdir()
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (folder / "server.py").write_text(SERVER)
    (folder / "client.py").write_text(CLIENT)
    return folder


def config(tmp_path: Path, mode: str) -> dict[str, bool | int | float | str]:
    quoted = "a \"b\" 'c' \\d\\n\n\té\x7f😀 e=f"
    return {
        "report": str(tmp_path / "report.json"),
        "mode": mode,
        "quoted": quoted,
        "small": 1e-3,
        "flag": True,
        "group.key": -7,
    }


class Tree:
    """Every process that ever descended from one process, as far as repeated looks show."""

    def __init__(self, root: int) -> None:
        self.root = psutil.Process(root)
        self.seen: set[psutil.Process] = set()

    def look(self) -> None:
        self.seen.update(self.root.children(recursive=True))

    def names(self) -> set[str]:
        return {process.name() for process in self.alive()}

    def alive(self) -> list[psutil.Process]:
        return [process for process in self.seen if keeper.is_alive(process)]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


keys = st.from_regex(r"[a-z][a-z0-9-]{0,8}(\.[a-z][a-z0-9-]{0,8}){0,2}", fullmatch=True)
values = (
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
)


@given(st.dictionaries(keys, values))
def test_as_toml_round_trips(settings: dict[str, bool | int | float | str]) -> None:
    back = tomllib.loads(flower.as_toml(settings))
    assert back == settings
    assert [type(value) for value in back.values()] == [type(value) for value in settings.values()]


@pytest.mark.parametrize("value", ["\udcff", 2**63, [1], None])
def test_as_toml_names_what_it_cannot_carry(value: Any) -> None:
    with pytest.raises(RunError, match=r"lora\.rank = "):
        flower.as_toml({"lora.rank": value})


def test_import_is_light() -> None:
    code = "import sys, fedgen_app.engines.flower; print(*{'flwr', 'ray', 'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_missing_flower_names_what_to_install(app: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    for call in (
        lambda: flower.simulate(app, {}, clients=1, log_file=tmp_path / "log"),
        lambda: flower.submit(app, {}, superlink="fleet", log_file=tmp_path / "log"),
    ):
        with pytest.raises(RunError, match=r"is missing: pip install 'fedgen-edge\[sim\]'"):
            call()


@pytest.mark.slow
def test_simulate_completes(app: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FORCE_COLOR", "1")
    tree, ticks = Tree(os.getpid()), []
    sent, log = config(tmp_path, "run"), tmp_path / "logs" / "flower.log"

    def tick() -> None:
        ticks.append(time.monotonic())
        tree.look()

    started = time.monotonic()
    status = flower.simulate(app, sent, clients=4, log_file=log, tick=tick)
    assert status == "finished:completed"
    assert len(ticks) > 2 * (time.monotonic() - started)
    report = read(tmp_path / "report.json")
    assert report["config"] == sent
    assert [client["config"] for client in report["clients"]] == [sent] * 4
    assert {report["cwd"], *(client["cwd"] for client in report["clients"])} == {str(tmp_path)}
    assert "a client speaks" in log.read_text() and "Uvicorn running" in log.read_text()
    assert not Path(report["home"]).exists()
    assert len(tree.seen) > 10  # Ray's processes too
    assert tree.alive() == []


@pytest.mark.slow
def test_simulate_tells_that_the_app_failed(app: Path, tmp_path: Path) -> None:
    log = tmp_path / "flower.log"
    assert flower.simulate(app, config(tmp_path, "raise"), clients=2, log_file=log) == "finished:failed"
    assert "the app says no" in log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("kill_the_app", [False, True])
def test_interrupt_leaves_nothing_behind(app: Path, tmp_path: Path, kill_the_app: bool) -> None:
    report, tree = tmp_path / "report.json", Tree(os.getpid())

    def tick() -> None:
        tree.look()
        if report.exists():
            assert "raylet" in tree.names()
            if kill_the_app:
                os.kill(read(report)["pid"], signal.SIGKILL)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        flower.simulate(app, config(tmp_path, "hang"), clients=4, log_file=tmp_path / "flower.log", tick=tick)
    assert tree.alive() == []
    assert not Path(read(report)["home"]).exists()


@pytest.mark.slow
def test_kill_9_leaves_nothing_behind(app: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    code = (
        "import json, sys; from pathlib import Path; from fedgen_app.engines.flower import simulate; "
        "app, log, settings = sys.argv[1:]; "
        "simulate(Path(app), json.loads(settings), clients=4, log_file=Path(log))"
    )
    command = [
        sys.executable,
        "-c",
        code,
        str(app),
        str(tmp_path / "log"),
        json.dumps(config(tmp_path, "hang")),
    ]
    with subprocess.Popen(command, cwd=ROOT) as child:
        tree = Tree(child.pid)
        wait_for(report.exists, seconds=120, meanwhile=tree.look)
        assert "raylet" in tree.names()
        child.kill()
    wait_for(lambda: not tree.alive() and not Path(read(report)["home"]).exists(), seconds=20)


@pytest.mark.slow
def test_a_dead_superlink_ends_the_simulation(app: Path, tmp_path: Path) -> None:
    tree = Tree(os.getpid())

    deadline = time.monotonic() + 120

    def tick() -> None:
        assert time.monotonic() < deadline
        tree.look()
        for process in tree.alive():
            with contextlib.suppress(psutil.NoSuchProcess):  # others end by themselves meanwhile
                if process.name().startswith("flower-superl") and (tmp_path / "report.json").exists():
                    process.kill()

    with pytest.raises(RunError, match="the SuperLink ended with status 137"):
        flower.simulate(app, config(tmp_path, "hang"), clients=4, log_file=tmp_path / "flower.log", tick=tick)
    assert tree.alive() == []


@pytest.mark.slow
def test_refused_app_on_the_second_port(app: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (app / "pyproject.toml").write_text(PYPROJECT.replace('publisher = "tester"', ""))
    free_port, tree = keeper.free_port, Tree(os.getpid())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = iter([taken.getsockname()[1]])
        monkeypatch.setattr(keeper, "free_port", lambda: next(ports, None) or free_port())
        with pytest.raises(RunError, match="(?s)Flower refused the app in .*publisher"):
            flower.simulate(app, {}, clients=1, log_file=tmp_path / "flower.log", tick=tree.look)
    assert "already in use" in (tmp_path / "flower.log").read_text()
    assert tree.alive() == []


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[psutil.Process]:
    """A SuperLink that somebody else runs, known to Flower's config.toml as `fleet`."""
    port, home = keeper.free_port(), Path(tempfile.mkdtemp(prefix="fleet-", dir="/tmp"))
    (home / "config.toml").write_text(f'[superlink.fleet]\naddress = "127.0.0.1:{port}"\ninsecure = true\n')
    monkeypatch.setenv("FLWR_HOME", str(home))
    environment = {
        **keeper.own_environment(),
        **keeper.SIMULATION,
        "FLWR_HOME": str(home),
        "RAY_TMPDIR": str(home),
    }
    environment[keeper.MARKER] = str(home)
    command = [
        BIN / "flower-superlink",
        "--insecure",
        "--simulation",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    with (home / "superlink.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        wait_for(lambda: not keeper.can_bind(port), seconds=60)
        yield psutil.Process(server.pid)
    finally:
        keeper.end_processes(home)
        server.wait()
        shutil.rmtree(home)


@pytest.mark.slow
def test_submit_runs_and_stops_and_leaves_the_superlink(
    app: Path, tmp_path: Path, fleet: psutil.Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, log = tmp_path / "report.json", tmp_path / "flower.log"
    # A simulating SuperLink has two nodes where the submission says nothing of them.
    (app / "server.py").write_text(SERVER.replace("< 4", "< 2"))
    sent = config(tmp_path, "run")
    assert flower.submit(app, sent, superlink="fleet", log_file=log) == "finished:completed"
    told = read(report)
    assert [told["config"], *(client["config"] for client in told["clients"])] == [sent] * 3
    assert "a client speaks" in log.read_text()
    report.unlink()

    sent = config(tmp_path, "raise")
    assert flower.submit(app, sent, superlink="fleet", log_file=log) == "finished:failed"
    assert "the app says no" in log.read_text()

    def tick() -> None:
        if "Started task" in (Path(os.environ["FLWR_HOME"]) / "superlink.log").read_text().split("Finished task")[-1]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        flower.submit(app, {**sent, "mode": "hang"}, superlink="fleet", log_file=log, tick=tick)
    assert not report.exists()
    listed = subprocess.run(
        [BIN / "flwr", "list", "fleet", "--format", "json"], capture_output=True, text=True, check=True
    )
    statuses = [run["status"] for run in json.loads(listed.stdout)["runs"]]
    assert sorted(statuses) == ["finished:completed", "finished:failed", "finished:stopped"]
    assert fleet.is_running() and fleet.status() != psutil.STATUS_ZOMBIE


@pytest.mark.slow
def test_submit_names_what_is_wrong(app: Path, tmp_path: Path, fleet: psutil.Process) -> None:
    with pytest.raises(RunError, match="nowhere"):
        flower.submit(app, {}, superlink="nowhere", log_file=tmp_path / "log")
    with pytest.raises(RunError, match="(?s)Flower refused .*Invalid run configuration"):
        flower.submit(app, {"unknown-key": 1}, superlink="fleet", log_file=tmp_path / "log")
    fleet.kill()
    fleet.wait()
    with pytest.raises(RunError, match="(?s)Flower refused .*SuperLink"):
        flower.submit(app, {}, superlink="fleet", log_file=tmp_path / "log")


def wait_for(condition: Callable[[], bool], *, seconds: float, meanwhile: Callable[[], None] = lambda: None) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        meanwhile()
        time.sleep(0.2)
