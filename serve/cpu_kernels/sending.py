"""An engine that computes where it schedules sends outputs itself, as soon as it has them.

vLLM has a thread for that. It waits for Python's lock until the next step computes, so clients hear of a token a
millisecond later; and it wakes up on the core on which the engine schedules, where every step waits for it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import zmq

from serve.models import hardware


class Outbox:
    """In place of the queue of outputs: what is put in is sent at once. The end goes to who closes the sockets."""

    def __init__(self, send: Callable[[Any], None], end: Callable[[Any], None]) -> None:
        self._send, self._end = send, end

    def put_nowait(self, output: Any) -> None:
        (self._end if isinstance(output, bytes) else self._send)(output)


def process_output_sockets(
    original: Callable[..., None], core: Any, output_paths: list[str], coord_output_path: str | None, engine_index: int
) -> None:
    """vLLM's thread of outputs: opens the sockets, and closes them after the end of the engine was told."""
    from vllm.utils.network_utils import make_zmq_socket
    from vllm.v1.executor.uniproc_executor import UniProcExecutor
    from vllm.v1.serial_utils import MsgpackEncoder

    if not isinstance(core.model_executor, UniProcExecutor) or coord_output_path is not None:
        original(core, output_paths, coord_output_path, engine_index)
        return
    hardware.leave_core()  # ZeroMQ's own thread, too, is where this one is
    encoder, alone = MsgpackEncoder(), threading.Lock()
    with ExitStack() as stack, zmq.Context() as context:
        # They linger, so that the end of the engine is told before its sockets are closed.
        sockets = [stack.enter_context(make_zmq_socket(context, path, zmq.PUSH, linger=4000)) for path in output_paths]

        def send(output: tuple[int, Any]) -> None:
            client, outputs = output
            outputs.engine_index = engine_index
            with alone:  # a socket may go from thread to thread, one after the other
                sockets[client].send_multipart(encoder.encode(outputs), copy=False)

        waiting: queue.Queue[Any] = core.output_queue
        core.output_queue = Outbox(send, waiting.put_nowait)
        while not isinstance(output := waiting.get(), bytes):
            send(output)  # was put in before
        with alone:
            for socket in sockets:
                socket.send(output)
