"""What is kept of the Responses API is bounded, and nobody's responses push out another's."""

from __future__ import annotations

import asyncio
import inspect
from collections import deque
from types import SimpleNamespace

import pytest
from pydantic import BaseModel
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses

from serve.gateway.tenant_isolation import check_response_owner, new_response_id
from serve.names import response_owner
from serve.vllm_backend.patches.response_store import ResponseStores, bound


class Response(BaseModel):
    text: str


def fill(stores, owner, count, text="x"):
    ids = [f"resp_{owner}{number:056x}" for number in range(count)]
    for id in ids:
        stores.messages[id] = [{"role": "user", "content": text}]
        stores.responses[id] = Response(text=text)
    return ids


def test_the_oldest_of_whoever_keeps_the_most_go_first():
    stores = ResponseStores(response_owner, entries=10)
    few = fill(stores, "a" * 8, 3)
    many = fill(stores, "b" * 8, 20)
    assert [id for id in few if id in stores.responses] == few
    assert [id for id in many if id in stores.responses] == many[-7:]
    assert stores.responses.keys() == stores.messages.keys(), "an id is in all or in none"


def test_long_conversations_are_bounded_in_bytes():
    stores = ResponseStores(response_owner, entries=1000, nbytes=1 << 20)
    small = fill(stores, "a" * 8, 5)
    fill(stores, "b" * 8, 100, text="x" * 100_000)
    assert 1 <= len(stores.responses) - 5 <= 5
    assert all(id in stores.responses for id in small)
    fill(stores, "c" * 8, 1, text="x" * (2 << 20))
    assert not any(id.startswith("resp_c") for id in stores.responses), "it is larger than all that may be kept"


def test_a_response_that_changes_is_one_entry_and_its_events_go_with_it():
    stores = ResponseStores(response_owner, entries=2)
    first, *_ = fill(stores, "a" * 8, 1)
    stores.events[first] = (deque(), asyncio.Event())
    for _ in range(5):
        stores.responses[first] = Response(text="in progress")
    assert list(stores.responses) == [first]
    fill(stores, "b" * 8, 2)
    fill(stores, "c" * 8, 2)
    assert first not in stores.events and len(stores.responses) == 2


def test_the_ids_of_a_tenant_begin_alike_and_no_others():
    mine, others = {new_response_id("acme") for _ in range(50)}, {new_response_id(f"t{n}") for n in range(50)}
    assert len(mine) == 50 and len({response_owner(id) for id in mine}) == 1
    assert not {response_owner(id) for id in mine} & {response_owner(id) for id in others}
    for id in mine:
        check_response_owner(id, "acme")


def test_nothing_is_kept_where_vllm_keeps_nothing():
    off = SimpleNamespace(enable_store=False, response_store={})
    assert not bound(off, response_owner) and type(off.response_store) is dict
    assert not bound(None, response_owner)
    on = serving()
    assert bound(on, response_owner) and isinstance(on.response_store, dict)


def serving(**named):
    """vLLM's, without an engine, that keeps responses in the stores of ours."""
    made = object.__new__(OpenAIServingResponses)
    vars(made).update(enable_store=True, background_tasks={}, response_store_lock=asyncio.Lock(), **named)
    bound(made, response_owner)
    return made


async def test_a_response_without_events_is_a_400_and_not_a_broken_stream():
    kept = serving()
    kept.response_store["resp_1"] = SimpleNamespace(status="completed")
    error = await kept.retrieve_responses("resp_1", starting_after=None, stream=True)
    assert error.error.code == 400 and "resp_1 has no events" in error.error.message
    assert (await kept.retrieve_responses("resp_1", starting_after=None, stream=False)).status == "completed"
    assert (await kept.retrieve_responses("resp_2", starting_after=None, stream=True)).error.code == 404


async def test_the_events_of_a_response_that_was_cancelled_end():
    kept = serving()
    kept.response_store["resp_1"] = SimpleNamespace(status="in_progress")
    begun, events = asyncio.Event(), (deque(), asyncio.Event())
    kept.event_store["resp_1"] = events

    async def answer():
        try:
            for number in range(2):
                events[0].append(number)
                events[1].set()
            begun.set()
            await asyncio.Event().wait()
        finally:
            events[1].set()

    task = kept.background_tasks["resp_1"] = asyncio.create_task(answer())

    async def read(after=None):
        stream = await kept.retrieve_responses("resp_1", starting_after=after, stream=True)
        return [event async for event in stream]

    readers = [asyncio.create_task(read()), asyncio.create_task(read(0))]
    await begun.wait()
    await asyncio.sleep(0)
    task.cancel()
    assert await asyncio.wait_for(asyncio.gather(*readers), 5) == [[0, 1], [1]]
    assert await asyncio.wait_for(read(), 5) == [0, 1], "and for whoever asks later"


@pytest.mark.parametrize("status", ["queued", "in_progress", "cancelled", "failed"])
async def test_a_conversation_does_not_go_on_from_a_response_without_an_answer(status):
    previous = SimpleNamespace(id="resp_1", status=status)
    error = await serving()._render_resolved_response_inputs(None, previous)
    assert error.error.code == 400 and error.error.param == "previous_response_id"
    assert f"the response resp_1 is {status}" in error.error.message


def test_vllm_has_these_three_stores_and_this_switch():
    source = inspect.getsource(OpenAIServingResponses)
    for name in ("response_store", "msg_store", "event_store"):
        assert f"self.{name}: dict[" in source
    assert "self.enable_store = envs.VLLM_ENABLE_RESPONSES_API_STORE" in source
    assert "self.response_store[response.id] = response" in source and ".response_store = {}" not in source
