"""The warm worker against a real Runtime API: hostile bundles, children that die, SuperNodes that come and go."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullAppMessagesResponse, PullTaskInputRequest
from helpers import ROOT, command
from nodes import Node, bundle

from fedgen_app.engines.keeper import free_port
from fedgen_app.fleet import flower_task
from fedgen_app.fleet.worker import COLD, FIRST_PAUSE, Worker

SECRET = b"s" * 48
pytestmark = pytest.mark.slow


class Running:
    """A worker on a port, and what it wrote."""

    def __init__(self, folder: Path, cold: float) -> None:
        program = f"from fedgen_app.fleet import worker; worker.COLD = {cold}; from fedgen_app.cli import main; main()"
        self.port, self.log = free_port(), folder / "worker.log"
        self.secret, self.tls = folder / "secret", folder / "loopback"
        own = {
            "PYTHONPATH": str(ROOT),
            "FLWR_HOME": str(folder / "flower"),
            "OMP_NUM_THREADS": "1",
        }
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    program,
                    "device-worker",
                    "--runtime",
                    f"127.0.0.1:{self.port}",
                    "--secret",
                    self.secret,
                    "--ca",
                    self.tls / "ca.crt",
                ],
                stdout=log,
                stderr=log,
                env=os.environ | own,
                cwd=folder,
                start_new_session=True,
            )

    def node(self) -> Node:
        self.secret.write_bytes(SECRET)
        return Node(self.port, SECRET, self.tls)

    def said(self, text: str, seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while text not in (written := self.log.read_text(errors="replace")):
            assert time.monotonic() < end and self.process.poll() is None, written
            time.sleep(0.05)


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Running]:
    """A worker whose SuperNode is not there yet."""
    with closing_worker(tmp_path) as running:
        yield running


@contextlib.contextmanager
def closing_worker(folder: Path, cold: float = COLD) -> Iterator[Running]:
    """A worker, ended with all below it; after ``cold`` seconds it asks a bundle again that could not get warm."""
    running = Running(folder, cold)
    try:
        yield running
    finally:
        below = psutil.Process(running.process.pid).children(recursive=True) if running.process.poll() is None else []
        running.process.kill()
        running.process.wait()
        for process in below:
            if process.is_running():
                process.kill()


def gone(pid: int, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_tasks_of_one_bundle_come_from_one_warm_process_and_a_new_bundle_gets_a_new_one(worker: Running) -> None:
    worker.said("no SuperNode at")  # it waits for one, and for the secret, and says so
    first, second = bundle(), bundle(top="VERSION = 2")
    with worker.node() as node:
        told = [node.numbers(node.reply(node.put(fab))) for fab in (first, first, second)]
    pids, parents = zip(*told, strict=True)
    assert len(set(pids)) == 3 and worker.process.pid not in parents
    assert parents[0] == parents[1] != parents[2]
    assert gone(parents[0])
    worker.said("lost the SuperNode")
    with worker.node() as node:  # another one, which knows nothing of the first
        node.numbers(node.reply(node.put(first)))
    assert "HTTP Request" not in worker.log.read_text()


def test_a_bundle_of_which_a_part_is_missing_is_installed_again(worker: Running, tmp_path: Path) -> None:
    worker.said("no SuperNode at")
    fab = bundle(body="import late\n", more={"late.py": b"THERE = True\n"})
    with worker.node() as node:
        node.numbers(node.reply(node.put(fab)))
        (late,) = (tmp_path / "flower").rglob("late.py")
        # As a power cut leaves it, in the midst of being unpacked: `client_app` can be loaded all the same.
        late.unlink()
        (late.parent / flower_task.WHOLE).unlink()
        node.numbers(node.reply(node.put(fab)))
    assert late.read_bytes() == b"THERE = True\n" and (late.parent / flower_task.WHOLE).exists()


WARMTH = """
from pathlib import Path

def remembered(context):
    return {{"key": "backbone"}}

def prepare(facts):
    Path({marks!r}, str(len(list(Path({marks!r}).iterdir())))).touch()
    if not Path({backbone!r}).exists():
        raise FileNotFoundError("no backbone yet")
