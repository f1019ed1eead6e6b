"""A device's policy: what it says, and that it beats the server's settings in a whole run."""

from __future__ import annotations

import hashlib
import time
from datetime import datetime
from pathlib import Path

import psutil
import pytest
from flwr.app import Message
from helpers import RecordingGrid, events, federate, tiny_config, tiny_settings, write_records

from fedgen_app.errors import PolicyError
from fedgen_app.federation import client
from fedgen_app.federation.client import Participant
from fedgen_app.federation.policy import Policy
from fedgen_app.learning.backbone import open_backbone
from fedgen_app.learning.task import Share
from fedgen_app.settings import Settings

DEVICE = 2  # its node; the others are simulated
OTHER = "sha256:" + hashlib.sha256(b"other").hexdigest()


def policy(tmp_path: Path, text: str) -> Policy:
    file = tmp_path / "policy.toml"
    file.write_text(text, encoding="utf-8")
    return Policy.read(file)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max-epoch = 1", r"max-epoch = 1: Extra inputs"),
        ("max-epochs = -1", r"max-epochs = -1: should be greater"),
        ("max-epochs = '3'", r"max-epochs = '3': should be a valid integer"),
        ("max-steps = true", r"max-steps = True: should be a valid integer"),
        ("max-bytes-up = 'lots'", r"max-bytes-up = 'lots': should be bytes, or a text"),
        ("backbones = ['smollm2']", r"backbones.0 = 'smollm2': should be 'sha256:'"),
        ("backbones = 'sha256:x'", r"backbones = 'sha256:x': should be a valid tuple"),
        ("max-epsilon = 0", r"max-epsilon = 0: should be greater than 0"),
        ("max-epsilon = inf", r"max-epsilon = inf: should be a finite"),
        ("hours = '22-6'", r"hours = '22-6': should be like"),
        ("hours = '10:00-24:30'", r"hours = '10:00-24:30': should be like"),
        ("condition = 'on-mains'", r"condition = 'on-mains': should be a valid tuple"),
        ("condition = []", r"condition = \[\]"),
        ("condition-timeout = 0", r"condition-timeout = 0: should be greater than 0"),
        ("max-epochs = ", r"policy.toml: "),
    ],
)
def test_a_policy_that_cannot_be_read_agrees_to_nothing(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=said):
        policy(tmp_path, text)


def test_a_missing_policy_agrees_to_nothing(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="No such file"):
        Policy.read(tmp_path / "none.toml")


def at(text: str) -> datetime:
    return datetime.fromisoformat(f"2026-03-01T{text}")


@pytest.mark.parametrize(
    ("hours", "inside", "outside"),
    [
        ("09:00-17:30", ["09:00", "17:29"], ["08:59", "17:30", "00:00"]),
        ("22:00-06:00", ["22:00", "23:59", "00:00", "05:59"], ["06:00", "21:59"]),
        ("20:00-24:00", ["20:00", "23:59"], ["00:00", "19:59"]),
        ("00:00-24:00", ["00:00", "12:00", "23:59"], []),
        ("01:00-02:00, 13:00-14:00", ["01:30", "13:00"], ["02:00", "12:59"]),
    ],
)
def test_hours(hours: str, inside: list[str], outside: list[str], tmp_path: Path) -> None:
    found = policy(tmp_path, f"hours = '{hours}'")
    for clock in inside:
        found.check_now(at(clock))
    for clock in outside:
        with pytest.raises(PolicyError, match=f"it is {clock}, outside of hours"):
            found.check_now(at(clock))


def test_a_condition_says_yes_or_no(tmp_path: Path) -> None:
    policy(tmp_path, "condition = ['true']").check_now()
    for command in ("['false']", "['/no/such/program']", f"['{tmp_path}']", "['sh', '-c', 'kill -9 $$']"):
        with pytest.raises(PolicyError, match="does not say yes"):
            policy(tmp_path, f"condition = {command}").check_now()


