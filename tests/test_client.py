"""Who a client is and what rank it can afford."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict
from helpers import tiny_config, tiny_settings

from fedgen_app.errors import DataError, SettingsError
from fedgen_app.federation.client import Participant, affordable_rank
from fedgen_app.federation.compatibility import check_method
from fedgen_app.learning.backbone import open_backbone


def participant(tmp_path: Path, node: dict[str, Any], **changes: Any) -> Participant:
    config = tiny_config(tmp_path, lora__rank=4, **changes)
    return Participant.from_context(Context(1, 1, node, RecordDict(), config))


def device(**more: Any) -> dict[str, Any]:
    return {"client-id": "ward-7", "data": "/nowhere", **more}


@pytest.mark.parametrize(
    ("memory", "rank"),
    [(1000 + 2 * 160, 1), (1000 + 2 * 160 * 3 + 319, 3), (1000 + 2 * 160 * 4, 4), (10**9, 4)],
)
def test_the_rank_follows_from_the_memory(memory: int, rank: int) -> None:
    assert affordable_rank(memory, held=1000, per_rank=10, largest=4) == rank


def test_too_little_memory_is_an_error_with_the_numbers() -> None:
    with pytest.raises(DataError, match=r"memory = 1319.*1000 bytes"):
        affordable_rank(1319, held=1000, per_rank=10, largest=4)


def test_a_device_says_its_rank_or_its_memory(tmp_path: Path) -> None:
    backbone = open_backbone(tiny_settings(lora__rank=4))
    per_rank = sum(tensor.numel() for tensor in backbone.fresh(0).values()) // 4
    two = backbone.parameters * 4 + 2 * 16 * per_rank * 2
    for node, rank in ((device(), 4), (device(rank=3), 3), (device(rank=64), 4), (device(memory=two), 2)):
        assert participant(tmp_path, node).rank_for(backbone) == rank
    assert participant(tmp_path, device(rank=1, memory=two)).rank_for(backbone) == 1


def test_simulated_clients_have_the_ranks_in_turn(tmp_path: Path) -> None:
    backbone = open_backbone(tiny_settings(lora__rank=4))
    nodes = [{"partition-id": index, "num-partitions": 5} for index in range(5)]
    ranks = [participant(tmp_path, node, lora__ranks="1,4").rank_for(backbone) for node in nodes]
    assert ranks == [1, 4, 1, 4, 1]
    assert participant(tmp_path, nodes[0]).rank_for(backbone) == 4


def test_a_method_is_checked_against_the_settings() -> None:
    assert check_method(tiny_settings(method="flexlora", lora__rank=4, lora__ranks="2,4")).fit
    with pytest.raises(SettingsError) as caught:
        check_method(tiny_settings(method="scaffold", lora__ranks="2,4", aggregation__layer_wise=True))
    lines = str(caught.value).splitlines()
    assert [line.split(" = ")[0] for line in lines] == ["aggregation.layer-wise", "lora.ranks"]
    check_method(tiny_settings(lora__rank=4, lora__ranks="4,4"))  # a mixture of one


@pytest.mark.parametrize(
    ("method", "by", "told"),
    [
        ("scaffold", "loss", "go to another in every round"),
        ("rolora", "adapters", "every second round; take 'updates'"),
    ],
)
def test_clusters_that_a_method_cannot_follow_are_refused(method: str, by: str, told: str) -> None:
    with pytest.raises(SettingsError, match=f"clusters.by = '{by}': method = {method} .*{told}"):
        check_method(tiny_settings(method=method, clusters__by=by))
    check_method(tiny_settings(method=method, clusters__by="updates"))


@pytest.mark.parametrize("method", ["ffa-lora", "fedsa-lora", "fedper", "local-only", "fedavg-full"])
def test_a_start_that_only_the_server_would_have_is_refused(method: str) -> None:
    with pytest.raises(SettingsError, match=f"lora.init = 'folder': with method = {method} "):
        check_method(tiny_settings(method=method, lora__init="folder"))


@pytest.mark.parametrize("method", ["fedgen-edge", "rolora", "fedsvd", "flora", "centralized"])
def test_a_start_that_is_sent_whole_is_taken(method: str) -> None:
    check_method(tiny_settings(method=method, lora__init="folder"))


def test_where_all_weights_learn_there_is_no_rank_to_afford(tmp_path: Path) -> None:
    backbone = open_backbone(tiny_settings(method="fedavg-full"), weights="model")
    assert participant(tmp_path, device(memory=1), method="fedavg-full").rank_for(backbone) == 4
    assert participant(tmp_path, device(rank=2), method="fedavg-full").rank_for(backbone) == 4
