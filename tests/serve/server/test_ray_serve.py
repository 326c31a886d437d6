"""What a cluster of replicas decides without Ray: how many there are, when one is ready, and what they share."""

from __future__ import annotations

import pickle
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from serve.asgi.exchange import Exchange, Generation
from serve.config import Base, load
from serve.dataset.conversations import Conversations
from serve.errors import ConfigError
from serve.models import hardware
from serve.server.launch import own
from serve.server.ray_serve import (
    FirstTokens,
    Ready,
    _fits_one_more,
    _place,
    _routing,
    application,
    by_load,
    only_resized,
    shared,
    take_over,
)


def context(requests=0.0, replicas=1, first_tokens=None, least=1, most=8):
    late = {"first_token_seconds": first_tokens} if first_tokens is not None else None
    return SimpleNamespace(
        total_num_requests=requests,
        current_num_replicas=replicas,
        aggregated_metrics=late,
        capacity_adjusted_min_replicas=least,
        capacity_adjusted_max_replicas=most,
    )


@pytest.mark.parametrize(
    "there, wanted",
    [
        (context(requests=0), 1),
        (context(requests=40), 3),
        (context(requests=4000), 8),
        (context(requests=1, replicas=2, least=2), 2),
        (context(requests=1, replicas=3, first_tokens={"a": 0.5, "b": 3.0}), 4),
        (context(requests=1, replicas=3, first_tokens={"a": 0.5, "b": 0.0}), 1),
        (context(requests=1, replicas=8, first_tokens={"a": 9.0}), 8),
    ],
)
def test_replicas_follow_the_queue_and_the_first_token(there, wanted):
    assert by_load(16, 2.0)(there) == (wanted, {})


def test_without_a_bound_first_tokens_may_come_when_they_like():
    assert by_load(16, 0.0)(context(requests=1, first_tokens={"a": 99.0})) == (1, {})


def test_what_replicas_share_travels_and_is_in_the_data_directory_unless_said_otherwise(tmp_path):
    config = load(["--ray", "--replicas", "2", "--data-dir", str(tmp_path), "--max-loras", "4"], {})
    one = pickle.loads(pickle.dumps(shared(config, several=False)))
    assert one.registry == f"sqlite:///{tmp_path}/registry.sqlite"
    assert one.blobs == f"file://{tmp_path}/blobs"
    assert one.bases[0].engine == {"max_loras": "4"}


def test_replicas_that_run_stay_where_only_their_number_is_another(tmp_path):
    def of(*flags):
        return shared(load(["--ray", "--data-dir", str(tmp_path), "--replicas", "2", *flags], {}), several=False)

    for flags in (["--replicas", "3"], ["--max-replicas", "8"], ["--target-first-token", "1.5", "--target-queue", "4"]):
        assert only_resized(of(), of(*flags)), flags
    for flags in ([], ["--name", "other"], ["--replicas", "3", "--max-loras", "4"]):
        assert not only_resized(of(), of(*flags)), flags


@pytest.mark.parametrize(
    "more", [(), ("--registry", "postgresql://x"), ("--blobs", "s3://x", "--registry", "sqlite:///x")]
)
def test_several_machines_need_a_registry_and_blobs_that_all_of_them_reach(more):
    with pytest.raises(ConfigError, match="all of them reach"):
        shared(load(["--ray", *more], {}), several=True)


