"""Errors have the shape that the clients of a path read: Anthropic's under /v1/messages, OpenAI's elsewhere."""

from __future__ import annotations

import json
from dataclasses import replace

import anthropic
import httpx2
import pytest
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse

from serve.asgi.error_shapes import AnthropicErrors, as_anthropic
from serve.config import keys_hashed
from serve.engine.engine import Phase
from tests.support.app import CHAT, http

MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"


def of_anthropic(response, status, kind):
    body = response.json()
    assert (response.status_code, body["type"], body["error"]["type"]) == (status, "error", kind), response.text
    assert body["error"]["message"]
    return body["error"]


@pytest.mark.parametrize("path", [MESSAGES, COUNT])
async def test_our_errors_have_anthropics_envelope(connect, config, path):
    keyed = replace(config, api_keys=keys_hashed(["ask"]), metrics_keys=keys_hashed(["look"]))
    async with connect(keyed) as client:
        of_anthropic(await client.post(path, json={"model": "base"}), 401, "authentication_error")
        look = {"authorization": "Bearer look"}
        of_anthropic(await client.post(path, json={"model": "base"}, headers=look), 403, "permission_error")
        client.headers["x-api-key"] = "ask"
        gone = await client.post(path, json={"model": "nobody"})
        assert of_anthropic(gone, 404, "not_found_error")["code"] == "model_not_found"
        of_anthropic(await client.post(path, content=b"{"), 400, "invalid_request_error")
        of_anthropic(await client.post(path, content=b" " * (5 << 20)), 413, "request_too_large")
        of_anthropic(await client.get(path), 405, "invalid_request_error")
        of_anthropic(await client.get(f"{path}/nothing"), 404, "not_found_error")
        foreign = await client.post(path, json={}, headers={"sec-fetch-site": "cross-site"})
        of_anthropic(foreign, 403, "permission_error")
        client._transport.app.state.parts.fleet.first.phase = Phase.FAILED
        of_anthropic(await client.post(path, json={"model": "base"}), 503, "overloaded_error")


async def test_a_limit_a_deadline_and_a_defect_have_it_too(operator, backend, issue):
    limited = await issue("default", "inference", requests_per_minute=1)
    await limited.post(MESSAGES, json={"model": "base"})
    again = await limited.post(MESSAGES, json={"model": "base"})
    of_anthropic(again, 429, "rate_limit_error")
    assert int(again.headers["retry-after"]) > 0
    backend.slow = "base"
    late = await operator.post(MESSAGES, json={"model": "base"}, headers={"x-request-timeout": "1"})
    of_anthropic(late, 504, "timeout_error")
    backend.slow, backend.broken = None, "base"
    operator._transport.raise_app_exceptions = False
    broken = of_anthropic(await operator.post(MESSAGES, json={"model": "base"}), 500, "api_error")
    assert "RuntimeError" in broken["message"]
    defect = await operator.post(CHAT, json={"model": "base"})
    assert (defect.status_code, defect.json()["error"]["type"]) == (500, "internal_error")


VLLMS = {"error": {"message": "max_tokens is too large", "type": "BadRequestError", "param": None, "code": 400}}
HALF = {"type": "error", "error": {"type": "BadRequestError", "message": "max_tokens is too large"}}


@pytest.mark.parametrize("body", [VLLMS, HALF, None], ids=["OpenAI's", "half Anthropic's", "text"])
async def test_what_vllm_answers_is_translated(client, backend, monkeypatch, body):
    async def app(scope, receive, send):
        text = PlainTextResponse("max_tokens is too large", 400)
        await (JSONResponse(body, 400) if body else text)(scope, receive, send)

    monkeypatch.setattr(backend, "app", app)
    error = of_anthropic(await client.post(MESSAGES, json={"model": "base"}), 400, "invalid_request_error")
    assert error == {"type": "invalid_request_error", "message": "max_tokens is too large"}
    same = await client.post(CHAT, json={"model": "base"})
    assert same.text == (json.dumps(body, separators=(",", ":")) if body else "max_tokens is too large")


