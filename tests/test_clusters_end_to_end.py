"""Clusters through the real apps: recovered, bypassed where there is one, resumed to the same bits, and silent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from flwr.common.serde import message_to_proto
from helpers import (
    RecordingGrid,
    command,
    events,
    federate,
    results,
    run_arguments,
    tiny_config,
    tiny_data,
    tiny_model,
    tiny_settings,
    without_times,
    workspace,
    write_records,
)
from pipelines import tiny_pipeline
from safetensors.torch import load_file

from fedgen_app.engines import in_process
from fedgen_app.engines.in_process import InProcessGrid
from fedgen_app.errors import RunError
from fedgen_app.federation.exchange import TTL_MARGIN
from fedgen_app.federation.roster import ROLL_CALL
from fedgen_app.federation.session import Session
from fedgen_app.runs.folder import RunFolder
from fedgen_app.settings import Value

CLIENTS = 6
TRUTH = [0, 1, 2, 0, 1, 2]  # labels in turn
SPLIT: dict[str, Value] = {"partition__by": "single-label", "samples__count": 0}
THREE: dict[str, Value] = {**SPLIT, "clusters__by": "prompts", "clusters__choose": "count", "clusters__count": 3}
AVERAGING = ["fedgen-edge", "ffa-lora", "fedsa-lora", "rolora", "flora", "fedex-lora", "flexlora", "hetlora"]
AVERAGING += ["fedsvd", "fedrot-lora", "fedprox", "scaffold", "fedavgm", "fedadam", "fedyogi", "ditto", "apfl"]
AVERAGING += ["fedper", "fedavg-full"]


def config(output: Path, **changes: Value) -> dict[str, Value]:
    return tiny_config(output, **{"num_server_rounds": 3, **THREE, **changes})


def places(found: dict[str, Any]) -> list[int]:
    """The cluster of each client, by client, numbered as they appear."""
    of = {client: entry["cluster"] for entry in found["clusters"] for client in entry["clients"]}
    seen: dict[int, int] = {}
    return [seen.setdefault(of[client], len(seen)) for client in range(len(of))]


@pytest.mark.parametrize("by", ["prompts", "updates", "adapters", "oracle"])
def test_clusters_are_recovered(by: str, tmp_path: Path) -> None:
    found = federate(config(tmp_path / "run", clusters__by=by), CLIENTS)
    assert places(found) == TRUTH and found["clustering"]["adjusted_rand"] == 1
    assert found["clustering"]["by"] == by and found["clustering"]["unplaced"] == []
    for entry in found["clusters"]:
        assert entry["examples"] > 0
        for state in ("frozen", "metrics", "personal"):
            assert entry[state]["word_perplexity"] > 0
    for entry in found["rounds"]:
        assert sorted(c for part in entry["clusters"] for c in part["clients"]) == list(range(CLIENTS))
        assert 0 <= entry["global_discarded_energy"] < 1
        assert all(0 <= part["interaction_discarded_energy"] < 1 for part in entry["clusters"])
    assert (tmp_path / "run/clusters/map.png").exists() is (by != "oracle")


def test_the_run_folder_has_all_that_mixing_needs(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    found = federate(config(tmp_path / "run", samples__count=1), CLIENTS)
    folder = tmp_path / "run" / "clusters"
    known = json.loads((folder / "map.json").read_text())
    centroids = load_file(folder / "centroids.safetensors")
    for entry in found["clusters"]:
        own = folder / str(entry["cluster"])
        assert known["clusters"][own.name] == entry["clients"]
        assert float(centroids[own.name].norm()) == pytest.approx(1, abs=1e-5)
        base = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32)
        peft: Any = PeftModel.from_pretrained(base, str(own))
        assert peft.peft_config["default"].r == 4
        assert f"adapter of cluster {own.name}" in (own / "README.md").read_text()
        assert (tmp_path / "run/samples" / f"cluster-{own.name}.txt").stat().st_size > 0
    adapters = [load_file(folder / str(e["cluster"]) / "adapter_model.safetensors") for e in found["clusters"]]
    key = next(key for key in adapters[0] if "lora_B" in key)
    assert not torch.equal(adapters[0][key], adapters[1][key])
    ended = command("generate", tmp_path / "run", "--cluster", "1", "--prompt", "the sea", "--length", "4")
    assert ended.status == 0 and ended.out.startswith("the sea"), ended.err
    ended = command("generate", tmp_path / "run", "--prompt", "the sea", "--length", "4")
    assert ended.status == 0, ended.err


def same_adapters(one: Path, other: Path) -> None:
    files = sorted(f.relative_to(one) for f in one.glob("**/*model.safetensors") if "clusters" not in f.parts)
    assert files
    for file in files:
        left, right = load_file(one / file), load_file(other / file)
        assert all(torch.equal(left[key], right[key]) for key in left), file


@pytest.mark.parametrize("method", AVERAGING)
def test_one_cluster_without_strength_is_the_plain_method_bit_for_bit(method: str, tmp_path: Path) -> None:
    common: dict[str, Value] = {"method": method, "learning_rate": 2e-3, "fraction_train": 0.7, **SPLIT}
    if method in ("flexlora", "hetlora", "flora"):
        common["lora__ranks"] = "2,4"
    plain = federate(tiny_config(tmp_path / "plain", **common), 4)
    one = federate(
        config(tmp_path / "one", **common, num_server_rounds=2, clusters__count=1, clusters__strength=0.0), 4
    )
    assert one["adapter"]["sha256"] == plain["adapter"]["sha256"]
    added = {"clusters", "global_discarded_energy"}
    bare = [{key: value for key, value in entry.items() if key not in added} for entry in one["rounds"]]
    before = [{key: value for key, value in entry.items() if key != "discarded_energy"} for entry in plain["rounds"]]
    assert without_times(bare) == without_times(before)
    assert one["final"] == plain["final"] and one["personal"] == plain["personal"]
    same_adapters(tmp_path / "plain", tmp_path / "one")


@pytest.mark.parametrize("method", AVERAGING)
def test_every_averaging_method_has_clusters(method: str, tmp_path: Path) -> None:
    rate = 2e-3 if method == "fedavg-full" else 5e-3
    found = federate(config(tmp_path / "run", method=method, learning_rate=rate), CLIENTS)
    assert found["status"] == "completed" and places(found) == TRUTH
    assert all(not entry["rejected"] for entry in found["rounds"])
    for entry in found["clusters"]:
        assert entry["personal"]["word_perplexity"] < 0.995 * entry["frozen"]["word_perplexity"]
        exported = list((tmp_path / "run/clusters" / str(entry["cluster"])).glob("*model.safetensors"))
        assert bool(exported) is (method not in ("fedsa-lora", "fedper"))


@pytest.mark.parametrize(
    ("by", "method"),
    [("prompts", "fedavgm"), ("updates", "scaffold"), ("adapters", "fedex-lora"), ("loss", "fedgen-edge")],
)
def test_a_resumed_run_ends_with_the_same_bits(by: str, method: str, tmp_path: Path) -> None:
    changes: dict[str, Value] = {
        **THREE,
        "clusters__by": by,
        "method": method,
        "num_server_rounds": 4,
        "keep_checkpoints": 4,
        "clusters__every": 2,
        "clusters__warmup": 2,
        "learning_rate": 3e-3,
    }
    whole = federate(config(tmp_path / "whole", **changes), CLIENTS)
    parted = tmp_path / "parted"
    assert command(*run_arguments(parted, CLIENTS, **changes)).status == 0
    for number in (1, 3):
        assert command("resume", parted, "--round", str(number)).status == 0
        got = results(parted)
        for part in ("rounds", "final", "personal", "clusters", "clustering"):
            assert without_times(got[part]) == without_times(whole[part]), part
        assert got["adapter"]["sha256"] == whole["adapter"]["sha256"]
        for entry in whole["clusters"]:
            file = f"clusters/{entry['cluster']}/adapter_model.safetensors"
            assert (parted / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_loss_finds_the_clusters_and_what_it_costs_is_counted(tmp_path: Path) -> None:
    """IFCA with two kinds of data, far apart, and steps large enough to tell them apart."""
    folder = workspace() / "two-kinds"
    if not folder.exists():
        folder.mkdir()
        write_records(folder / "train.jsonl", {"sea": 48, "law": 48}, seed=1)
        write_records(folder / "test.jsonl", {"sea": 4, "law": 4}, seed=2)
    found = federate(
        config(
            tmp_path / "run",
            dataset=str(folder),
            clusters__by="loss",
            clusters__count=2,
            clusters__strength=0.0,
            num_server_rounds=5,
            local_epochs=6,
            learning_rate=2e-2,
            warmup_rounds=0,
        ),
        CLIENTS,
    )
    assert found["clustering"]["adjusted_rand"] == 1 and len(found["clusters"]) == 2
    first, *later = (entry["downlink_bytes"] for entry in found["rounds"])
    assert all(1.7 * first < size < 2.1 * first for size in later)
    assert (tmp_path / "run/clusters/map.json").exists() and not (tmp_path / "run/clusters/map.png").exists()


class ChoosesWrong(InProcessGrid):
    """Client 0 names a cluster that there is not."""

    def deliver(self, message: Message) -> Message:
        reply = super().deliver(message)
        if message.metadata.dst_node_id == 1 and "arrays" in reply.content and message.metadata.message_type == "train":
            facts = reply.content.config_records["reply"]
            if "cluster" in facts:
                facts["cluster"] = 7
        return reply


def test_a_choice_that_was_not_offered_costs_the_round(tmp_path: Path) -> None:
    run_config = config(tmp_path / "run", clusters__by="loss", clusters__count=2)
    grid = ChoosesWrong(in_process.load_apps(Path(__file__).parents[1])[1], run_config, 4)
    found = federate(run_config, 4, grid)
    assert [entry["rejected"] for entry in found["rounds"][1:]] == [[{"client": 0, "reason": "malformed"}]] * 2


class Forgetful(InProcessGrid):
    """Client 0 sends no requirement that can be used."""

    spoiled: Any = None

    def deliver(self, message: Message) -> Message:
        reply = super().deliver(message)
        if message.metadata.dst_node_id == 1 and message.metadata.message_type == ROLL_CALL:
            facts = reply.content.config_records["reply"]
            if self.spoiled is None:
                del facts["requirement"]
            else:
                facts["requirement" if isinstance(self.spoiled, list) else "space"] = self.spoiled
        return reply


@pytest.mark.parametrize("spoiled", [None, [0.5] * 32, [float("nan")] * 32, "0123456789abcdef", "no mark"])
def test_a_client_without_a_usable_requirement_does_not_train_and_gets_the_global_adapter(
    spoiled: Any, tmp_path: Path
) -> None:
    run_config = config(tmp_path / "run")
    grid = Forgetful(in_process.load_apps(Path(__file__).parents[1])[1], run_config, CLIENTS)
    grid.spoiled = spoiled
    found = federate(run_config, CLIENTS, grid)
    assert all(entry["clients"] == [1, 2, 3, 4, 5] for entry in found["rounds"])
    assert [entry["client"] for entry in found["clustering"]["unplaced"]] == [0]
    assert [entry["client"] for entry in found["personal"]] == list(range(CLIENTS))
    told = [event for event in events(tmp_path / "run") if event["event"] == "unplaced"]
    assert len(told) == 1 and told[0]["reason"]


class Latecomer(InProcessGrid):
    """The node of client 3 is there from the second round's roll call on."""

    calls = 0

    def get_node_ids(self) -> list[int]:
        self.calls += 1
        return [node for node in self.contexts if node != 4 or self.calls > 4]


