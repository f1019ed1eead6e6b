"""Where the device's policy is asked: before it works, before it trains, before it answers."""

from __future__ import annotations

import math
from dataclasses import replace

from flwr.app import Context, Message
from flwr.clientapp.typing import ClientAppCallable

from fedgen_app.federation import wire
from fedgen_app.federation.policy import Policy, policy_of
from fedgen_app.federation.roster import ROLL_CALL
from fedgen_app.learning.training import Plan, planned_steps


def policed(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Flower mod: whether the device may work now, and whether the answer may go out.

    The roll call is answered at any hour, as a node that refuses it is left out for the whole run.
    """
    policy = policy_of(context.node_config)
    if message.metadata.message_type != ROLL_CALL:
        policy.check_now()
    reply = call_next(message, context)
    if not reply.has_error() and policy.max_bytes_up is not None:
        policy.check_bytes(wire.byte_size(reply))
    return reply


def check_plans(policy: Policy, examples: int, *plans: Plan) -> None:
    """Raise PolicyError where a plan takes more steps, or goes over the data more often, than the device allows."""
    for plan in plans:
        steps = planned_steps(examples, plan)
        once = planned_steps(examples, replace(plan, epochs=1, max_steps=0))
        policy.check_work(math.ceil(steps / max(1, once)), steps)
