"""Every error that FedGen-Edge raises on purpose, in one readable tree.

``code`` is what a client puts on the wire instead of the text: the text may name files or prompts and stays on the
device (see ``fedgen_app.federation.client.guarded``). ``exit_status`` is what the ``fedgen`` command returns.
"""

from __future__ import annotations


class FedgenError(Exception):
    """Base of all of them."""

    code = 100
    exit_status = 3


class SettingsError(FedgenError):
    """A setting or an argument is wrong; nothing was started."""

    code = 101
    exit_status = 2


class DataError(FedgenError):
    """Data cannot be read, or there is too little of it."""

    code = 102


class BackboneError(FedgenError):
    """A backbone cannot be loaded, or has no layer that takes the adapter."""

    code = 103


class AdapterError(FedgenError):
    """An adapter does not fit the backbone, or its file is damaged."""

    code = 104


class PolicyError(FedgenError):
    """A device refuses what the server asks for."""

    code = 105


class CheckpointError(FedgenError):
    """A checkpoint is damaged or does not belong to this run."""

    code = 106


class RunError(FedgenError):
    """The federation cannot go on."""

    code = 107


class MetricError(FedgenError):
    """A measurement cannot be made: no feature extractor, or too few images."""

    code = 108


class ServiceError(FedgenError):
    """The inference service refuses a request, or a device gets no answer from it.

    Attributes:
        status: The HTTP status that says so; 0: there was no answer.
    """

    code = 109

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class LockedError(RunError):
    """Another process is writing into the run folder."""


def meaning(code: int) -> str:
    """What a client's error code says, in a word or two; Flower's own codes are below 100."""
    words = {kind.code: kind.__name__.removesuffix("Error").lower() for kind in FedgenError.__subclasses__()}
    return f"code {code}, {words[code]}" if code in words else f"code {code}"
