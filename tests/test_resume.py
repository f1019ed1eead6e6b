"""A run that was killed, interrupted or damaged goes on, and ends with the same adapter as one that was left alone."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    FEDGEN,
    Ended,
    command,
    events,
    federate,
    make_llama,
    results,
    run_arguments,
    tiny_model,
    without_times,
)

from fedgen_app.errors import SettingsError
from fedgen_app.settings import Value

ROUNDS = 3
# Long enough a round that a kill between two lines of events.jsonl hits what it should.
LENGTH: dict[str, Value] = {"num_server_rounds": ROUNDS, "local_epochs": 3, "personal__epochs": 3}
PATIENCE = 120.0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    ended = command(*run_arguments(folder, **LENGTH))
    assert ended.status == 0, ended.err
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A copy of it to damage; its results.json says what a killed run's says."""
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    set_status(folder, "running")
    return folder


def set_status(folder: Path, status: str) -> None:
    (folder / "results.json").write_text(json.dumps(results(folder) | {"status": status}))


def told(folder: Path) -> list[dict[str, Any]]:
    """The events so far, the last one perhaps not yet whole."""
    file = folder / "events.jsonl"
    return [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]] if file.exists() else []


def interrupt(folder: Path, moment: Callable[[dict[str, Any]], bool], how: signal.Signals) -> Ended:
    """Start a run in a process of its own and send it a signal as soon as an event says that the moment is there."""
    process = subprocess.Popen(
        [FEDGEN, *run_arguments(folder, **LENGTH)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that a shell started in the background ignore Ctrl-C, and hand that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        end = time.monotonic() + PATIENCE
        while not any(map(moment, told(folder))):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end
            time.sleep(0.002)
        process.send_signal(how)
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
        process.wait()
    return Ended(process.returncode, out, err)


def in_round(number: int) -> Callable[[dict[str, Any]], bool]:
    return lambda event: event["event"] == "reply" and event["what"] == f"round {number}"


def after_round(number: int) -> Callable[[dict[str, Any]], bool]:
    return lambda event: event["event"] == "round" and event["round"] == number


def in_personalisation(event: dict[str, Any]) -> bool:
    return event["event"] == "reply" and event["what"] == "personalisation"


def same_end(folder: Path, whole: Path) -> None:
    assert results(folder)["status"] == "completed"
    assert results(folder)["adapter"]["sha256"] == results(whole)["adapter"]["sha256"]
    ours, theirs = (without_times(results(f)) | {"run": ""} for f in (folder, whole))
    assert ours == theirs
    for client in range(3):
        files = [f / "clients" / str(client) / "adapter_model.safetensors" for f in (folder, whole)]
        assert files[0].read_bytes() == files[1].read_bytes()


MOMENTS = {
    "before the first checkpoint": (in_round(1), range(1)),
    "between two rounds": (after_round(1), range(1, 3)),
    "in the midst of a round": (in_round(2), range(1, 3)),
    "in the last phase": (in_personalisation, range(ROUNDS, ROUNDS + 1)),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed_is_as_if_nothing_had_been(moment: str, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    when, done = MOMENTS[moment]
    assert interrupt(folder, when, signal.SIGKILL).status == -signal.SIGKILL
    assert results(folder)["status"] == "running"
    assert len(results(folder)["rounds"]) in done, "the kill came at another moment than it should"
    ended = command("resume", folder)
    assert ended.status == 0, ended.err
    same_end(folder, whole)
    starts = [event["done"] for event in events(folder) if event["event"] == "start"]
    assert starts[0] == 0 and starts[1] in done and len(starts) == 2
    assert not [f for f in (folder / "checkpoints").iterdir() if f.name.startswith(".")], "half-made checkpoints stay"


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_interrupted_says_how_to_go_on(how: signal.Signals, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ended = interrupt(folder, after_round(1), how)
    assert ended.status == 130
    assert f"to go on: fedgen resume {folder}" in ended.err
    assert "Traceback" not in ended.err
    assert results(folder)["status"] == "interrupted"
    assert events(folder)[-1]["status"] == "interrupted"
    assert command("resume", folder).status == 0
    same_end(folder, whole)


def test_a_completed_run_needs_no_work(whole: Path) -> None:
    before = {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in whole.rglob("*") if f.is_file()}
    ended = command("resume", whole)
    assert ended.status == 0 and "the run is complete" in ended.out
    assert {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in whole.rglob("*") if f.is_file()} == before


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def edit_history(folder: Path) -> None:
    file = folder / "state.json"
    state = json.loads(file.read_text())
    state["history"][0]["train_loss"] = 0.001
    file.write_text(json.dumps(state))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a flipped bit": (lambda f: flip(f / "adapter.safetensors", -5), "was altered"),
    "a cut file": (
        lambda f: (f / "adapter.safetensors").write_bytes((f / "adapter.safetensors").read_bytes()[:-5]) and None,
        "adapter.safetensors",
    ),
    "a missing file": (lambda f: (f / "adapter.safetensors").unlink(), "adapter.safetensors"),
    "another round's adapter": (
        lambda f: shutil.copy(f.parent / "round-0001" / "adapter.safetensors", f) and None,
        "was altered",
    ),
    "an edited history": (edit_history, "state.json was altered"),
    "half a state": (lambda f: (f / "state.json").write_bytes(b'{"round": 3') and None, "state.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_altered_checkpoint_is_refused_and_the_one_before_it_offered(damage: str, copy: Path, whole: Path) -> None:
    hurt, named = DAMAGES[damage]
    newest = copy / "checkpoints" / f"round-{ROUNDS:04d}"
    hurt(newest)
    ended = command("resume", copy)
    assert ended.status == 3, ended.out
    assert "Traceback" not in ended.err
    assert f"checkpoint of round {ROUNDS} refused" in ended.err and named in ended.err
    offer = f"fedgen resume {copy} --round {ROUNDS - 1}"
    assert offer in ended.err.strip().splitlines()[-1]
    ended = command(*offer.split()[1:])
    assert ended.status == 0, ended.err
    same_end(copy, whole)


def test_a_round_without_a_checkpoint_is_named(copy: Path) -> None:
    ended = command("resume", copy, "--round", "7")
    assert ended.status == 3 and "checkpoint of round 7 refused" in ended.err
    assert f"fedgen resume {copy} --round {ROUNDS}" in ended.err


def test_a_completed_run_goes_back_where_asked(copy: Path, whole: Path) -> None:
    set_status(copy, "completed")
    ended = command("resume", copy, "--round", "1")
    assert ended.status == 0, ended.err
    assert [e["done"] for e in events(copy) if e["event"] == "start"] == [0, 1]
    same_end(copy, whole)


def test_a_damaged_results_file_is_named(copy: Path) -> None:
    (copy / "results.json").write_text("{half")
    ended = command("resume", copy)
    assert ended.status == 3 and "results.json is damaged" in ended.err and "Traceback" not in ended.err


def test_another_backbone_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model(), model)
    folder = tmp_path / "run"
    assert command(*run_arguments(folder, backbone=str(model), num_server_rounds=2)).status == 0
    made = results(folder)["backbone"]["fingerprint"]
    shutil.rmtree(model)
    make_llama(model, seed=1)
    # A process holds its backbone once it is loaded; a later one, as a user's, finds the other weights.
    done = subprocess.run([FEDGEN, "resume", folder, "--round", "1"], capture_output=True, text=True)
    assert done.returncode == 3
    last = done.stderr.strip().splitlines()[-1]
    assert f"the run was made with backbone {made}, this one is sha256:" in last


def test_other_settings_than_the_run_began_with_are_refused(copy: Path) -> None:
    before = {f: f.read_bytes() for f in copy.rglob("*") if f.is_file()}
    kept = json.loads((copy / "settings.json").read_text())
    changed = {"output-dir": str(copy), "resume-from": str(copy), "seed": 5, "lora.alpha": 3.0, "round.quorum": 0.5}
    with pytest.raises(SettingsError) as caught:
        federate(kept | changed)
    told = str(caught.value)
    assert "seed = 5, was 0" in told and "lora.alpha = 3.0, was 8.0" in told
    assert "round.quorum" not in told and "output-dir" not in told and "resume-from" not in told
    assert {f: f.read_bytes() for f in copy.rglob("*") if f.is_file()} == before


def test_patience_and_samples_may_change_when_a_run_goes_on(copy: Path, whole: Path) -> None:
    kept = json.loads((copy / "settings.json").read_text())
    changed = {"output-dir": str(copy), "resume-from": str(copy), "round.deadline": 77.0, "samples.count": 0}
    found = federate(kept | changed)
    assert found["status"] == "completed" and found["adapter"]["sha256"] == results(whole)["adapter"]["sha256"]


def test_how_images_are_drawn_may_not_change_since_it_is_measured(copy: Path) -> None:
    kept = json.loads((copy / "settings.json").read_text())
    changed = {"output-dir": str(copy), "resume-from": str(copy), "samples.steps": 9, "samples.count": 0}
    with pytest.raises(SettingsError, match="samples.steps = 9, was") as caught:
        federate(kept | changed)
    assert "samples.count" not in str(caught.value)


@pytest.fixture
def locked(copy: Path) -> Iterator[Path]:
    from filelock import FileLock

    with FileLock(copy / ".lock"):
        yield copy


def test_two_runs_do_not_write_into_one_folder(locked: Path) -> None:
    # The lock of this process is another handle, as another process's would be.
    ended = command("resume", locked)
    assert ended.status == 3 and "another run is writing into this folder" in ended.err
    assert results(locked)["rounds"]
