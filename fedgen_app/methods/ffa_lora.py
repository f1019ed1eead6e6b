"""FFA-LoRA (Sun et al. 2024, arXiv 2403.12313): A stays at its seeded start, only B is trained and averaged.

With one A for all, the mean of the products is the product of the mean: exact, and half of the uplink.
"""

from __future__ import annotations

from fedgen_app.federation.method import GlobalState, Method, Round
from fedgen_app.learning.adapters import Adapter


def is_b(key: str, round_: Round) -> bool:
    """Whether it is a factor B."""
    return ".lora_B." in key


def factors_b(state: GlobalState, round_: Round) -> Adapter:
    """B; every client draws the same A from the run's seed."""
    return {key: tensor for key, tensor in state.adapter.items() if is_b(key, round_)}


METHOD = Method(sends=factors_b, shares=is_b, trains=is_b)
