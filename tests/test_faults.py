"""One client misbehaves: the run goes on, names it, and the round is the rule over the honest replies, bit for bit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from helpers import RecordingGrid, client_states, events, federate, results, tiny_config, tiny_settings, weighted_mean
from safetensors.torch import load_file

from fedgen_app.errors import RunError
from fedgen_app.federation import wire
from fedgen_app.federation.work import round_plan
from fedgen_app.learning import adapters, training
from fedgen_app.learning.backbone import open_backbone
from fedgen_app.runs.personal import load_kept
from fedgen_app.settings import Settings, Value

CULPRIT = 1  # the client id; its node is one more
ROUND = 1
Tamper = Callable[[Message, RecordDict], RecordDict | Error]


def flat(content: RecordDict) -> np.ndarray[Any, Any]:
    return content.array_records["arrays"][wire.ARRAY].numpy().copy()


def carry(content: RecordDict, array: np.ndarray[Any, Any], key: str = wire.ARRAY) -> RecordDict:
    content["arrays"] = ArrayRecord({key: Array(array)})
    return content


def with_number(value: float) -> Tamper:
    def tamper(reply: Message, content: RecordDict) -> RecordDict:
        array = flat(content)
        array[37] = value
        return carry(content, array)

    return tamper


def scaled(factor: float) -> Tamper:
    return lambda reply, content: carry(content, flat(content) * np.float32(factor))


def turned(factor: float) -> Tamper:
    """A times the factor, B through it: their product is the same, or zero once B is too small for float32."""

    def tamper(reply: Message, content: RecordDict) -> RecordDict:
        array, start = flat(content), 0
        for key, shape in open_backbone(tiny_settings()).layout:
            size = math.prod(shape)
            array[start : start + size] *= np.float32(factor if ".lora_A." in key else 1 / factor)
            start += size
        return carry(content, array)

    return tamper


def reshaped(change: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]) -> Tamper:
    return lambda reply, content: carry(content, change(flat(content)))


def with_metric(name: str, value: Any) -> Tamper:
    def tamper(reply: Message, content: RecordDict) -> RecordDict:
        metrics = dict(content.metric_records["metrics"])
        if value is None:
            del metrics[name]
        else:
            metrics[name] = value
        content["metrics"] = MetricRecord(metrics)
        return content

    return tamper


def with_fact(name: str, value: Any) -> Tamper:
    def tamper(reply: Message, content: RecordDict) -> RecordDict:
        content["reply"] = ConfigRecord({**content.config_records["reply"], name: value})
        return content

    return tamper


def declared(dtype: str, shape: tuple[int, ...]) -> Tamper:
    def tamper(reply: Message, content: RecordDict) -> RecordDict:
        data = content.array_records["arrays"][wire.ARRAY].data
        content["arrays"] = ArrayRecord({wire.ARRAY: Array(dtype, shape, "numpy.ndarray", data)})
        return content

    return tamper


def with_second_array(reply: Message, content: RecordDict) -> RecordDict:
    content["arrays"] = ArrayRecord({wire.ARRAY: Array(flat(content)), "personal": Array(np.ones(3, np.float32))})
    return content


def without(record: str) -> Tamper:
    def tamper(reply: Message, content: RecordDict) -> RecordDict:
        del content[record]
        return content

    return tamper


def pickled(reply: Message, content: RecordDict) -> RecordDict:
    data = (
        b"\x93NUMPY\x01\x00F\x00{'descr': '|O', 'fortran_order': False, 'shape': (896,), }".ljust(79)
        + b"\ncos\nabort\n."
    )
    content["arrays"] = ArrayRecord({wire.ARRAY: Array("float32", (896,), "numpy.ndarray", data)})
    return content


FAULTS: dict[str, tuple[Tamper, str]] = {
    "nan": (with_number(float("nan")), "non-finite"),
    "inf": (with_number(float("inf")), "non-finite"),
    "a million times too large": (scaled(1e6), "norm"),
    "a million times too large in A and too small in B": (turned(1e6), "norm"),
    "a huge A beside a B of zero": (turned(1e30), "norm"),
    "another rank": (reshaped(lambda a: a[: a.size // 2]), "shape"),
    "a longer array": (reshaped(lambda a: np.concatenate([a, a[:8]])), "shape"),
    "a shape that would broadcast": (reshaped(lambda a: a[:1]), "shape"),
    "a number": (reshaped(lambda a: np.array(a[0])), "shape"),
    "two dimensions": (reshaped(lambda a: a.reshape(1, -1)), "shape"),
    "half precision": (reshaped(lambda a: a.astype(np.float16)), "dtype"),
    "integers": (reshaped(lambda a: a.astype(np.int32)), "dtype"),
    "far too many bytes": (reshaped(lambda a: np.tile(a, 9)), "size"),
    "a declared shape of 1e13": (declared("float32", (10**13,)), "shape"),
    "a declared type": (declared("float64", (896,)), "dtype"),
    "an object array": (pickled, "dtype"),
    "another key": (lambda reply, content: carry(content, flat(content), "weights"), "keys"),
    "an extra key": (with_second_array, "keys"),
    "another layout": (with_fact(wire.LAYOUT, "0123456789abcdef"), "keys"),
    "no arrays": (without("arrays"), "malformed"),
    "no facts": (without("reply"), "malformed"),
    "no examples": (with_metric(wire.NUM_EXAMPLES, 0), "weight"),
    "negative examples": (with_metric(wire.NUM_EXAMPLES, -5), "weight"),
    "nan examples": (with_metric(wire.NUM_EXAMPLES, float("nan")), "weight"),
    "no count of examples": (with_metric(wire.NUM_EXAMPLES, None), "weight"),
    "a loss of nan": (with_metric("train_loss", float("nan")), "metrics"),
    "an absurd loss": (with_metric("train_loss", 1e9), "metrics"),
    "no loss": (with_metric("train_loss", None), "metrics"),
    "an extra metric": (with_metric("accuracy", 1.0), "metrics"),
    "a reply to an earlier round": (with_fact(wire.ROUND, 0), "stale"),
    "an error": (lambda reply, content: Error(102, "/home/someone/diary.txt"), "error"),
    "a refusal": (lambda reply, content: Error(105), "policy"),
}


class TamperedGrid(RecordingGrid):
    """One client's reply of some rounds is not what it sent."""

    kind = "train"

    def __init__(
        self, config: dict[str, Value], clients: int, tamper: Tamper, rounds: Iterable[int], culprits: Iterable[int]
    ) -> None:
        super().__init__(config, clients)
        self.tamper, self.rounds, self.culprits = tamper, set(rounds), set(culprits)

    def deliver(self, message: Message) -> Message:
        reply = super().deliver(message)
        config = message.content.config_records["config"]
        ours = message.metadata.dst_node_id - 1 in self.culprits and config.get(wire.ROUND) in self.rounds
        if not ours or message.metadata.message_type != self.kind:
            return reply
        changed = self.tamper(reply, reply.content)
        return Message(changed, reply_to=message)


