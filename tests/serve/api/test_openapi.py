"""The OpenAPI document says of every route what it takes, who may call it, and what an error looks like."""

from __future__ import annotations

import re
from dataclasses import replace

import msgspec
import pytest
from fastapi.routing import APIRoute

from serve.api.openapi import UPLOAD
from serve.api.reference.inference import SUMMARIES, inference_paths
from serve.api.reference.page import page
from serve.api.schemas import Fetch
from serve.auth.auth import Scope
from serve.config import keys_hashed
from tests.serve.gateway.test_tenants import INFERENCE

SCOPES = set(Scope)


@pytest.fixture
async def document(client):
    return (await client.get("/openapi.json")).json()


def operations(document):
    return {
        (method, path): operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


def references(value):
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for inner in value.values():
            yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)


async def test_every_route_is_in_it(client, document):
    paths = set(document["paths"])
    assert set(INFERENCE) <= paths and {"/v1/responses/{response_id}", "/v1/responses/{response_id}/cancel"} <= paths
    app = client._transport.app
    described = {route.path_format for route in app.routes if isinstance(route, APIRoute) and route.include_in_schema}
    assert described <= paths
    hidden = {route.path for route in app.routes if isinstance(route, APIRoute)} - {
        route.path for route in app.routes if isinstance(route, APIRoute) and route.include_in_schema
    }
    assert all(path == "/" or path.startswith(("/dashboard", "/docs", "/openapi.json")) for path in hidden), hidden


async def test_every_reference_leads_somewhere(document):
    names = set(document["components"]["schemas"])
    assert {reference.rpartition("/")[2] for reference in references(document)} <= names
    ids = [operation["operationId"] for operation in operations(document).values()]
    assert len(ids) == len(set(ids))


async def test_every_inference_route_has_vllms_own_request_and_the_fallbacks(document):
    for path in INFERENCE:
        body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        own, ours = body["allOf"]
        assert own and "models" in ours["properties"], path
    chat = document["components"]["schemas"]["ChatCompletionRequest"]
    assert {"messages", "model", "temperature"} <= chat["properties"].keys() and "messages" in chat["required"]
    assert set(SUMMARIES) == set(INFERENCE)


async def test_every_operation_has_its_scope_its_errors_and_a_sentence(document):
    for (method, path), operation in operations(document).items():
        asked = [scope for needed in operation["security"] for scopes in needed.values() for scope in scopes]
        assert set(asked) <= SCOPES and len(set(asked)) <= 1, path
        shape = "AnthropicError" if path.startswith("/v1/messages") else "Error"
        content = operation["responses"]["default"]["content"]["application/json"]
        assert content["schema"]["$ref"].endswith(f"/{shape}")
        assert "422" not in operation["responses"] or (method, path) == ("post", "/v1/adapters")
        assert operation.get("description") or operation["summary"]
        named = re.findall(r"{(\w+)}", path)
        assert named == [given["name"] for given in operation.get("parameters", []) if given["in"] == "path"]


async def test_the_scope_that_it_says_is_the_one_that_is_asked(connect, config):
    scopes = {"api_keys": "inference", "metrics_keys": "metrics"}
    async with connect(replace(config, **{name: keys_hashed([name]) for name in (*scopes, "admin_keys")})) as client:
        document = (await client.get("/openapi.json")).json()
        for (method, path), operation in operations(document).items():
            asked = next((scopes[0] for needed in operation["security"] for scopes in needed.values()), None)
            url = re.sub(r"{\w+}", "1", path)
            assert ((await client.request(method, url)).status_code == 401) == (asked is not None), f"{method} {path}"
            for name, holds in scopes.items():
                answer = await client.request(method, url, headers={"authorization": f"Bearer {name}"})
                assert (answer.status_code == 403) == (asked not in (None, holds)), f"{method} {path} {name}"


async def test_the_form_of_a_push_has_the_fields_of_its_json(document):
    body = document["paths"]["/v1/adapters"]["post"]["requestBody"]["content"]
    form = body["multipart/form-data"]["schema"]["properties"]
    fields = {field.name for field in msgspec.structs.fields(Fetch)}
    assert form.keys() - {"files"} == fields - {"source"} and form == UPLOAD["properties"]
    assert body["application/json"]["schema"]["$ref"].endswith("/Fetch")


async def test_changes_say_that_they_take_if_match(document):
    takes = {
        path
        for (_, path), operation in operations(document).items()
        if any(given["name"] == "If-Match" for given in operation.get("parameters", []))
    }
    assert {"/v1/adapters", "/v1/adapters/{name}/promote", "/v1/adapters/{name}/aliases/{alias}"} <= takes
    assert "/v1/feedback" not in takes


async def test_the_document_and_the_page_need_no_key_and_say_nothing_of_this_server(connect, config, make_adapter):
    keyed = replace(config, api_keys=keys_hashed(["ask"]), name="secret-base")
    async with connect(keyed) as client:
        for path, kind in (
            ("/docs", "text/html"),
            ("/docs/reference.css", "text/css"),
            ("/openapi.json", "application/json"),
        ):
            answer = await client.get(path)
            assert answer.status_code == 200 and answer.headers["content-type"].startswith(kind)
            assert str(config.data_dir) not in answer.text and "secret-base" not in answer.text


async def test_the_page_has_every_route_runs_no_script_and_fetches_nothing_from_elsewhere(client, document):
    answer = await client.get("/docs")
    for (method, path), operation in operations(document).items():
        assert f">{method.upper()}</b> <code>{path}</code>" in answer.text
        assert operation["tags"]
    assert "<script" not in answer.text and " style=" not in answer.text and " on" + "click" not in answer.text
    assert not re.findall(r"(?:src|href)=\"(?!/|#)[^\"]*\"", answer.text)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "style-src 'self'" in policy
    assert "files" in answer.text and "multipart/form-data" in answer.text and "scope adapters:write" in answer.text


def test_what_the_document_says_is_text_on_the_page():
    operation = {
        "tags": ["<b>"], "summary": "<i>", "description": "`<u>` & more\n\n<p>", "security": [],
        "parameters": [{"name": "<x>", "in": "query", "required": True, "schema": {"type": "string"}}],
        "responses": {"200": {"description": "<ok>"}},
    }  # fmt: skip
    info = {"version": "1", "description": "about"}
    html = page({"info": info, "paths": {"/<path>": {"get": operation}}, "components": {"schemas": {}}})
    assert "<i>" not in html
    for tag in ("<u>", "<x>", "<ok>", "<path>"):
        assert tag not in html and tag.replace("<", "&lt;").replace(">", "&gt;") in html


def test_paths_are_made_of_whatever_schemas_there_are():
    paths = inference_paths({path: {"type": "object"} for path in SUMMARIES})
    assert paths["/tokenize"]["post"]["requestBody"]["required"] is True
