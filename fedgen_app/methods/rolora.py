"""RoLoRA (Chen et al. 2024, arXiv 2409.02346): the factors take turns, B in odd rounds and A in even ones.

The other factor is the same for all, so that the mean of the products is the product of the mean. B is first, because
A's gradient is exactly zero as long as B is.
"""

from __future__ import annotations

from fedgen_app.federation.method import Method, Round


def takes_its_turn(key: str, round_: Round) -> bool:
    """Whether the factor is averaged in this round."""
    return (".lora_B." if round_.number % 2 else ".lora_A.") in key


def learns(key: str, round_: Round) -> bool:
    """As ``takes_its_turn``; after the last round nothing is averaged any more, and both learn."""
    return round_.number > round_.settings.num_server_rounds or takes_its_turn(key, round_)


METHOD = Method(shares=takes_its_turn, trains=learns)
