"""How far a shadow's answer agrees with the client's, token by token, and what is told of it."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from serve.asgi.exchange import Generation
from serve.rollout.canary.shadow_agreement import PAIRS, ShadowAgreement, agreement
from tests.support.app import push_two
from tests.support.golden import GOLDEN, Skill, cases, ran
from tests.support.waiting import settled


def slow_edits(first, second):
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        last, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (a != b))
    return row[-1]


@pytest.mark.parametrize(
    ("live", "shadow", "exact", "prefix", "edit", "length"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 1, 1, 1, 1),
        ([1, 2, 3, 4], [1, 2, 9, 4], 0, 0.5, 0.75, 1),
        ([1, 2], [1, 2, 3, 4], 0, 0.5, 0.5, 2),
        ([1, 2, 3, 4], [9, 1, 2, 3, 4], 0, 0, 0.8, 1.25),
        ([], [], 1, 1, 1, 0),
        ([1], [], 0, 0, 0, 0),
    ],
)
def test_two_answers_agree_exactly_up_to_a_token_or_but_for_edits(live, shadow, exact, prefix, edit, length):
    measured = agreement(live, shadow)
    assert (measured.exact, measured.prefix, measured.edit, measured.length) == pytest.approx(
        (exact, prefix, edit, length)
    )


def test_edits_are_levenshteins():
    lots = random.Random(0)
    for _ in range(50):
        first, second = (lots.choices(range(4), k=lots.randint(0, 30)) for _ in range(2))
        longest = max(len(first), len(second), 1)
        assert agreement(first, second).edit == pytest.approx(1 - slow_edits(first, second) / longest)


def test_greedy_and_sampled_answers_are_counted_apart_and_pairs_are_bounded():
    shadows = ShadowAgreement()
    shadows.compare(
        "tone", (1, 2), {"temperature": 0}, Generation([1], [5, 6], "stop"), Generation([1], [5, 7], "stop")
    )
    shadows.compare("tone", (1, 2), {}, Generation([1], [5, 6], "stop"), Generation([1], [5, 6], "stop"))
    shadows.compare("tone", (1, 2), {}, Generation([1], [5, 6], "abort"), Generation([1], [5, 6], "stop"))
    sampled, greedy = shadows.report("tone")
    assert (greedy["sampling"], greedy["requests"], greedy["exact_agreement"]) == ("greedy", 1, 0)
    assert (sampled["sampling"], sampled["requests"], sampled["exact_agreement"]) == ("sampled", 1, 1)
    for version in range(3, 3 + PAIRS):
        shadows.compare("tone", (1, version), {}, Generation([1], [5], "stop"), Generation([1], [5], "stop"))
    assert len(shadows.report("tone")) == PAIRS


async def test_the_shadows_answers_are_compared_with_the_clients(client, backend, make_adapter):
    live, _ = await push_two(client, make_adapter)
    backend.generate = lambda body: replace(backend.generation, output=[4, 5] if body["model"] == live else [4, 6])
    await client.post("/v1/adapters/tone/shadow", json={"version": 2, "weight": 1})
    for _ in range(3):
        await client.post("/v1/chat/completions", json={"model": "tone", "temperature": 0, "messages": []})

    async def compared():
        return (await client.get("/v1/adapters/tone/drift")).json()["shadow"]

    (row,) = await settled(compared)
    assert (row["live"], row["shadow"], row["sampling"]) == (1, 2, "greedy")
    assert (row["exact_agreement"], row["prefix_agreement"], row["edit_agreement"], row["length_ratio"]) == (
        0,
        0.5,
        0.5,
        1,
    )
    metrics = (await client.get("/metrics")).text
    assert (
        'loradock_shadow_agreement{adapter="tone",measure="prefix",sampling="greedy",version="v2"} 0.5' in metrics
        and 'loradock_shadow_length_ratio{adapter="tone",sampling="greedy",version="v2"} 1.0' in metrics
    )


async def test_a_share_of_the_shadows_answers_is_judged_beside_the_clients(client, backend, make_adapter):
    skill = Skill(backend)
    live, _ = await push_two(client, make_adapter)
    backend.generate = lambda body: replace(backend.generation, text="0.9" if body["model"] == live else "0.4")
    judge = {"model": "base", "template": "{answer} for {prompt}"}
    document = {"cases": cases(1), "shadow": {"judge": judge, "share": 1}}
    assert (await client.put(GOLDEN, json=document)).status_code == 200
    assert (await client.get(GOLDEN)).json()["shadow"]["judge"]["model"] == "base"
    await ran(client, 1)
    await client.post("/v1/adapters/tone/shadow", json={"version": 2, "weight": 1})
    messages = [{"role": "user", "content": "hello"}]
    await client.post("/v1/chat/completions", json={"model": "tone", "messages": messages})

    async def compared():
        return (await client.get("/v1/adapters/tone/drift")).json()["shadow"]

    (row,) = await settled(compared)
    assert (row["judged"], row["live_grade"], row["shadow_grade"]) == (1, 0.9, 0.4)
    assert skill.asked[-1]["messages"][0]["content"] == "0.4 for hello"
    assert (
        'loradock_shadow_grade{adapter="tone",answer="shadow",sampling="sampled",version="v2"} 0.4'
        in (await client.get("/metrics")).text
    )
