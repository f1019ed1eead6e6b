"""What split inference costs: seconds and bytes against all steps on the device and all steps on the service.

    python benchmarks/split.py [--run RUN_DIR] [--steps 20] [--images 4] [--repeat 5] [--threads 1] [--markdown FILE]

Device and service are two processes of this machine with as many threads each (``--threads``); they take turns, as one
waits for the other. All ways are measured in turn in one session; seconds are told as medians, and as ratios to all
steps on the device in the same turn. Bytes are those of the bodies. A net between them adds its own time: bytes divided
by its speed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[1]
FEDGEN = Path(sys.executable).with_name("fedgen")
TEXTS = ("an outline drawing of a bag", "a negative of a coat", "a mosaic of a sneaker", "an engraving of a dress")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")  # what torch and its libraries go by
# The shortest run that leaves four clusters: what an adapter holds changes no seconds.
SHORT = {
    "num-server-rounds": 1,
    "max-steps": 1,
    "personal.epochs": 0,
    "evaluate-every": 0,
    "metrics.samples": 0,
    "samples.count": 0,
    "test-sequences": 8,
    "clusters.by": "oracle",
}


def make_run(folder: Path) -> Path:
    """A run of the preset `styles` that is over at once."""
    settings = [word for key, value in SHORT.items() for word in ("--set", f"{key}={value}")]
    command = [FEDGEN, "run", ROOT, "--preset", "styles", "--engine", "in-process", "--clients", "4"]
    subprocess.run([*command, "--output", folder, *settings], check=True, stdout=subprocess.DEVNULL)
    return folder


@contextlib.contextmanager
def served(run: Path, token: str, images: int, threads: int) -> Iterator[str]:
    """The address of `fedgen serve` in a process of its own, with so many threads."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = int(taken.getsockname()[1])
    command = [FEDGEN, "serve", run, "--port", str(port), "--most-images", str(images), "--rate", "100000"]
    environment = {**os.environ, "FEDGEN_TOKEN": token, **dict.fromkeys(THREADS, str(threads))}
    serving = subprocess.Popen([*command, "--burst", "100000"], env=environment)
    try:
        deadline = time.monotonic() + 300
        while True:
            if serving.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("the service did not start")
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"http://127.0.0.1:{port}/health").raise_for_status()
                break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        serving.send_signal(signal.SIGTERM)
        serving.wait()


def measure(run: Path, url: str, token: str, args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Seconds and bytes of every way, one entry for each turn."""
    sys.path.insert(0, str(ROOT))
    import torch

    torch.set_num_threads(args.threads)

    from fedgen_app.cli.finished import settings_of
    from fedgen_app.learning import adapters
    from fedgen_app.learning.backbone import load_task, open_backbone
    from fedgen_app.serving.client import Choice, Remote, draw

    known = settings_of(run)
    if known.threads not in (0, args.threads):
        raise SystemExit(f"the run says threads = {known.threads}, for device and service: --threads {known.threads}")
    settings = known.sampling(steps=args.steps, sampler="ddim")
    task, backbone = load_task(settings.task), open_backbone(settings)
    adapters.write(backbone.model, adapters.load_adapter(run / "clusters" / "0" / "adapter_model.safetensors"))
    texts = [TEXTS[number % len(TEXTS)] for number in range(args.images)]
    weights = torch.ones(len(texts), 1, dtype=torch.float64)
    choice = Choice({"clusters": torch.tensor([0]), "weights": weights})
    splits = sorted({max(1, args.steps * part // 4) for part in (1, 2, 3)})
    found: dict[str, list[dict[str, float]]] = {}

    class Timed(Remote):
        seconds = 0.0

        def post(self, *arguments: Any) -> bytes:
            began = time.perf_counter()
            answer = super().post(*arguments)
            self.seconds += time.perf_counter() - began
            return answer

    with httpx.Client() as client:
        for turn in range(args.repeat + 1):
            for split in (None, 0, *splits):
                remote = Timed(client, url, token, backbone.fingerprint)
                began = time.perf_counter()
                if split is None:
                    task.sample(settings, backbone, texts, turn)
                else:
                    draw(remote, settings, task, backbone, texts, 1, turn, choice, split)
                whole = time.perf_counter() - began
                if turn:  # the first turn warms up
                    name = "device" if split is None else f"split {split}" if split else "service"
                    entry = {"whole": whole, "device": whole - remote.seconds}
                    found.setdefault(name, []).append(entry | {"up": remote.sent, "down": remote.received})
    return found


def table(found: Mapping[str, Sequence[Mapping[str, float]]], steps: int, images: int, threads: int) -> str:
    """Markdown: seconds, and ratios to all steps on the device, turn by turn."""
    lines = [
        "| way | seconds | on the device | ratio (lowest to highest) | on the device | sent, kB | received, kB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, turns in found.items():
        ratios = [turn["whole"] / base["whole"] for turn, base in zip(turns, found["device"], strict=True)]
        own = [turn["device"] / base["whole"] for turn, base in zip(turns, found["device"], strict=True)]
        way = {"device": f"all {steps} steps on the device", "service": f"all {steps} steps on the service"}
        shown = way.get(name, f"{name.removeprefix('split ')} of {steps} steps on the service")
        cells = [shown, *(f"{statistics.median(turn[part] for turn in turns):.3f}" for part in ("whole", "device"))]
        cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        cells += [f"{statistics.median(own):.2f}", f"{turns[0]['up'] / 1000:.1f}", f"{turns[0]['down'] / 1000:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    of = f"{images} images a request, {len(found['device'])} turns, threads of device and service: {threads} each"
    return "\n".join([f"{of}; seconds are medians:", "", *lines, ""])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a finished run of images with clusters; default: a short one")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of the device's process, and of the service's")
    parser.add_argument("--markdown", type=Path, help="also write the table here")
    args = parser.parse_args()
    token = secrets.token_hex(32)
    with tempfile.TemporaryDirectory() as scratch:
        run = args.run or make_run(Path(scratch) / "run")
        with served(run, token, args.images, args.threads) as url:
            text = table(measure(run, url, token, args), args.steps, args.images, args.threads)
    print(text)
    if args.markdown:
        args.markdown.write_text(text)


if __name__ == "__main__":
    main()
