"""Two processes never work for one client of a run at once."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock
from helpers import federate, results, tiny_config


def test_a_client_whose_folder_is_in_use_loses_the_round_and_its_files_stay(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "clients" / "1"
    folder.mkdir(parents=True)
    with FileLock(folder / ".lock"):
        federate(tiny_config(tmp_path / "run"))
    found = results(tmp_path / "run")
    assert [r["clients"] for r in found["rounds"]] == [[0, 2], [0, 2]]
    assert all(r["rejected"] == [{"client": 1, "reason": "error"}] for r in found["rounds"])
    assert [p.name for p in folder.iterdir()] == [".lock"]
    assert "another process" not in (tmp_path / "run" / "results.json").read_text()


def test_the_lock_is_let_go_after_every_message(tmp_path: Path) -> None:
    found = federate(tiny_config(tmp_path / "run"))
    assert [r["rejected"] for r in found["rounds"]] == [[], []]
    for client in "012":
        FileLock(tmp_path / "run" / "clients" / client / ".lock").acquire(timeout=0).lock.release()
