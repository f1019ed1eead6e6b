"""Every method through the real apps in one process: it learns, resumes to the same bits, and tells what it sent."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from helpers import RecordingGrid, client_states, command, federate, run_arguments, tiny_config, without_times
from safetensors.torch import load_file

from fedgen_app.federation.method import load_method
from fedgen_app.learning import adapters, training
from fedgen_app.learning.adapters import digest
from fedgen_app.settings import Value, plugins

METHODS = plugins("methods")
WITHOUT_GLOBAL = {"fedper", "fedsa-lora", "local-only"}
# What the tiny model needs of each to learn visibly in a few steps.
OWN: dict[str, dict[str, Value]] = {
    "fedavg-full": {"learning_rate": 2e-3},
    "fedadam": {"fedopt__learning_rate": 3e-2},
    "fedyogi": {"fedopt__learning_rate": 3e-2},
    "scaffold": {"learning_rate": 3e-3},
}


def config(output: Path, method: str, **changes: Value) -> dict[str, Value]:
    return tiny_config(output, **{"method": method, "num_server_rounds": 3, **OWN.get(method, {}), **changes})


@pytest.mark.parametrize("method", METHODS)
def test_it_learns(method: str, tmp_path: Path) -> None:
    found = federate(config(tmp_path / "run", method))
    assert found["status"] == "completed" and len(found["rounds"]) == 3
    assert all(not entry["rejected"] and entry["clients"] for entry in found["rounds"])
    final, personal = found["final"], found["final"]["personal"]
    has_global = method not in WITHOUT_GLOBAL
    assert load_method(method).has_global is has_global
    assert final["source"] == ("server" if has_global else "clients")
    assert (tmp_path / "run" / "global").exists() is has_global
    if has_global:
        assert final["metrics"]["word_perplexity"] < 0.99 * found["frozen"]["word_perplexity"]
    assert personal["personal"]["word_perplexity"] < 0.99 * personal["frozen"]["word_perplexity"]
    for client in range(3):
        assert list((tmp_path / "run" / "clients" / str(client)).glob("*model.safetensors"))
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_ends_with_the_same_results(method: str, tmp_path: Path) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    expected = federate(config(whole, method, keep_checkpoints=3))
    arguments = {**OWN.get(method, {}), "method": method, "num_server_rounds": 3, "keep_checkpoints": 3}
    assert command(*run_arguments(parted, **arguments)).status == 0
    assert command("resume", parted, "--round", "1").status == 0
    got = json.loads((parted / "results.json").read_text())
    assert without_times(got["final"]) == without_times(expected["final"])
    assert without_times(got["rounds"]) == without_times(expected["rounds"])
    for client in range(3):
        (one,), (other,) = ((f / "clients" / str(client)).glob("*model.safetensors") for f in (whole, parted))
        first, second = load_file(one), load_file(other)
        assert all(torch.equal(first[key], second[key]) for key in first)


class Backwards(RecordingGrid):
    """The clients work, and their replies arrive, in the opposite order."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return super().pull_messages(reversed(list(message_ids)))


GUARDS: list[dict[str, Value]] = [
    {"aggregation__robust": "norm-bound"},
    {"aggregation__robust": "geometric-median"},
    {"aggregation__robust": "factor-trimmed-mean"},
    {"aggregation__layer_wise": True},
    {"method": "hetlora", "lora__ranks": "1,4,2", "hetlora__gamma": 0.5, "hetlora__penalty": 5.0},
    {"method": "flora", "lora__ranks": "1,4,2"},
    {"method": "flexlora", "lora__ranks": "1,4,2"},
]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [*({"method": m} for m in METHODS), *GUARDS], ids=str)
def test_the_order_of_clients_changes_no_bit(changes: dict[str, Value], tmp_path: Path) -> None:
    """They share one model in one process, and the replies are added up: neither may tell who came first."""
    found, files = [], []
    for name, grid in (("forth", RecordingGrid), ("back", Backwards)):
        changed = {"method": "fedgen-edge", "num_server_rounds": 2, "samples__count": 0} | changes
        run = tiny_config(tmp_path / name, **changed)
        one = grid(run, 3)
        found.append(without_times(federate(run, 3, one)))
        at = [m.metadata.dst_node_id for m in one.sent if m.metadata.message_type == "train.personalise"]
        assert at == ([1, 2, 3] if name == "forth" else [3, 2, 1])
        whole = sorted((tmp_path / name).glob("*/**/*.safetensors"))
        files.append({str(f.relative_to(tmp_path / name)): digest(load_file(f)) for f in whole})
    assert found[0] == found[1]
    assert files[0] == files[1] and len(files[0]) >= 6


