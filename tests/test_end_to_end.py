"""Whole runs of the real apps with a tiny model in one process: what they leave, what travels, what repeats."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from helpers import (
    RecordingGrid,
    client_states,
    events,
    federate,
    results,
    tiny_config,
    tiny_data,
    weighted_mean,
    without_times,
)
from safetensors.torch import load_file

import server_app
from fedgen_app.federation import wire
from fedgen_app.learning import adapters
from fedgen_app.learning.backbone import load_task, open_backbone
from fedgen_app.settings import Settings, Value

METRICS = {"word_perplexity", "token_perplexity", "bits_per_byte"}
STATES = ("frozen", "global", "personal")


class Finished:
    """A completed run: its folder, its results, and all that crossed the wire."""

    def __init__(self, folder: Path, clients: int, config: dict[str, Value]) -> None:
        self.folder, self.clients, self.config = folder, clients, config
        self.grid = RecordingGrid(config, clients)
        self.results = federate(config, clients, self.grid)

    def replies(self, kind: str) -> list[Message]:
        return [
            reply
            for sent, reply in zip(self.grid.sent, self.grid.replies, strict=True)
            if sent.metadata.message_type == kind
        ]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("run") / "first"
    return Finished(folder, 4, tiny_config(folder, learning_rate=2e-2, personal__learning_rate=2e-2))


def test_results_are_as_the_contract_says(run: Finished) -> None:
    found = results(run.folder)
    assert found["schema"] == 1 and found["task"] == "language" and found["method"] == "fedgen-edge"
    assert found["status"] == "completed"
    backbone = open_backbone(Settings.from_run_config(run.config))
    adapter = load_file(run.folder / "global" / "adapter_model.safetensors")
    numbers = sum(t.numel() for t in adapter.values())
    assert found["backbone"] == {
        "name": "tiny-llama",
        "fingerprint": backbone.fingerprint,
        "parameters": backbone.parameters,
        "bytes": 4 * backbone.parameters,
    }
    digest = adapters.digest(adapter)
    assert found["adapter"] == {"rank": 4, "parameters": numbers, "bytes": 4 * numbers, "sha256": digest}
    assert set(found["frozen"]) == METRICS
    assert [r["round"] for r in found["rounds"]] == [1, 2]
    for entry in found["rounds"]:
        assert entry["clients"] == [0, 1, 2, 3] and entry["rejected"] == []
        assert set(entry["metrics"]) == METRICS
        for name, kind in (("train_loss", float), ("seconds", float), ("uplink_bytes", int), ("downlink_bytes", int)):
            assert type(entry[name]) is kind and entry[name] > 0, name
    final = found["final"]
    assert final["metrics"] == found["rounds"][-1]["metrics"] and final["source"] == "server"
    assert final["full_model_bytes"] == found["backbone"]["bytes"]
    uplink = final["uplink_bytes_per_client_round"]
    assert uplink == round(sum(r["uplink_bytes"] for r in found["rounds"]) / 8)
    assert final["uplink_reduction"] == pytest.approx(1 - uplink / final["full_model_bytes"])
    assert [p["client"] for p in found["personal"]] == [0, 1, 2, 3]
    for state in STATES:
        assert all(set(p[state]) == METRICS and min(p[state].values()) > 0 for p in found["personal"])
        mean = sum(p["examples"] * p[state]["word_perplexity"] for p in found["personal"])
        total = sum(p["examples"] for p in found["personal"])
        assert final["personal"][state]["word_perplexity"] == pytest.approx(mean / total)


def test_training_helps(run: Finished) -> None:
    found = run.results
    losses = [found["frozen"]["bits_per_byte"], *(r["metrics"]["bits_per_byte"] for r in found["rounds"])]
    assert losses == sorted(losses, reverse=True)
    mean = found["final"]["personal"]
    assert mean["personal"]["bits_per_byte"] < mean["global"]["bits_per_byte"] < mean["frozen"]["bits_per_byte"]


def test_the_run_folder_is_complete(run: Finished) -> None:
    peft = {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    assert {f.name for f in (run.folder / "global").iterdir()} == peft
    for client in range(4):
        assert {f.name for f in (run.folder / "clients" / str(client)).iterdir()} == peft | {"state", ".lock"}
    assert sorted(f.name for f in (run.folder / "checkpoints").iterdir()) == ["round-0001", "round-0002"]
    for number in (1, 2):
        checkpoint = run.folder / "checkpoints" / f"round-000{number}"
        assert {f.name for f in checkpoint.iterdir()} == {"adapter.safetensors", "state.json"}
    assert (run.folder / "partition.png").read_bytes().startswith(b"\x89PNG")
    samples = {f.stem: f.read_text(encoding="utf-8") for f in (run.folder / "samples").iterdir()}
    assert set(samples) == {"frozen", "global", "client-0", "client-1"} and all(s.strip() for s in samples.values())
    settings = json.loads((run.folder / "settings.json").read_text())
    assert settings == run.config
    assert not [f for f in run.folder.rglob(".*") if f.name != ".lock"], "temporary files are left"


def test_the_model_card_and_the_peft_configuration(run: Finished) -> None:
    for folder in (run.folder / "global", run.folder / "clients" / "2"):
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == run.config["backbone"]
        assert config["r"] == 4 and config["lora_alpha"] == 8.0 and config["peft_type"] == "LORA"
        assert config["target_modules"] == ["q_proj", "v_proj"]
        card = (folder / "README.md").read_text()
        assert card.startswith("---\n") and f"base_model: {run.config['backbone']}" in card
        assert run.results["backbone"]["fingerprint"] in card
        assert "PeftModel.from_pretrained" in card


def test_events_tell_the_run_in_order(run: Finished) -> None:
    told = events(run.folder)
    kinds = [event["event"] for event in told if event["event"] != "reply"]
    assert kinds == ["frozen", "start", "round", "round", "personal", "end"]
    assert [event["time"] for event in told] == sorted(event["time"] for event in told)
    first = [(e["done"], e["of"]) for e in told if e["event"] == "reply" and e["what"] == "round 1"]
    assert first == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert (told[-1]["status"], told[-1]["reason"]) == ("completed", "")


OPEN_EXPORT = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
folder, tokens = sys.argv[1], json.loads(sys.argv[2])
config = json.load(open(folder + "/adapter_config.json"))
base = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"])
model = PeftModel.from_pretrained(base, folder).eval()
assert "fedgen_app" not in sys.modules
with torch.no_grad():
    print(json.dumps(model(input_ids=torch.tensor([tokens])).logits[0].tolist()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("part", ["global", "clients/1"])
def test_an_export_opens_in_a_fresh_process_with_peft_alone(run: Finished, part: str, tmp_path: Path) -> None:
    tokens = [5, 17, 80, 33, 140, 9]
    done = subprocess.run(
        [sys.executable, "-W", "error:.*[Mm]issing.*keys", "-c", OPEN_EXPORT, run.folder / part, json.dumps(tokens)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    theirs = torch.tensor(json.loads(done.stdout))
    backbone = open_backbone(Settings.from_run_config(run.config))
    adapters.write(backbone.model, load_file(run.folder / part / "adapter_model.safetensors"))
    backbone.model.eval()
    with torch.no_grad():
        ours = backbone.model(input_ids=torch.tensor([tokens])).logits[0]
        with backbone.model.disable_adapter():
            frozen = backbone.model(input_ids=torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)
    assert (ours - frozen).abs().max() > 1e-3, "the adapter does nothing: the comparison would prove nothing"


def test_each_round_is_the_weighted_mean_of_the_clients_own_states(run: Finished) -> None:
    weights = {p["client"]: float(p["examples"]) for p in run.results["personal"]}
    assert len(set(weights.values())) > 2, "equal weights would not show a wrong weighting"
    for number in (1, 2):
        merged = load_file(run.folder / "checkpoints" / f"round-000{number}" / "adapter.safetensors")
        assert adapters.digest(merged) == adapters.digest(weighted_mean(client_states(run.folder, number), weights))
    assert adapters.digest(merged) == run.results["adapter"]["sha256"]


def test_the_same_run_twice_gives_the_same_bytes(run: Finished, tmp_path: Path) -> None:
    again = federate(run.config | {"output-dir": str(tmp_path / "again")}, 4)
    for part in ("global", *(f"clients/{i}" for i in range(4))):
        first, second = (f / part / "adapter_model.safetensors" for f in (run.folder, tmp_path / "again"))
        assert first.read_bytes() == second.read_bytes(), part
    assert without_times(again) == without_times(run.results)
    for file in (run.folder / "samples").iterdir():
        assert file.read_text() == (tmp_path / "again" / "samples" / file.name).read_text()


def test_another_seed_is_another_run(run: Finished, tmp_path: Path) -> None:
    other = federate(run.config | {"output-dir": str(tmp_path / "other"), "seed": 1}, 4)
    assert other["adapter"]["sha256"] != run.results["adapter"]["sha256"]


def test_only_shared_tensors_travel_and_never_a_personal_adapter(run: Finished) -> None:
    trained, personal = run.replies("train"), run.replies("train.personalise")
    assert len(trained) == 8 and len(personal) == 4
    layout = open_backbone(Settings.from_run_config(run.config)).layout
    for reply in trained:
        assert set(reply.content) == {"arrays", "metrics", "reply"}
        client, number = reply.metadata.src_node_id - 1, int(str(reply.content.config_records["reply"]["round"]))
        sent = wire.unpack(reply.content.array_records["arrays"], layout, "fp32")
        kept = client_states(run.folder, number)[client]
        assert adapters.digest(sent) == adapters.digest(kept)
    for reply in personal:
        assert set(reply.content) == {"metrics", "reply"} and not reply.content.array_records
    everything = serialised(run.grid.sent + run.grid.replies)
    for client in range(4):
        own = load_file(run.folder / "clients" / str(client) / "adapter_model.safetensors")
        assert not [key for key, tensor in own.items() if tensor.numpy().tobytes()[:64] in everything]
        # The same search does find what is known to travel.
        shared = client_states(run.folder, 2)[client]
        assert all(tensor.numpy().tobytes()[:64] in everything for tensor in shared.values())


def serialised(messages: Sequence[Message]) -> bytes:
    parts: list[bytes] = []
    for message in messages:
        if message.has_error():
            parts.append(f"{message.error.code} {message.error.reason}".encode())
        else:
            parts += [part.deflate() for part in get_all_nested_objects(message).values()]
        parts.append(repr(message.metadata.__dict__).encode())
    return b"\0".join(parts)


CANARY = "zanzibar-canary-4711"


def with_canary(folder: Path) -> Path:
    shutil.copytree(tiny_data(), folder)
    for name in ("train.jsonl", "test.jsonl"):
        file = folder / name
        lines = file.read_text().splitlines()
        for number in range(0, len(lines), 3):
            lines[number] = lines[number].replace('"text": "', f'"text": "{CANARY} ')
        file.write_text("\n".join(lines) + "\n")
    return folder


def test_no_text_no_path_in_any_message(tmp_path: Path) -> None:
    data = with_canary(tmp_path / f"{CANARY}-data")
    folder = tmp_path / f"{CANARY}-run"
    run = Finished(folder, 3, tiny_config(folder, dataset=str(data), samples__prompts=f"{CANARY} said"))
    assert CANARY in (folder / "samples" / "global.txt").read_text(), "the canary never was there"
    crossed = serialised(run.grid.sent + run.grid.replies)
    assert wire.NUM_EXAMPLES.encode() in crossed, "the search would find nothing at all"
    for secret in (CANARY, str(tmp_path), str(run.config["backbone"]), "captain"):
        assert secret.encode() not in crossed, secret


def test_a_broken_data_file_says_nothing_of_itself(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Between round 1 and 2 the clients' file breaks; their errors name it, on their own side only."""
    data = with_canary(tmp_path / "data")
    folder = tmp_path / "run"

    class Breaking(RecordingGrid):
        def deliver(self, message: Message) -> Message:
            config = message.content.config_records.get("config", {})
            if config.get("round") == 2:
                (data / "train.jsonl").write_bytes(f'{{"text": "{CANARY}\xff'.encode("latin1"))
            return super().deliver(message)

    config = tiny_config(folder, dataset=str(data), num_server_rounds=2)
    grid = Breaking(config, 3)
    found = federate(config, 3, grid)
    assert [r["reason"] for r in found["rounds"][1]["rejected"]] == ["error"] * 3
    assert found["status"] == "completed" and found["personal"] == []
    crossed = serialised(grid.sent + grid.replies)
    assert sum(reply.has_error() for reply in grid.replies) == 6
    for secret in (CANARY, str(tmp_path), "train.jsonl", "Traceback", "UTF-8"):
        assert secret.encode() not in crossed, secret
    told = (folder / "events.jsonl").read_text() + json.dumps(found["rounds"])
    assert CANARY not in told and "train.jsonl" not in told
    assert "code 102, data" in told


