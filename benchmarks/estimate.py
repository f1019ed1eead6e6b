"""What `fedgen estimate` says against what a client then takes: memory at its peak, bytes up, seconds per step.

    python benchmarks/estimate.py [--backbone FOLDER --data FILE] [--bits]

Each case is one client in a process of its own, with one thread: the real ClientApp trains twice (the second time is
timed, as the first loads the model) and personalises, with messages made by hand. Seconds are the processor's, so
that what else runs on the machine counts little. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from fedgen_app.settings import Settings, Value, defaults  # noqa: E402

STEPS = 6
Case = dict[str, Value]


def config_of(case: Case) -> dict[str, Value]:
    """A whole run config."""
    few: Case = {
        "threads": 1,
        "holdout-fraction": 0.01,
        "max-steps": STEPS,
        "personal.max-steps": 1,
        "num-server-rounds": 1,
        "metrics.samples": 0,
    }
    return defaults(ROOT) | few | case


def client(case: Case, data: str) -> dict[str, float]:
    """What a client takes, in this process."""
    from flwr.app import Context, Message, RecordDict
    from flwr.supercore.task_identity import TaskIdentity

    import client_app
    from fedgen_app.federation import wire
    from fedgen_app.federation.strategy import PERSONALISE, TRAIN
    from fedgen_app.learning.backbone import open_backbone

    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    config, found = config_of(case), {}
    settings = Settings.from_run_config(config)
    with tempfile.TemporaryDirectory() as state:
        node = {"client-id": "a", "data": data, "state-dir": state}
        context = Context(run_id=1, node_id=1, state=RecordDict(), run_config=config, node_config=node)
        for number, kind in enumerate((TRAIN, TRAIN, PERSONALISE), start=1):
            start = wire.Parcel(open_backbone(settings).fresh(0))
            content = wire.instruction(start, settings.wire.codec, {wire.ROUND: 1, wire.RUN: "benchmark-0000"})
            message = Message(content, 1, kind)
            message.metadata.__dict__["_message_id"] = "0" * 64
            began = time.process_time()
            reply = client_app.app(message, context)
            if reply.has_error():
                raise SystemExit(f"the client failed: {reply.error}")
            if number == 2:
                found["seconds"] = (time.process_time() - began) / STEPS
                found["up"] = wire.byte_size(reply)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found["peak"] = 1000 * int(status.split("VmHWM:")[1].split()[0]) * 1.024
    return found


def in_child(what: str, case: Case, data: str) -> dict[str, float]:
    """The same in a process of its own, so that its peak is its own."""
    command = [sys.executable, "-W", "ignore", __file__, what, json.dumps(case), data]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    if ended.returncode:
        raise SystemExit(f"{case}: {ended.stderr[-2000:]}")
    return dict(json.loads(ended.stdout.splitlines()[-1]))


def expected(case: Case) -> dict[str, float]:
    """What the estimate says."""
    import torch

    from fedgen_app.fleet.devices import measured
    from fedgen_app.fleet.estimate import estimate

    torch.set_num_threads(1)
    settings = Settings.from_run_config(config_of(case))
    here = measured(torch.device("cpu"), getattr(torch, settings.dtype), time.process_time)
    found = estimate(settings, device=here)
    return {"peak": found.memory.peak, "up": found.up, "seconds": found.seconds_per_step}


def cases(options: argparse.Namespace) -> Iterator[tuple[str, Case, str]]:
    """Name, settings and data of every case."""
    if not options.backbone:
        for batch, length, dtype in (
            (8, 128, "float32"),
            (16, 128, "float32"),
            (8, 256, "float32"),
            (8, 128, "bfloat16"),
        ):
            case: Case = {"dtype": dtype, "batch-size": batch, "sequence-length": length}
            yield f"bundled text, {batch} x {length}, {dtype}", case, "bundled"
        for batch in (8, 32):
            case = {"dtype": "float32", "batch-size": batch, "task": "diffusion"}
            yield f"bundled images, {batch}, float32", case, "bundled"
        return
    for bits in (4, 8) if options.bits else (0,):
        for dtype in ("float32", "bfloat16"):
            for batch, length, checkpoints in ((2, 128, False), (4, 128, False), (4, 256, False), (4, 256, True)):
                case = {"dtype": dtype, "batch-size": batch, "sequence-length": length, "backbone-bits": bits}
                case |= {"gradient-checkpointing": checkpoints, "backbone": options.backbone}
                name = f"{Path(options.backbone).name}, {batch} x {length}, {dtype}"
                name += (f", {bits} bits" if bits else "") + (", checkpoints" if checkpoints else "")
                if not bits or (batch, length) == (4, 128):
                    yield name, case, options.data


def main() -> None:
    """Print the table, or be the child that measures a case."""
    if len(sys.argv) == 4 and sys.argv[1] in ("client", "expected"):
        case, data = json.loads(sys.argv[2]), sys.argv[3]
        print(json.dumps(client(case, data) if sys.argv[1] == "client" else expected(case)))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backbone", default="", help="a language model's folder, instead of the bundled ones")
    parser.add_argument("--data", default="", help="a text file for it")
    parser.add_argument("--bits", action="store_true", help="in 4 and 8 bits")
    options = parser.parse_args()
    columns = ["case", "peak, MB: estimated", "measured", "error", "up: estimated", "measured"]
    print("| " + " | ".join([*columns, "s/step: estimated", "measured", "error"]) + " |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, case, data in cases(options):
        said, took = in_child("expected", case, data), in_child("client", case, data)
        error, slower = (said[what] / took[what] - 1 for what in ("peak", "seconds"))
        megabytes = [f"{found['peak'] / 1e6:,.0f}" for found in (said, took)]
        seconds = [f"{found['seconds']:.3g}" for found in (said, took)]
        sent = [f"{found['up']:,.0f}" for found in (said, took)]
        row = [name, *megabytes, f"{error:+.0%}", *sent, *seconds, f"{slower:+.0%}"]
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
