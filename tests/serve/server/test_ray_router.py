"""On Ray a request goes to a home of its adapter: by a router of ours in Ray's own proxies."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import httpx
import msgspec
import pytest

from serve.config import keys_hashed, load
from serve.fleet.routed import Stats
from serve.models import hardware
from serve.server import ray_serve
from tests.support.app import CHAT, upload
from tests.support.server import ROOT

NAMES = [f"adapter-{number}" for number in range(12)]


class Router:
    """What Ray's own class has of this."""

    def __init__(self):
        self.replica_queue_len_cache = {}
        self.seen = []
        self.initialize_state()

    def update_replicas(self, replicas):
        self.seen.append(replicas)


@pytest.fixture
def router(monkeypatch):
    """A router, and three replicas that have told what they are."""
    names = ("PendingRequest", "ReplicaID", "ReplicaResult", "RunningReplica")
    fake = SimpleNamespace(RequestRouter=Router, **dict.fromkeys(names))
    for name in ("ray", "ray.serve"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "ray.serve.request_router", fake)
    # Under another name: the module itself stays Ray's.
    spec = importlib.util.spec_from_file_location("ray_router_without_ray", ROOT / "serve/server/ray_router.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    router = module.HomesRouter()
    stats = [msgspec.structs.asdict(Stats(f"server-{number}", ["base"], 8, 16, 4.0, [])) for number in range(3)]
    replicas = [
        SimpleNamespace(replica_id=SimpleNamespace(unique_id=f"replica-{number}"), routing_stats=told)
        for number, told in enumerate(stats)
    ]
    router.replica_queue_len_cache = Cache(replicas)
    router.update_replicas(replicas)
    return router, replicas


class Cache(dict):
    """Queue lengths by replica."""

    def __init__(self, replicas):
        super().__init__({replica.replica_id.unique_id: 0 for replica in replicas})

    def get(self, replica_id):
        return super().get(replica_id.unique_id)


def pending(name):
    metadata = SimpleNamespace(multiplexed_model_id=name)
    return SimpleNamespace(metadata=metadata, routing_context=SimpleNamespace(should_backoff=False))


async def test_the_ranks_are_a_home_then_all(router):
    router, replicas = router
    homes = set()
    for name in NAMES:
        request = pending(name)
        first, *rest = await router.choose_replicas(replicas, request)
        assert len(first) == 1 and rest[-1] == replicas
        assert request.routing_context.should_backoff, "Ray would ask again and again without a pause"
        assert (await router.choose_replicas(replicas, pending(name)))[0] == first
        homes.add(first[0].replica_id.unique_id)
    assert len(homes) > 1


async def test_a_crowded_home_is_passed_over(router):
    router, replicas = router
    home = (await router.choose_replicas(replicas, pending(NAMES[0])))[0][0]
    router.replica_queue_len_cache[home.replica_id.unique_id] = 50
    assert (await router.choose_replicas(replicas, pending(NAMES[0])))[0] == replicas


async def test_what_goes_wrong_costs_the_homes_and_not_the_request(router, caplog):
    router, replicas = router
    router.replica_queue_len_cache = None
    assert await router.choose_replicas(replicas, pending(NAMES[0])) == [replicas]
    assert "without its adapter's homes" in caplog.text


async def test_what_is_for_no_adapter_goes_to_all(router):
    router, replicas = router
    assert await router.choose_replicas(replicas, pending("")) == [replicas]
    assert await router.choose_replicas(replicas, pending("base")) == [replicas]
    assert await router.choose_replicas(replicas, None) == [replicas]


@pytest.mark.skipif("LORADOCK_TEST_RAY" not in os.environ, reason="Ray takes half a minute of a core: `make cluster`")
def test_on_a_real_ray_every_adapter_is_answered_by_one_replica(tiny_model, make_adapter, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    from ray import serve as serving

    from tests.support.ray_replica import FakeReplica

    monkeypatch.setattr(ray_serve, "Replica", FakeReplica)
    monkeypatch.setenv(ray_serve.CALLBACK, ray_serve.IMPORT_PATH)
    port = free_ports(5)
    flags = ["--name", "base", "--data-dir", str(tmp_path / "data"), "--ray", "--replicas", "3", "--fleet", "homes"]
    config = load([str(tiny_model), *flags, "--port", str(port)], {})
    config = replace(ray_serve.shared(config, several=False), admin_keys=keys_hashed(["run"]))
    for name, value in ray_serve.SETTINGS.items():
        monkeypatch.setenv(name, value)
    ray.init(num_cpus=6, include_dashboard=False, object_store_memory=80 << 20, namespace="test")
    try:
        ray_serve._start(config)
        ray_serve._deploy(config, 0)
        asyncio.run(ask_all(f"http://127.0.0.1:{port}", make_adapter))
    finally:
        serving.shutdown()
        ray.shutdown()


def free_ports(count):
    """The first of so many ports in a row that nobody listens on."""
    for port in range(21000, 30000, 10):
        try:
            for number in range(count):
                hardware.listen("127.0.0.1", port + number).close()
            return port
        except Exception:
            continue
    raise AssertionError("no ports are free")


async def ask_all(url, make_adapter):
    headers = {"authorization": "Bearer run"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=60) as client:
        adapter = make_adapter()
        for name in NAMES:
            pushed = await client.post("/v1/adapters", **upload(adapter, name=name))
            assert pushed.status_code == 201, pushed.text
        await asyncio.sleep(3)  # replicas say what they are once a second
        answered = defaultdict(set)

        async def ask(name, stream):
            body = {"model": name, "messages": [{"role": "user", "content": "x"}], "stream": stream}
            answer = await client.post(CHAT, json=body, headers={"serve-multiplexed-model-id": "another"})
            assert answer.status_code == 200, answer.text
            assert not stream or answer.text.rstrip().endswith("data: [DONE]")
            answered[name].add(answer.text.split(" says")[0].rpartition('"')[2] if not stream else None)

        for turn in range(6):
            await asyncio.gather(*(ask(name, stream=turn % 3 == 2) for name in NAMES))
        pids = [frozenset(pids - {None}) for pids in answered.values()]
        assert all(len(one) == 1 for one in pids), answered
        assert len(set(pids)) > 1, answered
        # Nobody sent anything on.
        forwarded = []
        for number in (1, 2, 3):
            replica = url.rpartition(":")[0] + f":{int(url.rpartition(':')[2]) + number}"
            lines = (await client.get(f"{replica}/metrics")).text.splitlines()
            forwarded += [line for line in lines if line.startswith("loradock_forwarded_requests_total")]
        assert len(forwarded) == 6 and all(line.endswith(" 0.0") for line in forwarded), forwarded
