"""Tokens wait for one another for some milliseconds: in order, none twice, the first and the last at once."""

from __future__ import annotations

import asyncio
import time

from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.output_processor import RequestOutputCollector

from serve.vllm_backend.coalescing import Coalescing


class ByHand(Coalescing):
    """Released when the test says so."""

    def __init__(self):
        super().__init__(3600)

    def release(self):
        self._timer.cancel()
        self._release()


def output(text, finished=False):
    said = CompletionOutput(0, text, [1], None, None, finish_reason="stop" if finished else None)
    return RequestOutput("r", None, [1], None, [said], finished)


def queue(coalescing):
    collector = RequestOutputCollector(RequestOutputKind.DELTA, "r")
    coalescing.collect(collector)
    return collector


async def test_the_first_and_the_last_output_go_at_once_and_those_between_together():
    coalescing = ByHand()
    collector = queue(coalescing)
    reading = asyncio.create_task(read(collector))
    await turns()
    collector.put(output("a"))
    assert await turns() and reading.result()[0] == "a"
    reading = asyncio.create_task(read(collector))
    await turns()
    for text in ("b", "c", "d"):
        collector.put(output(text))
        await turns()
    assert not reading.done(), "they wait"
    coalescing.release()
    await turns()
    assert reading.result() == ("bcd", [1, 1, 1], False)
    reading = asyncio.create_task(read(collector))
    await turns()
    collector.put(output("e"))
    collector.put(output("f", finished=True))
    await turns()
    assert reading.result() == ("ef", [1, 1], True)
    coalescing.release()
    assert collector.output is None and not collector.ready.is_set()


async def test_an_error_goes_at_once_and_a_reader_that_is_awake_need_not_wait():
    coalescing = ByHand()
    collector = queue(coalescing)
    collector.put(output("a"))
    assert collector.get_nowait().outputs[0].text == "a"
    collector.put(output("b"))
    assert collector.get_nowait().outputs[0].text == "b"
    coalescing.release()
    assert not collector.ready.is_set(), "a reader would turn in a circle"
    reading = asyncio.create_task(collector.get())
    await turns()
    collector.put(ValueError("the engine is dead"))
    await turns()
    assert isinstance(reading.exception(), ValueError)


async def test_whole_answers_are_left_to_vllm():
    collector = RequestOutputCollector(RequestOutputKind.FINAL_ONLY, "r")
    Coalescing(1).collect(collector)
    assert type(collector) is RequestOutputCollector


async def test_all_are_released_together_and_one_that_fails_keeps_nobody():
    released, coalescing = [], Coalescing(0.001)

    def fail():
        raise RuntimeError("gone")

    for key, release in (("x", fail), ("y", lambda: released.append("y")), ("y", lambda: released.append("z"))):
        coalescing.hold(key, release)
    while not released:
        await asyncio.sleep(0.001)
    assert released == ["z"]


async def read(collector):
    answer = await collector.get()
    return answer.outputs[0].text, list(answer.outputs[0].token_ids), answer.finished


async def turns(count=5):
    """So many turns of the event loop."""
    began = time.monotonic()
    for _ in range(count):
        await asyncio.sleep(0)
    return began