@pytest.mark.usefixtures("bare_environment")
def test_a_configuration_file_of_rays_names_settings_as_the_command_line_does(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    file = tmp_path / "loradock.yaml"
    file.write_text("max_loras: 4\nreplicas: 3\n")
    monkeypatch.setenv("LORADOCK_REGISTRY", "postgresql+psycopg://x/y")
    app = application({"config": str(file), "blobs": "s3://bucket/x", "replicas": 2})
    (deployment,) = [app._bound_deployment]
    config, _, turn = deployment.init_args
    assert (deployment.num_replicas, turn) == (2, 0)
    assert (config.registry, config.blobs, config.engine) == (
        "postgresql+psycopg://x/y",
        "s3://bucket/x",
        {"max_loras": 4},
    )


@pytest.mark.usefixtures("bare_environment")
def test_a_configuration_file_of_rays_without_a_common_registry_is_refused():
    with pytest.raises(ConfigError, match="all of them reach"):
        application({"blobs": "s3://bucket/x"})


def test_replicas_without_ray_are_a_sentence():
    with pytest.raises(ConfigError, match="add --ray"):
        load(["--replicas", "2"], {})


def test_first_tokens_are_those_of_the_last_half_minute():
    now = [0.0]
    tokens = FirstTokens(lambda: now[0])
    assert tokens.mean() == 0.0
    for first in (1.0, 3.0, None):
        tokens.take(SimpleNamespace(first=first, status=200))
    assert tokens.mean() == 2.0
    now[0] = 31.0
    assert tokens.mean() == 0.0


@pytest.mark.parametrize("wrong, said", [("", "complete"), ("no memory", "failed")])
async def test_a_replica_is_ready_when_its_engine_is(wrong, said):
    order = []

    async def app(scope, receive, send):
        await send({"type": "lifespan.startup.complete"})

    async def wait():
        order.append("engine")
        return wrong

    async def send(message):
        order.append(message["type"])

    async def leave():
        pass

    await Ready(app, wait, leave)({"type": "lifespan"}, None, send)
    assert order == ["engine", f"lifespan.startup.{said}"]


async def test_a_replica_stops_once_it_has_answered_what_came_to_its_own_address():
    order = []

    async def app(scope, receive, send):
        order.append((await receive())["type"])

    async def receive():
        return {"type": "lifespan.shutdown"}

    async def leave():
        order.append("answered")

    await Ready(app, None, leave)({"type": "lifespan"}, receive, None)
    assert order == ["answered", "lifespan.shutdown"]


@pytest.mark.parametrize(
    ("engines", "gpus"),
    [
        ([{}], 1),
        ([{"tensor_parallel_size": 2, "pipeline_parallel_size": 2}], 4),
        ([{"data_parallel_size": 2}], 2),
        ([{"tensor_parallel_size": "2", "data_parallel_size": 4, "data_parallel_size_local": 1}], 2),
        ([{}, {"tensor_parallel_size": 4}], 4),
        ([{"device_ids": "0"}, {"device_ids": "1"}], 2),
    ],
)
def test_a_replica_asks_for_the_gpus_of_all_its_engines_and_ranks(engines, gpus, monkeypatch):
    monkeypatch.setattr(hardware, "on_cpu", lambda: False)
    first, *more = engines
    config = replace(
        load(["--ray"], {}), engine=first, engines=tuple(Base(str(n), "m", each) for n, each in enumerate(more))
    )
    assert _place(config) == {"ray_actor_options": {"num_cpus": 1, "num_gpus": gpus}}


def test_vllms_own_ray_workers_have_a_bundle_for_each_part_and_one_engine_a_replica(monkeypatch):
    monkeypatch.setattr(hardware, "on_cpu", lambda: False)
    engine = {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"}
    config = replace(load(["--ray"], {}), engine=engine)
    assert _place(config)["placement_group_bundles"] == [{"CPU": 1, "GPU": 1}] * 2
    with pytest.raises(ConfigError, match="one engine a replica"):
        _place(replace(config, engines=(Base("b", "m", {}),)))


@pytest.mark.parametrize(
    "place, fits",
    [
        ({"ray_actor_options": {"num_cpus": 1}}, True),
        ({"ray_actor_options": {"num_cpus": 1, "num_gpus": 1}}, True),
        ({"ray_actor_options": {"num_cpus": 1, "num_gpus": 2}}, False),
        ({"placement_group_bundles": [{"CPU": 1, "GPU": 1}] * 2}, False),
        ({"placement_group_bundles": [{"CPU": 1, "GPU": 1}]}, True),
    ],
)
def test_a_replica_more_runs_during_a_rolling_restart_where_the_cluster_has_room_for_it(place, fits, monkeypatch):
    ray = SimpleNamespace(is_initialized=lambda: True, available_resources=lambda: {"CPU": 3.0, "GPU": 1.0})
    monkeypatch.setitem(sys.modules, "ray", ray)
    assert _fits_one_more(place) is fits
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    assert not _fits_one_more(place)


def test_what_a_replica_left_that_is_gone_is_looked_after_by_another(tmp_path):
    mine, gone, living = (tmp_path / f"replica-{number}" for number in range(3))
    now = int(time.time() // 3600)
    for folder in (gone, living):
        for part in ("webhooks", "captured"):
            (folder / part).mkdir(parents=True)
        (folder / "webhooks" / f"0001-{folder.name}.json").write_text("{}")
        for hour in (now - 30, now - 1):
            (folder / "captured" / f"{hour}.jsonl").write_text("")
        kept = Conversations(folder / "conversations.db", hours=24.0, clock=lambda: 3600.0 * (now - 30))
        kept.start()
        said = {"messages": [{"role": "user", "content": "x"}]}
        generations = (Generation([1], [2], "stop", text="y"),)
        kept.observe(Exchange("tone", "v1", 200, 0.1, 0.2, request_id="a", question=said, generations=generations))
        kept.stop()
    with own(mine), own(living):
        take_over(mine, 24.0)

    def left(folder):
        kept = Conversations(folder / "conversations.db")
        hours = sorted(file.stem for file in (folder / "captured").iterdir())
        return hours, sorted(file.name for file in (folder / "webhooks").iterdir()), len(list(kept.rows("", ["tone"])))

    assert [file.name for file in (mine / "webhooks").iterdir()] == ["0001-replica-1.json"]
    assert left(gone) == ([str(now - 1)], [], 0)
    assert left(living) == ([str(now - 30), str(now - 1)], ["0001-replica-2.json"], 1)


def test_with_homes_rays_router_is_ours_and_else_its_own(tmp_path):
    pytest.importorskip("ray")
    config = load(["--ray", "--data-dir", str(tmp_path), "--fleet", "homes", "--registry", "sqlite:///x"], {})
    assert _routing(config)["request_router_config"].request_router_class.endswith(":HomesRouter")
    assert _routing(replace(config, fleet="auto")) == {}
