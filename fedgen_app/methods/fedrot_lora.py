"""FedRot-LoRA (Zhang et al. 2026, arXiv 2602.23638): clients rotate their factors onto the received ones, then average.

B R and R^T A have the product B A for every orthogonal R; R is chosen so that all clients write down their products in
one basis, and the mean of the factors comes closer to that of the products.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fedgen_app.federation.local import Learned, Lesson, plain
from fedgen_app.federation.lowrank import as_factors, as_pair
from fedgen_app.federation.method import Method
from fedgen_app.learning.adapters import Adapter, pairs


def aligned(trained: Adapter, received: Adapter, strength: float) -> Adapter:
    """The trained products in factors turned towards the received ones.

    R minimises ||B R - B'||^2 + ||R^T A - A'||^2 (orthogonal Procrustes), where B' and A' lie between the trained
    factors (strength 0: R = 1) and the received ones (strength 1). So R is orthogonal at every strength, and also
    where the full alignment is a reflection, which has no fractional power.
    """
    turned = dict(trained)
    for key_a, key_b in pairs(trained):
        (b, a), (b_old, a_old) = as_pair(trained, key_a, key_b), as_pair(received, key_a, key_b)
        target_b, target_a = b + strength * (b_old - b), a + strength * (a_old - a)
        u, _, v = torch.linalg.svd(b.T @ target_b + a @ target_a.T)
        rotation = u @ v
        turned |= as_factors((b @ rotation, rotation.T @ a), trained, key_a, key_b)
    return turned


def local(lesson: Lesson) -> Learned:
    """FedAvg's client, and the rotation; the model that it trained computes the same with either."""
    learned = plain(lesson)
    return replace(learned, adapter=aligned(learned.adapter, lesson.start, lesson.round.settings.fedrot.strength))


METHOD = Method(local=local)
