"""What of a request reaches the engine, and what is refused before."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from serve.asgi.connection import CONNECTION
from serve.engine.engine import LOW_PRIORITY
from serve.gateway.request import FOREIGN_MODEL_FIELDS, MAX_ITEMS
from tests.support.app import CHAT, http, push_two, said
from tests.support.waiting import settled

ASKING = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/embeddings"]
FIRST = "-9223372036854775808"


@pytest.mark.parametrize("path", ASKING)
async def test_no_client_takes_a_place_in_the_engines_queue_by_a_header(client, backend, path):
    await client.post(path, json={"model": "base"}, headers={"X-Vllm-Priority": FIRST})
    assert backend.headers[-1].get("x-vllm-priority") != FIRST


async def test_no_shadow_goes_first_because_its_request_had_a_header(client, backend, make_adapter):
    await push_two(client, make_adapter)
    await client.post("/v1/adapters/tone/shadow", json={"version": 2, "weight": 1})
    await client.post(CHAT, json={"model": "tone"}, headers={"X-Vllm-Priority": FIRST})
    assert await settled(lambda: len(backend.headers) == 2)
    assert [headers.get("x-vllm-priority") for headers in backend.headers] == [None, None]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
async def test_every_request_has_the_place_that_the_queue_gave_it(client, backend, path):
    await client.post(path, json={"model": "base", "priority": 5}, headers={"X-Vllm-Priority": FIRST})
    places = (backend.bodies[-1].get("priority"), backend.headers[-1].get("x-vllm-priority"))
    assert places == ((None, str(5 << 32)) if path == "/v1/messages" else (5 << 32, None))


async def test_an_engine_without_priorities_is_told_none(client, backend):
    backend.prioritizes = False
    await client.post(CHAT, json={"model": "base", "priority": 5})
    assert "priority" not in backend.bodies[-1]


@pytest.mark.parametrize("path", ASKING)
@pytest.mark.parametrize("priority", ["-5", "5", -9.0, 1.0, 1e300, True, [1], {}, -1, LOW_PRIORITY, 1 << 70])
async def test_a_priority_is_a_whole_number_in_range(client, backend, path, priority):
    answer = await client.post(path, json={"model": "base", "priority": priority})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "priority")
    assert str(LOW_PRIORITY - 1) in answer.json()["error"]["message"]
    assert not backend.bodies


async def test_a_priority_of_null_is_none(client, backend):
    assert (await client.post(CHAT, json={"model": "base", "priority": None})).status_code == 200
    assert "priority" not in backend.bodies[-1]


@pytest.mark.parametrize("field", FOREIGN_MODEL_FIELDS)
async def test_a_field_that_chooses_the_model_elsewhere_is_refused_and_not_passed_over(
    client, backend, make_adapter, field
):
    await push_two(client, make_adapter)
    for body in ({field: "tone"}, {"model": "tone", field: ["tone"]}):
        answer = await client.post(CHAT, json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
        assert "`model`" in answer.json()["error"]["message"]
    assert not backend.bodies
    assert await said(client, **{field: None}) in backend.held


async def test_a_connection_whose_caller_has_a_key_is_known_to_the_server(operator):
    told = []
    scope, receive, send, _, _ = http({"model": "base"})
    scope["extensions"] = {CONNECTION: SimpleNamespace(recognise=lambda: told.append("known"), has_left=False)}
    await operator._transport.app(scope, receive, send)
    assert not told
    key = (b"authorization", operator.headers["authorization"].encode())
    scope, receive, send, _, _ = http({"model": "base"})
    scope |= {"extensions": {CONNECTION: SimpleNamespace(recognise=lambda: told.append("known"), has_left=False)}}
    scope["headers"] = [*scope["headers"], key]
    await operator._transport.app(scope, receive, send)
    assert told == ["known"]


async def test_a_request_whose_client_has_left_when_it_was_read_costs_the_engine_nothing(client, backend):
    scope, receive, send, _sent, _ = http({"model": "base"})
    scope["extensions"] = {CONNECTION: SimpleNamespace(recognise=lambda: None, has_left=True)}
    await client._transport.app(scope, receive, send)
    assert not backend.bodies


async def test_a_body_that_needs_no_change_passes_byte_for_byte(client, backend):
    body = b'{"model": "base",   "seed": 1, "x": "\\u00e4"}'
    await client.post(CHAT, content=body)
    assert int(backend.headers[-1]["content-length"]) == len(body)
    assert backend.bodies[-1] == json.loads(body)


@pytest.mark.parametrize(
    ("path", "field", "values"),
    [
        (CHAT, "structured_outputs", [1.5, [[]], "x", True]),
        (CHAT, "messages", [None, True, 0, {}]),
        ("/v1/responses", "tools", [False, 1, {}]),
    ],
)
async def test_what_vllm_looks_into_before_it_asks_what_it_is_is_a_400(client, backend, path, field, values):
    """It was a 500."""
    before = len(backend.bodies)
    for value in values:
        answer = await client.post(path, json={"model": "base", "input": "x", field: value})
        assert answer.status_code == 400 and f"{field} takes a" in answer.json()["error"]["message"]
    assert len(backend.bodies) == before
    beside = {"model": "base", "prompt": "x", "messages": None, "tools": None, "structured_outputs": None}
    assert (await client.post("/tokenize", json=beside)).status_code == 200


@pytest.mark.parametrize(
    "fields", [{"top_k": 2**70}, {"stream_interval": -(2**63) - 1}, {"vllm_xargs": {"depth": [1, {"deeper": 2**63}]}}]
)
async def test_a_number_that_the_engine_cannot_be_told_is_a_400(client, backend, fields):
    before = len(backend.bodies)
    answer = await client.post(CHAT, json={"model": "base", "messages": [], **fields})
    assert answer.status_code == 400, answer.text
    assert "64 bits" in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == next(iter(fields))
    assert len(backend.bodies) == before


async def test_long_numbers_in_text_and_the_largest_integer_pass(client):
    messages = [{"role": "user", "content": "pi: 31415926535897932384626433"}]
    answer = await client.post(CHAT, json={"model": "base", "messages": messages, "seed": 2**63 - 1})
    assert answer.status_code == 200


async def test_a_server_that_keeps_no_responses_says_so_and_how_it_would(client, backend):
    asked = {"model": "base", "previous_response_id": "resp_1"}
    unknown = await client.post("/v1/responses", json=asked)
    assert unknown.status_code == 404 and "resp_1" in unknown.json()["error"]["message"]
    backend.keeps_responses = False
    refused = await client.post("/v1/responses", json=asked)
    assert (refused.status_code, refused.json()["error"]["param"]) == (404, "previous_response_id")
    assert "VLLM_ENABLE_RESPONSES_API_STORE=1" in refused.json()["error"]["message"]
    assert not backend.bodies


@pytest.mark.parametrize(("path", "field"), [(CHAT, "messages"), ("/v1/responses", "input"), (CHAT, "tools")])
async def test_items_that_are_compared_with_many_models_are_bounded(client, backend, path, field):
    body = {"model": "base", "messages": [], "input": "x"}
    item = {"role": "user", "content": "x"}
    assert (await client.post(path, json={**body, field: [item] * MAX_ITEMS})).status_code == 200
    answer = await client.post(path, json={**body, field: [item] * (MAX_ITEMS + 1)})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
    assert len(backend.bodies) == 1


async def test_numbers_with_far_exponents_are_read_as_they_are_and_out_of_range_is_a_400(client, backend):
    """msgspec alone takes 20 times as long for them as Python: a body of them stopped the event loop for seconds."""
    numbers = b"[1e308, -2.5e-300, 1e22, 0.1, 12]"
    await client.post(CHAT, content=b'{"model": "base", "x": ' + numbers + b"}")
    assert backend.bodies[-1]["x"] == json.loads(numbers)
    for text in (b"1e400", b"-1e999"):
        answer = await client.post(CHAT, content=b'{"model": "base", "x": [' + text + b"]}")
        assert answer.status_code == 400 and "out of range" in answer.json()["error"]["message"]


async def test_a_conversation_that_nobody_keeps_is_not_left_out_in_silence(client, backend):
    asked = {"model": "base", "input": "and then?", "conversation": "conv_1"}
    refused = await client.post("/v1/responses", json=asked)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "conversation")
    assert "previous_response_id" in refused.json()["error"]["message"] and not backend.bodies
    await client.post("/v1/responses", json={**asked, "conversation": None})
    assert backend.bodies


@pytest.mark.parametrize(
    ("path", "tool", "field"),
    [
        (CHAT, {"function": {"name": "f", "parameters": {"properties": ["a"]}}}, "function.parameters"),
        ("/v1/responses", {"name": "f", "parameters": {"properties": ["a"]}}, "parameters"),
        ("/v1/messages", {"name": "f", "input_schema": {"properties": ["a"]}}, "input_schema"),
    ],
)
async def test_properties_of_a_tool_that_no_template_can_read_are_named(client, backend, path, tool, field):
    fields = {"model": "base", "messages": [], "tools": [{"type": "function"}, tool]}
    refused = await client.post(path, json=fields)
    assert refused.status_code == 400
    said = refused.json()["error"]["message"]
    assert said == f"tools.1.{field}.properties takes an object of schemas by name, not ['a']"
    assert not backend.bodies
    for properties in (None, {}):
        fields["tools"] = [{"function": {"name": "f", "parameters": {"properties": properties}}}]
        assert (await client.post(CHAT, json=fields)).status_code == 200
