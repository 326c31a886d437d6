"""A key's limits hold over all servers of a registry, a beat or two later, and no request asks for it."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import replace

import httpx
import pytest

from serve.auth import shared_limits
from serve.auth.rate_limits import Limits, Meters
from serve.auth.shared_limits import SharedLimits
from serve.config import keys_hashed
from serve.errors import RateLimited
from tests.support.app import ask, issued
from tests.support.backend import FakeBackend

LIMITS = Limits(requests_per_minute=6, tokens_per_minute=600)


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


class Serving:
    """A server's meters, and what it tells of them."""

    def __init__(self, id, clock):
        self.id = id
        self.meters = Meters(clock, shared=True)
        self.limits = SharedLimits(self.meters, clock)

    def asks(self, limits=LIMITS, tokens=0):
        """One request with the key; whether it was let in."""
        meter = self.meters.of("key", limits)
        try:
            with meter.request():
                meter.charge(tokens)
        except RateLimited:
            return False
        return True


def beat(*servers):
    rows = [{"id": server.id, **server.limits.told()} for server in servers]
    for server in servers:
        server.limits.hear([row for row in rows if row["id"] != server.id])


@pytest.fixture
def pair(clock):
    servers = Serving("one", clock), Serving("other", clock)
    beat(*servers)
    return servers


def test_what_a_key_used_on_one_server_it_has_used_on_all(pair, clock):
    one, other = pair
    assert [one.asks() for _ in range(7)] == [True] * 6 + [False]
    beat(*pair)
    assert not other.asks()
    clock.now += 10.1
    assert other.asks() and not other.asks()
    beat(*pair)
    assert not one.asks()


def test_a_debt_of_tokens_is_owed_everywhere(pair, clock):
    one, other = pair
    assert one.asks(tokens=1200)
    beat(*pair)
    assert not other.asks()
    clock.now += 61
    assert other.asks()


def test_in_the_long_run_no_more_passes_on_all_servers_than_on_one(pair, clock):
    limits = Limits(requests_per_minute=30)
    passed = 0
    for _ in range(600):
        clock.now += 1
        passed += sum(server.asks(limits) for server in pair for _ in range(3))
        beat(*pair)
    # A minute's worth at once, the rate, and what one beat let in on the second server.
    assert 30 + 300 - 1 <= passed <= 30 + 300 + 6


def test_a_request_that_was_sent_on_counts_where_it_was_answered(pair):
    one, other = pair
    for _ in range(3):
        meter = one.meters.of("key", LIMITS)
        with meter.request():
            meter.give_back()
        assert other.asks()
    beat(*pair)
    beat(*pair)
    for server in pair:
        assert server.meters.of("key", LIMITS).headers()["x-ratelimit-remaining-requests"] == "3"


def test_a_server_that_starts_again_counts_from_zero(pair, clock):
    one, other = pair
    assert one.asks() and one.asks()
    beat(*pair)
    again = Serving("one", clock)
    assert again.asks() and again.asks()
    beat(again, other)
    assert other.meters.of("key", LIMITS).headers()["x-ratelimit-remaining-requests"] == "2"


def test_a_server_that_joins_pays_for_nothing_that_was_before(pair, clock):
    one, _ = pair
    for _ in range(100):
        clock.now += 10
        assert one.asks()
    late = Serving("late", clock)
    beat(one, late)
    assert late.asks()


def test_a_key_that_is_not_used_any_more_is_not_told_of(pair, clock):
    one, other = pair
    assert one.asks()
    beat(*pair)
    clock.now += shared_limits.TOLD_SECONDS
    assert one.limits.told() == {"key_use": None}
    beat(*pair)
    assert all(one.asks() for _ in range(6))
    beat(*pair)
    assert not other.asks()


def test_of_more_keys_than_are_told_nothing_is_kept_for_telling(pair, clock, monkeypatch):
    monkeypatch.setattr(shared_limits, "TOLD_KEYS", 2)
    one, _ = pair
    for number in range(5):
        clock.now += 1
        with one.meters.of(f"key-{number}", LIMITS).request():
            pass
    assert "key-4" in one.limits.told()["key_use"]
    assert sorted(one.meters.used()) == ["key-3", "key-4"]
    clock.now += shared_limits.TOLD_SECONDS
    one.limits.told()
    assert not one.meters.used()


def test_what_cannot_be_read_is_of_no_account(pair):
    one, _ = pair
    one.limits.hear([{"id": "other", "key_use": '{"run": 1}'}])
    one.limits.hear([{"id": "other"}])
    assert one.asks()


async def test_a_key_has_one_budget_at_two_servers(connect, config, tiny_model, tmp_path, url):
    both = replace(config, registry=url, blobs=f"file://{tmp_path}/shared", admin_keys=keys_hashed(["run"]))
    async with AsyncExitStack() as stack:
        clients = []
        for number in range(2):
            own = replace(both, data_dir=tmp_path / f"data-{number}")
            clients.append(await stack.enter_async_context(connect(own, FakeBackend(str(tiny_model)))))
        one, other = clients
        one.headers["authorization"] = "Bearer run"
        key = await issued(one, "acme", "inference", requests_per_minute=2)

        async def beats():
            for client in clients:
                await client._transport.app.state.parts.heartbeat.beat()

        for _ in range(2):
            await beats()
        assert [(await ask(key, "base")).status_code for _ in range(2)] == [200, 200]
        for _ in range(2):
            await beats()
        elsewhere = httpx.AsyncClient(transport=other._transport, base_url="http://localhost", headers=key.headers)
        assert (await ask(elsewhere, "base")).status_code == 429
