"""Which settings a method works with, said before anything starts."""

from __future__ import annotations

from fedgen_app.errors import SettingsError
from fedgen_app.federation.local import fine_tune
from fedgen_app.federation.method import Method, load_method, weighted_mean, whole_adapter
from fedgen_app.federation.robust import FACTOR_RULES
from fedgen_app.settings import Settings


def check_method(settings: Settings) -> Method:
    """The method of these settings, after it said whether it works with them.

    Raises:
        SettingsError: names every setting that it refuses, and why.
    """
    method = load_method(settings.method)
    objections = [*method.refuses(settings), *_cluster_objections(settings, method), *_idle_protection(settings)]
    if settings.backbone_bits and method.weights == "model":
        objections.append(
            f"backbone-bits = {settings.backbone_bits}: method = {settings.method} trains the weights, which so few "
            "bits cannot follow; use 0"
        )
    if settings.aggregation.layer_wise and method.rule is not weighted_mean:
        objections.append(
            f"aggregation.layer-wise = true: method = {settings.method} is no plain mean of factors, which alone can "
            "be taken layer by layer"
        )
    if settings.aggregation.layer_wise and settings.aggregation.robust in FACTOR_RULES:
        objections.append(
            f"aggregation.layer-wise = true: aggregation.robust = {settings.aggregation.robust!r} leaves one update, "
            "which agrees with itself; take one of the two"
        )
    if not settings.personal.epochs and method.personal is not fine_tune:
        objections.append(
            f"personal.epochs = 0: method = {settings.method} trains a personal adapter in every round, which nobody "
            "would measure or keep; use 1 or more"
        )
    if settings.lora.init and (method.sends is not whole_adapter or method.weights == "model"):
        objections.append(
            f"lora.init = {settings.lora.init!r}: with method = {settings.method} clients do not start from an adapter "
            "that the server sends whole; what is not sent they draw from the seed"
        )
    if settings.lora.ranks and method.fit is None and set(settings.lora.ranks) != {settings.lora.rank}:
        objections.append(
            f"lora.ranks = {','.join(map(str, settings.lora.ranks))!r}: method = {settings.method} needs one rank for "
            "all; flexlora, flora and hetlora take mixed ones"
        )
    if objections:
        raise SettingsError("\n".join(objections))
    return method


def _cluster_objections(settings: Settings, method: Method) -> list[str]:
    """Why there can be no clusters with these settings, one line each."""
    by, ranks = settings.clusters.by, settings.lora.ranks
    told = f"clusters.by = {by!r}: method = {settings.method}"
    if by == "none":
        return []
    if method.pooled:
        return [f"{told} trains on one client, which owns all data"]
    if settings.method == "local-only":
        return [f"{told} shares nothing, so that there is nothing to average in a cluster"]
    if by == "loss" and method.tied:
        return [
            f"{told} has clients keep what belongs to one cluster's tensors, and by loss they may go to another in "
            "every round; take another way, or another method"
        ]
    if by in ("updates", "adapters") and settings.method == "fedsa-lora":
        return [f"{told} sends no factor B, which is what tells clients apart; take 'prompts' or 'loss'"]
    if by == "adapters" and settings.method == "rolora":
        return [f"{told} sends no factor B, which is what is compared, in every second round; take 'updates'"]
    if by == "adapters" and ranks and set(ranks) != {settings.lora.rank}:
        return ["clusters.by = 'adapters': compares factors of one rank, and lora.ranks has several; take 'updates'"]
    warmup, rounds = settings.clusters.warmup, settings.num_server_rounds
    late = f"clusters.warmup = {warmup}: with num-server-rounds = {rounds}"
    if by in ("updates", "adapters") and warmup > rounds:
        return [f"{late} no round is left whose replies would be compared; use {rounds} or less"]
    if by == "loss" and warmup >= rounds:
        return [f"{late} clients would stay where chance dealt them in all of them; use less"]
    return []


def _idle_protection(settings: Settings) -> list[str]:
    """What would protect prompts that nobody is asked for: whoever sets it would take the run for a protected one."""
    by, noise, key = settings.clusters.by, settings.clusters.noise, settings.clusters.key
    if by == "prompts":
        return []
    what = f"protects what clients say they want, which clusters.by = {by!r} asks nobody for; take 'prompts', or"
    found = [f"clusters.noise = {noise:g}: {what} 0"] if noise else []
    return [*found, f"clusters.key = {key!r}: {what} none"] if key else found
