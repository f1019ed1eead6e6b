"""FLoRA (Wang et al. 2024, arXiv 2409.05976): the clients' factors are stacked, which is exact at any mixture of ranks.

dW* = sum of p_k s_k B_k A_k = [B_1 .. B_n] [p_1 s_1 A_1; ..; p_n s_n A_n] goes into the residual, and the adapter
starts afresh. The residual is compressed to ``aggregation.residual-rank``; only what that discards is lost.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedgen_app.federation.aggregation import absorb, mean_of_products
from fedgen_app.federation.lowrank import truncate
from fedgen_app.federation.method import GlobalState, Lora, Method, Round, Update
from fedgen_app.federation.robust import PRODUCT_RULES, only
from fedgen_app.learning.adapters import Adapter, fresh, layout_of
from fedgen_app.seeds import derive


def rule(state: GlobalState, updates: Sequence[Update], round_: Round) -> GlobalState:
    """The stacked products join the residual; ``discarded_energy`` says which share of it the rank could not hold."""
    rank = round_.settings.aggregation.residual_rank
    residual, lost = absorb(state.residual, mean_of_products(updates, round_.lora), state.adapter, rank)
    adapter = fresh(layout_of(state.adapter), derive(round_.seed, "fresh"))
    return GlobalState(adapter, residual, state.extra, {"discarded_energy": lost})


def fit(adapter: Adapter, lora: Lora, own: Lora) -> Adapter:
    """The first rows of A; B, zero after every round, is scaled to the client's own scaling."""
    return truncate(adapter, own.rank, times_b=lora.scaling / own.scaling)


METHOD = Method(rule=rule, fit=fit, refuses=only(*PRODUCT_RULES, because="it averages products and not factors"))
