"""What a device may ask the inference service, and which answer a wrong request gets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from serving import FINGERPRINT, frame, image_body

from fedgen_app.errors import ServiceError
from fedgen_app.federation.hybrid import likened
from fedgen_app.learning.mixture import Mixture
from fedgen_app.serving import body
from fedgen_app.serving.asks import GLOBAL, parse

VECTORS = torch.nn.functional.normalize(torch.tensor([[1.0, 2, 0, 0, 1], [0.0, 1, 1, 0, 0]]), dim=1)
SPACE = "0123456789abcdef"
NAMED = torch.tensor([2, 0])
ROWS = torch.tensor([[1.0, 3.0], [2.0, 0.0]], dtype=torch.float64)


def adapter_body(**tensors: Any) -> bytes:
    facts = {"backbone": FINGERPRINT} | ({"space": SPACE} if "vector" in tensors else {})
    return body.write(tensors, facts)


def test_a_request_is_read_whole() -> None:
    ask = parse("images", image_body({"clusters": NAMED, "weights": ROWS}, sampler="dpm-solver"), frame())
    assert ask.mixtures == (Mixture.of({2: 1, 0: 3}), Mixture.of({2: 1}))
    assert (ask.seed, ask.steps, ask.guidance, ask.sampler, ask.done) == (1, 6, 3.0, "dpm-solver", 0)
    assert ask.prompt.shape == (2, 4, 3)
    half = parse("latents", image_body(done="2", seed=str(2**63 - 1)), frame())
    assert half.mixtures == (Mixture.of({GLOBAL: 1}),) * 2
    assert half.done == 2 and half.together != ask.together
    assert parse("adapters", adapter_body(), frame()).mixtures == (Mixture.of({GLOBAL: 1}),)


def test_a_vector_is_likened_to_the_centroids() -> None:
    known = frame()
    ask = parse("images", image_body({"vector": VECTORS}, space=SPACE), known)
    assert ask.mixtures == tuple(likened(row, known.centroids, 0.1) for row in VECTORS.double().numpy())
    alone = parse("adapters", adapter_body(vector=VECTORS[:1]), known)
    assert alone.mixtures == ask.mixtures[:1]


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"fingerprint": "sha256:" + "cd" * 32}, 409, "another backbone"),
        ({"fingerprint": "mine"}, 422, "backbone"),
        ({"without": "backbone"}, 422, "backbone"),
        ({"without": "seed"}, 422, "seed: should be a whole number from 0"),
        ({"seed": "-1"}, 422, "seed"),
        ({"seed": str(2**63)}, 422, "seed"),
        ({"seed": "1e3"}, 422, "seed"),
        ({"seed": "1９"}, 422, "seed"),
        ({"steps": "0"}, 422, "steps: should be a whole number from 1 to 20"),
        ({"steps": "21"}, 422, "steps"),
        ({"guidance": "nan"}, 422, "guidance"),
        ({"guidance": "-1"}, 422, "guidance"),
        ({"guidance": "101"}, 422, "guidance"),
        ({"sampler": "euler"}, 422, "sampler: should be ddim or dpm-solver"),
        ({"text": "a photo of a cat"}, 422, "0 tensors and 1 facts too many"),
        ({"done": "2"}, 422, "facts too many"),
        ({"tensors": {"prompt": None}}, 422, "prompt is missing"),
        ({"tensors": {"prompt": torch.zeros(4, 4, 3)}}, 422, "prompt: should have 1 to 3 rows"),
        ({"tensors": {"prompt": torch.zeros(0, 4, 3)}}, 422, "prompt: should have 1 to 3 rows"),
        ({"tensors": {"prompt": torch.zeros(2, 3, 4)}}, 422, "prompt: should be float32 of shape (rows, 4, 3)"),
        ({"tensors": {"prompt": torch.zeros(2, 4, 3).double()}}, 422, "prompt: should be float32"),
        ({"tensors": {"tokens": torch.tensor([[5, 3]])}}, 422, "1 tensors and 0 facts too many"),
        ({"tensors": {"vector": VECTORS}}, 422, "vector and space go together"),
        ({"space": SPACE}, 422, "vector and space go together"),
        ({"tensors": {"vector": VECTORS}, "space": "f" * 16}, 409, "another secret key"),
        ({"tensors": {"vector": VECTORS[:1]}, "space": SPACE}, 422, "a row for each image"),
        ({"tensors": {"vector": 2 * VECTORS}, "space": SPACE}, 422, "each row should have length 1"),
        ({"tensors": {"vector": VECTORS[:, :4]}, "space": SPACE}, 422, "vector: should be float32 of shape (rows, 5)"),
        ({"tensors": {"weights": ROWS}}, 422, "should have clusters and weights, or vector"),
        ({"tensors": {"clusters": NAMED}}, 422, "should have clusters and weights, or vector"),
        (
            {"tensors": {"clusters": NAMED, "weights": ROWS, "vector": VECTORS}, "space": SPACE},
            422,
            "should have clusters and weights, or vector",
        ),
        ({"tensors": {"clusters": torch.tensor([0, 1]), "weights": ROWS}}, 422, "each once; there are 0, 2"),
        ({"tensors": {"clusters": torch.tensor([0, 0]), "weights": ROWS}}, 422, "each once; there are 0, 2"),
        ({"tensors": {"clusters": torch.tensor([0, GLOBAL]), "weights": ROWS}}, 422, "there are 0, 2"),
        ({"tensors": {"clusters": NAMED.float(), "weights": ROWS}}, 422, "clusters: should be whole numbers"),
        ({"tensors": {"clusters": NAMED, "weights": ROWS.float()}}, 422, "weights: should be float64"),
        ({"tensors": {"clusters": NAMED, "weights": -ROWS}}, 422, "weights: "),
        ({"tensors": {"clusters": NAMED, "weights": 0 * ROWS}}, 422, "weights: one weight"),
        ({"tensors": {"clusters": NAMED[:1], "weights": ROWS}}, 422, "weights: should be float64 of shape (rows, 1)"),
    ],
)
def test_a_wrong_value_is_named_and_not_repeated(changes: dict[str, Any], status: int, message: str) -> None:
    with pytest.raises(ServiceError) as refused:
        parse("images", image_body(**changes), frame())
    assert (refused.value.status, message in str(refused.value)) == (status, True), refused.value
    assert "cat" not in str(refused.value)


@pytest.mark.parametrize("changes", [{}, {"done": "0"}, {"done": "6"}, {"done": "2", "sampler": "dpm-solver"}])
def test_half_an_image_is_one_of_ddim_that_is_neither_begun_nor_finished(changes: dict[str, str]) -> None:
    with pytest.raises(ServiceError) as refused:
        parse("latents", image_body(**changes), frame())
    assert refused.value.status == 422


def test_what_a_run_does_not_have_is_not_given() -> None:
    for kind, data, changes, status in (
        ("images", image_body(), {"shapes": None}, 404),
        ("images", image_body(), {"has_global": False}, 422),
        ("adapters", adapter_body(), {"has_global": False}, 422),
        ("adapters", adapter_body(vector=VECTORS[:1]), {"centroids": {}}, 422),
        ("adapters", adapter_body(vector=VECTORS), {}, 422),
        ("adapters", adapter_body(prompt=torch.zeros(1, 4, 3)), {}, 422),
        ("adapters", b"the sea", {}, 400),
    ):
        with pytest.raises(ServiceError) as refused:
            parse(kind, data, frame(**changes))  # type: ignore[arg-type]
        assert refused.value.status == status, (kind, changes)


def test_the_largest_request_fits_into_the_largest_body() -> None:
    known = frame(most_images=2)
    largest = image_body({"clusters": NAMED, "weights": ROWS}, seed=str(2**63 - 1))
    assert len(parse("images", largest, known).mixtures) == 2
    assert len(largest) <= known.most_bytes < len(largest) + body.MOST_HEADER + 100
