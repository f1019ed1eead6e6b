"""A real fleet whose parts are killed, stopped and brought back: what happened, and how long it took.

Slow, and so left out of `make test`; `make test-deployment` runs them. What they measure becomes
docs/results/deployment.md (benchmarks/deployment.py).
"""

from __future__ import annotations

import signal
import time

import psutil
import pytest
from fleets import Fleet, Submitted, lost, record, rejected, until, whole

pytestmark = pytest.mark.deployment
RETURN = 70  # seconds after which the SuperNode's unit starts it again (RestartSec)


def serverapp(fleet: Fleet) -> psutil.Process:
    """The process of the ServerApp."""
    superexec = psutil.Process(fleet.services["server/superexec.sh"][1].pid)
    found = [p for p in superexec.children(recursive=True) if any("flwr-serverapp" in part for part in p.cmdline())]
    assert len(found) == 1
    return found[0]


def test_a_client_process_is_killed(fleet: Fleet) -> None:
    run = fleet.submit(num_server_rounds=3, local_epochs=40)
    run.reaches(1)
    child, began = fleet.child_of("bee"), time.monotonic()
    child.kill()
    run.reaches(2)
    seconds = time.monotonic() - began
    status, found = run.ends()
    assert status == 0, run.said()
    whole(found, 3)
    assert rejected(found, "bee") == [(2, "error")] and found["rounds"][2]["clients"] == ["ant", "bee", "cat"]
    assert seconds < 45  # Flower alone notices after a minute
    happened = "that client lost the round, was there in the next"
    record("kill -9 of a client process", happened, seconds, lost(len(rejected(found, "bee"))))


def test_a_supernode_is_killed_and_comes_back(fleet: Fleet) -> None:
    run = fleet.submit(num_server_rounds=60, local_epochs=10, round__deadline=120)
    run.reaches(1)
    fleet.kill("bee/supernode.sh")
    killed, first = time.monotonic(), len(run.events("round"))
    run.reaches(first + 1)
    noticed = time.monotonic() - killed
    time.sleep(max(0.0, killed + RETURN - time.monotonic()))
    back = time.monotonic()
    fleet.stop("bee/supernode.sh")
    fleet.start("bee/supernode.sh")

    def takes_part() -> bool:
        last = run.events("round")
        return len(last) > first + 1 and "bee" in last[-1]["clients"]

    until(takes_part, 150, fleet.folder)
    seconds = time.monotonic() - back
    last = run.events("round")[-1]["round"]
    run.process.send_signal(signal.SIGTERM)  # enough seen; SIGINT is ignored where tests run in the background
    run.process.wait(60)
    reasons = [event["reason"] for event in run.events("rejected") if event["client"] == "bee"]
    assert set(reasons) <= {"error", "timeout"} and reasons
    happened = f"noticed after {noticed:.0f} s; back {seconds:.0f} s after its start, in round {last}; the run went on"
    record("kill -9 of a SuperNode, and its return", happened, noticed + seconds, lost(len(reasons)))


def test_a_straggler_is_stopped(fleet: Fleet) -> None:
    run = fleet.submit(num_server_rounds=2, local_epochs=40, round__deadline=30)
    until(lambda: bool(run.events("start")), 120, fleet.folder)  # past the roll call
    child, began = fleet.child_of("cat"), time.monotonic()
    child.suspend()
    try:
        run.reaches(1)
        seconds = time.monotonic() - began
    finally:
        if child.is_running():
            child.resume()
    status, found = run.ends()
    assert status == 0, run.said()
    whole(found, 2)
    assert found["rounds"][0]["clients"] == ["ant", "bee"] and rejected(found, "cat")[0] == (1, "timeout")
    happened = "left out at the deadline of 30 s; the round went on"
    record("a straggler (SIGSTOP)", happened, seconds, lost(len(rejected(found, "cat"))))


def resumed(fleet: Fleet, run: Submitted, rounds: int) -> float:
    began = time.monotonic()
    status, found = fleet.resume(run).ends()
    assert status == 0, run.said()
    whole(found, rounds)
    return time.monotonic() - began


def test_the_serverapp_is_killed(fleet: Fleet) -> None:
    run = fleet.submit(num_server_rounds=4, local_epochs=20)
    run.reaches(2)
    began = time.monotonic()
    serverapp(fleet).kill()
    status, _ = run.ends()
    seconds = time.monotonic() - began
    assert status == 3 and "resume" in run.said()
    again = resumed(fleet, run, 4)
    happened = f"`fedgen run` ended with 3 after {seconds:.0f} s and named `fedgen resume`, which took {again:.0f} s"
    record("kill -9 of the ServerApp", happened, seconds + again, "the round under way, done again")


def test_the_superlink_is_killed_and_comes_back(fleet: Fleet) -> None:
    run = fleet.submit(num_server_rounds=5, local_epochs=20)
    run.reaches(2)
    began = time.monotonic()
    fleet.kill("server/superlink.sh")
    time.sleep(5)  # RestartSec of its unit
    fleet.stop("server/superlink.sh")
    fleet.start("server/superlink.sh")
    status, found = run.ends()
    seconds = time.monotonic() - began
    assert status == 0, run.said()
    whole(found, 5)
    happened = f"back after 5 s; the run went on and completed {seconds:.0f} s after the kill, without a new start"
    missing = sum(len(entry["rejected"]) for entry in found["rounds"])
    record("kill -9 of the SuperLink, and its return", happened, seconds, lost(missing))


def test_all_supernodes_are_killed(fleet: Fleet) -> None:
    run = fleet.submit(num_server_rounds=4, local_epochs=20, round__roll_call=20, round__deadline=60)
    run.reaches(1)
    began = time.monotonic()
    for device in fleet.devices:
        fleet.kill(f"{device}/supernode.sh")
    status, found = run.ends()
    seconds = time.monotonic() - began
    assert status == 3 and found["status"] == "failed" and "resume" in run.said()
    time.sleep(max(0.0, began + RETURN - time.monotonic()))
    for device in fleet.devices:
        fleet.stop(f"{device}/supernode.sh")
        fleet.start(f"{device}/supernode.sh")
    again = resumed(fleet, run, 4)
    happened = f"ended with 3 after {seconds:.0f} s, checkpoint kept; devices back, `fedgen resume` took {again:.0f} s"
    record("kill -9 of all SuperNodes", happened, seconds + again, "the round under way, done again")


def test_two_runs_at_once(fleet: Fleet) -> None:
    began = time.monotonic()
    runs = [fleet.submit(num_server_rounds=3, seed=seed, local_epochs=5) for seed in (1, 2)]
    ended = [run.ends(600) for run in runs]
    seconds = time.monotonic() - began
    for run, (status, found) in zip(runs, ended, strict=True):
        assert status == 0, run.said()
        whole(found, 3)
        assert all(r["clients"] == ["ant", "bee", "cat"] for r in found["rounds"])
    names = {found["run"] for _, found in ended}
    kept = {p.parents[1].name for p in (fleet.folder / "var" / "ant" / "adapters").glob("*/ant/adapter_model.*")}
    assert len(names) == 2 and names <= kept
    record("two runs at once", "both completed with every device in every round; each its own folder", seconds)
