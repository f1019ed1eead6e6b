"""The one check per reply: every fault has its reason, and nothing but Rejected ever comes out."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedgen_app.errors import DataError, PolicyError
from fedgen_app.federation import wire
from fedgen_app.federation.admission import Expected, Rejected, cap_examples, cap_weights, check, personal_metrics
from fedgen_app.federation.aggregation import change_norm, mean_of_factors
from fedgen_app.federation.method import Lora, Update
from fedgen_app.learning.adapters import Adapter, digest_of, layout_of
from fedgen_app.settings import AdmissionSettings

NUMBER = 3
LORA = Lora(2, 5.0)
A, B = "q_proj.lora_A.weight", "q_proj.lora_B.weight"
REFERENCE: Adapter = {A: torch.linspace(-1, 1, 6).reshape(2, 3), B: torch.linspace(0, 1, 8).reshape(4, 2)}
LAYOUT = layout_of(REFERENCE)
SIZE = 14
METRICS = {wire.NUM_EXAMPLES: 12, "train_loss": 2.5, "seconds": 1.0}


def expected(limit: float = 1000.0, action: str = "refuse", **changes: Any) -> Expected:
    limits = AdmissionSettings.model_validate({"max-update-norm": limit, "norm-action": action, "max-weight": 10})
    names = frozenset({"train_loss", "seconds"})
    return replace(Expected(NUMBER, LAYOUT, (), REFERENCE, LORA, "fp32", names, limits), **changes)


def adapter(value: float = 0.5) -> Adapter:
    return {key: torch.full(shape, value) for key, shape in LAYOUT}


def content(tensors: Adapter | None = None, **metrics: Any) -> RecordDict:
    return wire.reply(NUMBER, METRICS | metrics, wire.Parcel(tensors or adapter()))


def message(answer: RecordDict | Error) -> Message:
    question = Message(RecordDict(), 7, "train")
    return Message(answer, reply_to=question)


def reason(answer: RecordDict | Error, wanted: Expected | None = None) -> str:
    with pytest.raises(Rejected) as caught:
        check(message(answer), 5, wanted or expected())
    return caught.value.reason


def with_array(array: Array, key: str = wire.ARRAY) -> RecordDict:
    answer = content()
    answer["arrays"] = ArrayRecord({key: array})
    return answer


def with_facts(**facts: Any) -> RecordDict:
    answer = content()
    answer["reply"] = ConfigRecord({wire.ROUND: NUMBER, wire.LAYOUT: digest_of(LAYOUT)} | facts)
    return answer


def without_record(name: str) -> RecordDict:
    answer = content()
    return RecordDict({key: answer[key] for key in answer if key != name})


def with_record(name: str, record: ArrayRecord | MetricRecord | ConfigRecord) -> RecordDict:
    answer = content()
    answer[name] = record
    return answer


def with_metrics(metrics: dict[str, Any]) -> RecordDict:
    return with_record("metrics", MetricRecord(metrics))


def numbers(dtype: str = "f4", shape: tuple[int, ...] = (SIZE,)) -> Array:
    return Array(np.ones(shape, dtype))


def test_a_good_reply_becomes_an_update() -> None:
    update = check(message(content()), 5, expected())
    assert (update.client, update.rank, update.num_examples) == (5, LORA.rank, 12.0)
    assert update.metrics == {"train_loss": 2.5, "seconds": 1.0}
    assert layout_of(update.adapter) == LAYOUT
    assert all(torch.equal(update.adapter[key], tensor) for key, tensor in adapter().items())


FAULTS: list[tuple[str, RecordDict | Error]] = [
    ("error", Error(199, "secret")),
    ("error", Error(DataError.code)),
    ("policy", Error(PolicyError.code)),
    ("malformed", RecordDict()),
    ("malformed", without_record("arrays")),
    ("malformed", without_record("metrics")),
    ("malformed", without_record("reply")),
    ("malformed", with_record("more", ConfigRecord({}))),
    ("malformed", with_record("arrays", MetricRecord({}))),
    ("malformed", with_record("metrics", ConfigRecord({}))),
    ("malformed", with_record("reply", MetricRecord({}))),
    ("malformed", with_array(Array("float32", (SIZE,), "numpy.ndarray", b"rubbish"))),
    ("stale", with_facts(**{wire.ROUND: NUMBER - 1})),
    ("stale", with_facts(**{wire.ROUND: NUMBER + 1})),
    ("stale", with_facts(**{wire.ROUND: str(NUMBER)})),
    ("stale", with_record("reply", ConfigRecord({wire.LAYOUT: digest_of(LAYOUT)}))),
    ("keys", wire.reply(NUMBER, METRICS, wire.Parcel({A: adapter()[A]}))),
    ("keys", wire.reply(NUMBER, METRICS, wire.Parcel(adapter() | {"more.lora_A.weight": torch.ones(1)}))),
    ("keys", wire.reply(NUMBER, METRICS, wire.Parcel({A: torch.ones(3, 3), B: torch.ones(4, 3)}))),  # another rank
    ("keys", wire.reply(NUMBER, METRICS, wire.Parcel({A: torch.ones(1, 2), B: torch.ones(4, 2)}))),  # would broadcast
    ("keys", wire.reply(NUMBER, METRICS, wire.Parcel({A: torch.ones(()), B: torch.ones(4, 2)}))),
    ("keys", with_facts(**{wire.LAYOUT: 7})),
    ("keys", with_record("reply", ConfigRecord({wire.ROUND: NUMBER}))),
    ("keys", with_array(numbers(), "weights")),
    ("dtype", with_array(numbers("f8"))),
    ("dtype", with_array(numbers("f2"))),
    ("dtype", with_array(numbers("i4"))),
    ("shape", with_array(numbers(shape=(1, SIZE)))),
    ("shape", with_array(numbers(shape=()))),
    ("shape", with_array(numbers(shape=(1,)))),
    ("shape", with_array(Array("float32", (10**13,), "numpy.ndarray", numbers().data))),
    ("size", with_array(Array("float32", (SIZE,), "numpy.ndarray", numbers().data[:-4]))),
    ("size", with_array(numbers(shape=(10_000,)))),
    ("non-finite", content(adapter(math.nan))),
    ("non-finite", content(adapter(math.inf))),
    ("non-finite", content(adapter() | {B: torch.tensor([[0.0, 0.0]] * 3 + [[0.0, -math.inf]])})),
    ("weight", content(**{wire.NUM_EXAMPLES: 0})),
    ("weight", content(**{wire.NUM_EXAMPLES: -3})),
    ("weight", content(**{wire.NUM_EXAMPLES: math.nan})),
    ("weight", content(**{wire.NUM_EXAMPLES: 12.0})),
    ("weight", content(**{wire.NUM_EXAMPLES: 2**60})),
    ("weight", content(**{wire.NUM_EXAMPLES: [12]})),
    ("weight", with_metrics({"train_loss": 2.5, "seconds": 1.0})),
    ("metrics", with_metrics({wire.NUM_EXAMPLES: 12, "train_loss": 2.5})),
    ("metrics", content(accuracy=1.0)),
    ("metrics", content(train_loss=math.nan)),
    ("metrics", content(train_loss=math.inf)),
    ("metrics", content(train_loss=1e30)),
    ("metrics", content(train_loss=-1.0)),
    ("metrics", content(train_loss=[2.5])),
    ("metrics", content(seconds=math.inf)),
    ("norm", content(adapter(1e6))),
    ("norm", content(adapter(3e38))),
]


@pytest.mark.parametrize(("wanted", "answer"), FAULTS)
def test_every_fault_has_its_reason(wanted: str, answer: RecordDict | Error) -> None:
    assert reason(answer) == wanted


def test_a_boolean_is_no_count() -> None:
    answer = content()
    # Flower refuses it when it is set, a hostile node does not ask Flower.
    answer.metric_records["metrics"].__dict__["_data"][wire.NUM_EXAMPLES] = True
    assert reason(answer) == "weight"


def test_a_node_that_says_why_is_not_quoted() -> None:
    with pytest.raises(Rejected) as caught:
        check(message(Error(199, "secret prompt")), 5, expected())
    assert "secret" not in str(caught.value)


def test_the_norm_is_that_of_the_change_and_has_a_sharp_limit() -> None:
    norm = change_norm(adapter(), REFERENCE, LORA.scaling)
    assert check(message(content()), 5, expected(norm * 1.001))
    assert reason(content(), expected(norm * 0.999)) == "norm"
    assert check(message(content(adapter(1e6))), 5, expected(0))  # 0: no limit


def test_the_norm_of_a_change_in_one_factor_alone_counts_too() -> None:
    layout = layout_of({B: REFERENCE[B]})
    answer = wire.reply(NUMBER, METRICS, wire.Parcel({B: REFERENCE[B] + 1e6}))
    assert reason(answer, expected(layout=layout)) == "norm"
    clipped = check(message(answer), 5, expected(10, "clip", layout=layout)).adapter
    assert layout_of(clipped) == layout
    change = LORA.scaling * (clipped[B] - REFERENCE[B]).double() @ REFERENCE[A].double()
    assert torch.linalg.matrix_norm(change).item() == pytest.approx(10, rel=1e-3)


@pytest.mark.parametrize("value", [3.0, 1e6])
def test_clipping_pulls_the_change_back_along_its_line(value: float) -> None:
    far = adapter(value)
    got = check(message(content(far)), 5, expected(10, "clip")).adapter
    product = {True: got[B].double() @ got[A].double(), False: REFERENCE[B].double() @ REFERENCE[A].double()}
    norm = LORA.scaling * torch.linalg.matrix_norm(product[True] - product[False]).item()
    assert 9.9 < norm <= 10 * (1 + 1e-9)
    shares = torch.cat([((got[k] - REFERENCE[k]) / (far[k] - REFERENCE[k])).flatten() for k in far])
    assert shares.min() > 0 and shares.max() < 1
    torch.testing.assert_close(shares, shares.median().expand_as(shares), rtol=0.02, atol=1e-6)


def test_clipping_leaves_small_changes_alone() -> None:
    got = check(message(content()), 5, expected(1000, "clip")).adapter
    assert all(torch.equal(got[key], tensor) for key, tensor in adapter().items())


def updates(*weights: float) -> list[Update]:
    return [Update(i, {"x": torch.tensor([float(i)])}, 1, weight) for i, weight in enumerate(weights)]


def test_no_weight_counts_more_than_so_many_medians() -> None:
    capped = cap_weights(updates(10, 20, 30, 40, 1e12), 10)
    assert [u.num_examples for u in capped] == [10, 20, 30, 40, 300]
    assert [u.client for u in capped] == [0, 1, 2, 3, 4]
    mean = mean_of_factors([u.adapter for u in capped], [u.num_examples for u in capped])
    assert mean["x"].item() == pytest.approx((20 + 60 + 120 + 1200) / 400)


def test_weights_within_the_cap_or_without_one_stay() -> None:
    assert cap_weights(updates(1, 2, 3), 10) == updates(1, 2, 3)
    assert [u.num_examples for u in cap_weights(updates(1, 1, 1e12), 0)] == [1, 1, 1e12]
    assert cap_weights([], 10) == []


STATES = ("frozen", "global", "personal")
PERSONAL = {
    wire.NUM_EXAMPLES: 12,
    "frozen.word_perplexity": 90.0,
    "global.word_perplexity": 60.0,
    "personal.word_perplexity": 50.0,
}


NAMES_OF: dict[str, tuple[str, ...]] = {
    "word_perplexity": ("word_perplexity",),
    "kid": ("kid",),
    "kid_by_class_0": ("kid_by_class", "bag"),
    "kid_by_class_1": ("kid_by_class", "coat"),
}


def personal_reason(answer: RecordDict | Error | None) -> str:
    with pytest.raises(Rejected) as caught:
        personal_metrics(None if answer is None else message(answer), NUMBER, NAMES_OF)
    return caught.value.reason


def changed(changes: dict[str, Any]) -> RecordDict:
    metrics = {key: value for key, value in (PERSONAL | changes).items() if value is not None}
    return wire.reply(NUMBER, metrics)


def test_personal_metrics_are_sorted_into_their_states() -> None:
    assert personal_metrics(message(wire.reply(NUMBER, PERSONAL)), NUMBER, NAMES_OF) == {
        "examples": 12,
        "frozen": {"word_perplexity": 90.0},
        "global": {"word_perplexity": 60.0},
        "personal": {"word_perplexity": 50.0},
    }


@pytest.mark.parametrize(
    ("wanted", "answer"),
    [
        ("timeout", None),
        ("error", Error(199)),
        ("policy", Error(PolicyError.code)),
        ("malformed", RecordDict()),
        ("malformed", RecordDict({"metrics": MetricRecord(dict(PERSONAL))})),
        ("malformed", RecordDict({"metrics": ConfigRecord({}), "reply": ConfigRecord({wire.ROUND: NUMBER})})),
        ("stale", wire.reply(NUMBER - 1, PERSONAL)),
        ("weight", changed({wire.NUM_EXAMPLES: None})),
        ("weight", changed({wire.NUM_EXAMPLES: 0})),
        ("weight", changed({wire.NUM_EXAMPLES: 1.5})),
        ("metrics", changed({"personal.word_perplexity": None})),
        ("metrics", changed({"global.word_perplexity": math.nan})),
        ("metrics", changed({"global.word_perplexity": [60.0]})),
        ("metrics", changed({"global.more": 1.0})),
        ("metrics", changed({"secret.word_perplexity": 1.0})),
        ("metrics", changed({"word_perplexity": 1.0})),
        ("metrics", changed({f"{state}.a text with spaces": 1.0 for state in STATES})),
        # A good name, but not one that this task's clients may send: a name can be a message too.
        ("metrics", changed({f"{state}.bits_per_byte": 1.0 for state in STATES})),
        ("metrics", changed({f"{state}.kid_by_class_2": 1.0 for state in STATES})),
        ("metrics", changed({f"{state}.kid_by_class": 1.0 for state in STATES})),
        ("metrics", changed({f"{state}.kid_by_class_bag": 1.0 for state in STATES})),
        (
            "metrics",
            changed({"frozen.kid_by_class_0": 1.0, "global.kid_by_class_0": 1.0, "personal.kid_by_class_1": 1.0}),
        ),
        ("metrics", wire.reply(NUMBER, {wire.NUM_EXAMPLES: 12})),
    ],
)
def test_every_fault_of_a_personal_reply_has_its_reason(wanted: str, answer: RecordDict | Error | None) -> None:
    assert personal_reason(answer) == wanted


NAMES = st.sampled_from(["arrays", "metrics", "reply", "config", ""])
FACTS = st.sampled_from([wire.ROUND, wire.LAYOUT, wire.NUM_EXAMPLES, "train_loss", "seconds", "global.x"])
INTS = st.integers(-(2**63), 2**63 - 1) | st.just(NUMBER)
SCALARS = INTS | st.floats()
RECORDS = st.one_of(
    st.dictionaries(FACTS, SCALARS | st.lists(st.floats(), max_size=2)).map(MetricRecord),
    st.dictionaries(FACTS, SCALARS | st.booleans() | st.binary(max_size=3) | st.text(max_size=3)).map(ConfigRecord),
    st.builds(
        lambda dtype, shape, data: ArrayRecord({wire.ARRAY: Array(dtype, tuple(shape), "numpy.ndarray", data)}),
        st.sampled_from(["float32", "float16", "O", ""]),
        st.lists(st.integers(-1, 10**13), max_size=2),
        st.binary(max_size=200) | st.just(numbers().data),
    ),
    # And parts that are right, so that the later checks are reached.
    st.just(wire.reply(NUMBER, METRICS)["metrics"]),
    st.just(content()["reply"]),
    st.lists(st.floats(width=32), min_size=SIZE, max_size=SIZE).map(
        lambda values: ArrayRecord({wire.ARRAY: Array(np.array(values, "f4"))})
    ),
)
PARTS = st.dictionaries(NAMES, RECORDS) | st.fixed_dictionaries(
    {"arrays": RECORDS, "metrics": RECORDS, "reply": RECORDS}
)


@given(PARTS, st.sampled_from(["refuse", "clip"]))
def test_whatever_comes_it_is_an_update_or_rejected(parts: dict[str, Any], action: str) -> None:
    answer = message(RecordDict(parts))
    try:
        update = check(answer, 5, expected(action=action))
    except Rejected as rejection:
        assert rejection.reason
    else:
        assert layout_of(update.adapter) == LAYOUT
        assert change_norm(update.adapter, REFERENCE, LORA.scaling) <= 1000
    try:
        assert personal_metrics(answer, NUMBER, NAMES_OF)["examples"] > 0
    except Rejected as rejection:
        assert rejection.reason


def test_one_of_two_clients_cannot_raise_its_own_cap() -> None:
    updates = [Update(client, adapter(), 2, weight, metrics={}) for client, weight in ((1, 1.0), (2, 1e12))]
    for both in (updates, updates[::-1]):
        assert {u.client: u.num_examples for u in cap_weights(both, 10)} == {1: 1.0, 2: 10.0}
        assert [u.num_examples for u in cap_weights(both, 0)] == [u.num_examples for u in both]


def entry(client: int | str, examples: int = 10, *names: str) -> dict[str, Any]:
    measured = dict.fromkeys(names or ("loss",), 1.0)
    return {"client": client, "examples": examples, "frozen": measured, "global": measured, "personal": measured}


def test_examples_of_personal_entries_are_capped_as_weights_are() -> None:
    entries = [entry(1, 1), entry(2, 2**53)]
    assert [e["examples"] for e in cap_examples(entries, 10)] == [1, 10]
    assert entries[1]["examples"] == 2**53, "the entry that was given is changed"
    assert [e["examples"] for e in cap_examples(entries, 0)] == [1, 2**53]
    assert cap_examples([], 10) == []


def test_figures_by_class_travel_under_numbers_and_come_back_under_names() -> None:
    measured = {"word_perplexity": 3.0, "kid_by_class": {"coat": 0.25, "secret": 9.0}}
    sent: dict[str, Any] = {wire.NUM_EXAMPLES: 12}
    for state in STATES:
        sent |= wire.figures(state, measured, ("bag", "coat"))
    assert "secret" not in str(sent) and 9.0 not in sent.values()
    assert personal_metrics(message(wire.reply(NUMBER, sent)), NUMBER, NAMES_OF) == {
        "examples": 12,
        **dict.fromkeys(STATES, {"word_perplexity": 3.0, "kid_by_class": {"coat": 0.25}}),
    }


def test_a_factor_whose_partner_is_zero_has_a_norm_too() -> None:
    """Its product changes nothing, and yet the mean of A would be spoilt by it."""
    zero = REFERENCE | {B: torch.zeros_like(REFERENCE[B])}
    wanted = expected(limit=10.0, reference=zero)
    hostile = {A: REFERENCE[A] + 1e20, B: zero[B]}
    assert change_norm(hostile, zero, LORA.scaling) == 0
    assert reason(content(hostile), wanted) == "norm"
    clipped = check(message(content(hostile)), 3, expected(limit=10.0, action="clip", reference=zero)).adapter
    assert float((clipped[A] - REFERENCE[A]).norm()) == pytest.approx(10.0, rel=1e-4)
    assert check(message(content({A: REFERENCE[A], B: zero[B]})), 3, wanted).client == 3


def test_a_methods_own_tensors_are_bounded_too() -> None:
    extra = (("control", (2,)),)
    for size, told in ((1e20, "norm"), (math.nan, "non-finite")):
        parcel = wire.Parcel(adapter(), extra={"control": torch.full((2,), size)})
        assert reason(wire.reply(NUMBER, METRICS, parcel), expected(extra=extra)) == told
    good = wire.Parcel(adapter(), extra={"control": torch.ones(2)})
    assert check(message(wire.reply(NUMBER, METRICS, good)), 3, expected(extra=extra)).extra["control"].tolist() == [
        1,
        1,
    ]
    assert reason(content(), expected(extra=extra)) == "keys"
    assert reason(wire.reply(NUMBER, METRICS, wire.Parcel(adapter(), extra={"control": torch.ones(3)}))) == "keys"
