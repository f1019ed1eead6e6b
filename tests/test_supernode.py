"""What starts Flower's SuperNode on a device."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from datetime import timedelta
from typing import Any

import httpx
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.runtime_pb2 import (
    PullAppMessagesRequest,
    PullAppMessagesResponse,
    PullTaskInputRequest,
    PushAppMessagesRequest,
)
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity
from nodes import NODE, Node, bundle

from fedgen_app.engines.keeper import free_port
from fedgen_app.fleet import flower_task, supernode

# Where Flower's SuperNode ends: by an error or without one, and a thread stays that is no daemon.
ENDS = """
import sys, threading, time
from fedgen_app.fleet import supernode

def ends():
    threading.Thread(target=time.sleep, args=(120,)).start()
    print("ended", flush=True)
    {how}

supernode.flower_supernode = ends
supernode.main()
"""


IN_A_THREAD = "threading.Thread(target=int, args=('HTTP 500',), daemon=True).start(); time.sleep(60)"


@pytest.mark.parametrize("how", ["return", "raise RuntimeError('500')", IN_A_THREAD])
def test_no_thread_keeps_the_process_of_a_supernode_that_ended(how: str) -> None:
    ended = subprocess.run([sys.executable, "-c", ENDS.format(how=how)], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1 and ended.stdout == "ended\n"
    assert ("Error" in ended.stderr and "500" in ended.stderr) == (how != "return")


@pytest.mark.parametrize(("status", "goes_on"), [(500, True), (503, True), (404, False)])
def test_the_servers_error_is_a_heartbeat_that_failed(status: int, goes_on: bool) -> None:
    def beat() -> bool:
        httpx.Response(status, request=httpx.Request("POST", "http://127.0.0.1")).raise_for_status()
        return True

    patient = supernode.heart(beat).heartbeat_fn
    if goes_on:
        assert patient() is False
    else:
        with pytest.raises(httpx.HTTPStatusError):
            patient()
    assert supernode.heart(lambda: True).heartbeat_fn() is True


def test_its_options_are_flowers() -> None:
    code = "from fedgen_app.fleet.supernode import main; main()"
    ended = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0 and "--auth-supernode-private-key" in ended.stdout


@pytest.mark.parametrize("lost_at", ["object", "confirmation"])
@pytest.mark.parametrize("mended", [True, False])
def test_a_message_whose_run_ends_meanwhile_leaves_no_answer_for_the_next(lost_at: str, mended: bool) -> None:
    """Flower's own loop does leave one: should that change, what mends it here can go."""
    with Node(free_port(), None) as node:
        fab = bundle()
        done = node.put(fab)
        dispatcher = flower_task.dispatcher(node.runtime, None)
        begun(node, dispatcher)
        for task in node.state.get_tasks(run_ids=[done]):
            node.state.finish_task(task.task_id, "completed", "")
        node.state.delete_messages()
        message = Message(RecordDict({"config": ConfigRecord({})}), NODE, "query")
        message.metadata.__dict__.update(_run_id=done, _message_id=message.object_id)
        fetched = []

        contents = {key: item.deflate() for key, item in get_all_nested_objects(message).items()}

        def pull_object(_: int, identifier: str) -> bytes:
            if not fetched:
                fetched.append(True)
                begun(node, dispatcher)
            if lost_at == "object":
                raise RunNotRunningException
            return contents[identifier]

        def confirm(*_: Any) -> None:
            raise RunNotRunningException

        receive = supernode.Loop().receive if mended else supernode._receive
        run = receive(
            state=node.state,
            object_store=node.objects,
            node_config={},
            receive=lambda: (message, get_object_tree(message)),
            get_run=lambda _: None,
            get_fab=lambda *_: None,
            pull_object=pull_object,
            confirm_message_received=confirm,
            trusted_entities=None,
        )
        assert run is None and fetched
        miss_heartbeats(node)
        assert bool(node.state.get_messages_legacy(is_reply=True)) != mended


