"""What a device agrees to, whatever the server's settings say: a TOML file that belongs to the device's owner."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import tomllib
from collections.abc import Mapping, Sequence
from datetime import datetime, time
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from fedgen_app.errors import PolicyError

FINGERPRINT = re.compile(r"sha256:[0-9a-f]{64}")
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|kB|MB|GB|TB|KiB|MiB|GiB|TiB)")
DECIMAL = {unit: 1000**power for power, unit in enumerate(("B", "kB", "MB", "GB", "TB"))}
BINARY = {unit: 1024**power for power, unit in enumerate(("KiB", "MiB", "GiB", "TiB"), start=1)}
SPAN = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]|24):([0-5]\d)")
Span = tuple[time, time]
log = logging.getLogger(__name__)


def bytes_of(value: object) -> object:
    """Bytes from a text such as ``"4GB"`` or ``"512MiB"``; anything else as it is."""
    if not isinstance(value, str):
        return value
    if not (found := SIZE.fullmatch(value.strip())):
        raise PydanticCustomError("size", "should be bytes, or a text such as '4GB' or '512MiB'")
    return int(float(found[1]) * (DECIMAL | BINARY)[found[2]])


def _spans(value: object) -> object:
    if not isinstance(value, str):
        return value
    spans = []
    for part in value.split(","):
        found = SPAN.fullmatch(part.strip())
        if not found or (found[3] == "24" and found[4] != "00"):
            raise PydanticCustomError("hours", "should be like '22:00-06:00', several with commas")
        # 24:00 is the midnight at the end: as a time of day it is 00:00, and the span then runs over midnight.
        spans.append((time(int(found[1]), int(found[2])), time(int(found[3]) % 24, int(found[4]))))
    return tuple(spans)


def _fingerprint(value: str) -> str:
    if not FINGERPRINT.fullmatch(value):
        raise PydanticCustomError("fingerprint", "should be 'sha256:' and 64 hexadecimal digits")
    return value


class Policy(BaseModel):
    """What this device agrees to; what is not set is not limited.

    Attributes:
        backbones: Fingerprints of the backbones that it trains on.
        max_epochs: Over its data, in one message.
        max_steps: Optimiser steps in one message.
        max_bytes_up: In one answer, as serialised.
        max_epsilon: Of differential privacy, of all that it ever sent of its prompts; without noise it is infinite.
        hours: When it trains, local time; a span may run over midnight.
        condition: A command whose exit status 0 says yes.
        condition_timeout: Seconds after which its silence is a no.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, alias_generator=lambda name: name.replace("_", "-")
    )

    backbones: tuple[Annotated[str, AfterValidator(_fingerprint)], ...] | None = None
    max_epochs: Annotated[int, Field(ge=0, strict=True)] | None = None
    max_steps: Annotated[int, Field(ge=0, strict=True)] | None = None
    max_bytes_up: Annotated[int, BeforeValidator(bytes_of), Field(ge=0, strict=True)] | None = None
    max_epsilon: Annotated[float, Field(gt=0)] | None = None
    hours: Annotated[tuple[Span, ...], BeforeValidator(_spans)] | None = None
    condition: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    condition_timeout: Annotated[float, Field(gt=0, le=300)] = 10.0

    @classmethod
    def read(cls, file: Path) -> Policy:
        """The policy in a file.

        Raises:
            PolicyError: it cannot be read or has a mistake; a device without a readable policy agrees to nothing.
        """
        try:
            return cls.model_validate(tomllib.loads(file.read_text(encoding="utf-8")))
        except ValidationError as error:
            mistakes = [
                f"{file}: {'.'.join(map(str, e['loc']))} = {e['input']!r}: {e['msg'].replace('Input should', 'should')}"
                for e in error.errors()
            ]
            raise PolicyError("\n".join(mistakes)) from None
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise PolicyError(f"{file}: {error}") from None

    def check_source(self, own: str, wanted: str) -> None:
        """Before a backbone is opened: where only some are allowed, the server does not choose what is fetched.

        Args:
            own: The device's own backbone, or "".
            wanted: What the server's settings say.

        Raises:
            PolicyError: it would be a place that the server names.
        """
        if self.backbones is not None and not own and wanted != "bundled":
            raise PolicyError(
                f"policy: backbones are limited, and this device has none of its own: the server's, {wanted!r}, is not "
                "opened; set `backbone` in the node's configuration"
            )

    def check_encoder(self, own: str, wanted: str) -> None:
        """The same of what encodes prompts: ``cluster-encoder`` of the node, and ``clusters.encoder`` of the run."""
        if self.backbones is not None and not own and wanted not in ("backbone", "bundled"):
            raise PolicyError(
                f"policy: backbones are limited, and this device has no encoder of its own: the server's, {wanted!r}, "
                "is not opened; set `cluster-encoder` in the node's configuration"
            )

    def check_backbone(self, fingerprint: str) -> None:
        """Raise PolicyError where a backbone is not among the allowed."""
        if self.backbones is not None and fingerprint not in self.backbones:
            raise PolicyError(f"policy: the backbone {fingerprint} is not among the allowed")

    def check_work(self, epochs: int, steps: int) -> None:
        """Raise PolicyError where one message asks for more than is allowed."""
        for name, limit, asked in (("max-epochs", self.max_epochs, epochs), ("max-steps", self.max_steps, steps)):
            if limit is not None and asked > limit:
                raise PolicyError(f"policy: {asked} asked for, {name} = {limit}")

    def check_bytes(self, count: int) -> None:
        """Raise PolicyError where an answer is larger than allowed."""
        if self.max_bytes_up is not None and count > self.max_bytes_up:
            raise PolicyError(f"policy: an answer of {count} bytes, max-bytes-up = {self.max_bytes_up}")

    def check_epsilon(self, spent: float) -> None:
        """Raise PolicyError where what was sent of prompts, and is to be sent, tells more than is allowed."""
        if self.max_epsilon is not None and spent > self.max_epsilon:
            raise PolicyError(
                f"policy: a requirement would bring epsilon to {spent:.3g}, max-epsilon = {self.max_epsilon:g}"
            )

    def check_now(self, now: datetime | None = None) -> None:
        """Raise PolicyError where it is not the hour, or the condition says no."""
        clock = (now or datetime.now()).time()
        if self.hours is not None and not any(_within(clock, span) for span in self.hours):
            raise PolicyError(f"policy: it is {clock:%H:%M}, outside of hours")
        if self.condition is not None and not _says_yes(self.condition, self.condition_timeout):
            raise PolicyError(f"policy: {self.condition[0]} does not say yes")


def policy_of(node_config: Mapping[str, object]) -> Policy:
    """The policy that a node's configuration names, as its file is now; one that allows all where it names none.

    Raises:
        PolicyError: it cannot be read.
    """
    named = node_config.get("policy")
    return Policy() if named is None else Policy.read(Path(str(named)).expanduser())


def _within(clock: time, span: Span) -> bool:
    first, last = span
    if first < last:
        return first <= clock < last
    return clock >= first or clock < last  # over midnight


def _says_yes(command: Sequence[str], timeout: float) -> bool:
    try:
        # A session of its own, so that what the command started ends with it.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        log.error("the policy's condition cannot be asked: %s: %s", command[0], error.strerror)
        return False
    try:
        return process.wait(timeout) == 0
    except subprocess.TimeoutExpired:
        log.error("the policy's condition did not answer within %g s: %s", timeout, command[0])
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return False
