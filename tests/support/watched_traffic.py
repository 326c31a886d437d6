"""Traffic through a server whose engine is a fake that says what it generated, and what is then known of its drift."""

from __future__ import annotations

import asyncio
import itertools
import random

from serve.asgi.exchange import Generation
from tests.support.app import upload

CHAT = "/v1/chat/completions"


class Engine:
    """What the fake engine generates: a topic for the prompts, a delay and a skill for each adapter.

    `odd` ones are bad; `sure` ones say less, and are surer of it.
    """

    def __init__(self, backend, seed=0):
        self.lots = random.Random(seed)
        self.backend = backend
        self.topic = range(8, 20)
        self.slow = {}
        self.odd, self.sure = set(), set()
        backend.generate = self.generate

    def generate(self, body):
        draw = self.lots
        prompt = [1, 2, 3, *draw.choices(self.topic, k=draw.randint(8, 20)), 4, 5]
        model = body["model"]
        length = draw.randint(2, 8) if model in self.sure else draw.randint(5, 30)
        output = draw.choices(range(20, 32) if model in self.odd else range(8, 32), k=length)
        gap = draw.lognormvariate(-4, 0.1) * self.slow.get(model, 1)
        mean = -3 if model in self.odd else -0.3 if model in self.sure else -1
        logprobs = [draw.gauss(mean, 0.3) for _ in output]
        return Generation(
            prompt, output, "length" if model in self.odd else "stop", "a text", 0.001, None, gap, 2 * gap, logprobs
        )


class Askers:
    """Numbers of users, one after the other. Every test begins with the same, whichever were before it."""

    def __init__(self):
        self.begin()

    def begin(self):
        self._numbers = itertools.count()

    def __next__(self):
        return next(self._numbers)


askers = Askers()


async def ask(client, count, model="tone"):
    for _ in range(count):
        answer = await client.post(CHAT, json={"model": model, "user": f"u{next(askers)}"})
        assert answer.status_code == 200


async def drift(client, name="tone"):
    parts = client._transport.app.state.parts
    await asyncio.to_thread(parts.exchange_worker.settle)
    await asyncio.to_thread(parts.events.settle)
    return (await client.get(f"/v1/adapters/{name}/drift")).json()


async def canary_ended(client):
    return (await client.get("/v1/adapters/tone")).json()["canary"] is None


async def push(client, make_adapter, *seeds):
    ids = []
    for seed in seeds:
        promote = str(seed == seeds[0]).lower()
        ids.append((await client.post("/v1/adapters", **upload(make_adapter(seed), promote=promote))).json()["id"])
    return ids