async def test_a_stream_that_opens_with_an_error_has_its_status(client, backend, monkeypatch):
    error = {"type": "error", "error": {"type": "internal_error", "message": "no such luck"}}
    event = f"event: error\ndata: {json.dumps(error, separators=(',', ':'))}\n\n"
    chunks = [event]

    async def app(scope, receive, send):
        async def stream():
            for chunk in chunks:
                yield chunk

        await StreamingResponse(stream(), media_type="text/event-stream")(scope, receive, send)

    monkeypatch.setattr(backend, "app", app)
    asked = {"model": "base", "stream": True}
    assert of_anthropic(await client.post(MESSAGES, json=asked), 500, "api_error")["message"] == "no such luck"
    chunks.insert(0, "event: ping\ndata: {}\n\n")
    late = await client.post(MESSAGES, json=asked)
    assert late.status_code == 200 and late.text == chunks[0] + event.replace("internal_error", "api_error")


async def test_what_is_no_error_passes_byte_for_byte():
    sent = []

    async def send(message):
        sent.append(message)

    passing = [
        {"type": "http.response.start", "status": 200, "headers": []},
        {"type": "http.response.body", "body": b"{}", "more_body": True},
        {"type": "http.response.body", "body": b""},
    ]
    answer = AnthropicErrors(send)
    for message in passing:
        await answer.send(message)
    assert sent == passing


def test_an_error_of_vllm_without_a_field_is_one_all_the_same():
    assert as_anthropic({}, 418) == {"type": "error", "error": {"type": "invalid_request_error", "message": ""}}


@pytest.mark.parametrize(
    ("method", "path", "takes"),
    [
        ("GET", "/v1/chat/completions", "POST"),
        ("DELETE", "/v1/responses", "POST"),
        ("PUT", "/tokenize", "POST"),
        ("POST", "/v1/responses/resp_1", "GET"),
        ("GET", "/v1/responses/resp_1/cancel", "POST"),
        ("PATCH", "/v1/adapters", None),
        ("POST", "/v1/models", None),
    ],
)
async def test_another_method_is_a_405_that_says_which_is_taken(client, backend, method, path, takes):
    refused = await client.request(method, path)
    assert refused.status_code == 405
    assert set(refused.json()["error"]) == {"message", "type", "param", "code"}
    assert refused.headers["allow"] and takes in (None, refused.headers["allow"])
    assert not backend.bodies


async def test_a_defect_after_the_answer_began_sends_no_second_head(client, backend, monkeypatch):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        raise RuntimeError("broken")

    monkeypatch.setattr(backend, "app", app)
    scope, receive, send, sent, _ = http({"model": "base"}, MESSAGES)
    with pytest.raises(RuntimeError):
        await client._transport.app(scope, receive, send)
    assert [message["type"] for message in sent].count("http.response.start") == 1


async def test_anthropics_own_client_raises_its_own_errors(client):
    async with anthropic.AsyncAnthropic(
        api_key="x",
        base_url="http://localhost",
        max_retries=0,
        http_client=httpx2.AsyncClient(transport=httpx2.ASGITransport(client._transport.app)),
    ) as sdk:
        with pytest.raises(anthropic.NotFoundError) as gone:
            await sdk.messages.create(model="nobody", max_tokens=1, messages=[{"role": "user", "content": "x"}])
    assert gone.value.body["error"]["type"] == "not_found_error"


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/v1/adapters", "GET, POST"),
        ("/v1/adapters/tone", "DELETE, GET"),
        ("/v1/adapters/acme/tone/pin", "DELETE, POST"),
        ("/v1/adapters/tone/golden", "DELETE, GET, PUT"),
        ("/v1/adapters/tone/aliases/stable", "DELETE, PUT"),
        ("/v1/models", "GET"),
    ],
)
async def test_allow_lists_every_method_that_a_path_takes(client, path, methods):
    refused = await client.request("PATCH", path)
    assert (refused.status_code, refused.headers["allow"]) == (405, methods)
