"""What the federation costs: wall time against a plain PEFT loop with the same optimiser steps, and peak memory.

    python benchmarks/overhead.py [--clients 4] [--rounds 3] [--steps 20] [--repeat 3] [--markdown FILE]

Every measurement runs in a fresh process; all of them run in one session and only ratios are printed. The plain loop
trains one LoRA adapter per client and round on the very rows that the clients own, and does nothing else. It is timed
in two ways: alone with all threads (the match of the in-process engine), and as two processes with one thread each
(the match of Flower's simulation with two actors). Imports, loading and Ray's start are outside all times.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MEMORY_CLIENTS = (1, 10, 100)


def overrides(args: argparse.Namespace, clients: int, rounds: int, steps: int) -> dict[str, Any]:
    """The settings of every measured run: no hold-out phase, a test set of one row."""
    return {
        "backbone": args.backbone,
        "dataset": args.dataset,
        "partition.by": "iid",
        "expected-clients": clients,
        "num-server-rounds": rounds,
        "local-epochs": 1000,
        "max-steps": steps,
        "evaluate-every": 0,
        "test-sequences": 1,
        "personal.epochs": 0,
        "samples.count": 0,
    }


def plain(config: dict[str, Any], clients: list[int], of: int, threads: int) -> dict[str, float]:
    """The loop that a person would write with PEFT and torch alone, over the rows of these clients."""
    sys.path.insert(0, str(ROOT))
    import torch
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    from fedgen_app.learning.backbone import load_task, open_backbone
    from fedgen_app.learning.task import Share
    from fedgen_app.settings import Settings, defaults

    torch.set_num_threads(threads)
    settings = Settings.from_run_config(defaults(ROOT) | config)
    backbone = open_backbone(settings)
    task = load_task(settings.task)
    owned = [task.load_data(settings, backbone, Share(c, of)).train.rows for c in clients]
    model = backbone.model
    trained = [p for p in model.parameters() if p.requires_grad]
    start = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    model.train()
    began = time.perf_counter()
    for _ in range(settings.num_server_rounds):
        for rows in owned:
            set_peft_model_state_dict(model, start)
            optimiser = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.0)
            done = 0
            while done < settings.max_steps:
                for indices in torch.randperm(len(rows["labels"])).split(settings.batch_size):
                    labels = rows["labels"][indices].to(backbone.device)
                    logits = model(input_ids=rows["input_ids"][indices].to(backbone.device)).logits
                    loss = torch.nn.functional.cross_entropy(
                        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100
                    )
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(trained, settings.clip_norm)
                    optimiser.step()
                    optimiser.zero_grad()
                    done += 1
                    if done == settings.max_steps:
                        break
    return {"seconds": time.perf_counter() - began}


def child(*arguments: str, threads: int | None) -> subprocess.Popen[str]:
    """A fresh process of this file; without ``threads`` its own libraries decide (Ray gives each actor one)."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | {"TOKENIZERS_PARALLELISM": "false"}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, __file__, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def result(process: subprocess.Popen[str]) -> dict[str, float]:
    """The JSON object on a child's last line."""
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{process.args} failed")
    return dict(json.loads(output.strip().splitlines()[-1]))


def plain_seconds(config: dict[str, Any], clients: int, processes: int, threads: int) -> float:
    """Seconds of the plain loop, the clients dealt over so many processes at the same time; the slowest counts."""
    parts = [list(range(i, clients, processes)) for i in range(processes)]
    children = [
        child("--plain", json.dumps([config, part, clients, threads]), threads=threads) for part in parts if part
    ]
    return max(result(c)["seconds"] for c in children)


def federated(config: dict[str, Any], clients: int, engine: str, folder: Path) -> dict[str, float]:
    """Seconds from the first round's start to the last round's end, and peak memory of this process's children."""
    settings = [f"{key}={value}" for key, value in config.items()]
    command = [str(Path(sys.executable).with_name("fedgen")), "run", str(ROOT), "--engine", engine]
    command += ["--clients", str(clients), "--output", str(folder)]
    command += [word for setting in settings for word in ("--set", setting)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    began = next(e["time"] for e in events if e["event"] == "start")
    ended = [e["time"] for e in events if e["event"] == "round"][-1]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1000
    return {"seconds": ended - began, "megabytes": peak}


def measured(arguments: list[Any], threads: int | None) -> dict[str, float]:
    """``federated`` in a fresh process, so that its peak memory is its own."""
    return result(child("--federated", json.dumps(arguments), threads=threads))


def show(title: str, rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([f"\n### {title}\n", lines[0], "|" + "---|" * len(rows[0]), *lines[1:], ""])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--backbone", default="bundled")
    parser.add_argument("--dataset", default="bundled")
    parser.add_argument("--markdown", type=Path, help="also write the tables here")
    parser.add_argument("--plain", help=argparse.SUPPRESS)
    parser.add_argument("--federated", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plain:
        print(json.dumps(plain(*json.loads(args.plain))))
        return
    if args.federated:
        config, clients, engine, folder = json.loads(args.federated)
        print(json.dumps(federated(config, clients, engine, Path(folder))))
        return
    cores = os.cpu_count() or 1
    config = overrides(args, args.clients, args.rounds, args.steps)
    ratios: dict[str, list[float]] = {"in-process": [], "flower": []}
    memory = [["clients", "peak memory, MB"]]
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(args.repeat):
            alone = plain_seconds(config, args.clients, 1, cores)
            own = measured([config, args.clients, "in-process", f"{scratch}/in-process-{turn}"], cores)
            ratios["in-process"].append(own["seconds"] / alone)
            together = plain_seconds(config, args.clients, cores, 1)
            ray = measured([config, args.clients, "flower", f"{scratch}/flower-{turn}"], None)
            ratios["flower"].append(ray["seconds"] / together)
        for clients in MEMORY_CLIENTS:
            light = overrides(args, clients, 1, 1)
            peak = measured([light, clients, "in-process", f"{scratch}/memory-{clients}"], cores)["megabytes"]
            memory.append([str(clients), f"{peak:.0f}"])
    time_rows = [["engine", "compared with", "ratio, median", "lowest", "highest"]]
    against = {"in-process": f"plain loop, {cores} threads", "flower": f"{cores} plain loops at once, 1 thread each"}
    for engine, values in ratios.items():
        time_rows.append(
            [engine, against[engine], f"{statistics.median(values):.2f}", f"{min(values):.2f}", f"{max(values):.2f}"]
        )
    steps = args.clients * args.rounds * args.steps
    text = show(f"Wall time, {args.repeat} turns of {steps} optimiser steps", time_rows)
    text += show("Peak memory, in-process, one round of one step per client", memory)
    print(text)
    if args.markdown:
        args.markdown.write_text(text)


if __name__ == "__main__":
    main()
