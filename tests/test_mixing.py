"""Level 2 against the dense oracle: what clusters learn from each other, and the global adapter."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from synthetic import Dense, a_round, assert_alive, assert_same, best, dense, norm, plus, random_adapter, start

from fedgen_app.federation.groups import Groups
from fedgen_app.federation.method import EPOCH, GlobalState, Lora, Round, load_method
from fedgen_app.federation.mixing import bounded, interact, with_global
from fedgen_app.settings import plugins

LORA = Lora(2, 7.0)
NUMBERS = (0, 3, 4)
EXAMPLES = {0: 10.0, 3: 25.0, 4: 5.0}
KINSHIP = {(0, 3): 0.8, (0, 4): 0.1, (3, 4): -0.2}
STRENGTH, TEMPERATURE = 0.3, 0.25
LOW = {"layers.0.q_proj": (6, (5,)), "layers.1.conv": (6, (2, 3, 3))}
PRODUCTS = ["fedgen-edge", "fedprox", "flexlora", "fedsvd", "rolora", "fedavgm", "scaffold", "hetlora", "fedrot-lora"]
PRODUCTS += ["fedadam", "fedyogi", "ditto", "apfl"]


def groups(residual_rank: int = 0, extra: bool = True, rank: int = 2) -> Groups:
    """Three clusters, each with an adapter of its own."""
    symmetric = KINSHIP | {(b, a): value for (a, b), value in KINSHIP.items()}
    states = {}
    for number in NUMBERS:
        beside = random_adapter(50 + number, residual_rank) if residual_rank else {}
        own = {"momentum": torch.ones(2)} if extra else {}
        states[number] = GlobalState(random_adapter(number + 1, rank), beside, own)
    clients = {f"client-{number}": number for number in NUMBERS}
    return Groups(states, states[0], clients, EXAMPLES, symmetric, {}, True, 5)


def settled(number: int = 1, lora: Lora = LORA, **overrides: object) -> Round:
    mixing = {"clusters__strength": STRENGTH, "clusters__temperature": TEMPERATURE}
    return a_round(lora, number, **(mixing | overrides))  # type: ignore[arg-type]


def heard(cluster: int) -> dict[int, float]:
    """The weights of all clusters in one's mixture, from the formula."""
    kinship = groups().kinship
    others = [n for n in NUMBERS if n != cluster]
    raised = {n: float(np.exp(kinship[cluster, n] / TEMPERATURE)) for n in others}
    return {cluster: 1 - STRENGTH} | {n: STRENGTH * raised[n] / sum(raised.values()) for n in others}


def whole(state: GlobalState, lora: Lora = LORA) -> Dense:
    """All that a state changes, formed in full."""
    found = dense(state.adapter, lora.scaling)
    return plus(found, dense(state.residual, 1.0)) if state.residual else found


def mixture(before: Groups, weights: dict[int, float]) -> Dense:
    parts = [(weight, whole(before.states[number])) for number, weight in weights.items()]
    return {name: sum(weight * part[name] for weight, part in parts) for name in parts[0][1]}  # type: ignore[misc]


@pytest.mark.parametrize("method", PRODUCTS)
def test_mixtures_are_the_best_of_their_rank(method: str) -> None:
    before, lora = groups(), LORA
    after, lost = interact(before, load_method(method), settled(lora=lora))
    for number in NUMBERS:
        exact = mixture(before, heard(number))
        nearest = best(exact, lora.rank)
        assert_same(whole(after.states[number]), nearest)
        discarded = norm(plus(exact, nearest, -1)) ** 2 / norm(exact) ** 2
        assert lost[number] == pytest.approx(discarded, rel=1e-6) and discarded > 0.01


def test_a_rank_that_holds_all_is_exact_and_can_go_on_learning() -> None:
    wide = Lora(8, 7.0)
    padded = groups(rank=8)
    low = {number: GlobalState(random_adapter(number + 1, 8, scale=1e-12) | _low(number)) for number in NUMBERS}
    before = dataclasses.replace(padded, states=low)
    after, lost = interact(before, load_method("fedgen-edge"), settled(lora=wide))
    for number in NUMBERS:
        parts = {n: dense(low[n].adapter, wide.scaling) for n in NUMBERS}
        exact = {name: sum(w * parts[n][name] for n, w in heard(number).items()) for name in parts[0]}
        assert_same(dense(after.states[number].adapter, wide.scaling), exact)  # type: ignore[arg-type]
        assert lost[number] < 1e-12
        assert_alive(after.states[number].adapter, {}, wide.scaling)


