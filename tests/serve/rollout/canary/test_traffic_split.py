"""Shares of traffic: exact in the long run, and the same asker meets the same version."""

from __future__ import annotations

import random

import pytest

from serve.rollout.canary.askers import Asker, Askers
from serve.rollout.canary.traffic_split import Shares, point
from tests.support.app import canary, push_two, said, upload
from tests.support.waiting import settled


def talk(text):
    return [{"role": "system", "content": "Be kind."}, {"role": "user", "content": text}]


def asker_of(fields, tenant, key):
    """The key of an asker whose like was not seen before."""
    return Askers().of(fields, tenant, key).key


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
    assert asker_of(begun, "acme", "a") == asker_of(longer, "acme", "a") != asker_of(begun, "acme", "b")
    assert asker_of({"messages": talk("bye")}, "acme", "a") != asker_of(begun, "acme", "a")
    assert asker_of({"user": "ana", **begun}, "acme", "a") == asker_of({"user": "ana"}, "acme", "b")
    assert asker_of({"user": "ana"}, "acme", "") != asker_of({"user": "ana"}, "globex", "")
    assert asker_of({"safety_identifier": "ana"}, "acme", "") == asker_of({"user": "ana"}, "acme", "")
    assert asker_of({"prompt": "Once"}, "acme", "k") and asker_of({"input": talk("hello")}, "acme", "k")
    for nothing in ({}, {"messages": []}, {"user": ""}, {"user": 3}, {"prompt": ""}):
        assert asker_of(nothing, "acme", "a") is None


@pytest.mark.parametrize("odd", [{"messages": 3}, {"messages": [[]]}, {"prompt": [1, 2]}, {"input": {"a": 1e400}}])
def test_an_odd_request_is_dealt_out_all_the_same(odd):
    assert asker_of(odd, "acme", "k") is not None


def dealt(shares, weight, users, count, rng):
    """Each request begins a conversation of its own."""
    askers = [Asker(f"user {rng.randrange(users)}".encode(), f"talk {number}".encode()) for number in range(count)]
    return [shares.deal("tone", 2, weight, asker) for asker in askers]


@pytest.mark.parametrize(("users", "weight"), [(1, 0.1), (1, 0.5), (3, 0.3), (50, 0.1), (50, 0.9)])
def test_of_few_askers_the_candidate_gets_its_share_of_requests_and_each_counts(users, weight):
    draws = dealt(Shares(), weight, users, 4000, random.Random(users))[1000:]
    assert abs(sum(draw.taken for draw in draws) / 3000 - weight) < 0.01
    assert len({draw.name for draw in draws}) == 3000


def test_many_askers_keep_their_version():
    shares, rng = Shares(), random.Random(0)
    by_name = {}
    for draw in dealt(shares, 0.3, 5000, 3000, rng):
        assert by_name.setdefault(draw.name, draw.taken) == draw.taken
    assert len(by_name) < 3000


def test_when_askers_are_many_again_they_keep_their_version_again():
    shares, rng = Shares(), random.Random(0)
    assert len({draw.name for draw in dealt(shares, 0.5, 1, 100, rng)[10:]}) == 90
    dealt(shares, 0.5, 100_000, 600, rng)
    assert {draw.name for draw in dealt(shares, 0.5, 1, 10, rng)} == {b"user 0"}


def test_of_few_askers_a_conversation_keeps_its_version():
    shares, asker = Shares(), b"app"
    versions = set()
    for number in range(200):
        talk = f"talk {number}".encode()
        draws = [shares.deal("tone", 2, 0.5, Asker(asker, talk, begins=turn == 0)) for turn in range(5)]
        assert len(set(draws)) == 1, "also while it was not known yet that they are few"
        versions.add(draws[0].taken)
    assert versions == {True, False}


def test_lots_fall_on_every_place_of_what_repeats():
    """A load with a period, as ten lines of a batch, meets each version in proportion."""
    shares = Shares()
    taken = [shares.takes("tone", 2, 0.1, None) for _ in range(50_000)]
    for place in range(10):
        assert abs(sum(taken[place::10]) / 5000 - 0.1) < 5 * (0.09 / 5000) ** 0.5


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


async def test_chats_with_the_same_examples_are_shared_out(client, make_adapter):
    live, candidate = await push_two(client, make_adapter)
    await canary(client, 0.3)
    examples = [*talk("2 + 2"), {"role": "assistant", "content": "a sum"}]
    answers = [
        await said(client, messages=[*examples, {"role": "user", "content": f"{number} - 1"}]) for number in range(200)
    ]
    assert set(answers) == {live, candidate} and 40 <= answers.count(candidate) <= 80


async def test_prompts_of_token_ids_are_shared_out(client, make_adapter):
    live, candidate = await push_two(client, make_adapter)
    await canary(client, 0.3)
    answers = [await said(client, path="/v1/completions", prompt=[1, 2, number]) for number in range(60)]
    assert set(answers) == {live, candidate} and 8 <= answers.count(candidate) <= 30


async def test_a_constant_user_is_shared_out_and_its_conversations_stay(client, make_adapter):
    _, candidate = await push_two(client, make_adapter)
    await canary(client, 0.3)
    first, later = [], []
    for number in range(40):
        messages = talk(f"question {number}")
        first.append(await said(client, messages=messages, user="app"))
        messages += [{"role": "assistant", "content": "..."}, {"role": "user", "content": "go on"}]
        later.append(await said(client, messages=messages, user="app"))
    assert first == later
    assert 8 <= first[4:].count(candidate) <= 13


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
    assert await settled(lambda: candidate not in backend.held)
    assert (await canary(client, 0.5)).status_code == 200
    assert candidate in backend.held


async def test_a_weight_of_nothing_ends_a_canary_and_frees_the_candidate(client, backend, make_adapter):
    live, candidate = await push_two(client, make_adapter)
    await canary(client, 1)
    assert await said(client) == candidate
    assert (await canary(client, 0)).json()["canary"] is None
    assert await said(client) == live
    assert await settled(lambda: candidate not in backend.held)
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


@pytest.mark.parametrize("users", [1, 3, 400])
def test_a_conversation_meets_one_version_on_whichever_server_it_goes_on(users):
    """Also where each server deals by itself, and users are few."""
    servers = [Router() for _ in range(3)]
    rng = random.Random(users)
    taken = changed = 0
    for number in range(3000):
        messages, user = talk(f"question {number}"), f"user-{rng.randrange(users)}"
        said = []
        for _ in range(3):
            said.append(rng.choice(servers).deal({"messages": messages, "user": user}))
            messages = [*messages, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "And then?"}]
        changed += len(set(said)) > 1
        taken += said[0]
    assert changed == 0
    assert abs(taken / 3000 - 0.3) < 4 * (0.3 * 0.7 / 3000) ** 0.5


class Router:
    """What a server deals with: who asks, and which version answers."""

    def __init__(self):
        self.askers = Askers()
        self.shares = Shares(shared=True)

    def deal(self, fields):
        return self.shares.deal("tone", 2, 0.3, self.askers.of(fields, "acme", "key")).taken
