"""A SuperNode's own Runtime API and memory, without a SuperLink: tests put messages in and take replies out."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.cli.build import build_fab_from_files
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supernode.main import create_app
from flwr.supernode.nodestate import NodeStateFactory

from fedgen_app.fleet import loopback
from fedgen_app.fleet.loopback import Runtime

NODE = 7
PROJECT = """[project]
name = "{name}"
version = "1.0.0"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "tests"
[tool.flwr.app.components]
serverapp = "server_app:app"
clientapp = "client_app:app"
"""
# An app that answers with who carried it out.
ECHO = """
import os
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
app = ClientApp()
{top}
@app.query()
def query(message, context):
    {body}
    return Message(RecordDict({{"m": MetricRecord({{"pid": os.getpid(), "parent": os.getppid()}})}}), reply_to=message)
"""


def bundle(name: str = "echo", top: str = "", body: str = "pass", more: Mapping[str, bytes] | None = None) -> Fab:
    """An app bundle; `top` runs when it is imported, `body` for each message; `more` are files beside its own."""
    client = ECHO.format(top=top, body=body.replace("\n", "\n    "))
    files: Mapping[str, bytes] = {
        "pyproject.toml": PROJECT.format(name=name).encode(),
        "client_app.py": client.encode(),
        "server_app.py": b"app = None\n",
        **(more or {}),
    }
    content, _ = build_fab_from_files(files)
    return Fab(hashlib.sha256(content).hexdigest(), content, {})


class Node:
    """What a worker speaks to; over TLS where there is a folder for its certificate."""

    def __init__(self, port: int, secret: bytes | None, tls: Path | None = None) -> None:
        objects = ObjectStoreFactory()
        states = NodeStateFactory(objectstore_factory=objects)
        self.state, self.objects = states.state(), objects.store()
        self.state.set_node_id(NODE)
        app = create_app(state_factory=states, superexec_auth_secret=secret)
        self.runtime = Runtime(f"127.0.0.1:{port}", tls / "ca.crt" if tls else None)
        files: dict[str, Any] = {}
        if tls:
            loopback.make(tls)  # another one each time, as the start script has it
            files = {"ssl_certfile": tls / "server.crt", "ssl_keyfile": tls / "server.key"}
        self.server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", **files))
        self.thread = threading.Thread(target=self.server.run)
        self.runs = 0

    def __enter__(self) -> Node:
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.05)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join()

    def put(self, fab: Fab, name: str = "echo", ttl: float | None = None, whole: bool = True) -> int:
        """One message for the app, valid for so many seconds, or no more of it than its header; the run's id."""
        self.runs += 1
        run = Run.create_empty(self.runs)
        run.fab_id, run.fab_version, run.fab_hash, run.series_id = f"tests/{name}", "1.0.0", fab.hash_str, self.runs
        self.state.store_run(run)
        self.state.store_fab(fab)
        context = Context(self.runs, NODE, {}, RecordDict(), {}, series_id=self.runs)
        self.state.set_run_series_context(self.runs, context)
        message = Message(RecordDict({"config": ConfigRecord({})}), NODE, "query", ttl=ttl)
        message.metadata.__dict__["_run_id"] = self.runs
        message.metadata.__dict__["_message_id"] = message.object_id
        tree, nested = get_object_tree(message), get_all_nested_objects(message)
        self.state.create_task(TaskType.CLIENT_APP, self.runs, fab.hash_str)
        self.objects.preregister(self.runs, tree)
        self.state.store_message(message)
        for identifier, item in nested.items() if whole else ():
            self.objects.put(identifier, item.deflate())
        return self.runs

    def reply(self, run: int, seconds: float = 60.0) -> Message:
        """What was answered."""
        (found,) = self.replies(run, seconds)
        return found

    def replies(self, run: int, seconds: float = 60.0) -> Sequence[Message]:
        """What was answered until something was; more than one answer may be."""
        end = time.monotonic() + seconds
        while not (found := self.state.get_messages_legacy(run_ids=[run], is_reply=True)):
            assert time.monotonic() < end, "no reply"
            time.sleep(0.05)
        return found

    def numbers(self, message: Message) -> tuple[int, int]:
        """Process and parent that an echo's reply names."""
        from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

        assert not message.has_error(), message.error
        tree = self.objects.get_object_tree(message.metadata.message_id)
        contents, waiting = {}, [tree]
        while waiting:
            node = waiting.pop()
            waiting += node.children
            while not (content := self.objects.get(node.object_id)):
                time.sleep(0.05)
            contents[node.object_id] = content
        whole = inflate_object_from_contents(tree.object_id, contents)
        assert isinstance(whole, Message)
        found = whole.content.metric_records["m"]
        return int(found["pid"]), int(found["parent"])  # type: ignore[arg-type]
