"""The table of request models is that of vLLM's own routers."""

from __future__ import annotations

import json
from importlib import import_module
from typing import get_type_hints

import pytest
from fastapi.routing import APIRoute

from serve.vllm_backend.request_schemas import REQUESTS, request_schemas, request_type

ROUTERS = (
    "openai.chat_completion.api_router",
    "openai.completion.api_router",
    "openai.responses.api_router",
    "anthropic.api_router",
    "pooling.embed.api_router",
    "pooling.pooling.api_router",
    "pooling.classify.api_router",
    "pooling.scoring.api_router",
    "serve.tokenize.api_router",
    "scale_out.token_in_token_out.api_router",
)


@pytest.fixture(scope="module")
def bodies():
    """path -> the type of its body, as vLLM's router says it."""
    routers = [import_module(f"vllm.entrypoints.{name}").router for name in ROUTERS]
    routes = [route for router in routers for route in router.routes if isinstance(route, APIRoute)]
    return {
        route.path: get_type_hints(route.endpoint, include_extras=True)["request"]
        for route in routes
        if "POST" in route.methods and route.dependant.body_params
    }


@pytest.mark.parametrize("path", REQUESTS)
def test_each_path_takes_what_vllms_router_takes(bodies, path):
    assert bodies[path] == request_type(path)


def test_the_schemas_are_json_and_complete():
    by_path, definitions = request_schemas("#/components/schemas/{model}")
    assert by_path.keys() == REQUESTS.keys()
    text = json.dumps([by_path, definitions])
    assert "#/$defs" not in text
    assert set(definitions["CompletionRequest"]["properties"]) >= {"prompt", "max_tokens", "logprobs"}
