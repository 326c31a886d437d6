"""One request's share of the engine: counted in sequences and scored tokens, and bounded."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from serve.config import keys_hashed
from serve.gateway.fan_out import GENERATE, TOKENS_PER_SEAT, FanOut
from tests.support.app import CHAT, issued, push_two
from tests.support.waiting import settled

TEXT = "/v1/completions"
EMBED = "/v1/embeddings"


@pytest.mark.parametrize(
    ("path", "fields", "seats"),
    [
        (CHAT, {"messages": []}, 1),
        (CHAT, {"n": 4}, 4),
        (TEXT, {"prompt": "x"}, 1),
        (TEXT, {"prompt": [1, 2, 3]}, 1),
        (TEXT, {"prompt": ["a", "b"], "n": 3}, 6),
        (TEXT, {"prompt": [[1], [2, 3]]}, 2),
        (TEXT, {"prompt": []}, 1),
        (TEXT, {"n": None, "prompt": None}, 1),
        ("/v1/chat/completions/batch", {"messages": [[{}], [{}], [{}]]}, 3),
        ("/v1/responses", {"input": ["a", "b"]}, 1),
        (EMBED, {"input": ["a", "b", "c"]}, 3),
        (EMBED, {"input": [1, 2, 3]}, 1),
        (EMBED, {"messages": [[{}], [{}]]}, 2),
        ("/v1/score", {"queries": "a", "documents": ["b", "c"]}, 2),
        ("/v1/rerank", {"query": "a", "documents": ["b", "c", "d"]}, 3),
        ("/tokenize", {"prompt": "x"}, 1),
        (GENERATE, {"token_ids": [1, 2, 3]}, 1),
        (GENERATE, {"token_ids": [1], "sampling_params": {"n": 4}}, 4),
        (GENERATE, {"token_ids": [1], "sampling_params": None, "n": 4}, 1),
    ],
)
def test_a_request_is_worth_as_many_seats_as_it_has_sequences(path, fields, seats):
    assert FanOut.of(path, fields, 10).seats == seats


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (TEXT, {"prompt_logprobs": 20}),
        (TEXT, {"prompt_logprobs": 0}),
        (TEXT, {"echo": True, "logprobs": 1}),
        (CHAT, {"prompt_logprobs": 1}),
        (CHAT, {"echo": True, "top_logprobs": 2, "logprobs": True}),
    ],
)
def test_a_prompt_whose_log_probabilities_are_asked_for_takes_seats_for_its_tokens(path, fields):
    size = 4 * TOKENS_PER_SEAT * 10
    assert FanOut.of(path, fields, size).seats == 11
    assert FanOut.of(path, {**fields, "n": 5}, size).seats == 15
    assert FanOut.of(path, {"logprobs": 5, "echo": False}, size).seats == 1


@pytest.mark.parametrize(
    ("path", "fields", "param", "says"),
    [
        (CHAT, {"n": 257}, "n", "257 answers"),
        (CHAT, {"n": 400}, "n", "up to 256"),
        (TEXT, {"prompt": ["x"] * 400}, "prompt", "400 answers"),
        (TEXT, {"prompt": ["x"] * 20, "n": 20}, "n", "`n` 20 times 20 prompts"),
        ("/v1/chat/completions/batch", {"messages": [[{}]] * 300}, "prompt", "300 answers"),
        (TEXT, {"prompt": "x", "prompt_logprobs": 21}, "prompt_logprobs", "up to 20"),
        (TEXT, {"prompt": "x", "prompt_logprobs": -1}, "prompt_logprobs", "-1"),
        (TEXT, {"prompt": "x", "echo": True, "logprobs": 50}, "prompt_logprobs", "50"),
        (EMBED, {"input": ["x"] * 2049}, "input", "2049 inputs, and one request takes up to 2048"),
        ("/rerank", {"query": "x", "documents": ["x"] * 2049}, "input", "2049"),
        (CHAT, {"n": "400"}, "n", "whole number"),
        (CHAT, {"n": 2.0}, "n", "whole number"),
        (TEXT, {"prompt_logprobs": "20"}, "prompt_logprobs", "whole number"),
    ],
)
async def test_what_is_too_much_for_one_request_is_a_400_with_the_number_and_the_limit(
    client, backend, path, fields, param, says
):
    answer = await client.post(path, json={"model": "base", **fields})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param) and says in error["message"]
    assert not backend.bodies


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"n": 16}),
        (TEXT, {"prompt": ["x"] * 128}),
        (TEXT, {"prompt": ["x"] * 16, "n": 16}),
        (TEXT, {"prompt": "x" * 10_000, "echo": True, "logprobs": 5, "max_tokens": 0}),
        (EMBED, {"input": ["x"] * 2048}),
    ],
)
async def test_what_people_ask_every_day_is_let_in(client, path, fields):
    assert (await client.post(path, json={"model": "base", **fields})).status_code == 200


async def test_a_key_has_limits_of_its_own_and_the_rest_the_servers(connect, config, issue):
    tight = await issue("acme", sequences=2, prompt_logprobs=1, batch=3)
    wide = await issue("acme", name="wide", sequences=1000)
    for path, fields, much in ((CHAT, {"n": 2}, {"n": 3}), (EMBED, {"input": ["x"] * 3}, {"input": ["x"] * 4})):
        assert (await tight.post(path, json={"model": "base", **fields})).status_code == 200
        assert (await tight.post(path, json={"model": "base", **much})).status_code == 400
    assert (await tight.post(TEXT, json={"model": "base", "prompt_logprobs": 2})).status_code == 400
    assert (await wide.post(CHAT, json={"model": "base", "n": 1000})).status_code == 200
    assert (await wide.post(TEXT, json={"model": "base", "prompt_logprobs": 21})).status_code == 400


async def test_an_operator_sets_what_one_request_may_ask(connect, config):
    async with connect(replace(config, max_sequences=2, max_batch=1)) as client:
        assert (await client.post(CHAT, json={"model": "base", "n": 3})).status_code == 400
        assert (await client.post(EMBED, json={"model": "base", "input": ["a", "b"]})).status_code == 400


async def test_beside_a_request_of_many_sequences_another_tenant_is_answered_and_a_second_one_waits(
    connect, config, backend
):
    backend.seats = 16
    async with connect(replace(config, admin_keys=keys_hashed(["run"]))) as operator:
        operator.headers["authorization"] = "Bearer run"
        flood, victim = [await issued(operator, tenant) for tenant in ("flood", "victim")]
        backend.flow.clear()
        body = {"model": "base", "prompt": ["x"] * 14, "n": 10, "stream": True}
        asking = [asyncio.create_task(flood.post(TEXT, json=body)) for _ in range(2)]
        assert await settled(lambda: backend.running == 1)
        asking.append(asyncio.create_task(victim.post(CHAT, json={"model": "base", "stream": True})))
        assert await settled(lambda: backend.running == 2), "the victim waits"
        assert len(backend.bodies) == 2, "both floods at once"
        backend.flow.set()
        assert [(await task).status_code for task in asking] == [200, 200, 200]


async def test_a_shadow_takes_as_many_seats_as_its_request(client, backend, make_adapter):
    _, candidate = await push_two(client, make_adapter)
    await client.post("/v1/adapters/tone/shadow", json={"version": 2, "weight": 1})
    backend.slow = candidate
    await client.post(CHAT, json={"model": "tone", "n": 5})
    queue = client._transport.app.state.parts.fleet.first.engine.queue
    assert await settled(lambda: queue.busy == 5)