def _low(number: int) -> dict[str, torch.Tensor]:
    """An adapter of rank 8 whose products have rank 1, so that three of them have at most 3."""
    small, large = random_adapter(number + 1, 1), start(8, seed=number)
    return {
        key: torch.cat([small[key], tensor[1:] if ".lora_A." in key else tensor[:, 1:] * 0], 0 if "_A" in key else 1)
        for key, tensor in large.items()
    }


@pytest.mark.parametrize(("method", "shared"), [("ffa-lora", ".lora_B."), ("fedsa-lora", ".lora_A.")])
def test_one_shared_factor_is_mixed_linearly_and_the_other_stays(method: str, shared: str) -> None:
    before = groups()
    after, lost = interact(before, load_method(method), settled())
    for number in NUMBERS:
        for key, tensor in after.states[number].adapter.items():
            if shared in key:
                wanted = sum(w * before.states[n].adapter[key].double() for n, w in heard(number).items())
                assert torch.allclose(tensor.double(), wanted, atol=1e-6)  # type: ignore[arg-type]
            else:
                assert torch.equal(tensor, before.states[number].adapter[key])
        assert lost[number] == 0 and set(after.states[number].extra) == {"momentum"}


def test_with_a_fixed_factor_the_mixture_is_exact() -> None:
    before = groups()
    fixed = {key: tensor for key, tensor in before.states[0].adapter.items() if ".lora_A." in key}
    states = {n: dataclasses.replace(s, adapter=s.adapter | fixed) for n, s in before.states.items()}
    before = dataclasses.replace(before, states=states)
    after, _ = interact(before, load_method("ffa-lora"), settled())
    for number in NUMBERS:
        assert_same(whole(after.states[number]), mixture(before, heard(number)))


@pytest.mark.parametrize("method", ["flora", "fedex-lora"])
def test_a_residual_takes_the_mixture_and_the_adapter_stays(method: str) -> None:
    before = groups(residual_rank=3)
    after, lost = interact(before, load_method(method), settled(aggregation__residual_rank=64))
    for number in NUMBERS:
        assert_same(whole(after.states[number]), mixture(before, heard(number)))
        for key, tensor in after.states[number].adapter.items():
            assert torch.equal(tensor, before.states[number].adapter[key])
        assert lost[number] < 1e-9 and set(after.states[number].extra) == {"momentum"}


def test_a_residual_of_too_small_a_rank_says_what_it_loses() -> None:
    after, lost = interact(groups(residual_rank=3), load_method("flora"), settled(aggregation__residual_rank=2))
    assert all(share > 0.05 for share in lost.values())


def test_server_optimisers_and_variates_start_anew() -> None:
    after, _ = interact(groups(), load_method("fedavgm"), settled(number=6))
    assert all(state.extra == {} for state in after.states.values())
    after, _ = interact(groups(), load_method("scaffold"), settled(number=6))
    assert [after.states[n].extra[EPOCH].tolist() for n in NUMBERS] == [[n, 6] for n in NUMBERS]


@pytest.mark.parametrize("method", sorted(set(plugins("methods")) - {"fedper", "local-only", "centralized"}))
def test_without_strength_or_company_nothing_changes(method: str) -> None:
    before = groups()
    assert interact(before, load_method(method), settled(clusters__strength=0.0)) == (before, {})
    alone = dataclasses.replace(before, states={3: before.states[3]})
    assert interact(alone, load_method(method), settled()) == (alone, {})


def test_full_strength_listens_to_the_others_alone() -> None:
    before = groups()
    after, _ = interact(before, load_method("flexlora"), settled(clusters__strength=1.0))
    weights = {n: w / STRENGTH for n, w in heard(3).items() if n != 3}
    assert_same(whole(after.states[3]), best(mixture(before, weights), 2))


def test_unknown_likeness_is_the_same_for_all() -> None:
    before = dataclasses.replace(groups(), kinship={})
    after, _ = interact(before, load_method("fedgen-edge"), settled())
    assert_same(whole(after.states[0]), best(mixture(before, {0: 1 - STRENGTH, 3: STRENGTH / 2, 4: STRENGTH / 2}), 2))


