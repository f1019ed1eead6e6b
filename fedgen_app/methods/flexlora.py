"""FlexLoRA (Bai et al. 2024, arXiv 2402.11505): the best approximation of the mean product, at any mixture of ranks.

sum of p_k s_k B_k A_k = U S V^T, cut to the largest rank; B = U sqrt(S) / s and A = sqrt(S) V^T. A client of a smaller
rank takes the first directions, which are the best of their number, with its own s.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedgen_app.federation.aggregation import discarded, mean_of_products, refactored
from fedgen_app.federation.lowrank import as_factors, truncate
from fedgen_app.federation.method import GlobalState, Lora, Method, Round, Update
from fedgen_app.federation.robust import PRODUCT_RULES, only
from fedgen_app.learning.adapters import Adapter
from fedgen_app.seeds import derive


def rule(state: GlobalState, updates: Sequence[Update], round_: Round) -> GlobalState:
    """SVD from factors; directions that vanish are refilled, so that they can learn again."""
    adapter, layers = dict(state.adapter), []
    for key_a, key_b, product in mean_of_products(updates, round_.lora):
        seed = derive(round_.seed, "refill", key_a)
        pair, energy = refactored(product, round_.lora.rank, round_.lora.scaling, seed)
        layers.append(energy)
        adapter |= as_factors(pair, state.adapter, key_a, key_b)
    return GlobalState(adapter, state.residual, state.extra, {"discarded_energy": discarded(layers)})


def fit(adapter: Adapter, lora: Lora, own: Lora) -> Adapter:
    """The first directions, with B at the client's own scaling."""
    return truncate(adapter, own.rank, times_b=lora.scaling / own.scaling)


METHOD = Method(rule=rule, fit=fit, refuses=only(*PRODUCT_RULES, because="it averages products and not factors"))
