"""Outputs of an engine reach the client in order, whoever puts them in, and its end after them."""

from __future__ import annotations

import queue
import threading
from types import SimpleNamespace

import msgspec
import pytest
import zmq
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.serial_utils import MsgpackDecoder

from serve.cpu_kernels.sending import Outbox, process_output_sockets

SECONDS = 20


def outputs(number: int) -> tuple[int, EngineCoreOutputs]:
    return 0, EngineCoreOutputs(outputs=[EngineCoreOutput(request_id=str(number), new_token_ids=[number])])


def core(together: bool = True) -> SimpleNamespace:
    executor = UniProcExecutor.__new__(UniProcExecutor) if together else object()
    return SimpleNamespace(model_executor=executor, output_queue=queue.Queue())


@pytest.fixture
def client(tmp_path):
    path = f"ipc://{tmp_path}/outputs"
    with zmq.Context() as context, context.socket(zmq.PULL) as socket:
        socket.setsockopt(zmq.RCVTIMEO, 1000 * SECONDS)
        socket.bind(path)
        yield path, socket


def taken(socket: zmq.Socket) -> int:
    decoded = MsgpackDecoder(EngineCoreOutputs).decode(socket.recv_multipart())
    assert decoded.engine_index == 3
    return decoded.outputs[0].new_token_ids[0]


def test_what_is_put_in_is_sent_by_who_puts_it_in(client):
    path, socket = client
    engine = core()
    waiting = engine.output_queue
    waiting.put_nowait(outputs(0))  # before anybody can send
    thread = threading.Thread(target=process_output_sockets, args=(None, engine, [path], None, 3))
    thread.start()
    assert taken(socket) == 0
    assert isinstance(engine.output_queue, Outbox) and waiting.empty()
    for number in range(1, 200):
        engine.output_queue.put_nowait(outputs(number))
    assert [taken(socket) for _ in range(1, 200)] == list(range(1, 200))
    several = [threading.Thread(target=engine.output_queue.put_nowait, args=(outputs(n),)) for n in range(64)]
    for each in several:
        each.start()
    assert sorted(taken(socket) for _ in several) == list(range(64))
    for each in several:
        each.join()
    engine.output_queue.put_nowait(EngineCoreProc.ENGINE_CORE_DEAD)
    assert socket.recv() == EngineCoreProc.ENGINE_CORE_DEAD
    thread.join(SECONDS)
    assert not thread.is_alive()


def test_what_cannot_be_sent_is_told_to_who_puts_it_in(client):
    path, socket = client
    engine = core()
    thread = threading.Thread(target=process_output_sockets, args=(None, engine, [path], None, 3))
    engine.output_queue.put_nowait(outputs(0))
    thread.start()
    assert taken(socket) == 0
    with pytest.raises((TypeError, msgspec.MsgspecError)):
        engine.output_queue.put_nowait((0, SimpleNamespace(outputs=[object])))
    engine.output_queue.put_nowait(outputs(7))
    assert taken(socket) == 7
    engine.output_queue.put_nowait(EngineCoreProc.ENGINE_CORE_DEAD)
    assert socket.recv() == EngineCoreProc.ENGINE_CORE_DEAD
    thread.join(SECONDS)


@pytest.mark.parametrize(("together", "coordinator"), [(False, None), (True, "ipc://coordinator")])
def test_elsewhere_vllms_own_thread_sends(together, coordinator):
    asked = []
    engine = core(together)
    process_output_sockets(lambda *told: asked.append(told), engine, ["ipc://x"], coordinator, 3)
    assert asked == [(engine, ["ipc://x"], coordinator, 3)]
    assert isinstance(engine.output_queue, queue.Queue)
