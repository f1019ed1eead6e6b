"""What a task leaves behind so that the next one starts warm; ``fedgen device-worker`` asks the app bundle for it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict

from fedgen_app.data.cache import source_identity
from fedgen_app.federation.client import Participant
from fedgen_app.federation.method import load_method
from fedgen_app.learning.backbone import load_task
from fedgen_app.settings import looks_like_path


def remembered(context: Context) -> dict[str, Any]:
    """After a task: what the next one will want, as JSON values.

    ``key`` differs where another backbone is wanted, or the same folder holds other files; ``fork`` says whether the
    backbone may be opened before a fork: what lies on a GPU does not survive one.
    """
    me = Participant.from_context(context)
    backbone, s = me.open_backbone(), me.settings  # opened already, so it costs nothing
    source = me.backbone or s.backbone
    place = backbone.reference if looks_like_path(source) and Path(backbone.reference).is_dir() else source
    files = source_identity(place, "", "") if looks_like_path(place) else ""
    key = [
        s.task,
        s.method,
        s.dtype,
        s.device,
        s.backbone_bits,
        s.backbone_revision,
        s.gradient_checkpointing,
        source,
        files,
    ]
    return {
        "key": json.dumps([*key, s.lora.model_dump(mode="json", exclude={"init", "ranks"})]),
        "fork": backbone.device.type == "cpu",
        "run": dict(context.run_config),
        "node": dict(context.node_config),
    }


def prepare(facts: Mapping[str, Any]) -> None:
    """Import what the task needs and, where ``fork`` allows it, open the backbone, for all processes forked from here.

    Raises:
        FedgenError: it is not to be had, or the device's policy does not allow it any more.
    """
    # Here one thread alone may compute (fleet/zygote.py); the task's own process takes as many as are set.
    context = Context(0, 0, facts["node"], RecordDict(), facts["run"] | {"threads": 0})
    me = Participant.from_context(context)
    load_task(me.settings.task)
    load_method(me.settings.method)
    if facts["fork"]:
        me.open_backbone()