def test_a_run_that_ends_in_nonsense_has_no_figures_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, measured = load_task("language"), [300.0, 200.0, float("nan")]

    def evaluate(*arguments: Any) -> dict[str, float]:
        return {"word_perplexity": measured.pop(0)}

    monkeypatch.setattr(server_app, "load_task", lambda name: replace(task, evaluate=evaluate))
    found = federate(tiny_config(tmp_path / "run", personal__epochs=0, samples__count=0))
    assert found["rounds"][0]["metrics"] == {"word_perplexity": 200.0} and "not_finite" not in found["rounds"][0]
    assert found["rounds"][1]["metrics"] is None and found["rounds"][1]["not_finite"] == ["word_perplexity"]
    assert found["final"]["metrics"] is None and found["final"]["source"] == "server"
    assert [sign.partition(":")[0] for sign in found["signs"]] == ["divergence"]
    assert (tmp_path / "run" / "global" / "README.md").exists()


def test_a_server_without_data_has_the_clients_figures(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(tiny_data() / "train.jsonl", data)
    found = federate(tiny_config(tmp_path / "run", dataset=str(data), personal__epochs=0))
    assert found["frozen"] is None and [r["metrics"] for r in found["rounds"]] == [None, None]
    assert found["final"]["source"] == "clients"
    entries = found["personal"]
    total = sum(p["examples"] for p in entries)
    for name in METRICS:
        mean = sum(p["examples"] * p["global"][name] for p in entries) / total
        assert found["final"]["metrics"][name] == pytest.approx(mean)
        assert all(p["global"][name] == p["personal"][name] for p in entries)


def test_a_run_starts_from_another_runs_adapter(run: Finished, tmp_path: Path) -> None:
    start = run.folder / "global"
    found = federate(
        tiny_config(tmp_path / "next", lora__init=str(start), learning_rate=1e-9, warmup_rounds=0, personal__epochs=0),
        4,
    )
    before, after = (load_file(f / "adapter_model.safetensors") for f in (start, tmp_path / "next" / "global"))
    for key in before:
        torch.testing.assert_close(after[key], before[key], rtol=0, atol=1e-6)
    assert found["rounds"][0]["metrics"] == pytest.approx(run.results["final"]["metrics"], rel=1e-4)


def test_an_init_of_another_rank_is_refused(run: Finished, tmp_path: Path) -> None:
    from fedgen_app.errors import AdapterError

    config = tiny_config(tmp_path / "next", lora__init=str(run.folder / "global"), lora__rank=2)
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors does not fit the backbone: .*shape"):
        federate(config)
    assert not (tmp_path / "next" / "checkpoints").exists()


@pytest.mark.parametrize(("key", "value"), [("lora_alpha", 16.0), ("use_rslora", True)])
def test_an_init_that_scales_its_product_otherwise_is_refused(
    key: str, value: Value, run: Finished, tmp_path: Path
) -> None:
    from fedgen_app.errors import AdapterError

    start = tmp_path / "start"
    shutil.copytree(run.folder / "global", start)
    file = start / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(AdapterError, match=f"made with {key} = {value!r}, the settings say"):
        federate(tiny_config(tmp_path / "next", lora__init=str(start)), 4)
    assert not (tmp_path / "next" / "checkpoints").exists()


def test_a_run_that_fails_before_it_begins_says_why(tmp_path: Path) -> None:
    from fedgen_app.errors import BackboneError

    folder = tmp_path / "run"
    config = tiny_config(folder, lora__targets="query")
    with pytest.raises(BackboneError):
        federate(config)
    found = results(folder)
    assert found["status"] == "failed" and "no layer named 'query'" in found["reason"]
    assert (found["rounds"], found["frozen"], found["final"]) == ([], None, None)
    assert json.loads((folder / "settings.json").read_text()) == config
    assert events(folder)[-1]["event"] == "end" and events(folder)[-1]["status"] == "failed"


def test_a_run_may_measure_nothing(tmp_path: Path) -> None:
    found = federate(tiny_config(tmp_path / "run", evaluate_every=0, personal__epochs=0, samples__count=0))
    assert found["status"] == "completed"
    assert found["frozen"] is None and found["final"]["metrics"] is None
    assert [r["metrics"] for r in found["rounds"]] == [None, None] and found["personal"] == []
    assert "frozen" not in [event["event"] for event in events(tmp_path / "run")]
    assert (tmp_path / "run" / "global" / "adapter_model.safetensors").is_file()


def distances(folder: Path) -> list[float]:
    shared = load_file(folder / "global" / "adapter_model.safetensors")
    found = []
    for file in sorted(folder.glob("clients/*/adapter_model.safetensors")):
        own = load_file(file)
        found.append(sum(float(((own[k] - shared[k]) ** 2).sum()) for k in shared) ** 0.5)
    return found


def test_the_proximal_term_holds_the_personal_adapter_near_the_global(tmp_path: Path) -> None:
    changed: dict[str, Any] = {"personal__epochs": 4, "personal__learning_rate": 1e-3, "clip_norm": 0.0}
    for name, mu in (("free", 0.0), ("held", 1e6)):
        federate(tiny_config(tmp_path / name, personal__proximal=mu, **changed))
    free, held = distances(tmp_path / "free"), distances(tmp_path / "held")
    assert len(free) == len(held) == 3
    assert all(h < f / 2 for f, h in zip(free, held, strict=True)), (free, held)
    hashes = [results(tmp_path / name)["adapter"]["sha256"] for name in ("free", "held")]
    assert hashes[0] == hashes[1], "personalisation must not touch the global adapter"


def test_only_the_chosen_are_asked(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", fraction_train=0.5, num_server_rounds=3)
    grid = RecordingGrid(config, 4)
    found = federate(config, 4, grid)
    asked: dict[int, list[int]] = {}
    for message in grid.sent:
        if message.metadata.message_type == "train":
            number = int(str(message.content.config_records["config"]["round"]))
            asked.setdefault(number, []).append(message.metadata.dst_node_id - 1)
    assert [r["clients"] for r in found["rounds"]] == [sorted(asked[n]) for n in (1, 2, 3)]
    assert all(len(clients) == 2 for clients in asked.values())
    assert len({tuple(sorted(clients)) for clients in asked.values()}) > 1
    assert [p["client"] for p in found["personal"]] == [0, 1, 2, 3]


def test_bytes_on_the_wire_are_counted_as_serialised(run: Finished) -> None:
    sizes = [
        sum(len(part.deflate()) for part in get_all_nested_objects(reply).values()) for reply in run.replies("train")
    ]
    assert [r["uplink_bytes"] for r in run.results["rounds"]] == [sum(sizes[:4]), sum(sizes[4:])]


def test_fp16_halves_the_wire_and_still_adds_up(run: Finished, tmp_path: Path) -> None:
    found = federate(run.config | {"output-dir": str(tmp_path / "half"), "wire.codec": "fp16"}, 4)
    adapter = found["adapter"]["bytes"]
    both = [r["final"]["uplink_bytes_per_client_round"] for r in (run.results, found)]
    # The rest is Flower's own framing, whose size varies by a few bytes.
    assert both[0] - both[1] == pytest.approx(adapter / 2, abs=64)
    ours, half = run.results["final"]["metrics"], found["final"]["metrics"]
    assert half["bits_per_byte"] == pytest.approx(ours["bits_per_byte"], rel=1e-2)