@pytest.mark.parametrize("by", ["prompts", "updates"])
def test_a_newcomer_joins_those_who_are_like_it(by: str, tmp_path: Path) -> None:
    run_config = config(tmp_path / "run", clusters__by=by, expected_clients=5, num_server_rounds=4, local_epochs=2)
    grid = Latecomer(in_process.load_apps(Path(__file__).parents[1])[1], run_config, CLIENTS)
    found = federate(run_config, CLIENTS, grid)
    assert 3 not in found["rounds"][0]["clients"] and 3 in found["rounds"][-1]["clients"]
    assert places(found) == TRUTH
    trials = [e for e in found["rounds"] if 3 in e["clients"] and not any(3 in p["clients"] for p in e["clusters"])]
    assert len(trials) == (1 if by == "updates" else 0)  # once from the global adapter, and used to place it alone


def test_reclustering_keeps_identities_and_states(tmp_path: Path) -> None:
    once = federate(config(tmp_path / "once", num_server_rounds=4), CLIENTS)
    often = federate(config(tmp_path / "often", num_server_rounds=4, clusters__every=1), CLIENTS)
    assert once["clusters"] == often["clusters"] and once["adapter"]["sha256"] == often["adapter"]["sha256"]
    by_updates = federate(
        config(tmp_path / "updates", num_server_rounds=4, clusters__every=1, clusters__by="updates"), CLIENTS
    )
    assert places(by_updates) == TRUTH and {entry["cluster"] for entry in by_updates["clusters"]} == {0, 1, 2}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"method": "centralized", "clusters.by": "oracle"}, "one client, which owns all data"),
        ({"method": "local-only", "clusters.by": "prompts"}, "nothing to average in a cluster"),
        ({"method": "flora", "clusters.by": "adapters", "lora.ranks": "2,8"}, "take 'updates'"),
        ({"method": "fedsa-lora", "clusters.by": "updates"}, "sends no factor B"),
        ({"clusters.by": "updates", "clusters.warmup": "4", "num-server-rounds": "3"}, "use 3 or less"),
        ({"clusters.by": "loss", "clusters.warmup": "3", "num-server-rounds": "3"}, "where chance dealt them"),
        ({"clusters.by": "prompts", "clusters.key": "/nowhere"}, "clusters.key = '/nowhere': no such file"),
        ({"clusters.encoder": "./nowhere"}, "clusters.encoder"),
        (
            {"clusters.noise": "0.1"},
            "clusters.noise = 0.1: protects what clients say they want, which clusters.by = 'none'",
        ),
        ({"clusters.by": "loss", "num-server-rounds": "3", "clusters.key": __file__}, f"clusters.key = {__file__!r}: "),
    ],
)
def test_what_cannot_work_is_refused_before_the_start(changes: dict[str, str], told: str, tmp_path: Path) -> None:
    output = tmp_path / "run"
    options = [f"--set={key}={value}" for key, value in changes.items()]
    ended = command("run", "--engine", "in-process", "--clients", "2", "--output", output, *options)
    assert ended.status == 2 and told in ended.err, ended.err
    assert not output.exists()