"""


@pytest.mark.parametrize("cold", [0.0, COLD])
def test_what_could_not_get_warm_is_asked_again_some_time_later(cold: float, tmp_path: Path) -> None:
    marks, backbone = tmp_path / "marks", tmp_path / "backbone"
    marks.mkdir()
    warmth = WARMTH.format(marks=str(marks), backbone=str(backbone)).encode()
    files = {f"fedgen_app/{name}": b"" for name in ("__init__.py", "federation/__init__.py")}
    fab = bundle(more=files | {"fedgen_app/federation/warmth.py": warmth})
    with closing_worker(tmp_path, cold) as worker, worker.node() as node:
        node.numbers(node.reply(node.put(fab)))
        worker.said("does not get warm")
        backbone.touch()
        node.numbers(node.reply(node.put(fab)))
        if cold:
            node.numbers(node.reply(node.put(fab)))  # so that the one before it is wholly done with
        else:
            worker.said("warm after")
    assert len(list(marks.iterdir())) == (1 if cold else 2)


def test_a_child_that_dies_is_answered_for_at_once(worker: Running, tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    sleeps = f"import time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    worker.said("no SuperNode at")
    with worker.node() as node:
        run = node.put(bundle(body=sleeps))
        while not (mark.exists() and mark.read_text()):
            time.sleep(0.05)
        os.kill(int(mark.read_text()), signal.SIGKILL)
        began = time.monotonic()
        reply = node.reply(run)
        assert time.monotonic() - began < 5  # Flower itself takes a minute
        assert reply.has_error() and reply.error.code == 8
        # The warm process itself dies, once between tasks and once during one.
        _, warm = node.numbers(node.reply(node.put(bundle())))
        os.kill(warm, signal.SIGKILL)
        assert gone(warm)
        _, warm = node.numbers(node.reply(node.put(bundle())))
        mark.unlink()
        run = node.put(bundle(body=sleeps))
        while not (mark.exists() and mark.read_text()):
            time.sleep(0.05)
        os.kill(psutil.Process(int(mark.read_text())).ppid(), signal.SIGKILL)
        assert node.reply(run).error.code == 8
        assert gone(int(mark.read_text()))


def test_a_child_that_hangs_is_ended_once_its_message_is_too_old(worker: Running, tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    hangs = f"""import subprocess, time
below = subprocess.Popen(['sleep', '600'], start_new_session=True).pid
open({str(mark)!r}, 'w').write(f'{{os.getpid()}} {{below}}')
time.sleep(600)"""
    worker.said("no SuperNode at")
    with worker.node() as node:
        began = time.monotonic()
        reply = node.reply(node.put(bundle(body=hangs), ttl=8.0), 40)
        assert time.monotonic() - began > 7 and reply.has_error() and reply.error.code == 8
        assert all(gone(int(pid)) for pid in mark.read_text().split())
        assert node.reply(node.put(bundle(body=hangs), ttl=0.1)).error.code == 8  # it came too late to be tried
        node.numbers(node.reply(node.put(bundle())))
    worker.said("its message is valid no longer")


def test_a_task_that_the_supernode_has_given_up_is_ended_soon(worker: Running, tmp_path: Path) -> None:
    worker.said("no SuperNode at")
    mark = tmp_path / "pid"
    with worker.node() as node:
        for hangs, whole in (
            (f"open({str(mark)!r}, 'w').write(str(os.getpid()))\nimport time; time.sleep(600)", True),
            ("pass", False),
        ):
            lost = node.put(bundle(body=hangs), whole=whole)
            end = time.monotonic() + 60
            while (task := node.state.get_tasks(run_ids=[lost])[0]).status.status != "running" or not mark.exists():
                assert time.monotonic() < end
                time.sleep(0.1)
            time.sleep(1.0)  # the worker has the header
            assert node.state.finish_task(task.task_id, "failed", "its run has ended")
            node.numbers(node.reply(node.put(bundle())))
            assert not node.state.get_messages_legacy(run_ids=[lost], is_reply=True)
    assert gone(int(mark.read_text()))
    worker.said("the SuperNode has given it up")


def test_a_header_that_is_none_is_named() -> None:
    for pulled in (b"x", b"", PullAppMessagesResponse(messages_list=[{}]).SerializeToString()):
        with pytest.raises(ValueError, match="message"):
            flower_task.expiry(pulled)


@pytest.mark.parametrize("fetched", [(), ("PullTaskInput",), ("PullTaskInput", "PullMessages")])
def test_whatever_a_dead_process_had_fetched_its_task_is_answered_for(fetched: tuple[str, ...]) -> None:
    with Node(free_port(), SECRET) as node:
        run, dispatcher = node.put(bundle()), flower_task.dispatcher(node.runtime, SECRET)
        task = flower_task.acquire(dispatcher)
        assert task
        client, header = flower_task._connect(node.runtime, task.token, None), None
        if "PullTaskInput" in fetched:
            client.PullTaskInput(PullTaskInputRequest())
        if "PullMessages" in fetched:
            header = client.PullMessages(PullAppMessagesRequest()).SerializeToString()
        assert flower_task.answer_for(node.runtime, task, header)
        assert node.reply(run, 5).error.code == 8
        assert not flower_task.answer_for(node.runtime, task, header)  # answered: nobody waits any more
        client.close()
        dispatcher.close()


SECRET_TEXT = "/data/patient-17.txt"
HOSTILE = {
    "raises when it is imported": {"top": f"open({SECRET_TEXT!r})"},
    "has no app": {"top": "del app\nclass app:\n    query = staticmethod(lambda: (lambda f: f))"},
    "ends the interpreter when it is imported": {"top": "import sys; sys.exit(3)"},
    "kills itself when it is imported": {"top": "os.kill(os.getpid(), 9)"},
    "raises": {"body": f"raise RuntimeError({SECRET_TEXT!r})"},
    "raises what is no Exception": {"body": f"raise BaseException({SECRET_TEXT!r})"},
    "answers with nonsense": {"body": "return 'nonsense'"},
    "leaves a process behind": {
        "body": "import subprocess; subprocess.Popen(['sleep', '987'], start_new_session=True)"
    },
    "says that it has another message": {
        "body": "import contextlib\nfor fd in range(3, 64):\n    with contextlib.suppress(OSError):\n"
        '        os.write(fd, b\'{"what": "message", "header": "ff"}\')\nos.kill(os.getpid(), 9)',
    },
    "writes into the channel": {
        "body": "import contextlib\nfor fd in range(3, 64):\n    with contextlib.suppress(OSError):\n"
        "        os.write(fd, b'{\"what\": 7}')",
    },
}


def test_no_bundle_ends_the_worker_or_makes_it_tell_an_errors_text(worker: Running) -> None:
    worker.said("no SuperNode at")
    with worker.node() as node:
        for number, (what, parts) in enumerate(HOSTILE.items()):
            # Two where it was ended while it handed over the first: a SuperNode sends one (test_supernode.py).
            for reply in node.replies(node.put(bundle(f"bad-{number}", **parts), f"bad-{number}"), 30):
                if reply.has_error():
                    assert reply.error.code in (1, 2, 8) and not reply.error.reason, what
            node.numbers(node.reply(node.put(bundle())))
        assert worker.process.poll() is None
    assert SECRET_TEXT in worker.log.read_text()  # the device's owner reads what happened
    below = psutil.Process(worker.process.pid).children(recursive=True)
    assert not [p for p in below if "987" in p.cmdline()]


def test_a_process_that_dies_once_it_has_answered_leaves_no_second_answer(worker: Running) -> None:
    """Nor a task whose heartbeats the SuperNode would miss a minute later."""
    dies = """
