"""A real fleet on this machine: seconds, bytes and memory, warm and cold; one array or many; what faults cost.

    python benchmarks/deployment.py rounds --nodes 2,8 --rounds 3        seconds, bytes and memory, warm against cold
    python benchmarks/deployment.py arrays --tensors 120 --megabytes 1.8  one packed array against one per tensor
    python benchmarks/deployment.py faults RECORDS                        the table of `make test-deployment`

The first two print Markdown; they bring up the fleet of the tests, with nginx where there is one (FEDGEN_NGINX). Ratios
are what to look at: the processes of all devices share this machine's processors, which real devices do not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from fleets import NGINX, Fleet, environment  # noqa: E402
from helpers import FEDGEN  # noqa: E402

NAMES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen")
ECHO_PROJECT = """[project]
name = "echo"
version = "1.0.0"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "benchmarks"
[tool.flwr.app.components]
serverapp = "server_app:app"
clientapp = "client_app:app"
[tool.flwr.app.config]
tensors = 1
numbers = 1
rounds = 3
output = ""
"""
ECHO_CLIENT = """from flwr.app import Message
from flwr.clientapp import ClientApp
app = ClientApp()
@app.train()
def train(message, context):
    return Message(message.content, reply_to=message)
"""
ECHO_SERVER = """import json, time
import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()
@app.main()
def main(grid, context):
    try:
        found = measure(grid, context.run_config)
    except Exception as error:
        found = {"failed": repr(error)}  # nobody reads this process's own words
    with open(context.run_config["output"], "w") as file:
        json.dump(found, file)
def measure(grid, c):
    took = []
    while len(nodes := list(grid.get_node_ids())) < 2:
        time.sleep(0.5)
    for number in range(c["rounds"] + 1):  # the first one pays for starts
        size = c["numbers"] // c["tensors"]
        draw = np.random.default_rng(number)
        arrays = {f"t{i:04d}": Array(draw.normal(size=size).astype(np.float32)) for i in range(c["tensors"])}
        began = time.monotonic()
        waiting = set(grid.push_messages(
            [Message(RecordDict({"a": ArrayRecord(arrays)}), node, "train", ttl=600.0) for node in nodes]))
        while waiting:
            for reply in grid.pull_messages(waiting):
                assert not reply.has_error(), reply.error
                waiting.remove(reply.metadata.reply_to_message_id)  # asked for again, it would be an error
            assert time.monotonic() - began < 600, "the echo does not come back"
            time.sleep(0.1)
        took.append(time.monotonic() - began)
    return took[1:]
"""


def proportional(process: psutil.Process) -> float:
    """Memory in MB, what is shared counted in parts (PSS)."""
    text = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="utf-8")
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")) / 1000


def kind(process: psutil.Process, parent_kind: str) -> str:
    """What a process of the fleet is."""
    line = " ".join(process.cmdline())
    for name in ("flower-superlink", "flower-superexec", "flwr-serverapp", "flwr-clientapp", "fedgen-supernode"):
        if name in line:
            return f"{name} (device)" if name == "flower-superexec" and "supernode" in parent_kind else name
    if line.startswith("nginx: "):
        return line.partition(" process")[0]
    if "device-worker" in line:
        return {"worker": "worker: warm process", "worker: warm process": "worker: child"}.get(parent_kind, "worker")
    return ""


def memory(largest: dict[str, float]) -> None:
    """The largest of each kind of process so far, in MB; a fleet's processes are all below this one."""

    def visit(process: psutil.Process, parent_kind: str) -> None:
        with contextlib.suppress(psutil.NoSuchProcess, OSError):
            if name := kind(process, parent_kind):
                largest[name] = max(largest[name], proportional(process))
            for child in process.children():
                visit(child, name)

    for service in psutil.Process().children():
        visit(service, "")


def measure(nodes: int, warm: bool, rounds: int) -> tuple[dict[str, Any], dict[str, float]]:
    """What a run left in results.json, and memory by kind of process."""
    largest: dict[str, float] = defaultdict(float)
    with tempfile.TemporaryDirectory() as folder, Fleet(Path(folder), NAMES[:nodes], warm) as fleet:
        run = fleet.submit(num_server_rounds=rounds + 1, personal__epochs=0, round__roll_call=900, round__deadline=900)
        while run.process.poll() is None:
            memory(largest)
            time.sleep(1)
        status, found = run.ends()
        assert status == 0, run.said()
    assert all(len(entry["clients"]) == nodes for entry in found["rounds"])
    return found, largest


