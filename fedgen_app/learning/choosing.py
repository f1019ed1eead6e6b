"""Which of several adapters suits a client's data best."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fedgen_app.learning import adapters
from fedgen_app.learning.adapters import Adapter
from fedgen_app.learning.backbone import Backbone
from fedgen_app.learning.task import Examples, Loss
from fedgen_app.seeds import derive
from fedgen_app.settings import Settings


@torch.no_grad()
def best_suited(
    starts: Mapping[int, tuple[Adapter, Adapter]],
    backbone: Backbone,
    loss: Loss,
    data: Examples,
    settings: Settings,
) -> int:
    """The cluster whose adapter (and residual) has the least mean loss on the client's own data, under the same noise.

    Ghosh et al. 2020 (IFCA, arXiv 2006.04088). Of equals the first. Compared on ``clusters.loss-examples`` of the data,
    the same for every cluster and in every round.
    """
    losses, rows, most = {}, torch.arange(len(data)), settings.clusters.loss_examples
    if 0 < most < len(data):
        drawing = torch.Generator().manual_seed(derive(settings.seed, "choose cluster", "examples"))
        rows = torch.randperm(len(data), generator=drawing)[:most]
    shared = {name: tensor.to(backbone.device) for name, tensor in data.shared.items()}
    for cluster in sorted(starts):
        adapters.write(backbone.model, *starts[cluster])
        backbone.model.eval()
        noise = torch.Generator(backbone.device).manual_seed(derive(settings.seed, "choose cluster"))
        total = 0.0
        for indices in torch.split(rows, settings.batch_size):
            batch = shared | {name: tensor[indices].to(backbone.device) for name, tensor in data.rows.items()}
            total += float(loss(backbone.model, batch, noise)) * len(indices)
        losses[cluster] = total
    return min(losses, key=lambda cluster: losses[cluster])
