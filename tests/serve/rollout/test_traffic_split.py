"""Shares of traffic: exact in the long run, and the same asker meets the same version."""

from __future__ import annotations

import asyncio

import pytest

from serve.rollout.traffic_split import Shares, point, sticky_key
from tests.support.app import canary, push_two, said, upload


def talk(text):
    return [{"role": "system", "content": "Be kind."}, {"role": "user", "content": text}]


# The arithmetic


@pytest.mark.parametrize("weight", [0.01, 0.1, 0.25, 0.5, 0.9])
def test_askers_are_dealt_out_in_the_share_that_was_asked_for(weight):
    shares, count = Shares(), 20_000
    taken = sum(shares.takes("tone", 2, weight, f"user-{number}".encode()) for number in range(count))
    assert abs(taken / count - weight) < 4 * (weight * (1 - weight) / count) ** 0.5


@pytest.mark.parametrize("weight", [0.01, 0.1, 1 / 3, 0.5, 0.9])
def test_requests_that_nobody_can_tell_apart_are_dealt_out_evenly(weight):
    shares, taken = Shares(), 0
    for turn in range(1, 5001):
        taken += shares.takes("tone", 2, weight, None)
        assert abs(taken - weight * turn) < 3, f"after {turn} requests"


def test_a_weight_of_nothing_takes_nobody_and_of_one_everybody():
    shares = Shares()
    for key in [None, *(f"user-{number}".encode() for number in range(1000))]:
        assert shares.takes("tone", 2, 1.0, key) and not shares.takes("tone", 2, 0.0, key)


def test_a_growing_weight_only_adds_askers():
    shares, keys = Shares(), [f"user-{number}".encode() for number in range(500)]
    early, later = ({key for key in keys if shares.takes("tone", 2, weight, key)} for weight in (0.1, 0.3))
    assert early < later


def test_the_next_candidate_meets_other_askers():
    first, second = ([point("tone", version, f"u{n}".encode()) < 0.1 for n in range(5000)] for version in (2, 3))
    assert sum(a and b for a, b in zip(first, second, strict=True)) < 100


def test_an_asker_is_known_by_user_and_else_by_key_and_beginning():
    begun = {"messages": talk("hello")}
    longer = {"messages": [*talk("hello"), {"role": "assistant", "content": "hi"}, {"role": "user", "content": "so?"}]}
    assert sticky_key(begun, "acme", "a") == sticky_key(longer, "acme", "a") != sticky_key(begun, "acme", "b")
    assert sticky_key({"messages": talk("bye")}, "acme", "a") != sticky_key(begun, "acme", "a")
    assert sticky_key({"user": "ana", **begun}, "acme", "a") == sticky_key({"user": "ana"}, "acme", "b")
    assert sticky_key({"user": "ana"}, "acme", "") != sticky_key({"user": "ana"}, "globex", "")
    assert sticky_key({"safety_identifier": "ana"}, "acme", "") == sticky_key({"user": "ana"}, "acme", "")
    assert sticky_key({"prompt": "Once"}, "acme", "k") and sticky_key({"input": talk("hello")}, "acme", "k")
    for nothing in ({}, {"messages": []}, {"user": ""}, {"user": 3}, {"prompt": ""}):
        assert sticky_key(nothing, "acme", "a") is None


@pytest.mark.parametrize("odd", [{"messages": 3}, {"messages": [[]]}, {"prompt": [1, 2]}, {"input": {"a": 1e400}}])
def test_an_odd_request_is_dealt_out_all_the_same(odd):
    assert sticky_key(odd, "acme", "k") is not None


# The canary


async def test_a_canary_answers_its_share_and_the_answer_says_who_it_was(client, make_adapter):
    live, candidate = await push_two(client, make_adapter)
    set_up = await canary(client, 0.25)
    assert set_up.json()["canary"] == {"version": 2, "weight": 0.25}
    answers = [await said(client, user=f"u{number}") for number in range(200)]
    assert set(answers) == {live, candidate}
    assert 25 <= answers.count(candidate) <= 75
    assert answers == [await said(client, user=f"u{number}") for number in range(200)]


