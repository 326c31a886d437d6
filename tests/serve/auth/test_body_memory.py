"""What bodies hold in memory: unfinished ones count from their first byte, at each door alike, and for their tenant."""

from __future__ import annotations

import asyncio

import pytest

from serve.auth.body_memory import FEWEST, BodyMemory
from serve.errors import Overloaded
from tests.support.app import CHAT, ask, http
from tests.support.waiting import settled

MIB = 1 << 20
# What a body is read whole at: inference, a file that is no JSON, JSON of the other routes.
DOORS = (("POST", CHAT), ("PUT", "/v1/adapters/tone/baseline"), ("POST", "/v1/feedback"), ("POST", "/v1/batches"))


def test_bodies_of_a_tenant_have_a_bound_together_and_what_has_ended_counts_no_more():
    memory = BodyMemory()
    with memory.held("acme") as first, memory.held("acme") as second, memory.held("globex") as other:
        first(FEWEST - MIB)
        with pytest.raises(Overloaded, match="have 255 MiB, and 256 MiB are the most"):
            second(2 * MIB)
        second(MIB)
        other(FEWEST)
    with memory.held("acme") as again:
        again(FEWEST)
    assert not memory._held


async def test_unfinished_bodies_hold_no_more_memory_than_their_tenant_may(operator, issue):
    """As one key with many connections, each of which sends all of its body but the end."""
    acme, globex = await issue("acme"), await issue("globex")
    bodies = operator._transport.app.state.parts.meters.bodies
    bodies._most = 8 * 900_000

    def unfinished(method, path):
        scope, _, send, sent, left = http({}, path, method)
        scope["headers"].append((b"authorization", acme.headers["authorization"].encode()))
        pieces = [{"type": "http.request", "body": b" " * 300_000, "more_body": True}] * 3

        async def receive():
            if pieces:
                return pieces.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        return asyncio.create_task(operator._transport.app(scope, receive, send)), sent, left

    sending = [unfinished(*DOORS[number % len(DOORS)]) for number in range(40)]
    try:
        assert await settled(lambda: sum(task.done() for task, _, _ in sending) == 32)
        assert bodies._held == {"acme": 8 * 900_000}
        refused = [sent[0] for _, sent, _ in sending if sent]
        assert {message["status"] for message in refused} == {429} and len(refused) == 32
        assert (b"retry-after", b"1") in refused[0]["headers"]
        assert (await ask(acme, "base")).status_code == 429
        assert (await ask(globex, "base")).status_code == 200
    finally:
        for _, _, left in sending:
            left.set()
        await asyncio.gather(*(task for task, _, _ in sending))
    assert not bodies._held
    assert (await ask(acme, "base")).status_code == 200
