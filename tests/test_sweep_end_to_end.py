"""``fedgen sweep`` with the real command and a tiny model: gaps, going on, and that nothing is left behind."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import FEDGEN, Ended, command, events, results, tiny_overrides, write_records

from fedgen_app.cli import reproduce
from fedgen_app.settings import Value, plugins
from fedgen_app.sweeps import runner
from fedgen_app.sweeps.plan import Sweep

pytestmark = pytest.mark.slow
PATIENCE = 120.0  # seconds for something that takes two on an idle machine


def write_sweep(file: Path, tail: str, **more: Value) -> Path:
    settings = tiny_overrides(Path()) | {"samples.count": 0} | {k.replace("_", "-"): v for k, v in more.items()}
    del settings["output-dir"]
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    file.write_text("\n".join(["clients = 2", "[set]", *lines, tail]), encoding="utf-8")
    return file


def test_a_gap_is_named_and_the_same_command_closes_it(tmp_path: Path) -> None:
    few, output = tmp_path / "few", tmp_path / "out"
    few.mkdir()
    write_records(few / "train.jsonl", {"sea": 1}, seed=1)
    tail = f'[variants.good]\n[variants."too few"]\ndataset = {json.dumps(str(few))}\n[grid]\nseed = [3]'
    file = write_sweep(tmp_path / "s.toml", tail, num_server_rounds=1)
    ended = command("sweep", file, "--output", output, "--jobs", "2")
    assert ended.status == 3, ended.err
    assert "1 of 2 runs failed: too-few_seed-3" in ended.err.splitlines()[-1]
    assert "too-few_seed-3: FAILED: " in ended.out and "good_seed-3: completed" in ended.out
    table = (output / "table.md").read_text(encoding="utf-8")
    assert "- too-few_seed-3: failed: no client can take part" in table and "| 0 of 1 |" in table
    done = results(output / "runs" / "good_seed-3")
    assert json.loads((output / "runs/good_seed-3/settings.json").read_text())["seed"] == 3

    write_records(few / "train.jsonl", {"sea": 20, "law": 20}, seed=1)
    again = command("sweep", file, "--output", output)
    assert again.status == 0, again.err
    assert "good_seed-3: complete already" in again.out and "too-few_seed-3: completed" in again.out
    assert results(output / "runs" / "good_seed-3") == done
    rows = list(csv.DictReader((output / "runs.csv").open(encoding="utf-8")))
    assert [row["status"] for row in rows] == ["completed"] * 2
    assert float(rows[0]["server_word_perplexity"]) == done["final"]["metrics"]["word_perplexity"]

    write_sweep(file, tail, num_server_rounds=2)
    other = command("sweep", file, "--output", output)
    assert other.status == 2 and "num-server-rounds = 2, but the run there has 1" in other.err


def begin(file: Path, output: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [FEDGEN, "sweep", file, "--output", output, "--jobs", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Tests that a shell started in the background ignore Ctrl-C, and hand that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for_rounds(folders: list[Path]) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        if all((f / "events.jsonl").exists() and any(e["event"] == "round" for e in events(f)) for f in folders):
            return
        assert time.monotonic() < deadline, "no round within the patience"
        time.sleep(0.2)


def test_ctrl_c_leaves_nothing_running_and_everything_resumable(tmp_path: Path) -> None:
    file = write_sweep(tmp_path / "s.toml", "[grid]\nseed = [0, 1]", num_server_rounds=60, evaluate_every=60)
    output = tmp_path / "out"
    folders = [output / "runs" / f"seed-{seed}" for seed in (0, 1)]
    sweep = begin(file, output)
    wait_for_rounds(folders)
    children = psutil.Process(sweep.pid).children(recursive=True)
    assert len(children) >= 2
    sweep.send_signal(signal.SIGINT)
    _, error = sweep.communicate(timeout=PATIENCE)
    assert sweep.returncode == 130 and "the same command goes on" in error
    assert psutil.wait_procs(children, timeout=0)[1] == []
    assert [results(folder)["status"] for folder in folders] == ["interrupted"] * 2
    assert not (output / "table.md").exists()

    again = command("sweep", file, "--output", output, "--jobs", "2")
    assert again.status == 0, again.err
    for folder in folders:
        starts = [event for event in events(folder) if event["event"] == "start"]
        assert len(starts) == 2 and starts[1]["done"] > 0, "it went on and did not begin anew"
        assert [entry["round"] for entry in results(folder)["rounds"]] == list(range(1, 61))


def test_no_child_outlives_a_killed_sweep(tmp_path: Path) -> None:
    file = write_sweep(tmp_path / "s.toml", "[grid]\nseed = [0]", num_server_rounds=5000, evaluate_every=0)
    sweep = begin(file, tmp_path / "out")
    folder = tmp_path / "out" / "runs" / "seed-0"
    wait_for_rounds([folder])
    children = psutil.Process(sweep.pid).children(recursive=True)
    assert children
    sweep.kill()
    sweep.communicate(timeout=PATIENCE)
    assert psutil.wait_procs(children, timeout=PATIENCE)[1] == []
    assert results(folder)["status"] == "interrupted"


def test_a_backbone_is_prepared_once_and_again_where_its_step_changed(tmp_path: Path) -> None:
    (tmp_path / "make.py").write_text(
        "import shutil, sys, pathlib\n"
        "asked = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
        "shutil.copytree(asked['--source'], asked['--output'], dirs_exist_ok=True)\n"
        f"open({str(tmp_path / 'made')!r}, 'a').write(asked['--mark'])\n"
    )
    model, output = tiny_overrides(Path())["backbone"], tmp_path / "out"

    def run(mark: str) -> Ended:
        arguments = json.dumps({"source": model, "mark": mark}).replace('":', '" =')
        tail = f'[prepare.copy]\nscript = "make.py"\narguments = {arguments}'
        file = write_sweep(tmp_path / "s.toml", tail, num_server_rounds=1, backbone="prepared:copy")
        return command("sweep", file, "--output", output)

    assert run("a").status == 0
    assert results(output / "runs" / "seed-0")["backbone"]["name"] == "copy"
    assert run("a").status == 0
    assert (tmp_path / "made").read_text() == "a"
    ended = run("b")
    assert ended.status == 2 and "stands on another [prepare.copy]" in ended.err, ended.err
    shutil.rmtree(output / "runs")
    assert run("b").status == 0
    assert (tmp_path / "made").read_text() == "ab"


def test_a_step_that_fails_is_the_end(tmp_path: Path) -> None:
    tail = '[prepare.one]\ncall = "fedgen_app.studies.steps:drift"\narguments = { steps = 1, label = "cooking" }'
    file = write_sweep(tmp_path / "s.toml", tail, backbone="prepared:one")
    ended = command("sweep", file, "--output", tmp_path / "out")
    assert ended.status == 3
    assert "preparation one failed: " in ended.err and "no text has it; there are drama" in ended.err
    assert not (tmp_path / "out" / "prepared" / "one").exists() and not (tmp_path / "out" / "table.md").exists()


def test_two_sweeps_do_not_share_a_folder(tmp_path: Path) -> None:
    from filelock import FileLock

    file = write_sweep(tmp_path / "s.toml", "")
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"):
        done = subprocess.run(
            [FEDGEN, "sweep", file, "--output", tmp_path / "out"], capture_output=True, text=True, timeout=PATIENCE
        )
    assert done.returncode == 3 and "another sweep is at work in this folder" in done.stderr


def test_the_plan_loads_no_torch(tmp_path: Path) -> None:
    file = write_sweep(tmp_path / "s.toml", "[grid]\nlocal-epochs = [0]")
    code = "import sys\nfrom fedgen_app.cli import main\ntry:\n    main()\nfinally:\n    print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "sweep", file], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout.strip() == "False" and "local-epochs = 0" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", reproduce.names())
def test_every_study_runs_at_scale_smoke(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs in this process, as each one of its own would spend its time with imports."""
    tree = reproduce.load(name, reproduce.Scale.SMOKE)
    wanted = {table[key] for table in tree.get("variants", {}).values() for key in ("method", "task") if key in table}
    if awaited := wanted - set(plugins("methods")) - set(plugins("tasks")):
        pytest.skip(f"waits for {', '.join(sorted(awaited))}")

    def carry_out(
        sweep: Sweep, output: Path, *, app_dir: Path, defaults: Mapping[str, Value], **_: Any
    ) -> dict[str, str]:
        failed = {}
        for run in sweep.runs:
            folder = runner.folder_of(output, run)
            one = command(*runner.arguments_of(run, folder, sweep.engine, app_dir, defaults))
            if one.status:
                failed[run.name] = one.err
        return failed

    monkeypatch.setattr(runner, "carry_out", carry_out)
    ended = command("reproduce", name, "--scale", "smoke", "--output", tmp_path / "out")
    assert ended.status == 0, ended.err
    rows = list(csv.DictReader((tmp_path / "out" / "runs.csv").open(encoding="utf-8")))
    assert rows and all(row["status"] == "completed" for row in rows)
    assert "smoke" in (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
