"""The device's side: a prompt encoded here, a request there, and what is finished here with the device's adapter."""

from __future__ import annotations

import math
import ssl
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import httpx
import torch
from torch import Tensor

from fedgen_app.errors import DataError, ServiceError
from fedgen_app.federation.hybrid import turned
from fedgen_app.learning import mixture
from fedgen_app.learning.adapters import Adapter, at_rank
from fedgen_app.learning.backbone import Backbone
from fedgen_app.learning.mixture import Mixture
from fedgen_app.learning.task import Sample, Shapes, Stages, Task
from fedgen_app.serving import asks, body
from fedgen_app.serving.asks import Kind
from fedgen_app.settings import Settings

MOST_ADAPTER_HEADER = 8 * 1024**2  # bytes: two keys for each layer of a large model
MOST_ERROR = 4096  # bytes of an answer that refuses
MOST_CLUSTERS = 256  # of which one adapter is mixed, where the settings do not say how many there are
TRIES = 5  # times that a service is asked that is busy, or ends a connection without an answer
LONGEST_WAIT = 60.0  # seconds between them
ENDED_WAIT = 2.0  # the same, where it did not say how many
BUSY = (429, 503)  # what a service says that may be asked again
TIMEOUTS = httpx.Timeout(330.0, connect=10.0)  # a little more than a service's own patience


@dataclass
class Remote:
    """A service.

    Attributes:
        sent: Bytes of bodies.
        received: Bytes of answers.
    """

    client: httpx.Client
    url: str
    token: str
    fingerprint: str
    sent: int = field(default=0, init=False)
    received: int = field(default=0, init=False)

    def post(self, kind: Kind, tensors: Mapping[str, Tensor], facts: Mapping[str, str], most: int) -> bytes:
        """The answer's body; asked again where the service is busy.

        Raises:
            ServiceError: it refuses, or there is no answer, or one of more than ``most`` bytes.
        """
        content = body.write(tensors, {**facts, asks.BACKBONE: self.fingerprint})
        return self._answer("POST", kind, content, {"Content-Type": body.MEDIA_TYPE}, most)

    def check_space(self, space: str) -> None:
        """Whether the service compares vectors of this space; asked first, as one that was not turned tells too much.

        Raises:
            ServiceError: it does not, or there is no answer.
        """
        asks.check_space(space, self._answer("GET", asks.SPACE, b"", {}, MOST_ERROR).decode("utf-8", "replace"))

    def _answer(self, method: str, path: str, content: bytes, headers: Mapping[str, str], most: int) -> bytes:
        headers = {**headers, "Accept-Encoding": "identity"}
        headers |= {"Authorization": f"Bearer {self.token}"} if self.token else {}
        for last in (False,) * (TRIES - 1) + (True,):
            self.sent += len(content)
            try:
                status, found, later = self._once(method, path, content, headers, most)
            except httpx.TransportError as error:
                if last or not _ended(error):
                    raise ServiceError(0, f"{self.url}: {str(error) or type(error).__name__}") from None
                time.sleep(ENDED_WAIT)
                continue
            if status == 200:
                return found
            if status not in BUSY or last:
                said = found[:500].decode("utf-8", "replace")
                raise ServiceError(status, f"{self.url}: HTTP {status}: {said}")
            time.sleep(later)
        raise AssertionError("unreachable")

    def _once(
        self, method: str, path: str, content: bytes, headers: Mapping[str, str], most: int
    ) -> tuple[int, bytes, float]:
        found = bytearray()
        url = f"{self.url}/v1/{path}"
        with self.client.stream(method, url, content=content, headers=headers, timeout=TIMEOUTS) as answer:
            for piece in answer.iter_raw():  # never unpacked: what it would become has no bound
                found += piece
                if answer.status_code != 200 and len(found) >= MOST_ERROR:
                    break
                if len(found) > most:
                    raise ServiceError(0, f"{self.url}: an answer of more than {most} bytes")
        self.received += len(found)
        wait = answer.headers.get("Retry-After", "1")
        return answer.status_code, bytes(found), min(float(wait) if wait.isdecimal() else 1.0, LONGEST_WAIT)


def _ended(error: httpx.TransportError) -> bool:
    """Whether the connection was there and was ended from the other side."""
    cause: BaseException | None = error
    while cause:
        if isinstance(cause, (httpx.RemoteProtocolError, ConnectionResetError, BrokenPipeError, ssl.SSLEOFError)):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


