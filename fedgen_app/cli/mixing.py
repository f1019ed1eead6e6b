"""``--mix`` of ``fedgen generate``: what was asked for, before any model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedgen_app.errors import SettingsError

AUTO = "auto"


def asked(folder: Path, mix: Sequence[str], prompts: Sequence[str]) -> list[dict[int, float] | None]:
    """One mixture for all, or one for each prompt: weights by cluster, or None for those that suit the prompt.

    Args:
        folder: ``clusters`` of the run folder.

    Raises:
        SettingsError: the run has no clusters or not those, the text is malformed, or the numbers do not match.
    """
    known = clusters_in(folder)
    if not known:
        raise SettingsError(f"--mix {mix[0]}: this run has no adapters of clusters")
    return read(mix, prompts, known)


def read(mix: Sequence[str], prompts: Sequence[str], known: Sequence[int] | None) -> list[dict[int, float] | None]:
    """The same, among known clusters, or, where a service knows them (None), any.

    Raises:
        SettingsError: as ``asked``.
    """
    if len(mix) not in (1, len(prompts)):
        raise SettingsError(
            f"--mix: {len(mix)} of them for {len(prompts)} --prompt; should be one for all, or one each"
        )
    return [None if text.strip() == AUTO else _weights(text, known) for text in mix]


def clusters_in(folder: Path) -> list[int]:
    """The numbers of the clusters that have an adapter."""
    files = folder.glob("*/adapter_model.safetensors")
    return sorted(int(file.parent.name) for file in files if file.parent.name.isdecimal())


def _weights(text: str, known: Sequence[int] | None) -> dict[int, float]:
    weights: dict[int, float] = {}
    for part in text.split(","):
        name, _, number = part.partition(":")
        try:
            cluster, weight = int(name), float(number)
        except ValueError:
            raise SettingsError(f"--mix {text}: should be {AUTO}, or cluster:weight such as 0:0.7,2:0.3") from None
        if known is not None and cluster not in known:
            raise SettingsError(f"--mix {text}: no cluster {cluster}; there are {', '.join(map(str, known))}")
        if cluster in weights:
            raise SettingsError(f"--mix {text}: cluster {cluster} has two weights")
        if not 0 <= weight < float("inf"):
            raise SettingsError(f"--mix {text}: a weight should be finite and 0 or more")
        weights[cluster] = weight
    if not any(weights.values()):
        raise SettingsError(f"--mix {text}: one weight at least should be above 0")
    return weights