def test_a_robust_rule_works_in_the_clusters_that_have_enough_members(tmp_path: Path) -> None:
    found = federate(config(tmp_path / "run", aggregation__robust="norm-bound"), 8)  # three, three and two
    assert found["status"] == "completed" and [len(entry["clients"]) for entry in found["clusters"]] == [3, 3, 2]
    for entry in found["rounds"]:
        assert ["skipped" in part for part in entry["clusters"]] == [False, False, True]
        assert "needs 2f + 1 = 3" in entry["clusters"][2]["skipped"]
    for entry in found["clusters"][:2]:
        assert entry["metrics"]["word_perplexity"] < 0.995 * entry["frozen"]["word_perplexity"]
    told = [event["cluster"] for event in events(tmp_path / "run") if event["event"] == "too-few"]
    assert told == [2]


def test_with_clusters_that_are_all_too_small_for_the_robust_rule_nothing_is_trained(tmp_path: Path) -> None:
    run_config = config(tmp_path / "run", aggregation__robust="krum")
    grid = RecordingGrid(run_config, CLIENTS)
    with pytest.raises(RunError, match=r"no cluster has enough members: aggregation.robust = 'krum' needs 2f \+ 3 = 5"):
        federate(run_config, CLIENTS, grid)
    assert results(tmp_path / "run")["rounds"] == []
    assert {message.metadata.message_type for message in grid.sent} == {ROLL_CALL}


