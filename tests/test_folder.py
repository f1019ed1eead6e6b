"""What lies on a disk: whole or not there, one writer at a time, and never trusted when it is read again."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedgen_app import files
from fedgen_app.errors import AdapterError, CheckpointError, RunError
from fedgen_app.federation.method import GlobalState
from fedgen_app.files import folder_atomic, to_json, write_atomic
from fedgen_app.learning.adapters import Layout, digest
from fedgen_app.runs.folder import Checkpoint, RunFolder, checkpoint_numbers, load_checkpoint, read_json
from fedgen_app.runs.personal import Kept, PersonalStore

KEY = "q_proj.lora_A.weight"
LAYOUT: Layout = ((KEY, (2, 3)),)


def state(seed: int) -> GlobalState:
    generator = torch.Generator().manual_seed(seed)
    return GlobalState({KEY: torch.randn(2, 3, generator=generator)}, extra={"c": torch.randn(4, generator=generator)})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with the checkpoints of rounds 2 to 4."""
    with RunFolder(tmp_path / "run", keep=3) as folder:
        for number in range(1, 5):
            folder.save_checkpoint(number, vars(state(number)), {"history": [{"round": number}]})
    return tmp_path / "run"


def loaded(run: Path, number: int | None = None) -> Checkpoint:
    checkpoint = load_checkpoint(run, number)
    assert checkpoint is not None
    return checkpoint


def refused(run: Path, number: int | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(run, number)
    return str(caught.value)


def full_disk(monkeypatch: pytest.MonkeyPatch, at: str = "replace") -> None:
    def fail(*arguments: object, **keywords: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, at, fail)


def test_a_checkpoint_comes_back_bit_for_bit(run: Path) -> None:
    for number in (None, 4, 2):
        checkpoint, saved = loaded(run, number), state(number or 4)
        assert checkpoint.number == (number or 4)
        assert checkpoint.facts["history"] == [{"round": checkpoint.number}]
        assert digest(checkpoint.parts["adapter"]) == digest(saved.adapter)
        assert digest(checkpoint.parts["extra"]) == digest(saved.extra)
        assert "residual" not in checkpoint.parts


def test_only_the_last_ones_are_kept(run: Path) -> None:
    assert checkpoint_numbers(run) == [2, 3, 4]
    assert sorted(f.name for f in (run / "checkpoints").iterdir()) == ["round-0002", "round-0003", "round-0004"]


def test_rounds_beyond_four_digits_stay_in_order(tmp_path: Path) -> None:
    with RunFolder(tmp_path, keep=2) as folder:
        for number in (9998, 9999, 10000):
            folder.save_checkpoint(number, vars(state(1)), {})
    assert checkpoint_numbers(tmp_path) == [9999, 10000] and loaded(tmp_path).number == 10000


def test_there_may_be_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None
    (tmp_path / "checkpoints" / ".round-0001.abc").mkdir(parents=True)  # left by a process that was killed
    assert load_checkpoint(tmp_path) is None
    assert "round 7" in refused(tmp_path, 7)


def test_a_round_can_be_saved_again(run: Path) -> None:
    with RunFolder(run, keep=3) as folder:
        folder.save_checkpoint(4, vars(state(40)), {})
    assert digest(loaded(run).parts["adapter"]) == digest(state(40).adapter)
    assert sorted(f.name for f in (run / "checkpoints").iterdir()) == ["round-0002", "round-0003", "round-0004"]


def test_an_altered_state_is_refused_and_the_one_before_it_offered(run: Path) -> None:
    file = run / "checkpoints" / "round-0004" / "state.json"
    facts = json.loads(file.read_text())
    facts["history"] = [{"round": 5}]
    file.write_text(json.dumps(facts))
    text = refused(run)
    assert "state.json was altered" in text and f"fedgen resume {run} --round 3" in text
    assert loaded(run, 3).number == 3


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '{"round": 4}', "\x00"])
def test_a_damaged_state_is_refused(run: Path, content: str) -> None:
    (run / "checkpoints" / "round-0004" / "state.json").write_text(content)
    assert "--round 3" in refused(run)


