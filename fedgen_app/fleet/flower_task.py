"""One task of a SuperNode in process isolation: asked for, carried out, answered for where it broke.

The one place that calls Flower's internals for that; they hold for Flower 1.41, which the package pins.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
from flwr.app import Context, Error, Message, RecordDict
from flwr.cli.install import install_from_fab
from flwr.clientapp.utils import get_load_client_app_fn
from flwr.common.config import get_project_dir
from flwr.common.constant import ErrorCode, SubStatus
from flwr.common.serde import context_from_proto, fab_from_proto, message_from_proto, run_from_proto
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullAppMessagesResponse,
    PullTaskInputRequest,
    PushTaskOutputRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError, pull_and_inflate_object_from_tree
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.retry import RetryInvoker, make_simple_http_retry_invoker
from flwr.supercore.run import Run
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.runtime.run_clientapp import push_message, push_task_output
from google.protobuf.message import DecodeError

from fedgen_app.files import sync_tree, write_atomic
from fedgen_app.fleet.loopback import Runtime

ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
TIMEOUT = 10.0  # seconds for one answer over loopback
# A SuperNode that is gone for so long has forgotten its tasks: they are in its memory alone.
PATIENCE = 30.0
WHOLE = ".whole"  # a file in an installed bundle's folder: it lies on the disk, all of it
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """What the SuperNode gave out: who holds the token may fetch the message and answer it.

    Attributes:
        bundle: SHA-256 of the app bundle that it is for.
    """

    number: int
    bundle: str
    token: str


@dataclass(frozen=True)
class Done:
    """What became of a task that was carried out: the context that the app saw, where it answered without error."""

    folder: str
    context: Context | None


def dispatcher(runtime: Runtime, secret: bytes | None) -> RuntimeHttpClient:
    """The connection over which tasks are asked for; it does not try again by itself.

    Raises:
        OSError: there is no certificate by which the SuperNode could be known.
    """
    own = [SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods={ACQUIRE})] if secret else []
    return _client(runtime, "SuperExec", own, None)


def _client(
    runtime: Runtime, component: str, own: Sequence[ProtobufClientInterceptor], retry: RetryInvoker | None
) -> RuntimeHttpClient:
    return RuntimeHttpClient(
        runtime.url,
        interceptors=[RuntimeVersionHttpInterceptor(component_name=component), *own],
        verify=runtime.trust(),
        timeout=TIMEOUT,
        retry_invoker=retry,
    )


def acquire(client: RuntimeHttpClient) -> Task | None:
    """The next task, if there is one.

    Raises:
        httpx.HTTPError: no SuperNode answers, or it refuses.
        ValueError: what answers is no SuperNode.
    """
    found = client.AcquireTask(AcquireTaskRequest(supported_task_types={TaskType.CLIENT_APP}))
    if not (found.HasField("task") and found.token):
        return None
    return Task(found.task.task_id, found.task.fab_hash, found.token)


def _connect(runtime: Runtime, token: str, retry: RetryInvoker | None) -> RuntimeHttpClient:
    return _client(runtime, "flwr-clientapp", [RuntimeTokenHttpInterceptor(token)], retry)


def carry_out(
    runtime: Runtime, task: Task, on_message: Callable[[bytes], None], on_answered: Callable[[], None]
) -> Done:
    """Fetch the message, run the bundle's ClientApp on it, answer.

    An exception's text stays in this device's log: what is sent is Flower's code for it.

    Args:
        on_message: Called with the message's header, from which ``answer_for`` can answer in our place.
        on_answered: Called once the SuperNode has the whole answer.

    Raises:
        httpx.HTTPError: the SuperNode is gone.
        KeyboardInterrupt: it has given the task up: so Flower's client and heartbeat tell that they are refused.
    """
    retry = make_simple_http_retry_invoker()
    retry.max_time = PATIENCE
    client = _connect(runtime, task.token, retry)
    beats = HeartbeatSender(make_task_heartbeat_fn_http(client))
    beats.start()
    given = client.PullTaskInput(PullTaskInputRequest())
    context, run, fab = context_from_proto(given.context), run_from_proto(given.run), fab_from_proto(given.fab)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = given.task_id, context.run_id, context.node_id
    header = client.PullMessages(PullAppMessagesRequest())
    on_message(_without_parts(header))  # before anything else: it is given out only once
    message = _inflated(client, header, context)
    reply = _reply(message, context, run, fab)
    push_message(client, reply, context)
    on_answered()
    failed = reply.has_error()
    push_task_output(client, context, SubStatus.FAILED if failed else SubStatus.COMPLETED, "")
    beats.stop()
    client.close()
    folder = get_project_dir(run.fab_id, run.fab_version, fab.hash_str)
    return Done(str(folder), None if failed else context)


def _without_parts(pulled: PullAppMessagesResponse) -> bytes:
    """A message's header as ``answer_for`` needs it: of a large model the ids of its parts alone are long."""
    short = PullAppMessagesResponse()
    short.CopyFrom(pulled)
    for tree in short.message_object_trees:
        tree.ClearField("children")
    return bytes(short.SerializeToString())