class Spoiling(InProcessGrid):
    """What client 0 trains cannot be read."""

    def deliver(self, message: Message) -> Message:
        reply = super().deliver(message)
        if message.metadata.dst_node_id == 1 and message.metadata.message_type == "train":
            del reply.content["arrays"]
        return reply


def test_rounds_in_which_every_cluster_stays_end_the_run(tmp_path: Path) -> None:
    run_config = config(tmp_path / "run", aggregation__robust="norm-bound", num_server_rounds=6)
    grid = Spoiling(in_process.load_apps(Path(__file__).parents[1])[1], run_config, 7)  # three, two and two
    with pytest.raises(RunError, match="every cluster stayed as it was in 3 rounds in a row, reasons: aggregation"):
        federate(run_config, 7, grid)
    assert [len(entry["clients"]) for entry in results(tmp_path / "run")["rounds"]] == [6, 6, 6]


def test_rounds_that_ask_everyone_have_the_time_for_it(tmp_path: Path) -> None:
    grid, found = recorded(config(tmp_path / "run", clusters__by="updates", fraction_train=0.5))
    assert [len(entry["clients"]) for entry in found["rounds"]] == [6, 3, 3]
    times = [message.metadata.ttl for message in grid.sent if message.metadata.message_type == "train"]
    assert set(times[:6]) == {1200 + TTL_MARGIN} and set(times[6:]) == {600 + TTL_MARGIN}


