"""vLLM's token-in-token-out route, for trainers: the same names, shares, limits and walls as every other."""

from __future__ import annotations

import pytest

from serve.gateway.fan_out import GENERATE, TOKENS_PER_SEAT, FanOut
from tests.support.app import ask, push_two, upload


async def generate(client, model="tone", **fields):
    return await client.post(GENERATE, json={"model": model, "token_ids": [1, 2, 3], "sampling_params": {}, **fields})


async def test_a_name_is_resolved_and_the_answer_says_which_version_gave_it(client, backend, make_adapter):
    ids = await push_two(client, make_adapter)
    for model, version in (("tone", 1), ("tone@v2", 2), (ids[1], 2)):
        answer = await generate(client, model, return_token_ids=True, sampling_params={"logprobs": 0})
        assert (answer.status_code, answer.headers["x-loradock-version"]) == (200, f"tone@v{version}")
        assert backend.bodies[-1]["model"] == ids[version - 1]
        assert backend.bodies[-1]["sampling_params"] == {"logprobs": 0}
        assert backend.bodies[-1]["return_token_ids"] is True
    assert (await generate(client, "nobody")).status_code == 404
    assert "x-loradock-version" not in (await generate(client, "base")).headers


async def test_its_prompt_is_in_its_tenants_part_of_the_cache(issue, backend, make_adapter):
    acme = await issue("acme")
    await acme.post("/v1/adapters", **upload(make_adapter()))
    answer = await generate(acme)
    assert answer.headers["x-loradock-version"] == "tone@v1"
    assert backend.bodies[-1]["cache_salt"] == "acme"
    await generate(acme, cache_salt="default")
    assert backend.bodies[-1]["cache_salt"].startswith("acme:")


async def test_it_takes_turns_and_its_priority_is_the_servers_to_set(client, backend):
    await generate(client, "base", priority=5)
    assert backend.bodies[-1]["priority"] == 5 << 32
    for odd in (-1, "5", 1 << 70):
        assert (await generate(client, "base", priority=odd)).status_code == 400


@pytest.mark.parametrize("sampling", [{"n": 300}, {"prompt_logprobs": 400}, {"prompt_logprobs": -1}, {"n": "400"}])
async def test_what_one_request_may_ask_for_is_bounded_inside_too(client, backend, sampling):
    assert (await generate(client, "base", sampling_params=sampling)).status_code == 400
    assert not backend.bodies


def test_scores_of_a_prompt_take_seats():
    size = 4 * TOKENS_PER_SEAT * 10
    for sampling in ({"prompt_logprobs": 0}, {"prompt_logprobs": 5}, {"prompt_logprob_token_ids": [1, 2]}):
        assert FanOut.of(GENERATE, {"sampling_params": sampling}, size).seats == 11
    assert FanOut.of(GENERATE, {"sampling_params": {"logprobs": 5}}, size).seats == 1


@pytest.mark.parametrize("field", ["features", "content_parts", "kv_transfer_params", "ec_transfer_params"])
async def test_nothing_but_tokens_comes_in(client, backend, field):
    refused = await generate(client, "base", **{field: {"x": 1}})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, field)
    refused = await generate(client, "base", sampling_params={"extra_args": {field: {}}})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "extra_args")
    refused = await generate(client, "base", sampling_params=[1])
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "sampling_params")
    assert not backend.bodies
    assert (await generate(client, "base", **{field: None})).status_code == 200


@pytest.mark.parametrize("path", ["/inference/v1/abort_requests", "/abort_requests", "/v1/completions/render"])
async def test_what_vllm_has_beside_it_stays_unreachable(client, backend, path):
    assert (await client.post(path, json={"request_ids": ["x"]})).status_code == 404
    assert not backend.bodies


async def test_every_answer_of_an_adapter_names_its_version(client, backend, make_adapter):
    await push_two(client, make_adapter)
    for stream in (False, True):
        assert (await ask(client, "tone@v2", stream=stream)).headers["x-loradock-version"] == "tone@v2"
    failed = await ask(client, "tone", stream=True, fail=True)
    assert (failed.status_code, failed.headers["x-loradock-version"]) == (400, "tone@v1")
    for model in ("base", "nobody", None):
        assert "x-loradock-version" not in (await ask(client, model)).headers


async def test_a_shared_adapter_is_named_as_whoever_asks_may_name_it(issue, make_adapter):
    acme, globex = await issue("acme"), await issue("globex")
    await acme.post("/v1/adapters", **upload(make_adapter(), visibility="shared"))
    assert (await ask(acme, "tone")).headers["x-loradock-version"] == "tone@v1"
    assert (await ask(globex, "acme/tone")).headers["x-loradock-version"] == "acme/tone@v1"
