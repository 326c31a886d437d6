"""The front door's campaign in short: bodies that no honest client sends, to every route, are never a 500."""

from __future__ import annotations

import gc
import random
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from tests.campaigns import front_door
from tests.serve.asgi.test_json_weight import tools
from tests.support.app import CHAT
from tests.support.garbage import left_by

SAY = [{"role": "user", "content": "x"}]
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 60_000}}
MESSAGE = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "x"}]}
LARGEST = {
    "a prompt of 128k token ids": ("/v1/completions", {"prompt": list(range(131_072))}),
    "200 tools with schemas": (CHAT, {"messages": SAY, "tools": tools(200, 40)}),
    "64 images": (CHAT, {"messages": [{"role": "user", "content": [IMAGE] * 64}]}),
    "4 MiB of text": ("/v1/responses", {"input": "x" * (4_190_000)}),
    "2,000 items": ("/v1/responses", {"input": [MESSAGE] * 2000}),
    "2,048 inputs of 500 token ids": ("/v1/embeddings", {"input": [[7] * 500] * 2048}),
    "1,000 documents": ("/rerank", {"query": "x", "documents": ["a document " * 300] * 1000}),
}


async def test_the_largest_honest_requests_pass(tmp_path):
    async with front_door.door(tmp_path) as (_, client):
        for name, (path, body) in LARGEST.items():
            answer = await client.post(path, json={"model": "base", **body})
            assert answer.status_code == 200, (name, answer.text[:300])


async def test_no_body_is_a_500_at_any_route(tmp_path):
    async with front_door.door(tmp_path) as (_, client):
        seen = await front_door.sent(client, 400, 64 << 10, seed=7)
        assert (await client.post("/v1/chat/completions", json=front_door.HONEST)).status_code == 200
    assert len(seen) > 50 and sum(found.statuses[413] + found.statuses[400] for found in seen.values()) > 200
    assert not [failure for found in seen.values() for failure in found.failures]


LISTS = [[]] * 20_000
# So long that whoever looks at requests keeps none of it.
LONG = {"messages": SAY, "user": "x" * 300_000}
REFUSED = {
    "by a check of ours": (CHAT, {"model": "base", **LONG, "priority": LISTS}),
    "for a model that is not there": (CHAT, {"model": "none", **LONG, "metadata": LISTS}),
    "by a model of vLLM's": (CHAT, {"model": "base", **LONG, "top_p": LISTS}),
    "for what it holds": (CHAT, {"model": "base", **LONG, "metadata": [[]] * 40_000}),
    "by a route of ours": ("/v1/adapters/none/promote", {"version": LISTS}),
    "for an adapter that is not there": ("/v1/adapters/none/golden/run", {"cases": LISTS}),
}


async def test_what_was_refused_is_gone_without_a_collection_of_garbage(tmp_path):
    async with front_door.door(tmp_path) as (_, client):
        gc.freeze()
        for name, (path, body) in REFUSED.items():

            async def refused(path=path, body=body):
                answer = await client.post(path, json=body)
                assert 400 <= answer.status_code < 500, answer.text[:200]

            assert await left_by(refused) < 10_000, name


async def test_the_worst_bodies_of_a_run_can_be_sent_again(tmp_path):
    class Answers:
        async def request(self, method, path, content, headers):
            asked.append(content)
            return SimpleNamespace(status_code=500 if b"wrong" in content else 200, text="")

    async def some():
        for body in (b"fine", b"wrong" * 1000, b"fine too"):
            yield front_door.Sent("POST", "/v1/x", body, "a body")

    asked = []
    seen = await front_door.asked(Answers(), some())
    (found,) = seen.values()
    assert found.statuses == {200: 2, 500: 1} and len(found.failures) == 1
    file = tmp_path / "worst"
    file.write_text("\n".join(found.worst()))
    asked.clear()
    again = await front_door.asked(Answers(), front_door.replayed(file))
    assert b"wrong" * 1000 in asked and again["POST /v1/x"].failures == found.failures


def test_bodies_are_of_every_kind_and_the_same_for_a_seed():
    drawn = [front_door.body(random.Random(seed), ["input"], 1 << 12) for seed in range(300)]
    assert drawn == [front_door.body(random.Random(seed), ["input"], 1 << 12) for seed in range(300)]
    assert {said.split()[0] for said, _ in drawn} >= {
        "bulk",
        "few",
        "wide",
        "deep",
        "nested",
        "digits",
        "key",
        "text",
        "half",
    }
