"""The front door's campaign in short: bodies that no honest client sends, to every route, are never a 500."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from tests.campaigns import front_door


async def test_no_body_is_a_500_at_any_route(tmp_path):
    async with front_door.door(tmp_path) as (_, client):
        seen = await front_door.sent(client, 400, 64 << 10, seed=7)
        assert (await client.post("/v1/chat/completions", json=front_door.HONEST)).status_code == 200
    assert len(seen) > 50 and sum(found.statuses[413] + found.statuses[400] for found in seen.values()) > 200
    assert not [failure for found in seen.values() for failure in found.failures]


def test_bodies_are_of_every_kind_and_the_same_for_a_seed():
    drawn = [front_door.body(random.Random(seed), ["input"], 1 << 12) for seed in range(300)]
    assert drawn == [front_door.body(random.Random(seed), ["input"], 1 << 12) for seed in range(300)]
    assert {said.split()[0] for said, _ in drawn} >= {
        "bulk",
        "few",
        "wide",
        "deep",
        "nested",
        "digits",
        "key",
        "text",
        "half",
    }