@dataclass(frozen=True)
class Choice:
    """Which of the service's adapters is to act, for each prompt: as tensors with a row each, and facts."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        settings: Settings,
        task: Task,
        backbone: Backbone,
        texts: Sequence[str],
        mixes: Sequence[Mapping[int, float] | None],
        key: bytes,
        encoder: str = "",
    ) -> Choice:
        """From explicit weights for each text, or from the texts, encoded and turned here (None for each).

        Args:
            encoder: As in ``turned``.

        Raises:
            SettingsError: there is no text to go by.
            DataError: a prompt has no direction.
        """
        given = [weights for weights in mixes if weights is not None]
        if given:
            named = sorted({cluster for weights in given for cluster in weights})
            rows = [[weights.get(cluster, 0.0) for cluster in named] for weights in given]
            return cls({asks.CLUSTERS: torch.tensor(named), asks.WEIGHTS: torch.tensor(rows, dtype=torch.float64)})
        if not mixes:
            return cls()
        vectors, space = turned(settings, task, backbone, texts, key, encoder)
        return cls({asks.VECTOR: torch.from_numpy(vectors).float()}, {asks.SPACE: space})

    def rows(self, numbers: Sequence[int]) -> Mapping[str, Tensor]:
        """The tensors for prompts by their places, which may be named several times."""
        chosen = list(numbers)
        return {n: tensor if n == asks.CLUSTERS else tensor[chosen] for n, tensor in self.tensors.items()}


def draw(
    remote: Remote,
    settings: Settings,
    task: Task,
    backbone: Backbone,
    texts: Sequence[str],
    count: int,
    seed: int,
    choice: Choice,
    split: int,
) -> list[Sample]:
    """So many images of each text: all steps there, or ``split`` of them, and the rest here with the model as it is.

    Raises:
        ServiceError: the service refuses, or answers something else than what was asked for.
    """
    stages = cast(Stages, task.stages)
    shapes, options = stages.shapes(settings, backbone), settings.samples
    places = [number for number in range(len(texts)) for _ in range(count)]
    all_texts = [texts[place] for place in places]
    encoded = stages.encode(backbone, texts)[places]
    steps = min(options.steps, shapes.steps)
    facts = {
        asks.SEED: str(seed),
        asks.STEPS: str(steps),
        asks.GUIDANCE: repr(options.guidance),
        asks.SAMPLER: "ddim" if split else options.sampler,
        **choice.facts,
    }
    tensors = {asks.PROMPT: encoded, **choice.rows(places)}
    try:
        if not split:
            # A PNG of noise is a little larger than its pixels.
            most = body.MOST_HEADER + 2 * len(places) * math.prod(shapes.content)
            data = remote.post("images", tensors, facts, most)
            contents = stages.unpack(settings, backbone, data, len(places))
        else:
            most = body.LENGTH + body.MOST_HEADER + 4 * len(places) * math.prod(shapes.latent)
            data = remote.post("latents", tensors, facts | {asks.DONE: str(split)}, most)
            half = _latents(data, shapes, len(places), split)
            here = settings.sampling(sampler="ddim", steps=steps)
            contents = stages.finish(backbone, stages.advance(here, backbone, encoded, half, split, steps))
    except (body.MalformedError, DataError) as error:
        raise ServiceError(0, f"{remote.url}: not what was asked for: {error}") from None
    return [Sample(text, content) for text, content in zip(all_texts, contents, strict=True)]


def _latents(data: bytes, shapes: Shapes, count: int, split: int) -> Tensor:
    tensors, facts = body.read(data)
    found = tensors.get("latents")
    if found is None or found.dtype != torch.float32 or tuple(found.shape) != (count, *shapes.latent):
        raise body.MalformedError(f"no latents of shape {(count, *shapes.latent)}")
    if facts != {asks.DONE: str(split)}:
        raise body.MalformedError(f"not after {split} steps")
    return found


def write_with(
    remote: Remote,
    settings: Settings,
    task: Task,
    backbone: Backbone,
    texts: Sequence[str],
    count: int,
    seed: int,
    choice: Choice,
) -> list[Sample]:
    """So many of each text, generated here with the adapter that the service mixes for it.

    Raises:
        ServiceError: the service refuses, or answers something else than an adapter of this run.
        AdapterError: the adapter does not fit the backbone.
    """
    each = [choice.rows([number]) for number in range(len(texts))] if choice.tensors else [choice.tensors]
    parts = {number: fetch(remote, settings, backbone, rows, choice.facts) for number, rows in enumerate(each)}
    places = [number for number in range(len(texts)) for _ in range(count)]
    alone = [Mixture.of({place if choice.tensors else 0: 1.0}) for place in places]
    with mixture.active(backbone.model, parts, alone) as rows:
        return task.sample(settings, backbone, [texts[place] for place in places], seed, rows)


def fetch(
    remote: Remote, settings: Settings, backbone: Backbone, rows: Mapping[str, Tensor], facts: Mapping[str, str]
) -> Adapter:
    """The mixed adapter of one prompt.

    Raises:
        ServiceError: the service refuses, or answers something else than an adapter that is scaled as this run's.
    """
    try:
        data = remote.post("adapters", rows, facts, most_of_adapter(settings, backbone, rows))
        adapter, told = body.read(data, MOST_ADAPTER_HEADER)
    except body.MalformedError as error:
        raise ServiceError(0, f"{remote.url}: no adapter: {error}") from None
    if told != asks.scaled(backbone) or any(tensor.dtype != torch.float32 for tensor in adapter.values()):
        raise ServiceError(0, f"{remote.url}: an adapter of another run than these settings are of")
    return adapter


def most_of_adapter(settings: Settings, backbone: Backbone, rows: Mapping[str, Tensor]) -> int:
    """Bytes that a mixed adapter can have: so many clusters' ranks, residuals included, side by side."""
    clusters = len(rows[asks.CLUSTERS]) if asks.CLUSTERS in rows else 1
    if asks.VECTOR in rows:
        clusters = settings.clusters.count if settings.clusters.choose == "count" else MOST_CLUSTERS
    rank = clusters * (settings.lora.rank + settings.aggregation.residual_rank)
    numbers = sum(math.prod(shape) for _, shape in at_rank(backbone.layout, rank))
    return body.LENGTH + MOST_ADAPTER_HEADER + 4 * numbers
