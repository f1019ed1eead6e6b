"""FedSA-LoRA (Guo et al. 2024, arXiv 2410.01463): both factors are trained, A is averaged, B is the client's own.

What the clients have in common goes into A, what is their own into B. There is no global model.
"""

from __future__ import annotations

from fedgen_app.federation.method import GlobalState, Method, Round
from fedgen_app.federation.robust import FACTOR_RULES, only
from fedgen_app.learning.adapters import Adapter


def is_a(key: str, round_: Round) -> bool:
    """Whether it is a factor A."""
    return ".lora_A." in key


def factors_a(state: GlobalState, round_: Round) -> Adapter:
    """A; B is where it was trained."""
    return {key: tensor for key, tensor in state.adapter.items() if is_a(key, round_)}


METHOD = Method(
    sends=factors_a,
    shares=is_a,
    has_global=False,
    refuses=only(
        *FACTOR_RULES, because="B never leaves a client, so that the server knows no product", layer_wise=False
    ),
)
