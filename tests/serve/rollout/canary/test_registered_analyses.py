"""What servers of one registry may spend of a canary's alpha, together."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial

import pytest

from serve.adapters.adapter import Inspection
from serve.adapters.registry.registry import Registry
from serve.rollout.canary.registered_analyses import KEPT_SECONDS, RegisteredAnalyses
from tests.support.app import canary, push_two
from tests.support.backend import FakeBackend


@pytest.fixture
def registry(url):
    with Registry(url) as registry:
        inspection = Inspection(2, "base", ("q_proj",), 10, 2)
        for digest in "abc":
            registry.add("tone", inspection, digest * 64, by="me")
        yield registry


def servers(registry, count):
    """Their clocks are hours apart."""
    clocks = [partial(float, 1e9 + 4000 * number) for number in range(count)]
    return [RegisteredAnalyses(registry, me=f"{clock()}", shared=True, clock=clock) for clock in clocks]


def test_parts_add_up_to_less_than_alpha_however_many_servers_there_are(registry):
    parts = [server.register("tone", 1, 2) for _ in range(3) for server in servers(registry, 20)]
    assert parts[:3] == [1 / 2, 1 / 6, 1 / 12] and parts == sorted(parts, reverse=True)
    assert sum(parts) < 1
    # Another canary is another question.
    assert servers(registry, 1)[0].register("tone", 1, 3) == servers(registry, 1)[0].register("tone", 2, 3) == 1 / 2


def test_a_server_alone_has_all_of_it_and_writes_nothing(registry):
    alone = RegisteredAnalyses(registry, me="me", shared=False)
    assert [alone.register("tone", 1, 2) for _ in range(3)] == [1.0] * 3
    assert servers(registry, 1)[0].register("tone", 1, 2) == 1 / 2


def test_an_adapter_that_is_gone_and_old_analyses_cost_nothing(registry):
    (server,) = servers(registry, 1)
    assert server.register("gone", 1, 2) == 1.0
    server.register("tone", 1, 2)
    later = RegisteredAnalyses(registry, me="later", shared=True, clock=lambda: 1e9 + KEPT_SECONDS + 1)
    assert later.register("tone", 1, 2) == 1 / 2


async def test_canaries_on_servers_of_one_registry_share_alpha(connect, config, make_adapter, tiny_model, tmp_path):
    shared = replace(config, registry=f"sqlite:///{tmp_path}/registry.db", blobs=f"file://{tmp_path}/shared")
    thresholds = []
    for number in range(2):
        own = replace(shared, data_dir=tmp_path / f"data-{number}")
        async with connect(own, FakeBackend(str(tiny_model))) as client:
            if not number:
                await push_two(client, make_adapter)
                assert (await canary(client, 0.5)).status_code == 200
            parts = client._transport.app.state.parts
            await asyncio.to_thread(parts.canary_monitor.rate, "tone", "v1", 1.0, b"asker")
            thresholds.append(parts.canary_monitor.analysis("tone").comparison.alpha)
    alpha = 2 * thresholds[0]
    assert thresholds == pytest.approx([alpha / 2, alpha / 6])
