"""Whatever door a version comes through, the same policy decides whether it is held, a canary or live."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from serve.errors import Conflict
from serve.events import Event, PromotionHeld
from serve.rollout.admit import Place
from serve.rollout.golden.golden_runner import GoldenRunner
from serve.rollout.policy import DEFAULT_POLICIES
from tests.support.app import push_two, upload
from tests.support.golden import Skill, cases, put, ran


@pytest.fixture
def under(connect, config):
    """`async with under(canary_weight=0.1) as client`: the policy of every adapter."""

    def started(**policy):
        return connect(replace(config, policies=(replace(DEFAULT_POLICIES[0], **policy),)))

    return started


def parts_of(client):
    return client._transport.app.state.parts


async def never(*args):
    """In place of a golden case's answer."""
    await asyncio.Event().wait()


async def shown(client):
    return (await client.get("/v1/adapters/tone")).json()


async def test_a_version_beside_a_live_one_is_a_canary_first_and_live_when_it_is_promoted_again(under, make_adapter):
    async with under(canary_weight=0.25) as client:
        await push_two(client, make_adapter)
        parts = parts_of(client)
        version, policy = parts.registry.get("tone", 2), parts.policies["tone"]
        assert await parts.admission.place("tone") is Place.CANARY
        assert await parts.admission.place("new") is Place.LIVE, "nothing answers that it could be compared with"
        assert await parts.admission.place("tone", promote=False) is Place.STORED
        assert await parts.admission.admit(version, policy, "anna", why="better") is Place.CANARY
        adapter = await shown(client)
        assert adapter["live"] == 1 and adapter["canary"] == {"version": 2, "weight": 0.25}
        assert (adapter["history"][-1]["who"], adapter["history"][-1]["why"]) == ("anna", "better")
        assert await parts.admission.admit(version, policy, "anna") is Place.LIVE


@pytest.mark.parametrize("how", ["at_once", "proven"])
async def test_who_insists_or_has_proof_skips_the_canary(under, make_adapter, how):
    async with under(canary_weight=0.25) as client:
        await push_two(client, make_adapter)
        parts = parts_of(client)
        policy = getattr(parts.policies["tone"], how)
        assert await parts.admission.admit(parts.registry.get("tone", 2), policy, "anna", expected=1) is Place.LIVE
        assert (await shown(client))["live"] == 2


async def test_a_golden_score_that_is_missing_holds_whatever_door_a_version_comes_through(
    under, make_adapter, backend, monkeypatch
):
    Skill(backend)
    async with under(golden_min=0.8) as client:
        await client.post("/v1/adapters", **upload(make_adapter(0)))
        await put(client, cases(10))
        await ran(client, 1)
        monkeypatch.setattr(GoldenRunner, "run", never)
        parts = parts_of(client)
        held = []
        parts.events.at_once("test", held.append, Event)
        await client.post("/v1/unload_lora_adapter", json={"lora_name": "tone"})
        assert await parts.admission.place("tone") is Place.HELD, "also where nothing is live"
        version, _ = await parts.admission.push("tone", make_adapter(1), by="a fine-tuning job", promote=True)
        assert version.version == 2 and (await shown(client))["live"] is None
        assert PromotionHeld("tone", 2, "a fine-tuning job") in held
        for policy in (parts.policies["tone"], parts.policies["tone"].proven):
            with pytest.raises(Conflict, match="has no score yet of 10 in the golden set"):
                await parts.admission.admit(version, policy, "a loop")
        assert await parts.admission.admit(version, parts.policies["tone"].at_once, "anna") is Place.LIVE