def weights_of(grid: RecordingGrid) -> dict[int, float]:
    """What each client said of its examples in the roll call."""
    found = {}
    for sent, reply in zip(grid.sent, grid.replies, strict=True):
        if sent.metadata.message_type == "query.roll_call" and not reply.has_error():
            facts = reply.content.config_records["reply"]
            found[int(str(facts["client"]))] = float(facts["num-examples"])  # type: ignore[arg-type]
    return found


def assert_honest(folder: Path, grid: RecordingGrid, number: int, honest: Iterable[int]) -> None:
    """The state after a round is the mean over the honest clients' own files."""
    states, weights = client_states(folder, number), weights_of(grid)
    expected = weighted_mean({c: states[c] for c in honest}, weights)
    merged = load_file(folder / "checkpoints" / f"round-{number:04d}" / "adapter.safetensors")
    assert adapters.digest(merged) == adapters.digest(expected)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_reply_costs_its_client_one_round(fault: str, tmp_path: Path) -> None:
    tamper, reason = FAULTS[fault]
    folder = tmp_path / "run"
    config = tiny_config(folder, personal__epochs=0, samples__count=0)
    grid = TamperedGrid(config, 3, tamper, [ROUND], [CULPRIT])
    found = federate(config, 3, grid)
    assert found["status"] == "completed"
    assert found["rounds"][0]["clients"] == [0, 2]
    assert found["rounds"][0]["rejected"] == [{"client": CULPRIT, "reason": reason}]
    assert found["rounds"][1]["clients"] == [0, 1, 2] and found["rounds"][1]["rejected"] == []
    assert_honest(folder, grid, 1, [0, 2])
    assert_honest(folder, grid, 2, [0, 1, 2])
    assert "diary" not in (folder / "events.jsonl").read_text()