def rounds_table(counts: list[int], rounds: int) -> None:
    """Warm against cold."""
    rows = ["| SuperNodes | worker | seconds per round (median) | to cold | up, a round | down, a round |"]
    rows.append("|---|---|---|---|---|---|")
    used: dict[str, float] = defaultdict(float)
    same = []
    for nodes in counts:
        cold, digests = 0.0, set()
        for warm in (False, True):
            found, largest = measure(nodes, warm, rounds)
            last, digests = found["rounds"][-1], digests | {found["adapter"]["sha256"]}
            median = statistics.median(entry["seconds"] for entry in found["rounds"][1:])  # the first pays for starts
            cold = cold or median
            ratio = f"{cold / median:.1f} times faster" if warm else "–"
            sizes = f"{last['uplink_bytes'] / 1e3:.1f} kB | {last['downlink_bytes'] / 1e3:.1f} kB"
            rows.append(f"| {nodes} | {'warm' if warm else 'cold'} | {median:.1f} | {ratio} | {sizes} |")
            print(rows[-1], file=sys.stderr, flush=True)
            used |= {name: max(size, used[name]) for name, size in largest.items()}
        same.append(len(digests) == 1)
    print("\n".join(rows))
    print(f"\nThe adapters of warm and cold runs are the same, bit for bit: {'yes' if all(same) else 'NO'}.")
    print("\n| process | memory (PSS, largest seen) |\n|---|---|")
    for name, size in sorted(used.items()):
        print(f"| `{name}` | {size:.0f} MB |")


def arrays_table(tensors: int, megabytes: float, rounds: int) -> None:
    """The same numbers in one array and in many, to two devices; the seconds until the last of both is back."""
    numbers = int(megabytes * 1e6 / 4) // tensors * tensors
    print(f"| {numbers * 4 / 1e6:.1f} MB to 2 devices, until both are back | seconds (median) |\n|---|---|")
    with tempfile.TemporaryDirectory() as name, Fleet(Path(name), NAMES[:2]) as fleet:
        app = Path(name) / "echo"
        app.mkdir()
        for file, text in (("pyproject.toml", ECHO_PROJECT), ("client_app.py", ECHO_CLIENT)):
            (app / file).write_text(text, encoding="utf-8")
        (app / "server_app.py").write_text(ECHO_SERVER, encoding="utf-8")
        took = {}
        for count in (1, tensors):
            output = Path(name) / f"{count}.json"
            config = f'tensors={count} numbers={numbers} rounds={rounds} output="{output}"'
            command = [FEDGEN.parent / "flwr", "run", app, "clinic", "--run-config", config]
            subprocess.run(command, check=True, env=environment(fleet.folder), stdout=subprocess.DEVNULL)
            end = time.monotonic() + 900
            while not (output.exists() and output.read_text()):
                assert time.monotonic() < end, "the echo does not come back"
                time.sleep(0.5)
            found = json.loads(output.read_text())
            if not isinstance(found, list):
                sys.exit(f"{count} arrays: {found['failed']}")
            took[count] = statistics.median(found)
            print(f"| {'one array' if count == 1 else f'{count} arrays'} | {took[count]:.1f} |", flush=True)
    print(f"\nOne array is {took[tensors] / took[1]:.1f} times faster.")


def faults_table(folder: Path) -> None:
    """What `make test-deployment` recorded."""
    print("| what was done | what happened | seconds | lost |\n|---|---|---|---|")
    for file in sorted(folder.glob("*.json")):
        entry = json.loads(file.read_text(encoding="utf-8"))
        print(f"| {entry['case']} | {entry['happened']} | {entry['seconds']:.0f} | {entry['lost']} |")


def main() -> None:
    """Choose the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    first, second = parts.add_parser("rounds"), parts.add_parser("arrays")
    first.add_argument("--nodes", default="2,8")
    second.add_argument("--tensors", type=int, default=120)
    second.add_argument("--megabytes", type=float, default=1.8)
    for part in (first, second):
        part.add_argument("--rounds", type=int, default=3)
    parts.add_parser("faults").add_argument("records", type=Path)
    chosen = parser.parse_args()
    if chosen.part == "faults":
        faults_table(chosen.records)
        return
    print(f"{psutil.cpu_count()} cores, load {psutil.getloadavg()[0]:.1f}, nginx {'yes' if NGINX else 'no'}\n")
    if chosen.part == "rounds":
        rounds_table([int(n) for n in chosen.nodes.split(",")], chosen.rounds)
    else:
        arrays_table(chosen.tensors, chosen.megabytes, chosen.rounds)


if __name__ == "__main__":
    main()