class Away(Forgetful):
    """After round 1 client 0, which has no requirement, is alone for a while."""

    trained, looks = 0, 0

    def deliver(self, message: Message) -> Message:
        self.trained += message.metadata.message_type == "train"
        return super().deliver(message)

    def get_node_ids(self) -> list[int]:
        if self.trained < CLIENTS - 1:
            return list(self.contexts)
        self.looks += 1
        return [1] if self.looks < 6 else list(self.contexts)


def test_where_only_clients_without_a_cluster_are_there_the_others_are_waited_for(tmp_path: Path) -> None:
    run_config = config(tmp_path / "run", num_server_rounds=2, round__roll_call=30.0)
    grid = Away(in_process.load_apps(Path(__file__).parents[1])[1], run_config, CLIENTS)
    found = federate(run_config, CLIENTS, grid)
    assert [entry["clients"] for entry in found["rounds"]] == [[1, 2, 3, 4, 5]] * 2


def test_a_map_that_cannot_be_written_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "run/clusters/map.png").mkdir(parents=True)
    with RunFolder(tmp_path / "run", 2) as folder, pytest.raises(RunError, match="cannot write .*map.png"):
        Session(tiny_settings(), "name", folder, None).draw_clusters({0: 0, 1: 1}, [0, 1], np.eye(2))


def test_devices_without_labels_have_no_oracle(tmp_path: Path) -> None:
    ended = command(*run_arguments(tmp_path / "run", 3, clusters__by="oracle", label_column="", partition__by="iid"))
    assert ended.status != 0 and "clusters.by = 'oracle'" in ended.err


def requirements(grid: RecordingGrid) -> list[list[float]]:
    return [
        list(reply.content.config_records["reply"]["requirement"])  # type: ignore[arg-type]
        for reply in grid.replies
        if reply.metadata.message_type == ROLL_CALL
    ]


def recorded(run_config: dict[str, Value], clients: int = CLIENTS) -> tuple[RecordingGrid, dict[str, Any]]:
    grid = RecordingGrid(run_config, clients)
    return grid, federate(run_config, clients, grid)


def test_a_key_turns_what_is_sent_and_changes_no_cluster(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"0123456789abcdef0123456789abcdef")
    changes: dict[str, Value] = {"clusters__strength": 0.0}  # which weighs by cosines to the last digit
    clear, one = recorded(config(tmp_path / "clear", **changes))
    secret, other = recorded(config(tmp_path / "secret", clusters__key=str(tmp_path / "key"), **changes))
    sent, turned = (torch.tensor(requirements(grid), dtype=torch.float64) for grid in (clear, secret))
    assert torch.allclose(sent @ sent.T, turned @ turned.T, atol=1e-5)
    assert not torch.allclose(sent, turned, atol=0.1)
    assert one["clusters"] == other["clusters"] and one["adapter"] == other["adapter"]


def test_noise_is_the_same_in_every_run_and_its_price_is_told(tmp_path: Path) -> None:
    noisy: dict[str, Value] = {"clusters__noise": 0.02, "clusters__delta": 1e-4}
    clear, _ = recorded(config(tmp_path / "clear"))
    one, found = recorded(config(tmp_path / "one", **noisy))
    other, _ = recorded(config(tmp_path / "other", **noisy))
    assert requirements(one) == requirements(other) != requirements(clear)
    assert found["clustering"]["epsilon"] > 100 and found["clustering"]["delta"] == 1e-4
    assert [event["delta"] for event in events(tmp_path / "one") if event["event"] == "noise"] == [1e-4]


