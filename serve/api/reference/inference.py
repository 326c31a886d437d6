"""The part of the OpenAPI document that vLLM answers: its paths with vLLM's own request models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from serve.adapters.mixing.mixture import MAX_PARTS
from serve.api.openapi import REFERENCE, errors, security
from serve.asgi.error_shapes import is_anthropic
from serve.auth.auth import Scope
from serve.gateway.request import INVOCATIONS, INVOKED, MAX_MODELS, RENAMED

SUMMARIES = {
    "/v1/chat/completions": "Answer a chat, whole or as a stream",
    "/v1/chat/completions/batch": "Answer several chats in one request",
    "/v1/completions": "Continue a text, whole or as a stream",
    "/v1/responses": "Answer in the format of OpenAI's Responses API",
    "/v1/messages": "Answer in Anthropic's format",
    "/v1/messages/count_tokens": "Count the tokens of a request in Anthropic's format",
    "/v1/embeddings": "Embed texts",
    "/pooling": "The pooled output of a model",
    "/classify": "Classify texts",
    "/v1/classify": "Classify texts",
    "/score": "Score pairs of texts",
    "/v1/score": "Score pairs of texts",
    "/rerank": "Order documents by a query",
    "/v1/rerank": "Order documents by a query",
    "/v2/rerank": "Order documents by a query",
    "/inference/v1/generate": "Continue token ids with token ids, for trainers",
    "/tokenize": "The tokens of a text or a chat",
    "/detokenize": "The text of tokens",
    INVOCATIONS: "SageMaker's: a chat, a text, a ranking or embeddings, by what the body has",
}
_STREAMS = (
    INVOCATIONS,
    "/inference/v1/generate",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
)
_STATUSES = (400, 401, 403, 404, 413, 429, 500, 503, 504)
_GROUP = ["inference"]
_WHO_ANSWERS = (
    "`model` is a base's name, `NAME` (an adapter's live version), `NAME@v3`, `NAME@DIGEST12`, `NAME@ALIAS`, "
    "several in one answer (`NAME:0.7+NAME:0.3`) or `auto`, the adapter that fits the prompt; the answer's `model` "
    "says which version answered. Which routes a model answers depends on the model."
)
# What this server reads of a body beside vLLM's own fields.
OURS = {
    "type": "object",
    "properties": {
        "models": {
            "type": "array",
            "items": {"type": "string", "minLength": 1},
            "minItems": 1,
            "maxItems": MAX_MODELS,
            "description": "Models that answer in the place of `model`, in this order, if it does not exist or its "
            "engine does not serve.",
        },
        "adapters": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"name": {"type": "string"}, "weight": {"type": "number", "default": 1}},
                "required": ["name"],
                "additionalProperties": False,
            },
            "minItems": 1,
            "maxItems": MAX_PARTS,
            "description": "Adapters that answer together, as the `model` NAME:WEIGHT+NAME:WEIGHT means.",
        },
    },
}
_TIMEOUT = {
    "name": "X-Request-Timeout",
    "in": "header",
    "required": False,
    "schema": {"type": "number", "exclusiveMinimum": 0, "maximum": 86400},
    "description": "Seconds after which the request ends, in the engine too.",
}


def inference_paths(schemas: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAPI's `paths` of inference; `schemas` has the body of each path."""
    invoked = {"anyOf": [schemas[path] for path in INVOKED.values()]}
    renamed = {path: schemas[own] for path, own in RENAMED.items()}
    schemas = {**schemas, **renamed, INVOCATIONS: invoked}
    paths: dict[str, Any] = {path: {"post": _asks(path, schemas[path])} for path in SUMMARIES}
    id = {"name": "response_id", "in": "path", "required": True, "schema": {"type": "string"}}
    for path, method, summary in (
        ("/v1/responses/{response_id}", "get", "A response that was kept"),
        ("/v1/responses/{response_id}/cancel", "post", "End a response that is made in the background"),
    ):
        operation = {"summary": summary, "parameters": [id], **_answered(path, (400, 401, 403, 404, 429, 503))}
        paths[path] = {method: operation}
    return paths


def _asks(path: str, schema: Any) -> dict[str, Any]:
    body = {"allOf": [schema, OURS]}
    return {
        "summary": SUMMARIES[path],
        "description": _WHO_ANSWERS,
        "parameters": [_TIMEOUT],
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        **_answered(path, _STATUSES),
    }


def _answered(path: str, statuses: tuple[int, ...]) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if path in _STREAMS:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    header = {"description": "The request's id, for logs and ratings.", "schema": {"type": "string"}}
    answer = {"description": "The answer, as vLLM gives it.", "headers": {"x-request-id": header}, "content": content}
    shape = "AnthropicError" if is_anthropic(path) else "Error"
    return {
        "operationId": path.strip("/").replace("/", "_").replace("{", "").replace("}", "").replace(".", "_"),
        "tags": _GROUP,
        "security": security(Scope.INFERENCE),
        "responses": {"200": answer, **errors(statuses, shape)},
    }


def with_inference(document: Mapping[str, Any]) -> dict[str, Any]:
    """The whole document: our own routes, and vLLM's. Slow the first time; not for an event loop."""
    from serve.vllm_backend.request_schemas import request_schemas

    schemas, definitions = request_schemas(REFERENCE.replace("{name}", "{model}"))
    components = document["components"]
    if taken := definitions.keys() & components["schemas"].keys():
        raise ValueError(f"vLLM and loradock both have a schema called {', '.join(sorted(taken))}")
    return {
        **document,
        "paths": {**inference_paths(schemas), **document["paths"]},
        "components": {**components, "schemas": {**definitions, **components["schemas"]}},
    }