def uplink(method: str, folder: Path) -> int:
    found = federate(config(folder / method, method, num_server_rounds=2))
    return int(found["final"]["uplink_bytes_per_client_round"])


def test_what_is_shared_is_what_is_sent(tmp_path: Path) -> None:
    sent = {m: uplink(m, tmp_path) for m in ("fedgen-edge", "ffa-lora", "scaffold", "local-only", "fedavg-full")}
    numbers = sum(t.numel() for t in load_file(tmp_path / "fedgen-edge/global/adapter_model.safetensors").values())
    envelope = sent["local-only"]  # a reply without tensors
    assert sent["fedgen-edge"] - envelope == pytest.approx(4 * numbers, abs=64)
    halves = load_file(tmp_path / "ffa-lora/global/adapter_model.safetensors")
    b = sum(tensor.numel() for key, tensor in halves.items() if ".lora_B." in key)
    assert sent["ffa-lora"] - envelope == pytest.approx(4 * b, abs=64)
    assert sent["scaffold"] - envelope == pytest.approx(8 * numbers, abs=64)
    assert sent["fedavg-full"] > 20_000


@pytest.mark.parametrize("method", ["flexlora", "flora", "hetlora"])
def test_mixed_ranks(method: str, tmp_path: Path) -> None:
    found = federate(config(tmp_path / "run", method, lora__ranks="1,2,4"))
    assert [entry["ranks"] for entry in found["rounds"]] == [[1, 2, 4]] * 3
    assert found["final"]["metrics"]["word_perplexity"] < 0.99 * found["frozen"]["word_perplexity"]
    configs = [
        json.loads((tmp_path / "run/clients" / str(client) / "adapter_config.json").read_text()) for client in range(3)
    ]
    residual = 3 * (1 + 2 + 4) if method == "flora" else 0  # three rounds, all of it kept
    assert [c["r"] for c in configs] == [1 + residual, 2 + residual, 4 + residual]


def test_ranks_of_clients_that_share_nothing(tmp_path: Path) -> None:
    federate(config(tmp_path / "run", "local-only", lora__ranks="1,4"))
    ranks = [
        json.loads((tmp_path / "run/clients" / str(client) / "adapter_config.json").read_text())["r"]
        for client in range(3)
    ]
    assert ranks == [1, 4, 1]


def test_mixed_ranks_are_refused_by_a_method_that_cannot(tmp_path: Path) -> None:
    ended = command(*run_arguments(tmp_path / "run", lora__ranks="1,2,4"))
    assert ended.status == 2 and "lora.ranks = '1,2,4'" in ended.err and "flexlora" in ended.err
    assert not (tmp_path / "run").exists()