def test_replies_that_did_not_count_leave_scaffolds_variates_true(tmp_path: Path) -> None:
    """The server's control variate is the mean of the clients', whatever became of replies in between."""
    folder = tmp_path / "run"
    config = tiny_config(
        folder, method="scaffold", num_server_rounds=5, keep_checkpoints=1, personal__epochs=0, samples__count=0
    )
    grid = TamperedGrid(config, 3, with_number(math.nan), [2, 3, 4], [CULPRIT])
    found = federate(config, 3, grid)
    assert [entry["clients"] for entry in found["rounds"]] == [[0, 1, 2], *[[0, 2]] * 3, [0, 1, 2]]
    server = load_file(folder / "checkpoints" / "round-0005" / "extra.safetensors")
    own = [load_kept(folder / "clients" / str(c) / "state" / "round-0005.safetensors").own for c in range(3)]
    for key, variate in server.items():
        torch.testing.assert_close(variate, sum(x[key] for x in own) / 3, rtol=1e-4, atol=1e-7)


def test_an_enormous_weight_is_capped(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = tiny_config(folder, personal__epochs=0, samples__count=0)
    grid = TamperedGrid(config, 3, with_metric(wire.NUM_EXAMPLES, 10**12), [ROUND], [CULPRIT])
    found = federate(config, 3, grid)
    assert found["rounds"][0]["clients"] == [0, 1, 2] and found["rounds"][0]["rejected"] == []
    honest = weights_of(grid)
    # The median of three weights, of which one is enormous, is the larger of the other two.
    capped = {**honest, CULPRIT: 10 * max(honest[0], honest[2])}
    merged = load_file(folder / "checkpoints" / "round-0001" / "adapter.safetensors")
    assert adapters.digest(merged) == adapters.digest(weighted_mean(client_states(folder, 1), capped))


def test_clipping_keeps_the_client_and_bounds_its_change(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = tiny_config(
        folder, admission__norm_action="clip", admission__max_update_norm=5.0, personal__epochs=0, samples__count=0
    )
    found = federate(config, 3, TamperedGrid(config, 3, scaled(1e6), [ROUND], [CULPRIT]))
    assert found["rounds"][0]["clients"] == [0, 1, 2] and found["rounds"][0]["rejected"] == []
    merged = load_file(folder / "checkpoints" / "round-0001" / "adapter.safetensors")
    assert max(float(t.abs().max()) for t in merged.values()) < 100


class SilentGrid(RecordingGrid):
    """One client does not answer one kind of message."""

    kind = "train"
    rounds = frozenset({ROUND})
    silent = frozenset({CULPRIT})

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        def hushed(message: Message) -> bool:
            number = message.content.config_records["config"].get(wire.ROUND, 0)
            return (
                message.metadata.message_type == self.kind
                and message.metadata.dst_node_id - 1 in self.silent
                and number in self.rounds
            )

        return super().pull_messages([i for i in message_ids if i in self._pending and not hushed(self._pending[i])])


def test_silence_costs_the_deadline_and_that_client(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = tiny_config(folder, round__deadline=2.0, personal__epochs=0, samples__count=0)
    grid = SilentGrid(config, 3)
    began = time.monotonic()
    found = federate(config, 3, grid)
    assert 2 <= found["rounds"][0]["seconds"] < 4
    assert time.monotonic() - began < 20
    assert found["rounds"][0]["rejected"] == [{"client": CULPRIT, "reason": "timeout"}]
    assert found["rounds"][1]["clients"] == [0, 1, 2]
    assert_honest(folder, grid, 1, [0, 2])


def test_a_quorum_need_not_wait_for_the_last(tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path / "run", round__deadline=60.0, round__quorum=0.6, round__grace=0.2, personal__epochs=0
    )
    found = federate(config, 3, SilentGrid(config, 3))
    assert found["rounds"][0]["seconds"] < 10
    assert found["rounds"][0]["rejected"] == [{"client": CULPRIT, "reason": "timeout"}]


def test_silence_in_personalisation_costs_that_client_its_figures_only(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", round__deadline=2.0)
    grid = SilentGrid(config, 3)
    grid.kind, grid.rounds = "train.personalise", frozenset({3})
    found = federate(config, 3, grid)
    assert found["status"] == "completed" and [p["client"] for p in found["personal"]] == [0, 2]
    rejected = [e for e in events(tmp_path / "run") if e["event"] == "rejected"]
    assert [(e["client"], e["reason"]) for e in rejected] == [(CULPRIT, "timeout")]


class RollCallGrid(RecordingGrid):
    """One client's answer to the roll call says something else."""

    def __init__(self, config: dict[str, Value], clients: int, facts: dict[str, Any]) -> None:
        super().__init__(config, clients)
        self.facts = facts

    def deliver(self, message: Message) -> Message:
        reply = super().deliver(message)
        if message.metadata.message_type != "query.roll_call" or message.metadata.dst_node_id != CULPRIT + 1:
            return reply
        content = reply.content
        content["reply"] = ConfigRecord({**content.config_records["reply"], **self.facts})
        return Message(content, reply_to=message)


FOREIGN = "sha256:" + "0" * 64


@pytest.mark.parametrize(
    ("facts", "reason", "left"),
    [
        ({"client": "2"}, "duplicate", [0]),
        ({"fingerprint": FOREIGN}, "fingerprint", [0, 2]),
        ({"num-examples": 0}, "weight", [0, 2]),
        ({"num-examples": "many"}, "weight", [0, 2]),
        ({"client": "../../etc"}, "malformed", [0, 2]),
        ({"client": "7" * 70}, "malformed", [0, 2]),
    ],
    ids=["duplicate", "fingerprint", "no-examples", "examples-as-text", "traversal", "long-name"],
)
def test_the_roll_call_leaves_out(facts: dict[str, Any], reason: str, left: list[int], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = tiny_config(folder, round__roll_call=5.0, personal__epochs=0, samples__count=0)
    grid = RollCallGrid(config, 3, facts)
    found = federate(config, 3, grid)
    assert found["status"] == "completed"
    assert [r["clients"] for r in found["rounds"]] == [left, left]
    out = [e for e in events(folder) if e["event"] == "left-out"]
    assert {e["reason"] for e in out} == {reason}
    assert {e["node"] for e in out} == ({2, 3} if reason == "duplicate" else {2})
    if reason == "fingerprint":
        assert FOREIGN in out[0]["detail"] and found["backbone"]["fingerprint"] in out[0]["detail"]
    grid.replies = [r for r in grid.replies if r.metadata.src_node_id - 1 in left]
    grid.sent = [m for m in grid.sent if m.metadata.dst_node_id - 1 in left]
    assert_honest(folder, grid, 2, left)


def test_a_round_without_a_usable_reply_is_skipped(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = tiny_config(folder, num_server_rounds=3, personal__epochs=0, samples__count=0)
    grid = TamperedGrid(config, 3, with_number(float("nan")), [2], [0, 1, 2])
    found = federate(config, 3, grid)
    assert found["status"] == "completed"
    skipped = found["rounds"][1]
    assert skipped["clients"] == [] and skipped["train_loss"] is None and len(skipped["rejected"]) == 3
    assert [e["round"] for e in events(folder) if e["event"] == "skipped"] == [2]
    states = [load_file(folder / "checkpoints" / f"round-000{n}" / "adapter.safetensors") for n in (1, 2, 3)]
    assert adapters.digest(states[0]) == adapters.digest(states[1]) != adapters.digest(states[2])
    assert_honest(folder, grid, 3, [0, 1, 2])


def test_three_rounds_without_a_usable_reply_end_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = tiny_config(folder, num_server_rounds=9, keep_checkpoints=9)
    grid = TamperedGrid(config, 3, with_number(float("nan")), range(2, 10), [0, 1, 2])
    with pytest.raises(RunError, match="no usable reply in 3 rounds in a row, reasons: non-finite"):
        federate(config, 3, grid)
    found = results(folder)
    assert found["status"] == "failed" and "3 rounds" in found["reason"]
    assert [r["round"] for r in found["rounds"]] == [1, 2, 3, 4]
    assert (folder / "checkpoints" / "round-0004" / "state.json").is_file()
    resumed = federate(config | {"resume-from": str(folder)}, 3)
    assert resumed["status"] == "completed" and len(resumed["rounds"]) == 9


class DesertedGrid(RecordingGrid):
    """All nodes are gone once round 1 is done."""

    def get_node_ids(self) -> Iterable[int]:
        trained = [m for m in self.sent if m.metadata.message_type == "train"]
        return [] if len(trained) >= 3 else super().get_node_ids()


def test_when_every_client_is_gone_the_run_ends_within_a_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the command's own code, so that the exit status and the last line are those of the command."""
    from fedgen_app.cli import launch, main
    from fedgen_app.engines import in_process

    folder = tmp_path / "run"
    config = tiny_config(folder, round__roll_call=3.0, num_server_rounds=4)
    monkeypatch.setattr(in_process, "InProcessGrid", lambda app, run_config, n: DesertedGrid(dict(run_config), n))
    monkeypatch.setattr(launch.signal, "signal", lambda *given: None)
    arguments = [f"--set={key}={value}" for key, value in config.items() if key != "output-dir"]
    command = ["fedgen", "run", "--engine", "in-process", "--clients", "3", "--output", str(folder), *arguments]
    monkeypatch.setattr("sys.argv", command)
    began = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        main()
    assert time.monotonic() - began < 30
    assert ended.value.code == 3
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "no client is connected in round 2 (waited 3 s)" in last
    assert f"fedgen resume {folder}" in last
    assert results(folder)["status"] == "failed"
    assert (folder / "checkpoints" / "round-0001").is_dir()


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedgen_app.runs import folder as folder_module

    folder = tmp_path / "run"
    config = tiny_config(folder, num_server_rounds=3)
    write = folder_module.save_adapter
    written: list[Path] = []

    def full(tensors: dict[str, torch.Tensor], file: Path) -> None:
        written.append(file)
        if len(written) == 2:
            file.write_bytes(b"half of")
            raise OSError(28, "No space left on device")
        write(tensors, file)

    monkeypatch.setattr(folder_module, "save_adapter", full)
    with pytest.raises(RunError, match=r"round 2 .*No space left on device; free some space, then: fedgen resume"):
        federate(config, 3)
    assert [f.name for f in (folder / "checkpoints").iterdir()] == ["round-0001"]
    assert results(folder)["status"] == "failed"
    resumed = federate(config | {"resume-from": str(folder)}, 3)
    monkeypatch.undo()
    other = federate(config | {"output-dir": str(tmp_path / "other")}, 3)
    assert resumed["adapter"]["sha256"] == other["adapter"]["sha256"]


def renamed_metrics(reply: Message, content: RecordDict) -> RecordDict:
    metrics = content.metric_records["metrics"]
    content["metrics"] = MetricRecord({k.replace("word_perplexity", "fid"): v for k, v in metrics.items()})
    return content


PERSONAL_FAULTS: dict[str, Tamper] = {
    "other names": renamed_metrics,
    "an astronomical value": with_metric("global.word_perplexity", 1e300),
    "an astronomical negative value": with_metric("personal.bits_per_byte", -1e300),
    "a value that is none": with_metric("frozen.bits_per_byte", float("nan")),
    "one state without a metric": with_metric("frozen.bits_per_byte", None),
}


def personal_run(folder: Path, tamper: Tamper) -> dict[str, Any]:
    """A run of one round whose culprit's reply to the personalisation is not what it sent."""
    config = tiny_config(folder, num_server_rounds=1, samples__count=0)
    grid = TamperedGrid(config, 3, tamper, [2], [CULPRIT])
    grid.kind = "train.personalise"
    return federate(config, 3, grid)


@pytest.mark.parametrize("fault", PERSONAL_FAULTS)
def test_a_bad_personal_reply_costs_its_client_its_figures_only(fault: str, tmp_path: Path) -> None:
    found = personal_run(tmp_path / "run", PERSONAL_FAULTS[fault])
    assert found["status"] == "completed"
    assert found["personal_rejected"] == [{"client": CULPRIT, "reason": "metrics"}]
    assert [p["client"] for p in found["personal"]] == [0, 2]
    for state in ("frozen", "global", "personal"):
        mean = found["final"]["personal"][state]
        assert set(mean) == set(found["personal"][0][state])
        for name, value in mean.items():
            measured = [p[state][name] for p in found["personal"]]
            assert min(measured) * (1 - 1e-9) <= value <= max(measured) * (1 + 1e-9), (state, name)


def test_a_client_that_measured_less_than_the_others_does_not_end_the_run(tmp_path: Path) -> None:
    def fewer(reply: Message, content: RecordDict) -> RecordDict:
        metrics = content.metric_records["metrics"]
        content["metrics"] = MetricRecord({k: v for k, v in metrics.items() if "word_perplexity" not in k})
        return content

    found = personal_run(tmp_path / "run", fewer)
    assert found["status"] == "completed" and found["personal_rejected"] == []
    assert found["final"]["personal_clients"] == {"bits_per_byte": 3, "token_perplexity": 3, "word_perplexity": 2}


def test_an_enormous_personal_weight_is_capped(tmp_path: Path) -> None:
    found = personal_run(tmp_path / "run", with_metric(wire.NUM_EXAMPLES, 2**53))
    assert found["status"] == "completed" and found["personal_rejected"] == []
    examples = {p["client"]: p["examples"] for p in found["personal"]}
    assert examples[CULPRIT] == 10 * max(examples[0], examples[2])
    for name, value in found["final"]["personal"]["global"].items():
        added = sum(p["examples"] * p["global"][name] for p in found["personal"])
        assert math.isfinite(value) and value == pytest.approx(added / sum(examples.values()))


def test_a_client_whose_training_diverges_misses_that_round_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    config = tiny_config(folder, personal__epochs=0, samples__count=0)
    diverging = round_plan(Settings.from_run_config(config), ROUND, CULPRIT, torch.float32)
    train = training.train

    def learn(model: torch.nn.Module, loss: training.Loss, rows: Any, plan: training.Plan, **rest: Any) -> Any:
        learned = train(model, loss, rows, plan, **rest)
        if plan.seed == diverging.seed:
            with torch.no_grad():
                next(iter(adapters.parameters(model).values())).view(-1)[3] = float("nan")
        return learned

    monkeypatch.setattr(training, "train", learn)
    grid = RecordingGrid(config, 3)
    found = federate(config, 3, grid)
    assert found["status"] == "completed"
    assert found["rounds"][0]["rejected"] == [{"client": CULPRIT, "reason": "error"}]
    assert set(client_states(folder, 1)) == {0, 2}, "the diverged state must not be kept"
    assert found["rounds"][1]["clients"] == [0, 1, 2] and found["rounds"][1]["rejected"] == []
    assert_honest(folder, grid, 1, [0, 2])
    assert_honest(folder, grid, 2, [0, 1, 2])


def test_a_shared_half_that_diverges_is_not_hidden_by_the_personal_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ditto's own adapter has the keys of the shared one: kept, the NaN would end every later round of this client."""
    folder = tmp_path / "run"
    config = tiny_config(folder, method="ditto", personal__max_steps=1, samples__count=0)
    diverging = round_plan(Settings.from_run_config(config), ROUND, CULPRIT, torch.float32)
    train = training.train

    def learn(model: torch.nn.Module, loss: training.Loss, rows: Any, plan: training.Plan, **rest: Any) -> Any:
        learned = train(model, loss, rows, plan, **rest)
        if plan.seed == diverging.seed:
            with torch.no_grad():
                next(iter(adapters.parameters(model).values())).view(-1)[3] = float("nan")
        return learned

    monkeypatch.setattr(training, "train", learn)
    found = federate(config, 3)
    assert found["rounds"][0]["rejected"] == [{"client": CULPRIT, "reason": "error"}]
    assert set(client_states(folder, 1)) == {0, 2}, "the diverged state must not be kept"
    assert found["rounds"][1]["clients"] == [0, 1, 2] and found["rounds"][1]["rejected"] == []


def test_queueing_for_one_process_is_no_lateness(tmp_path: Path) -> None:
    class Working(RecordingGrid):
        def deliver(self, message: Message) -> Message:
            time.sleep(0.8 if message.metadata.message_type == "train" else 0)
            return super().deliver(message)

    config = tiny_config(
        tmp_path / "run", num_server_rounds=1, round__deadline=1.5, personal__epochs=0, samples__count=0
    )
    (entry,) = federate(config, 3, Working(config, 3))["rounds"]
    assert entry["seconds"] > 2.4, "the clients took no longer than the deadline: nothing is shown"
    assert entry["clients"] == [0, 1, 2] and entry["rejected"] == []


def test_who_takes_everyones_steps_has_everyones_time(tmp_path: Path) -> None:
    class Slow(RecordingGrid):
        began = math.inf

        def clock(self) -> float:
            return time.monotonic()

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            pending = [self._pending[i] for i in message_ids if i in self._pending]
            if any(message.metadata.message_type == "train" for message in pending):
                self.began = min(self.began, time.monotonic())
                if time.monotonic() - self.began < 1.5:
                    return []
            return super().pull_messages(message_ids)

    config = tiny_config(
        tmp_path / "run",
        method="centralized",
        num_server_rounds=1,
        round__deadline=1.0,
        personal__epochs=0,
        samples__count=0,
    )
    (entry,) = federate(config, 3, Slow(config, 3))["rounds"]
    assert entry["seconds"] >= 1.5 and len(entry["clients"]) == 1 and entry["rejected"] == []


def test_a_round_without_an_aggregation_has_no_figures_of_one(tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path / "run",
        method="flora",
        aggregation__robust="multi-krum",
        personal__epochs=0,
        samples__count=0,
    )
    first, second = federate(config, 5, TamperedGrid(config, 5, with_number(math.nan), [2], [0, 1, 2]))["rounds"]
    assert "discarded_energy" in first
    assert second["clients"] == [3, 4] and "discarded_energy" not in second
    assert [e["round"] for e in events(tmp_path / "run") if e["event"] == "skipped"] == [2]
