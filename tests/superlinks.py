"""A SuperLink's own Runtime API and memory, with devices that a test plays: they send as much as it wants."""

from __future__ import annotations

import threading
import time
from typing import Any

import uvicorn
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import NOOP_FLWR_AID, SUPERLINK_NODE_ID
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.http_grid import HttpGrid
from flwr.superlink.main import create_app
from flwr.superlink.servicer.fleet import fleet_handlers

from fedgen_app.engines.keeper import free_port


class SuperLink:
    """One run's; ``grid`` is what Flower gives its ServerApp."""

    def __init__(self, devices: int) -> None:
        app, port = create_app(), free_port()
        self.state: Any = app.state.linkstate_factory.state()
        server = TaskType.SERVER_APP
        self.run = self.state.create_run("tests/app", "1.0.0", "0" * 64, {}, NOOP_FEDERATION_ID, None, None, server)
        task = self.state.get_run_info(run_ids=[self.run])[0].primary_task_id
        self.grid = HttpGrid(f"127.0.0.1:{port}", insecure=True, token=self.state.claim_task(task))
        assert self.state.activate_task(task)
        self.grid.set_run(self.state.get_run_info(run_ids=[self.run])[0])
        self.nodes = [self.state.create_node(NOOP_FLWR_AID, "", bytes([i]), 3600) for i in range(devices)]
        assert all(self.state.activate_node(node, 3600) for node in self.nodes)
        self.server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
        self.thread = threading.Thread(target=self.server.run)

    def __enter__(self) -> SuperLink:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = self.run, SUPERLINK_NODE_ID, 1
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.05)
        return self

    def __exit__(self, *_: object) -> None:
        self.grid.close()
        self.server.should_exit = True
        self.thread.join()

    def announce(self, reply: Message) -> Sending:
        """Send a reply's header."""
        return self.announce_as(reply, reply)

    def announce_as(self, header: Message, reply: Message) -> Sending:
        """The same, with another header than the reply's own."""
        parts = {name: item.deflate() for name, item in get_all_nested_objects(reply).items()}
        return self.announce_parts(header, get_object_tree(reply), parts)

    def announce_parts(self, header: Message, tree: ObjectTree, parts: dict[str, bytes]) -> Sending:
        """A header alone, and what is said to follow it."""
        header.metadata.__dict__["_message_id"] = tree.object_id
        request = PushMessagesRequest(
            node=Node(node_id=header.metadata.src_node_id),
            messages_list=[message_to_proto(remove_content_from_message(header))],
            message_object_trees=[tree],
        )
        given = fleet_handlers.push_messages(request, self.state)
        return Sending(self, given.session_id, {name: parts[name] for name in given.objects_to_push})


class Sending:
    """A reply's parts, on their way."""

    def __init__(self, link: SuperLink, session: str, parts: dict[str, bytes]) -> None:
        self.link, self.session, self.left = link, session, parts

    def send(self, count: int | None = None) -> None:
        """Some of the parts, or all that are left."""
        for name in list(self.left)[:count]:
            request = PushObjectRequest(
                run_id=self.link.run, session_id=self.session, object_id=name, object_content=self.left.pop(name)
            )
            assert fleet_handlers.push_object(request, self.link.state).stored
