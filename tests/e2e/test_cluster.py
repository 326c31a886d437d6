"""`make cluster`: two replicas on a real Ray, with a real PostgreSQL and an S3 server, are one to whoever asks."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.client.bench.swap import Plan, prove
from serve.client.bench.wire import Address
from tests.support import postgres
from tests.support.crowd import STREAMS, Crowd, stock, word
from tests.support.server import SMALL, Server, descendants, done
from tests.support.waiting import eventually

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(
        "LORADOCK_TEST_RAY" not in os.environ, reason="two engines on Ray take minutes of two cores: `make cluster`"
    ),
]
# Each replica has half of the machine, and they share it with this test.
FLAGS = ("--ray", "--replicas", "2", "--restart-wait", "120", "--max-wait", "120", *SMALL)


@pytest.fixture(scope="module")
def cluster(adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of two replicas, with 16 adapters."""
    moto = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    bin = postgres.programs()
    if bin is None:
        pytest.skip("PostgreSQL is not installed")
    folder = tmp_path_factory.mktemp("cluster")
    with ExitStack() as stack:
        database = stack.enter_context(postgres.running(bin)).format(name="postgres")
        s3 = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        s3.start()
        stack.callback(s3.stop)
        address = "http://{}:{}".format(*s3.get_host_and_port())
        keys = {"AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "mine", "AWS_DEFAULT_REGION": "us-east-1"}
        client = boto3.client(
            "s3", endpoint_url=address, aws_access_key_id="me", aws_secret_access_key="mine", region_name="us-east-1"
        )
        client.create_bucket(Bucket="models")
        flags = (*FLAGS, "--registry", database, "--blobs", "s3://models/adapters")
        server = Server(folder / "data", folder / "log", *flags, AWS_ENDPOINT_URL=address, **keys)
        stack.enter_context(server)
        assert eventually(lambda: len(replicas(server)) == 2), replicas(server)
        print(f"ready after {server.seconds_to_ready:.0f} s")
        stock(server, adapters, folder)
        yield server


def replicas(server: Server) -> list[dict[str, Any]]:
    return [row for row in done(server.http.get("/v1/replicas"))["data"] if row["phase"] == "ready"]


def test_two_replicas_pass_the_swap_proof(cluster, adapters):
    for name in ("alpha", "bravo"):
        done(cluster.upload("proof", adapters[name]))
    plan = Plan("proof", (1, 2), streams=STREAMS, swaps=20)
    proof = asyncio.run(prove(Address(cluster.url), plan, print))
    print(proof)
    assert proof.holds, proof
    assert proof.swaps == 20 and proof.across_a_swap >= STREAMS, proof
    assert min(proof.answers_per_version.values()) > 0, proof


def test_a_promote_is_read_by_every_replica_within_a_second(cluster):
    slowest = 0.0
    for version in (1, 2, 1, 2, 1):
        began = time.monotonic()
        cluster.promote("proof", version)
        acknowledged = time.monotonic()
        assert eventually(lambda: [row["behind"] for row in replicas(cluster)] == [0, 0])
        slowest = max(slowest, time.monotonic() - began)
        assert time.monotonic() - acknowledged < 2  # a beat of a second, and the time to ask for it
    print(f"read by both {slowest:.2f} s after it was asked for, at most")


def test_a_rolling_restart_fails_no_request(cluster):
    before = {row["id"] for row in replicas(cluster)}
    with Crowd(cluster) as crowd:
        crowd.whole(STREAMS)
        began = time.monotonic()
        cluster.process.send_signal(signal.SIGHUP)
        assert eventually(lambda: len({row["id"] for row in replicas(cluster)} - before) == 2, 400), replicas(cluster)
        print(f"both replaced after {time.monotonic() - began:.0f} s")
        crowd.whole(2 * STREAMS)
    assert not crowd.broken, Counter(end.said[:200] for end in crowd.broken)
    assert cluster.ask("a1").word == word(1)


def test_each_replica_also_answers_alone(cluster):
    ids = set()
    for number in (1, 2, 3):
        url = f"http://127.0.0.1:{cluster.port + number}"
        with suppress(httpx.ConnectError):
            rows = done(httpx.get(f"{url}/v1/replicas"))["data"]
            ids |= {row["id"] for row in rows if row["me"]}
            assert "loradock_requests_total" in httpx.get(f"{url}/metrics").text
    assert ids == {row["id"] for row in replicas(cluster)}


def test_what_dies_with_a_replica_is_its_own_answers_and_another_takes_its_place(cluster):
    before = {row["id"] for row in replicas(cluster)}
    with Crowd(cluster) as crowd:
        crowd.whole(STREAMS)
        family = descendants(cluster.process.pid)
        victim = next(pid for pid in family if "ServeReplica" in Path(f"/proc/{pid}/cmdline").read_text())
        os.kill(victim, signal.SIGKILL)
        began = time.monotonic()
        assert eventually(lambda: len({row["id"] for row in replicas(cluster)} - before) == 1, 300), replicas(cluster)
        print(f"replaced after {time.monotonic() - began:.0f} s; {Counter(end.said[:80] for end in crowd.broken)}")
        crowd.whole(2 * STREAMS)
    assert len(crowd.broken) <= STREAMS, Counter(end.said[:200] for end in crowd.broken)
    assert not any("wrong" in end.said for end in crowd.broken)
