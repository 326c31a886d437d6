"""What gateways read: a picker's own rules over what the server writes."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import httpx
import pytest

from serve.config import keys_hashed
from serve.engine.engine import LOW_PRIORITY
from serve.engine.fair_queue import FairQueue
from serve.engine.fleet import Fleet
from serve.telemetry.gateway_series import LABEL_CHARACTERS, _listed
from tests.support.app import ask, issued, upload
from tests.support.endpoint_picker import Endpoint, parsed, scraped
from tests.support.known_backend import KV_CACHE, WAITING_INSIDE, KnownBackend
from tests.support.waiting import settled

FAMILIES = {
    "vllm:num_requests_waiting", "vllm:num_requests_running", "vllm:kv_cache_usage_perc", "vllm:lora_requests_info",
    "vllm:lora_adapter_loaded", "vllm:num_gpu_loaded_lora_adapters", "vllm:num_cpu_loaded_lora_adapters",
    "vllm:max_gpu_lora_adapters",
}  # fmt: skip


@pytest.fixture
async def backend(tiny_model) -> KnownBackend:
    return KnownBackend(str(tiny_model), seats=4)


@pytest.fixture(autouse=True)
def always_fresh(monkeypatch):
    monkeypatch.setattr("serve.telemetry.metrics.FRESH", -1.0)
    monkeypatch.setattr("serve.telemetry.metrics.FRESH_FOR_GATEWAYS", -1.0)


def _fleet_of(client: httpx.AsyncClient) -> Fleet:
    return client._transport.app.state.parts.fleet


async def picked(client: httpx.AsyncClient, path: str = "/metrics") -> Endpoint:
    return scraped((await client.get(path)).text)


@pytest.mark.parametrize("path", ["/metrics", "/metrics/gateway"])
async def test_a_picker_learns_load_and_adapters_by_public_names(client, make_adapter, path):
    for seed in (0, 1):
        await client.post("/v1/adapters", **upload(make_adapter(seed)))
    await ask(client, "tone@v1")
    endpoint = await picked(client, path)
    assert endpoint.active == {"tone", "tone@v1"}, "the live version by its name, any other by its number"
    assert (endpoint.max_active, endpoint.waiting_models) == (4, set())
    assert (endpoint.kv_cache, endpoint.waiting, endpoint.running) == (KV_CACHE, WAITING_INSIDE, 0)
    assert endpoint.loaded == {"tone": ("gpu", False, 2), "tone@v1": ("gpu", False, 2)}
    assert (endpoint.on_gpu, endpoint.base) == (2, "base")
    assert [endpoint.affinity(name) for name in ("tone", "other")] == [1.0, 0.8]


async def test_who_waits_in_the_servers_own_queue_waits_for_a_picker_too(client, backend, make_adapter):
    await client.post("/v1/adapters", **upload(make_adapter()))
    backend.standstill.set()
    asked = [asyncio.create_task(ask(client, "tone")) for _ in range(9)]
    queue = _fleet_of(client).first.engine.queue
    assert await settled(lambda: backend.running > 0 and backend.running + queue.waiting == len(asked))
    endpoint = await picked(client)
    assert endpoint.running == backend.running
    assert endpoint.waiting == WAITING_INSIDE + len(asked) - backend.running
    # The engine's own numbers stay as they are, in its own place.
    assert scraped((await client.get("/metrics/engine")).text).waiting == WAITING_INSIDE
    backend.standstill.clear()
    assert {answer.status_code for answer in await asyncio.gather(*asked)} == {200}


async def test_what_no_client_waits_for_does_not_make_a_server_look_busy(client):
    queue = FairQueue(1, 1)
    _fleet_of(client).first.engine.queue = queue
    queue.enter("acme", None)
    queue.enter("acme", None, priority=LOW_PRIORITY)
    queue.enter("", None)
    queue.enter("acme", None)
    assert (await picked(client)).waiting == WAITING_INSIDE + 1


async def test_an_adapter_that_has_requests_and_no_slot_is_waited_for(client, backend, make_adapter):
    for seed in range(6):
        await client.post("/v1/adapters", **upload(make_adapter(seed), name=f"tone-{seed}"))
    before = await picked(client)
    assert before.active == {f"tone-{seed}" for seed in (2, 3, 4, 5)}, "as many as there are slots"
    assert {name for name, (level, *_) in (before.loaded or {}).items() if level == "cpu"} == {"tone-0", "tone-1"}
    assert before.affinity("tone-0") == 0.0
    backend.standstill.set()
    asked = [asyncio.create_task(ask(client, f"tone-{seed}")) for seed in (2, 3, 4, 5, 0)]
    queue = _fleet_of(client).first.engine.queue
    # An eighth of the seats is kept.
    assert await settled(lambda: backend.running == 3 and backend.running + queue.waiting == len(asked))
    endpoint = await picked(client)
    assert endpoint.waiting_models or "tone-0" in endpoint.active
    backend.standstill.clear()
    await asyncio.gather(*asked)


async def test_a_pinned_adapter_says_so(client, make_adapter):
    await client.post("/v1/adapters", **upload(make_adapter()))
    assert (await client.post("/v1/adapters/tone/pin")).status_code == 200
    assert (await picked(client)).loaded == {"tone": ("gpu", True, 2)}


async def test_an_engine_that_does_not_answer_is_not_offered(client, backend, make_adapter):
    await client.post("/v1/adapters", **upload(make_adapter()))
    backend.another = lambda model=None: backend
    backend.wont_start, backend.dead = "no", True
    assert await settled(lambda: not _fleet_of(client).first.is_ready)
    endpoint = await picked(client, "/metrics/gateway")
    assert (endpoint.active, endpoint.loaded) == (set(), None)
    assert endpoint.errors, "a picker that gets nothing new takes the server for stale"


async def test_a_picker_gets_what_it_reads_and_no_more(client, make_adapter):
    await client.post("/v1/adapters", **upload(make_adapter()))
    text = (await client.get("/metrics/gateway")).text
    assert set(parsed(text)) == FAMILIES
    assert len(text) < len((await client.get("/metrics")).text) / 10


async def test_without_a_key_only_where_the_configuration_says_so(connect, config, backend):
    locked = replace(config, admin_keys=keys_hashed(["run"]))
    async with connect(locked) as client:
        assert (await client.get("/metrics/gateway")).status_code == 401
        client.headers["authorization"] = "Bearer run"
        async with await issued(client, "default", "inference") as asks:
            assert (await asks.get("/metrics/gateway")).status_code == 403
        async with await issued(client, "default", "metrics") as scrapes:
            assert (await scrapes.get("/metrics/gateway")).status_code == 200
    async with connect(replace(locked, open_gateway_metrics=True)) as client:
        assert (await client.get("/metrics/gateway")).status_code == 200
        for path in ("/metrics", "/metrics/engine", "/v1/models"):
            assert (await client.get(path)).status_code == 401


def test_names_beyond_a_labels_length_are_left_out_and_their_order_is_their_own():
    names = [f"adapter-{number:03}" for number in reversed(range(500))]
    listed = _listed(names)
    assert len(listed) < LABEL_CHARACTERS
    kept = listed.split(",")
    assert kept == sorted(kept) and kept[-1] == "adapter-499", "the latest used are kept"
    assert _listed(["b", "a", "b"]) == "a,b" and _listed([]) == ""
