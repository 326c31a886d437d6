"""What a tenant may keep holds also when several servers over one registry are asked at once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest

from serve.adapters.adapter import Inspection
from serve.adapters.registry.registry import Registry
from serve.auth.rate_limits import Limits
from serve.config import keys_hashed
from serve.errors import QuotaExceeded
from serve.rollout.quotas import check_push
from tests.support.app import issued, upload

SERVERS, MOST, NBYTES = 6, 2, 1000
FOUND = Inspection(8, None, ("q",), NBYTES, 2)


@pytest.mark.parametrize("limits", [Limits(adapters=MOST), Limits(adapter_bytes=MOST * NBYTES + 1)])
def test_pushes_to_several_servers_at_once_pass_no_quota(url, limits):
    start = threading.Barrier(SERVERS)

    def pushes(number):
        with Registry(url) as registry:
            start.wait(30)
            name, digest = f"acme/{number}", f"{number:064x}"
            check = partial(check_push, name=name, digest=digest, nbytes=NBYTES, quota=limits)
            try:
                registry.add(name, FOUND, digest, by="anna", check=check)
            except QuotaExceeded:
                return False
            return True

    with Registry(url) as registry:  # what others have counts for nobody else
        for name in ("tone", "other/tone", "acme2/tone", "ACME/tone"):
            registry.add(name, FOUND, "f" * 64, by="bo")
    with ThreadPoolExecutor(SERVERS) as pool:
        assert sum(pool.map(pushes, range(SERVERS))) == MOST
    with Registry(url) as registry:
        assert len([name for name in registry.names() if name.startswith("acme/")]) == MOST


async def test_what_another_server_has_taken_a_moment_ago_counts(connect, config, make_adapter):
    config = replace(config, admin_keys=keys_hashed(["run"]))
    async with connect(config) as client:
        client.headers["authorization"] = "Bearer run"
        acme = await issued(client, "acme", adapters=1)
        with Registry(str(client._transport.app.state.parts.registry._engine.url)) as other:
            other.add("acme/theirs", FOUND, "f" * 64, by="bo")
        refused = await acme.post("/v1/adapters", **upload(make_adapter(), name="mine"))
        assert (refused.status_code, refused.json()["error"]["type"]) == (429, "insufficient_quota")
        assert "acme/mine" not in client._transport.app.state.parts.registry
