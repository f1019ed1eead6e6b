"""One real run under Flower: its SuperLink, Ray's workers, and the same figures as in one process."""

from __future__ import annotations

import subprocess
from pathlib import Path

import psutil
import pytest
from helpers import FEDGEN, command, events, results, run_arguments

CLIENTS = 2


@pytest.mark.slow
def test_flower_gives_what_one_process_gives_and_leaves_nothing_running(tmp_path: Path) -> None:
    folder, plain = tmp_path / "flower", tmp_path / "plain"
    arguments = ["flower" if a == "in-process" else a for a in run_arguments(folder, CLIENTS)]
    process = subprocess.Popen(
        [FEDGEN, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    seen: set[psutil.Process] = set()
    try:
        root = psutil.Process(process.pid)
        while process.poll() is None:
            seen.update(root.children(recursive=True))
            try:
                process.wait(0.5)
            except subprocess.TimeoutExpired:
                continue
        out, err = process.communicate()
    finally:
        process.terminate()
        process.wait()
    log = folder / "flower.log"
    assert process.returncode == 0, err + (log.read_text()[-3000:] if log.exists() else "")
    assert len(seen) > 3, "Flower's own processes were never seen: the next line would prove nothing"
    left = [p for p in seen if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert left == []

    found = results(folder)
    assert found["status"] == "completed" and f"adapter: {folder / 'global'}" in out
    assert [event["event"] for event in events(folder)][-1] == "end"
    ended = command(*run_arguments(plain, CLIENTS))
    assert ended.status == 0, ended.err
    expected = results(plain)
    assert [r["clients"] for r in found["rounds"]] == [[0, 1], [0, 1]] == [r["clients"] for r in expected["rounds"]]
    for ours, theirs in zip(expected["rounds"], found["rounds"], strict=True):
        assert theirs["metrics"] == pytest.approx(ours["metrics"], rel=1e-2)
        assert theirs["train_loss"] == pytest.approx(ours["train_loss"], rel=1e-2)
        assert theirs["uplink_bytes"] == pytest.approx(ours["uplink_bytes"], rel=1e-2)
    assert found["frozen"] == pytest.approx(expected["frozen"], rel=1e-2)
    for ours, theirs in zip(expected["personal"], found["personal"], strict=True):
        assert (ours["client"], ours["examples"]) == (theirs["client"], theirs["examples"])
        for state in ("frozen", "global", "personal"):
            assert theirs[state] == pytest.approx(ours[state], rel=1e-2)
    # The runs differ from the start, and training moved them by more than they may differ.
    moved = found["frozen"]["word_perplexity"] / found["final"]["metrics"]["word_perplexity"]
    assert moved > 1.02
    exported = {f.parent.relative_to(folder) for f in folder.glob("**/adapter_model.safetensors")}
    assert exported == {Path("global"), Path("clients/0"), Path("clients/1")}
