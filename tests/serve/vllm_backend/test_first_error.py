"""A body that is wrong in bulk costs what its first wrong item costs, at the door of the engine itself."""

from __future__ import annotations

import json
from importlib import import_module

import httpx
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from fastapi import FastAPI
from pydantic import ValidationError

from serve.vllm_backend import first_error
from serve.vllm_backend.request_schemas import REQUESTS
from tests.serve.vllm_backend.test_request_schemas import ROUTERS
from tests.support.garbage import left_by

SAY = [{"role": "user", "content": "x"}]
HONEST = {
    "model": "base", "messages": SAY, "prompt": "x", "input": "x", "max_tokens": 4, "query": "x", "documents": ["x"],
    "token_ids": [1], "tokens": [1], "sampling_params": {}, "text_1": "x", "text_2": "x", "queries": "x",
}  # fmt: skip
ITEMS = [{}, [], 3, "x", None, {"type": "message"}, {"role": "user", "content": [{}, {}]}, {"type": "function"}, [{}]]


@pytest.fixture(scope="module")
def app():
    """vLLM's routes as they stand in its server, without an engine behind them."""
    app = FastAPI()
    for name in ROUTERS:
        app.include_router(import_module(f"vllm.entrypoints.{name}").router)
    first_error.install(app)
    return app


@pytest.fixture(scope="module")
def validators(app):
    """path -> what looks at its body."""
    routes = [route for route in app.routes if getattr(route, "path", None) in REQUESTS and "POST" in route.methods]
    return {route.path: route.dependant.body_params[0]._type_adapter for route in routes}


def errors(validator, body) -> int:
    try:
        validator.validate_python(body)
    except ValidationError as error:
        return error.error_count()
    except Exception:  # vLLM's own checks end it at once
        return 1
    return 0


def fields(validator) -> set[str]:
    schema = validator.json_schema()
    parts = [schema, *schema.get("$defs", {}).values()]
    return {name for part in parts for name in part.get("properties", {})}


@pytest.mark.parametrize("path", REQUESTS)
def test_a_thousand_wrong_items_are_hardly_more_errors_than_two(path, validators):
    validator = validators[path]
    looked = 0
    for name in fields(validator):
        for item in ITEMS:
            for many in (lambda n, item=item: [item] * n, lambda n, item=item: {f"k{i}": item for i in range(n)}):
                two, thousand = (errors(validator, {**HONEST, name: many(n)}) for n in (2, 1000))
                # One for each choice of a union that says how many it takes, or which keys.
                assert thousand <= two + first_error.MOST_KEYS, (name, item)
                looked += two > 0
    assert looked, "nothing of it was wrong"


@pytest.mark.parametrize("wrong", [{"n": [[]] * 20_000}, {"user": [[]] * 20_000, "stream_options": {}}])
async def test_a_body_that_was_refused_is_gone_without_a_collection_of_garbage(wrong, app):
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:

        async def refused():
            answer = await client.post("/v1/completions", json={"model": "base", "prompt": "x", **wrong})
            assert answer.status_code == 400

        assert await left_by(refused) < 10_000


@pytest.mark.parametrize(
    ("path", "body", "where"),
    [
        ("/v1/responses", {"input": [{}] * 5461}, "input.0"),
        ("/v1/responses", {"input": [SAY[0], {"role": "user", "content": [{}] * 100}]}, "input.1"),
        ("/v1/responses", {"input": "x", "tools": [{}] * 300}, "tools.0"),
        ("/v1/chat/completions", {"messages": [{}] * 5000}, "messages.0"),
        ("/v1/chat/completions", {"messages": SAY, "tools": [{}] * 300}, "tools.0.function"),
        ("/v1/chat/completions", {"messages": SAY, "logit_bias": dict.fromkeys("abcdefgh", "x")}, "logit_bias.a"),
        (
            "/v1/chat/completions",
            {"messages": [*SAY, {"role": "assistant", "tool_calls": [3]}]},
            "messages.1.tool_calls.0",
        ),
        ("/v1/messages", {"max_tokens": 4, "messages": [{}] * 5000}, "messages.0.role"),
        ("/v1/completions", {"prompt": "x", "n": "many"}, "n"),
    ],
)
async def test_the_error_is_a_sentence_that_names_the_field(path, body, where, app):
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        answer = await client.post(path, json={"model": "base", **body})
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["param"].startswith(where)
    assert len(json.dumps(error)) < 500 and "\n" not in error["message"]


def test_an_answer_whose_type_a_client_left_out_is_read_as_one(validators):
    answer = {"role": "assistant", "content": [{"type": "output_text", "text": "Hello"}]}
    body = {"model": "base", "input": [*SAY, answer, *SAY]}
    read = validators["/v1/responses"].validate_python(body).input
    assert (read[1].type, read[1].content[0].text, read[0]["content"]) == ("message", "Hello", "x")
    assert answer == {"role": "assistant", "content": [{"type": "output_text", "text": "Hello"}]}
