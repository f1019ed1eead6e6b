"""What a device answers about what it wants: one protected direction, never a word of its prompts."""

from __future__ import annotations

import hashlib
import logging
from typing import TYPE_CHECKING

import numpy as np

from fedgen_app.errors import DataError
from fedgen_app.federation import protection
from fedgen_app.federation.noise import Draws
from fedgen_app.federation.roster import REQUIREMENT, SPACE
from fedgen_app.learning.backbone import Backbone
from fedgen_app.learning.encoder import Numbers, direction, encode, mark_of
from fedgen_app.learning.task import Task
from fedgen_app.seeds import derive

if TYPE_CHECKING:
    from fedgen_app.federation.client import Participant

DELTA = 1e-5  # the largest for which epsilon is counted: a server that asks for more would make it look small
NOISE_FILE = "requirement-noise.safetensors"
log = logging.getLogger(__name__)


def facts_of(me: Participant, task: Task, backbone: Backbone) -> dict[str, str | list[float]]:
    """The part of the answer to the roll call; nothing where the run does not ask or the device has no prompts.

    Raises:
        PolicyError: the server names an encoder, and the device's policy limits what it opens; or it would tell more
            of its prompts, in all, than its policy allows.
        FedgenError: a file or the encoder is not to be had.
    """
    if me.settings.clusters.by != "prompts":
        return {}
    me.policy.check_encoder(me.encoder, me.settings.clusters.encoder)
    texts = task.requirements(me.settings, backbone, me.share)
    if not texts:
        log.warning("no prompts here: this device answers without a requirement and will be in no cluster")
        return {}
    try:
        clean = direction(encode(me.settings, task, backbone, texts, me.encoder))
    except DataError as error:
        log.warning("%s: this device answers without a requirement and will be in no cluster", error)
        return {}
    key = protection.read_key(me.key) if me.key else b""
    encoder = mark_of(me.settings, backbone, me.encoder)
    sent = _with_noise(me, clean, hashlib.sha256(repr((sorted(texts), encoder)).encode()).hexdigest())
    if key:
        sent = sent @ protection.rotation(key, len(sent)).T
    space = space_of(encoder, key, len(sent))
    return {REQUIREMENT: [float(number) for number in sent.astype(np.float32)], SPACE: space}


def space_of(encoder: str, key: bytes, width: int) -> str:
    """Sixteen hex digits that tell whether two vectors can be compared: one encoder, one key or none, one width.

    Args:
        encoder: Its mark (``encoder.mark_of``).
    """
    known = (encoder, protection.key_mark(key) if key else "", width)
    return hashlib.sha256(repr(known).encode()).hexdigest()[:16]


def _with_noise(me: Participant, clean: Numbers, what: str) -> Numbers:
    """Noise as the run says, or more where the device itself wants more.

    Args:
        what: A mark of the prompts and their encoder, under which the device keeps its noise; it is not sent.
    """
    sigma = max(me.settings.clusters.noise, me.noise)
    if me.state is None:  # simulated: the same in a resumed run, and private from nobody
        seed = derive(me.settings.seed, "requirement", me.client)
        noise = protection.drawn(len(clean), sigma, np.random.default_rng(seed))
        return protection.noisy(clean, noise) if sigma else clean
    delta = min(me.settings.clusters.delta, DELTA)
    with Draws.held(me.state / NOISE_FILE) as draws:
        spent = draws.spent_with(what, sigma)
        whole = sum(protection.epsilon(each, delta) for each in spent)
        me.policy.check_epsilon(whole)
        noise = draws.noise(what, len(clean), sigma)
    log.info(
        "requirement: noise %g; with all that was sent before, of %d wishes: (epsilon, delta) = (%.3g, %g)",
        sigma,
        len(spent),
        whole,
        len(spent) * delta,
    )
    return protection.noisy(clean, noise)
