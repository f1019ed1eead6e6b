"""FedEx-LoRA (Singhal et al. 2024, arXiv 2410.09432): means of A and B, and their error goes into the residual.

residual += sum of p_k s B_k A_k - s mean(B) mean(A). Exact up to what ``aggregation.residual-rank`` discards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedgen_app.federation.aggregation import absorb, mean_of_factors, mean_of_products
from fedgen_app.federation.lowrank import Pair, as_pair, stack
from fedgen_app.federation.method import GlobalState, Method, Round, Update
from fedgen_app.federation.robust import PRODUCT_RULES, only


def rule(state: GlobalState, updates: Sequence[Update], round_: Round) -> GlobalState:
    """Means for the adapter, their error for the residual; ``discarded_energy``: what its rank could not hold."""
    mean = mean_of_factors([u.adapter for u in updates], [u.num_examples for u in updates])

    def errors() -> Iterator[tuple[str, str, Pair]]:
        # Of the means as they are sent, in float32: the residual makes up for that rounding too.
        for key_a, key_b, product in mean_of_products(updates, round_.lora):
            yield key_a, key_b, stack([product, as_pair(mean, key_a, key_b)], [1, -round_.lora.scaling])

    rank = round_.settings.aggregation.residual_rank
    residual, lost = absorb(state.residual, errors(), state.adapter, rank)
    return GlobalState(state.adapter | mean, residual, state.extra, {"discarded_energy": lost})


METHOD = Method(rule=rule, refuses=only(*PRODUCT_RULES, because="a mean of products stands beside that of factors"))
