"""Data-parallel ranks: alike goes together, as long as that keeps nobody waiting."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import pytest

from serve.engine.dp_ranks import DataParallelRanks, opening
from tests.support.waiting import settled

LONG = "You are a helpful assistant of the harbour office. " * 20


def ask(ranks, stack, adapter=None, text=""):
    return stack.enter_context(ranks.taken(adapter, text))


def test_one_rank_is_no_choice():
    with DataParallelRanks(1).taken("a", "x") as rank:
        assert rank is None


def test_who_has_least_to_do_answers_and_is_free_again_afterwards():
    ranks = DataParallelRanks(3)
    with ExitStack() as stack:
        assert [ask(ranks, stack) for _ in range(6)] == [0, 1, 2, 0, 1, 2]
        assert ranks.busy == [2, 2, 2]
    assert ranks.busy == [0, 0, 0]


def test_a_beginning_that_was_seen_goes_where_it_was_computed():
    ranks = DataParallelRanks(4)
    with ExitStack() as stack:
        ask(ranks, stack)
        where = ask(ranks, stack, None, LONG + "one")
    with ExitStack() as stack:
        ask(ranks, stack)
        assert ask(ranks, stack, None, LONG + "two") == where == 1
        assert ask(ranks, stack, "tone", LONG + "three") != where, "an adapter's cache is its own"


def test_an_adapter_stays_where_it_is_used_until_others_have_much_less_to_do():
    ranks = DataParallelRanks(2)
    with ExitStack() as stack:
        ask(ranks, stack)
        assert [ask(ranks, stack, "tone") for _ in range(2)] == [1, 1]
        ask(ranks, stack)
        assert [ask(ranks, stack, "tone") for _ in range(8)].count(0) > 0
        assert max(ranks.busy) - min(ranks.busy) <= 3


def test_a_burst_of_one_adapter_is_spread():
    ranks = DataParallelRanks(2)
    with ExitStack() as stack:
        for _ in range(100):
            ask(ranks, stack, "tone", LONG)
        assert max(ranks.busy) <= 100 * 0.56


@pytest.mark.parametrize("ranks, asked", [(1, [None] * 3), (2, ["0", "1", "0"])])
async def test_a_client_does_not_choose_the_rank(connect, config, backend, ranks, asked):
    backend.ranks = ranks
    async with connect(config) as client:
        backend.flow.clear()
        body = {"model": "base", "prompt": "x", "stream": True}
        headers = {"X-data-parallel-rank": "7"}
        asking = [asyncio.create_task(client.post("/v1/completions", json=body, headers=headers)) for _ in range(3)]
        assert await settled(lambda: len(backend.headers) >= 3)
        backend.flow.set()
        assert {answer.status_code for answer in await asyncio.gather(*asking)} == {200}
    assert [headers.get("x-data-parallel-rank") for headers in backend.headers] == asked


@pytest.mark.parametrize(
    "fields, begins",
    [
        ({"prompt": "x"}, "x"),
        ({"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": [{"text": "b"}]}]}, "a\n"),
        ({"prompt": [1, 2, 3]}, "1\n2"),
        ({"input": "y"}, "y"),
        ({}, ""),
    ],
)
def test_a_request_begins_with_its_prompt_however_that_is_given(fields, begins):
    assert opening(fields).startswith(begins)
