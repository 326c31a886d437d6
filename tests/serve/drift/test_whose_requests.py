"""Whose requests say whether an adapter drifts: everybody's, unless drift spends what its loop may."""

from __future__ import annotations

from dataclasses import replace

import pytest

from serve.config import keys_hashed
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