def test_an_export_with_a_residual_is_what_was_measured(tmp_path: Path) -> None:
    """PEFT opens the folder and the model says what the run measured: the residual is in the adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from fedgen_app.learning.backbone import load_task, open_backbone
    from fedgen_app.settings import Settings

    for method in ("flora", "fedex-lora"):
        changed = config(tmp_path / method, method, aggregation__residual_rank=7, lora__rslora=True)
        found = federate(changed)
        settings = Settings.from_run_config(changed)
        backbone, task = open_backbone(settings), load_task("language")
        test = task.load_test(settings, backbone)
        assert test is not None
        base = AutoModelForCausalLM.from_pretrained(settings.backbone, dtype=torch.float32)
        peft: Any = PeftModel.from_pretrained(base, str(tmp_path / method / "global"))
        assert peft.peft_config["default"].r == settings.lora.rank + 7
        got = task.evaluate(settings, dataclasses.replace(backbone, model=peft), test, settings.seed)
        assert got["word_perplexity"] == pytest.approx(found["final"]["metrics"]["word_perplexity"], rel=1e-4)
        assert all(0 <= entry["discarded_energy"] < 1 for entry in found["rounds"])


def test_centralised_training_takes_everyones_steps_on_everyones_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, learned = training.train, []

    def watched(model: Any, loss: Any, rows: Any, plan: training.Plan, **rest: Any) -> Any:
        learned.append((len(rows), training.planned_steps(len(rows), plan)))
        return train(model, loss, rows, plan, **rest)

    monkeypatch.setattr(training, "train", watched)
    few: dict[str, Value] = {"num_server_rounds": 1, "fraction_train": 1.0, "max_steps": 2}
    federate(config(tmp_path / "federated", "fedgen-edge", **few))
    apart = learned[:3]
    assert {steps for _, steps in apart} == {2}
    learned.clear()
    found = federate(config(tmp_path / "run", "centralized", **few))
    (entry,) = found["rounds"]
    rows = sum(rows for rows, _ in apart)
    assert rows - 2 <= learned[0][0] <= rows, "the texts in a row: only the last row of all may be padded"
    assert learned[0][1] == 6
    assert len(entry["clients"]) == 1
    assert {e["client"] for e in found["personal"]} == {0, 1, 2}
    assert learned[1:4] and sorted(rows for rows, _ in learned[1:4]) == sorted(rows for rows, _ in apart)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"method": "local-only", "aggregation.robust": "krum"}, "aggregation.robust = 'krum'"),
        ({"aggregation.robust": "krum"}, "needs 2f + 3"),
        ({"method": "scaffold", "aggregation.layer-wise": "true"}, "aggregation.layer-wise = true"),
        ({"method": "fedsa-lora", "aggregation.layer-wise": "true"}, "the server knows no product"),
        ({"method": "centralized", "aggregation.layer-wise": "true"}, "there is one client"),
        ({"method": "ditto", "personal.epochs": "0"}, "personal.epochs = 0: method = ditto"),
        ({"method": "local-only", "lora.init": "START"}, "lora.init = "),
    ],
)
def test_what_cannot_work_is_refused_before_the_start(changes: dict[str, str], told: str, tmp_path: Path) -> None:
    output = tmp_path / "run"
    start = tmp_path / "start"
    start.mkdir()
    (start / "adapter_model.safetensors").touch()
    options = [f"--set={key}={str(start) if value == 'START' else value}" for key, value in changes.items()]
    ended = command("run", "--engine", "in-process", "--clients", "2", "--output", output, *options)
    assert ended.status == 2 and told in ended.err, ended.err
    assert not output.exists()


@pytest.mark.parametrize("rule", ["norm-bound", "multi-krum", "geometric-median", "factor-median"])
def test_robust_rules_in_a_run(rule: str, tmp_path: Path) -> None:
    found = federate(
        config(tmp_path / "run", "fedgen-edge", aggregation__robust=rule, aggregation__attackers=0.25), clients=5
    )
    assert found["final"]["metrics"]["word_perplexity"] < 0.99 * found["frozen"]["word_perplexity"]


def test_layer_wise_aggregation_in_a_run(tmp_path: Path) -> None:
    found = federate(config(tmp_path / "run", "fedgen-edge", aggregation__layer_wise=True))
    assert found["final"]["metrics"]["word_perplexity"] < 0.99 * found["frozen"]["word_perplexity"]


def test_the_digest_of_the_result_covers_the_residual(tmp_path: Path) -> None:
    """FLoRA's adapter starts afresh in every round: what was learnt lies in the residual alone."""
    digests = set()
    for rate in (1e-3, 5e-3):
        folder = tmp_path / str(rate)
        changes: dict[str, Value] = {"num_server_rounds": 1, "personal__epochs": 0, "samples__count": 0}
        digests.add(federate(config(folder, "flora", learning_rate=rate, **changes))["adapter"]["sha256"])
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("method", "told", "peft"),
    [("fedgen-edge", "averaging of LoRA adapters", True), ("fedavg-full", "averaging of all weights", False)]
    + [("centralized", "no federation", True)],
)
def test_the_card_says_how_the_model_was_made(method: str, told: str, peft: bool, tmp_path: Path) -> None:
    found = federate(config(tmp_path / "run", method, num_server_rounds=1, personal__epochs=0, samples__count=0))
    assert found["adapter"]["rank"] == (None if method == "fedavg-full" else 4)
    card = (tmp_path / "run/global/README.md").read_text()
    assert told in card and ("library_name: peft" in card) is peft and ("tags: [lora," in card) is peft


def test_a_rounds_sample_of_a_client_is_of_the_model_that_it_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the residual that it received: the next one holds its own share already."""
    write, beside = adapters.write, {}

    def watched(model: Any, adapter: Any, residual: Any = None) -> None:
        beside[digest(adapter)] = digest(residual or {})
        write(model, adapter, residual)

    monkeypatch.setattr(adapters, "write", watched)
    sampled = tmp_path / "sampled"
    federate(config(sampled, "flora", num_server_rounds=2, personal__epochs=0, samples__every=1))
    for number in (1, 2):
        before = sampled / f"checkpoints/round-{number - 1:04d}/residual.safetensors"
        wanted = digest(load_file(before)) if number > 1 else digest({})
        trained = client_states(sampled, number)[0]
        assert beside[digest(trained)] == wanted