async def test_a_conversation_stays_with_the_version_it_began_with(client, make_adapter):
    await push_two(client, make_adapter)
    await canary(client, 0.5)
    for number in range(20):
        messages = talk(f"question {number}")
        first = await said(client, messages=messages)
        messages += [{"role": "assistant", "content": "..."}, {"role": "user", "content": "go on"}]
        assert await said(client, messages=messages) == first


async def test_without_anything_to_know_the_asker_by_the_share_is_exact(client, make_adapter):
    _, candidate = await push_two(client, make_adapter)
    await canary(client, 0.2)
    answers = [await said(client) for _ in range(50)]
    assert 9 <= answers.count(candidate) <= 11


async def test_a_version_asked_for_by_number_is_never_dealt_away(client, make_adapter):
    live, _ = await push_two(client, make_adapter)
    await canary(client, 1)
    assert await said(client, "tone@v1", user="ana") == live


async def test_a_candidate_is_resident_before_it_takes_traffic(client, backend, make_adapter):
    _, candidate = await push_two(client, make_adapter)
    while candidate in backend.held:
        await asyncio.sleep(0.01)
    assert (await canary(client, 0.5)).status_code == 200
    assert candidate in backend.held


async def test_a_weight_of_nothing_ends_a_canary_and_frees_the_candidate(client, backend, make_adapter):
    live, candidate = await push_two(client, make_adapter)
    await canary(client, 1)
    assert await said(client) == candidate
    assert (await canary(client, 0)).json()["canary"] is None
    assert await said(client) == live
    for _ in range(100):
        await asyncio.sleep(0.01)
        if candidate not in backend.held:
            break
    assert candidate not in backend.held
    history = (await client.get("/v1/adapters/tone")).json()["history"]
    assert [(row["what"], row["weight"]) for row in history][-2:] == [("canary", 1.0), ("canary_end", None)]


@pytest.mark.parametrize("end", ["promote", "rollback", "delete candidate", "delete live", "push"])
async def test_a_canary_ends_when_the_pointer_moves_or_a_side_goes(client, make_adapter, end):
    await push_two(client, make_adapter)
    if end == "rollback":
        await client.post("/v1/adapters", **upload(make_adapter(2)))
    await canary(client, 0.5)
    done = await {
        "promote": lambda: client.post("/v1/adapters/tone/promote", json={"version": 2}),
        "rollback": lambda: client.post("/v1/adapters/tone/rollback"),
        "delete candidate": lambda: client.delete("/v1/adapters/tone/versions/2"),
        "delete live": lambda: client.delete("/v1/adapters/tone/versions/1?force=true"),
        "push": lambda: client.post("/v1/adapters", **upload(make_adapter(3))),
    }[end]()
    assert done.is_success
    assert (await client.get("/v1/adapters/tone")).json()["canary"] is None


async def test_a_canary_stays_when_a_third_version_comes_or_goes(client, make_adapter):
    await push_two(client, make_adapter)
    await canary(client, 0.5)
    await client.post("/v1/adapters", **upload(make_adapter(2), promote="false"))
    await client.delete("/v1/adapters/tone/versions/3")
    assert (await client.get("/v1/adapters/tone")).json()["canary"] == {"version": 2, "weight": 0.5}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"version": 2, "weight": 1.5}, 400),
        ({"version": 2, "weight": -0.1}, 400),
        ({"version": 2}, 400),
        ({"version": 9, "weight": 0.5}, 404),
        ({"version": 1, "weight": 0.5}, 409),
    ],
)
async def test_a_canary_that_cannot_be_is_a_sentence(client, make_adapter, body, status):
    await push_two(client, make_adapter)
    refused = await client.post("/v1/adapters/tone/canary", json=body)
    assert refused.status_code == status
    assert refused.json()["error"]["message"]


async def test_a_canary_survives_a_restart(connect, config, backend, make_adapter):
    async with connect(config) as client:
        _, candidate = await push_two(client, make_adapter)
        await canary(client, 0.5)
    backend.held.clear()
    backend.numbers.clear()
    async with connect(config) as client:
        assert candidate in backend.held
        assert (await client.get("/v1/adapters/tone")).json()["canary"] == {"version": 2, "weight": 0.5}
