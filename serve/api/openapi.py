"""The OpenAPI document of our own routes: FastAPI's, with what it cannot see, which is bodies, keys and errors.

What vLLM answers is described by `serve.api.reference.inference`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from serve.api.json_body import BodyReader
from serve.api.routes.callers import ScopeCheck, matched
from serve.api.schemas import Fetch

REFERENCE = "#/components/schemas/{name}"
ABOUT = """Serves base models with many hot-swapped LoRA adapters.

Send a key as `Authorization: Bearer KEY` or `X-API-Key: KEY`. Each route names the scope that the key must hold; a key
with `admin` may do everything. A server without keys answers names of its own machine alone, and asks for none."""

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string", "description": "What came, what is taken, what to do."},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"], "description": "The field that it is about."},
                "code": {"type": ["string", "integer", "null"]},
                "problems": {"type": "array", "items": {"type": "string"}, "description": "Of an upload."},
            },
        }
    },
}
ANTHROPIC_ERROR = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {
                "type": {"type": "string"},
                "message": {"type": "string"},
                "param": {"type": "string"},
                "code": {"type": "string"},
            },
        },
    },
}
SECURITY = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key."},
    "key": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "An API key."},
}
STATUSES = {
    400: "The request does not have the form that this route takes.",
    401: "No key, or one that nobody issued.",
    403: "The key does not hold the scope.",
    404: "No such model, adapter or version, or not the caller's.",
    409: "The change does not fit what is there now.",
    413: "More bytes than are taken here.",
    422: "The bytes are no adapter that this base can run; `problems` lists what does not fit.",
    429: "A limit of the key, or too long a queue: `Retry-After` says when to come back.",
    500: "A defect of the server.",
    503: "The engine or the registry does not answer just now.",
    504: "The time of X-Request-Timeout is over.",
    507: "The disk is full.",
}
_IF_MATCH = {
    "name": "If-Match",
    "in": "header",
    "required": False,
    "schema": {"type": "string", "pattern": r'^(\*|"?v?[0-9]{1,9}"?)$'},
    "description": 'The version that must be live for the change to be made, such as `"3"`; 409 if another one is.',
}
_GROUPS = {
    "drift": ("/v1/drift", "/v1/feedback", "/v1/golden"),
    "adapters": ("/v1/adapters",),
    "fine-tuning": ("/v1/fine_tuning",),
    "vLLM's runtime LoRA API": (
        *("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters"),
        *("/server_info", "/pause", "/resume"),
    ),
    "keys and usage": ("/v1/keys", "/v1/usage"),
    "models and engines": ("/v1/models", "/v1/engines", "/v1/replicas"),
}
_OF_DRIFT = ("/drift", "/baseline", "/golden")
# The form of a push; its fields are those of the JSON that has a `source` in the place of `files`.
UPLOAD = {
    "type": "object",
    "required": ["name", "files"],
    "properties": {
        "name": {"type": "string", "description": "The adapter that this is a version of."},
        "files": {
            "type": "array",
            "minItems": 1,
            "items": {"type": "string", "format": "binary"},
            "description": "adapter_config.json and adapter_model.safetensors, each a part of its own; or one archive.",
        },
        "promote": {"type": "boolean", "default": True},
        "visibility": {"enum": ["private", "shared"]},
        "engine": {"type": "string", "description": "The base that it runs on; the first by default."},
        "why": {"type": "string"},
        "probe_min_effect": {"type": "number", "minimum": 0, "maximum": 100},
        "conversion_error": {"type": "number", "minimum": 0, "maximum": 1},
        "probe": {"type": "boolean", "default": True},
        "keep": {"type": "integer", "minimum": 1, "description": "So many versions stay, beside those that serve."},
        "dry_run": {"type": "boolean", "default": False},
    },
}


class DocumentedApi(FastAPI):
    """FastAPI, whose OpenAPI document says what its routes take, who may call them, and which errors they answer."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            document = super().openapi()
            document["info"]["description"] = ABOUT
            _add_components(document)
            for route in self.routes:
                if isinstance(route, APIRoute) and route.include_in_schema:
                    for method in route.methods:
                        _complete(document["paths"][route.path_format][method.lower()], route, method)
            _add_bodies(document, list(_bodies(self.routes)))
        assert self.openapi_schema is not None
        return self.openapi_schema