def _header(pulled: PullAppMessagesResponse) -> Message:
    """A message without its content, as the SuperNode gives it out first.

    Raises:
        ValueError: there is none.
    """
    if not pulled.messages_list:
        raise ValueError("the SuperNode has no message for this task")
    message = message_from_proto(pulled.messages_list[0])
    message.metadata.__dict__["_message_id"] = pulled.message_object_trees[0].object_id
    return message


def expiry(pulled: bytes) -> float:
    """When nobody waits for the answer any more, in seconds since 1970.

    Args:
        pulled: The message's header, as ``carry_out`` passes it on.

    Raises:
        ValueError: it is none.
    """
    try:
        metadata = _header(PullAppMessagesResponse.FromString(pulled)).metadata
    except (DecodeError, IndexError) as error:
        raise ValueError("not the header of a message") from error
    return metadata.created_at + metadata.ttl


def _inflated(client: RuntimeHttpClient, pulled: PullAppMessagesResponse, context: Context) -> Message:
    identifier, node = _header(pulled).metadata.message_id, Node(node_id=context.node_id)
    message: Message = pull_and_inflate_object_from_tree(
        pulled.message_object_trees[0],
        make_pull_object_fn_protobuf(client.PullObject, node, context.run_id),
        make_confirm_message_received_fn_protobuf(client.ConfirmMessageReceived, node, context.run_id),
        return_type=Message,
    )
    message.metadata.__dict__["_message_id"] = identifier
    return message


def _reply(message: Message, context: Context, run: Run, fab: Fab) -> Message:
    folder = get_project_dir(run.fab_id, run.fab_version, fab.hash_str)
    try:
        _install(fab, folder)
        app = get_load_client_app_fn("", None, True)(run.fab_id, run.fab_version, fab.hash_str)
    except Exception:  # a bundle is foreign code: whatever it raises when it is loaded, the worker goes on
        log.exception("the app bundle %s cannot be loaded", fab.hash_str)
        shutil.rmtree(folder, ignore_errors=True)
        return Message(Error(ErrorCode.LOAD_CLIENT_APP_EXCEPTION), reply_to=message)
    try:
        return app(message=message, context=context)
    except Exception:  # as above; an app of ours answers with codes itself
        log.exception("the app failed")
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION), reply_to=message)


def _install(fab: Fab, folder: Path) -> None:
    """Flower takes a folder that is there for complete: a full disk or a power cut may have left half of one."""
    mark = folder / WHOLE
    if mark.exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    install_from_fab(fab.content, skip_prompt=True)
    sync_tree(folder)
    write_atomic(mark, b"")


def answer_for(runtime: Runtime, task: Task, header: bytes | None) -> bool:
    """Tell the SuperNode that the process which had this task is dead; whether it took that.

    Else it would wait for a minute and, where the task had not even been fetched, for ever.
    """

    def tell(client: RuntimeHttpClient) -> None:
        message = _header(PullAppMessagesResponse.FromString(header) if header else _pull_unfetched(client))
        context = Context(message.metadata.run_id, message.metadata.dst_node_id, {}, RecordDict(), {})
        TaskIdentity.task_id, TaskIdentity.run_id = task.number, context.run_id
        TaskIdentity.node_id = context.node_id
        push_message(client, Message(Error(ErrorCode.CLIENT_APP_CRASHED), reply_to=message), context)

    return _end(runtime, task, tell)


def finish(runtime: Runtime, task: Task) -> bool:
    """End a task that was answered by a process which died just then; whether the SuperNode took that.

    Else it would miss the heartbeat of that process a minute later, and answer whatever is under way by then.
    """
    return _end(runtime, task, lambda client: None)


def _end(runtime: Runtime, task: Task, tell: Callable[[RuntimeHttpClient], None]) -> bool:
    try:
        with contextlib.closing(_connect(runtime, task.token, None)) as client:
            with contextlib.suppress(ObjectPushError):  # the SuperNode has another answer, and dropped this one
                tell(client)
            client.PushTaskOutput(PushTaskOutputRequest(sub_status=SubStatus.FAILED))
    except (httpx.HTTPError, OSError, ValueError) as error:
        log.warning("the SuperNode was not told of the failed task %d: %s", task.number, type(error).__name__)
        return False
    return True


def _pull_unfetched(client: RuntimeHttpClient) -> PullAppMessagesResponse:
    with contextlib.suppress(httpx.HTTPStatusError):  # the dead process had come so far
        client.PullTaskInput(PullTaskInputRequest())
    return client.PullMessages(PullAppMessagesRequest())