def test_images_have_clusters_too(tmp_path: Path) -> None:
    found = federate(
        config(
            tmp_path / "run",
            task="diffusion",
            backbone=str(tiny_pipeline("text")),
            dataset="bundled:styles",
            label_column="",
            metrics__samples=0,
            test_sequences=8,
            max_steps=2,
            num_server_rounds=2,
            personal__max_steps=1,
            resolution=16,
            clusters__count=4,
            clusters__encoder="bundled",
        ),
        8,
    )
    assert found["status"] == "completed" and found["clustering"]["adjusted_rand"] > 0.6
    assert all(entry["metrics"]["denoising_loss"] > 0 for entry in found["clusters"])


CANARY = "Zanzibarcanary quietly asks for seventeen turquoise umbrellas"


def canary_data(folder: Path) -> Path:
    """The small data set, with one client's documents full of a sentence that must stay with it."""
    folder.mkdir(parents=True)
    lines = (tiny_data() / "train.jsonl").read_text().splitlines()
    extra = [json.dumps({"text": f"{CANARY} number {n}", "label": "canary"}) for n in range(8)]
    (folder / "train.jsonl").write_text("\n".join([*lines, *extra]) + "\n")
    (folder / "test.jsonl").write_text((tiny_data() / "test.jsonl").read_text())
    return folder


def leaks(data: bytes) -> bool:
    """Whether any of the sentence's telling words stands in the bytes, as UTF-8 or UTF-16."""
    words = [word for word in CANARY.split() if len(word) > 7]
    return any(word.encode(code) in data for word in words for code in ("utf-8", "utf-16-le"))


def test_no_prompt_crosses_the_wire_or_stays_in_the_run_folder(tmp_path: Path) -> None:
    run_config = config(
        tmp_path / "run", dataset=str(canary_data(tmp_path / "data")), clusters__count=4, samples__count=1
    )
    grid, found = recorded(run_config, 4)
    assert places(found) == [0, 1, 2, 3]  # the canary's owner took part, by what it asked for
    assert len(grid.sent) == len(grid.replies) > 12
    for message in [*grid.sent, *grid.replies]:
        assert not leaks(whole_message(message))
    assert leaks(CANARY.encode()) and leaks((tmp_path / "data/train.jsonl").read_bytes())
    for file in (tmp_path / "run").rglob("*"):
        assert not (file.is_file() and leaks(file.read_bytes())), file


def whole_message(message: Message) -> bytes:
    """All bytes of a message: its envelope, and its records with all that is in them."""
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

    parts = [part.deflate() for part in get_all_nested_objects(message).values()] if not message.has_error() else []
    return message_to_proto(message).SerializeToString() + b"".join(parts)


@pytest.mark.slow
def test_no_prompt_in_flowers_log_or_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same under Flower's own engine: everything that its processes leave or print, while they run and after."""
    from fedgen_app.engines import flower, keeper

    homes: list[Path] = []
    searched, launch = 0, keeper.launch

    def watched(port: int, log_file: Path) -> keeper.SuperLink:
        link = launch(port, log_file)
        homes.append(link.home)
        return link

    def search() -> None:
        nonlocal searched
        for home in homes:
            for file in home.rglob("*") if home.exists() else ():
                try:
                    data = file.read_bytes() if file.is_file() and not file.is_symlink() else b""
                except OSError:  # gone meanwhile, or a socket
                    continue
                searched += bool(data)
                assert not leaks(data), file

    monkeypatch.setattr(keeper, "launch", watched)
    run_config = config(
        tmp_path / "run", dataset=str(canary_data(tmp_path / "data")), clusters__count=4, expected_clients=4
    )
    log = tmp_path / "flower.log"
    status = flower.simulate(
        Path(__file__).parents[1], run_config, clients=4, log_file=log, gpus_per_client=0.0, tick=search
    )
    assert status == "finished:completed", log.read_text()[-2000:]
    assert homes and searched > 10
    assert results(tmp_path / "run")["clusters"] and not leaks(log.read_bytes())
    for file in (tmp_path / "run").rglob("*"):
        assert not (file.is_file() and leaks(file.read_bytes())), file
