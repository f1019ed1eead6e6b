"""One process at a time works for a client in a run: two would overwrite each other's adapter."""

from __future__ import annotations

from filelock import FileLock, Timeout
from flwr.app import Context, Message
from flwr.clientapp.typing import ClientAppCallable

from fedgen_app.errors import LockedError
from fedgen_app.federation import wire
from fedgen_app.federation.client import Participant
from fedgen_app.federation.roster import ROLL_CALL


def alone(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Flower mod: hold the lock of the client's folder while it trains; the system lets it go when the process dies.

    A process of an earlier start of the same run may still be training: the newer message is answered with an error.

    Raises:
        LockedError: another process has it.
    """
    if message.metadata.message_type == ROLL_CALL:
        return call_next(message, context)
    folder = Participant.from_context(context).folder(str(message.content.config_records["config"][wire.RUN]))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            return call_next(message, context)
    except Timeout:
        raise LockedError(f"{folder}: another process is training for this client") from None