def test_layers_that_stay_on_clients_stay() -> None:
    """FedPer shares the first block alone."""
    round_ = settled(fedper__personal_blocks=1)
    before = groups()
    after, _ = interact(before, load_method("fedper"), round_)
    for key, tensor in after.states[3].adapter.items():
        assert torch.equal(tensor, before.states[3].adapter[key]) is (".1." in key)


@pytest.mark.parametrize("method", PRODUCTS)
def test_the_global_adapter_is_the_mean_by_examples(method: str) -> None:
    before = groups()
    after, lost = with_global(before, load_method(method), settled())
    exact = mixture(before, {n: count / 40 for n, count in EXAMPLES.items()})
    assert_same(whole(after.shared), best(exact, 2))
    assert lost > 0.05 and after.shared.extra == {}
    assert after.states == before.states  # it does not feed back


@pytest.mark.parametrize("method", ["flora", "fedex-lora"])
def test_the_global_adapter_of_residuals(method: str) -> None:
    before = groups(residual_rank=3)
    after, lost = with_global(before, load_method(method), settled())
    assert_same(whole(after.shared), mixture(before, {n: count / 40 for n, count in EXAMPLES.items()}))
    assert lost < 1e-9
    assert_alive(after.shared.adapter, after.shared.residual, LORA.scaling)


def test_one_clusters_global_adapter_is_its_own() -> None:
    alone = dataclasses.replace(groups(), states={3: groups().states[3]})
    after, lost = with_global(alone, load_method("fedgen-edge"), settled())
    assert after.shared is alone.states[3] and lost == 0


def test_the_same_clusters_give_the_same_bits() -> None:
    one, other = (interact(groups(), load_method("fedgen-edge"), settled())[0] for _ in range(2))
    for number in NUMBERS:
        for key, tensor in one.states[number].adapter.items():
            assert torch.equal(tensor, other.states[number].adapter[key])


@pytest.mark.parametrize("residual_rank", [0, 3])
def test_behind_a_robust_rule_no_cluster_is_longer_for_others_than_the_median(residual_rank: int) -> None:
    before, method = groups(residual_rank), load_method("flora" if residual_rank else "fedgen-edge")
    key = next(key for key in before.states[3].adapter if ".lora_B." in key)
    loud = dataclasses.replace(
        before.states[3], adapter=before.states[3].adapter | {key: 1e4 * before.states[3].adapter[key]}
    )
    before = dataclasses.replace(before, states={**before.states, 3: loud})
    assert bounded(before, method, settled()) == dict.fromkeys(NUMBERS, 1.0)
    guarded = settled(aggregation__robust="norm-bound", aggregation__norm_bound=1.5)
    norms = {number: norm(whole(state)) for number, state in before.states.items()}
    limit = 1.5 * sorted(norms.values())[1]
    wanted = {number: min(1.0, limit / norms[number]) for number in NUMBERS}
    heeded = bounded(before, method, guarded)
    assert heeded == pytest.approx(wanted) and heeded[3] < 0.01
    after, _ = interact(before, method, guarded)
    others = {number: weight * (1 if number == 0 else wanted[number]) for number, weight in heard(0).items()}
    exact = mixture(before, others)
    if residual_rank:
        assert_same(whole(after.states[0]), exact)
    else:
        assert_same(whole(after.states[0]), best(exact, LORA.rank))
    total = sum(EXAMPLES.values())
    mean = mixture(before, {number: EXAMPLES[number] / total * wanted[number] for number in NUMBERS})
    assert norm(whole(with_global(before, method, guarded)[0].shared)) <= norm(mean) * (1 + 1e-5)


def test_what_only_clusters_without_enough_members_are_does_not_bound_the_others() -> None:
    before = groups()
    members = {f"client-{number}": 0 if number < 3 else 3 for number in range(4)}
    small = {key: 1e-3 * tensor for key, tensor in before.states[3].adapter.items()}
    before = dataclasses.replace(before, where=members, states={0: before.states[0], 3: GlobalState(small)})
    guarded = settled(aggregation__robust="norm-bound")
    assert bounded(before, load_method("fedgen-edge"), guarded) == {0: 1.0, 3: 1.0}
