"""A key's share, with a clock that the test winds."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.asgi.exchange import Generation
from serve.auth.rate_limits import Bucket, Limits, Meter, Meters
from serve.errors import RateLimited
from tests.support.app import ask, upload
from tests.support.waiting import settled


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def once(meter: Meter, tokens: int = 0) -> None:
    with meter.request():
        meter.charge(tokens)


def test_a_minutes_worth_may_come_at_once_and_then_evenly(clock):
    meter = Meter(Limits(requests_per_minute=6), clock)
    for _ in range(6):
        once(meter)
    with pytest.raises(RateLimited) as refused:
        once(meter)
    assert refused.value.retry_after == 10
    clock.now = 9.9
    with pytest.raises(RateLimited):
        once(meter)
    clock.now = 10.1
    once(meter)
    with pytest.raises(RateLimited):
        once(meter)


def test_tokens_are_paid_afterwards_and_a_debt_is_waited_for(clock):
    meter = Meter(Limits(tokens_per_minute=60), clock)
    once(meter, 90)
    with pytest.raises(RateLimited, match="60 tokens per minute") as refused:
        once(meter)
    assert refused.value.headers() == {
        "Retry-After": "31",
        "x-ratelimit-limit-tokens": "60",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "1m30s",
    }
    clock.now = 31
    once(meter)


def test_a_refused_request_costs_nothing(clock):
    meter = Meter(Limits(requests_per_minute=2, concurrent=1), clock)
    with meter.request():
        for _ in range(5):
            with pytest.raises(RateLimited, match="under way"):
                once(meter)
    assert meter.headers()["x-ratelimit-remaining-requests"] == "1"
    once(meter)


def test_a_request_that_fails_gives_its_place_back(clock):
    meter = Meter(Limits(concurrent=1), clock)
    with pytest.raises(ZeroDivisionError), meter.request():
        raise ZeroDivisionError
    once(meter)


@given(st.integers(1, 1000), st.lists(st.tuples(st.floats(0, 100), st.integers(0, 500)), max_size=40))
def test_no_more_passes_in_the_long_run_than_was_allowed(per_minute, steps):
    clock, passed = Clock(), 0
    bucket = Bucket(per_minute, 0.0)
    for pause, amount in steps:
        clock.now += pause
        if amount <= per_minute and not bucket.wait(amount, clock.now):
            bucket.take(amount, clock.now)
            passed += amount
        assert passed <= per_minute + clock.now * per_minute / 60 + 1e-6
        assert bucket.level(clock.now) <= per_minute


def test_memory_holds_only_keys_that_have_something_to_remember(clock):
    meters = Meters(clock)
    limits = Limits(requests_per_minute=60)
    assert meters.of("free", Limits(adapters=3)) is None
    with meters.of("busy", limits).request():
        for number in range(10_000):
            clock.now += 1
            once(meters.of(f"key-{number}", limits))
        assert len(meters) < 2000
        busy = meters.of("busy", limits)
    assert meters.of("busy", limits) is busy


async def test_headers_tell_a_client_where_it_stands(issue):
    client = await issue("acme", "inference", requests_per_minute=2, tokens_per_minute=100)
    first = await ask(client, "base")
    assert (first.headers["x-ratelimit-limit-requests"], first.headers["x-ratelimit-remaining-requests"]) == ("2", "1")
    assert first.headers["x-ratelimit-remaining-tokens"] == "100"
    await ask(client, "base")
    third = await ask(client, "base")
    assert (third.status_code, third.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert 1 <= int(third.headers["retry-after"]) <= 30
    assert third.headers["x-ratelimit-remaining-requests"] == "0"


async def test_a_key_without_limits_gets_no_headers(issue):
    assert not [name for name in (await ask(await issue("acme"), "base")).headers if name.startswith("x-ratelimit")]


async def test_what_an_answer_used_is_charged(issue, backend):
    backend.generation = Generation(range(40), range(20), "stop")
    backend.usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    client = await issue("acme", "inference", tokens_per_minute=100)
    plain = await ask(client, "base")
    assert plain.json() == {"model": "base", "usage": backend.usage}
    streamed = await ask(client, "base", stream=True, stream_options={"include_usage": True})
    assert streamed.headers["x-ratelimit-remaining-tokens"] == "40"
    assert streamed.text.endswith("data: [DONE]\n\n")
    assert (await ask(client, "base")).status_code == 429


async def test_one_keys_limit_is_no_other_keys(issue):
    one, other = [await issue("acme", "inference", name=name, requests_per_minute=1) for name in ("one", "other")]
    assert [(await ask(client, "base")).status_code for client in (one, one, other)] == [200, 429, 200]


async def test_a_place_is_free_again_when_its_answer_ends(issue, backend):
    client = await issue("acme", "inference", concurrent=1)
    backend.flow.clear()
    answering = asyncio.create_task(ask(client, "base", stream=True))
    assert await settled(lambda: backend.running == 1)
    assert (await ask(client, "base")).status_code == 429
    backend.flow.set()
    assert (await answering).status_code == 200
    assert (await ask(client, "base")).status_code == 200


async def test_a_tokens_limit_takes_no_background(issue):
    body = {"model": "base", "input": "x", "background": True}
    assert (await (await issue("acme", tokens_per_minute=9)).post("/v1/responses", json=body)).status_code == 400
    assert (await (await issue("acme", concurrent=9)).post("/v1/responses", json=body)).status_code == 200


async def test_a_tenant_keeps_as_many_adapters_and_bytes_as_its_key_may_let_it(issue, backend, config, make_adapter):
    client = await issue("acme", adapters=1)
    first = await client.post("/v1/adapters", **upload(make_adapter(0), name="one"))
    assert first.status_code == 201
    refused = await client.post("/v1/adapters", **upload(make_adapter(1), name="two"))
    assert (refused.status_code, refused.json()["error"]["type"]) == (429, "insufficient_quota")
    assert (await client.post("/v1/adapters", **upload(make_adapter(1), name="one"))).status_code == 201
    tight = await issue("acme", adapter_bytes=3 * first.json()["bytes"])
    assert (await tight.post("/v1/adapters", **upload(make_adapter(2), name="one"))).status_code == 201
    assert (await tight.post("/v1/adapters", **upload(make_adapter(3), name="one"))).status_code == 429
    assert (await tight.post("/v1/adapters", **upload(make_adapter(0), name="one"))).status_code == 200
    assert await settled(lambda: len(list((config.data_dir / "blobs").iterdir())) == 3)
    assert (
        await (await issue("globex", adapters=1)).post("/v1/adapters", **upload(make_adapter(3)))
    ).status_code == 201
