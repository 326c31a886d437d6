"""The alert for the queue, on the rules as they are shipped: Prometheus, and a server with four times its load."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import pytest

from serve.config import keys_hashed, load
from tests.support.app import CHAT, upload
from tests.support.known_backend import KnownBackend
from tests.support.prometheus import HAS_PROMETHEUS, ask, prometheus
from tests.support.served import Served
from tests.support.server import done
from tests.support.waiting import eventually

pytestmark = pytest.mark.skipif(not HAS_PROMETHEUS, reason="prometheus is not installed (Debian: prometheus)")

ADMIN = "an-admin-key"
# A tenant alone has all seats but one: six answers a second.
SEATS, ANSWER_SECONDS = 4, 0.5
CAPACITY = (SEATS - 1) / ANSWER_SECONDS
ALERT = 'ALERTS{alertname="LoradockQueue",alertstate="firing"}'
MINUTE = 60


@dataclass
class Arrivals:
    """Requests at a rate, whatever becomes of those before, until `stop` is set."""

    client: httpx.AsyncClient
    model: str
    rate: float
    statuses: list[int] = field(default_factory=list)

    async def run(self, stop: asyncio.Event) -> None:
        began, tasks = time.monotonic(), []
        while not stop.is_set():
            while len(tasks) < (time.monotonic() - began) * self.rate:
                tasks.append(asyncio.create_task(self._ask()))
            await asyncio.sleep(0.02)
        await asyncio.gather(*tasks)

    async def _ask(self) -> None:
        known = {"seconds": ANSWER_SECONDS}
        answer = await self.client.post(CHAT, json={"model": self.model, "known": known})
        self.statuses.append(answer.status_code)


@pytest.fixture
def served(tmp_path, tiny_model) -> Iterator[Served]:
    config = load([str(tiny_model), "--name", "base", "--data-dir", str(tmp_path / "data"), "--no-drift"], {})
    config = replace(config, admin_keys=keys_hashed([ADMIN]), max_wait=10.0)
    with Served(config, KnownBackend(str(tiny_model), SEATS), ADMIN) as served:
        yield served


@pytest.fixture
def watching(served, tmp_path) -> Iterator[httpx.Client]:
    folder = tmp_path / "monitoring"
    folder.mkdir()
    with prometheus(folder, served.port, ADMIN) as client:
        assert eventually(lambda: ask(client, 'up{job="loradock"} == 1'), MINUTE)
        yield client


async def became(condition: Callable[[], Any], seconds: float) -> Any:
    """Wait for the condition while others run."""
    end = time.monotonic() + seconds
    while not (answer := await asyncio.to_thread(condition)) and time.monotonic() < end:
        await asyncio.sleep(0.5)
    return answer


async def test_an_overload_is_told_within_a_minute_with_its_adapter_and_tenant_and_ends(served, watching, make_adapter):
    keys = {tenant: served.issue(tenant, "inference", "adapters:write") for tenant in ("acme", "zeta")}
    for seed, key in enumerate(keys.values()):
        done(key.post("/v1/adapters", **upload(make_adapter(seed), "tone")))
    clients = [
        httpx.AsyncClient(
            base_url=served.url, headers=key.headers, timeout=120, limits=httpx.Limits(max_connections=500)
        )
        for key in keys.values()
    ]
    flood, polite = Arrivals(clients[0], "tone", 4 * CAPACITY), Arrivals(clients[1], "tone", 1.0)
    stop = asyncio.Event()
    began = time.time()
    traffic = asyncio.gather(flood.run(stop), polite.run(stop))
    try:
        firing = await became(lambda: ask(watching, ALERT), 2 * MINUTE)
        fired = time.time() - began
        alerts = watching.get("/api/v1/alerts").json()["data"]["alerts"]
        # Whatever else comes: it goes on while the load does.
        await asyncio.sleep(15)
        assert ask(watching, ALERT)
        concerned = {(one["metric"]["adapter"], one["metric"]["tenant"]) for one in ask(watching, ALERT)}
    finally:
        stop.set()
        ended = time.time()
        await traffic
        for client in clients:
            await client.aclose()
    assert firing and fired <= MINUTE
    assert concerned == {("acme/tone", "acme")}, "who asks little is not concerned"
    summaries = [one["annotations"]["summary"] for one in alerts if one["labels"]["alertname"] == "LoradockQueue"]
    assert any("acme/tone" in summary and "tenant acme" in summary for summary in summaries)
    assert await became(lambda: not ask(watching, ALERT), 3 * MINUTE)
    print(f"fired after {fired:.0f} s, over {time.time() - ended:.0f} s after the load: {summaries[0]}")
    assert flood.statuses.count(429) > 0 and set(polite.statuses) == {200}
