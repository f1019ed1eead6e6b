"""Which of several adapters suits a client: on all its rows, or on some."""

from __future__ import annotations

import torch
from helpers import tiny_settings
from torch import Tensor, nn

from fedgen_app.learning.adapters import Adapter
from fedgen_app.learning.backbone import open_backbone
from fedgen_app.learning.choosing import best_suited
from fedgen_app.learning.task import Batch, Examples

ROWS = 20


def seen_and_chosen(most: int) -> tuple[list[list[int]], int]:
    """The rows that were measured under each of three adapters, the second of which is the best, and the choice."""
    settings = tiny_settings(batch_size=3, clusters__loss_examples=most)
    backbone = open_backbone(settings)
    fresh = backbone.fresh(0)
    starts: dict[int, tuple[Adapter, Adapter]] = {
        cluster: ({key: torch.full_like(tensor, size) for key, tensor in fresh.items()}, {})
        for cluster, size in ((2, 0.5), (5, 0.1), (7, 0.9))
    }
    measured: dict[float, list[int]] = {}

    def loss(model: nn.Module, batch: Batch, noise: torch.Generator) -> Tensor:
        size = max(float(p.flatten()[0]) for name, p in model.named_parameters() if ".lora_A." in name)
        measured.setdefault(size, []).extend(batch["row"].tolist())
        return torch.tensor(size)

    data = Examples({"row": torch.arange(ROWS)})
    chosen = best_suited(starts, backbone, loss, data, settings)
    return list(measured.values()), chosen


def test_all_rows_or_so_many_the_same_for_every_adapter() -> None:
    for most in (0, ROWS, ROWS + 1):
        seen, chosen = seen_and_chosen(most)
        assert chosen == 5 and seen == [list(range(ROWS))] * 3
    seen, chosen = seen_and_chosen(7)
    assert chosen == 5 and seen == [seen[0]] * 3
    assert len(set(seen[0])) == 7 and seen[0] != list(range(7))  # not the first ones: rows may be sorted by document
    assert seen_and_chosen(7)[0] == seen
