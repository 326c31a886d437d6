"""What a request costs its key: every token that the engine read and generated, however the answer ended."""

from __future__ import annotations

from dataclasses import replace

import pytest

from serve.asgi.exchange import Generation, Watch, count_generated_tokens, count_prompt_tokens
from serve.config import keys_hashed
from tests.support.app import CHAT, issued, upload
from tests.support.backend import FakeSequence
from tests.support.watched_traffic import Engine

LIMIT = 1000


@pytest.fixture
async def client(issue, backend):
    backend.generation = Generation(range(300), range(50), "stop")
    return await issue("acme", tokens_per_minute=LIMIT)


async def cost(client) -> int:
    """What the key has spent, by what it is told; within a second's worth of what comes back meanwhile."""
    answer = await client.post("/tokenize", json={"model": "base", "prompt": ""})
    spent = LIMIT - int(answer.headers["x-ratelimit-remaining-tokens"])
    return 350 * round(spent / 350)


@pytest.fixture
def quiet(backend):
    """/tokenize generates nothing."""
    made = backend.generation
    backend.generate = lambda body: Generation((), (), "stop") if body.get("prompt") == "" else made


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"stream": True},
        {"stream": True, "stream_interval": 100},
        {"stream": True, "stream_options": {"include_usage": True}},
        {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    ],
)
@pytest.mark.parametrize("usage", [None, {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}])
async def test_an_answer_costs_what_the_engine_did_whatever_the_answer_says(client, backend, quiet, fields, usage):
    backend.usage = usage
    assert (await client.post(CHAT, json={"model": "base", **fields})).status_code == 200
    assert await cost(client) == 350


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_is_broken_off_costs_what_was_generated(client, backend, quiet, stream):
    backend.slow = "base"
    body = {"model": "base", "prompt": "x", "stream": stream}
    answer = await client.post("/v1/completions", json=body, headers={"X-Request-Timeout": "0.05"})
    assert answer.status_code == 504
    backend.slow = None
    assert await cost(client) == 350


async def test_an_answer_whose_engine_fails_costs_what_was_generated(client, backend, quiet):
    backend.broken = "base"
    with pytest.raises(RuntimeError, match="broken"):
        await client.post(CHAT, json={"model": "base"})
    backend.broken = None
    assert await cost(client) == 350


async def test_what_never_reached_the_engine_costs_nothing(client, quiet):
    assert (await client.post(CHAT, json={"model": "nobody"})).status_code == 404
    assert (await client.post(CHAT, json={"model": "base", "priority": -1})).status_code == 400
    assert await cost(client) == 0


def test_the_prompt_of_several_sequences_counts_once_and_each_prompt_of_a_batch():
    shared = [1, 2, 3]
    watch = Watch()
    watch.sequences += [FakeSequence(Generation(shared, [4] * count, "stop")) for count in (1, 2)]
    watch.sequences += [FakeSequence(Generation(list(shared), (), "abort"))]
    made = watch.read()
    assert count_prompt_tokens(made) + count_generated_tokens(made) == 3 + 1 + 2 + 3


async def test_building_a_baseline_is_charged_to_the_key_and_has_a_bound(connect, watched, backend, make_adapter):
    Engine(backend)
    async with connect(replace(watched, admin_keys=keys_hashed(["run"]))) as operator:
        operator.headers["authorization"] = "Bearer run"
        client = await issued(operator, "acme", "adapters:write", tokens_per_minute=50, requests_per_minute=100)
        assert (await client.post("/v1/adapters", **upload(make_adapter()))).status_code == 201
        much = {"prompts": ["x"] * 5000, "max_tokens": 1000}
        refused = await client.post("/v1/adapters/tone/baseline", json=much)
        assert refused.status_code == 400 and "5000000 tokens" in refused.json()["error"]["message"]
        assert not backend.bodies
        prompts = {"prompts": [f"prompt {number}" for number in range(30)]}
        assert (await client.post("/v1/adapters/tone/baseline", json=prompts)).status_code == 200
        again = await client.post("/v1/adapters/tone/baseline", json=prompts)
        assert (again.status_code, again.json()["error"]["code"]) == (429, "rate_limit_exceeded")