@pytest.mark.parametrize("part", ["adapter", "extra"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "delete", "swap"])
def test_altered_tensors_are_refused_and_the_one_before_them_offered(run: Path, part: str, damage: str) -> None:
    file = run / "checkpoints" / "round-0004" / f"{part}.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        file.write_bytes(data)
    elif damage == "delete":
        file.unlink()
    elif damage == "swap":  # whole and valid, but of another round
        file.write_bytes((run / "checkpoints" / "round-0003" / file.name).read_bytes())
    else:
        file.write_bytes(data[: len(data) // 2] if damage == "truncate" else b"")
    text = refused(run)
    assert file.name in text and "--round 3" in text
    assert loaded(run, 3).number == 3


def test_the_oldest_has_none_before_it_to_offer(run: Path) -> None:
    (run / "checkpoints" / "round-0002" / "state.json").write_text("{}")
    assert "--round" not in refused(run, 2)


def test_a_checkpoint_under_another_rounds_name_is_refused(run: Path) -> None:
    (run / "checkpoints" / "round-0004").rename(run / "checkpoints" / "round-0009")
    assert "holds round 4" in refused(run)


def test_a_half_deleted_checkpoint_is_skipped(run: Path) -> None:
    (run / "checkpoints" / "round-0004" / "state.json").unlink()
    assert loaded(run).number == 3


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("number", [4, 5])
def test_a_full_disk_is_a_clear_error_and_the_last_good_one_stays(
    run: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    with RunFolder(run, keep=3) as folder:
        full_disk(monkeypatch, call)
        with pytest.raises(RunError, match=rf"round {number}.*No space left.*fedgen resume"):
            folder.save_checkpoint(number, vars(state(50)), {})
    monkeypatch.undo()
    assert digest(loaded(run).parts["adapter"]) == digest(state(4).adapter)
    assert sorted(f.name for f in (run / "checkpoints").iterdir()) == ["round-0002", "round-0003", "round-0004"]


def test_two_processes_cannot_write_into_one_folder(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom fedgen_app.errors import RunError\n"
        "from fedgen_app.runs.folder import RunFolder\n"
        "try:\n    RunFolder(Path(sys.argv[1]), 1).close()\n"
        "except RunError as error:\n    sys.exit(f'refused: {error}')"
    )

    def other() -> str:
        root = Path(__file__).resolve().parents[1]
        command = [sys.executable, "-c", code, str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, cwd=root, check=False).stderr.strip()

    with RunFolder(tmp_path, 1):
        assert other().startswith(f"refused: {tmp_path}: another run")
    assert other() == ""


def test_events_are_lines_as_they_happen_and_are_appended_to(tmp_path: Path) -> None:
    for number in (1, 2):
        with RunFolder(tmp_path, 1) as folder:
            folder.event("round", round=number)
            lines = (tmp_path / "events.jsonl").read_text().splitlines()
            assert [json.loads(line)["round"] for line in lines] == list(range(1, number + 1))


def test_settings_and_results_are_json(tmp_path: Path) -> None:
    with RunFolder(tmp_path, 1) as folder:
        folder.write_settings({"seed": 1})
        folder.write_results({"status": "running"})
        with pytest.raises(ValueError, match="JSON"):
            folder.write_results({"loss": float("nan")})
    assert read_json(tmp_path / "settings.json") == {"seed": 1}
    assert read_json(tmp_path / "results.json") == {"status": "running"}


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    file = tmp_path / "deep" / "file"
    write_atomic(file, b"old")
    full_disk(monkeypatch, call)
    with pytest.raises(OSError, match="No space"):
        write_atomic(file, b"new")
    assert file.read_bytes() == b"old" and [f.name for f in file.parent.iterdir()] == ["file"]
    monkeypatch.undo()
    write_atomic(file, b"new")
    assert file.read_bytes() == b"new"


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "folder"
    for name in ("one", "two"):
        with folder_atomic(folder) as building:
            (building / name).write_text(name)
            assert name == "one" or (folder / "one").exists()  # the old one is there to the end
    assert [f.name for f in folder.iterdir()] == ["two"]
    assert [f.name for f in folder.parent.iterdir()] == ["folder"]


def test_a_folder_that_fails_halfway_leaves_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with folder_atomic(folder) as building:
        (building / "one").touch()
    with pytest.raises(KeyboardInterrupt), folder_atomic(folder) as building:
        (building / "two").touch()
        raise KeyboardInterrupt
    assert [f.name for f in folder.iterdir()] == ["one"] and [f.name for f in tmp_path.iterdir()] == ["folder"]


def test_a_folder_whose_last_rename_fails_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    with folder_atomic(folder) as building:
        (building / "one").touch()
    replace, calls = os.replace, iter([False, True])

    def fail_second(source: Path, target: Path) -> None:
        if next(calls, False):
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", fail_second)
    with pytest.raises(OSError, match="Input/output"), folder_atomic(folder) as building:
        (building / "two").touch()
    assert [f.name for f in folder.iterdir()] == ["one"] and [f.name for f in tmp_path.iterdir()] == ["folder"]


def test_json_has_no_nan() -> None:
    assert json.loads(to_json({"a": [1, None]})) == {"a": [1, None]}
    with pytest.raises(ValueError, match="JSON"):
        to_json(float("inf"))


def numbered(store: PersonalStore) -> list[str]:
    return sorted(f.name for f in (store.folder / "state").iterdir())


def test_a_client_starts_from_the_round_before_the_one_it_is_asked_for(tmp_path: Path) -> None:
    store = PersonalStore(tmp_path, keep=10)
    assert store.before(1) == Kept()
    for number in (1, 3, 4):
        store.save(number, Kept(state(number).adapter))
    for number, source in ((2, 1), (3, 1), (4, 3), (5, 4), (99, 4)):
        got = store.before(number)
        assert digest(got.adapter) == digest(state(source).adapter)
    assert store.before(1) == Kept()


def test_a_client_keeps_its_last_states(tmp_path: Path) -> None:
    store = PersonalStore(tmp_path, keep=2)
    for number in (1, 2, 5):
        store.save(number, Kept(state(number).adapter))
    assert numbered(store) == ["round-0002.safetensors", "round-0005.safetensors"]


def test_a_client_keeps_the_state_that_counted_last(tmp_path: Path) -> None:
    store = PersonalStore(tmp_path, keep=2)
    for number in (1, 2, 3, 5, 6):
        store.save(number, Kept(state(number).adapter), averaged=min(number - 1, 2))
    assert numbered(store) == ["round-0002.safetensors", "round-0005.safetensors", "round-0006.safetensors"]
    store.save(7, Kept(state(7).adapter), averaged=6)
    assert numbered(store) == ["round-0006.safetensors", "round-0007.safetensors"]
    store.save(2, Kept(state(2).adapter), averaged=6)  # the run went back behind the rounds that counted
    assert numbered(store) == ["round-0002.safetensors"]


def test_a_round_that_is_repeated_ends_the_abandoned_ones_after_it(tmp_path: Path) -> None:
    store = PersonalStore(tmp_path, keep=2)
    for number in (4, 5):
        store.save(number, Kept(state(number).adapter))
    store.save(3, Kept(state(33).adapter))  # the run went on from the checkpoint of round 2
    got = store.before(6)
    assert digest(got.adapter) == digest(state(33).adapter)


def test_a_client_that_is_killed_while_saving_keeps_the_state_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = PersonalStore(tmp_path, keep=1)
    store.save(1, Kept(state(1).adapter))
    full_disk(monkeypatch)
    for number in (1, 2):
        with pytest.raises(OSError, match="No space"):
            store.save(number, Kept(state(9).adapter))
    monkeypatch.undo()
    got = store.before(2)
    assert digest(got.adapter) == digest(state(1).adapter)


def test_a_clients_damaged_state_is_refused(tmp_path: Path) -> None:
    store = PersonalStore(tmp_path, keep=2)
    store.save(1, Kept(state(1).adapter))
    (file,) = (tmp_path / "state").iterdir()
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(AdapterError, match="round-0001"):
        store.before(2)


def test_a_method_s_own_tensors_are_kept_beside_the_adapter(tmp_path: Path) -> None:
    store = PersonalStore(tmp_path, keep=2)
    store.save(1, Kept(state(1).adapter, {KEY: torch.full((2, 3), 7.0), "variate": torch.ones(1)}))
    got = store.before(2)
    assert digest(got.adapter) == digest(state(1).adapter)
    assert got.own[KEY].tolist() == [[7.0] * 3] * 2 and got.own["variate"].tolist() == [1.0]
