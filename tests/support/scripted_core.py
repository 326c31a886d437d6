"""An engine core without a model: it speaks vLLM's protocol over ZeroMQ and says a scripted text to everybody.

Each step gives every request one token of the script, which begins anew at its end, so the server behind it has all
of an engine's outputs to carry and nothing to wait for. A server connects to it as to an engine that somebody else
manages (`client_addresses`, vLLM's own way of several front ends): see tests.support.scripted_server.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import zmq

# What the methods of an engine answer that a server calls while it starts; None for all others.
ANSWERS: dict[str, Any] = {
    "get_supported_tasks": ["generate"],
    "loradock_notices": [[]],
    "loradock_weights": [""],
    "loradock_settle": [None],
    "loradock_steps": [[]],
    "list_loras": [],
    "is_sleeping": False,
}


@dataclass
class Running:
    """A request that is answered. logprobs: likeliest tokens that are told of each, None without."""

    client: int
    left: int
    logprobs: int | None = None
    said: int = 0


@dataclass(frozen=True)
class Addresses:
    """Of one front end: where requests come from, and where outputs go."""

    input: str
    output: str


class ScriptedCore:
    """`run` until `stop` is set; `emitted` counts tokens. Both are values that another process may share."""

    def __init__(
        self, front_ends: Sequence[Addresses], script: Sequence[int], steps_a_second: float, emitted: Any, stop: Any
    ) -> None:
        from vllm.v1.engine import EngineCoreRequest
        from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

        self._script = list(script)
        self._seconds = 1 / steps_a_second
        self._emitted = emitted
        self._stop = stop
        self._requests: dict[str, Running] = {}
        self._encoder = MsgpackEncoder()
        self._decoder = MsgpackDecoder(EngineCoreRequest)
        context = zmq.Context()
        self._poller = zmq.Poller()
        self._inputs, self._outputs = [], []
        for addresses in front_ends:
            incoming = context.socket(zmq.DEALER)
            incoming.setsockopt(zmq.IDENTITY, (0).to_bytes(2, "little"))
            incoming.setsockopt(zmq.RCVHWM, 0)
            incoming.connect(addresses.input)
            incoming.send(msgspec.msgpack.encode(_ready()))
            outgoing = context.socket(zmq.PUSH)
            outgoing.setsockopt(zmq.SNDHWM, 0)
            outgoing.connect(addresses.output)
            self._poller.register(incoming, zmq.POLLIN)
            self._inputs.append(incoming)
            self._outputs.append(outgoing)

    def run(self) -> None:
        due = time.monotonic() + self._seconds
        while not self._stop.value:
            for socket, _ in self._poller.poll(max(0, round(1000 * (due - time.monotonic())))):
                while socket.poll(0):
                    self._take(
                        self._inputs.index(socket), [frame.buffer for frame in socket.recv_multipart(copy=False)]
                    )
            if time.monotonic() >= due:
                self._step()
                # A step that is late makes the next one late as well: an engine does not catch up.
                due = max(due + self._seconds, time.monotonic())

    def _take(self, client: int, frames: list[Any]) -> None:
        from vllm.v1.engine import EngineCoreOutputs, UtilityOutput
        from vllm.v1.serial_utils import UtilityResult

        kind, rest = bytes(frames[0]), frames[1:]
        if kind == b"\x00":
            request = self._decoder.decode(rest)
            params = request.sampling_params
            self._requests[request.request_id] = Running(request.client_index, params.max_tokens, params.num_logprobs)
        elif kind == b"\x01":
            for request_id in msgspec.msgpack.decode(rest[0]):
                self._requests.pop(request_id, None)
        elif kind == b"\x03":
            _, call, method, arguments = msgspec.msgpack.decode(rest[0])
            answer = ANSWERS.get(arguments[0] if method == "collective_rpc" else method)
            output = UtilityOutput(call_id=call, result=UtilityResult(answer))
            self._send(client, EngineCoreOutputs(utility_output=output))

    def _step(self) -> None:
        from vllm.v1.engine import EngineCoreOutputs
        from vllm.v1.metrics.stats import SchedulerStats

        if not self._requests:
            return
        now = time.monotonic()
        outputs: list[list[Any]] = [[] for _ in self._outputs]
        for request_id, request in list(self._requests.items()):
            outputs[request.client].append(self._output(request_id, request, now))
        stats = SchedulerStats(num_running_reqs=len(self._requests))
        for client, its in enumerate(outputs):
            if its or client == 0:
                scheduler_stats = stats if client == 0 else None
                self._send(client, EngineCoreOutputs(outputs=its, timestamp=now, scheduler_stats=scheduler_stats))
        self._emitted.value += sum(map(len, outputs))

    def _output(self, request_id: str, request: Running, now: float) -> Any:
        from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType, EngineCoreOutput, FinishReason
        from vllm.v1.metrics.stats import PrefillStats
        from vllm.v1.outputs import LogprobsLists

        token = self._script[request.said % len(self._script)]
        output = EngineCoreOutput(request_id, [token])
        if request.said == 0:
            output.events = [
                EngineCoreEvent(kind, now) for kind in (EngineCoreEventType.QUEUED, EngineCoreEventType.SCHEDULED)
            ]
            output.prefill_stats = PrefillStats(num_prompt_tokens=1, num_computed_tokens=1)
        if request.logprobs is not None:
            tokens = np.array([[token, *range(100, 100 + request.logprobs)]], dtype=np.int32)
            values = -np.arange(1, tokens.size + 1, dtype=np.float32)[None] / 8
            output.new_logprobs = LogprobsLists(tokens, values, np.ones(1, dtype=np.int32))
        request.said += 1
        if request.said >= request.left:
            output.finish_reason = FinishReason.LENGTH
            del self._requests[request_id]
        return output

    def _send(self, client: int, outputs: Any) -> None:
        self._outputs[client].send_multipart(self._encoder.encode(outputs), copy=False)


def run(front_ends: Sequence[Addresses], script: Sequence[int], steps_a_second: float, emitted: Any, stop: Any) -> None:
    """A process's whole life."""
    ScriptedCore(front_ends, script, steps_a_second, emitted, stop).run()


def _ready() -> Any:
    from vllm.v1.engine import EngineCoreReadyResponse

    return EngineCoreReadyResponse(
        max_model_len=8192,
        num_gpu_blocks=100_000,
        block_size=16,
        dp_stats_address=None,
        dtype="bfloat16",
        vllm_version="scripted",
        world_size=1,
        data_parallel_size=1,
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        decode_context_parallel_size=1,
        data_parallel_rank=0,
        max_num_seqs=1024,
        max_num_batched_tokens=8192,
        instance_id="scripted",
        supports_lora=True,
        max_loras=8,
    )