def test_a_condition_that_hangs_is_a_no_and_leaves_nothing_behind(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    command = f"sleep 300 & echo $! > {note}; wait"
    began = time.monotonic()
    with pytest.raises(PolicyError):
        policy(tmp_path, f'condition = ["sh", "-c", "{command}"]\ncondition-timeout = 0.5').check_now()
    assert 0.5 <= time.monotonic() - began < 10
    child = int(note.read_text())
    deadline = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


class DeviceGrid(RecordingGrid):
    """The node DEVICE is a device with a policy; what a message does to it is seen through `seen`."""

    def __init__(self, tmp_path: Path, config: dict[str, object], text: str, **node: str) -> None:
        super().__init__(config, 3)  # type: ignore[arg-type]
        self.file = tmp_path / "policy.toml"
        self.file.write_text(text, encoding="utf-8")
        data = tmp_path / "data"
        data.mkdir()
        write_records(data / "train.jsonl", {"sea": 12, "law": 8}, seed=5)
        (data / "prompts.txt").write_text("the captain set sail\n", encoding="utf-8")
        self.contexts[DEVICE].node_config = {
            "client-id": "ward-7",
            "data": str(data),
            "state-dir": str(tmp_path / "state"),
            "policy": str(self.file),
            "backbone": str(config["backbone"]),
            **node,
        }

    def codes(self, kind: str) -> list[int]:
        """What the device answered to one kind of message: 0, or the code of its refusal."""
        pairs = zip(self.sent, self.replies, strict=True)
        ours = [r for m, r in pairs if m.metadata.message_type == kind and m.metadata.dst_node_id == DEVICE]
        return [reply.error.code if reply.has_error() else 0 for reply in ours]


def run(tmp_path: Path, text: str, change: str = "", **settings: object) -> tuple[DeviceGrid, dict[str, object]]:
    config = tiny_config(tmp_path / "run", **{"samples__count": 0, "partition__by": "iid", **settings})  # type: ignore[arg-type]
    grid = DeviceGrid(tmp_path, config, text)  # type: ignore[arg-type]
    if change:
        deliver = grid.deliver

        def changing(message: Message) -> Message:
            reply = deliver(message)
            if message.metadata.message_type == "query.roll_call" and message.metadata.dst_node_id == DEVICE:
                grid.file.write_text(change, encoding="utf-8")
            return reply

        grid.deliver = changing  # type: ignore[method-assign]
    return grid, federate(config, 3, grid)


def test_a_device_whose_policy_allows_it_takes_part(tmp_path: Path) -> None:
    own = open_backbone(tiny_settings()).fingerprint
    text = f"backbones = ['{OTHER}', '{own}']\nmax-epochs = 1\nmax-steps = 500\nmax-bytes-up = '1MB'\n"
    grid, found = run(tmp_path, text + "hours = '00:00-24:00'\ncondition = ['true']\n")
    assert found["status"] == "completed"
    assert [round_["clients"] for round_ in found["rounds"]] == [[0, 2, "ward-7"]] * 2  # type: ignore[attr-defined]
    assert grid.codes("train") == [0, 0] and grid.codes("train.personalise") == [0]
    assert list((tmp_path / "state").glob("*/ward-7/adapter_model.safetensors"))


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        (f"backbones = ['{OTHER}']", {}),
        ("max-epochs = 1", {"local_epochs": 2}),
        ("max-epochs = 1", {"personal__epochs": 2}),
        ("max-steps = 2", {}),
        ("max-bytes-up = 100", {}),
        ("max-epsilon = 1000", {"clusters__by": "prompts"}),
        ("max-epochs = ", {}),
    ],
)
def test_what_the_settings_ask_for_is_refused_at_the_roll_call(
    text: str, settings: dict[str, object], tmp_path: Path
) -> None:
    grid, found = run(tmp_path, text, num_server_rounds=1, **settings)
    assert grid.codes("query.roll_call") == [105] and grid.codes("train") == []
    assert found["status"] == "completed" and found["rounds"][0]["clients"] == [0, 2]  # type: ignore[index]
    left = [e for e in events(tmp_path / "run") if e["event"] == "left-out"]
    assert [(e["node"], e["reason"]) for e in left] == [(DEVICE, "policy")]
    assert {file.suffix for file in (tmp_path / "state").rglob("*")} <= {".lock"}


@pytest.mark.parametrize("text", ["condition = ['false']", "max-steps = 1", "max-bytes-up = 1000", "backbones = []"])
def test_a_policy_that_changes_during_a_run_counts_at_once(text: str, tmp_path: Path) -> None:
    grid, found = run(tmp_path, "", change=text, num_server_rounds=1)
    assert grid.codes("query.roll_call") == [0] and grid.codes("train") == [105]
    assert found["status"] == "completed" and found["rounds"][0]["clients"] == [0, 2]  # type: ignore[index]
    assert found["rounds"][0]["rejected"] == [{"client": "ward-7", "reason": "policy"}]  # type: ignore[index]


def test_outside_of_its_hours_a_device_says_who_it_is_and_does_no_work(tmp_path: Path) -> None:
    now = datetime.now()
    span = f"{(now.hour + 2) % 24:02d}:00-{(now.hour + 3) % 24:02d}:00"
    grid, found = run(tmp_path, f"hours = '{span}'", num_server_rounds=2)
    assert grid.codes("query.roll_call") == [0] and grid.codes("train") == [105, 105]
    assert grid.codes("train.personalise") == [105]
    assert found["status"] == "completed"


def test_with_limited_backbones_the_server_does_not_choose_what_is_opened(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", num_server_rounds=1, samples__count=0, personal__epochs=0)
    own = open_backbone(tiny_settings()).fingerprint
    grid = DeviceGrid(tmp_path, config, f"backbones = ['{own}']")  # type: ignore[arg-type]
    del grid.contexts[DEVICE].node_config["backbone"]
    federate(config, 3, grid)
    assert grid.codes("query.roll_call") == [105]
    with pytest.raises(PolicyError, match="'owner/name', is not opened"):
        Policy(backbones=()).check_source("", "owner/name")
    Policy(backbones=()).check_source("/models/own", "owner/name")
    Policy().check_source("", "owner/name")


@pytest.mark.parametrize(("limits", "revision"), [(Policy(backbones=()), ""), (Policy(), "refs/pr/1")])
def test_with_limited_backbones_the_server_names_no_revision(
    limits: Policy, revision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Asked(Exception):
        pass

    def ask(settings: Settings, source: str, weights: str) -> None:
        raise Asked(source, settings.backbone_revision)

    monkeypatch.setattr(client, "open_backbone", ask)
    config = tiny_settings(backbone="owner/name", backbone_revision="refs/pr/1")
    me = Participant("ward-7", config, Share(), 0, "owner/own", tmp_path, policy=limits)
    with pytest.raises(Asked) as asked:
        me.open_backbone()
    assert asked.value.args == ("owner/own", revision)
