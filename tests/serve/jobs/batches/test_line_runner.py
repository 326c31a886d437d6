"""Lines go in the gaps of traffic, a bounded number at a time."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

from serve.asgi.internal_client import RecordedAnswer
from serve.jobs.batches import line_runner
from serve.jobs.batches.line_runner import Gaps, Stopped
from tests.support.waiting import settled


@dataclass(eq=False)
class Base:
    name: str = "base"
    leases: int = 0
    background: int = 0


class Crowd:
    """Lines that wait for their turn, and stay until they are let go."""

    def __init__(self, gaps, base, count):
        self.running, self.leave, self.stopped = 0, asyncio.Event(), False
        self.tasks = [asyncio.create_task(self._line(gaps, base)) for _ in range(count)]

    async def _line(self, gaps, base):
        async with gaps.turn(base, lambda: self.stopped):
            self.running += 1
            await self.leave.wait()
        self.running -= 1


async def test_while_no_client_is_answered_so_many_lines_run_at_a_time():
    crowd = Crowd(Gaps(3), Base(), 8)
    assert await settled(lambda: crowd.running == 3)
    await asyncio.sleep(0.15)
    assert crowd.running == 3
    crowd.leave.set()
    await asyncio.gather(*crowd.tasks)


async def test_beside_clients_a_line_waits_for_a_gap_and_then_goes_alone(monkeypatch):
    monkeypatch.setattr(line_runner, "GAP_SECONDS", 1e9)
    base = Base(leases=2)
    crowd = Crowd(Gaps(3), base, 8)
    await asyncio.sleep(0.15)
    assert crowd.running == 0
    monkeypatch.setattr(line_runner, "GAP_SECONDS", 0.3)
    assert await settled(lambda: crowd.running == 1)
    await asyncio.sleep(0.5)
    assert crowd.running == 1, "one at a time"
    base.leases = 1
    base.background = 1
    assert await settled(lambda: crowd.running == 3), "the lines themselves are no clients"
    crowd.leave.set()
    await asyncio.gather(*crowd.tasks)


@pytest.mark.parametrize(
    "status, body, kept",
    [
        (200, b'{"a": 1}', b'{"a": 1}'),
        (200, b'{\n "a": 1}\n', b'{"a":1}'),
        (500, b"Internal Server Error", b'"Internal Server Error"'),
        (502, b"", b'""'),
        (400, b'{"error": {}}', b'{"error":{}}'),
    ],
)
async def test_an_answer_is_json_in_one_line_whatever_it_was(status, body, kept):
    recorded = RecordedAnswer(1000)
    await recorded.send({"type": "http.response.start", "status": status})
    await recorded.send({"type": "http.response.body", "body": body})
    assert line_runner._body(recorded) == kept


async def test_a_batch_that_stops_waits_for_no_gap():
    base = Base(leases=1)
    crowd = Crowd(Gaps(3), base, 2)
    await asyncio.sleep(0.1)
    crowd.stopped = True
    for task in crowd.tasks:
        with pytest.raises(Stopped):
            await task
