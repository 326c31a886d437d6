"""The proof of a swap can fail: a server that lies is found out."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from serve.client.bench.swap import Plan, Proof, prove
from serve.client.bench.wire import Address
from serve.errors import LoradockError
from tests.support.listening import listening

WORDS = {1: "alpha ", 2: "bravo "}
PLAN = Plan("tone", (1, 2), streams=4, swaps=6, every=0.2, max_tokens=8)


class Liar:
    """Answers as an honest server does, except in the way that `lie` names."""

    def __init__(self, lie: str = "") -> None:
        self.lie = lie
        self.live = 1
        self.asked = itertools.count()

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/adapters/tone", self.show),
                Route("/v1/adapters/tone/promote", self.promote, methods=["POST"]),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
            ]
        )

    async def show(self, request: Request) -> JSONResponse:
        return JSONResponse({"versions": [{"version": number, "id": f"tone@{number}"} for number in WORDS]})

    async def promote(self, request: Request) -> JSONResponse:
        version = (await request.json())["version"]
        if self.lie != "stale":
            self.live = version
        return JSONResponse({})

    async def chat(self, request: Request) -> StreamingResponse | JSONResponse:
        model = (await request.json())["model"]
        pinned = "@" in model
        version = int(model[-1]) if pinned else self.live
        if self.lie == "failed" and not pinned and next(self.asked) % 5 == 4:
            return JSONResponse({"error": {"message": "no"}}, status_code=500)
        return StreamingResponse(self.stream(version, pinned), media_type="text/event-stream")

    async def stream(self, version: int, pinned: bool) -> AsyncIterator[str]:
        for piece in range(8):
            other = not pinned and piece >= 4
            text = "noise " if self.lie == "wrong" and other else WORDS[version]
            if self.lie == "mixed" and other:
                text = WORDS[3 - version]
            delta = {"delta": {"content": text}, "finish_reason": "length" if piece == 7 else None}
            yield f"data: {json.dumps({'model': f'tone@{version}', 'choices': [delta]})}\n\n"
            await asyncio.sleep(0.005)
        yield "data: [DONE]\n\n"


@asynccontextmanager
async def served(liar: Liar) -> AsyncIterator[Address]:
    async with listening(liar.app()) as url:
        yield Address(url)


async def proof_of(lie: str) -> Proof:
    async with served(Liar(lie)) as address:
        return await prove(address, PLAN)


async def test_an_honest_server_passes():
    seen = await proof_of("")
    assert seen.holds
    assert seen.swaps == 6
    assert seen.answers >= 8
    assert set(seen.answers_per_version.values()).isdisjoint({0})
    assert min(seen.steady_p99_ms, seen.swapping_p99_ms, seen.promoting_p99_ms) > 0
    assert min(seen.gaps) > 0 and seen.gaps[2] <= seen.gaps[1]


@pytest.mark.parametrize("lie", ["failed", "mixed", "wrong", "stale"])
async def test_each_lie_is_found_and_called_by_its_name(lie):
    seen = await proof_of(lie)
    assert not seen.holds
    counts = {name: getattr(seen, name) for name in ("failed", "mixed", "wrong", "stale")}
    assert counts.pop(lie) > 0
    assert not any(counts.values()), counts


async def test_versions_that_speak_alike_prove_nothing():
    liar = Liar()
    async with served(liar) as address:
        with pytest.raises(LoradockError, match="trained to differ"):
            await prove(address, Plan("tone", (1, 1)))
        with pytest.raises(LoradockError, match="no version 7"):
            await prove(address, Plan("tone", (1, 7)))