import inspect
for frame in inspect.stack():
    if "push_task_output" in frame.frame.f_globals:
        frame.frame.f_globals["push_task_output"] = lambda *_: os.kill(os.getpid(), 9)"""
    worker.said("no SuperNode at")
    with worker.node() as node:
        run = node.put(bundle(body=dies))
        assert not node.reply(run).has_error()
        worker.said("ended after an answer, killed by signal 9")
        end = time.monotonic() + 30
        while (task := node.state.get_tasks(run_ids=[run])[0].status).status != "finished":
            assert time.monotonic() < end
            time.sleep(0.05)
        assert "heartbeat" not in task.details
        node.numbers(node.reply(node.put(bundle())))
        assert not node.state.get_messages_legacy(run_ids=[run], is_reply=True)


def test_sigterm_ends_the_task_and_tells_the_supernode(worker: Running, tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    worker.said("no SuperNode at")
    with worker.node() as node:
        run = node.put(bundle(body=f"import time; open({str(mark)!r}, 'w').write('x'); time.sleep(600)"))
        while not mark.exists():
            time.sleep(0.05)
        below = psutil.Process(worker.process.pid).children(recursive=True)
        assert len(below) == 2
        worker.process.terminate()
        assert worker.process.wait(20) == 0
        assert node.reply(run, 5).error.code == 8
        assert all(gone(p.pid) for p in below)


def test_no_process_outlives_a_worker_that_is_killed(worker: Running, tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    worker.said("no SuperNode at")
    with worker.node() as node:
        node.put(bundle(body=f"import time; open({str(mark)!r}, 'w').write('x'); time.sleep(600)"))
        while not mark.exists():
            time.sleep(0.05)
        below = psutil.Process(worker.process.pid).children(recursive=True)
        worker.process.kill()
        worker.process.wait()
        assert len(below) == 2 and all(gone(p.pid) for p in below)


def test_it_has_no_privileges_and_another_secret_gets_nothing(worker: Running) -> None:
    worker.said("no SuperNode at")
    with worker.node() as node:
        node.numbers(node.reply(node.put(bundle())))
        for process in [psutil.Process(worker.process.pid), *psutil.Process(worker.process.pid).children()]:
            status = Path(f"/proc/{process.pid}/status").read_text()
            facts = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
            assert facts["NoNewPrivs"] == "1"
            assert {facts[f"Cap{name}"] for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
    worker.said("lost the SuperNode")
    worker.secret.write_bytes(b"x" * 48)
    with Node(worker.port, SECRET, worker.tls) as node:
        worker.said("its secret is another one")
        node.put(bundle())
        time.sleep(2)
        assert not node.state.get_messages_legacy(is_reply=True)


def test_a_supernode_with_another_certificate_gets_no_worker(worker: Running, tmp_path: Path) -> None:
    """Who takes the port of a SuperNode that is away is not believed, nor is one that speaks no TLS."""
    worker.said("no SuperNode at")
    with worker.node() as node:
        node.numbers(node.reply(node.put(bundle())))
    for number, other in enumerate((tmp_path / "other", None)):
        with Node(worker.port, SECRET, other) as node:
            node.put(bundle())
            worker.said(("CERTIFICATE_VERIFY_FAILED", "WRONG_VERSION_NUMBER")[number])
            assert not node.state.get_messages_legacy(is_reply=True)
    with worker.node() as node:
        node.numbers(node.reply(node.put(bundle())))


def test_a_refused_worker_tries_ever_more_seldom_and_says_why_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "secret").write_bytes(b"x" * 48)
    with Node(free_port(), SECRET) as node, caplog.at_level("INFO", logger="fedgen_app.fleet.worker"):
        worker = Worker(node.runtime, tmp_path / "secret", 1, pause=0.01)
        worker._wake, other = socket.socketpair()
        for _ in range(3):
            worker._serve(flower_task)
        assert worker.pause == pytest.approx(0.08)
        assert caplog.text.count("its secret is another one") == 1 and "connected" not in caplog.text
        (tmp_path / "secret").write_bytes(SECRET)
        threading.Timer(1.0, lambda: (setattr(worker, "stopping", True), other.send(b"x"))).start()
        worker._serve(flower_task)
        assert worker.pause == FIRST_PAUSE and caplog.text.count("connected") == 1
        worker._wake.close()
        other.close()


def test_what_a_fork_would_break_is_seen() -> None:
    seen = """import threading
from fedgen_app.fleet import kernel
print(len(kernel.other_threads()))
done = threading.Event()
threading.Thread(target=done.wait).start()
print(len(kernel.other_threads()))
done.set()"""
    ended = subprocess.run([sys.executable, "-c", seen], capture_output=True, text=True, timeout=60)
    assert ended.stdout.split() == ["0", "1"], ended.stderr


@pytest.mark.parametrize("address", ["10.0.0.1:9094", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:70000", "0.0.0.0:9094"])
def test_it_speaks_to_its_own_machine_alone(address: str) -> None:
    ended = command("device-worker", "--runtime", address)
    assert ended.status == 2 and address in ended.err


def test_a_wrong_number_of_threads_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    ended = command("device-worker")
    assert ended.status == 2 and "OMP_NUM_THREADS = 'many'" in ended.err