def test_an_answer_that_nobody_waits_for_is_dropped_before_the_next_message() -> None:
    with Node(free_port(), None) as node:
        node.put(bundle())
        task = flower_task.acquire(flower_task.dispatcher(node.runtime, None))
        assert task and flower_task.answer_for(node.runtime, task, None)
        assert (
            supernode.Loop().receive(
                state=node.state,
                object_store=node.objects,
                node_config={},
                receive=lambda: None,
                get_run=None,
                get_fab=None,
                pull_object=bytes,
                confirm_message_received=print,
                trusted_entities=None,
            )
            is None
        )
        assert not node.state.get_messages_legacy(is_reply=True)


class Sent:
    """What a SuperNode's loop sends: ids of the messages answered, and the codes of errors."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.answers: list[tuple[str, int | None]] = []

    def answer(self, message: Message) -> tuple[str, int | None]:
        """Send the answer to a message that was received."""
        loop = supernode.Loop()
        loop.message, loop.run = message.metadata.message_id, message.metadata.run_id

        def send(reply: Message, tree: Any, _: float) -> tuple[set[str], str]:
            code = reply.error.code if reply.has_error() else None
            self.answers.append((reply.metadata.reply_to_message_id, code))
            return {part.object_id for part in iterate_object_tree(tree)}, ""

        state, objects = self.node.state, self.node.objects
        loop.send(state=state, object_store=objects, send=send, push_object=lambda *parts: self.put(parts[-1]))
        return self.answers[-1]

    def put(self, content: bytes) -> None:
        assert content


def begun(node: Node, dispatcher: Any) -> tuple[flower_task.Task, Any, Message, Context]:
    """A task whose message is fetched: itself, its connection, the message and its context."""
    task = flower_task.acquire(dispatcher)
    assert task
    client = flower_task._connect(node.runtime, task.token, None)
    client.PullTaskInput(PullTaskInputRequest())
    message = flower_task._header(client.PullMessages(PullAppMessagesRequest()))
    context = Context(message.metadata.run_id, NODE, {}, RecordDict(), {})
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = task.number, context.run_id, NODE
    return task, client, message, context


def header(message: Message) -> bytes:
    """As a worker's child passes it on."""
    tree = ObjectTree(object_id=message.metadata.message_id)
    pulled = PullAppMessagesResponse(messages_list=[message_to_proto(message)], message_object_trees=[tree])
    return pulled.SerializeToString()


CRASHED = ErrorCode.CLIENT_APP_CRASHED


@pytest.mark.parametrize("answered_for", [True, False])
def test_half_an_answer_whose_process_died_is_an_error_and_holds_up_nothing(answered_for: bool) -> None:
    with Node(free_port(), None) as node:
        node.put(bundle())
        dispatcher = flower_task.dispatcher(node.runtime, None)
        task, client, message, _ = begun(node, dispatcher)
        reply = Message(RecordDict({"config": ConfigRecord({"half": 1})}), reply_to=message)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        client.PushMessages(
            PushAppMessagesRequest(
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[get_object_tree(reply)],
            )
        )
        if answered_for:
            assert flower_task.answer_for(node.runtime, task, header(message))
        else:  # nobody is left who could
            miss_heartbeats(node)
        sent = Sent(node)
        assert sent.answer(message) == (message.metadata.message_id, CRASHED)
        node.put(bundle())
        _, client, message, context = begun(node, dispatcher)
        flower_task.push_message(client, Message(RecordDict(), reply_to=message), context)
        assert sent.answer(message) == (message.metadata.message_id, None) and len(sent.answers) == 2


def miss_heartbeats(node: Node) -> None:
    """As a minute after whoever worked has died."""
    for token in node.state.task_token_store.values():  # type: ignore[attr-defined]
        token.active_until = now() - timedelta(seconds=1)