def errors(statuses: Iterable[int], schema: str = "Error") -> dict[str, Any]:
    """The `responses` of these statuses and of any other error."""
    content = {"application/json": {"schema": {"$ref": REFERENCE.format(name=schema)}}}
    listed = {str(status): {"description": STATUSES[status], "content": content} for status in statuses}
    return {**listed, "default": {"description": "Any other error.", "content": content}}


def security(scope: str | None) -> list[dict[str, list[str]]]:
    """The requirement of a route that asks for this scope; None asks for no key."""
    return [{scheme: [scope]} for scheme in SECURITY] if scope else []


def _add_components(document: dict[str, Any]) -> None:
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's 422, which is a 400 here
        schemas.pop(name, None)
    schemas |= {"Error": ERROR, "AnthropicError": ANTHROPIC_ERROR}
    components["securitySchemes"] = SECURITY


def _complete(operation: dict[str, Any], route: APIRoute, method: str) -> None:
    """The operation with its group, its key and its errors."""
    dependencies = list(_calls(route.dependant))
    scope = next((str(call.scope) for call in dependencies if isinstance(call, ScopeCheck)), None)
    operation["tags"] = [_group(route.path_format)]
    operation["security"] = security(scope)
    parameters = operation.get("parameters", [])
    # Those of the path come first and in its order, whichever dependency takes them.
    parameters.sort(key=lambda each: (each["in"] != "path", route.path_format.find(f"{{{each['name']}}}")))
    if matched in dependencies:
        operation["parameters"] = parameters = [*parameters, _IF_MATCH]
    body = any(isinstance(call, BodyReader) for call in dependencies)
    statuses = {401, 403} if scope else set()
    statuses |= {400} if parameters or body else set()
    statuses |= {404} if "{" in route.path_format else set()
    statuses |= {409, 413} if method in ("POST", "PUT", "DELETE") else set()
    operation["responses"].pop("422", None)
    push = (method, route.path_format) == ("POST", "/v1/adapters")
    statuses |= {422, 429, 503, 507} if push else set()
    operation["responses"] |= errors(sorted(statuses))


def _calls(dependant: Dependant) -> Iterator[Any]:
    for dependency in dependant.dependencies:
        yield dependency.call
        yield from _calls(dependency)


def _group(path: str) -> str:
    if path.startswith("/v1/adapters/") and any(part in path for part in _OF_DRIFT):
        return "drift"
    return next((group for group, begins in _GROUPS.items() if path.startswith(begins)), "server")


def _bodies(routes: Iterable[Any]) -> Iterator[tuple[APIRoute, BodyReader]]:
    for route in routes:
        if isinstance(route, APIRoute):
            for dependency in route.dependant.dependencies:
                if isinstance(dependency.call, BodyReader):
                    yield route, dependency.call


def _add_bodies(document: dict[str, Any], bodies: list[tuple[APIRoute, BodyReader]]) -> None:
    kinds = [reader.kind for _, reader in bodies]
    (*schemas, fetch), components = msgspec.json.schema_components([*kinds, Fetch], ref_template=REFERENCE)
    document["components"]["schemas"].update(components)
    for (route, reader), schema in zip(bodies, schemas, strict=True):
        content = {"application/json": {"schema": schema}}
        if reader.lines:
            content["application/jsonl"] = {"schema": {"type": "string"}}
        for method in route.methods:
            operation = document["paths"][route.path_format][method.lower()]
            operation["requestBody"] = {"required": reader.required, "content": content}
    if push := document["paths"].get("/v1/adapters", {}).get("post"):
        content = {
            "multipart/form-data": {"schema": UPLOAD},
            "application/json": {"schema": fetch},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        }
        push["requestBody"] = {"required": True, "content": content}
