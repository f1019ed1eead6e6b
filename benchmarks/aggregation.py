"""What the server's rules cost on one layer: from factors, against forming and decomposing the dense mean product.

    python benchmarks/aggregation.py [--clients 10] [--repeat 3] [--markdown FILE]

Every measurement runs in a process of its own with one thread. Times are processor time, the shortest of some repeats,
and only ratios of this session are shown. Memory is the peak above what the process held before, so without the replies
themselves. The decomposition of the largest dense matrix runs once: it takes minutes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before torch is loaded: one thread, so that processor time is comparable and a process can be forked.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
RANKS = (4, 8, 16, 32, 64)
SIZES = ((512, 512), (1024, 1024), (2048, 2048), (4096, 4096), (4096, 11008))
MIDDLE_RANK = 16
RULES = ("flexlora", "flora", "fedex-lora", "geometric-median")
DENSE = ("dense sum", "dense SVD")
KEYS = ("layer.lora_A.weight", "layer.lora_B.weight")


def operation(name: str, rows: int, columns: int, rank: int, clients: int) -> Callable[[], object]:
    """The thing to be timed, on random replies that are made beforehand."""
    import torch

    from fedgen_app.federation.method import GlobalState, Lora, Round, Update, load_method
    from fedgen_app.federation.robust import reweigh
    from fedgen_app.learning.adapters import Adapter
    from fedgen_app.settings import Settings, defaults

    generator = torch.Generator().manual_seed(0)

    def factors() -> Adapter:
        shapes = ((rank, columns), (rows, rank))
        return {key: torch.randn(shape, generator=generator) for key, shape in zip(KEYS, shapes, strict=True)}

    lora = Lora(rank, 2.0 * rank)
    state = GlobalState(factors())
    updates = [Update(i, factors(), rank, 1.0 + i) for i in range(clients)]
    round_ = Round(1, lora, 0, Settings.from_run_config(defaults(ROOT)), (), clients)

    def dense_sum() -> Any:
        total = sum(u.num_examples for u in updates)
        mean = torch.zeros(rows, columns, dtype=torch.float64)
        for u in updates:
            a, b = (u.adapter[key].double() for key in KEYS)
            mean.addmm_(b, a, alpha=lora.scaling * u.num_examples / total)
        return mean

    def dense_svd() -> Any:
        left, values, right = torch.linalg.svd(dense_sum(), full_matrices=False)
        return left[:, :rank] * values[:rank], right[:rank]

    if name in DENSE:
        return dense_sum if name == "dense sum" else dense_svd
    if name == "geometric-median":
        return lambda: reweigh(name, updates, state, round_)
    rule = load_method(name).rule
    return lambda: rule(state, updates, round_)


def peak() -> float:
    """Most memory that this process has held since ``reset_peak``, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1000


def reset_peak() -> None:
    """Linux: from here on the peak is counted anew."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(name: str, rows: int, columns: int, rank: int, clients: int, repeat: int) -> dict[str, float]:
    """Shortest processor time, and memory above what was held before."""
    run = operation(name, rows, columns, rank, clients)
    reset_peak()
    held, times = peak(), []
    for _ in range(repeat):
        began = time.process_time()
        run()
        times.append(time.process_time() - began)
    return {"seconds": min(times), "megabytes": peak() - held}


def measured(*arguments: Any) -> dict[str, float]:
    """``measure`` in a process of its own, which starts with the libraries loaded."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        found = pool.apply(measure, arguments)
    print(*arguments, found, file=sys.stderr, flush=True)
    return found


def table(rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:], ""])


def ratio(value: float) -> str:
    """Two significant digits, or all those before the point."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def by_rank(clients: int, repeat: int) -> str:
    """The largest layer at every rank, in units of the dense ways at the middle rank."""
    rows, columns = SIZES[-1]
    added = measured("dense sum", rows, columns, MIDDLE_RANK, clients, repeat)
    decomposed = measured("dense SVD", rows, columns, MIDDLE_RANK, clients, 1)
    lines = [["rule", *(f"r = {rank}" for rank in RANKS)]]
    memory = [["rule", *(f"r = {rank}" for rank in RANKS)]]
    for rule in RULES:
        cells = [measured(rule, rows, columns, rank, clients, repeat) for rank in RANKS]
        lines.append([rule, *(ratio(cell["seconds"] / decomposed["seconds"]) for cell in cells)])
        memory.append([rule, *(f"{cell['megabytes']:.0f}" for cell in cells)])
    sums = f"{ratio(added['seconds'] / decomposed['seconds'])}"
    return (
        f"\n## {rows} x {columns}, {clients} clients: time as a share of the dense SVD's\n\n{table(lines)}\n"
        f"Forming the dense mean alone, at r = {MIDDLE_RANK}: {sums}. The dense SVD is 1 by definition, at any rank.\n"
        f"\n## The same layer: peak memory, MB\n\n{table(memory)}\n"
        f"Forming the dense mean: {added['megabytes']:.0f}; its SVD: {decomposed['megabytes']:.0f}.\n"
    )


def by_size(clients: int, repeat: int) -> str:
    """The middle rank at every size, each way in units of its own smallest."""
    lines = [["", *(f"{rows} x {columns}" for rows, columns in SIZES)]]
    first_rows, first_columns = SIZES[0]
    for what, size in (("d_out + d_in", lambda r, c: r + c), ("d_out d_in", lambda r, c: r * c)):
        lines.append([what, *(ratio(size(r, c) / size(first_rows, first_columns)) for r, c in SIZES)])
    for name in (*RULES, "dense sum"):
        times = [measured(name, r, c, MIDDLE_RANK, clients, repeat)["seconds"] for r, c in SIZES]
        lines.append([name, *(ratio(t / times[0]) for t in times)])
    return f"\n## Growth with the layer at r = {MIDDLE_RANK}: time in units of the smallest layer's\n\n{table(lines)}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--markdown", type=Path, help="also write the tables here")
    args = parser.parse_args()
    for name in (*RULES, *DENSE):
        operation(name, 64, 64, 4, 2)  # loads the libraries, and computes nothing yet
    text = by_rank(args.clients, args.repeat) + by_size(args.clients, args.repeat)
    print(text)
    if args.markdown:
        args.markdown.write_text(text)


if __name__ == "__main__":
    main()