def test_parts_that_are_still_brought_are_waited_for() -> None:
    with Node(free_port(), None) as node:
        node.put(bundle())
        _, client, message, context = begun(node, flower_task.dispatcher(node.runtime, None))
        slow = client.PushObject

        def push(*arguments: Any) -> Any:
            time.sleep(0.5)
            return slow(*arguments)

        client.PushObject = push
        sent = Sent(node)
        thread = threading.Thread(target=sent.answer, args=[message], daemon=True)
        thread.start()
        reply = Message(RecordDict({"config": ConfigRecord({"slow": 1})}), reply_to=message)
        flower_task.push_message(client, reply, context)
        thread.join(20)
        assert sent.answers == [(message.metadata.message_id, None)]


def test_of_two_answers_to_one_message_the_first_is_sent_and_no_other_is_left() -> None:
    with Node(free_port(), None) as node:
        node.put(bundle())
        task, client, message, context = begun(node, flower_task.dispatcher(node.runtime, None))
        flower_task.push_message(client, Message(RecordDict(), reply_to=message), context)
        assert flower_task.answer_for(node.runtime, task, header(message))
        sent = Sent(node)
        assert sent.answer(message) == (message.metadata.message_id, None) and len(sent.answers) == 1
        assert not node.state.get_messages_legacy(is_reply=True)


def test_a_second_answer_that_comes_late_is_not_taken_for_the_next_messages() -> None:
    with Node(free_port(), None) as node:
        dispatcher, sent = flower_task.dispatcher(node.runtime, None), Sent(node)
        node.put(bundle())
        task, client, first, context = begun(node, dispatcher)
        flower_task.push_message(client, Message(RecordDict(), reply_to=first), context)
        sent.answer(first)
        node.put(bundle())
        _, client, second, context = begun(node, dispatcher)
        assert flower_task.answer_for(node.runtime, task, header(first))
        TaskIdentity.run_id = context.run_id
        flower_task.push_message(client, Message(RecordDict(), reply_to=second), context)
        assert sent.answer(second) == (second.metadata.message_id, None) and len(sent.answers) == 2


def test_a_second_answer_that_is_dropped_while_it_is_brought_ends_its_task_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    push_message, sent = flower_task.push_message, []
    with Node(free_port(), None) as node:
        node.put(bundle())
        task, client, message, context = begun(node, flower_task.dispatcher(node.runtime, None))
        push_message(client, Message(RecordDict(), reply_to=message), context)

        def meanwhile(client: Any, *others: Any) -> None:
            put = client.PushObject

            def push(*arguments: Any) -> Any:
                sent.append(Sent(node).answer(message))
                return put(*arguments)

            client.PushObject = push
            push_message(client, *others)

        monkeypatch.setattr(flower_task, "push_message", meanwhile)
        assert flower_task.answer_for(node.runtime, task, header(message))
        assert sent == [(message.metadata.message_id, None)]
        assert node.state.get_tasks()[0].status.status == "finished"


def test_a_task_that_ends_without_an_answer_is_answered_with_an_error() -> None:
    with Node(free_port(), None) as node:
        node.put(bundle())
        task, _, message, _ = begun(node, flower_task.dispatcher(node.runtime, None))
        assert flower_task.finish(node.runtime, task)
        assert Sent(node).answer(message) == (message.metadata.message_id, CRASHED)


def test_so_is_one_whose_message_was_not_even_fetched() -> None:
    with Node(free_port(), None) as node:
        run = node.put(bundle())
        task = flower_task.acquire(flower_task.dispatcher(node.runtime, None))
        assert task
        flower_task._connect(node.runtime, task.token, None).PullTaskInput(PullTaskInputRequest())
        miss_heartbeats(node)
        (message,) = [entry.message for entry in node.state.msg_store.values()]  # type: ignore[attr-defined]
        assert message.metadata.run_id == run
        assert Sent(node).answer(message) == (message.metadata.message_id, CRASHED)
        assert not flower_task.finish(node.runtime, task)  # nobody knows its token any more
