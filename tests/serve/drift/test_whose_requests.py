"""Whose requests say whether an adapter drifts: everybody's, unless drift spends what its loop may."""

from __future__ import annotations

from dataclasses import replace

import pytest

from serve.adapters.byte_ledger import size_of
from serve.config import keys_hashed
from serve.drift.monitor import DriftMonitor
from serve.rollout.policy import parse
from tests.support.app import issued, upload
from tests.support.watched_traffic import Engine, ask, drift

LOOP = {"train_on_traffic": True, "loop": {"on": ["drift"]}}


@pytest.mark.parametrize(
    ("policy", "counts"), [({}, True), (LOOP, False), ({**LOOP, "verdicts": {"tenants": ["globex"]}}, True)]
)
async def test_a_stranger_opens_no_loop_by_drift(policy, counts, connect, watched, backend, make_adapter):
    engine = Engine(backend)
    policies = parse({"acme/tone": policy})
    async with connect(replace(watched, policies=policies, admin_keys=keys_hashed(["run"]))) as operator:
        operator.headers["authorization"] = "Bearer run"
        acme, globex = [await issued(operator, tenant, "inference", "adapters:write") for tenant in ("acme", "globex")]
        assert (await acme.post("/v1/adapters", **upload(make_adapter()))).status_code == 201
        shared = await acme.post("/v1/adapters/tone/visibility", json={"visibility": "shared"})
        assert shared.status_code == 200, shared.text
        await ask(acme, 270)
        engine.topic = range(14, 30)
        await ask(globex, 150, model="acme/tone")
        (version,) = (await drift(acme))["versions"]
        assert version["signals"]["prompt"]["alarmed"] is counts
        if not counts:
            await ask(acme, 150)
            (version,) = (await drift(acme))["versions"]
            assert version["signals"]["prompt"]["alarmed"], "its own tenant's requests say so"


async def test_baselines_are_on_their_tenants_account_and_counted_again_at_start(
    connect, watched, backend, make_adapter
):
    Engine(backend)
    config = replace(watched, admin_keys=keys_hashed(["run"]))
    async with connect(config) as operator:
        operator.headers["authorization"] = "Bearer run"
        acme = await issued(operator, "acme", "inference", "adapters:write")
        assert (await acme.post("/v1/adapters", **upload(make_adapter()))).status_code == 201
        await ask(acme, 120)
        await drift(acme)
    monitor = DriftMonitor(config.data_dir / "drift")
    assert monitor.kept(None) == {}
    monitor.start()
    assert monitor.kept(None).keys() == {"acme"} and monitor.kept("globex") == {}
    everything = size_of(config.data_dir / "drift")  # what is every tenant's too
    assert everything - 1000 < monitor.kept("acme")["acme"] <= everything and everything > 10_000
