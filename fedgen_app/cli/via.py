"""``--via`` of ``fedgen generate``: what a device asks of the service, checked before any model is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from fedgen_app.cli import mixing
from fedgen_app.errors import SettingsError
from fedgen_app.fleet.source import connected
from fedgen_app.serving.guard import VARIABLE, read_tokens
from fedgen_app.settings import Settings

if TYPE_CHECKING:
    from fedgen_app.learning.backbone import Backbone
    from fedgen_app.learning.task import Sample, Task


@dataclass(frozen=True)
class Via:
    """A service, and what its part is.

    Attributes:
        split: Steps that are taken there; 0: all of them, or none where texts are generated.
        mixes: One for all prompts or one for each: weights by cluster, None: by the prompt; none: the global adapter.
    """

    url: str
    split: int
    token: str
    ca: Path | None
    mixes: list[dict[int, float] | None]

    def samples(
        self,
        settings: Settings,
        task: Task,
        backbone: Backbone,
        texts: Sequence[str],
        count: int,
        seed: int,
        key_file: Path | None,
        encoder: str,
    ) -> list[Sample]:
        """So many of each text, with the adapter that is in the model as the device's part.

        That encoded prompts go out is said before they do: no policy counts them here.

        Raises:
            ServiceError: the service refuses, or does not answer.
            SettingsError: there is nothing to split.
        """
        from fedgen_app.federation.protection import read_key
        from fedgen_app.serving import asks
        from fedgen_app.serving.client import Choice, Remote, draw, write_with

        hides = task.stages is not None and task.stages.hides(backbone)
        if self.split and not hides:
            raise SettingsError(f"--split {self.split}: this backbone's images or texts are made in one place")
        key = read_key(key_file) if key_file else b""
        each = self.mixes * len(texts) if len(self.mixes) == 1 else self.mixes
        choice = Choice.of(settings, task, backbone, texts, each, key, encoder)
        with connected(self.url, self.ca) as client:
            remote = Remote(client, self.url.rstrip("/"), self.token, backbone.fingerprint)
            if asks.SPACE in choice.facts:
                remote.check_space(choice.facts[asks.SPACE])
            if hides or asks.SPACE in choice.facts:
                typer.echo(f"the encoded prompts go to {remote.url}, without noise", err=True)
            if hides:
                return draw(remote, settings, task, backbone, texts, count, seed, choice, self.split)
            return write_with(remote, settings, task, backbone, texts, count, seed, choice)


def asked(
    via: str,
    split: int,
    token_file: Path | None,
    ca: Path | None,
    mix: Sequence[str],
    prompts: Sequence[str],
    settings: Settings,
) -> Via | None:
    """What the options say; None without ``--via``.

    Raises:
        SettingsError: they contradict one another, or one is wrong.
    """
    if not via:
        given = {"--split": split, "--token-file": token_file, "--ca": ca}
        if named := [name for name, value in given.items() if value]:
            raise SettingsError(f"{named[0]} {given[named[0]]}: serves --via alone")
        return None
    if split and split >= settings.samples.steps:
        raise SettingsError(f"--split {split}: should be below the steps, {settings.samples.steps}; or 0: all there")
    tokens = read_tokens(token_file, os.environ.get(VARIABLE, ""))
    if len(tokens) > 1:
        raise SettingsError(f"--token-file {token_file}: holds {len(tokens)} tokens; a device has one")
    with connected(via, ca):  # raises for an address or a certificate that is none
        pass
    mixes: list[dict[int, float] | None] = [None] if settings.clusters.by == "prompts" else []
    mixes = mixing.read(mix, prompts, None) if mix else mixes
    if len({weights is None for weights in mixes}) > 1:
        raise SettingsError("--mix: with --via either auto for all prompts, or weights for all")
    return Via(via, split, tokens[0] if tokens else "", ca, mixes)


def needs_adapter(via: Via, settings: Settings) -> bool:
    """Whether the device's own adapter plays a part: it finishes images, or its text encoder has learned."""
    return bool(via.split) or settings.lora.text_encoder


def check_adapter(via: Via, settings: Settings, options: Mapping[str, object]) -> None:
    """Refuse options that name an adapter of the device's, or none, where none plays a part.

    Raises:
        SettingsError: names the option.
    """
    for option, named in options.items():
        if named and not needs_adapter(via, settings):
            given = option if named is True else f"{option} {named}"
            raise SettingsError(
                f"{given}: without --split this device has no part with an adapter of its own; --mix says "
                "which ones the service uses"
            )
